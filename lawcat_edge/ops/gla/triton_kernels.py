"""Triton kernels of normalised gated linear attention: chunk sums, states, outputs, one decoding step.

    S_t = exp(g_t) * S_{t-1} + k_t (x) v_t        z_t = exp(g_t) * z_{t-1} + k_t
    n_t = q_t^T S_t                               den_t = q_t . z_t

The sequence is cut into chunks of C tokens and the chunks into P segments. One program walks a segment with
the state in registers, so that no state per chunk goes to memory: first every segment sums its own update,
then a scan carries the state from segment to segment, then every segment is walked again with its true start
and writes outputs. The normaliser z is a vector of its own beside S.

Letters: B batch, T tokens, H query heads, G key/value heads, R = H/G, F key width, D value width, N chunks.
p_ pointer, b_ loaded block, o_ offsets, m_ mask, i_ index. b is the running sum of g within its chunk.
"""

from __future__ import annotations

import triton
import triton.language as tl

SUB = tl.constexpr(16)
# Largest |b| in a chunk for which q exp(b) and k exp(-b) may be formed on their own: exp(60) squared is
# still finite in float32 and in bfloat16, and rounding is relative, so nothing is lost.
MILD = tl.constexpr(60.0)


ROUND_SPLIT = (
    False  # set by tests: in the interpreter, split operands as a GPU does rather than keep them exact
)


def interpreted(mode: str) -> str:
    """What stands in for a mode of mm in the interpreter, whose dot knows no bfloat16."""
    return f"round {mode}" if mode == "bf16" or ROUND_SPLIT else "exact"


@triton.jit
def mm(a, b, MODE: tl.constexpr):
    """a @ b summed in float32, each operand rounded to bfloat16 (``bf16``) or split into two (``split``).

    The split keeps 16 bits of each operand at any scale, for float32 and float16 inputs: as TF32, but 32
    times finer, and its three products cost less than twice one of TF32. In the interpreter ``round bf16``
    and ``round split`` multiply the same rounded operands in float32, and ``exact`` rounds nothing.
    """
    a_high, b_high = a.to(tl.bfloat16), b.to(tl.bfloat16)
    if MODE == "bf16":
        y = tl.dot(a_high, b_high)
    elif MODE == "split":
        y = tl.dot(a_high, b_high)
        y = tl.dot((a - a_high.to(tl.float32)).to(tl.bfloat16), b_high, y)
        y = tl.dot(a_high, (b - b_high.to(tl.float32)).to(tl.bfloat16), y)
    elif MODE == "exact":
        y = tl.dot(a, b, input_precision="ieee")
    else:
        a_part, b_part = a_high.to(tl.float32), b_high.to(tl.float32)
        y = tl.dot(a_part, b_part, input_precision="ieee")
        if MODE == "round split":
            a_low, b_low = (a - a_part).to(tl.bfloat16), (b - b_part).to(tl.bfloat16)
            y += tl.dot(a_low.to(tl.float32), b_part, input_precision="ieee")
            y += tl.dot(a_part, b_low.to(tl.float32), input_precision="ieee")
    return y


