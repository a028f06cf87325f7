"""Put the model together: embedding, the traced layer once per layer with its own tensors, head."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from lawcat_edge.export import products
from lawcat_edge.export.builder import GraphBuilder
from lawcat_edge.export.layout import Layout
from lawcat_edge.export.step import WINDOW_INPUTS
from lawcat_edge.export.trace import OPSET, Template
from lawcat_edge.runtime.bundle import expected_state


def stitch(
    layout: Layout,
    tensors: Mapping[str, ir.ExternalTensor],
    layer: Template,
    window: Template | None,
    all_positions: bool,
) -> ir.Model:
    """The whole graph; logits of the last position only, or of all."""
    geometry, config = layout.geometry, layout.config
    V, D = geometry.vocab_size, geometry.hidden_size
    g = GraphBuilder(tensors)
    float32, int64 = ir.DataType.FLOAT, ir.DataType.INT64
    ids = g.input("input_ids", int64, ["B", "T"])
    shared: dict[str, ir.Value] = {}
    if config.rope or config.window:
        half = [g.constant(np.array([n], np.int64)) for n in (0, geometry.head_dim // 2, 1)]
        for name in ("rotary_cos", "rotary_sin"):  # both halves of a head turn alike
            whole = g.input(name, float32, ["T", geometry.head_dim])
            shared[f"extra_{name}"] = g.node("Slice", [whole, *half], f"{name}/half")
    if window is not None:
        # with a window of one there is no past that could be unfilled
        fill = g.input("window_fill", int64, [1]) if config.window > 1 else g.constant(np.zeros(1, np.int64))
        tables = instantiate(g, window, {"input_ids": ids, "window_fill": fill}, layout, "window", None)
        shared |= {f"extra_{name}": value for name, value in zip(WINDOW_INPUTS, tables, strict=True)}
    states = expected_state(geometry.to_dict(), config.to_dict())
    per_layer = len(states) // geometry.num_layers
    past = [g.input(tensor.input, float32, ["B", *tensor.shape]) for tensor in states]

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
        own = past[i * per_layer : (i + 1) * per_layer]
        names = ("conv_state", "recurrent_state", "extra_window_key", "extra_window_value")
        inputs = {"x": x, "h": h, **shared, **dict(zip(names, own, strict=False))}
        x, h, *after = instantiate(g, layer, inputs, layout, f"layers.{i}", i)
        present += after
    if not all_positions:
        h = g.node("Gather", [h, g.constant(np.array([-1], np.int64))], "last", axis=1)
    if layout.head_transform:
        h = g.node("MatMul", [h, g.stored("head_transform")], "head_transform/product")
    head = "embedding" if layout.shared_table else "head"
    logits = products.emit(g, layout.spec("head"), head, h, V, D, None, "head")

    g.output(logits, "logits", ["B", "T" if all_positions else 1, V])
    for tensor, value in zip(states, present, strict=True):
        g.output(value, tensor.output, ["B", *tensor.shape])
    return g.model({"": OPSET, "com.microsoft": 1})


def instantiate(
    g: GraphBuilder,
    template: Template,
    inputs: Mapping[str, ir.Value],
    layout: Layout,
    prefix: str,
    layer: int | None,
) -> list[ir.Value]:
    """Copy the template's nodes into g with these inputs; large products become those of the scheme."""
    values: dict[ir.Value, ir.Value] = {value: inputs[value.name or ""] for value in template.graph.inputs}
    for name, value in template.graph.initializers.items():
        if name in template.layer_tensors:
            values[value] = g.stored(f"{prefix}.{name}")
        else:
            assert value.const_value is not None
            values[value] = g.constant(value.const_value.numpy())
    for number, node in enumerate(template.graph):
        own = [None if value is None else values[value] for value in node.inputs]
        if node.op_type == "Product":
            kind = node.attributes["name"].as_string()
            name, (N, K) = f"{prefix}.{kind}", layout.shape(kind)
            bias = f"{name}.bias" if layout.has_bias(kind) else None
            assert own[0] is not None
            path, spec, x = f"{prefix}/{kind}", layout.spec(kind, layer), own[0]
            if kind == "down" and layout.down_turn is not None:
                x = products.emit_turn(g, "down_turn", len(layout.down_turn), x, f"{path}/turn")
            result = products.emit(g, spec, name, x, N, K, bias, path, layout.ranges.get(path))
            values[node.outputs[0]] = result
            continue
        if node.op_type == "Constant":
            values[node.outputs[0]] = g.constant(node.attributes["value"].as_tensor().numpy())
            continue
        copy = ir.Node(
            node.domain,
            node.op_type,
            own,
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
