"""Softmax attention over the last w tokens on Triton: the scores of a tile live in registers alone.

    s_ij = q_i . k_j / sqrt(d)  for i - w < j <= i        m_i = max_j s_ij, first at j = a_i
    N_i = sum_j exp(s_ij - m_i) v_j                       Z_i = sum_j exp(s_ij - m_i)

Backward, with p = exp(s - m) formed again and D_i = dN_i . N_i + dZ_i Z_i (what m_i takes from all scores):

    ds_ij = p_ij (dN_i . v_j + dZ_i) - [j = a_i] D_i
    dq_i = sum_j ds_ij k_j / sqrt(d)    dk_j = sum_i ds_ij q_i / sqrt(d)    dv_j = sum_i p_ij dN_i

Letters: B batch, T tokens, H query heads, G key/value heads, R = H/G, D head width, W window; M queries and K
keys of a tile. p_ pointer, b_ loaded block, o_ offsets, m_ mask, i_ index.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from lawcat_edge.ops.backend import check_triton
from lawcat_edge.ops.triton_primitives import interpreted, mm, products

TILE = 64  # queries and keys of a tile
WIDE_TILE = 32  # where heads are wider than 64 and products split: operands of two tiles fill shared memory


@triton.jit
def _rows(p_x, i_b, i_h, o_t, T, H: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    """Rows o_t of one head of x [B,T,H,D] as [len(o_t), BD]; zero outside."""
    o_d = tl.arange(0, BD)
    m = ((o_t >= 0) & (o_t < T))[:, None] & (o_d < D)[None, :]
    at = ((i_b * T + o_t).to(tl.int64) * H + i_h)[:, None] * D + o_d[None, :]
    return tl.load(p_x + at, mask=m, other=0.0)


@triton.jit
def _scores(b_q, b_k, o_i, o_j, T, W, scale, MODE: tl.constexpr):
    """Scores [M,K] of queries at o_i against keys at o_j, -inf outside the window."""
    s = mm(b_q, tl.trans(b_k), MODE) * scale
    age = o_i[:, None] - o_j[None, :]
    seen = (age >= 0) & (age < W) & (o_j >= 0)[None, :] & (o_i < T)[:, None]
    return tl.where(seen, s, float("-inf"))


@triton.jit
def forward_kernel(
    p_q, p_k, p_v, p_N, p_Z, p_m, p_a, T, W, scale, H: tl.constexpr, R: tl.constexpr, D: tl.constexpr,
    M: tl.constexpr, K: tl.constexpr, BD: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one head: a walk over the keys that it sees."""
    i_t, i_bh = tl.program_id(0), tl.program_id(1)
    i_b, i_h = i_bh // H, i_bh % H
    o_i = i_t * M + tl.arange(0, M)
    b_q = _rows(p_q, i_b, i_h, o_i, T, H, D, BD)
    top = tl.full([M], float("-inf"), tl.float32)
    argtop = tl.zeros([M], tl.int32)
    Z = tl.zeros([M], tl.float32)
    N = tl.zeros([M, BD], tl.float32)
    first = tl.maximum(i_t * M - W + 1, 0) // K * K
    for start in range(first, tl.minimum(i_t * M + M, T), K):
        o_j = start + tl.arange(0, K)
        b_k = _rows(p_k, i_b, i_h // R, o_j, T, H // R, D, BD)
        b_v = _rows(p_v, i_b, i_h // R, o_j, T, H // R, D, BD)
        s = _scores(b_q, b_k, o_i, o_j, T, W, scale, MODE)
        here = tl.max(s, 1)
        at = tl.argmax(s, 1)
        argtop = tl.where(here > top, start + at, argtop)
        new = tl.maximum(top, here)
        safe = tl.where(new == float("-inf"), 0.0, new)  # rows that saw no key yet
        p = tl.exp(s - safe[:, None])
        shrink = tl.exp(top - safe)
        Z = Z * shrink + tl.sum(p, 1)
        N = N * shrink[:, None] + mm(p, b_v.to(tl.float32), MODE)
        top = new
    o_d = tl.arange(0, BD)
    row = (i_b * T + o_i).to(tl.int64) * H + i_h
    m_i = o_i < T
    tl.store(p_N + row[:, None] * D + o_d[None, :], N, mask=m_i[:, None] & (o_d < D)[None, :])
    tl.store(p_Z + row, Z, mask=m_i)
    tl.store(p_m + row, top, mask=m_i)
    tl.store(p_a + row, argtop, mask=m_i)


@triton.jit
def _score_gradient(
    b_q, b_k, b_v, b_dN, p_Z, p_m, p_a, p_dZ, p_delta, row, o_i, o_j, T, W, scale, MODE: tl.constexpr
):
    """p and ds of a tile, [M,K] each."""
    m_i = o_i < T
    top = tl.load(p_m + row, mask=m_i, other=0.0)
    argtop = tl.load(p_a + row, mask=m_i, other=-1)
    dZ = tl.load(p_dZ + row, mask=m_i, other=0.0)
    delta = tl.load(p_delta + row, mask=m_i, other=0.0)
    s = _scores(b_q, b_k, o_i, o_j, T, W, scale, MODE)
    p = tl.exp(s - top[:, None])
    ds = p * (mm(b_dN, tl.trans(b_v), MODE) + dZ[:, None])
    ds -= tl.where(o_j[None, :] == argtop[:, None], delta[:, None], 0.0)
    return p, ds


@triton.jit
def dq_kernel(
    p_q, p_k, p_v, p_Z, p_m, p_a, p_dN, p_dZ, p_delta, p_dq, T, W, scale, H: tl.constexpr, R: tl.constexpr,
    D: tl.constexpr, M: tl.constexpr, K: tl.constexpr, BD: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """dq of one tile of queries of one head."""
    i_t, i_bh = tl.program_id(0), tl.program_id(1)
    i_b, i_h = i_bh // H, i_bh % H
    o_i = i_t * M + tl.arange(0, M)
    row = (i_b * T + o_i).to(tl.int64) * H + i_h
    b_q = _rows(p_q, i_b, i_h, o_i, T, H, D, BD)
    b_dN = _rows(p_dN, i_b, i_h, o_i, T, H, D, BD)
    dq = tl.zeros([M, BD], tl.float32)
    first = tl.maximum(i_t * M - W + 1, 0) // K * K
    for start in range(first, tl.minimum(i_t * M + M, T), K):
        o_j = start + tl.arange(0, K)
        b_k = _rows(p_k, i_b, i_h // R, o_j, T, H // R, D, BD)
        b_v = _rows(p_v, i_b, i_h // R, o_j, T, H // R, D, BD)
        _, ds = _score_gradient(
            b_q, b_k, b_v, b_dN, p_Z, p_m, p_a, p_dZ, p_delta, row, o_i, o_j, T, W, scale, MODE
        )
        dq += mm(ds, b_k.to(tl.float32), MODE)
    o_d = tl.arange(0, BD)
    mask = (o_i < T)[:, None] & (o_d < D)[None, :]
    tl.store(p_dq + row[:, None] * D + o_d[None, :], dq * scale, mask=mask)


@triton.jit
def dkv_kernel(
    p_q, p_k, p_v, p_Z, p_m, p_a, p_dN, p_dZ, p_delta, p_dk, p_dv, T, W, scale, G: tl.constexpr,
    R: tl.constexpr, D: tl.constexpr, M: tl.constexpr, K: tl.constexpr, BD: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """dk and dv of one tile of keys of one key/value head, over the R query heads that share it."""
    i_t, i_bg = tl.program_id(0), tl.program_id(1)
    i_b, i_g = i_bg // G, i_bg % G
    o_j = i_t * K + tl.arange(0, K)
    b_k = _rows(p_k, i_b, i_g, o_j, T, G, D, BD)
    b_v = _rows(p_v, i_b, i_g, o_j, T, G, D, BD)
    dk = tl.zeros([K, BD], tl.float32)
    dv = tl.zeros([K, BD], tl.float32)
    for i_r in range(R):
        i_h = i_g * R + i_r
        for start in range(i_t * K // M * M, tl.minimum(i_t * K + K + W - 1, T), M):
            o_i = start + tl.arange(0, M)
            row = (i_b * T + o_i).to(tl.int64) * (G * R) + i_h
            b_q = _rows(p_q, i_b, i_h, o_i, T, G * R, D, BD)
            b_dN = _rows(p_dN, i_b, i_h, o_i, T, G * R, D, BD)
            p, ds = _score_gradient(
                b_q, b_k, b_v, b_dN, p_Z, p_m, p_a, p_dZ, p_delta, row, o_i, o_j, T, W, scale, MODE
            )
            dk += mm(tl.trans(ds), b_q.to(tl.float32), MODE)
            dv += mm(tl.trans(p), b_dN.to(tl.float32), MODE)
    o_d = tl.arange(0, BD)
    mask = (o_j < T)[:, None] & (o_d < D)[None, :]
    at = ((i_b * T + o_j).to(tl.int64) * G + i_g)[:, None] * D + o_d[None, :]
    tl.store(p_dk + at, dk * scale, mask=mask)
    tl.store(p_dv + at, dv, mask=mask)


@torch.compiler.disable
def window_triton(q: Tensor, k: Tensor, v: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """N [B,T,H,d] in q's dtype and Z [B,T,H] in float32, differentiable; q, k rotated, the text starts here.

    q [B,T,H,d], k and v [B,T,G,d], d up to 128. Products take bfloat16 operands for bfloat16 inputs; else
    each operand is split into two (``lawcat_edge.ops.gla.triton.products``).
    """
    return _Window.apply(q, k, v, window)


class _Window(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, window: int) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        B, T, H, D = q.shape
        G = k.shape[2]
        assert k.shape == v.shape == (B, T, G, D), (k.shape, v.shape)
        assert H % G == 0, (H, G)
        check_triton(q, k, v)
        q, k, v = (x.contiguous() for x in (q, k, v))
        mode = products(q, k, v)
        mode = mode if q.is_cuda else interpreted(mode)
        N = torch.empty_like(q)
        Z, top = (torch.empty(B, T, H, dtype=torch.float32, device=q.device) for _ in range(2))
        argtop = torch.empty(B, T, H, dtype=torch.int32, device=q.device)
        rows = WIDE_TILE if D > 64 and mode != "bf16" else TILE
        tile = (H // G, D, rows, rows, max(16, triton.next_power_of_2(D)), mode)
        with torch.cuda.device_of(q):
            forward_kernel[(triton.cdiv(T, rows), B * H)](
                q, k, v, N, Z, top, argtop, T, window, D**-0.5, H, *tile, num_warps=4
            )
        ctx.save_for_backward(q, k, v, N, Z, top, argtop)
        ctx.window, ctx.tile = window, tile
        return N, Z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dN: Tensor, dZ: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, N, Z, top, argtop = ctx.saved_tensors
        B, T, H, D = q.shape
        G = k.shape[2]
        dN, dZ = dN.to(q.dtype).contiguous(), dZ.float().contiguous()
        delta = (dN.float() * N.float()).sum(-1) + dZ * Z
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        shared = (q, k, v, Z, top, argtop, dN, dZ, delta)
        rest = (T, ctx.window, D**-0.5)
        with torch.cuda.device_of(q):
            tiles = triton.cdiv(T, ctx.tile[2])
            dq_kernel[(tiles, B * H)](*shared, dq, *rest, H, *ctx.tile, num_warps=4)
            dkv_kernel[(tiles, B * G)](*shared, dk, dv, *rest, G, *ctx.tile, num_warps=4)
        return dq, dk, dv, None
