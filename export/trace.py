"""Trace the layers once with torch's exporter; what comes out is a template for the stitcher."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import onnx_ir as ir
import torch

from lawcat_edge.config import FULL, LINEAR, LawcatConfig
from lawcat_edge.export.native import native_module
from lawcat_edge.export.operators import translations
from lawcat_edge.export.step import DecoderLayer, layer_module
from lawcat_edge.families import Geometry
from lawcat_edge.runtime.bundle.span import Span

OPSET = 23
HIDDEN = ("x", "h")


@dataclass(frozen=True)
class Template:
    """A traced layer.

    inputs: for each input of the graph where it comes from and under which name: "hidden" (see ``HIDDEN``),
    "tensors" and "state" (the layer's own) or "inputs" (which all layers share).
    """

    graph: ir.Graph
    inputs: tuple[tuple[str, str], ...]


def trace_layer(geometry: Geometry, config: LawcatConfig, full: bool, native: bool = False) -> Template:
    """One decoder layer of a kind, with B, T and the buffers' sizes dynamic; see ``DecoderLayer.forward``.

    native: in this project's own operators.
    """
    # Layers differ from each other, and models in these numbers, without a difference in the graph
    geometry = replace(geometry, num_layers=1, vocab_size=1)
    kinds = (LINEAR, FULL) if full else ()
    span = config.span if full else Span(0)
    config = replace(config, layer_types=kinds, attention_span=span.tokens, attention_sinks=span.sinks)
    settings = (json.dumps(part.to_dict(), sort_keys=True) for part in (geometry, config))
    return _trace_layer(*settings, full, native)


def example_inputs(module: DecoderLayer, batch: int = 2, tokens: int = 3, slots: int = 8) -> dict[str, Any]:
    """Zeros of the shapes of ``module.forward``, which take no memory."""
    g, c = module.geometry, module.config
    B, T, H, G, d = batch, tokens, g.num_heads, g.num_kv_heads, g.head_dim
    full = "conv_taps" not in module.shapes()

    def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.zeros((), dtype=dtype).expand(shape)

    state, inputs = {}, {}
    if not full:
        state["conv_state"] = zeros(B, 2 * H * d, c.conv_kernel - 1)
        state["recurrent_state"] = zeros(B, H, c.key_dim, d + 1)
    if full or c.window:
        name = "full" if full else "window"
        state |= {kind: zeros(B, G, slots, d) for kind in ("key", "value")}
        inputs[f"{name}_seqlens_k"] = zeros(B, dtype=torch.int32)
        inputs[f"{name}_total"] = zeros(dtype=torch.int32)
    if full or c.window or c.rope:
        inputs |= {kind: zeros(slots, d // 2) for kind in ("cos_cache", "sin_cache")}
        inputs["position_ids"] = zeros(B, T, dtype=torch.int64)
    tensors = {name: zeros(*shape) for name, shape in module.shapes().items()}
    hidden = zeros(B, T, g.hidden_size)
    return {"x": hidden, "h": hidden.clone(), "tensors": tensors, "state": state, "inputs": inputs}


# A trace takes seconds; several schemes of one model share it
@functools.lru_cache(maxsize=16)
def _trace_layer(geometry: str, config: str, full: bool, native: bool) -> Template:
    g, c = Geometry.from_dict(json.loads(geometry)), LawcatConfig.from_dict(json.loads(config))
    module = (native_module if native else layer_module)(g, c, full).eval()
    arguments = example_inputs(module)
    batch, tokens = torch.export.Dim("B"), torch.export.Dim("T")
    slots, rows = torch.export.Dim("C", min=2), torch.export.Dim("R", min=2)
    own: dict[str, dict[int, Any]] = {
        "conv_state": {0: batch},
        "recurrent_state": {0: batch},
        "key": {0: batch, 2: slots},
        "value": {0: batch, 2: slots},
        "cos_cache": {0: rows},
        "sin_cache": {0: rows},
        "position_ids": {0: batch, 1: tokens},
        "window_seqlens_k": {0: batch},
        "full_seqlens_k": {0: batch},
    }
    groups = ("tensors", "state", "inputs")
    shapes = {
        **{name: {0: batch, 1: tokens} for name in HIDDEN},
        **{group: {name: own.get(name, {}) for name in arguments[group]} for group in groups},
    }
    graph = _export(module, arguments, shapes)
    names = [("hidden", name) for name in HIDDEN]
    names += [(group, name) for group in groups for name in arguments[group]]
    assert len(graph.inputs) == len(names), [value.name for value in graph.inputs]
    return Template(graph, tuple(names))


def _export(module: torch.nn.Module, kwargs: dict[str, Any], shapes: dict[str, Any]) -> ir.Graph:
    with _quiet():
        program = torch.onnx.export(
            module,
            (),
            kwargs=kwargs,
            dynamic_shapes=shapes,
            dynamo=True,
            opset_version=OPSET,
            custom_translation_table=translations(),
            verbose=False,
        )
    assert program is not None
    graph = program.model.graph
    # torch has been seen to emit an invalid graph for an opset it does not know, without an error
    assert graph.opset_imports.get("") == OPSET, graph.opset_imports
    return graph


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Torch reports missing torchvision and renamed axes; none of it concerns the user."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
