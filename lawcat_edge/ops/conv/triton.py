"""Causal convolution and feature map in one Triton kernel, and its gradients.

    x'_t = sum_j taps[:, j] * x_{t-K+1+j}        phi(x') = [softmax(x' W), softmax(-x' W)]

The forward reads x and writes phi; x' and its logits never leave registers. The backward recomputes them,
sums the gradients of taps and W over its share of the tokens in registers, and hands the gradient of x' to a
second kernel, which gathers it into x over taps and over the query heads of a key/value head.

Letters: B batch, T tokens, H heads, G heads of x (R = H/G), D head width, F half the feature width, K taps.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from lawcat_edge.ops.backend import check_triton
from lawcat_edge.ops.gla.triton_kernels import interpreted, load_rows, mm, store_rows


def _tile(D: int) -> tuple[int, int]:
    """Tokens a program handles at a time, and its warps, so that its tiles fit in registers."""
    return (32, 4) if D <= 64 else (16, 8)


@triton.jit
def load_shifted(
    p_x, p_past, i_b, i_h, t0, shift, o_r, o_d, T, H: tl.constexpr, R: tl.constexpr, D: tl.constexpr,
    K: tl.constexpr,
):  # fmt: skip
    """x at times t0 + shift + o_r for head h: from past [B,K-1,H*D] where negative, zero from T on."""
    G: tl.constexpr = H // R
    row = o_r + shift
    t = t0 + row
    x = load_rows(p_x + ((i_b * T + t0) * G + i_h // R) * D, row, (t >= 0) & (t < T), G * D, o_d, D)
    past = p_past + (i_b * (K - 1) * H + i_h) * D
    return x + load_rows(past, t + (K - 1), (t < 0) & (t > -K), H * D, o_d, D)


@triton.jit
def convolve(
    p_x, p_taps, p_past, i_b, i_h, t0, o_r, o_d, T, H: tl.constexpr, R: tl.constexpr, D: tl.constexpr,
    K: tl.constexpr, ROWS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    y = tl.zeros([ROWS, BD], tl.float32)
    for j in tl.static_range(K):
        tap = tl.load(p_taps + (i_h * D + o_d) * K + j, mask=o_d < D, other=0.0).to(tl.float32)
        y += tap[None, :] * load_shifted(p_x, p_past, i_b, i_h, t0, j - (K - 1), o_r, o_d, T, H, R, D, K)
    return y


@triton.jit
def softmax_rows(logits, m_f):
    logits = tl.where(m_f[None, :], logits, float("-inf"))
    e = tl.exp(logits - tl.max(logits, 1)[:, None])
    return e / tl.sum(e, 1)[:, None]


@triton.jit
def load_weight(p_W, i_h, o_d, o_f, D: tl.constexpr, F: tl.constexpr):
    mask = (o_d < D)[:, None] & (o_f < F)[None, :]
    return tl.load(p_W + (i_h * D + o_d[:, None]) * F + o_f[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["T", "NT"])
def forward_kernel(
    p_x, p_taps, p_W, p_past, p_phi, T, NT, H: tl.constexpr, R: tl.constexpr, D: tl.constexpr,
    F: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, BD: tl.constexpr, BF: tl.constexpr,
    MODE: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    i_h, i_t, i_b = pid % H, pid // H % NT, (pid // H // NT).to(tl.int64)
    o_d, o_f, o_r = tl.arange(0, BD), tl.arange(0, BF), tl.arange(0, ROWS)
    t0 = i_t * ROWS
    y = convolve(p_x, p_taps, p_past, i_b, i_h, t0, o_r, o_d, T, H, R, D, K, ROWS, BD)
    logits = mm(y, load_weight(p_W, i_h, o_d, o_f, D, F), MODE)
    p = p_phi + ((i_b * T + t0) * H + i_h) * 2 * F
    store_rows(p, softmax_rows(logits, o_f < F), o_r, t0 + o_r < T, H * 2 * F, o_f, F)
    store_rows(p + F, softmax_rows(-logits, o_f < F), o_r, t0 + o_r < T, H * 2 * F, o_f, F)


@triton.jit(do_not_specialize=["T", "NT", "tiles", "share"])
def backward_kernel(
    p_x, p_taps, p_W, p_past, p_dphi, p_dy, p_dW, p_dtaps, T, NT, tiles, share, H: tl.constexpr,
    R: tl.constexpr, D: tl.constexpr, F: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr,
    BD: tl.constexpr, BF: tl.constexpr, BT: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """Over `share` tiles of one head: dy [B,T,H,D], and its part of dW [n,H,D,F] and dtaps [n,H,D,K]."""
    i_h, i_n = tl.program_id(0), tl.program_id(1)
    o_d, o_f, o_j, o_r = tl.arange(0, BD), tl.arange(0, BF), tl.arange(0, BT), tl.arange(0, ROWS)
    b_W = load_weight(p_W, i_h, o_d, o_f, D, F)
    dW = tl.zeros([BD, BF], tl.float32)
    dtaps = tl.zeros([BT, BD], tl.float32)
    for i in range(i_n * share, tl.minimum(i_n * share + share, tiles)):
        i_b = (i // NT).to(tl.int64)
        t0 = i % NT * ROWS
        m_r = t0 + o_r < T
        y = convolve(p_x, p_taps, p_past, i_b, i_h, t0, o_r, o_d, T, H, R, D, K, ROWS, BD)
        logits = mm(y, b_W, MODE)
        plus, minus = softmax_rows(logits, o_f < F), softmax_rows(-logits, o_f < F)
        p = p_dphi + ((i_b * T + t0) * H + i_h) * 2 * F
        d_plus = plus * load_rows(p, o_r, m_r, H * 2 * F, o_f, F)
        d_minus = minus * load_rows(p + F, o_r, m_r, H * 2 * F, o_f, F)
        dl = d_plus - plus * tl.sum(d_plus, 1)[:, None] - d_minus + minus * tl.sum(d_minus, 1)[:, None]
        dW += mm(tl.trans(y), dl, MODE)
        dy = mm(dl, tl.trans(b_W), MODE)
        store_rows(p_dy + ((i_b * T + t0) * H + i_h) * D, dy, o_r, m_r, H * D, o_d, D)
        for j in tl.static_range(K):
            x = load_shifted(p_x, p_past, i_b, i_h, t0, j - (K - 1), o_r, o_d, T, H, R, D, K)
            dtaps += tl.where((o_j == j)[:, None], tl.sum(dy * x, 0)[None, :], 0.0)
    i_nh = i_n.to(tl.int64) * H + i_h
    m_d = o_d < D
    tl.store(p_dW + (i_nh * D + o_d[:, None]) * F + o_f[None, :], dW, mask=m_d[:, None] & (o_f < F)[None, :])
    p = p_dtaps + (i_nh * D + o_d[None, :]) * K + o_j[:, None]
    tl.store(p, dtaps, mask=m_d[None, :] & (o_j < K)[:, None])


@triton.jit(do_not_specialize=["T", "NT"])
def backward_x_kernel(
    p_dy, p_taps, p_dx, T, NT, G: tl.constexpr, R: tl.constexpr, D: tl.constexpr, K: tl.constexpr,
    ROWS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """dx_s = sum over the R query heads and over j of taps[:, j] dy_{s+K-1-j}."""
    pid = tl.program_id(0)
    i_g, i_t, i_b = pid % G, pid // G % NT, (pid // G // NT).to(tl.int64)
    o_d, o_r = tl.arange(0, BD), tl.arange(0, ROWS)
    t0 = i_t * ROWS
    H: tl.constexpr = G * R
    dx = tl.zeros([ROWS, BD], tl.float32)
    for i_r in range(0, R):
        i_h = i_g * R + i_r
        for j in tl.static_range(K):
            tap = tl.load(p_taps + (i_h * D + o_d) * K + j, mask=o_d < D, other=0.0).to(tl.float32)
            row = o_r + (K - 1 - j)
            dy = load_rows(p_dy + ((i_b * T + t0) * H + i_h) * D, row, t0 + row < T, H * D, o_d, D)
            dx += tap[None, :] * dy
    store_rows(p_dx + ((i_b * T + t0) * G + i_g) * D, dx, o_r, t0 + o_r < T, G * D, o_d, D)


@torch.compiler.disable
def conv_feature_triton(x: Tensor, taps: Tensor, W: Tensor, buffer: Tensor) -> tuple[Tensor, Tensor]:
    """x [B,T,G,d], taps [H*d,K], W [H,d,f], buffer [B,H*d,K-1]
    -> phi [B,T,H,2f] and the next buffer, in x's dtype.

    Differentiable in all four. Sums are float32; the product with W takes bfloat16 operands when x is
    bfloat16, and else splits each into two, as gla_triton does. d and f up to 128.
    """
    return _ConvFeature.apply(x, taps, W, buffer), _next_buffer(x, buffer, W.shape[0] // x.shape[2])


def _next_buffer(x: Tensor, buffer: Tensor, repeat: int) -> Tensor:
    r = buffer.shape[2]
    tail = x[:, -r:].repeat_interleave(repeat, 2).flatten(2).transpose(1, 2)
    return torch.cat([buffer.to(x.dtype), tail], 2)[:, :, -r:]


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _block(width: int) -> int:
    return max(16, triton.next_power_of_2(width))


class _ConvFeature(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, taps: Tensor, W: Tensor, buffer: Tensor) -> Tensor:  # type: ignore[override]
        B, T, G, D = x.shape
        H, _, F = W.shape
        K = taps.shape[1]
        assert T > 0, "no tokens"
        assert H % G == 0, (H, G)
        assert K > 1, K
        assert W.shape[1] == D, (W.shape, x.shape)
        assert taps.shape[0] == H * D, (taps.shape, W.shape)
        assert buffer.shape == (B, H * D, K - 1), (buffer.shape, taps.shape)
        check_triton(x, W)
        x, taps, W = x.contiguous(), taps.contiguous(), W.contiguous()
        past = buffer.transpose(1, 2).contiguous()
        mode = "bf16" if x.dtype == torch.bfloat16 else "split"
        if not x.is_cuda:
            mode = interpreted(mode)
        rows, warps = _tile(D)
        NT = triton.cdiv(T, rows)
        phi = torch.empty(B, T, H, 2 * F, dtype=x.dtype, device=x.device)
        with torch.cuda.device_of(x):
            forward_kernel[(B * NT * H,)](
                x, taps, W, past, phi, T, NT, H, H // G, D, F, K, rows, _block(D), _block(F), mode,
                num_warps=warps,
            )  # fmt: skip
        ctx.save_for_backward(x, taps, W, past)
        ctx.mode = mode
        return phi

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dphi: Tensor) -> tuple[Tensor | None, ...]:
        x, taps, W, past = ctx.saved_tensors
        B, T, G, D = x.shape
        H, _, F = W.shape
        K = taps.shape[1]
        rows, warps = _tile(D)
        NT = triton.cdiv(T, rows)
        tiles = B * NT
        share = triton.cdiv(tiles, min(tiles, triton.cdiv(4 * _processors(x.device), H)))
        n = triton.cdiv(tiles, share)
        dphi = dphi.contiguous()
        dy = torch.empty(B, T, H, D, dtype=x.dtype, device=x.device)
        dW = torch.empty(n, H, D, F, dtype=torch.float32, device=x.device)
        dtaps = torch.empty(n, H, D, K, dtype=torch.float32, device=x.device)
        dx = torch.empty_like(x)
        with torch.cuda.device_of(x):
            backward_kernel[(H, n)](
                x, taps, W, past, dphi, dy, dW, dtaps, T, NT, tiles, share, H, H // G, D, F, K, rows,
                _block(D), _block(F), triton.next_power_of_2(K), ctx.mode, num_warps=warps, num_stages=1,
            )  # fmt: skip
            backward_x_kernel[(B * NT * G,)](
                dy, taps, dx, T, NT, G, H // G, D, K, rows, _block(D), num_warps=warps, num_stages=1
            )
        dbuffer = _buffer_grad(dy, taps, past) if ctx.needs_input_grad[3] else None
        return dx, dtaps.sum(0).flatten(0, 1).to(taps.dtype), dW.sum(0).to(W.dtype), dbuffer


def _buffer_grad(dy: Tensor, taps: Tensor, past: Tensor) -> Tensor:
    """Slot m of the buffer stands at time m-K+1 and meets tap j at time m-j."""
    r = past.shape[1]
    grad = torch.zeros_like(past, dtype=torch.float32)
    head = dy[:, :r].flatten(2).float()  # [B,<=r,H*d]
    for m in range(r):
        for j in range(max(0, m + 1 - head.shape[1]), m + 1):
            grad[:, m] += head[:, m - j] * taps[:, j].float()
    return grad.to(past.dtype).transpose(1, 2)
