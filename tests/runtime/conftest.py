"""Models that the tests of decoding share."""

from __future__ import annotations

from typing import Any

import pytest
from tiny_bundle import build_tiny_bundle

from lawcat_edge.runtime import Model

VARIANTS: dict[str, Any] = {
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
