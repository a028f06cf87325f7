"""What onnxruntime-genai needs to run a bundle as it is: genai_config.json and, for some bundles, a graph.

It feeds ``input_ids`` and ``position_ids``, and keeps one ``conv_state`` of rank 3 and one
``recurrent_state`` of rank 4 a layer, the same in all layers, zero at the start. ``model.onnx`` fits that
where there is neither a window nor a rotary linear branch. Where there is one, ``model_genai.onnx`` computes
``window_fill`` and the rotary tables from the positions, and carries the keys and values of the window inside
conv_state: [B, 1, C (K-1) + G (w-1) (2d + 1)], the three tensors one after the other. Its weights are
those of ``model.onnx.data``, so it costs the size of a graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from lawcat_edge.config import LawcatConfig
from lawcat_edge.families import Geometry
from lawcat_edge.runtime import rotary
from lawcat_edge.runtime.bundle import expected_state
from lawcat_edge.runtime.engine import PORTABLE_CHUNK, default_chunk

GRAPH = "model_genai.onnx"


def needs_own_graph(config: LawcatConfig) -> bool:
    """Whether model.onnx has inputs that onnxruntime-genai cannot give."""
    return config.rope or config.window > 0


def genai_config(
    geometry: Geometry, config: LawcatConfig, tokens: dict[str, Any], filename: str, flavour: str
) -> dict[str, Any]:
    """The content of genai_config.json for the graph ``filename`` of ``flavour``."""
    eos = tokens["eos"] or [0]
    inputs = {
        "input_ids": "input_ids",
        "past_conv_names": "past_key_values.%d.conv_state",
        "past_recurrent_names": "past_key_values.%d.recurrent_state",
    }
    if needs_own_graph(config):
        inputs["position_ids"] = "position_ids"
    return {
        "model": {
            "type": "decoder",
            "bos_token_id": tokens["bos"] if tokens["bos"] is not None else eos[0],
            "eos_token_id": eos,
            "pad_token_id": eos[0],
            "vocab_size": geometry.vocab_size,
            "context_length": 1 << 20,
            "decoder": {
                "filename": filename,
                # right without VNNI too, where integer products saturate otherwise (see ``products``)
                "session_options": {
                    "log_id": "lawcat-edge",
                    "provider_options": [],
                    "session.x64quantprecision": "1",
                },
                "hidden_size": geometry.hidden_size,
                "num_hidden_layers": geometry.num_layers,
                "num_attention_heads": geometry.num_heads,
                "num_key_value_heads": geometry.num_kv_heads,
                "head_size": geometry.head_dim,
                "inputs": inputs,
                "outputs": {
                    "logits": "logits",
                    "present_conv_names": "present.%d.conv_state",
                    "present_recurrent_names": "present.%d.recurrent_state",
                },
            },
        },
        # Nothing is shared between past and present: only two operators may update their state in place
        "search": {
            "max_length": 8192,
            "do_sample": False,
            "past_present_share_buffer": False,
            "chunk_size": PORTABLE_CHUNK if flavour == "portable" else default_chunk(config.window),
        },
    }


def adapt(model: ir.Model, geometry: Geometry, config: LawcatConfig) -> ir.Model:
    """Change the graph for the last position (of any flavour) in place to what onnxruntime-genai feeds."""
    graph = model.graph
    inputs = {value.name: value for value in graph.inputs}
    outputs = {value.name: value for value in graph.outputs}
    head, tail = _Nodes(graph, "before"), _Nodes(graph, "after")
    positions = _value("position_ids", ir.DataType.INT64, ["B", "T"])
    added = [positions]
    if config.window > 1:
        first = head.add("Slice", [positions, [0, 0], [1, 1], [0, 1]])
        full = head.constant(np.array([config.window - 1], np.int64))
        fill = head.add("Min", [head.add("Reshape", [first, [1]]), full])
        _replace(inputs["window_fill"], fill)
    if config.rope or config.window:
        frequencies = rotary.inverse_frequencies(geometry.to_dict())
        turns = np.concatenate([frequencies, frequencies])[None] / (2 * np.pi)
        row = head.add("Reshape", [head.add("Slice", [positions, [0], [1], [0]]), [-1, 1]])
        # Turns in float64, as the runner does: float32 loses the fraction of a turn at long positions. The
        # fraction alone goes to Cos and Sin, which onnxruntime 1.25 has for float32 only.
        turn = head.add("Mul", [head.add("Cast", [row], to=ir.DataType.DOUBLE), head.constant(turns)])
        part = head.add("Sub", [turn, head.add("Floor", [turn])])
        angle = head.add("Mul", [part, head.constant(np.array(2 * np.pi))])
        angle = head.add("Cast", [angle], to=ir.DataType.FLOAT)
        for name, op in (("rotary_cos", "Cos"), ("rotary_sin", "Sin")):
            _replace(inputs[name], head.add(op, [angle]))
    if config.window > 1:
        states = expected_state(geometry.to_dict(), config.to_dict())
        per_layer = len(states) // geometry.num_layers
        for i in range(geometry.num_layers):
            own = states[i * per_layer : (i + 1) * per_layer]
            packed = [tensor for tensor in own if not tensor.input.endswith("recurrent_state")]
            sizes = [int(np.prod(tensor.shape)) for tensor in packed]
            past = _value(packed[0].input, ir.DataType.FLOAT, ["B", 1, sum(sizes)])
            parts = head.split(past, sizes)
            flat: list[ir.Value | list[int]] = []
            for tensor, part in zip(packed, parts, strict=True):
                _replace(inputs[tensor.input], head.add("Reshape", [part, [-1, *tensor.shape]]))
                inputs[tensor.input].name = f"{tensor.input}/unpacked"
                value = outputs[tensor.output]
                value.name = f"{tensor.output}/unpacked"
                flat.append(tail.add("Reshape", [value, [0, 1, -1]]))
            present = tail.add("Concat", flat, axis=2)
            present.name, present.type = packed[0].output, ir.TensorType(ir.DataType.FLOAT)
            present.shape = ir.Shape(["B", 1, sum(sizes)])
            outputs[packed[0].output] = present
            for tensor in packed[1:]:
                del outputs[tensor.output]
            added.append(past)
    kept = [inputs["input_ids"], *added, *(v for v in graph.inputs if v.uses() and v.name != "input_ids")]
    graph.inputs[:] = kept
    graph.outputs[:] = list(outputs.values())
    graph.insert_before(graph[0], head.nodes)
    graph.extend(tail.nodes)
    return model


def replay(path: Path, tokens: np.ndarray, pieces: Sequence[int], start: int = 0) -> np.ndarray:
    """Feed tokens [T] in pieces as onnxruntime-genai does; the logits [n,V] at the end of each piece.

    start: the position of the first token, whose state is empty all the same.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    state = {
        item.name: np.zeros([1, *item.shape[1:]], np.float32)
        for item in session.get_inputs()
        if item.name.startswith("past_key_values.")
    }
    names = [item.name for item in session.get_outputs()]
    wanted = {item.name for item in session.get_inputs()}
    rows, at = [], 0
    for piece in pieces:
        positions = np.arange(start + at, start + at + piece, dtype=np.int64)[None]
        feeds = {"input_ids": tokens[None, at : at + piece], "position_ids": positions, **state}
        got = session.run(names, {name: feeds[name] for name in wanted})
        after = dict(zip(names, got, strict=True))
        rows.append(after["logits"][0, -1])
        state = {name: after[name.replace("past_key_values.", "present.")] for name in state}
        at += piece
    return np.stack(rows)


