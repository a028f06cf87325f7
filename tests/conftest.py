"""What all tests share: Hypothesis without deadlines (pytest-timeout catches what hangs), and bundles."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

if "PYTEST_XDIST_WORKER" in os.environ:
    # Each of several processes that share the cores keeps to one; their threads would wait for each other.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# Triton chooses its interpreter when it is imported, which any test may do first.
os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
from environments import its_turn, run_demo
from hypothesis import settings
from tiny_bundle import build_tiny_bundle

import lawcat_edge  # noqa: F401 (before a test imports onnxruntime: it turns the telemetry off)
from lawcat_edge.runtime import Model

# Files that take longest begin first, so that no process is left with one at the end.
SLOWEST = (
    *("test_main_job", "test_distributed", "test_compare", "test_loops", "test_web", "test_mobile"),
    *("test_parity", "test_faults", "test_distill", "test_server", "test_exporter", "test_versions"),
)
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(SLOWEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """(the folder of ``lawcat-edge demo``, what it printed): run once, for all processes of a test run.

    Its ``bundle`` is the published adapter's in int8, verified.
    """
    base = tmp_path_factory.getbasetemp()
    place = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "demo"
    with its_turn(place):
        if not (place / "facts.json").is_file():
            facts = run_demo(place)[0]
            (place / "facts.json").write_text(json.dumps(facts))
    return place, json.loads((place / "facts.json").read_text())


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
