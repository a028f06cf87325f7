"""One decoder layer in recurrent step form, as torch's exporter sees it: any T, state in and state out.

The module holds no large weights. A linear layer is the placeholder node ``lawcat::Product`` (which product
it becomes is decided later, by the scheme) and every small tensor is a named parameter that the stitcher
replaces with that of the layer at hand. So the trace costs the same for 135 M and for 7 B parameters.

Letters as in ``lawcat_edge.attention``. To keep the graph lean:

- q, k, v and the gate's latent come from one product. Its bias makes two constant columns: the 1 that
  extends each value, and a 1 beside the latent that carries the gate's bias through the second product.
- Query heads are stored in the order of ``head_order``: one of each group, then the next of each group. So to
  repeat keys, values or gates for the heads that share them is to write the whole tensor several times over
  (one Concat), and the queries of a token are H / G rows of G heads, each with keys and values of its own.
- q and k run as one tensor of 2H heads, channels first, through one convolution; the feature map is one
  batched product with [W, -W], and one softmax.
- The gate's sign is folded into B: g = -softplus(-u) / divisor.
- The window is one Attention node over the stored keys, which are rotated at their positions when they are
  written. Its softmax gives N_w / Z_w and, since the largest weight is 1 / Z_w, the normaliser as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lawcat_edge.config import LawcatConfig
from lawcat_edge.families import Geometry


@dataclass(frozen=True)
class Widths:
    """Columns of the fused products, in order."""

    q: int
    k: int
    v: int
    latent: int

    @classmethod
    def of(cls, geometry: Geometry, config: LawcatConfig) -> Widths:
        g = geometry
        return cls(g.query_width, g.kv_width, g.num_kv_heads * (g.head_dim + 1), config.gate_rank + 1)

    @property
    def total(self) -> int:
        return self.q + self.k + self.v + self.latent


def head_order(geometry: Geometry) -> np.ndarray:
    """The teacher's query head at each place of the graph, [H]: 0, g, 2g, .., 1, g + 1, .. with g = H / G."""
    return np.arange(geometry.num_heads).reshape(geometry.num_kv_heads, geometry.groups).T.reshape(-1)


def _op(kind: str, inputs: list[Tensor], shape: list[Any], **attrs: Any) -> Tensor:
    version = 1 if "::" in kind else None
    dtype = inputs[0].dtype
    return torch.onnx.ops.symbolic(kind, inputs, attrs, dtype=dtype, shape=shape, version=version)


def _ops(kind: str, inputs: list[Tensor | None], shapes: list[Any], **attrs: Any) -> Any:
    version = 1 if "::" in kind else None
    dtypes = [torch.float32] * len(shapes)
    return torch.onnx.ops.symbolic_multi_out(
        kind, inputs, attrs, dtypes=dtypes, shapes=shapes, version=version
    )


