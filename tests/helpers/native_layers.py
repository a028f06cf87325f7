"""Layers of random weights around the operator LawcatAttention, and what they compute, in numpy and float64.

As a command it runs them in onnxruntime, since a process takes one instruction set (LAWCAT_EDGE_ISA) for
good. ``python native_layers.py OUT.npz THREADS`` writes the outputs of every case;
``python native_layers.py --malformed`` prints a line for each malformed model: its name, and the error or
``ran``.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

import lawcat_edge  # noqa: F401 (before onnxruntime: it turns the telemetry off)
from lawcat_edge.runtime import native

Arrays = dict[str, np.ndarray]
WEIGHTS = ("conv_taps", "feature", "gate_b", "window_scale", "qk_gamma")
FED = ("conv_state", "recurrent_state", "key", "value", "seqlens_k", "cos", "sin", "position_ids")
INPUTS = ("packed", *WEIGHTS, *FED)
OUTPUTS = ("y", "conv_after", "recurrent_after", "key_after", "value_after")
TOKENS, BATCHES = (1, 2, 7, 8, 31, 32, 33, 129), (1, 3)


@dataclass(frozen=True)
class Layer:
    """Letters as in ``runtime/native/operators.c``."""

    H: int
    G: int
    d: int
    f: int
    K: int
    R: int
    window: int = 0
    max_score: bool = False
    rope: bool = False
    gamma: bool = False
    latent: float = 1.0  # scale of what the gate reads
    divisor: float = 4.0

    @property
    def width(self) -> int:
        return (self.H + 2 * self.G) * self.d + (1 if self.window else self.G) + self.R


LAYERS = {
    "narrow": Layer(3, 1, 6, 1, 2, 1),
    "narrowest": Layer(1, 1, 2, 3, 3, 2, window=3),
    "two-values": Layer(4, 2, 34, 5, 4, 17, rope=True),
    "own-values": Layer(3, 3, 16, 8, 4, 5, gamma=True),
    "window-of-one": Layer(3, 1, 18, 9, 4, 3, window=1, max_score=True),
    "window": Layer(4, 2, 20, 16, 7, 9, window=5, gamma=True, rope=True),
    "large-window": Layer(2, 1, 64, 32, 4, 17, window=200, max_score=True),
    "wide": Layer(2, 2, 130, 33, 16, 4, window=40, max_score=True, rope=True),
    "gates": Layer(2, 1, 12, 7, 4, 2, window=9, latent=3e4),
}


def weights(layer: Layer, seed: int = 0) -> Arrays:
    g = np.random.default_rng(seed)
    H, G, d, f = layer.H, layer.G, layer.d, layer.f
    w = g.standard_normal((H, 1, f, d)) * d**-0.5 * 2
    made = {
        "conv_taps": g.standard_normal((2 * H * d, 1, layer.K)) * 0.5,
        "feature": np.concatenate([w, -w], 1),
        "gate_b": g.standard_normal((layer.R, H * 2 * f)),
        "window_scale": 1 + 3 * g.random((H, 1)),
        "qk_gamma": 1 + 0.3 * g.standard_normal((H + G, d)),
    }
    if not layer.window:
        del made["window_scale"]
    if not layer.gamma:
        del made["qk_gamma"]
    return {name: values.astype(np.float32) for name, values in made.items()}


def feeds(layer: Layer, T: int, B: int, seed: int = 1) -> Arrays:
    """T tokens of B sequences in the middle of a text, each with another number of rows in its buffers."""
    g = np.random.default_rng([seed, T, B])
    H, G, d = layer.H, layer.G, layer.d
    packed = g.standard_normal((B, T, layer.width))
    columns = np.arange(layer.width)
    if layer.window:
        ones = columns == (H + 2 * G) * d
    else:
        values = columns - (H + G) * d
        ones = (values >= 0) & (values < G * (d + 1)) & (values % (d + 1) == d)
    packed[..., ones] = 1
    packed[..., -layer.R :] *= layer.latent
    made: Arrays = {
        "packed": packed,
        "conv_state": g.standard_normal((B, 2 * H * d, layer.K - 1)),
        "recurrent_state": g.random((B, H, 2 * layer.f, d + 1)),
    }
    angles = g.random((B * T + 5, d // 2)) * 7
    if layer.window or layer.rope:
        made |= {"cos": np.cos(angles), "sin": np.sin(angles)}
    if layer.window:
        made |= {name: g.standard_normal((B, G, T + 13, d)) for name in ("key", "value")}
    result: Arrays = {name: values.astype(np.float32) for name, values in made.items()}
    if layer.window or layer.rope:
        result["position_ids"] = g.permutation(B * T + 5)[: B * T].reshape(B, T)
    if layer.window:
        result["seqlens_k"] = (T - 1 + np.array([13, 0, 4])[:B]).astype(np.int32)
    return result


def model(layer: Layer, given: Arrays | None = None) -> onnx.ModelProto:
    """One node; its tensors of weights are ``given`` or ``weights(layer)``."""
    given = weights(layer) if given is None else given
    fed = ["packed", "conv_state", "recurrent_state"]
    fed += ["cos", "sin", "position_ids"] if layer.window or layer.rope else []
    fed += ["key", "value", "seqlens_k"] if layer.window else []
    names = [name if name in given or name in fed else "" for name in INPUTS]
    while not names[-1]:
        names.pop()
    outputs = OUTPUTS if layer.window else OUTPUTS[:3]
    node = helper.make_node(
        "LawcatAttention",
        names,
        outputs,
        domain=native.DOMAIN,
        num_heads=layer.H,
        kv_num_heads=layer.G,
        window=layer.window,
        max_score=int(layer.max_score),
        rope=int(layer.rope),
        gate_divisor=layer.divisor,
        eps=1e-6,
        norm_eps=1e-5,
    )
    kinds = {"seqlens_k": TensorProto.INT32, "position_ids": TensorProto.INT64}
    # of no stated shape: the operator alone checks them
    inputs = [helper.make_tensor_value_info(name, kinds.get(name, TensorProto.FLOAT), None) for name in fed]
    results = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
    stored = [numpy_helper.from_array(array, name) for name, array in given.items()]
    graph = helper.make_graph([node], "layer", inputs, results, stored)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(native.DOMAIN, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def swiglu_model() -> onnx.ModelProto:
    node = helper.make_node("SwiGlu", ["x"], ["y"], domain=native.DOMAIN)
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, None)
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(native.DOMAIN, 1)]
    graph = helper.make_graph([node], "swiglu", [x], [y])
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def swiglu_input(width: int, tokens: int) -> np.ndarray:
    x = np.random.default_rng(width).standard_normal((2, tokens, 2 * width)) * 30
    x[0, 0, 0], x[-1, -1, width - 1] = -1000, 1000
    return x.astype(np.float32)


@dataclass(frozen=True)
class Product:
    """A product with weights in blocks of float16 scales, with offsets (of 4 bits) and a bias or without."""

    N: int
    K: int
    bits: int
    block: int
    offsets: bool = False
    bias: bool = False

    @property
    def blocks(self) -> int:
        return -(-self.K // self.block)


PRODUCTS = {
    "smallest": Product(1, 1, 8, 64),
    "one-block": Product(16, 64, 8, 64, bias=True),
    "eight-bits": Product(37, 192, 8, 64, bias=True),
    "not-full": Product(21, 100, 8, 128),
    "hardly-begun": Product(21, 130, 8, 128, bias=True),  # whole chunks of the last block are beyond K
    "four-bits": Product(33, 96, 4, 32, offsets=True, bias=True),
    "four-bits-not-full": Product(18, 45, 4, 64),
    "four-bits-hardly-begun": Product(19, 260, 4, 128, offsets=True),
    "long": Product(70, 4096, 4, 32, offsets=True),
    "long-eight": Product(5, 8192, 8, 1024),
}
PRODUCT_TOKENS = (1, 2, 3, 4, 5, 8, 13, 260)


def product_weights(case: Product) -> Arrays:
    g = np.random.default_rng([case.N, case.K, case.bits])
    blocks = (case.N, case.blocks)
    made: Arrays = {
        "weights": g.integers(0, 256, (*blocks, case.block * case.bits // 8)).astype(np.uint8),
        "scales": (g.standard_normal(blocks) * 0.1).astype(np.float16),
    }
    made["scales"].flat[:3] = np.array([0, 6e-8, 6e4], np.float16)[: made["scales"].size]
    if case.offsets:
        made["offsets"] = g.integers(-128, 128, blocks).astype(np.int8)
    if case.bias:
        made["bias"] = g.standard_normal(case.N).astype(np.float32)
    return made


def product_input(case: Product, T: int, exact: bool) -> np.ndarray:
    """x [1,T,K]; exact: rounding to 8 bits changes nothing."""
    g = np.random.default_rng([case.N, case.K, T])
    chunk = 64 if case.bits == 8 else 32
    x = g.standard_normal((1, T, case.K)).astype(np.float32)
    for begin in range(0, case.K, chunk) if exact else ():
        part = g.integers(-127, 128, (T, min(chunk, case.K - begin)))
        part[:, 0] = 127
        x[0, :, begin : begin + chunk] = part * np.float32(g.choice([0.25, 1, 8]))
    return x


def product_reference(case: Product, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """y [1,T,N], and how far from it rounding x to 8 bits may lead."""
    stored = product_weights(case)
    packed = stored["weights"].reshape(case.N, -1)
    if case.bits == 8:
        values = packed.astype(np.float64) - 128
    else:
        values = np.stack([packed & 15, packed >> 4], -1).reshape(case.N, -1).astype(np.float64) - 8
    scales = np.repeat(stored["scales"].astype(np.float64), case.block, 1)
    W = values * scales
    offset = np.zeros_like(W)
    if case.offsets:
        offset = np.repeat(stored["offsets"].astype(np.float64), case.block, 1) * scales * 0.0625
    W, offset = W[:, : case.K], offset[:, : case.K]
    y = x.astype(np.float64) @ (W + offset).T + stored.get("bias", np.zeros(case.N))
    step = np.zeros(x.shape)
    chunk = 64 if case.bits == 8 else 32
    for begin in range(0, case.K, chunk):
        own = np.abs(x[..., begin : begin + chunk])
        step[..., begin : begin + chunk] = own.max(-1, keepdims=True) / 127
    return y, step / 2 @ np.abs(W).T


def product_model(case: Product, given: Arrays | None = None) -> onnx.ModelProto:
    given = product_weights(case) if given is None else given
    names = ["x", *(name if name in given else "" for name in ("weights", "scales", "offsets", "bias"))]
    node = helper.make_node(
        "BlockProduct",
        names,
        ["y"],
        domain=native.DOMAIN,
        N=case.N,
        K=case.K,
        bits=case.bits,
        block_size=case.block,
        offset_unit=0.0625,
    )
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("x", "y"))
    stored = [numpy_helper.from_array(array, name) for name, array in given.items()]
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(native.DOMAIN, 1)]
    return helper.make_model(
        helper.make_graph([node], "product", [x], [y], stored), opset_imports=opsets, ir_version=10
    )


SWIGLU = tuple(itertools.product((1, 5, 16, 37, 64), (1, 9)))


# -- what it computes ----------------------------------------------------------------------------------------


def _softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def _turned(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    a, b = np.split(x, 2, -1)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def reference(layer: Layer, fed: Arrays) -> Arrays:
    """The layer token by token: the equations of ``lawcat_edge.attention``."""
    w = {name: values.astype(np.float64) for name, values in weights(layer).items()}
    x = {name: values.astype(np.float64) for name, values in fed.items()}
    H, G, d, F = layer.H, layer.G, layer.d, 2 * layer.f
    B, T, _ = x["packed"].shape
    out = np.zeros((B, T, H, d))
    after = {name: x[name].copy() for name in ("conv_state", "recurrent_state", "key", "value") if name in x}
    shared = np.repeat(np.arange(G), H // G)  # the key head of every head
    taps, gate = w["conv_taps"][:, 0], w["gate_b"]
    for b, t in itertools.product(range(B), range(T)):
        row = x["packed"][b, t]
        qk = row[: (H + G) * d].reshape(H + G, d)
        if layer.gamma:
            qk = qk / np.sqrt((qk**2).mean(-1, keepdims=True) + 1e-5) * w["qk_gamma"]
        step = d if layer.window else d + 1
        v = row[(H + G) * d :][: G * step].reshape(G, step)[:, :d]
        turned = qk
        if "position_ids" in fed:
            position = fed["position_ids"][b, t]
            turned = _turned(qk, x["cos"][position], x["sin"][position])
        channels = (turned if layer.rope else qk)[[*range(H), *(H + shared)]].reshape(-1, 1)
        rows = np.concatenate([after["conv_state"][b], channels], 1)
        after["conv_state"][b] = rows[:, 1:]
        conv = (rows * taps).sum(1).reshape(2, H, d)
        z = np.einsum("hfd,shd->shf", w["feature"][:, 0], conv)
        phi = np.concatenate([_softmax(z), _softmax(-z)], -1)  # [2,H,F]
        u = (row[-layer.R :] @ gate).reshape(H, F)
        decay = np.exp(-np.logaddexp(0, u) / layer.divisor)
        v1 = np.concatenate([v, np.ones((G, 1))], 1)[shared]
        S = after["recurrent_state"][b]
        S[...] = S * decay[..., None] + phi[1][..., None] * v1[:, None]
        n = np.einsum("hf,hfe->he", phi[0], S)
        if not layer.window:
            out[b, t] = n[:, :d] / (n[:, d:] + 1e-6)
            continue
        slot = int(fed["seqlens_k"][b]) + 1 - T + t
        after["key"][b, :, slot], after["value"][b, :, slot] = turned[H:], v
        seen = slice(max(0, slot + 1 - layer.window), slot + 1)
        scores = np.einsum("hd,hnd->hn", turned[:H], after["key"][b, shared, seen]) * d**-0.5
        near = np.einsum("hn,hnd->hd", _softmax(scores), after["value"][b, shared, seen])
        share = w["window_scale"]
        if layer.max_score:
            share = share / np.exp(scores - scores.max(1, keepdims=True)).sum(1, keepdims=True)
        out[b, t] = (near + n[:, :d] * share) / (n[:, d:] * share + 1 + 1e-6)
    names = [name.replace("conv_state", "conv").replace("recurrent_state", "recurrent") for name in after]
    states = {f"{name}_after": values for name, values in zip(names, after.values(), strict=True)}
    return {"y": out.reshape(B, T, H * d), **states}


# -- in onnxruntime, in a process of its own -----------------------------------------------------------------


def session(made: onnx.ModelProto, threads: int = 1) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 4
    options.register_custom_ops_library(str(native.library()))
    return onnxruntime.InferenceSession(made.SerializeToString(), options, ["CPUExecutionProvider"])


def run(running: Any, fed: Arrays, in_place: bool = False) -> Arrays:
    """in_place: the state's new values are written where the old ones are."""
    if not in_place:
        names = [item.name for item in running.get_outputs()]
        return dict(zip(names, running.run(names, fed), strict=True))
    binding = running.io_binding()
    held = {name: values.copy() for name, values in fed.items()}
    own = {"conv_after": "conv_state", "recurrent_after": "recurrent_state"}
    own |= {"key_after": "key", "value_after": "value"}
    B, T, _ = fed["packed"].shape
    width = fed["conv_state"].shape[1] // 2
    out = {"y": np.full((B, T, width), np.nan, np.float32)}
    out |= {name: held[own[name]] for name in (item.name for item in running.get_outputs()) if name in own}
    for name, array in held.items():
        binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
    for name, array in out.items():
        binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
    running.run_with_iobinding(binding)
    return out


