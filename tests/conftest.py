"""Hypothesis without deadlines: a busy machine is no failure (pytest-timeout catches what hangs)."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:
    # Each of several processes that share the cores keeps to one; their threads would wait for each other.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# Triton chooses its interpreter when it is imported, which any test may do first.
os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
from environments import its_turn
from hypothesis import settings

import lawcat_edge  # noqa: F401 (before a test imports onnxruntime: it turns the telemetry off)

settings.register_profile("patient", deadline=None)
settings.load_profile("patient")


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The published adapter's bundle in a scheme, verified: exported once, for all processes of a run."""
    from lawcat_edge.adapter import GENERAL
    from lawcat_edge.cli import run

    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def bundle(scheme: str) -> Path:
        place = base / "published" / scheme
        place.parent.mkdir(exist_ok=True)
        with its_turn(place):
            if not place.is_dir():
                options = ["--adapter", GENERAL, "--scheme", scheme, "--out", str(place)]
                assert run(["export", "smollm2", *options]) == 0
        return place

    return bundle
