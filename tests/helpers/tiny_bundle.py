"""A bundle small enough to build in a test, made by hand from the graph contract (no torch, no exporter)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from lawcat_edge.runtime import files
from lawcat_edge.runtime.bundle.manifest import (
    Manifest,
    Parity,
    expected_spans,
    expected_state,
    write_manifest,
)
from lawcat_edge.runtime.bundle.span import Span

V, D, H, G, HEAD, F_HALF, K, LAYERS = 260, 32, 2, 1, 16, 8, 4, 2
F = 2 * F_HALF
IM_START, IM_END = 256, 257
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tiny_tokenizer() -> Tokenizer:
    """One token a byte, and four special ones."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>", "<|extra_0|>", "<|extra_1|>"])
    return tokenizer


_MICROSOFT = {"LinearAttention", "CausalConvWithState", "GroupQueryAttention", "RotaryEmbedding"}


class _Graph:
    """Collects nodes and weights; every weight goes to the data file."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: dict[str, np.ndarray] = {}
        self.consts: dict[str, np.ndarray] = {}

    def op(self, op: str, inputs: list[str], output: str | list[str], **attrs: Any) -> str:
        outputs = [output] if isinstance(output, str) else output
        domain = "com.microsoft" if op in _MICROSOFT else ""
        name = f"{op}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, outputs, name=name, domain=domain, **attrs))
        return outputs[0]

    def weight(self, name: str, *shape: int, scale: float | None = None) -> str:
        if name not in self.weights:
            scale = shape[0] ** -0.5 if scale is None else scale
            self.weights[name] = (self.rng.standard_normal(shape) * scale).astype(np.float32)
        return name

    def const(self, value: Any, dtype: Any = np.int64) -> str:
        array = np.asarray(value, dtype)
        name = f"c_{array.dtype}_{'_'.join(map(str, array.ravel()))}_{array.ndim}"
        self.consts[name] = array
        return name


def _norm(g: _Graph, x: str, out: str) -> str:
    square = g.op("Mul", [x, x], f"{out}/sq")
    mean = g.op("ReduceMean", [square, g.const([-1])], f"{out}/mean")
    root = g.op("Sqrt", [g.op("Add", [mean, g.const(1e-5, np.float32)], f"{out}/eps")], f"{out}/root")
    return g.op("Div", [x, root], out)


def _softmax_attention(g: _Graph, p: str, i: int, normed: str, buffer: str, span: int) -> str:
    qkv = g.op("MatMul", [normed, g.weight(f"{p}.qkv", D, (H + 2 * G) * HEAD)], f"{p}/qkv")
    names = [f"{when}.{i}.{kind}" for when in ("past_key_values", "present") for kind in ("key", "value")]
    lengths = [f"{buffer}_seqlens_k", f"{buffer}_total"]
    return g.op(
        "GroupQueryAttention",
        [qkv, "", "", *names[:2], *lengths, "cos_cache", "sin_cache", "position_ids"],
        [f"{p}/near", *names[2:]],
        num_heads=H,
        kv_num_heads=G,
        local_window_size=span,
        do_rotary=1,
    )


def _layer(g: _Graph, i: int, x: str, window: int, rope: bool, span: Span | None) -> str:
    p = f"l{i}"
    normed = _norm(g, x, f"{p}/norm")
    width = H * HEAD
    if span:
        y = _softmax_attention(g, p, i, normed, "full", -1 if span.sinks else span.tokens)
        return g.op("Add", [x, g.op("MatMul", [y, g.weight(f"{p}.o", width, D)], f"{p}/o")], f"{p}/x")
    qk = g.op("MatMul", [normed, g.weight(f"{p}.qk", D, 2 * width)], f"{p}/qk")
    v = g.op("MatMul", [normed, g.weight(f"{p}.v", D, width)], f"{p}/v")
    decay = g.op("MatMul", [normed, g.weight(f"{p}.gate", D, H * F)], f"{p}/gate")
    decay = g.op("Neg", [g.op("Softplus", [decay], f"{p}/soft")], f"{p}/neg")
    decay = g.op("Mul", [decay, g.const(0.05, np.float32)], f"{p}/decay")
    if rope:
        tables = ["position_ids", "cos_cache", "sin_cache"]
        qk = g.op("RotaryEmbedding", [qk, *tables], f"{p}/turned", num_heads=2 * H, rotary_embedding_dim=HEAD)
    mixed = g.op("Transpose", [qk], f"{p}/qkT", perm=[0, 2, 1])
    past, present = f"past_key_values.{i}.", f"present.{i}."
    conv = g.weight(f"{p}.conv", 2 * width, 1, K, scale=0.3)
    mixed = g.op(
        "CausalConvWithState", [mixed, conv, "", past + "conv_state"], [f"{p}/conv", present + "conv_state"]
    )
    heads = g.op("Reshape", [mixed, g.const([0, 2, H, HEAD, -1])], f"{p}/heads")  # [B,2,H,d,T]
    heads = g.op("Transpose", [heads], f"{p}/headsT", perm=[0, 1, 2, 4, 3])
    z = g.op("MatMul", [heads, g.weight(f"{p}.feature", H, HEAD, F_HALF, scale=0.5)], f"{p}/z")
    halves = [
        g.op("Softmax", [z], f"{p}/f0", axis=-1),
        g.op("Softmax", [g.op("Neg", [z], f"{p}/-z")], f"{p}/f1", axis=-1),
    ]
    phi = g.op("Concat", halves, f"{p}/phi", axis=-1)  # [B,2,H,T,F]
    phi = g.op("Transpose", [phi], f"{p}/phiT", perm=[1, 0, 3, 2, 4])
    phi = g.op("Reshape", [phi, g.const([2, 0, -1, H * F])], f"{p}/phi4")
    q = g.op("Gather", [phi, g.const(0)], f"{p}/q", axis=0)
    k = g.op("Gather", [phi, g.const(1)], f"{p}/k", axis=0)
    v4 = g.op("Reshape", [v, g.const([0, 0, H, HEAD])], f"{p}/v4")
    first = g.op("Slice", [v4, g.const([0]), g.const([1]), g.const([3])], f"{p}/first")
    ones = g.op(
        "Add", [g.op("Mul", [first, g.const(0, np.float32)], f"{p}/0"), g.const(1, np.float32)], f"{p}/1"
    )
    v1 = g.op("Concat", [v4, ones], f"{p}/v1", axis=-1)
    v1 = g.op("Reshape", [v1, g.const([0, 0, H * (HEAD + 1)])], f"{p}/v3")
    y = g.op(
        "LinearAttention",
        [q, k, v1, past + "recurrent_state", decay],
        [f"{p}/y", present + "recurrent_state"],
        q_num_heads=H,
        kv_num_heads=H,
        update_rule="gated",
        scale=1.0,
    )
    y = g.op("Reshape", [y, g.const([0, 0, H, HEAD + 1])], f"{p}/y4")
    n = g.op("Slice", [y, g.const([0]), g.const([HEAD]), g.const([3])], f"{p}/n")
    den = g.op("Slice", [y, g.const([HEAD]), g.const([HEAD + 1]), g.const([3])], f"{p}/den")
    y = g.op("Div", [n, g.op("Add", [den, g.const(1e-6, np.float32)], f"{p}/den1")], f"{p}/out4")
    if window:
        near = _softmax_attention(g, p, i, normed, "window", window)
        y = g.op("Add", [y, g.op("Reshape", [near, g.const([0, 0, H, HEAD])], f"{p}/near4")], f"{p}/withw")
    y = g.op("Reshape", [y, g.const([0, 0, width])], f"{p}/out")
    y = g.op("MatMul", [y, g.weight(f"{p}.o", width, D)], f"{p}/o")
    return g.op("Add", [x, y], f"{p}/x")


def _model(kind: str, seed: int, geometry: dict, lawcat: dict) -> tuple[Any, dict]:
    g, rope, spans = _Graph(seed), lawcat["rope"], expected_spans(geometry, lawcat)
    for name in spans:
        last = g.op("ReduceMax", [f"{name}_seqlens_k"], f"{name}_last", keepdims=0)
        g.op("Add", [last, g.const(1, np.int32)], f"{name}_total")
    x = g.op("Gather", [g.weight("embed", V, D, scale=1.0), "input_ids"], "x0")
    for i in range(LAYERS):
        full = bool(lawcat["layer_types"]) and lawcat["layer_types"][i] == "full_attention"
        x = _layer(g, i, x, lawcat["window"], rope, spans["full"] if full else None)
    if kind == "last":
        x = g.op("Slice", [x, g.const([-1]), g.const([1 << 30]), g.const([1])], "last")
    g.op("MatMul", [_norm(g, x, "final"), g.weight("head", D, V, scale=0.6)], "logits")
    inputs = [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["B", "T"])]
    if rope or spans:
        inputs.append(helper.make_tensor_value_info("position_ids", TensorProto.INT64, ["B", "T"]))
        inputs += [
            helper.make_tensor_value_info(n, TensorProto.FLOAT, ["R", HEAD // 2])
            for n in ("cos_cache", "sin_cache")
        ]
    for name in spans:
        inputs.append(helper.make_tensor_value_info(f"{name}_seqlens_k", TensorProto.INT32, ["B"]))
    length: Any = 1 if kind == "last" else "T"
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["B", length, V])]
    for tensor in expected_state(geometry, lawcat):
        shape = ["B", *(tensor.buffer if isinstance(size, str) else size for size in tensor.shape)]
        inputs.append(helper.make_tensor_value_info(tensor.input, TensorProto.FLOAT, shape))
        outputs.append(helper.make_tensor_value_info(tensor.output, TensorProto.FLOAT, shape))
    consts = [numpy_helper.from_array(array, name) for name, array in g.consts.items()]
    graph = helper.make_graph(g.nodes, "tiny", inputs, outputs, consts)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10), g.weights


def build_tiny_bundle(
    folder: Path,
    seed: int = 0,
    window: int = 0,
    rope: bool = False,
    template: str = TEMPLATE,
    generation: dict[str, Any] | None = None,
    tokenizer: Tokenizer | None = None,
    eos: Sequence[int] = (IM_END,),
    span: int = 0,
    sinks: int = 0,
) -> Path:
    """Write the bundle to `folder` (with parity vectors from its own run) and return the folder.

    span: the last layer has full attention over so many tokens; sinks: first ones of these.
    """
    geometry = {
        "family": "llama", "hidden_size": D, "num_layers": LAYERS, "num_heads": H, "num_kv_heads": G,
        "head_dim": HEAD, "vocab_size": V, "rope_theta": 10000.0, "rope_scaling": None,
    }  # fmt: skip
    kinds = ["linear_attention"] * (LAYERS - 1) + ["full_attention"] if span else []
    lawcat = {
        "conv_kernel": K, "feature_dim": F_HALF, "window": window, "rope": rope, "layer_types": kinds,
        "attention_span": span, "attention_sinks": sinks,
    }  # fmt: skip
    folder.mkdir(parents=True)
    offsets: dict[str, int] = {}
    data = bytearray()
    for kind, name in (("last", "model.onnx"), ("all", "model_all.onnx")):
        model, weights = _model(kind, seed, geometry, lawcat)
        for key, array in weights.items():
            if key not in offsets:
                data += bytes(-len(data) % 64)
                offsets[key] = len(data)
                data += array.tobytes()
            tensor = TensorProto(name=key, dims=array.shape, data_type=TensorProto.FLOAT)
            tensor.data_location = TensorProto.EXTERNAL
            for field, value in (
                ("location", "model.onnx.data"), ("offset", offsets[key]), ("length", array.nbytes)
            ):  # fmt: skip
                tensor.external_data.add(key=field, value=str(value))
            model.graph.initializer.append(tensor)
        (folder / name).write_bytes(model.SerializeToString())
    (folder / "model.onnx.data").write_bytes(data)
    (folder / "tokenizer.json").write_text((tokenizer or tiny_tokenizer()).to_str())
    (folder / "chat_template.jinja").write_text(template)
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    manifest = Manifest(
        name="tiny",
        created_by="lawcat-edge test",
        source={"teacher": "none", "teacher_sha256": "0" * 64, "adapter_sha256": None},
        lawcat=lawcat,
        geometry=geometry,
        scheme="fp32",
        ops=["ort"],
        graphs={"ort": {"last": "model.onnx", "all": "model_all.onnx"}},
        state=expected_state(geometry, lawcat),
        tokens={"bos": None, "eos": list(eos)},
        min_onnxruntime={"ort": "1.25.1"},
    )
    write_manifest(folder, manifest)
    manifest.parity = _record(folder)
    write_manifest(folder, manifest)
    return folder


def _record(folder: Path) -> Parity:
    from lawcat_edge.runtime.bundle.manifest import Bundle
    from lawcat_edge.runtime.engine.session import Engine

    engine = Engine(Bundle.open(folder), threads=1)
    tokens = np.random.default_rng(7).integers(0, 256, 24)
    logits = engine.forward(tokens[None], engine.new_state(), all_positions=True)[0]
    positions = [0, 3, 11, 23]
    top = np.argsort(-logits[positions], axis=1)[:, :5]
    return Parity(
        tokens=tokens.tolist(),
        pieces=[1, 4, 2, 10, 7],
        positions=positions,
        top_ids=top.tolist(),
        top_logits=np.take_along_axis(logits[positions], top, 1).astype(float).tolist(),
        max_rel_err=0.0,
        kl=0.0,
        bound=1e-4,
    )


def rewrite_manifest(folder: Path, change: Any) -> None:
    """Apply `change` to the manifest's JSON and write it back unchecked."""
    path = folder / "lawcat_bundle.json"
    data = files.read_json(path)
    change(data)
    files.write_json(path, data)