def cases() -> Iterator[tuple[str, Layer, int, int]]:
    for (name, layer), T, B in itertools.product(LAYERS.items(), TOKENS, BATCHES):
        yield f"{name}/{T}/{B}", layer, T, B


def poisoned(layer: Layer) -> Arrays:
    """Nine tokens of three sequences, where a NaN stands in everything of the first one's fifth."""
    fed = feeds(layer, 9, 3)
    fed["packed"][0, 4] = np.nan
    return fed


def _run_all(path: str, threads: int) -> None:
    out: Arrays = {}
    sessions = {name: session(model(layer), threads) for name, layer in LAYERS.items()}
    for case, layer, T, B in cases():
        fed = feeds(layer, T, B)
        running = sessions[case.split("/")[0]]
        before = {name: values.copy() for name, values in fed.items()}
        out |= {f"{case}/{name}": values for name, values in run(running, fed).items()}
        assert all((fed[name] == before[name]).all() for name in fed), "an input was written"
        out |= {f"{case}/in_place/{name}": values for name, values in run(running, fed, True).items()}
    for name, layer in LAYERS.items():
        got = run(sessions[name], poisoned(layer))
        out |= {f"{name}/nan/{key}": values for key, values in got.items()}
    running = session(swiglu_model(), threads)
    for width, tokens in SWIGLU:
        (out[f"swiglu/{width}/{tokens}"],) = running.run(None, {"x": swiglu_input(width, tokens)})
    for case_name, product in PRODUCTS.items():
        running = session(product_model(product), threads)
        for T, exact in itertools.product(PRODUCT_TOKENS, (True, False)):
            x = product_input(product, T, exact)
            (out[f"product/{case_name}/{T}/{exact}"],) = running.run(None, {"x": x})
        for what in (np.nan, np.inf):
            x[0, 0, -1] = what
            (out[f"product/{case_name}/{what}"],) = running.run(None, {"x": x})
    np.savez(path, **out)  # type: ignore[arg-type]