class StepLayer(nn.Module):
    """x, h -> x', h' and the new state: x is the residual stream, h its normed form."""

    unit_gamma: Tensor
    eps: Tensor
    gate_scale: Tensor
    first: Tensor
    last_axis: Tensor
    to_heads: Tensor
    to_value_heads: Tensor
    to_columns: Tensor
    to_group_heads: Tensor
    to_group_queries: Tensor
    to_head_tops: Tensor
    slots: Tensor
    end: Tensor

    def __init__(self, geometry: Geometry, config: LawcatConfig) -> None:
        super().__init__()
        g, c = geometry, config
        self.geometry, self.config, self.widths = g, c, Widths.of(g, c)
        H, G, d, f = g.num_heads, g.num_kv_heads, g.head_dim, c.feature_dim
        F = c.key_dim

        def weight(*shape: int) -> nn.Parameter:
            # all different: the exporter merges initialisers of equal content
            self.filled += 1
            return nn.Parameter(torch.full(shape, float(self.filled)), requires_grad=False)

        self.filled = 0
        # Replaced in every layer
        self.conv_taps = weight(2 * H * d, 1, c.conv_kernel)
        self.feature = weight(H, 2, f, d)
        self.gate_b = weight(c.gate_rank + 1, G * F)
        self.norm_attn = weight(g.hidden_size)
        self.norm_next = weight(g.hidden_size)
        if g.output_bias:
            self.o_bias = weight(g.hidden_size)
        if g.mlp_bias:
            self.down_bias = weight(g.hidden_size)
        if g.qk_norm:
            self.qk_gamma = weight(H + G, d)
        if c.window:
            self.window_share = weight(H, 1)

        # The same in all layers; a target of Reshape keeps a dimension that is 0
        def ints(*values: int) -> Tensor:
            return torch.tensor(values)

        constants = {
            "unit_gamma": torch.ones(d),
            "eps": torch.tensor(c.eps),
            "gate_scale": torch.tensor(-1.0 / c.gate_divisor),
            "first": ints(0),
            "last_axis": ints(-1),
            "to_heads": ints(0, 2, H, 1, d, -1),
            "to_value_heads": ints(0, -1, H, d + 1),
            "to_columns": ints(0, 0, -1),
            "to_group_heads": ints(0, 0, -1, d),
            "to_group_queries": ints(0, -1, G * d),
            "to_head_tops": ints(0, -1, H, 1),
            "slots": ints(2),
            "end": ints(torch.iinfo(torch.int64).max),
        }
        for name, value in constants.items():
            self.register_buffer(name, value)

    def forward(
        self,
        x: Tensor,
        h: Tensor,
        conv_state: Tensor,
        recurrent_state: Tensor,
        extra: dict[str, Tensor],
    ) -> tuple[Tensor, ...]:
        """x, h [B,T,D]; states as in the graph contract; extra: rotary and window inputs by name."""
        g, c = self.geometry, self.config
        H, G, d, D = g.num_heads, g.num_kv_heads, g.head_dim, g.hidden_size
        F, B, T = c.key_dim, x.shape[0], x.shape[1]

        qk, values, latent = self.projections(h)
        turned = [self.rotated(heads, extra) for heads in qk] if c.rope or c.window else []
        channels = self.joined(turned if c.rope else qk)

        # Convolution and feature map: [B, channels, T] -> phi [B,T,2,H,F]
        conv, conv_present = _ops(
            "com.microsoft::CausalConvWithState",
            [channels.transpose(1, 2), self.conv_taps, None, conv_state],
            [[B, 2 * H * d, T], [B, 2 * H * d, c.conv_kernel - 1]],
            ndim=1,
        )
        heads = self.reshape(conv, self.to_heads, [B, 2, H, 1, d, T])
        phi = (self.feature @ heads).permute(0, 5, 1, 2, 3, 4).softmax(-1)
        phi_q, phi_k = torch.split(self.reshape(phi, self.to_columns, [B, T, 2 * H * F]), H * F, 2)

        decay = _op("Softplus", [latent @ self.gate_b], [B, T, G * F]) * self.gate_scale
        out, recurrent_present = _ops(
            "com.microsoft::LinearAttention",
            [phi_q, phi_k, self.repeated(values), recurrent_state, self.repeated(decay)],
            [[B, T, H * (d + 1)], [B, H, F, d + 1]],
            update_rule="gated",
            q_num_heads=H,
            kv_num_heads=H,
            scale=1.0,
        )
        out = self.reshape(out, self.to_value_heads, [B, T, H, d + 1])
        states = [conv_present, recurrent_present]
        if c.window:
            near, *remembered = self.window(turned, values, extra)
            out, states = out + near, states + remembered
        n, z = torch.split(out, [d, 1], 3)
        y = self.reshape(n / (z + self.eps), self.to_columns, [B, T, H * d])

        x, h = self.residual_norm(x, self.product("o", y, D), self.norm_attn, getattr(self, "o_bias", None))
        gate, up = torch.split(self.product("gate_up", h, 2 * g.intermediate_size), g.intermediate_size, 2)
        act = _op("com.microsoft::QuickGelu", [gate], [B, T, g.intermediate_size], alpha=1.0) * up
        down_bias = getattr(self, "down_bias", None)
        x, h = self.residual_norm(x, self.product("down", act, D), self.norm_next, down_bias)
        return (x, h, *states)

    def projections(self, h: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        """[q, k] (as one tensor where nothing comes between them), [v, 1] by head, and the gate's latent."""
        w = self.widths
        apart = self.geometry.groups > 1 or self.config.window > 0
        split = [w.q, w.k] if apart and not self.geometry.qk_norm else [w.q + w.k]
        *qk, values, latent = torch.split(self.product("qkv", h, w.total), [*split, w.v, w.latent], 2)
        if self.geometry.qk_norm:
            normed = self.normed(qk[0])
            qk = list(torch.split(normed, [w.q, w.k], 2)) if apart else [normed]
        return qk, values, latent

    def joined(self, qk: list[Tensor]) -> Tensor:
        """q and k as 2H heads."""
        return torch.cat([qk[0], *qk[1:] * self.geometry.groups], 2) if len(qk) > 1 else qk[0]

    def repeated(self, x: Tensor) -> Tensor:
        """x of G heads for all H heads."""
        return torch.cat([x] * self.geometry.groups, 2) if self.geometry.groups > 1 else x

    def normed(self, qk: Tensor) -> Tensor:
        g, eps = self.geometry, self.geometry.rms_norm_eps
        shape = [*qk.shape[:2], g.num_heads + g.num_kv_heads, g.head_dim]
        heads = self.reshape(qk, self.to_group_heads, shape)
        heads = _op("SimplifiedLayerNormalization", [heads, self.unit_gamma], shape, axis=-1, epsilon=eps)
        return self.reshape(heads * self.qk_gamma, self.to_columns, list(qk.shape))

    def rotated(self, x: Tensor, extra: dict[str, Tensor]) -> Tensor:
        """Rotary embedding at the tokens' positions; cos and sin are [T, d/2]."""
        d = self.geometry.head_dim
        inputs = [x, self.first, extra["rotary_cos"], extra["rotary_sin"]]
        shape, heads = list(x.shape), x.shape[2] // d
        return _op(
            "com.microsoft::RotaryEmbedding", inputs, shape, num_heads=int(heads), rotary_embedding_dim=d
        )

    def window(self, qk: list[Tensor], values: Tensor, extra: dict[str, Tensor]) -> list[Tensor]:
        """sigmoid(omega) [N_w, Z_w] as [B,T,H,d+1], and the keys and values to remember.

        qk rotated, values [v, 1] by head. Scores depend on the distance of positions alone.
        """
        q, k = qk
        g, past = self.geometry, self.config.window - 1
        H, G, d = g.num_heads, g.num_kv_heads, g.head_dim
        B, T = q.shape[0], q.shape[1]
        rows = T * g.groups
        queries = self.reshape(q, self.to_group_queries, [B, rows, G * d]) if g.groups > 1 else q
        stored = [extra["window_key"], extra["window_value"]] if past else []
        out, keys, seen, weights = _ops(
            "Attention",
            [queries, k, values, extra["window_mask"], *stored],
            [[B, rows, G * (d + 1)], [B, G, past + T, d], [B, G, past + T, d + 1], [B, G, rows, past + T]],
            q_num_heads=G,
            kv_num_heads=G,
            qk_matmul_output_mode=3,  # the weights
            scale=d**-0.5,
        )
        top = _op("ReduceMax", [weights, self.last_axis], [B, G, rows], keepdims=0)  # 1 / Z_w
        top = self.reshape(top.transpose(1, 2), self.to_head_tops, [B, T, H, 1])
        near = self.reshape(out, self.to_value_heads, [B, T, H, d + 1]) * (self.window_share / top)
        ends = (extra["tokens"], self.end, self.slots)
        shapes = [[B, G, past, d], [B, G, past, d + 1]]
        remembered = [
            _op("Slice", [x, *ends], shape) for x, shape in zip((keys, seen), shapes, strict=True) if past
        ]
        return [near, *remembered]

    def product(self, name: str, x: Tensor, width: int) -> Tensor:
        return _op("lawcat::Product", [x], [*x.shape[:-1], width], name=name)

    def residual_norm(
        self, x: Tensor, update: Tensor, gamma: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The residual stream after an update (and its bias), and that normed."""
        shape = list(x.shape)
        normed, _, _, total = _ops(
            "com.microsoft::SkipSimplifiedLayerNormalization",
            [x, update, gamma] if bias is None else [x, update, gamma, bias],
            [shape, [*shape[:2], 1], [*shape[:2], 1], shape],
            epsilon=self.geometry.rms_norm_eps,
        )
        return total, normed

    def reshape(self, x: Tensor, target: Tensor, shape: list[Any]) -> Tensor:
        """One Reshape with a constant target, which torch's own would compute."""
        return _op("Reshape", [x, target], shape)


WINDOW_INPUTS = ("window_mask", "tokens")


class WindowInputs(nn.Module):
    """What all layers' windows share, from T and the fill."""

    def __init__(self, geometry: Geometry, config: LawcatConfig) -> None:
        super().__init__()
        self.past, self.groups = config.window - 1, geometry.groups

    def forward(self, input_ids: Tensor, window_fill: Tensor) -> tuple[Tensor, Tensor]:
        """input_ids [B,T], window_fill [1] -> as in ``WINDOW_INPUTS``.

        window_mask [T * H/G, P+T]: 0 or -inf, a row for each query row of the window, H/G rows a token.
        tokens [1]: T, where the part of old and new keys begins that is remembered.
        """
        T, past = input_ids.shape[1], self.past
        tokens = _op("Shape", [input_ids], [1], start=1, end=2)
        row = (torch.arange(T)[:, None] + torch.zeros(self.groups, dtype=torch.int64)).reshape(-1, 1)
        column = torch.arange(past + T)
        oldest = torch.maximum(row, past - window_fill)
        seen = (column >= oldest) & (column <= row + past)
        return torch.where(seen, 0.0, -torch.inf), tokens
