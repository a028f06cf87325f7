"""Whole small artefacts of every kind, from a random teacher of 48 numbers a token."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np


def build(folder: Path, kinds: Sequence[str]) -> None:
    """Write the artefacts that `kinds` need into `folder`, each under its kind's name."""
    if {"gguf", "adapter", "safetensors", "exported"} & set(kinds):
        build_torch(folder, kinds)
    if "bundle" in kinds or "snapshot" in kinds:
        build_runtime(folder)
    if "ranges" in kinds:
        build_ranges(folder)


def build_runtime(folder: Path) -> None:
    """A bundle (made by hand, with window and rotary inputs) and a snapshot of a chat with it."""
    from tiny_bundle import build_tiny_bundle

    from lawcat_edge.runtime import Model

    model = Model.load(build_tiny_bundle(folder / "bundle", window=2, rope=True, span=6), threads=1)
    (folder / "snapshot").mkdir()
    list(model.chat("Why is the sea salt?", max_new_tokens=4, ignore_eos=True))
    model.snapshot(folder / "snapshot" / "talk.snapshot")


def build_torch(folder: Path, kinds: Sequence[str]) -> None:
    """A teacher as a folder and as GGUF, an adapter of it with LoRA and a window, and both in int8."""
    from exported import make_bundle, make_student

    from lawcat_edge.adapter import Adapter
    from lawcat_edge.config import LawcatConfig

    config = LawcatConfig(feature_dim=8, window=4)
    teacher, model, student = make_student(folder / "safetensors", "llama", config, lora=2)
    adapter = Adapter(config, teacher.geometry, "toy", teacher.sha256, student.tensors, student.lora)
    adapter.save(folder / "adapter")
    if "exported" in kinds:
        make_bundle(teacher, model, student, folder / "exported", scheme="int8", name="exported")
    if "gguf" in kinds:
        (folder / "gguf").mkdir()
        write_gguf(folder / "safetensors", folder / "gguf" / "model.gguf")
    shutil.rmtree(folder / "safetensors" / ".cache", ignore_errors=True)


def build_ranges(folder: Path) -> None:
    from lawcat_edge.calibration.histogram import Histogram
    from lawcat_edge.calibration.ranges import Ranges

    rng = np.random.default_rng(0)
    found = Ranges({"teacher_sha256": "a", "adapter_sha256": None, "bundle_sha256": "b"}, tokens=1024)
    for name in ("layers.0/qkv", "layers.0/down", "head", "state.0"):
        found.tensors[name] = Histogram()
        found.tensors[name].add(rng.standard_normal(1000).astype(np.float32) * 3)
        found.segments[name] = [3.0, 4.5]
    (folder / "ranges").mkdir()
    found.save(folder / "ranges" / "ranges.json")


def write_gguf(
    teacher: Path,
    path: Path,
    keys: dict[str, Any] | None = None,
    tensors: dict[str, np.ndarray] | None = None,
) -> Path:
    """The teacher's folder as a GGUF file in float32, with its byte-level tokenizer.

    keys: more metadata of its family (``attention.sliding_window``), tensors: more of these. The rows of q
    and k of a llama lie in pairs, as llama.cpp's own conversion orders them.
    """
    import gguf
    from tokenizers import Tokenizer

    from lawcat_edge.families import Geometry
    from lawcat_edge.runtime.files import read_json
    from lawcat_edge.weights import SafetensorsWeights

    g = Geometry.from_hf(read_json(teacher / "config.json"))
    weights = SafetensorsWeights(teacher)
    family = "llama" if g.family == "mistral" else g.family
    writer = gguf.GGUFWriter(path, family)
    sizes: dict[str, int] = {
        "embedding_length": g.hidden_size, "block_count": g.num_layers, "vocab_size": g.vocab_size,
        "feed_forward_length": g.intermediate_size, "attention.head_count": g.num_heads,
        "attention.head_count_kv": g.num_kv_heads, "attention.key_length": g.head_dim,
        "attention.value_length": g.head_dim, "context_length": 4096, "rope.dimension_count": g.head_dim,
    }  # fmt: skip
    for name, value in sizes.items():
        writer.add_uint32(f"{family}.{name}", value)
    writer.add_float32(f"{family}.attention.layer_norm_rms_epsilon", g.rms_norm_eps)
    writer.add_float32(f"{family}.rope.freq_base", g.rope_theta)
    adders: dict[type, Any] = {
        bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string,
    }  # fmt: skip
    for name, given in (keys or {}).items():
        adders[type(given)](f"{family}.{name}", given)
    vocabulary: dict[str, int] = Tokenizer.from_file(str(teacher / "tokenizer.json")).get_vocab()
    writer.add_tokenizer_model("gpt2")
    tokens = sorted(vocabulary, key=lambda token: vocabulary[token])
    writer.add_token_list([*tokens[:-1], "Ġt"])  # one merge, since a list of none is no GGUF
    writer.add_token_types([3] + [1] * (len(vocabulary) - 1))
    writer.add_token_merges(["Ġ t"])
    for name in ("bos", "eos"):
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", 0)
    names = {
        "model.embed_tokens": "token_embd", "model.norm": "output_norm", "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "self_attn.q_norm": "attn_q_norm",
        "self_attn.k_norm": "attn_k_norm", "lm_head": "output",
    }  # fmt: skip
    heads = {"attn_q": g.num_heads, "attn_k": g.num_kv_heads}
    for name in weights.names():
        stem, kind = name.rsplit(".", 1)
        if stem.startswith("model.layers."):
            _, _, layer, part = stem.split(".", 3)
            stem = f"blk.{layer}.{names[part]}"
        else:
            stem = names[stem]
        tensor: Any = weights.get(name)
        count = heads.get(stem.rsplit(".", 1)[-1])
        if family == "llama" and count:
            halves = tensor.reshape(count, 2, g.head_dim // 2, *tensor.shape[1:])
            tensor = np.ascontiguousarray(halves.swapaxes(1, 2).reshape(tensor.shape))
        writer.add_tensor(f"{stem}.{kind}", tensor)
    for name, more in (tensors or {}).items():
        writer.add_tensor(name, more)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
