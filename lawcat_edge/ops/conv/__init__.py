"""Causal convolution over tokens followed by the feature map, with the carried buffer."""

from __future__ import annotations

from torch import Tensor

from lawcat_edge.ops.backend import choose
from lawcat_edge.ops.conv.naive import causal_conv, conv_feature_naive, feature_map

__all__ = ["causal_conv", "conv_feature", "feature_map"]


def conv_feature(
    x: Tensor, taps: Tensor, W: Tensor, buffer: Tensor | None = None, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Features of q or k: phi(conv(x)).

    x [B,T,G,d] (G divides H; heads are repeated before the convolution), taps [H*d,K], W [H,d,f],
    buffer [B,H*d,K-1] with the last pre-convolution vectors, oldest first, zero when None.
    Returns phi [B,T,H,2f] and the buffer after the last token.
    """
    if buffer is None:
        buffer = x.new_zeros(x.shape[0], taps.shape[0], taps.shape[1] - 1)
    if choose(backend, x) == "triton":
        from lawcat_edge.ops.conv.triton import conv_feature_triton

        return conv_feature_triton(x, taps, W, buffer)
    return conv_feature_naive(x, taps, W, buffer)
