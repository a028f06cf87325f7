"""Numbers that stay numbers: any gates, one-hot features, edges of the vocabulary, long texts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from exported import make_bundle, make_student
from tiny_bundle import V, build_tiny_bundle

from lawcat_edge.config import LawcatConfig
from lawcat_edge.runtime.bundle.manifest import Bundle
from lawcat_edge.runtime.engine.session import Engine
from lawcat_edge.runtime.engine.state import State


def check_state(state: State) -> None:
    """Finite everywhere; and what normalises is positive: the last column of a recurrent state is the sum of
    the keys' features, of which the newest token alone brings two (two softmaxes)."""
    for tensor, values in zip(state.tensors, state.arrays, strict=True):
        assert np.isfinite(values).all(), tensor.output
        if tensor.output.endswith("recurrent_state"):
            normaliser = values[..., -1]  # [B,H,F]
            assert (normaliser >= 0).all(), tensor.output
            assert (normaliser.sum(-1) >= 2 - 1e-3).all(), tensor.output


TEXTS = {
    "the same token": lambda rng, n: np.full(n, 7),
    "the first and the last": lambda rng, n: np.where(np.arange(n) % 2, 0, V - 1),
    "random": lambda rng, n: rng.integers(0, V, n),
    "a short loop": lambda rng, n: np.arange(n) % 5,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TEXTS)
def test_a_hundred_thousand_tokens(tmp_path: Path, name: str) -> None:
    engine = Engine(Bundle.open(build_tiny_bundle(tmp_path / "b", window=2, rope=True)), threads=1)
    tokens = TEXTS[name](np.random.default_rng(0), 100_000)
    state = engine.new_state()
    for start in range(0, len(tokens), 1000):
        logits = engine.forward(tokens[None, start : start + 1000], state)
        assert np.isfinite(logits).all()
        check_state(state)
    assert state.position == 100_000


GATES = {
    "never forgets": lambda n: np.full(n, 1e4),
    "forgets at once": lambda n: np.full(n, -1e4),
    "beyond exp": lambda n: np.full(n, -1e30),
    "all at once": lambda n: np.linspace(-1e4, 1e4, n),
    "a smallest decay": lambda n: np.full(n, 17.0),
}


@pytest.mark.parametrize("scheme", ["fp32", "int8"])
@pytest.mark.parametrize("gates", GATES)
def test_gates_anywhere_in_their_range(tmp_path: Path, gates: str, scheme: str) -> None:
    config = LawcatConfig(feature_dim=8, window=4, gate_divisor=1e-3 if gates == "beyond exp" else 16.0)
    teacher, model, adapter = make_student(tmp_path / "t", config=config)
    for name, value in adapter.tensors.items():
        if name.endswith("gate_bias"):
            adapter.tensors[name] = GATES[gates](value.size).astype(np.float32)
        if name.endswith("feature"):
            # So steep that a softmax is one number in float32: q and k may share no feature at all.
            adapter.tensors[name] = value * np.float32(1e4)
    make_bundle(teacher, model, adapter, tmp_path / "b", scheme=scheme, verify=False)
    engine = Engine(Bundle.open(tmp_path / "b"), threads=1)
    rng = np.random.default_rng(1)
    for tokens in (rng.integers(0, 257, 3000), np.where(np.arange(3000) % 2, 0, 256)):
        state = engine.new_state()
        for start in range(0, 3000, 250):
            assert np.isfinite(engine.forward(tokens[None, start : start + 250], state)).all()
            check_state(state)
        for token in tokens[:20]:
            assert np.isfinite(engine.forward(np.array([[token]]), state)).all()
        check_state(state)
