"""Triton kernels of the gradient of normalised gated linear attention.

With S'_t the state and D_t the gradient of the loss by it, carried backwards by D_{t-1} = exp(g_t) D_t + q_t (x) dn_t:
    dq_t = S_t dn_t + z_t dden_t      dk_t = D_t v_t + dz_t      dv_t = D_t^T k_t
Every chunk is done by one program once the state before it and the gradient after it are known, one program for
all query heads of a key/value head, so that dv and dg are summed in registers.

The gate: b_t stands with q_t and -b_j with k_j, so within a chunk
    dg_t = sum_{s>=t} (q dq - k dk)_s + exp(end) sum_d (D S)(end of chunk) .
Written with the part of dk that comes from D kept apart, this is the sum below; pairs of a token with itself,
whose share is zero, are left out before the subtraction, and nothing is summed past a chunk, so that strong
decay and long sequences lose no digits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lawcat_edge.ops.gla.triton_kernels import SUB, load_rows, load_state, mm, store_rows


@triton.jit(do_not_specialize=["rows", "eps"])
def delta_kernel(
    p_dy, p_y, p_den, p_scale, p_dden, rows, eps, D: tl.constexpr, BR: tl.constexpr, BV: tl.constexpr
):
    """From y = n / (den + eps): dn = dy * scale, dden = -scale * sum(dy * y). Rows are (b, t, h)."""
    o_r, o_v = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR), tl.arange(0, BV)
    m_r = o_r < rows
    dy = load_rows(p_dy, o_r, m_r, D, o_v, D)
    y = load_rows(p_y, o_r, m_r, D, o_v, D)
    scale = 1.0 / (tl.load(p_den + o_r, mask=m_r, other=1.0) + eps)
    tl.store(p_scale + o_r, scale, mask=m_r)
    tl.store(p_dden + o_r, -scale * tl.sum(dy * y, 1), mask=m_r)


@triton.jit
def grads_safe(
    b_q, b_k, b_b, dA, p_q, p_k, p_b, left, o_k, SQ: tl.constexpr, SB: tl.constexpr, F: tl.constexpr, C: tl.constexpr,
    DT: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """Scores A without their diagonal, and from dA (strictly lower) the chunk's own dq and dk, for any decay."""
    o_c = tl.arange(0, C)
    A = tl.zeros_like(dA)
    dq = tl.zeros_like(b_q)
    dk = tl.zeros_like(b_k)
    for i_s in range(1, C // SUB):
        start = tl.load(p_b + tl.minimum(i_s * SUB, left) * SB - SB + o_k, mask=o_k < F, other=0.0)
        rows, cols = (o_c // SUB == i_s) & (o_c < left), o_c < i_s * SUB
        row_decay = tl.exp(tl.where(rows[:, None], b_b - start[None, :], float("-inf")))
        col_decay = tl.exp(tl.where(cols[:, None], start[None, :] - b_b, float("-inf")))
        b_r, b_c = b_q * row_decay, b_k * col_decay
        A += mm(b_r, tl.trans(b_c), DT, IP)
        dA_s = tl.where(rows[:, None] & cols[None, :], dA, 0.0)
        dq += mm(dA_s, b_c, DT, IP) * row_decay
        dk += mm(tl.trans(dA_s), b_r, DT, IP) * col_decay
    for j in range(0, SUB):
        o_j = (o_c // SUB) * SUB + j
        b_bj = load_rows(p_b, o_j, o_j < left, SB, o_k, F)
        # column j of the row's sub-chunk
        b_kj = load_rows(p_k, o_j, o_j < left, SQ, o_k, F)
        seen = b_kj * tl.exp(tl.where(((o_c > o_j) & (o_c < left))[:, None], b_b - b_bj, float("-inf")))
        at = o_c[None, :] == o_j[:, None]
        A += tl.where(at, tl.sum(b_q * seen, 1)[:, None], 0.0)
        dq += tl.sum(tl.where(at, dA, 0.0), 1)[:, None] * seen
        # row j of the column's sub-chunk
        b_qj = load_rows(p_q, o_j, o_j < left, SQ, o_k, F)
        seeing = b_qj * tl.exp(tl.where(((o_c < o_j) & (o_j < left))[:, None], b_bj - b_b, float("-inf")))
        dk += tl.sum(tl.where(o_c[:, None] == o_j[None, :], dA, 0.0), 0)[:, None] * seeing
    return A, dq, dk


@triton.jit(do_not_specialize=["T", "N"])
def backward_kernel(
    p_q, p_k, p_v, p_b, p_mild, p_S, p_z, p_D, p_dz, p_dn, p_dden, p_scale, p_dq, p_dk, p_dv, p_dg, T, N,
    G: tl.constexpr, R: tl.constexpr, F: tl.constexpr, D: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, SCALED: tl.constexpr, DT: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """Every gradient of one chunk and one key/value head.

    S, z: state before each chunk, D, dz: its gradient after it, [B*H*N,F,D] and [B*H*N,F]; dn [B,T,H,D] (times
    scale [B,T,H] if SCALED), dden [B,T,H]. Writes dq, dk like q, k; dv like v; dg like g.
    """
    pid = tl.program_id(0)
    i_c, i_bg = pid % N, (pid // N).to(tl.int64)
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
    mild = tl.load(p_mild + i_bg * N + i_c) != 0
    dv = tl.zeros([C, BV], tl.float32)
    dg = tl.zeros([C, BK], tl.float32)
    dg_all = tl.zeros([BK], tl.float32)
    for i_r in range(0, R):
        i_h = i_g * R + i_r
        i_s = (i_b * H + i_h) * N + i_c
        base = (t0 * H + i_h) * F
        o_t = (t0 + o_c) * H + i_h
        b_q = load_rows(p_q + base, o_c, m_c, H * F, o_k, F)
        b_k = load_rows(p_k + base, o_c, m_c, H * F, o_k, F)
        b_dn = load_rows(p_dn + (t0 * H + i_h) * D, o_c, m_c, H * D, o_v, D)
        if SCALED:
            b_dn *= tl.load(p_scale + o_t, mask=m_c, other=0.0)[:, None]
        b_dd = tl.load(p_dden + o_t, mask=m_c, other=0.0).to(tl.float32)
        b_S = load_state(p_S + i_s * F * D, o_k, o_v, F, D)
        b_z = tl.load(p_z + i_s * F + o_k, mask=o_k < F, other=0.0)
        b_D = load_state(p_D + i_s * F * D, o_k, o_v, F, D)
        b_dz = tl.load(p_dz + i_s * F + o_k, mask=o_k < F, other=0.0)

        up = tl.exp(end[None, :] - b_b)
        dg_all += tl.exp(end) * (tl.sum(b_S * b_D, 1) + b_z * b_dz)
        dk = (mm(b_v, tl.trans(b_D), DT, IP) + b_dz[None, :]) * up
        dg += b_k * dk  # seen from every token of the chunk after it
        dv += mm(b_k * up, b_D, DT, IP)
        dq = (mm(b_dn, tl.trans(b_S), DT, IP) + b_dd[:, None] * b_z[None, :]) * tl.exp(b_b)

        dA = mm(b_dn, tl.trans(b_v), DT, IP) + b_dd[:, None]
        diagonal = tl.sum(tl.where(o_c[:, None] == o_c[None, :], dA, 0.0), 1)
        dA = tl.where(o_c[:, None] > o_c[None, :], dA, 0.0)
        if mild:
            b_qe, b_ki = b_q * tl.exp(b_b), b_k * tl.exp(-b_b)
            A = mm(b_qe, tl.trans(b_ki), DT, IP)
            A = tl.where(o_c[:, None] > o_c[None, :], A, 0.0)
            dq_in = mm(dA, b_ki, DT, IP) * tl.exp(b_b)
            dk_in = mm(tl.trans(dA), b_qe, DT, IP) * tl.exp(-b_b)
        else:
            A, dq_in, dk_in = grads_safe(
                b_q, b_k, b_b, dA, p_q + base, p_k + base, p_bc, left, o_k, H * F, G * F, F, C, DT, IP
            )
        A += tl.where(o_c[:, None] == o_c[None, :], tl.sum(b_q * b_k, 1)[:, None], 0.0)
        dv += mm(tl.trans(A), b_dn, DT, IP)
        dq += dq_in
        inner = b_q * dq - b_k * dk_in
        dg -= inner
        dg_all += tl.sum(inner, 0)
        store_rows(p_dq + base, dq + diagonal[:, None] * b_k, o_c, m_c, H * F, o_k, F)
        store_rows(p_dk + base, dk + dk_in + diagonal[:, None] * b_q, o_c, m_c, H * F, o_k, F)
    # sum_{s>=t} inner_s + sum_{s<t} (k dk from D)_s, as the total less the running sum without t
    dg = dg_all[None, :] + tl.cumsum(dg, 0) - dg
    store_rows(p_dv + (t0 * G + i_g) * D, dv, o_c, m_c, G * D, o_v, D)
    store_rows(p_dg + (t0 * G + i_g) * F, dg, o_c, m_c, G * F, o_k, F)
