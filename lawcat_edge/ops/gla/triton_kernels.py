"""Triton kernels of normalised gated linear attention: chunk states, their scan, outputs, one decoding step.

    S_t = exp(g_t) * S_{t-1} + k_t (x) v_t        z_t = exp(g_t) * z_{t-1} + k_t
    n_t = q_t^T S_t                               den_t = q_t . z_t

The sequence is cut into chunks of C tokens. What every chunk adds to the state is summed on its own; a scan
over the chunks turns these sums into the state that each starts from; then the outputs of every chunk are
formed on their own. A walk with the state in registers would move fewer bytes, but leaves no registers to
the products of 128-wide heads and too few programs to short texts. The normaliser z is a vector of its own
beside S.

Letters: B batch, T tokens, H query heads, G key/value heads, R = H/G, F key width, D value width, N chunks.
p_ pointer, b_ loaded block, o_ offsets, m_ mask, i_ index. b is the running sum of g within its chunk.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lawcat_edge.ops.triton_primitives import load_rows, mm, store_rows

SUB = tl.constexpr(16)
# Largest |b| in a chunk for which q exp(b) and k exp(-b) may be formed on their own: exp(60) squared is
# still finite in float32 and in bfloat16, and rounding is relative, so nothing is lost.
MILD = tl.constexpr(60.0)


@triton.jit
def load_state(p, o_k, o_v, F: tl.constexpr, D: tl.constexpr):
    mask = (o_k < F)[:, None] & (o_v < D)[None, :]
    return tl.load(p + o_k[:, None] * D + o_v[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_state(p, value, o_k, o_v, F: tl.constexpr, D: tl.constexpr):
    mask = (o_k < F)[:, None] & (o_v < D)[None, :]
    tl.store(p + o_k[:, None] * D + o_v[None, :], value.to(p.dtype.element_ty), mask=mask)


@triton.jit
def scores_safe(
    p_q, p_k, p_b, left, o_k, SK: tl.constexpr, SB: tl.constexpr, F: tl.constexpr, C: tl.constexpr,
    MODE: tl.constexpr,
):  # fmt: skip
    """A[t, j] = sum_f q_tf k_jf exp(b_tf - b_jf), j <= t, for any decay: no exponent is ever above zero.

    Rows of sub-chunk I against all columns before it are rescaled at b just before I; pairs within a
    sub-chunk take their exponent as it stands, one column of every sub-chunk at a time. Rows past the end
    have b = 0 and are masked before exp. Reads q and k afresh: this path is rare, and the common one needs
    the registers.
    """
    o_c = tl.arange(0, C)
    b_q = load_rows(p_q, o_c, o_c < left, SK, o_k, F)
    b_k = load_rows(p_k, o_c, o_c < left, SK, o_k, F)
    b_b = load_rows(p_b, o_c, o_c < left, SB, o_k, F)
    A = tl.zeros([C, C], tl.float32)
    for i_s in range(1, C // SUB):
        start = tl.load(p_b + tl.minimum(i_s * SUB, left) * SB - SB + o_k, mask=o_k < F, other=0.0)
        rows = ((o_c // SUB == i_s) & (o_c < left))[:, None]
        cols = (o_c < i_s * SUB)[:, None]
        b_r = b_q * tl.exp(tl.where(rows, b_b - start[None, :], float("-inf")))
        b_c = b_k * tl.exp(tl.where(cols, start[None, :] - b_b, float("-inf")))
        A += mm(b_r, tl.trans(b_c), MODE)
    for j in range(0, SUB):
        o_j = (o_c // SUB) * SUB + j
        b_kj = load_rows(p_k, o_j, o_j < left, SK, o_k, F)
        b_bj = load_rows(p_b, o_j, o_j < left, SB, o_k, F)
        pair = tl.exp(tl.where(((o_c >= o_j) & (o_c < left))[:, None], b_b - b_bj, float("-inf")))
        A += tl.where(o_c[None, :] == o_j[:, None], tl.sum(b_q * b_kj * pair, 1)[:, None], 0.0)
    return A


@triton.jit(do_not_specialize=["T", "N"])
def states_kernel(
    p_x, p_y, p_weight, p_scale, p_g, p_b, p_mild, p_S, p_z, T, N, G: tl.constexpr, R: tl.constexpr,
    F: tl.constexpr, D: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    REVERSE: tl.constexpr, SCALED: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """What one chunk adds to S [B*H*N,F,D] and z [B*H*N,F], for the R query heads of a key/value head.

    Forward: x = k [B,T,H,F], y = v [B,T,G,D], (k exp(end - b))^T v; also writes b [B,T,G,F] and mild
    [B*G*N], 1 where the one-level form is safe. REVERSE: reads b; x = q, y = dn [B,T,H,D] (times scale
    [B,T,H] if SCALED), weight = dden [B,T,H]; the gradient of the state, (q exp(b))^T y.
    """
    pid, i_v = tl.program_id(0), tl.program_id(1)
    i_g, i_c, i_b = pid % G, pid // G % N, (pid // G // N).to(tl.int64)
    o_c, o_k, o_v = tl.arange(0, C), tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    H: tl.constexpr = G * R
    left = T - i_c * C
    m_c = o_c < left
    t0 = i_b * T + i_c * C
    at = (t0 * G + i_g) * F
    if REVERSE:
        decay = tl.exp(load_rows(p_b + at, o_c, m_c, G * F, o_k, F))
    else:
        b_b = tl.cumsum(load_rows(p_g + at, o_c, m_c, G * F, o_k, F), 0)
        end = tl.sum(tl.where((o_c == tl.minimum(C, left) - 1)[:, None], b_b, 0.0), 0)
        decay = tl.exp(end[None, :] - b_b)
        if i_v == 0:
            store_rows(p_b + at, b_b, o_c, m_c, G * F, o_k, F)
            mild = tl.max(tl.max(tl.abs(b_b), 1), 0) < MILD
            tl.store(p_mild + (i_b * G + i_g) * N + i_c, mild.to(tl.int32))
        b_y = load_rows(p_y + (t0 * G + i_g) * D, o_c, m_c, G * D, o_v, D)
    for i_r in range(0, R):
        i_h = i_g * R + i_r
        i_s = (i_b * H + i_h) * N + i_c
        b_x = load_rows(p_x + (t0 * H + i_h) * F, o_c, m_c, H * F, o_k, F) * decay
        if REVERSE:
            o_t = (t0 + o_c) * H + i_h
            b_y = load_rows(p_y + (t0 * H + i_h) * D, o_c, m_c, H * D, o_v, D)
            if SCALED:
                b_y *= tl.load(p_scale + o_t, mask=m_c, other=0.0)[:, None]
            z = tl.sum(b_x * tl.load(p_weight + o_t, mask=m_c, other=0.0)[:, None], 0)
        else:
            z = tl.sum(b_x, 0)
        store_state(p_S + i_s * F * D, mm(tl.trans(b_x), b_y, MODE), o_k, o_v, F, D)
        if i_v == 0:
            tl.store(p_z + i_s * F + o_k, z, mask=o_k < F)


@triton.jit(do_not_specialize=["T", "N"])
def scan_kernel(
    p_S, p_z, p_b, p_S0, p_z0, p_Send, p_zend, T, N, H: tl.constexpr, R: tl.constexpr, F: tl.constexpr,
    D: tl.constexpr, C: tl.constexpr, BR: tl.constexpr, BV: tl.constexpr, REVERSE: tl.constexpr,
    HAS_INIT: tl.constexpr, STAGES: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Replace what every chunk adds, S [B*H*N,F,D] and z [B*H*N,F], by the state that it starts from
    (REVERSE: by the gradient of the state that it ends with), and write what is left after all. The carry is
    float32.
    """
    i_bh = tl.program_id(0).to(tl.int64)
    i_b, i_h = i_bh // H, i_bh % H
    o_k, o_v = tl.program_id(1) * BR + tl.arange(0, BR), tl.arange(0, BV)
    m_k = o_k < F
    G: tl.constexpr = H // R
    S = tl.zeros([BR, BV], tl.float32)
    z = tl.zeros([BR], tl.float32)
    if HAS_INIT:
        S = load_state(p_S0 + i_bh * F * D, o_k, o_v, F, D)
        z = tl.load(p_z0 + i_bh * F + o_k, mask=m_k, other=0.0)
    p_b += (i_b * T * G + i_h // R) * F
    for i in tl.range(0, N, num_stages=STAGES, loop_unroll_factor=UNROLL):
        i_c = i
        if REVERSE:
            i_c = N - 1 - i
        i_s = i_bh * N + i_c
        add = load_state(p_S + i_s * F * D, o_k, o_v, F, D)
        b_z = tl.load(p_z + i_s * F + o_k, mask=m_k, other=0.0)
        end = tl.minimum(i_c * C + C, T) - 1
        keep = tl.exp(tl.load(p_b + end.to(tl.int64) * (G * F) + o_k, mask=m_k, other=0.0))
        store_state(p_S + i_s * F * D, S, o_k, o_v, F, D)
        tl.store(p_z + i_s * F + o_k, z, mask=m_k)
        S = S * keep[:, None] + add
        z = z * keep + b_z
    store_state(p_Send + i_bh * F * D, S, o_k, o_v, F, D)
    tl.store(p_zend + i_bh * F + o_k, z, mask=m_k)


@triton.jit(do_not_specialize=["T", "N", "eps"])
def output_kernel(
    p_q, p_k, p_v, p_b, p_mild, p_S, p_z, p_n, p_den, T, N, eps, H: tl.constexpr, R: tl.constexpr,
    F: tl.constexpr, D: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, NORMALISED: tl.constexpr, SAFE: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """n [B,T,H,D] (y = n / (den + eps) if NORMALISED) and den [B,T,H] of ROWS tokens of one chunk and one
    query head, from the state that the chunk starts from and the tokens of the chunk up to them, KEYS at a
    time.

    Of the two kernels that SAFE makes, one returns at once for a chunk: the scores of a strong decay, formed
    for a whole chunk (ROWS = KEYS = C), take more registers than all the rest.
    """
    pid, i_v = tl.program_id(0), tl.program_id(1)
    PARTS: tl.constexpr = C // ROWS
    i_h, i_part, i_c, i_b = pid % H, pid // H % PARTS, pid // H // PARTS % N, pid // H // PARTS // N
    G: tl.constexpr = H // R
    i_g = i_h // R
    if (tl.load(p_mild + (i_b * G + i_g) * N + i_c) == 0) != SAFE:
        return
    i_b = i_b.to(tl.int64)
    o_c, o_k, o_v = i_part * ROWS + tl.arange(0, ROWS), tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    i_s = (i_b * H + i_h) * N + i_c
    t0 = i_b * T + i_c * C
    left = T - i_c * C
    m_c = o_c < left
    p_bc, p_vc = p_b + (t0 * G + i_g) * F, p_v + (t0 * G + i_g) * D
    p_qc, p_kc = p_q + (t0 * H + i_h) * F, p_k + (t0 * H + i_h) * F
    b_q = load_rows(p_qc, o_c, m_c, H * F, o_k, F)
    b_q *= tl.exp(load_rows(p_bc, o_c, m_c, G * F, o_k, F))
    b_den = tl.sum(b_q * tl.load(p_z + i_s * F + o_k, mask=o_k < F, other=0.0)[None, :], 1)
    b_n = mm(b_q, load_state(p_S + i_s * F * D, o_k, o_v, F, D), MODE)
    for j in range(0, i_part * ROWS + ROWS, KEYS):
        o_j = j + tl.arange(0, KEYS)
        if SAFE:
            A = scores_safe(p_qc, p_kc, p_bc, left, o_k, H * F, G * F, F, C, MODE)
        else:
            b_k = load_rows(p_kc, o_j, o_j < left, H * F, o_k, F)
            b_k *= tl.exp(-load_rows(p_bc, o_j, o_j < left, G * F, o_k, F))
            A = mm(b_q, tl.trans(b_k), MODE)
            A = tl.where(o_c[:, None] >= o_j[None, :], A, 0.0)
        b_den += tl.sum(A, 1)
        b_n += mm(A, load_rows(p_vc, o_j, o_j < left, G * D, o_v, D), MODE)
    if NORMALISED:
        b_n *= (1.0 / (b_den + eps))[:, None]
    store_rows(p_n + (t0 * H + i_h) * D, b_n, o_c, m_c, H * D, o_v, D)
    if i_v == 0:
        tl.store(p_den + (t0 + o_c) * H + i_h, b_den.to(p_den.dtype.element_ty), mask=m_c)


@triton.jit(do_not_specialize=["eps"])
def step_kernel(
    p_q, p_k, p_v, p_g, p_S0, p_z0, p_n, p_den, p_S, p_z, eps, H: tl.constexpr, R: tl.constexpr,
    F: tl.constexpr, D: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, NORMALISED: tl.constexpr,
):  # fmt: skip
    """One token for every sequence and head. S may be S0 itself: a program reads its part, then writes it."""
    i_bh, i_v = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i_kv = i_bh // H * (H // R) + i_bh % H // R
    o_k, o_v = tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    m_k = o_k < F
    q = tl.load(p_q + i_bh * F + o_k, mask=m_k, other=0.0).to(tl.float32)
    k = tl.load(p_k + i_bh * F + o_k, mask=m_k, other=0.0).to(tl.float32)
    keep = tl.exp(tl.load(p_g + i_kv * F + o_k, mask=m_k, other=0.0).to(tl.float32))
    v = tl.load(p_v + i_kv * D + o_v, mask=o_v < D, other=0.0).to(tl.float32)
    S = load_state(p_S0 + i_bh * F * D, o_k, o_v, F, D) * keep[:, None] + k[:, None] * v[None, :]
    z = tl.load(p_z0 + i_bh * F + o_k, mask=m_k, other=0.0) * keep + k
    n = tl.sum(q[:, None] * S, 0)
    den = tl.sum(q * z, 0)
    if NORMALISED:
        n = n / (den + eps)
    tl.store(p_n + i_bh * D + o_v, n.to(p_n.dtype.element_ty), mask=o_v < D)
    store_state(p_S + i_bh * F * D, S, o_k, o_v, F, D)
    if i_v == 0:
        tl.store(p_z + i_bh * F + o_k, z, mask=m_k)
        tl.store(p_den + i_bh, den.to(p_den.dtype.element_ty))
