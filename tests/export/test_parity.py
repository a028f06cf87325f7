"""An exported bundle computes what torch computes, with every option, in any pieces, at any length."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exported import logits_of, make_bundle, make_student

from lawcat_edge.config import LawcatConfig
from lawcat_edge.export.verify import compare, replay
from lawcat_edge.runtime.bundle.manifest import Bundle
from lawcat_edge.runtime.engine.session import Engine
from lawcat_edge.runtime.engine.state import State

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
HYBRID: dict[str, Any] = {"layer_types": ("full_attention", "linear_attention"), "attention_span": 33}
SINKS: dict[str, Any] = {**HYBRID, "attention_sinks": 3}
EACH = pytest.mark.parametrize("hybrid", [HYBRID, SINKS], ids=["sliding", "sinks"])
CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("llama", {}, {}),
    ("llama", {"window": 8}, {"attention_bias": True, "mlp_bias": True, "rope_parameters": LLAMA3}),
    ("llama", {"window": 1, "conv_kernel": 2}, {"num_key_value_heads": 3}),
    ("mistral", {"rope": True, "conv_kernel": 7}, {"tie_word_embeddings": False}),
    ("mistral", {"rope": True, "window": 5}, {"num_attention_heads": 4, "num_key_value_heads": 2}),
    ("qwen2", {"window": 17, "feature_dim": 3}, {"num_attention_heads": 4, "num_key_value_heads": 2}),
    ("qwen3", {"gate_rank": 5}, {"tie_word_embeddings": False, "attention_bias": True}),
    ("qwen3", {"window": 6, "rope": True}, {"num_attention_heads": 4, "num_key_value_heads": 2}),
    # layers with full attention, whose span is passed within the text, or not
    ("llama", {"window": 5, "window_scaling": "softmax", **HYBRID}, {"rope_parameters": LLAMA3}),
    ("llama", {"window": 4, **SINKS}, {"num_key_value_heads": 3, "rope_parameters": LLAMA3}),
    ("qwen3", {**SINKS, "attention_span": 100}, {"num_attention_heads": 4, "num_key_value_heads": 2}),
    ("mistral", {**HYBRID, "attention_span": 60}, {"sliding_window": 11, "num_key_value_heads": 3}),
    ("qwen2", {"window": 7, **HYBRID}, {"num_attention_heads": 4, "num_key_value_heads": 2}),
    ("qwen3", {"window": 4, "rope": True, **HYBRID, "attention_span": 1000}, {"attention_bias": True}),
]


@pytest.mark.parametrize(("family", "settings", "changes"), CASES)
def test_fp32_bundle_equals_torch(
    tmp_path: Path, family: str, settings: dict[str, Any], changes: dict[str, Any]
) -> None:
    config = LawcatConfig(**{"feature_dim": 8, **settings})
    teacher, model, adapter = make_student(tmp_path / "t", family, config, lora=2, **changes)
    report = make_bundle(teacher, model, adapter, tmp_path / "b", verify=False)
    engine = Engine(Bundle.open(tmp_path / "b"))
    # a text of more than three windows, cut in the middle of everything; buffers are cleared twice
    tokens = np.random.default_rng(0).integers(0, 257, 220)
    reference = logits_of(model, tokens)
    for pieces in ([220], [1] * 220, [3, 1, 40, 2, 1, 64, 9, 1, 1, 98]):
        agreement = compare(reference, replay(engine, tokens, pieces))
        assert agreement.rel_err < 3e-5, (pieces, agreement)
    assert report["bytes"] == Bundle.open(tmp_path / "b").bytes_on_disk + _manifest_size(tmp_path / "b")


def test_torch_is_not_insensitive(tmp_path: Path) -> None:
    """The comparison sees one wrong number in each kind of new parameter."""
    config = LawcatConfig(feature_dim=8, window=4)
    teacher, model, adapter = make_student(tmp_path / "t", config=config)
    tokens = np.random.default_rng(0).integers(0, 257, 60)
    reference = logits_of(model, tokens)
    for name in ("conv_q", "conv_k", "feature", "gate_a", "gate_b", "gate_bias", "omega"):
        changed = {key: value.copy() for key, value in adapter.tensors.items()}
        changed[f"layers.1.{name}"].flat[-1] += 0.5
        make_bundle(teacher, model, replace(adapter, tensors=changed), tmp_path / "b", verify=False)
        got = replay(Engine(Bundle.open(tmp_path / "b")), tokens, [60])
        assert compare(reference, got).rel_err > 3e-5, name


@pytest.mark.parametrize(
    "hybrid",
    [{}, {**HYBRID, "attention_span": 300}, {**SINKS, "attention_span": 300}],
    ids=["pure", "sliding", "sinks"],
)
def test_long_text_with_a_window(tmp_path: Path, hybrid: dict[str, Any]) -> None:
    """After ten thousand tokens the logits still follow torch: positions stay right past any length."""
    config = LawcatConfig(feature_dim=8, window=8, rope=True, **hybrid)
    teacher, model, adapter = make_student(tmp_path / "t", config=config)
    make_bundle(teacher, model, adapter, tmp_path / "b", verify=False)
    engine = Engine(Bundle.open(tmp_path / "b"), chunk=512)
    tokens = np.random.default_rng(0).integers(0, 257, 10_000)
    mine, theirs = engine.new_state(), model.empty_state(1)
    with torch.no_grad():
        for start in range(0, 9984, 512):
            engine.forward(tokens[None, start : min(start + 512, 9984)], mine)
            _, theirs = model(torch.from_numpy(tokens[None, start : min(start + 512, 9984)]), theirs)
        reference, _ = model(torch.from_numpy(tokens[None, 9984:]), theirs)
    got = np.stack([engine.forward(tokens[None, i : i + 1], mine)[0].copy() for i in range(9984, 10_000)])
    assert compare(reference[0].numpy(), got).rel_err < 1e-4


def test_extreme_gates(tmp_path: Path) -> None:
    """Gate logits from -200 to +20: the state forgets at once or never, and nothing overflows."""
    teacher, model, adapter = make_student(tmp_path / "t")
    bias = model.adapter_parameters()["layers.0.gate_bias"]
    with torch.no_grad():
        bias.copy_(torch.linspace(-200, 20, len(bias)))
    adapter.tensors["layers.0.gate_bias"] = bias.detach().numpy().copy()
    report = make_bundle(teacher, model, adapter, tmp_path / "b")
    assert report["parity"]["ort"]["rel_err"] < 3e-5


@EACH
def test_batch_of_texts(tmp_path: Path, hybrid: dict[str, Any]) -> None:
    """Sequences of a batch do not see each other."""
    config = LawcatConfig(feature_dim=8, window=3, **hybrid)
    teacher, model, adapter = make_student(tmp_path / "t", config=config)
    make_bundle(teacher, model, adapter, tmp_path / "b", verify=False, ops=("ort", "portable"))
    tokens = np.random.default_rng(0).integers(0, 257, (3, 40))
    for flavour in ("ort", "portable"):
        engine = Engine(Bundle.open(tmp_path / "b"), flavour=flavour)
        state, got = engine.new_state(3), []
        for start, stop in ((0, 25), (25, 26), (26, 40)):
            got.append(engine.forward(tokens[:, start:stop], state, all_positions=True).copy())
        for row in range(3):
            agreement = compare(logits_of(model, tokens[row]), np.concatenate(got, 1)[row])
            assert agreement.rel_err < 3e-5, (flavour, row)


@EACH
@pytest.mark.parametrize("rope", [False, True])
def test_texts_of_different_lengths_share_a_step(tmp_path: Path, rope: bool, hybrid: dict[str, Any]) -> None:
    """Every row of a batch has positions and filled slots of its own."""
    config = LawcatConfig(feature_dim=8, window=6, rope=rope, **hybrid)
    teacher, model, adapter = make_student(tmp_path / "t", config=config)
    make_bundle(teacher, model, adapter, tmp_path / "b", verify=False)
    engine = Engine(Bundle.open(tmp_path / "b"))
    texts = [np.random.default_rng(length).integers(0, 257, length + 8) for length in (9, 700, 30)]
    states = [engine.new_state() for _ in texts]
    for text, state in zip(texts, states, strict=True):
        engine.prefill(text[:-8], state)
    state = State.stack(states)
    assert state.positions.tolist() == [9, 700, 30]
    for i in range(8):
        logits = engine.forward(np.array([[text[i - 8]] for text in texts]), state).copy()
        for row, text in enumerate(texts):
            reference = logits_of(model, text)[len(text) - 8 + i]
            assert compare(reference[None], logits[row : row + 1]).rel_err < 3e-5, (i, row)


@pytest.mark.parametrize(
    ("scheme", "rel_err", "kl"), [("int8", 0.05, 0.003), ("int8-dynamic", 0.2, 0.02), ("int4", 0.6, 0.3)]
)
@pytest.mark.parametrize("tied", [True, False])
def test_quantised_bundles(tmp_path: Path, scheme: str, rel_err: float, kl: float, tied: bool) -> None:
    teacher, model, adapter = make_student(tmp_path / "t", hidden_size=96, tie_word_embeddings=tied)
    report = make_bundle(teacher, model, adapter, tmp_path / "b", scheme=scheme)
    assert 1e-5 < report["parity"]["ort"]["rel_err"] < rel_err, report
    assert 1e-9 < report["parity"]["ort"]["kl"] < kl, report


def _manifest_size(folder: Path) -> int:
    return (folder / "lawcat_bundle.json").stat().st_size
