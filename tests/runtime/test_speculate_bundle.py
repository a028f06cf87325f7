"""Speculation on exported bundles: the graph of the last position serves a trial, and no other is loaded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

from exported import make_bundle, make_student

from lawcat_edge.config import LawcatConfig
from lawcat_edge.runtime import Bundle, Engine, Model
from lawcat_edge.runtime.bundle.flavours import DEFAULT_OPS, can_run


@pytest.mark.parametrize("flavour", DEFAULT_OPS)
@pytest.mark.parametrize("window", [0, 5])
def test_a_trial_gives_the_logits_of_all_positions(tmp_path: Path, window: int, flavour: str) -> None:
    if not can_run(flavour):
        pytest.skip("the operators are not compiled")
    config = LawcatConfig(feature_dim=8, window=window)
    make_bundle(*make_student(tmp_path / "teacher", config=config), tmp_path / "bundle")
    engine = Engine(Bundle.open(tmp_path / "bundle"), threads=1, flavour=flavour)
    tokens = np.random.default_rng(0).integers(0, engine.vocab_size, 40)
    state, other = engine.new_state(), engine.new_state()
    for each in (state, other):
        engine.prefill(tokens[:20], each)
    before = [array.copy() for array in state.tensors_of()]
    draft = tokens[None, 20:27]
    wanted = engine.forward(draft, other, all_positions=True)[0].copy()
    engine.release("all")
    np.testing.assert_allclose(engine.try_tokens(draft, state), wanted, atol=1e-4)
    # The runner's graph has an input more, but for one that onnxruntime-genai reads too: `ort` without a
    # window.
    assert ("all" in engine._sessions) == (flavour == "ort" and not window)
    for array, kept in zip(state.tensors_of(), before, strict=True):
        np.testing.assert_array_equal(array, kept)
    assert state.position == 20
    engine.try_tokens(draft, state)
    state.accept(7)
    for array, after in zip(state.tensors_of(), other.tensors_of(), strict=True):
        np.testing.assert_allclose(array, after, atol=1e-5)
    # An input with a default is none for whoever does not know it.
    one = engine.forward(tokens[None, 27:], state)
    np.testing.assert_allclose(one, engine.forward(tokens[None, 27:], other), atol=1e-4)

    model = Model.load(tmp_path / "bundle", threads=1, flavour=flavour)
    prompt = [3, 1, 4, 1, 5] * 5
    fast = model.generate(prompt, max_new_tokens=50, ignore_eos=True)
    plain = model.generate(prompt, max_new_tokens=50, ignore_eos=True, speculate=0)
    assert fast.result().tokens == plain.result().tokens
