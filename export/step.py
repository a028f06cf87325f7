"""One decoder layer in recurrent step form, as torch's exporter sees it: any T, state in and state out.

The module holds no large weights. A linear layer is the placeholder node ``lawcat::Product`` (which product
it becomes is decided later, by the scheme) and every small tensor is a named parameter that the stitcher
replaces with that of the layer at hand. So the trace costs the same for 135 M and for 7 B parameters.

Letters as in ``lawcat_edge.attention``. To keep the graph lean:

- q, k, v and the gate's latent come from one product. Its bias makes two constant columns: the 1 that
  extends each value, and a 1 beside the latent that carries the gate's bias through the second product.
- q and k run as one tensor of 2H heads, channels first, through one convolution; the feature map is one
  batched product with [W, -W], and one softmax.
- The gate's sign is folded into B: g = -softplus(-u) / divisor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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


def _op(kind: str, inputs: list[Tensor], shape: list[Any], **attrs: Any) -> Tensor:
    version = 1 if "::" in kind else None
    dtype = inputs[0].dtype
    return torch.onnx.ops.symbolic(kind, inputs, attrs, dtype=dtype, shape=shape, version=version)


def _ops(kind: str, inputs: list[Tensor | None], shapes: list[Any], **attrs: Any) -> Any:
    dtypes = [torch.float32] * len(shapes)
    return torch.onnx.ops.symbolic_multi_out(kind, inputs, attrs, dtypes=dtypes, shapes=shapes, version=1)


class StepLayer(nn.Module):
    """x, h -> x', h' and the new state: x is the residual stream, h its normed form."""

    unit_gamma: Tensor
    eps: Tensor
    gate_scale: Tensor
    head_repeat: Tensor
    to_heads: Tensor
    to_value_heads: Tensor
    to_columns: Tensor
    to_group_heads: Tensor
    to_values: Tensor

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
            self.window_share = weight(H, 1, 1)

        # The same in all layers
        repeat = torch.arange(H) // g.groups
        self.register_buffer("unit_gamma", torch.ones(d))
        self.register_buffer("eps", torch.tensor(c.eps))
        self.register_buffer("gate_scale", torch.tensor(-1.0 / c.gate_divisor))
        self.register_buffer("head_repeat", repeat)
        self.register_buffer("to_heads", torch.tensor([0, 2, H, 1, d, -1]))
        self.register_buffer("to_value_heads", torch.tensor([0, 0, H, d + 1]))
        self.register_buffer("to_columns", torch.tensor([0, 0, -1]))
        self.register_buffer("to_group_heads", torch.tensor([0, 0, -1, d]))
        self.register_buffer("to_values", torch.tensor([0, 0, G, d + 1]))

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
        w = self.widths

        projected = self.product("qkv", h, w.total)
        # Without anything to do to q and k first, one Split gives whole heads
        plain = not (g.qk_norm or c.rope or c.window)
        qk_widths = [w.q, *[d] * G] if plain else [w.q + w.k]
        pieces = torch.split(projected, [*qk_widths, *[d + 1] * G, w.latent], 2)
        qk_heads, v_heads, latent = pieces[: -G - 1], pieces[-G - 1 : -1], pieces[-1]
        qk = pieces[0]
        if not plain:
            qk = self.normed(qk) if g.qk_norm else qk
            qk_heads = torch.split(self.rotated(qk, extra) if c.rope else qk, [w.q, *[d] * G], 2)
        channels = torch.cat([qk_heads[0], *self.repeated(qk_heads[1:])], 2)

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
        if G != H:
            decay = torch.cat(self.repeated(torch.split(decay, F, 2) if G > 1 else [decay]), 2)
        values = torch.cat(self.repeated(v_heads), 2)
        out, recurrent_present = _ops(
            "com.microsoft::LinearAttention",
            [phi_q, phi_k, values, recurrent_state, decay],
            [[B, T, H * (d + 1)], [B, H, F, d + 1]],
            update_rule="gated",
            q_num_heads=H,
            kv_num_heads=H,
            scale=1.0,
        )
        out = self.reshape(out, self.to_value_heads, [B, T, H, d + 1])
        states = [conv_present, recurrent_present]
        if c.window:
            near, *seen = self.window(qk, v_heads, extra)
            out = out + near
            if c.window > 1:
                states += seen
        n, z = torch.split(out, [d, 1], 3)
        y = self.reshape(n / (z + self.eps), self.to_columns, [B, T, H * d])

        x, h = self.residual_norm(x, self.product("o", y, D), self.norm_attn, getattr(self, "o_bias", None))
        gate, up = torch.split(self.product("gate_up", h, 2 * g.intermediate_size), g.intermediate_size, 2)
        act = _op("com.microsoft::QuickGelu", [gate], [B, T, g.intermediate_size], alpha=1.0) * up
        down_bias = getattr(self, "down_bias", None)
        x, h = self.residual_norm(x, self.product("down", act, D), self.norm_next, down_bias)
        return (x, h, *states)

    def repeated(self, heads: Sequence[Tensor]) -> list[Tensor]:
        """Key/value heads, each as often as query heads share it.

        Joined by a Concat of whole heads: a Gather of columns was ten times slower in prefill.
        """
        return [head for head in heads for _ in range(self.geometry.groups)]

    def normed(self, qk: Tensor) -> Tensor:
        g, eps = self.geometry, self.geometry.rms_norm_eps
        shape = [*qk.shape[:2], g.num_heads + g.num_kv_heads, g.head_dim]
        heads = self.reshape(qk, self.to_group_heads, shape)
        heads = _op("SimplifiedLayerNormalization", [heads, self.unit_gamma], shape, axis=-1, epsilon=eps)
        return self.reshape(heads * self.qk_gamma, self.to_columns, list(qk.shape))

    def rotated(self, qk: Tensor, extra: dict[str, Tensor]) -> Tensor:
        shape = [*qk.shape[:2], self.geometry.num_heads + self.geometry.num_kv_heads, self.geometry.head_dim]
        heads = self.reshape(qk, self.to_group_heads, shape)
        heads = rotate(heads, extra["rotary_cos"][:, None], extra["rotary_sin"][:, None])
        return self.reshape(heads, self.to_columns, list(qk.shape))

    def window(
        self, qk: Tensor, v: Sequence[Tensor], extra: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """sigmoid(omega) [N_w, Z_w] as [B,T,H,d+1], and keys and values to remember.

        Keys are kept un-rotated and rotated at their place in the buffer: scores depend on distances alone,
        so positions never grow, however long the text.
        """
        g, c = self.geometry, self.config
        H, G, d, past = g.num_heads, g.num_kv_heads, g.head_dim, c.window - 1
        B, T = qk.shape[0], qk.shape[1]
        mask = extra["window_mask"]  # [T,P+T]
        heads = self.reshape(qk, self.to_group_heads, [B, T, H + G, d]).transpose(1, 2)
        q, k = torch.split(heads, [H, G], 1)
        v_heads = self.reshape(torch.cat(list(v), 2), self.to_values, [B, T, G, d + 1]).transpose(1, 2)[
            ..., :d
        ]
        if past:
            k = torch.cat([extra["window_key"], k], 2)
            v_heads = torch.cat([extra["window_value"], v_heads], 2)
        keys, values = k[:, :, T:], v_heads[:, :, T:]
        q = rotate(q, extra["query_cos"], extra["query_sin"])  # carries the scale d^-1/2
        k = rotate(k, extra["key_cos"], extra["key_sin"])
        if G != H:
            repeat = self.head_repeat
            k, v_heads = k.index_select(1, repeat), v_heads.index_select(1, repeat)
        scores = q @ k.transpose(2, 3) + mask
        weights = (scores - scores.amax(-1, keepdim=True)).exp()
        both = torch.cat([weights @ v_heads, weights.sum(-1, keepdim=True)], -1)  # [B,H,T,d+1]
        return (both * self.window_share).transpose(1, 2), keys, values

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
        """One Reshape with a constant target (0 keeps a dimension), which torch's own would compute."""
        return _op("Reshape", [x, target], shape)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding in Llama's half-split layout; cos and sin broadcast against x."""
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat([-right, left], -1) * sin


