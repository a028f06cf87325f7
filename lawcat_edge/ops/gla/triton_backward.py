"""Triton kernels of the gradient of normalised gated linear attention.

With S'_t the state and D_t the gradient of the loss by it, D_{t-1} = exp(g_t) D_t + q_t (x) dn_t:
    dq_t = S_t dn_t + z_t dden_t      dk_t = D_t v_t + dz_t      dv_t = D_t^T k_t
Every chunk is done on its own once the state before it and the gradient after it are known, by one program
for all query heads of a key/value head, so that dv and dg are summed in registers. Two kernels, dq and then
the rest, since both together do not fit in registers; each is built twice, for chunks of mild decay and for
the others (SAFE), and a program whose chunk is of the other kind returns at once.

The gate: b_t stands with q_t and -b_j with k_j, so within a chunk
    dg_t = sum_{s>=t} (q dq - k dk)_s + exp(end) sum_d (D S)(end of chunk) .
Written with the part of dk that comes from D kept apart, this is the sum below; pairs of a token with itself,
whose share is zero, are left out before the subtraction, and nothing is summed past a chunk, so that strong
decay and long sequences lose no digits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lawcat_edge.ops.gla.triton_kernels import SUB, load_state, scores_safe
from lawcat_edge.ops.triton_primitives import load_rows, mm, store_rows


@triton.jit(do_not_specialize=["rows", "eps"])
def delta_kernel(
    p_dy, p_y, p_den, p_scale, p_dden, rows, eps, D: tl.constexpr, BR: tl.constexpr, BV: tl.constexpr,
    MODE: tl.constexpr,
):  # fmt: skip
    """From y = n / (den + eps): dn = dy * scale, dden = -sum(dn * y). Rows are (b, t, h).

    Where one token outweighs the others, y is near its v and dn . v + dden near zero: dn is rounded here as
    it will be for its products, so that the two still cancel.
    """
    o_r, o_v = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR), tl.arange(0, BV)
    m_r = o_r < rows
    scale = 1.0 / (tl.load(p_den + o_r, mask=m_r, other=1.0) + eps)
    dn = load_rows(p_dy, o_r, m_r, D, o_v, D) * scale[:, None]
    if MODE == "bf16" or MODE == "round bf16":
        dn = dn.to(tl.bfloat16).to(tl.float32)
    tl.store(p_scale + o_r, scale, mask=m_r)
    tl.store(p_dden + o_r, -tl.sum(dn * load_rows(p_y, o_r, m_r, D, o_v, D), 1), mask=m_r)


@triton.jit
def dq_safe(
    dA, p_k, p_b, left, o_k, SK: tl.constexpr, SB: tl.constexpr, F: tl.constexpr, C: tl.constexpr,
    MODE: tl.constexpr,
):  # fmt: skip
    """dq_t = sum_{j<t} dA[t, j] k_j exp(b_t - b_j) for any decay, as in scores_safe. dA is strictly lower."""
    o_c = tl.arange(0, C)
    b_k = load_rows(p_k, o_c, o_c < left, SK, o_k, F)
    b_b = load_rows(p_b, o_c, o_c < left, SB, o_k, F)
    dq = tl.zeros_like(b_k)
    for i_s in range(1, C // SUB):
        start = tl.load(p_b + tl.minimum(i_s * SUB, left) * SB - SB + o_k, mask=o_k < F, other=0.0)
        rows, cols = (o_c // SUB == i_s) & (o_c < left), o_c < i_s * SUB
        b_c = b_k * tl.exp(tl.where(cols[:, None], start[None, :] - b_b, float("-inf")))
        dA_s = tl.where(rows[:, None] & cols[None, :], dA, 0.0)
        dq += mm(dA_s, b_c, MODE) * tl.exp(tl.where(rows[:, None], b_b - start[None, :], float("-inf")))
    for j in range(0, SUB):
        o_j = (o_c // SUB) * SUB + j
        b_kj = load_rows(p_k, o_j, o_j < left, SK, o_k, F)
        b_bj = load_rows(p_b, o_j, o_j < left, SB, o_k, F)
        pair = tl.exp(tl.where(((o_c > o_j) & (o_c < left))[:, None], b_b - b_bj, float("-inf")))
        dq += tl.sum(tl.where(o_c[None, :] == o_j[:, None], dA, 0.0), 1)[:, None] * b_kj * pair
    return dq


@triton.jit
def dk_safe(
    dA, p_q, p_b, left, o_k, SQ: tl.constexpr, SB: tl.constexpr, F: tl.constexpr, C: tl.constexpr,
    MODE: tl.constexpr,
):  # fmt: skip
    """dk_j = sum_{t>j} dA[t, j] q_t exp(b_t - b_j) for any decay, as in scores_safe. dA is strictly lower."""
    o_c = tl.arange(0, C)
    b_q = load_rows(p_q, o_c, o_c < left, SQ, o_k, F)
    b_b = load_rows(p_b, o_c, o_c < left, SB, o_k, F)
    dk = tl.zeros_like(b_q)
    for i_s in range(1, C // SUB):
        start = tl.load(p_b + tl.minimum(i_s * SUB, left) * SB - SB + o_k, mask=o_k < F, other=0.0)
        rows, cols = (o_c // SUB == i_s) & (o_c < left), o_c < i_s * SUB
        b_r = b_q * tl.exp(tl.where(rows[:, None], b_b - start[None, :], float("-inf")))
        dA_s = tl.where(rows[:, None] & cols[None, :], dA, 0.0)
        dk += mm(tl.trans(dA_s), b_r, MODE) * tl.exp(
            tl.where(cols[:, None], start[None, :] - b_b, float("-inf"))
        )
    for t in range(0, SUB):
        o_t = (o_c // SUB) * SUB + t
        b_qt = load_rows(p_q, o_t, o_t < left, SQ, o_k, F)
        b_bt = load_rows(p_b, o_t, o_t < left, SB, o_k, F)
        pair = tl.exp(tl.where(((o_c < o_t) & (o_t < left))[:, None], b_bt - b_b, float("-inf")))
        dk += tl.sum(tl.where(o_c[:, None] == o_t[None, :], dA, 0.0), 0)[:, None] * b_qt * pair
    return dk


@triton.jit(do_not_specialize=["T", "N"])
def dq_kernel(
    p_q, p_k, p_v, p_b, p_mild, p_S, p_z, p_dn, p_dden, p_scale, p_dq, p_qdq, T, N,
    G: tl.constexpr, R: tl.constexpr, F: tl.constexpr, D: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, SCALED: tl.constexpr, SAFE: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """dq of one chunk and one key/value head, and qdq [B,T,G,F], the sum over its query heads of q dq.

    S, z: state before each chunk, [B*H*N,F,D] and [B*H*N,F]; dn [B,T,H,D] (times scale [B,T,H] if SCALED),
    dden [B,T,H]. In qdq, not in dq, pairs of a token with itself are left out.
    """
    pid = tl.program_id(0)
    i_c, i_bg = pid % N, (pid // N).to(tl.int64)
    if (tl.load(p_mild + i_bg * N + i_c) == 0) != SAFE:
        return
    i_b, i_g = i_bg // G, i_bg % G
    o_c, o_k, o_v = tl.arange(0, C), tl.arange(0, BK), tl.arange(0, BV)
    H: tl.constexpr = G * R
    left = T - i_c * C
    m_c = o_c < left
    t0 = i_b * T + i_c * C
    p_bc = p_b + (t0 * G + i_g) * F
    b_b = load_rows(p_bc, o_c, m_c, G * F, o_k, F)
    b_v = load_rows(p_v + (t0 * G + i_g) * D, o_c, m_c, G * D, o_v, D)
    qdq = tl.zeros([C, BK], tl.float32)
    for i_r in range(0, R):
        i_h = i_g * R + i_r
        i_s = (i_b * H + i_h) * N + i_c
        base = (t0 * H + i_h) * F
        o_t = (t0 + o_c) * H + i_h
        b_k = load_rows(p_k + base, o_c, m_c, H * F, o_k, F)
        b_dn = load_rows(p_dn + (t0 * H + i_h) * D, o_c, m_c, H * D, o_v, D)
        b_S = load_state(p_S + i_s * F * D, o_k, o_v, F, D)
        b_z = tl.load(p_z + i_s * F + o_k, mask=o_k < F, other=0.0)
        if SCALED:
            b_dn *= tl.load(p_scale + o_t, mask=m_c, other=0.0)[:, None]
        b_dd = tl.load(p_dden + o_t, mask=m_c, other=0.0).to(tl.float32)
        dA = mm(b_dn, tl.trans(b_v), MODE) + b_dd[:, None]
        own = tl.sum(tl.where(o_c[:, None] == o_c[None, :], dA, 0.0), 1)
        dA = tl.where(o_c[:, None] > o_c[None, :], dA, 0.0)
        dq = mm(b_dn, tl.trans(b_S), MODE) + b_dd[:, None] * b_z[None, :]
        if SAFE:
            dq = dq * tl.exp(b_b) + dq_safe(dA, p_k + base, p_bc, left, o_k, H * F, G * F, F, C, MODE)
        else:
            dq = (dq + mm(dA, b_k * tl.exp(-b_b), MODE)) * tl.exp(b_b)
        qdq += dq * load_rows(p_q + base, o_c, m_c, H * F, o_k, F)
        store_rows(p_dq + base, dq + own[:, None] * b_k, o_c, m_c, H * F, o_k, F)
    store_rows(p_qdq + (t0 * G + i_g) * F, qdq, o_c, m_c, G * F, o_k, F)


@triton.jit(do_not_specialize=["T", "N"])
def dkv_kernel(
    p_q, p_k, p_v, p_b, p_mild, p_S, p_z, p_D, p_dz, p_dn, p_dden, p_scale, p_qdq, p_dk, p_dv, p_dg, T, N,
    G: tl.constexpr, R: tl.constexpr, F: tl.constexpr, D: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, SCALED: tl.constexpr, SAFE: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """dk [B,T,H,F], dv [B,T,G,D] and dg [B,T,G,F] of one chunk and one key/value head.

    D, dz: the gradient of the state after each chunk, like S and z; the rest as for dq_kernel.
    """
    pid = tl.program_id(0)
    i_c, i_bg = pid % N, (pid // N).to(tl.int64)
    if (tl.load(p_mild + i_bg * N + i_c) == 0) != SAFE:
        return
    i_b, i_g = i_bg // G, i_bg % G
    o_c, o_k, o_v = tl.arange(0, C), tl.arange(0, BK), tl.arange(0, BV)
    H: tl.constexpr = G * R
    left = T - i_c * C
    m_c = o_c < left
    t0 = i_b * T + i_c * C
    p_bc = p_b + (t0 * G + i_g) * F
    b_b = load_rows(p_bc, o_c, m_c, G * F, o_k, F)
    end = tl.load(p_bc + (tl.minimum(C, left) - 1) * (G * F) + o_k, mask=o_k < F, other=0.0)
    b_v = load_rows(p_v + (t0 * G + i_g) * D, o_c, m_c, G * D, o_v, D)
    qdq = load_rows(p_qdq + (t0 * G + i_g) * F, o_c, m_c, G * F, o_k, F)
    dv = tl.zeros([C, BV], tl.float32)
    dg, dg_all = -qdq, tl.sum(qdq, 0)
    for i_r in range(0, R):
        i_h = i_g * R + i_r
        i_s = (i_b * H + i_h) * N + i_c
        base = (t0 * H + i_h) * F
        o_t = (t0 + o_c) * H + i_h
        b_q = load_rows(p_q + base, o_c, m_c, H * F, o_k, F)
        b_k = load_rows(p_k + base, o_c, m_c, H * F, o_k, F)
        b_dn = load_rows(p_dn + (t0 * H + i_h) * D, o_c, m_c, H * D, o_v, D)
        b_D = load_state(p_D + i_s * F * D, o_k, o_v, F, D)
        b_dz = tl.load(p_dz + i_s * F + o_k, mask=o_k < F, other=0.0)
        b_S = load_state(p_S + i_s * F * D, o_k, o_v, F, D)
        b_z = tl.load(p_z + i_s * F + o_k, mask=o_k < F, other=0.0)
        dg_all += tl.exp(end) * (tl.sum(b_S * b_D, 1) + b_z * b_dz)
        if SCALED:
            b_dn *= tl.load(p_scale + o_t, mask=m_c, other=0.0)[:, None]
        b_dd = tl.load(p_dden + o_t, mask=m_c, other=0.0).to(tl.float32)
        dA = mm(b_dn, tl.trans(b_v), MODE) + b_dd[:, None]
        own = tl.sum(tl.where(o_c[:, None] == o_c[None, :], dA, 0.0), 1)
        dA = tl.where(o_c[:, None] > o_c[None, :], dA, 0.0)
        if SAFE:
            A = scores_safe(p_q + base, p_k + base, p_bc, left, o_k, H * F, G * F, F, C, MODE)
            dk_in = dk_safe(dA, p_q + base, p_bc, left, o_k, H * F, G * F, F, C, MODE)
        else:
            b_qe = b_q * tl.exp(b_b)
            A = mm(b_qe, tl.trans(b_k * tl.exp(-b_b)), MODE)
            A = tl.where(o_c[:, None] >= o_c[None, :], A, 0.0)
            dk_in = mm(tl.trans(dA), b_qe, MODE) * tl.exp(-b_b)
        up = tl.exp(end[None, :] - b_b)
        dv += mm(tl.trans(A), b_dn, MODE) + mm(b_k * up, b_D, MODE)
        inner = b_k * dk_in
        dg_all -= tl.sum(inner, 0)
        dk = (mm(b_v, tl.trans(b_D), MODE) + b_dz[None, :]) * up
        dg += inner + b_k * dk  # the share of D is seen from every token of the chunk after it
        store_rows(p_dk + base, dk + dk_in + own[:, None] * b_q, o_c, m_c, H * F, o_k, F)
    # sum_{s>=t} of q dq - k dk_in and sum_{s<t} of k dk, as the total less the running sum without t
    dg = dg_all[None, :] + tl.cumsum(dg, 0) - dg
    store_rows(p_dv + (t0 * G + i_g) * D, dv, o_c, m_c, G * D, o_v, D)
    store_rows(p_dg + (t0 * G + i_g) * F, dg, o_c, m_c, G * F, o_k, F)
