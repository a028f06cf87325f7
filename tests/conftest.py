"""Hypothesis without deadlines: a busy machine is no failure (pytest-timeout catches what hangs)."""

from __future__ import annotations

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    # Each of several processes that share the cores keeps to one; their threads would wait for each other.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# Triton chooses its interpreter when it is imported, which any test may do first.
os.environ.setdefault("TRITON_INTERPRET", "1")

from hypothesis import settings

import lawcat_edge  # noqa: F401 (before a test imports onnxruntime: it turns the telemetry off)

settings.register_profile("patient", deadline=None)
settings.load_profile("patient")
