"""Causal convolution over tokens followed by the feature map, with the carried buffer."""

from __future__ import annotations

import torch
from torch import Tensor

from lawcat_edge.ops.backend import choose
from lawcat_edge.ops.conv.naive import causal_conv, conv_feature_naive, feature_map

__all__ = ["causal_conv", "conv_feature", "feature_map"]


def conv_feature(
    x: Tensor, taps: Tensor, W: Tensor, buffer: Tensor | None = None, backend: str = "auto"
) -> tuple[Tensor, Tensor | None]:
    """Features of q or k: phi(conv(x)).

    x [B,T,G,d] (G divides H; heads are repeated before the convolution), taps [H*d,K], W [H,d,f],
    buffer [B,H*d,K-1] with the last pre-convolution vectors, oldest first. Returns phi [B,T,H,2f] and the
    buffer after the last token. Without a buffer the text starts here, and none is returned.
    """
    if choose(backend, x) == "triton":
        from lawcat_edge.ops.conv.triton import conv_feature_triton

        phi = conv_feature_triton(x, taps, W, buffer)
        return phi, None if buffer is None else next_buffer(x, buffer)
    if buffer is not None:
        return conv_feature_naive(x, taps, W, buffer)
    return conv_feature_naive(x, taps, W, x.new_zeros(x.shape[0], taps.shape[0], taps.shape[1] - 1))[0], None


def next_buffer(x: Tensor, buffer: Tensor) -> Tensor:
    """The last vectors of [buffer, x], in x's dtype: x [B,T,G,d], buffer [B,H*d,K-1]."""
    r, repeat = buffer.shape[2], buffer.shape[1] // (x.shape[2] * x.shape[3])
    tail = x[:, -r:].repeat_interleave(repeat, 2).flatten(2).transpose(1, 2)
    return torch.cat([buffer.to(x.dtype), tail], 2)[:, :, -r:]
