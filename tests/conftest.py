"""Hypothesis without deadlines: a busy machine is no failure (pytest-timeout catches what hangs)."""

from __future__ import annotations

from hypothesis import settings

import lawcat_edge  # noqa: F401 (before a test imports onnxruntime: it turns the telemetry off)

settings.register_profile("patient", deadline=None)
settings.load_profile("patient")
