"""One decoder layer in recurrent step form, as torch's exporter sees it: any T, state in and state out.

The modules hold no weights: every tensor of a layer is an input, under the name that it is stored by
(``layout``). So they run in torch on real tensors, trace on shapes alone at the same cost for 135 M and for
7 B parameters, and serve as the template of every layer of their kind. Large products are nodes of their own
(``lawcat::Linear``); which product one becomes is decided later, by the scheme.

Letters as in ``lawcat_edge.attention``. To keep the graph lean:

- q, k, v and the gate's latent come from one product, whose bias makes two constant columns: a 1 that extends
  each value, and a 1 beside the latent that carries the gate's bias through the second product.
- The window is one GroupQueryAttention node, which rotates, appends to its buffers and attends. Its softmax
  output is N_w / Z_w and, since the largest weight is 1 / Z_w, that gives the normaliser as well.
- q and k run as one tensor of 2H heads, channels first, through one convolution; the feature map is one
  batched product with [W, -W], and one softmax.
- The gate's sign is folded into B: g = -softplus(-u) / divisor. Its columns are there for every query head, a
  few numbers more instead of two nodes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lawcat_edge.config import LawcatConfig
from lawcat_edge.export import operators as ops
from lawcat_edge.families import Geometry

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Widths:
    """Columns of the fused product of a layer, in order.

    With a window, q, k and v are as GroupQueryAttention takes them, and a column of ones (``one``) follows.
    Without, every head's values bring their own one.
    """

    q: int
    k: int
    v: int
    one: int
    latent: int

    @classmethod
    def of(cls, geometry: Geometry, config: LawcatConfig, full: bool = False) -> Widths:
        """full: of a full-attention layer, which has q, k and v alone."""
        g, latent = geometry, config.gate_rank + 1
        if full:
            return cls(g.query_width, g.kv_width, g.kv_width, 0, 0)
        if config.window:
            return cls(g.query_width, g.kv_width, g.kv_width, 1, latent)
        return cls(g.query_width, g.kv_width, g.kv_width + g.num_kv_heads, 0, latent)

    @property
    def total(self) -> int:
        return self.q + self.k + self.v + self.one + self.latent


def span_of(geometry: Geometry, config: LawcatConfig) -> int:
    """Rows that a full-attention layer sees back, the newest included: the teacher may have seen fewer.

    -1: all that there are. With attention sinks what is forgotten is the runner's matter (``Span``): the
    graph sees what is left.
    """
    if config.attention_sinks:
        return -1
    return min(config.attention_span, geometry.sliding_window or config.attention_span)


class DecoderLayer(nn.Module):
    """x, h -> x', h' and the new state: x [B,T,D] is the residual stream, h its normed form."""

    def __init__(self, geometry: Geometry, config: LawcatConfig) -> None:
        super().__init__()
        self.geometry, self.config = geometry, config

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The tensors of a layer, by name."""
        g = self.geometry
        D, width = g.hidden_size, g.intermediate_size
        shapes: dict[str, tuple[int, ...]] = {
            **self.attention_shapes(),
            "o.weight": (D, g.query_width),
            "norm_attn": (D,),
            "gate_up.weight": (2 * width, D),
            "down.weight": (D, width),
            "norm_next": (D,),
        }
        if g.output_bias:
            shapes["o_bias"] = (D,)
        if g.mlp_bias:
            shapes |= {"gate_up.bias": (2 * width,), "down_bias": (D,)}
        if g.qk_norm:
            shapes["qk_gamma"] = (g.num_heads + g.num_kv_heads, g.head_dim)
        return shapes

    def attention_shapes(self) -> dict[str, tuple[int, ...]]:
        raise NotImplementedError

    def attention(self, h: Tensor, tensors: Tensors, state: Tensors, inputs: Tensors) -> tuple[Tensor, ...]:
        """y [B,T,Hd] and the state after it, in the order of ``bundle.expected_state``."""
        raise NotImplementedError

    def forward(
        self, x: Tensor, h: Tensor, tensors: Tensors, state: Tensors, inputs: Tensors
    ) -> tuple[Tensor, ...]:
        """tensors: see ``shapes``. state: by the kinds of ``bundle.expected_state``. inputs: those of the
        graph that all layers share, by name."""
        g = self.geometry
        y, *states = self.attention(h, tensors, state, inputs)
        eps = g.rms_norm_eps
        update = self.linear("o", y, tensors)
        h, x = ops.skip_norm(x, update, tensors["norm_attn"], tensors.get("o_bias"), eps)
        update = self.linear("down", self.swiglu(self.linear("gate_up", h, tensors)), tensors)
        h, x = ops.skip_norm(x, update, tensors["norm_next"], tensors.get("down_bias"), eps)
        return (x, h, *states)

    def linear(self, name: str, x: Tensor, tensors: Tensors) -> Tensor:
        result: Tensor = ops.linear(x, tensors[f"{name}.weight"], tensors.get(f"{name}.bias"), name)
        return result

    def swiglu(self, gate_up: Tensor) -> Tensor:
        """silu of the first half of the columns times the second half."""
        gate, up = torch.split(gate_up, self.geometry.intermediate_size, 2)
        result: Tensor = ops.silu(gate) * up
        return result

    def qk_normed(self, qk: Tensor, gamma: Tensor) -> list[Tensor]:
        """q and k, normed head by head, from both in one."""
        g = self.geometry
        heads = ops.reshape(qk, [0, 0, -1, g.head_dim])
        unit = torch.ones(g.head_dim)
        normed = ops.reshape(ops.rms_norm(heads, unit, g.rms_norm_eps) * gamma, [0, 0, -1])
        return list(torch.split(normed, [g.query_width, g.kv_width], 2))

    def softmax_inputs(
        self, q: Tensor, k: Tensor | None, v: Tensor | None, name: str, state: Tensors, inputs: Tensors
    ) -> tuple[Tensor | None, ...]:
        rotary = (inputs[key] for key in ("cos_cache", "sin_cache", "position_ids"))
        lengths = inputs[f"{name}_seqlens_k"], inputs[f"{name}_total"]
        return (q, k, v, state["key"], state["value"], *lengths, *rotary)