WINDOW_INPUTS = ("key_cos", "key_sin", "query_cos", "query_sin", "window_mask")


class WindowInputs(nn.Module):
    """What all layers' windows share: rotary tables at local positions and the mask, from T and the fill."""

    inv_freq: Tensor

    def __init__(self, geometry: Geometry, config: LawcatConfig) -> None:
        super().__init__()
        self.past = config.window - 1
        self.scale = geometry.head_dim**-0.5
        inverse = torch.from_numpy(geometry.inv_freq()).float().repeat(2)
        self.register_buffer("inv_freq", inverse)

    def forward(self, input_ids: Tensor, window_fill: Tensor) -> tuple[Tensor, ...]:
        """input_ids [B,T], window_fill [1] -> tables and mask, as in ``WINDOW_INPUTS``.

        key_cos, key_sin [P+T,d]; query_cos, query_sin [T,d], times d^-1/2; window_mask [T,P+T], 0 or -inf.
        """
        T, past = input_ids.shape[1], self.past
        slot = torch.arange(past + T)
        angles = slot.to(torch.float32)[:, None] * self.inv_freq
        row, column = torch.arange(T)[:, None], slot[None]
        seen = (column >= row) & (column <= row + past) & (column >= past - window_fill)
        mask = torch.where(seen, 0.0, -torch.inf)
        cos, sin = angles.cos(), angles.sin()
        return cos, sin, cos[past:] * self.scale, sin[past:] * self.scale, mask