@triton.jit
def load_rows(p, o_r, m_r, stride, o_k, WIDTH: tl.constexpr):
    """Rows o_r of a [rows, WIDTH] matrix as float32, zero outside."""
    mask = m_r[:, None] & (o_k < WIDTH)[None, :]
    return tl.load(p + o_r[:, None] * stride + o_k[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_rows(p, value, o_r, m_r, stride, o_k, WIDTH: tl.constexpr):
    mask = m_r[:, None] & (o_k < WIDTH)[None, :]
    tl.store(p + o_r[:, None] * stride + o_k[None, :], value.to(p.dtype.element_ty), mask=mask)


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
def cumsum_kernel(
    p_g, p_b, p_mild, T, N, G: tl.constexpr, F: tl.constexpr, C: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    """b [B,T,G,F] = running sum of g within each chunk; mild [B*G*N] = 1 where the one-level form is safe."""
    pid = tl.program_id(0)
    i_c, i_bg = pid % N, (pid // N).to(tl.int64)
    o_c, o_k = tl.arange(0, C), tl.arange(0, BK)
    m_c = i_c * C + o_c < T
    base = ((i_bg // G * T + i_c * C) * G + i_bg % G) * F
    b_b = tl.cumsum(load_rows(p_g + base, o_c, m_c, G * F, o_k, F), 0)
    store_rows(p_b + base, b_b, o_c, m_c, G * F, o_k, F)
    tl.store(p_mild + i_bg * N + i_c, (tl.max(tl.max(tl.abs(b_b), 1), 0) < MILD).to(tl.int32))


@triton.jit(do_not_specialize=["T", "N", "L", "P"])
def states_kernel(
    p_x, p_y, p_weight, p_scale, p_b, p_S0, p_z0, p_S, p_z, p_decay, p_Send, p_zend, T, N, L, P,
    H: tl.constexpr, R: tl.constexpr, F: tl.constexpr, D: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, REVERSE: tl.constexpr, EACH: tl.constexpr, HAS_INIT: tl.constexpr, SCALED: tl.constexpr,
    MODE: tl.constexpr,
):  # fmt: skip
    """Walk one segment of L chunks with the state alone.

    Forward: x = k [B,T,H,F], y = v [B,T,G,D]: S <- exp(end) S + (k exp(end - b))^T v.
    REVERSE: x = q, y = dn [B,T,H,D] (times scale [B,T,H] if SCALED), weight = dden [B,T,H]; the gradient of
    the state: S <- exp(end) S + (q exp(b))^T y, last chunk first.
    EACH: start from S0 [B*H*P,F,D], write the state met by every chunk to S [B*H*N,F,D], and the segment
    that comes last writes Send. Otherwise start from zero and write the segment's sum and its log-decay to S
    [B*H*P,F,D].
    """
    pid, i_v = tl.program_id(0), tl.program_id(1)
    i_p, i_bh = pid % P, (pid // P).to(tl.int64)
    i_b, i_h = i_bh // H, i_bh % H
    o_c, o_k, o_v = tl.arange(0, C), tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    G: tl.constexpr = H // R
    SY: tl.constexpr = H * D if REVERSE else G * D
    i_y = i_h if REVERSE else i_h // R
    first = i_p * L
    count = tl.minimum(L, N - first)

    S = tl.zeros([BK, BV], tl.float32)
    z = tl.zeros([BK], tl.float32)
    total = tl.zeros([BK], tl.float32)
    if HAS_INIT:
        i_s = i_bh * P + i_p
        S = load_state(p_S0 + i_s * F * D, o_k, o_v, F, D)
        z = tl.load(p_z0 + i_s * F + o_k, mask=o_k < F, other=0.0)
    for i in range(0, count):
        i_c = first + i
        if REVERSE:
            i_c = first + count - 1 - i
        if EACH:
            i_s = i_bh * N + i_c
            store_state(p_S + i_s * F * D, S, o_k, o_v, F, D)
            if i_v == 0:
                tl.store(p_z + i_s * F + o_k, z, mask=o_k < F)
        t0 = i_b * T + i_c * C
        m_c = i_c * C + o_c < T
        p_bc = p_b + (t0 * G + i_h // R) * F
        last = tl.minimum(C, T - i_c * C) - 1
        b_b = load_rows(p_bc, o_c, m_c, G * F, o_k, F)
        end = tl.load(p_bc + last * (G * F) + o_k, mask=o_k < F, other=0.0)
        b_x = load_rows(p_x + (t0 * H + i_h) * F, o_c, m_c, H * F, o_k, F)
        b_y = load_rows(p_y + t0 * SY + i_y * D, o_c, m_c, SY, o_v, D)
        if REVERSE:
            b_x *= tl.exp(b_b)
            o_t = (t0 + o_c) * H + i_h
            z = z * tl.exp(end) + tl.sum(b_x * tl.load(p_weight + o_t, mask=m_c, other=0.0)[:, None], 0)
            if SCALED:
                b_y *= tl.load(p_scale + o_t, mask=m_c, other=0.0)[:, None]
        else:
            b_x *= tl.exp(end[None, :] - b_b)
            z = z * tl.exp(end) + tl.sum(b_x, 0)
        S = S * tl.exp(end)[:, None] + mm(tl.trans(b_x), b_y, MODE)
        total += end
    if EACH:
        if i_p == (0 if REVERSE else P - 1):
            store_state(p_Send + i_bh * F * D, S, o_k, o_v, F, D)
            if i_v == 0:
                tl.store(p_zend + i_bh * F + o_k, z, mask=o_k < F)
    else:
        i_s = i_bh * P + i_p
        store_state(p_S + i_s * F * D, S, o_k, o_v, F, D)
        if i_v == 0:
            tl.store(p_z + i_s * F + o_k, z, mask=o_k < F)
            tl.store(p_decay + i_s * F + o_k, total, mask=o_k < F)


@triton.jit(do_not_specialize=["P"])
def scan_kernel(
    p_S, p_z, p_decay, p_S0, p_z0, P, F: tl.constexpr, D: tl.constexpr, BR: tl.constexpr, BV: tl.constexpr,
    REVERSE: tl.constexpr, HAS_INIT: tl.constexpr,
):  # fmt: skip
    """Replace every segment's own sum by the state it starts from. S [B*H*P,F,D], z and decay [B*H*P,F]."""
    i_bh = tl.program_id(0).to(tl.int64)
    o_k, o_v = tl.program_id(1) * BR + tl.arange(0, BR), tl.arange(0, BV)
    m_k = o_k < F
    S = tl.zeros([BR, BV], tl.float32)
    z = tl.zeros([BR], tl.float32)
    if HAS_INIT:
        S = load_state(p_S0 + i_bh * F * D, o_k, o_v, F, D)
        z = tl.load(p_z0 + i_bh * F + o_k, mask=m_k, other=0.0)
    for i in range(0, P):
        i_p = i
        if REVERSE:
            i_p = P - 1 - i
        i_s = i_bh * P + i_p
        add = load_state(p_S + i_s * F * D, o_k, o_v, F, D)
        b_z = tl.load(p_z + i_s * F + o_k, mask=m_k, other=0.0)
        keep = tl.exp(tl.load(p_decay + i_s * F + o_k, mask=m_k, other=0.0))
        store_state(p_S + i_s * F * D, S, o_k, o_v, F, D)
        tl.store(p_z + i_s * F + o_k, z, mask=m_k)
        S = S * keep[:, None] + add
        z = z * keep + b_z


@triton.jit(do_not_specialize=["T", "N", "L", "P", "eps"])
def output_kernel(
    p_q, p_k, p_v, p_b, p_mild, p_S0, p_z0, p_n, p_den, p_S, p_z, T, N, L, P, eps,
    H: tl.constexpr, R: tl.constexpr, F: tl.constexpr, D: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, HAS_INIT: tl.constexpr, NORMALISED: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """Walk one segment from its true start: n [B,T,H,D] (y = n / (den + eps) if NORMALISED), den [B,T,H],
    final S and z.
    """
    pid, i_v = tl.program_id(0), tl.program_id(1)
    i_p, i_bh = pid % P, (pid // P).to(tl.int64)
    i_b, i_h = i_bh // H, i_bh % H
    o_c, o_k, o_v = tl.arange(0, C), tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    G: tl.constexpr = H // R
    i_g = i_h // R
    first = i_p * L
    S = tl.zeros([BK, BV], tl.float32)
    z = tl.zeros([BK], tl.float32)
    if HAS_INIT:
        i_s = i_bh * P + i_p
        S = load_state(p_S0 + i_s * F * D, o_k, o_v, F, D)
        z = tl.load(p_z0 + i_s * F + o_k, mask=o_k < F, other=0.0)
    for i_c in range(first, tl.minimum(first + L, N)):
        t0 = i_b * T + i_c * C
        left = T - i_c * C
        m_c = o_c < left
        p_bc = p_b + (t0 * G + i_g) * F
        p_kc = p_k + (t0 * H + i_h) * F
        b_b = load_rows(p_bc, o_c, m_c, G * F, o_k, F)
        end = tl.load(p_bc + (tl.minimum(C, left) - 1) * (G * F) + o_k, mask=o_k < F, other=0.0)
        b_q = load_rows(p_q + (t0 * H + i_h) * F, o_c, m_c, H * F, o_k, F)
        b_k = load_rows(p_kc, o_c, m_c, H * F, o_k, F)
        b_v = load_rows(p_v + (t0 * G + i_g) * D, o_c, m_c, G * D, o_v, D)
        b_qe, b_ke = b_q * tl.exp(b_b), b_k * tl.exp(end[None, :] - b_b)
        b_ki = b_k * tl.exp(tl.minimum(-b_b, MILD))  # the minimum is for chunks that do not use it
        b_den = tl.sum(b_qe * z[None, :], 1)
        if tl.load(p_mild + (i_b * G + i_g) * N + i_c) != 0:
            A = mm(b_qe, tl.trans(b_ki), MODE)
            A = tl.where(o_c[:, None] >= o_c[None, :], A, 0.0)
        else:
            A = scores_safe(p_q + (t0 * H + i_h) * F, p_kc, p_bc, left, o_k, H * F, G * F, F, C, MODE)
        b_den += tl.sum(A, 1)
        b_n = mm(b_qe, S, MODE) + mm(A, b_v, MODE)
        if NORMALISED:
            b_n = b_n / (b_den + eps)[:, None]
        store_rows(p_n + (t0 * H + i_h) * D, b_n, o_c, m_c, H * D, o_v, D)
        if i_v == 0:
            tl.store(p_den + (t0 + o_c) * H + i_h, b_den.to(p_den.dtype.element_ty), mask=m_c)
        S = S * tl.exp(end)[:, None] + mm(tl.trans(b_ke), b_v, MODE)
        z = z * tl.exp(end) + tl.sum(b_ke, 0)
    if i_p == P - 1:
        store_state(p_S + i_bh * F * D, S, o_k, o_v, F, D)
        if i_v == 0:
            tl.store(p_z + i_bh * F + o_k, z, mask=o_k < F)


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
