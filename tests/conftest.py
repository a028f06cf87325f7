"""What all tests share: Hypothesis without deadlines (pytest-timeout catches what hangs), and bundles."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

if "PYTEST_XDIST_WORKER" in os.environ:
    # Each of several processes that share the cores keeps to one; their threads would wait for each other.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# Triton chooses its interpreter when it is imported, which any test may do first.
os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
from environments import its_turn
from hypothesis import settings
from tiny_bundle import build_tiny_bundle

import lawcat_edge  # noqa: F401 (before a test imports onnxruntime: it turns the telemetry off)
from lawcat_edge.runtime import Model

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


VARIANTS: dict[str, Any] = {  # of tiny models that the tests of decoding share
    "plain": {},
    "both": {"window": 2, "rope": True},
    "hybrid": {"window": 3, "span": 9},
    "sinks": {"window": 3, "span": 24, "sinks": 2},
}


@pytest.fixture(scope="session")
def decoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    """Tiny models of every kind of state; each test brings or begins a context of its own."""
    base = tmp_path_factory.mktemp("decoders")
    folders = {name: build_tiny_bundle(base / name, **options) for name, options in VARIANTS.items()}
    models = {name: Model.load(folder, threads=1, chunk=16) for name, folder in folders.items()}
    # Tensors that alternate between two arrays, as in graphs whose operators do not write where they read.
    models["apart"] = Model.load(folders["hybrid"], threads=1, chunk=16)
    models["apart"].engine._in_place = [False] * len(models["apart"].engine._in_place)
    return models


@pytest.fixture(scope="session", params=[*VARIANTS, "apart"])
def decoder(request: pytest.FixtureRequest, decoders: dict[str, Model]) -> Model:
    """Each of them in turn."""
    return decoders[request.param]