# -- models that are not right -------------------------------------------------------------------------------

Change = Callable[[Arrays, Arrays, onnx.ModelProto], None]
PLAIN = Layer(2, 1, 8, 4, 4, 3)
NEAR = dataclasses.replace(PLAIN, window=4, max_score=True, rope=True, gamma=True)


def _weight(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Change:
    def apply(stored: Arrays, fed: Arrays, made: onnx.ModelProto) -> None:
        (tensor,) = (t for t in made.graph.initializer if t.name == name)
        tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(change(stored[name])), name))

    return apply


def _fed(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Change:
    def apply(stored: Arrays, fed: Arrays, made: onnx.ModelProto) -> None:
        fed[name] = np.ascontiguousarray(change(fed[name]))

    return apply


def _without(name: str) -> Change:
    """Leave an input out; no longer a graph's input either."""

    def apply(stored: Arrays, fed: Arrays, made: onnx.ModelProto) -> None:
        node = made.graph.node[0]
        node.input[list(node.input).index(name)] = ""
        fed.pop(name, None)
        for part in (made.graph.input, made.graph.initializer):
            for item in [item for item in part if item.name == name]:
                part.remove(item)

    return apply


def _as_input(name: str) -> Change:
    """A weight that the caller brings, and so is no constant."""

    def apply(stored: Arrays, fed: Arrays, made: onnx.ModelProto) -> None:
        (tensor,) = (t for t in made.graph.initializer if t.name == name)
        made.graph.initializer.remove(tensor)
        made.graph.input.append(helper.make_tensor_value_info(name, tensor.data_type, tensor.dims))
        fed[name] = stored[name]

    return apply


def _attribute(name: str, value: int | float | None) -> Change:
    def apply(stored: Arrays, fed: Arrays, made: onnx.ModelProto) -> None:
        node = made.graph.node[0]
        (old,) = (a for a in node.attribute if a.name == name)
        node.attribute.remove(old)
        if value is not None:
            node.attribute.append(helper.make_attribute(name, value))

    return apply


def _fewer_outputs(count: int) -> Change:
    def apply(stored: Arrays, fed: Arrays, made: onnx.ModelProto) -> None:
        del made.graph.node[0].output[count:]
        del made.graph.output[count:]

    return apply


def _half(x: np.ndarray) -> np.ndarray:
    return x[..., : x.shape[-1] // 2]


def _with(place: int, value: int) -> Callable[[np.ndarray], np.ndarray]:
    """One number of an array changed."""

    def apply(x: np.ndarray) -> np.ndarray:
        changed = x.copy()
        changed.flat[place] = value
        return changed

    return apply


def _emptied(axis: int) -> Callable[[np.ndarray], np.ndarray]:
    return lambda x: np.take(x, np.zeros(0, np.int64), axis)


def _shorter(axis: int) -> Callable[[np.ndarray], np.ndarray]:
    return lambda x: np.delete(x, -1, axis)


def _malformed() -> Iterator[tuple[str, Layer, Change]]:
    for name in ("conv_taps", "feature", "gate_b", "window_scale", "qk_gamma"):
        rank = weights(NEAR)[name].ndim
        for axis in range(rank):
            yield f"{name} axis {axis}", NEAR, _weight(name, _shorter(axis))
        yield f"{name} flat", NEAR, _weight(name, np.ravel)
        yield f"{name} empty", NEAR, _weight(name, lambda x: x[:0])
        yield f"{name} of float64", NEAR, _weight(name, lambda x: x.astype(np.float64))
        yield f"{name} as an input", NEAR, _as_input(name)
        if name != "qk_gamma":  # which a layer may be without
            yield f"no {name}", NEAR, _without(name)
    for name in ("packed", *FED):
        rank = feeds(NEAR, 3, 2)[name].ndim
        for axis in range(rank):
            if (name, axis) not in {("key", 2), ("value", 2), ("cos", 0), ("sin", 0)}:
                yield f"{name} axis {axis}", NEAR, _fed(name, _shorter(axis))
            yield f"{name} empty axis {axis}", NEAR, _fed(name, _emptied(axis))
        yield f"no {name}", NEAR, _without(name)
        yield f"{name} of another rank", NEAR, _fed(name, np.ravel if rank > 1 else np.atleast_2d)
        yield f"{name} of five dimensions", NEAR, _fed(name, lambda x: x.reshape(1, 1, 1, -1, x.shape[-1]))
    for name in ("key", "value"):
        yield f"{name} shorter", NEAR, _fed(name, _shorter(2))
    for name in ("cos", "sin"):
        yield f"{name} shorter", NEAR, _fed(name, _shorter(0))
    for slot in (-(2**31), -1, 1, 16, 2**31 - 1):
        for sequence in (0, 1):
            yield f"seqlens_k {slot}, {sequence}", NEAR, _fed("seqlens_k", _with(sequence, slot))
    for position in (-(2**63), -1, 11, 2**32, 2**63 - 1):
        for layer, which in ((NEAR, "window"), (dataclasses.replace(PLAIN, rope=True), "rope")):
            yield f"position {position}, {which}", layer, _fed("position_ids", _with(4, position))
    for name in ("packed", "conv_state", "recurrent_state"):
        yield f"{name}, no window", PLAIN, _fed(name, _half)
    for attribute, values in {
        "num_heads": (0, -1, 3, 4097, 2**62, -(2**63)),
        "kv_num_heads": (0, -1, 2, 3, 2**62, -(2**63)),
        "window": (-1, 2**31, 2**62, -(2**63)),
    }.items():
        for value in values:
            yield f"{attribute} {value}", NEAR, _attribute(attribute, value)
    for attribute in ("num_heads", "window", "rope", "gate_divisor", "eps", "norm_eps", "max_score"):
        yield f"no {attribute}", NEAR, _attribute(attribute, None)
    yield "num_heads a float", NEAR, _attribute("num_heads", 2.0)
    own = dataclasses.replace(NEAR, G=2)  # whose values need two ones without a window
    yield "a window's layer with no window", own, _attribute("window", 0)
    yield "a window where there are no buffers", PLAIN, _attribute("window", 4)
    yield "rope where there are no tables", PLAIN, _attribute("rope", 1)
    for count in (1, 2, 3, 4):
        yield f"{count} outputs", NEAR, _fewer_outputs(count)


def _malformed_products() -> Iterator[tuple[str, Product, Change]]:
    eight, four = PRODUCTS["eight-bits"], PRODUCTS["four-bits"]
    for case, bits in ((eight, "8 bits"), (four, "4 bits")):
        for name, values in product_weights(case).items():
            for axis in range(values.ndim):
                yield (
                    f"{name} axis {axis}, {bits}",
                    case,
                    _weight(name, _shorter(axis)),
                )  # type: ignore[misc]
                yield f"{name} empty axis {axis}, {bits}", case, _weight(name, _emptied(axis))
            yield f"{name} of another rank, {bits}", case, _weight(name, lambda x: x[..., None])
            yield f"{name} of float64, {bits}", case, _weight(name, lambda x: x.astype(np.float64))
            yield f"{name} as an input, {bits}", case, _as_input(name)
            if name in ("weights", "scales"):
                yield f"no {name}, {bits}", case, _without(name)
        for axis in range(3):
            yield f"x empty axis {axis}, {bits}", case, _fed("x", _emptied(axis))
        yield f"x narrower, {bits}", case, _fed("x", lambda x: x[..., :-1])
        yield f"x of another rank, {bits}", case, _fed("x", lambda x: x[0])
        for attribute, wrong in {
            "N": (0, -1, case.N + 1, 2**31, 2**62, -(2**63)),
            "K": (0, -1, case.K + 1, 2**31, 2**62, 2**63 - 1, -(2**63)),
            "bits": (0, 2, 12 - case.bits, 2**32 + case.bits),
            "block_size": (0, -1, 1, 16, 48, 2 * case.block, 2**31, 2**62, -(2**63)),
        }.items():
            for value in wrong:
                yield f"{attribute} {value}, {bits}", case, _attribute(attribute, value)
        for attribute in ("N", "K", "bits", "block_size", "offset_unit"):
            yield f"no {attribute}, {bits}", case, _attribute(attribute, None)


def _run_malformed() -> None:
    for name, layer, change in _malformed():
        print(f"{name}: ", end="", flush=True)  # what a crash leaves behind
        fed, stored = feeds(layer, 3, 2), weights(layer)
        made = copy.deepcopy(model(layer, stored))
        change(stored, fed, made)
        try:
            run(session(made), fed)
        except Exception as error:
            print("error:", " ".join(str(error).split())[:300], flush=True)
        else:
            print("ran", flush=True)
    for name, case, change in _malformed_products():
        print(f"product, {name}: ", end="", flush=True)
        stored, fed = product_weights(case), {"x": product_input(case, 5, False)}
        made = product_model(case, stored)
        change(stored, fed, made)
        try:
            session(made).run(None, fed)
        except Exception as error:
            print("error:", " ".join(str(error).split())[:300], flush=True)
        else:
            print("ran", flush=True)
    running = session(swiglu_model())
    for shape in ((2, 3, 7), (4, 8), (1, 2, 0), (0, 2, 8), (1, 1, 1, 8), (8,), ()):
        print(f"SwiGlu of {shape}: ", end="", flush=True)
        try:
            running.run(None, {"x": np.zeros(shape, np.float32)})
        except Exception as error:
            print("error:", " ".join(str(error).split())[:300], flush=True)
        else:
            print("ran", flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "--malformed":
        _run_malformed()
    else:
        _run_all(sys.argv[1], int(sys.argv[2]))
