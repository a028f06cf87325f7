"""Causal depthwise convolution and feature map in plain torch: reference and CPU form in one.

    x'_t = sum_j taps[:, j] * x_{t-K+1+j}        phi(x') = [softmax(x' W), softmax(-x' W)]

taps[:, K-1] meets the current token (the convention of torch's and ONNX's convolution).
"""

from __future__ import annotations

import torch
from torch import Tensor


def causal_conv(x: Tensor, taps: Tensor, buffer: Tensor) -> tuple[Tensor, Tensor]:
    """x [B,T,C], taps [C,K], buffer [B,C,K-1] (oldest first) -> y [B,T,C], buffer after the last token."""
    T, K = x.shape[1], taps.shape[1]
    padded = torch.cat([buffer.to(x.dtype).transpose(1, 2), x], 1)
    y = padded[:, K - 1 :] * taps[:, K - 1]
    for j in range(K - 1):
        y = y + padded[:, j : j + T] * taps[:, j]
    return y, padded[:, T:].transpose(1, 2)


def feature_map(x: Tensor, W: Tensor) -> Tensor:
    """x [B,T,H,d], W [H,d,f] -> phi [B,T,H,2f]; each half sums to one."""
    logits = torch.einsum("bthd,hdf->bthf", x, W)
    return torch.cat([logits.softmax(-1), (-logits).softmax(-1)], -1)


def conv_feature_naive(x: Tensor, taps: Tensor, W: Tensor, buffer: Tensor) -> tuple[Tensor, Tensor]:
    """x [B,T,G,d], G divides H, taps [H*d,K], W [H,d,f], buffer [B,H*d,K-1] -> phi [B,T,H,2f], buffer."""
    H, d, _ = W.shape
    x = x.repeat_interleave(H // x.shape[2], 2).flatten(2)
    y, buffer = causal_conv(x, taps, buffer)
    return feature_map(y.unflatten(2, (H, d)), W), buffer