def _value(name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))


def _replace(old: ir.Value, new: ir.Value) -> None:
    ir.convenience.replace_all_uses_with(old, new)


class _Nodes:
    """Collects nodes for a graph; lists of whole numbers among their inputs become initialisers."""

    def __init__(self, graph: ir.Graph, prefix: str) -> None:
        self.graph, self.prefix = graph, prefix
        self.nodes: list[ir.Node] = []

    def constant(self, array: np.ndarray) -> ir.Value:
        name = f"genai/{array.dtype}_{'x'.join(map(str, array.shape))}_{array.tobytes().hex()[:64]}"
        if name not in self.graph.initializers:
            tensor = ir.Tensor(array, name=name)
            value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape)
            value.const_value = tensor
            self.graph.initializers[name] = value
        return self.graph.initializers[name]

    def add(self, op: str, inputs: Sequence[ir.Value | list[int]], outputs: int = 1, **attrs: Any) -> Any:
        own = [self.constant(np.array(v, np.int64)) if isinstance(v, list) else v for v in inputs]
        name = f"genai/{self.prefix}/{len(self.nodes)}_{op}"
        node = ir.node(op, own, attributes=attrs, num_outputs=outputs, name=name)
        for i, value in enumerate(node.outputs):
            value.name = f"{node.name}:{i}"
        self.nodes.append(node)
        return node.outputs[0] if outputs == 1 else list(node.outputs)

    def split(self, value: ir.Value, sizes: list[int]) -> list[ir.Value]:
        return self.add("Split", [value, sizes], outputs=len(sizes), axis=2)
