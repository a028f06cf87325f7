"""The step form in this project's own operators (``runtime/native``), which its runner alone has.

Between the fused input product and the output product of a linear-attention layer stands one node. What that
node does is written here a second time, in torch: the tests hold both against ``lawcat_edge.attention``.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lawcat_edge.config import LawcatConfig
from lawcat_edge.export import operators as ops
from lawcat_edge.export.step import DecoderLayer, FullAttentionLayer, LinearAttentionLayer, Tensors, Widths
from lawcat_edge.families import Geometry
from lawcat_edge.runtime.native import DOMAIN

_NAMES = ("num_heads", "kv_num_heads", "window", "max_score", "rope", "gate_divisor", "eps", "norm_eps")


def _lawcat_attention(*given: Any) -> tuple[Tensor, ...]:
    *tensors, H, G, window, max_score, rope, divisor, eps, norm_eps = given
    packed, taps, feature, gate_b, scale, gamma, conv_state, state, *near = tensors
    key, value, seqlens, cos, sin, position_ids = near
    B, T, _ = packed.shape
    d, latent = feature.shape[3], gate_b.shape[0]
    q, k, rest = packed.split([H * d, G * d, packed.shape[2] - (H + G) * d], 2)
    if gamma is not None:
        heads = torch.cat([q, k], 2).unflatten(2, (-1, d))
        q, k = (ops.rms(heads, torch.ones(d), norm_eps) * gamma).flatten(2).split([H * d, G * d], 2)
    if window:
        v, one = rest[..., : G * d].unflatten(2, (G, d)), rest[..., G * d : G * d + 1]
        v1 = torch.cat([v, one[..., None].expand(B, T, G, 1)], 3)
    else:
        v1 = rest[..., : G * (d + 1)].unflatten(2, (G, d + 1))
    linear_q, linear_k = q, k
    if rope:
        linear_q, linear_k = (
            ops.rotary(x.contiguous(), position_ids, cos, sin, heads) for x, heads in ((q, H), (k, G))
        )
    linear_k = linear_k.unflatten(2, (G, d)).repeat_interleave(H // G, 2).flatten(2)
    channels = torch.cat([linear_q, linear_k], 2).transpose(1, 2)
    conv, conv_after = ops.causal_conv(channels, taps, conv_state)
    phi = (feature @ conv.reshape(B, 2, H, 1, d, T)).permute(0, 5, 1, 2, 3, 4).softmax(-1)
    phi_q, phi_k = phi.reshape(B, T, -1).chunk(2, 2)
    decay = -F.softplus(rest[..., -latent:] @ gate_b) / divisor
    v1 = v1.repeat_interleave(H // G, 2).flatten(2)
    out, after = ops.linear_attention(phi_q, phi_k, v1, state, decay)
    num, den = out.unflatten(2, (H, d + 1)).split([d, 1], 3)
    if not window:
        return (num / (den + eps)).flatten(2), conv_after, after
    given = (q, k, rest[..., : G * d], key, value, seqlens, seqlens.max() + 1, cos, sin, position_ids)
    y, *buffers, top = ops.scaled_attention(*given, H, window)
    if max_score:
        scale = top.transpose(1, 2) * scale
    y = (y.unflatten(2, (H, d)) + num * scale) / (den * scale + (1 + eps))
    return y.flatten(2), conv_after, after, *buffers


def _shapes(*given: Any) -> tuple[Tensor, ...]:
    packed, _, feature, _, _, _, conv_state, state, key, value = given[:10]
    y = packed.new_empty(*packed.shape[:2], given[-8] * feature.shape[3])
    buffers = () if key is None else (torch.empty_like(key), torch.empty_like(value))
    return y, torch.empty_like(conv_state), torch.empty_like(state), *buffers


def _nodes(*given: Any) -> Any:
    tensors, attributes = given[:-8], dict(zip(_NAMES, given[-8:], strict=True))
    outputs = 5 if attributes["window"] else 3
    return ops.node("LawcatAttention", tensors, outputs, domain=DOMAIN, **attributes)


_ARGUMENTS = (
    "Tensor packed, Tensor conv_taps, Tensor feature, Tensor gate_b, Tensor? window_scale, Tensor? qk_gamma, "
    "Tensor conv_state, Tensor recurrent_state, Tensor? key, Tensor? value, Tensor? seqlens_k, Tensor? cos, "
    "Tensor? sin, Tensor? position_ids, int num_heads, int kv_num_heads, int window, int max_score, "
    "int rope, float gate_divisor, float eps, float norm_eps"
)
# Tensors are described in runtime/native/operators.c. Returns y [B,T,Hd] and the state after the tokens.
lawcat_attention = ops.register(
    f"lawcat_attention({_ARGUMENTS}) -> (Tensor, Tensor, Tensor)", _lawcat_attention, _shapes, _nodes
)
windowed_attention = ops.register(
    f"lawcat_windowed_attention({_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _lawcat_attention,
    _shapes,
    _nodes,
)


def _swiglu(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


swiglu = ops.register(
    "swiglu(Tensor x) -> Tensor",
    _swiglu,
    lambda x: x.new_empty(*x.shape[:-1], x.shape[-1] // 2),
    lambda x: ops.node("SwiGlu", [x], domain=DOMAIN),
)


class _Native(DecoderLayer):
    def swiglu(self, gate_up: Tensor) -> Tensor:
        result: Tensor = swiglu(gate_up)
        return result


class NativeFullAttentionLayer(_Native, FullAttentionLayer):
    """The teacher's own layer."""


class NativeLinearAttentionLayer(_Native, LinearAttentionLayer):
    """LAWCAT attention, with a window or without, in one node."""

    def attention(self, h: Tensor, tensors: Tensors, state: Tensors, inputs: Tensors) -> tuple[Tensor, ...]:
        g, c = self.geometry, self.config
        packed = self.linear("qkv", h, tensors)
        assert packed.shape[2] == Widths.of(g, c).total
        names = ("conv_taps", "feature", "gate_b", "window_scale", "qk_gamma")
        kinds = ("conv_state", "recurrent_state", "key", "value")
        shared = ("window_seqlens_k", "cos_cache", "sin_cache", "position_ids")
        result: tuple[Tensor, ...] = (windowed_attention if c.window else lawcat_attention)(
            packed,
            *(tensors.get(name) for name in names),
            *(state.get(kind) for kind in kinds),
            *(inputs.get(name) for name in shared),
            g.num_heads,
            g.num_kv_heads,
            c.window,
            int(c.window_scaling == "max_score"),
            int(c.rope),
            c.gate_divisor,
            c.eps,
            g.rms_norm_eps,
        )
        return result


def native_module(geometry: Geometry, config: LawcatConfig, full: bool) -> DecoderLayer:
    return (NativeFullAttentionLayer if full else NativeLinearAttentionLayer)(geometry, config)