class FullAttentionLayer(DecoderLayer):
    """The teacher's own layer: softmax attention over ``config.span``."""

    def attention_shapes(self) -> dict[str, tuple[int, ...]]:
        g, total = self.geometry, Widths.of(self.geometry, self.config, full=True).total
        shapes: dict[str, tuple[int, ...]] = {"qkv.weight": (total, g.hidden_size)}
        return shapes | ({"qkv.bias": shapes["qkv.weight"][:1]} if g.attention_bias else {})

    def attention(self, h: Tensor, tensors: Tensors, state: Tensors, inputs: Tensors) -> tuple[Tensor, ...]:
        g, w = self.geometry, Widths.of(self.geometry, self.config, full=True)
        q, k, v = self.linear("qkv", h, tensors), None, None
        if g.qk_norm:
            q, v = torch.split(q, [w.q + w.k, w.v], 2)
            q, k = self.qk_normed(q, tensors["qk_gamma"])
        given = self.softmax_inputs(q, k, v, "full", state, inputs)
        result: tuple[Tensor, ...] = ops.group_query_attention(*given, g.num_heads, span_of(g, self.config))
        return result


class LinearAttentionLayer(DecoderLayer):
    """LAWCAT attention, with a window or without."""

    def attention_shapes(self) -> dict[str, tuple[int, ...]]:
        g, c = self.geometry, self.config
        H, d = g.num_heads, g.head_dim
        total = Widths.of(g, c).total
        shapes: dict[str, tuple[int, ...]] = {
            "qkv.weight": (total, g.hidden_size),
            "qkv.bias": (total,),
            "conv_taps": (2 * H * d, 1, c.conv_kernel),
            "feature": (H, 2, c.feature_dim, d),
            "gate_b": (c.gate_rank + 1, H * c.key_dim),
        }
        return shapes | ({"window_scale": (H, 1)} if c.window else {})

    def attention(self, h: Tensor, tensors: Tensors, state: Tensors, inputs: Tensors) -> tuple[Tensor, ...]:
        g, c = self.geometry, self.config
        H, G, d, n = g.num_heads, g.num_kv_heads, g.head_dim, g.groups
        F = c.key_dim
        q, ks, values, latent, near = self.projections(h, tensors)
        if c.rope:
            tables = [inputs[key] for key in ("position_ids", "cos_cache", "sin_cache")]
            q = ops.rotary(q, *tables, H)
            k = ops.rotary(joined(ks), *tables, G)
            ks = by_head(k, d) if n > 1 else [k]

        # Convolution and feature map: [B, channels, T] -> phi [B,T,2,H,F]; heads that share k or v repeat it
        channels = torch.cat([q, *(k for k in ks for _ in range(n))], 2)
        conv, conv_after = ops.causal_conv(
            channels.transpose(1, 2), tensors["conv_taps"], state["conv_state"]
        )
        heads = ops.reshape(conv, [0, 2, H, 1, d, -1])
        phi = (tensors["feature"] @ heads).permute(0, 5, 1, 2, 3, 4).softmax(-1)
        phi_q, phi_k = torch.split(ops.reshape(phi, [0, 0, -1]), H * F, 2)

        decay = ops.softplus(latent @ tensors["gate_b"]) * (-1.0 / c.gate_divisor)
        v1 = joined([part for parts in values for _ in range(n) for part in parts])
        out, after = ops.linear_attention(phi_q, phi_k, v1, state["recurrent_state"], decay)
        out = ops.reshape(out, [0, 0, H, d + 1])
        if not c.window:
            num, den = torch.split(out, [d, 1], 3)
            return ops.reshape(num / (den + c.eps), [0, 0, -1]), conv_after, after

        # Both sides of the mix divided by sigmoid(omega) Z_w: softmax output + out c over 1 + normaliser c
        given = self.softmax_inputs(*near, "window", state, inputs)
        scale = tensors["window_scale"]  # 1 / sigmoid(omega)
        if c.window_scaling == "softmax":
            y, *buffers = ops.group_query_attention(*given, H, c.window)
        else:
            y, *buffers, top = ops.scaled_attention(*given, H, c.window)
            scale = top.transpose(1, 2) * scale  # the largest weight is 1 / Z_w
        num, den = torch.split(out * scale, [d, 1], 3)
        # eps guards a division by zero, so here, where one is added, it need not be scaled
        y = (ops.reshape(y, [0, 0, H, d]) + num) / (den + (1 + c.eps))
        return ops.reshape(y, [0, 0, -1]), conv_after, after, *buffers

    def projections(
        self, h: Tensor, tensors: Tensors
    ) -> tuple[
        Tensor, list[Tensor], list[tuple[Tensor, ...]], Tensor, tuple[Tensor, Tensor | None, Tensor | None]
    ]:
        """q; k by head where heads share it; what makes [v, 1], by head; the gate's latent; the window's
        q, k and v."""
        g, w = self.geometry, Widths.of(self.geometry, self.config)
        G, d = g.num_kv_heads, g.head_dim
        heads = [d] * G if g.groups > 1 else [w.k]
        whole = self.linear("qkv", h, tensors)
        if not self.config.window:
            # one list for as much as can be split at once
            each = [w.v // G] * G if g.groups > 1 else [w.v]
            parts = [w.q + w.k] if g.qk_norm else [w.q, *heads]
            *qk, latent = torch.split(whole, [*parts, *each, w.latent], 2)
            qk, vs = qk[: len(parts)], qk[len(parts) :]
            if g.qk_norm:
                q, k = self.qk_normed(qk[0], tensors["qk_gamma"])
                qk = [q, *(by_head(k, d) if g.groups > 1 else [k])]
            return qk[0], qk[1:], [(v,) for v in vs], latent, (whole, None, None)
        packed, one, latent = torch.split(whole, [w.q + w.k + w.v, w.one, w.latent], 2)
        near: tuple[Tensor, Tensor | None, Tensor | None] = (packed, None, None)
        if g.qk_norm:
            normed, v = torch.split(packed, [w.q + w.k, w.v], 2)
            q, k = self.qk_normed(normed, tensors["qk_gamma"])
            near = (q, k, v)
            ks = by_head(k, d) if g.groups > 1 else [k]
            vs = by_head(v, d)
        else:
            q, *rest = torch.split(packed, [w.q, *heads, *[d] * G], 2)
            ks, vs = rest[: len(heads)], rest[len(heads) :]
        return q, ks, [(v, one) for v in vs], latent, near


def by_head(x: Tensor, width: int) -> list[Tensor]:
    return list(torch.split(x, width, 2)) if x.shape[2] > width else [x]


def joined(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts, 2) if len(parts) > 1 else parts[0]


def layer_module(geometry: Geometry, config: LawcatConfig, full: bool) -> DecoderLayer:
    return (FullAttentionLayer if full else LinearAttentionLayer)(geometry, config)
