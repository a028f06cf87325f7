"""Geometry and weight sources: what a teacher is, and its tensors one at a time."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_teacher import make_teacher

from lawcat_edge.families import FAMILIES, Geometry
from lawcat_edge.lora import LoraSettings
from lawcat_edge.runtime.errors import LawcatError
from lawcat_edge.weights import (
    ArrayWeights,
    MergedWeights,
    RandomWeights,
    SafetensorsWeights,
    check_shapes,
    tensor_shapes,
)

BASE: dict[str, Any] = {
    "family": "llama",
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "intermediate_size": 40,
    "vocab_size": 300,
    "tie_embeddings": True,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_geometry_names_every_tensor_of_a_family(tmp_path: Path, family: str) -> None:
    bias = {"attention_bias": True} if family in ("llama", "qwen3") else {}
    folder = make_teacher(tmp_path, family, **bias)
    geometry = Geometry.from_hf(json.loads((folder / "config.json").read_text()))
    weights = SafetensorsWeights(folder)
    check_shapes(weights, geometry)
    assert set(weights.names()) == set(tensor_shapes(geometry))
    assert Geometry.from_dict(json.loads(json.dumps(geometry.to_dict()))) == geometry


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 5e5},
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
        {
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ],
)
def test_rotary_frequencies_are_those_of_transformers(rope: dict[str, Any]) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    sizes: dict[str, Any] = {"hidden_size": 256, "num_attention_heads": 4, "max_position_embeddings": 131072}
    config = LlamaConfig(**sizes, rope_parameters=rope)
    expected = LlamaRotaryEmbedding(config).inv_freq.double().numpy()
    np.testing.assert_allclose(Geometry.from_hf(config).inv_freq(), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"family": "gpt2"}, "gpt2"),
        ({"num_kv_heads": 3}, "multiple"),
        ({"head_dim": 7}, "even"),
        ({"vocab_size": 1.5}, "vocab_size"),
        ({"tie_embeddings": 1}, "tie_embeddings"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "yarn"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "incomplete"),
        ({"sliding_window": 0}, "sliding_window"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_wrong_geometry_is_refused(change: dict[str, Any], word: str) -> None:
    Geometry.from_dict(BASE)
    with pytest.raises(LawcatError, match=word):
        Geometry.from_dict(BASE | change)


def test_unsupported_teachers_are_named() -> None:
    config = {"model_type": "llama", "hidden_size": 8, "num_attention_heads": 1}
    for change, word in (
        ({"model_type": "gemma"}, "gemma"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({}, "num_hidden_layers|rms_norm_eps|intermediate_size"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial"),
    ):
        with pytest.raises(LawcatError, match=word):
            Geometry.from_hf(config | change)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rows_and_types(tmp_path: Path, dtype: torch.dtype) -> None:
    from safetensors.torch import save_file

    tensor = torch.randn(11, 5).to(dtype)
    save_file({"a": torch.randn(3).to(dtype), "t": tensor}, tmp_path / "x.safetensors")
    weights = SafetensorsWeights(tmp_path)
    expected = tensor.float().numpy()
    assert weights.get("t").dtype == np.float32
    np.testing.assert_array_equal(weights.get("t"), expected)
    np.testing.assert_array_equal(weights.rows("t", 4, 9), expected[4:9])
    np.testing.assert_array_equal(weights.rows("t", 9, 99), expected[9:])
    with pytest.raises(LawcatError, match="lack nothing"):
        weights.get("nothing")


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    with pytest.raises(LawcatError, match=r"no \*\.safetensors"):
        SafetensorsWeights(tmp_path)
    path = tmp_path / "x.safetensors"
    save_file({"t": np.ones((64, 8), np.float32)}, path)
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole[:40], whole[:4], b"", b"\xff" * 400, whole[:8] + b"x" + whole[9:]):
        path.write_bytes(damaged)
        with pytest.raises(LawcatError, match="damaged or truncated"):
            SafetensorsWeights(tmp_path)
    path.write_bytes(whole.replace(b'"shape":[64,8]', b'"shape":[64,9]'))
    with pytest.raises(LawcatError, match="damaged"):
        SafetensorsWeights(tmp_path)
    save_file({"t": np.ones(4, np.int64)}, path)
    with pytest.raises(LawcatError, match="I64"):
        SafetensorsWeights(tmp_path).shape("t")
    path.write_bytes(whole)
    (tmp_path / "y.safetensors").write_bytes(whole)
    with pytest.raises(LawcatError, match="two files"):
        SafetensorsWeights(tmp_path)


def test_merging_adds_the_low_rank_update() -> None:
    geometry = Geometry.from_dict(BASE)
    base = RandomWeights(geometry)
    generator = np.random.default_rng(0)
    down, up = generator.standard_normal((3, 32), np.float32), generator.standard_normal((16, 3), np.float32)
    tensors = {"layers.1.k_proj.lora_A": down, "layers.1.k_proj.lora_B": up}
    merged = MergedWeights(base, SimpleNamespace(tensors=tensors, lora=LoraSettings(3, 12)))
    name = "model.layers.1.self_attn.k_proj.weight"
    expected = base.get(name) + 4.0 * up @ down
    np.testing.assert_allclose(merged.get(name), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(merged.rows(name, 3, 9), merged.get(name)[3:9])
    other = "model.layers.0.self_attn.k_proj.weight"
    np.testing.assert_array_equal(merged.get(other), base.get(other))
    tensors["layers.1.k_proj.lora_B"] = up[:5]
    with pytest.raises(LawcatError, match="another teacher"):
        MergedWeights(base, SimpleNamespace(tensors=tensors, lora=LoraSettings(3, 12)))


def test_random_weights_do_not_depend_on_the_slice() -> None:
    geometry = Geometry.from_dict(BASE)
    weights, name = RandomWeights(geometry, seed=5), "model.embed_tokens.weight"
    whole = weights.get(name)
    assert whole.shape == (300, 32)
    np.testing.assert_array_equal(weights.rows(name, 250, 270), whole[250:270])
    assert np.abs(RandomWeights(geometry, seed=6).get(name) - whole).max() > 0.1
    check_shapes(weights, geometry)


def test_missing_and_misshapen_tensors_are_named() -> None:
    geometry = Geometry.from_dict(BASE)
    arrays = {name: np.zeros(shape, np.float32) for name, shape in tensor_shapes(geometry).items()}
    arrays["model.norm.weight"] = np.zeros(31, np.float32)
    with pytest.raises(LawcatError, match=r"model\.norm\.weight is \[31\]"):
        check_shapes(ArrayWeights(arrays), geometry)
    del arrays["model.norm.weight"]
    with pytest.raises(LawcatError, match=r"lack model\.norm\.weight"):
        check_shapes(ArrayWeights(arrays), geometry)
