"""What onnxruntime-genai needs to run a bundle as it is: genai_config.json and, for some bundles, a graph.

It feeds ``input_ids`` and ``position_ids``. Of layers with linear attention it keeps one ``conv_state`` of
rank 3 and one ``recurrent_state`` of rank 4, the same in all of them, zero at the start; of layers with full
attention ``key`` and ``value`` of all tokens so far. ``model.onnx`` fits that where there is neither softmax
attention nor a rotary linear branch. Elsewhere ``model_genai.onnx`` computes the rotary tables and the
buffers' lengths from the positions, and carries the keys and values of the window inside conv_state:
[B, 1, C (K-1) + 2 G (w-1) d], the three tensors one after the other. Its weights are those of
``model.onnx.data``, so it costs the size of a graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from lawcat_edge.config import LawcatConfig
from lawcat_edge.export.builder import GraphBuilder
from lawcat_edge.export.layout import Layout
from lawcat_edge.export.stitch import Interface, dims, layer_and_kind
from lawcat_edge.families import Geometry
from lawcat_edge.runtime.engine import rotary
from lawcat_edge.runtime.engine.session import PORTABLE_CHUNK, default_chunk

GRAPH = "model_genai.onnx"


def needs_own_graph(config: LawcatConfig) -> bool:
    """Whether model.onnx has inputs that onnxruntime-genai cannot give."""
    return config.rope or config.window > 0 or bool(config.full_attention_layers)


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
    outputs = {
        "logits": "logits",
        "present_conv_names": "present.%d.conv_state",
        "present_recurrent_names": "present.%d.recurrent_state",
    }
    if needs_own_graph(config):
        inputs["position_ids"] = "position_ids"
    for kind in ("key", "value") if config.full_attention_layers else ():
        inputs[f"past_{kind}_names"] = f"past_key_values.%d.{kind}"
        outputs[f"present_{kind}_names"] = f"present.%d.{kind}"
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
                "outputs": outputs,
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


class GenaiInterface(Interface):
    """Inputs and outputs as onnxruntime-genai gives and takes them, one sequence at a time."""

    def __init__(self, layout: Layout, flavour: str) -> None:
        super().__init__(layout)
        self.frequencies = rotary.inverse_frequencies(layout.geometry.to_dict())
        # GroupQueryAttention lengthens buffers that are full; its replacements write into what they are given
        self.lengthen = flavour != "ort"
        self.window = {name: span for name, span in self.spans.items() if name == "window"}
        self._totals: dict[str, ir.Value] = {}

    def begin(self, g: GraphBuilder) -> tuple[dict[str, ir.Value], list[dict[str, ir.Value]]]:
        shared: dict[str, ir.Value] = {}
        if self.rope or self.spans:
            positions = g.input("position_ids", ir.DataType.INT64, ["B", "T"])
            first = self._do(g, "Slice", [positions, [0], [1], [1]], "first")  # [B,1]
            shared["position_ids"] = self._do(g, "Sub", [positions, first], "rows")
            for name, span in self.spans.items():
                start = first
                if name == "window":  # what came before it was cut off
                    start = self._do(g, "Min", [first, [[span.most]]], "fill")
                last = self._do(g, "Add", [start, self._tokens(g)], "end")
                last = self._do(g, "Sub", [last, [[1]]], "last")
                last = self._do(g, "Reshape", [last, [-1]], "last1")
                lengths = self.lengths(g, name, self._do(g, "Cast", [last], "int32", to=ir.DataType.INT32))
                self._totals[name] = self._do(
                    g, "Cast", [lengths[f"{name}_total"]], f"{name}_total", to=ir.DataType.INT64
                )
                shared |= lengths
            shared |= self._tables(g, positions)
        past: list[dict[str, ir.Value]] = [{} for _ in range(self.num_layers)]
        for tensor in self.state:
            layer, kind = layer_and_kind(tensor)
            if tensor.buffer == "window":
                continue
            if kind == "conv_state" and self.window:
                past[layer] |= self._unpacked(g, layer)
                continue
            value = g.input(tensor.input, ir.DataType.FLOAT, dims(tensor))
            if tensor.buffer and self.lengthen:
                value = self._longer(g, value, ["B", *tensor.sizes()])
            past[layer][kind] = value
        return shared, past

    def end(self, g: GraphBuilder, present: list[ir.Value]) -> None:
        after: list[dict[str, ir.Value]] = [{} for _ in range(self.num_layers)]
        for tensor, value in zip(self.state, present, strict=True):
            layer, kind = layer_and_kind(tensor)
            after[layer][kind] = value
        for tensor in self.state:
            layer, kind = layer_and_kind(tensor)
            if tensor.buffer == "window":
                continue
            if kind == "conv_state" and self.window:
                self._pack(g, layer, after[layer])
            else:
                shape = dims(tensor)
                if tensor.buffer:
                    shape[2] = "S+T"
                g.output(after[layer][kind], tensor.output, shape)

    def _do(self, g: GraphBuilder, op: str, inputs: Sequence[Any], what: str, **attributes: Any) -> Any:
        """A node; lists of whole numbers among its inputs become constants."""
        own = [g.constant(np.array(x, np.int64)) if isinstance(x, list) else x for x in inputs]
        return g.node(op, own, f"genai/{len(g.nodes)}/{what}", **attributes)

    def _tokens(self, g: GraphBuilder) -> ir.Value:
        """T, as [1]."""
        sizes = self._do(g, "Shape", [g.inputs[0]], "shape")
        tokens: ir.Value = self._do(g, "Slice", [sizes, [1], [2], [0]], "T")
        return tokens

    def _tables(self, g: GraphBuilder, positions: ir.Value) -> dict[str, ir.Value]:
        """Rows for the tokens at hand, and then as many more as onnxruntime asks for."""
        row = self._do(
            g, "Reshape", [self._do(g, "Slice", [positions, [0], [1], [0]], "one"), [-1, 1]], "row"
        )
        # Revolutions in float64, as the runner does: float32 loses the fraction of one at long positions. The
        # fraction alone goes to Cos and Sin, which onnxruntime 1.25 has for float32 only.
        per_token = g.constant(self.frequencies[None] / (2 * np.pi))
        revolutions = self._do(
            g, "Mul", [self._do(g, "Cast", [row], "exact", to=ir.DataType.DOUBLE), per_token], "revolutions"
        )
        part = self._do(g, "Sub", [revolutions, self._do(g, "Floor", [revolutions], "whole")], "part")
        angle = self._do(g, "Mul", [part, g.constant(np.array(2 * np.pi))], "angle")
        angle = self._do(g, "Cast", [angle], "angle32", to=ir.DataType.FLOAT)
        tokens = self._tokens(g)
        rows = [self._do(g, "Reshape", [total, [1]], "total1") for total in self._totals.values()]
        longest = self._do(g, "Max", [tokens, *rows], "longest")
        missing = self._do(g, "Sub", [longest, tokens], "missing")
        pads = self._do(g, "Concat", [[0, 0], missing, [0]], "pads", axis=0)
        tables = {}
        for name, op in (("cos_cache", "Cos"), ("sin_cache", "Sin")):
            tables[name] = self._do(g, "Pad", [self._do(g, op, [angle], op), pads], name)
            _describe(tables[name], ["R", self.head_dim // 2])
        return tables

    def _longer(self, g: GraphBuilder, value: ir.Value, shape: Sequence[int | str]) -> ir.Value:
        """A buffer with slots for the tokens at hand; shape: as flavours read it."""
        pads = self._do(g, "Concat", [[0] * 6, self._tokens(g), [0]], "room", axis=0)
        longer: ir.Value = self._do(g, "Pad", [value, pads], "longer")
        _describe(longer, [*shape[:2], longer.name or "", *shape[3:]])  # each of a size of its own
        return longer

    def _packed(self, layer: int) -> list[tuple[str, list[int]]]:
        """The kinds and shapes that conv_state of a layer holds."""
        rows = self.spans["window"].most
        own = [tensor for tensor in self.state if layer_and_kind(tensor)[0] == layer]
        return [
            (layer_and_kind(tensor)[1], list(tensor.sizes(rows)))
            for tensor in own
            if tensor.input.endswith("conv_state") or (tensor.buffer and rows)
        ]

    def _unpacked(self, g: GraphBuilder, layer: int) -> dict[str, ir.Value]:
        parts = self._packed(layer)
        sizes = [int(np.prod(shape)) for _, shape in parts]
        whole = g.input(f"past_key_values.{layer}.conv_state", ir.DataType.FLOAT, ["B", 1, sum(sizes)])
        pieces = self._do(g, "Split", [whole, sizes], "unpacked", outputs=len(sizes), axis=2)
        own: dict[str, ir.Value] = {}
        for (kind, shape), piece in zip(parts, [pieces] if len(sizes) == 1 else pieces, strict=True):
            value = self._do(g, "Reshape", [piece, [-1, *shape]], kind)
            own[kind] = value if kind == "conv_state" else self._longer(g, value, ["B", *shape])
        for tensor in self.state:
            if tensor.buffer == "window" and layer_and_kind(tensor)[0] == layer and len(parts) == 1:
                # a window of one token has nothing to remember
                empty = g.constant(np.zeros((1, *tensor.sizes()), np.float32))
                own[layer_and_kind(tensor)[1]] = self._longer(g, empty, ["B", *tensor.sizes()])
        return own

    def _pack(self, g: GraphBuilder, layer: int, after: dict[str, ir.Value]) -> None:
        parts, rows = self._packed(layer), self.spans["window"].most
        flat = []
        for kind, _ in parts:
            value = after[kind]
            if kind != "conv_state":  # the rows that are still seen
                total = self._do(g, "Reshape", [self._totals["window"], [1]], "window_total")
                begin = self._do(g, "Max", [self._do(g, "Sub", [total, [rows]], "before"), [0]], "begin")
                end = self._do(g, "Add", [begin, [rows]], "stop")
                value = self._do(g, "Slice", [value, begin, end, [2]], "kept")
            flat.append(self._do(g, "Reshape", [value, [0, 1, -1]], "flat"))
        whole = self._do(g, "Concat", flat, "packed", axis=2)
        size = sum(int(np.prod(shape)) for _, shape in parts)
        g.output(whole, f"present.{layer}.conv_state", ["B", 1, size])


def _describe(value: ir.Value, shape: Sequence[int | str]) -> None:
    """Flavours read sizes."""
    value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(shape)


def replay(path: Path, tokens: np.ndarray, pieces: Sequence[int], start: int = 0) -> np.ndarray:
    """Feed tokens [T] in pieces as onnxruntime-genai does; the logits [n,V] at the end of each piece.

    start: the position of the first token, whose state is empty all the same.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    state = {
        item.name: np.zeros(
            [size if isinstance(size, int) else 0 for size in [1, *item.shape[1:]]], np.float32
        )
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
