"""GGUF metadata: the converted teacher is the folder's function, and what cannot be is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_teacher import make_teacher
from whole import write_gguf

from lawcat_edge.runtime.errors import LawcatError
from lawcat_edge.teacher import Teacher, resolve

THETA = 10000.0
LLAMA3: dict[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LAWCAT_EDGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def rope_factors(rope: dict[str, Any], width: int) -> np.ndarray:
    """What llama.cpp's conversion stores as rope_freqs.weight, from transformers' own frequencies."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    sizes: dict[str, Any] = {"hidden_size": width * 3, "num_attention_heads": 3, "head_dim": width}
    plain = {"rope_type": "default", "rope_theta": rope["rope_theta"]}
    scaled, base = (
        LlamaRotaryEmbedding(LlamaConfig(**sizes, rope_parameters=given)).inv_freq.double()
        for given in (rope, plain)
    )
    return (base / scaled).float().numpy()


def logits(teacher: Teacher) -> np.ndarray:
    """[T,V] of transformers, on a text long enough for windows and slow waves to show."""
    ids = torch.randint(1, 257, (1, 300), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return teacher.load_model()(ids).logits[0].numpy()


def same(folder: Path, file: Path) -> Teacher:
    """The GGUF gives the folder's logits; returns it."""
    converted = resolve(file)
    want, got = logits(resolve(folder)), logits(converted)
    assert np.abs(want - got).max() < 1e-4 * np.abs(want).max()
    return converted


CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "plain": ("llama", {}, {}),
    "own head width": ("llama", {"head_dim": 32}, {}),
    "untied": ("llama", {"tie_word_embeddings": False}, {}),
    "qwen2": ("qwen2", {}, {}),
    "qwen3": ("qwen3", {}, {}),
    "linear": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": THETA, "factor": 8.0}},
        {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0},
    ),
    "linear as old files say it": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": THETA, "factor": 4.0}},
        {"rope.scale_linear": 4.0},
    ),
    "no scaling": ("llama", {}, {"rope.scaling.type": "none", "rope.scaling.factor": 8.0}),
    "window": ("mistral", {"sliding_window": 40}, {"attention.sliding_window": 40}),
    "no window": ("mistral", {"sliding_window": None}, {}),
    "neutral": ("llama", {}, {"expert_count": 0, "logit_scale": 1.0, "attention.causal": True}),
}


@pytest.mark.parametrize("name", CASES)
def test_the_file_is_the_folders_function(tmp_path: Path, name: str) -> None:
    family, changes, keys = CASES[name]
    folder = make_teacher(tmp_path / "folder", family, **changes)
    converted = same(folder, write_gguf(folder, tmp_path / "m.gguf", keys))
    assert converted.geometry.sliding_window == changes.get("sliding_window")
    if name in ("linear", "window"):  # and the test would see the key ignored
        plain = make_teacher(tmp_path / "plain", family, **{**changes, "rope_parameters": None,
                             "sliding_window": None})  # fmt: skip
        assert np.abs(logits(resolve(plain)) - logits(converted)).max() > 0.1


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(
    "changes",
    [
        {},  # Llama 3.2
        {"factor": 8.0},  # Llama 3.1
        {"original_max_position_embeddings": 4096, "high_freq_factor": 8.0},
        {"factor": 16.0, "original_max_position_embeddings": 512, "rope_theta": 10000.0},
    ],
)
def test_the_frequencies_of_llama_3(tmp_path: Path, head_dim: int, changes: dict[str, Any]) -> None:
    rope = {**LLAMA3, **changes}
    folder = make_teacher(
        tmp_path / "folder", head_dim=head_dim, rope_parameters=rope, max_position_embeddings=131072
    )
    tensors = {"rope_freqs.weight": rope_factors(rope, head_dim)}
    converted = same(folder, write_gguf(folder, tmp_path / "m.gguf", tensors=tensors))
    scaling = converted.geometry.rope_scaling
    assert scaling is not None
    assert scaling["rope_type"] == "llama3"
    for key in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"):
        assert scaling[key] == pytest.approx(rope[key], rel=1e-3), key
    np.testing.assert_allclose(converted.geometry.inv_freq(), resolve(folder).geometry.inv_freq(), rtol=1e-4)


def test_factors_of_one_change_nothing(tmp_path: Path) -> None:
    folder = make_teacher(tmp_path / "folder")
    ones = {"rope_freqs.weight": np.ones(8, np.float32)}
    assert resolve(write_gguf(folder, tmp_path / "m.gguf", tensors=ones)).geometry.rope_scaling is None


@pytest.mark.parametrize(
    ("family", "keys", "named"),
    [
        ("llama", {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}, "llama.rope.scaling.type"),
        ("llama", {"rope.scaling.attn_factor": 1.5}, "llama.rope.scaling.attn_factor"),
        ("llama", {"rope.scaling.factor": "four"}, "llama.rope.scaling.factor"),
        ("llama", {"expert_count": 8}, "llama.expert_count"),
        ("llama", {"attention.causal": False}, "llama.attention.causal"),
        ("llama", {"attention.scale": 0.5}, "llama.attention.scale"),
        ("llama", {"final_logit_softcapping": 30.0}, "llama.final_logit_softcapping"),
        ("llama", {"something.new": 1}, "llama.something.new"),
        ("qwen2", {"attention.sliding_window": 32}, "qwen2.attention.sliding_window"),
    ],
)
def test_what_changes_the_function_is_refused_by_name(
    tmp_path: Path, cache: Path, family: str, keys: dict[str, Any], named: str
) -> None:
    file = write_gguf(make_teacher(tmp_path / "folder", family), tmp_path / "m.gguf", keys)
    with pytest.raises(LawcatError, match=named):
        resolve(file)
    assert not list(cache.glob("*"))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("blk.0.attn_q.bias", (48,)),
        ("blk.1.attn_output.bias", (48,)),
        ("blk.0.attn_q_norm.weight", (16,)),
        ("rope_factors_long.weight", (8,)),
        ("rope_freqs.weight", (8,)),
        ("rope_freqs.weight", (4,)),
    ],
)
def test_a_tensor_that_would_be_dropped_is_refused_by_name(
    tmp_path: Path, cache: Path, name: str, shape: tuple[int, ...]
) -> None:
    values = np.random.default_rng(0).uniform(1, 9, shape).astype(np.float32)
    file = write_gguf(make_teacher(tmp_path / "folder"), tmp_path / "m.gguf", tensors={name: values})
    with pytest.raises(LawcatError, match=name):
        resolve(file)
    assert not list(cache.glob("*"))


def test_a_missing_bias_of_qwen2_is_not_made_up(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    folder = make_teacher(tmp_path / "folder", "qwen2")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.self_attn.k_proj.bias"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(LawcatError, match=r"blk\.1\.attn_k\.bias"):
        resolve(write_gguf(folder, tmp_path / "m.gguf"))
