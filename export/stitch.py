"""Put the model together: embedding, the traced layers once per layer with its own tensors, head."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from lawcat_edge.export import products
from lawcat_edge.export.builder import GraphBuilder
from lawcat_edge.export.layout import Layout
from lawcat_edge.export.trace import OPSET, Template
from lawcat_edge.runtime.bundle.manifest import StateTensor, expected_spans, expected_state
from lawcat_edge.runtime.native import DOMAIN

SLOTS = {"window": "W", "full": "S"}  # names of the dimensions along which buffers grow


def stitch(
    layout: Layout,
    tensors: Mapping[str, ir.ExternalTensor],
    layers: Mapping[bool, Template],
    all_positions: bool,
    interface: Interface | None = None,
    choosable: bool = False,
    native: bool = False,
) -> ir.Model:
    """The whole graph; logits of the last position only, or of all.

    choosable: logits of the last position unless the input ``logits_at``, int64 [P], names others; it has
    that default, so that a caller need not know of it.
    layers: the template of full-attention layers (True) and of the others. native: of the products too
    those of ``runtime.native`` are used.
    """
    geometry = layout.geometry
    V, D = geometry.vocab_size, geometry.hidden_size
    g = GraphBuilder(tensors, native)
    interface = interface or Interface(layout)
    ids = g.input("input_ids", ir.DataType.INT64, ["B", "T"])
    shared, past = interface.begin(g)

    x = products.emit_embedding(g, layout.embedding_spec, "embedding", ids, V, D)
    h = g.node(
        "SimplifiedLayerNormalization",
        [x, g.stored("first_norm")],
        "first_norm/out",
        axis=-1,
        epsilon=geometry.rms_norm_eps,
    )
    present: list[ir.Value] = []
    for i in range(geometry.num_layers):
        template = layers[layout.config.full_attention(i)]
        own: dict[str, Mapping[str, ir.Value]] = {
            "hidden": {"x": x, "h": h},
            "inputs": shared,
            "state": past[i],
        }
        x, h, *after = instantiate(g, template, own, layout, i)
        present += after
    if not all_positions:
        default = np.array([-1], np.int64)
        at = g.input("logits_at", ir.DataType.INT64, ["P"], default) if choosable else g.constant(default)
        h = g.node("Gather", [h, at], "last", axis=1)
    if layout.head_transform:
        h = g.node("MatMul", [h, g.stored("head_transform")], "head_transform/product")
    head = "embedding" if layout.shared_table else "head"
    logits = products.emit(g, layout.spec("head"), head, h, V, D, None, "head")

    g.output(logits, "logits", ["B", "T" if all_positions else "P" if choosable else 1, V])
    interface.end(g, present)
    opsets = {"": OPSET, "com.microsoft": 1}
    if native:
        opsets[DOMAIN] = 1
    return g.model(opsets)


class Interface:
    """The inputs and outputs of a graph beside tokens and logits, as the runner here gives and takes them."""

    def __init__(self, layout: Layout) -> None:
        geometry, config = layout.geometry.to_dict(), layout.config.to_dict()
        self.head_dim, self.num_layers = layout.geometry.head_dim, layout.geometry.num_layers
        self.rope = layout.config.rope
        self.state = expected_state(geometry, config)
        self.spans = expected_spans(geometry, config)

    def begin(self, g: GraphBuilder) -> tuple[dict[str, ir.Value], list[dict[str, ir.Value]]]:
        """What all layers share, by name, and the state of every layer, by kind."""
        shared: dict[str, ir.Value] = {}
        if self.rope or self.spans:
            shared["position_ids"] = g.input("position_ids", ir.DataType.INT64, ["B", "T"])
            for name in ("cos_cache", "sin_cache"):
                shared[name] = g.input(name, ir.DataType.FLOAT, ["R", self.head_dim // 2])
        for name in self.spans:
            seqlens = g.input(f"{name}_seqlens_k", ir.DataType.INT32, ["B"])
            shared |= self.lengths(g, name, seqlens)
        past: list[dict[str, ir.Value]] = [{} for _ in range(self.num_layers)]
        for tensor in self.state:
            layer, kind = layer_and_kind(tensor)
            past[layer][kind] = g.input(tensor.input, ir.DataType.FLOAT, dims(tensor))
        return shared, past

    def lengths(self, g: GraphBuilder, name: str, seqlens: ir.Value) -> dict[str, ir.Value]:
        """The last slot in use of every sequence [B], and the number of slots in use of the longest."""
        last = g.node("ReduceMax", [seqlens], f"{name}/last", keepdims=0)
        total = g.node("Add", [last, g.constant(np.array(1, np.int32))], f"{name}/total")
        return {f"{name}_seqlens_k": seqlens, f"{name}_total": total}

    def end(self, g: GraphBuilder, present: list[ir.Value]) -> None:
        """present: the state after the tokens, in the order of ``bundle.expected_state``."""
        for tensor, value in zip(self.state, present, strict=True):
            g.output(value, tensor.output, dims(tensor))


def layer_and_kind(tensor: StateTensor) -> tuple[int, str]:
    _, layer, kind = tensor.input.split(".")
    return int(layer), kind


def dims(tensor: StateTensor) -> list[int | str]:
    """The shape in a graph: buffers of one kind are of one size."""
    return ["B", *(SLOTS[tensor.buffer] if isinstance(size, str) else size for size in tensor.shape)]


def instantiate(
    g: GraphBuilder,
    template: Template,
    given: Mapping[str, Mapping[str, ir.Value]],
    layout: Layout,
    layer: int,
) -> list[ir.Value]:
    """Copy the template's nodes into g with these inputs; large products become those of the scheme."""
    prefix = f"layers.{layer}"
    values: dict[ir.Value, ir.Value] = {}
    for value, (group, name) in zip(template.graph.inputs, template.inputs, strict=True):
        if group != "tensors":
            values[value] = given[group][name]
        elif not all(node.op_type == "Linear" for node, _ in value.uses()):
            values[value] = g.stored(f"{prefix}.{name}")
    for value in template.graph.initializers.values():
        assert value.const_value is not None
        values[value] = g.constant(value.const_value.numpy())
    for number, node in enumerate(template.graph):
        if node.op_type == "Linear":
            kind, x = node.attributes["name"].as_string(), values[_given(node.inputs[0])]
            name, (N, K) = f"{prefix}.{kind}", layout.shape(kind, layer)
            bias = f"{name}.bias" if layout.has_bias(kind, layer) else None
            path, spec = f"{prefix}/{kind}", layout.spec(kind, layer)
            if kind == "down" and (rotation := layout.down_rotation(layer)) is not None:
                x = products.emit_rotation(g, "down_rotation", len(rotation), x, f"{path}/rotation")
            result = products.emit(g, spec, name, x, N, K, bias, path, layout.ranges.get(path))
            values[node.outputs[0]] = result
            continue
        if node.op_type == "Constant":
            values[node.outputs[0]] = g.constant(_constant(node))
            continue
        copy = ir.Node(
            node.domain,
            node.op_type,
            [None if value is None else values[value] for value in node.inputs],
            list(node.attributes.values()),
            num_outputs=len(node.outputs),
            name=f"{prefix}/{number}_{node.op_type}",
        )
        for i, (old, new) in enumerate(zip(node.outputs, copy.outputs, strict=True)):
            needed = old.uses() or old.is_graph_output()
            new.name = f"{copy.name}:{i}" if needed else ""
            values[old] = new
        g.nodes.append(copy)
    return [values[value] for value in template.graph.outputs]


def _given(value: ir.Value | None) -> ir.Value:
    assert value is not None
    return value


def _constant(node: ir.Node) -> np.ndarray:
    if "value_ints" in node.attributes:
        return np.array(node.attributes["value_ints"].as_ints(), np.int64)
    return node.attributes["value"].as_tensor().numpy()
