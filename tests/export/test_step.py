"""The modules that are traced run in torch, and are the student: before any ONNX exists."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from exported import logits_of, make_student
from torch import Tensor

from lawcat_edge.config import LawcatConfig
from lawcat_edge.export import operators as ops
from lawcat_edge.export.layout import Layout
from lawcat_edge.export.schemes import load_scheme
from lawcat_edge.export.step import span_of
from lawcat_edge.export.trace import example_inputs, trace_layer
from lawcat_edge.model import LawcatModel
from lawcat_edge.teacher import Teacher
from lawcat_edge.weights import MergedWeights

HYBRID: dict[str, Any] = {"layer_types": ("linear_attention", "full_attention"), "attention_span": 11}
CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("llama", {}, {}),
    ("llama", {"window": 5, "rope": True, **HYBRID}, {"attention_bias": True, "mlp_bias": True}),
    ("mistral", {"window": 3, "window_scaling": "softmax", **HYBRID}, {"sliding_window": 6}),
    ("qwen2", {"window": 1}, {"num_attention_heads": 4, "num_key_value_heads": 4}),
    ("qwen3", {"window": 4, **HYBRID}, {"num_attention_heads": 4, "num_key_value_heads": 2}),
]


class Stepped:
    """The whole student out of the modules that are traced, with one buffer slot a token."""

    def __init__(self, teacher: Teacher, model: LawcatModel, adapter: Any, slots: int) -> None:
        self.geometry, self.config, self.slots = teacher.geometry, adapter.config, slots
        weights = MergedWeights(teacher.weights(), adapter)
        self.layout = Layout(self.geometry, self.config, load_scheme("fp32"), weights, adapter.tensors)
        self.model, self.position = model, 0
        self.tensors, self.states = [], []
        for i in range(self.geometry.num_layers):
            module = self.layout.module(i)
            arrays = self.layout.arrays(i)
            assert {name: value.shape for name, value in arrays.items()} == module.shapes()
            self.tensors.append({name: torch.from_numpy(np.float32(value)) for name, value in arrays.items()})
            like = example_inputs(module, batch=1, slots=slots)["state"]
            # what was never written must not matter, so it is not zero in a buffer
            self.states.append(
                {
                    k: torch.full(v.shape, 9.0) if k in ("key", "value") else torch.zeros(v.shape)
                    for k, v in like.items()
                }
            )

    def __call__(self, tokens: np.ndarray) -> Tensor:
        g, T = self.geometry, len(tokens)
        x = self.model.embed_tokens(torch.from_numpy(tokens)[None])
        h = ops.rms_norm(
            x, torch.from_numpy(self.layout._gain("model.layers.0.input_layernorm.weight")), g.rms_norm_eps
        )
        angle = torch.arange(self.position, self.position + T)[:, None] * torch.from_numpy(g.inv_freq())
        last = torch.tensor([self.position + T - 1], dtype=torch.int32)
        inputs = {
            "cos_cache": angle.cos().float(),
            "sin_cache": angle.sin().float(),
            "position_ids": torch.arange(T)[None],
            **{f"{name}_seqlens_k": last for name in ("window", "full")},
            **{f"{name}_total": last[0] + 1 for name in ("window", "full")},
        }
        for i, (tensors, state) in enumerate(zip(self.tensors, self.states, strict=True)):
            x, h, *after = self.layout.module(i)(x, h, tensors, state, inputs)
            self.states[i] = dict(zip(state, after, strict=True))
        self.position += T
        return self.model.lm_head(h)[0]


@pytest.mark.parametrize(("family", "settings", "changes"), CASES)
def test_the_traced_modules_are_the_student(
    tmp_path: Path, family: str, settings: dict[str, Any], changes: dict[str, Any]
) -> None:
    config = LawcatConfig(**{"feature_dim": 8, **settings})
    teacher, model, adapter = make_student(tmp_path, family, config, lora=2, **changes)
    tokens = np.random.default_rng(0).integers(0, 257, 40)
    reference = logits_of(model, tokens)
    stepped, got, at = Stepped(teacher, model, adapter, slots=48), [], 0
    with torch.no_grad():
        for piece in (1, 7, 1, 20, 2, 1, 8):
            got.append(stepped(tokens[at : at + piece]).numpy())
            at += piece
    error = np.abs(np.concatenate(got) - reference).max() / np.abs(reference).max()
    assert error < 1e-5


def test_a_teacher_that_slides_bounds_the_span(tmp_path: Path) -> None:
    config = LawcatConfig(feature_dim=8, **HYBRID)
    teacher, _, _ = make_student(tmp_path, "mistral", config, sliding_window=6)
    assert span_of(teacher.geometry, config) == 6


def test_operators_know_their_shapes() -> None:
    """What tracing believes of an operator is what it gives."""
    H, G, d, T, C = 4, 2, 16, 3, 9
    lengths = torch.tensor([4, 7], dtype=torch.int32)
    tables = [torch.randn(C, d // 2) for _ in range(2)]
    qkv, buffers = torch.randn(2, T, (H + 2 * G) * d), [torch.randn(2, G, C, d) for _ in range(2)]
    given = (
        qkv,
        None,
        None,
        *buffers,
        lengths,
        torch.tensor(8),
        *tables,
        torch.zeros(2, T, dtype=torch.long),
        H,
        5,
    )
    x, x3 = torch.randn(2, T, 8), torch.randn(2, 8, T)
    calls = [
        (torch.ops.lawcat.group_query_attention, given),
        (torch.ops.lawcat.scaled_attention, given),
        (torch.ops.lawcat.linear, (x, torch.randn(5, 8), None, "o")),
        (torch.ops.lawcat.skip_norm, (x, x, torch.randn(8), None, 1e-5)),
        (torch.ops.lawcat.rms_norm, (x, torch.randn(8), 1e-5)),
        (torch.ops.lawcat.causal_conv, (x3, torch.randn(8, 1, 4), torch.randn(2, 8, 3))),
        (torch.ops.lawcat.linear_attention, (x, x, torch.randn(2, T, 6), torch.randn(2, 2, 4, 3), x)),
        (torch.ops.lawcat.reshape, (x, [0, -1, 2])),
        (torch.ops.lawcat.softplus, (x,)),
        (torch.ops.lawcat.silu, (x,)),
        (torch.ops.lawcat.rotary, (torch.randn(2, T, H * d), given[9], *tables, H)),
    ]
    for operator, arguments in calls:
        torch.library.opcheck(operator.default, arguments, test_utils=("test_schema", "test_faketensor"))


def test_softplus_and_silu_are_those_of_torch() -> None:
    x = torch.linspace(-90, 90, 301)
    torch.testing.assert_close(ops.softplus(x), F.softplus(x))
    torch.testing.assert_close(ops.silu(x), F.silu(x))


def test_a_kind_of_layer_is_traced_once(tmp_path: Path) -> None:
    """Spans and layers that do not change the graph of a kind do not trace it again."""
    config = LawcatConfig(feature_dim=8, window=4, **HYBRID)
    teacher, _, _ = make_student(tmp_path, config=config)
    pure = LawcatConfig(feature_dim=8, window=4)
    assert trace_layer(teacher.geometry, config, False) is trace_layer(teacher.geometry, pure, False)
    assert trace_layer(teacher.geometry, config, True) is not trace_layer(teacher.geometry, config, False)
