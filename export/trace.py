"""Trace the step modules once with torch's exporter; what comes out is a template for the stitcher."""

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

from lawcat_edge.config import LawcatConfig
from lawcat_edge.export.step import WINDOW_INPUTS, StepLayer, WindowInputs
from lawcat_edge.families import Geometry

OPSET = 23  # the first with Attention


@dataclass(frozen=True)
class Template:
    """A traced graph. ``layer_tensors`` are the initialisers that differ from layer to layer."""

    graph: ir.Graph
    layer_tensors: frozenset[str] = frozenset()


def trace_layer(geometry: Geometry, config: LawcatConfig) -> Template:
    """One decoder layer with B and T dynamic; see StepLayer.forward for inputs and outputs."""
    return _trace_layer(*_key(replace(geometry, num_layers=1, vocab_size=1, sliding_window=None), config))


def trace_window(geometry: Geometry, config: LawcatConfig) -> Template:
    """The mask that all layers share when there is a window."""
    return _trace_window(*_key(geometry, config))


def _key(*settings: Geometry | LawcatConfig) -> list[str]:
    return [json.dumps(part.to_dict(), sort_keys=True) for part in settings]


# A trace takes seconds; several schemes of one model share it
@functools.lru_cache(maxsize=8)
def _trace_layer(geometry: str, config: str) -> Template:
    g, c = Geometry.from_dict(json.loads(geometry)), LawcatConfig.from_dict(json.loads(config))
    B, T, P = 2, 3, c.window - 1
    module = StepLayer(g, c).eval()
    batch, tokens = torch.export.Dim("B"), torch.export.Dim("T")
    x, x_dims = torch.zeros(B, T, g.hidden_size), {0: batch, 1: tokens}
    extra: dict[str, torch.Tensor] = {}
    dims: dict[str, Any] = {}
    if c.rope or c.window:
        for name in ("rotary_cos", "rotary_sin"):
            extra[name], dims[name] = torch.zeros(T, g.head_dim // 2), {0: tokens}
    if c.window:
        rows = g.groups * tokens if g.groups > 1 else tokens
        extra["window_mask"] = torch.zeros(g.groups * T, P + T)
        dims["window_mask"] = {0: rows, 1: tokens + P if P else tokens}
        extra["tokens"], dims["tokens"] = torch.zeros(1, dtype=torch.int64), {}
        for name, width in (("window_key", g.head_dim), ("window_value", g.head_dim + 1)) if P else ():
            extra[name], dims[name] = torch.zeros(B, g.num_kv_heads, P, width), {0: batch}
    kwargs = {
        "x": x,
        "h": x.clone(),
        "conv_state": torch.zeros(B, 2 * g.query_width, c.conv_kernel - 1),
        "recurrent_state": torch.zeros(B, g.num_heads, c.key_dim, g.head_dim + 1),
        "extra": extra,
    }
    shapes = {
        "x": x_dims,
        "h": x_dims,
        "conv_state": {0: batch},
        "recurrent_state": {0: batch},
        "extra": dims,
    }
    graph = _export(module, kwargs, shapes)
    return Template(graph, frozenset(name for name, _ in module.named_parameters()))


@functools.lru_cache(maxsize=8)
def _trace_window(geometry: str, config: str) -> Template:
    module = WindowInputs(
        Geometry.from_dict(json.loads(geometry)), LawcatConfig.from_dict(json.loads(config))
    ).eval()
    kwargs = {
        "input_ids": torch.zeros(2, 3, dtype=torch.int64),
        "window_fill": torch.zeros(1, dtype=torch.int64),
    }
    shapes = {"input_ids": {0: torch.export.Dim("B"), 1: torch.export.Dim("T")}, "window_fill": {}}
    graph = _export(module, kwargs, shapes)
    assert len(graph.outputs) == len(WINDOW_INPUTS)
    return Template(graph)


def _export(module: torch.nn.Module, kwargs: dict[str, Any], shapes: dict[str, Any]) -> ir.Graph:
    with _quiet():
        program = torch.onnx.export(
            module, (), kwargs=kwargs, dynamic_shapes=shapes, dynamo=True, opset_version=OPSET, verbose=False
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
