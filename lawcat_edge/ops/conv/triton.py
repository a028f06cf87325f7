"""Causal convolution and feature map in one Triton kernel, and its gradients.

    x'_t = sum_j taps[:, j] * x_{t-K+1+j}        phi(x') = [softmax(x' W), softmax(-x' W)]

The forward sums the last K tokens, each times its taps, in registers and multiplies by W on the matrix units;
it reads x and writes phi. Backwards, x'_t W is taken as sum_j x_{t-K+1+j} W_j with W_j = diag(taps[:, j]) W,
so that all but the logits, formed again, is done by the matrix units: with dl the gradient of the logits,

    dW_j = sum_t x_{t-K+1+j}^T dl_t              dx_s = sum_j dl_{s+K-1-j} W_j^T

and the gradients of taps and W follow from the sums dW_j. One kernel writes dl, one sums dW_j from it,
another gathers it into x over taps and over the query heads of a key/value head.

Letters: B batch, T tokens, H heads, G heads of x (R = H/G), D head width, F half the feature width, K taps.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from lawcat_edge.ops.backend import check_triton
from lawcat_edge.ops.triton_primitives import interpreted, load_rows, mm, store_rows


class Tile(NamedTuple):
    """Tokens a program handles at a time, its warps, programs a multiprocessor is given, pipeline stages."""

    rows: int
    warps: int
    programs: int
    stages: int = 2


# (widest head, products) -> kernel -> tile, so that tiles fit in 255 registers a thread.
TILES: dict[tuple[int, str], dict[str, Tile]] = {
    (64, "bf16"): {
        "forward": Tile(64, 4, 5),
        "logits": Tile(64, 4, 4),
        "W": Tile(64, 4, 4),
        "x": Tile(64, 4, 4, 1),
    },
    (64, "split"): {
        "forward": Tile(64, 4, 4),
        "logits": Tile(64, 4, 4),
        "W": Tile(64, 4, 4),
        "x": Tile(32, 4, 4, 1),
    },
    (128, "bf16"): {
        "forward": Tile(64, 4, 4),
        "logits": Tile(64, 8, 2),
        "W": Tile(64, 8, 4),
        "x": Tile(32, 8, 2, 1),
    },
    (128, "split"): {
        "forward": Tile(64, 8, 2, 1),
        "logits": Tile(64, 8, 2, 1),
        "W": Tile(32, 8, 4),
        "x": Tile(16, 8, 2, 1),
    },
}


@triton.jit
def convolved(
    p_x, p_taps, p_past, i_b, i_h, t0, o_r, o_d, T, H: tl.constexpr, R: tl.constexpr, D: tl.constexpr,
    K: tl.constexpr, HAS_PAST: tl.constexpr,
):  # fmt: skip
    """x' [len(o_r),len(o_d)] of head i_h at t0 + o_r. Before the text come past [B,K-1,H*D], or zeros."""
    G: tl.constexpr = H // R
    y = tl.zeros([o_r.shape[0], o_d.shape[0]], tl.float32)
    for j in tl.static_range(0, K):
        shift = j - (K - 1)
        t = t0 + o_r + shift
        p = p_x + ((i_b * T + t0 + shift) * G + i_h // R) * D
        x = load_rows(p, o_r, (t >= 0) & (t < T), G * D, o_d, D)
        if HAS_PAST:  # noqa: SIM102 (this one is decided when the kernel is built)
            if t0 < K:
                p = p_past + (i_b * (K - 1) * H + i_h) * D
                x += load_rows(p, t + (K - 1), (t < 0) & (t > -K), H * D, o_d, D)
        tap = tl.load(p_taps + (i_h * D + o_d) * K + j, mask=o_d < D, other=0.0).to(tl.float32)
        y += x * tap[None, :]
    return y


@triton.jit
def softmax_rows(logits, m_f):
    logits = tl.where(m_f[None, :], logits, float("-inf"))
    e = tl.exp(logits - tl.max(logits, 1)[:, None])
    return e / tl.sum(e, 1)[:, None]


@triton.jit(do_not_specialize=["T", "NT", "tiles", "share"])
def forward_kernel(
    p_x, p_taps, p_W, p_past, p_phi, T, NT, tiles, share, H: tl.constexpr, R: tl.constexpr, D: tl.constexpr,
    F: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, BD: tl.constexpr, BF: tl.constexpr,
    HAS_PAST: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """phi [B,T,H,2F] over `share` tiles of one head."""
    i_h, i_n = tl.program_id(0), tl.program_id(1)
    o_d, o_f, o_r = tl.arange(0, BD), tl.arange(0, BF), tl.arange(0, ROWS)
    b_W = load_rows(p_W + i_h * D * F, o_d, o_d < D, F, o_f, F)
    for i in range(i_n * share, tl.minimum(i_n * share + share, tiles)):
        i_b = (i // NT).to(tl.int64)
        t0 = i % NT * ROWS
        b_x = convolved(p_x, p_taps, p_past, i_b, i_h, t0, o_r, o_d, T, H, R, D, K, HAS_PAST)
        logits = mm(b_x, b_W, MODE)
        p = p_phi + ((i_b * T + t0) * H + i_h) * 2 * F
        store_rows(p, softmax_rows(logits, o_f < F), o_r, t0 + o_r < T, H * 2 * F, o_f, F)
        store_rows(p + F, softmax_rows(-logits, o_f < F), o_r, t0 + o_r < T, H * 2 * F, o_f, F)


@triton.jit(do_not_specialize=["T", "NT", "tiles", "share"])
def logits_grad_kernel(
    p_x, p_taps, p_W, p_past, p_dphi, p_dl, T, NT, tiles, share, H: tl.constexpr, R: tl.constexpr,
    D: tl.constexpr, F: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, BD: tl.constexpr,
    BF: tl.constexpr, HAS_PAST: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """dl [B,T,H,F] over `share` tiles of one head."""
    i_h, i_n = tl.program_id(0), tl.program_id(1)
    o_d, o_f, o_r = tl.arange(0, BD), tl.arange(0, BF), tl.arange(0, ROWS)
    b_W = load_rows(p_W + i_h * D * F, o_d, o_d < D, F, o_f, F)
    for i in range(i_n * share, tl.minimum(i_n * share + share, tiles)):
        i_b = (i // NT).to(tl.int64)
        t0 = i % NT * ROWS
        m_r = t0 + o_r < T
        b_x = convolved(p_x, p_taps, p_past, i_b, i_h, t0, o_r, o_d, T, H, R, D, K, HAS_PAST)
        logits = mm(b_x, b_W, MODE)
        plus, minus = softmax_rows(logits, o_f < F), softmax_rows(-logits, o_f < F)
        p = p_dphi + ((i_b * T + t0) * H + i_h) * 2 * F
        d_plus = plus * load_rows(p, o_r, m_r, H * 2 * F, o_f, F)
        d_minus = minus * load_rows(p + F, o_r, m_r, H * 2 * F, o_f, F)
        dl = d_plus - plus * tl.sum(d_plus, 1)[:, None] - d_minus + minus * tl.sum(d_minus, 1)[:, None]
        store_rows(p_dl + ((i_b * T + t0) * H + i_h) * F, dl, o_r, m_r, H * F, o_f, F)


@triton.jit(do_not_specialize=["T", "NT", "tiles", "share"])
def weight_grad_kernel(
    p_x, p_past, p_dl, p_dW, T, NT, tiles, share, H: tl.constexpr, R: tl.constexpr, D: tl.constexpr,
    F: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, BD: tl.constexpr, BF: tl.constexpr,
    HAS_PAST: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """The part that `share` tiles have in dW_j, for one head and tap: [n,H,K,D,F]."""
    i_h, i_n, i_j = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    o_d, o_f, o_r = tl.arange(0, BD), tl.arange(0, BF), tl.arange(0, ROWS)
    G: tl.constexpr = H // R
    shift = i_j - (K - 1)
    dW = tl.zeros([BD, BF], tl.float32)
    for i in range(i_n * share, tl.minimum(i_n * share + share, tiles)):
        i_b = (i // NT).to(tl.int64)
        t0 = i % NT * ROWS
        t = t0 + o_r + shift
        p = p_x + ((i_b * T + t0 + shift) * G + i_h // R) * D
        b_x = load_rows(p, o_r, (t >= 0) & (t < T), G * D, o_d, D)
        if HAS_PAST:  # noqa: SIM102
            if t0 < K:
                p = p_past + (i_b * (K - 1) * H + i_h) * D
                b_x += load_rows(p, t + (K - 1), (t < 0) & (t > -K), H * D, o_d, D)
        dl = load_rows(p_dl + ((i_b * T + t0) * H + i_h) * F, o_r, t0 + o_r < T, H * F, o_f, F)
        dW += mm(tl.trans(b_x), dl, MODE)
    p = p_dW + ((i_n.to(tl.int64) * H + i_h) * K + i_j) * D * F
    tl.store(p + o_d[:, None] * F + o_f[None, :], dW, mask=(o_d < D)[:, None] & (o_f < F)[None, :])


@triton.jit(do_not_specialize=["T", "NT", "tiles", "share"])
def input_grad_kernel(
    p_dl, p_taps, p_W, p_dx, T, NT, tiles, share, G: tl.constexpr, R: tl.constexpr, D: tl.constexpr,
    F: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, BD: tl.constexpr, BF: tl.constexpr,
    BT: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """dx_s = sum over the R query heads and over j of dl_{s+K-1-j} W_j^T, over `share` tiles of one head."""
    i_g, i_n = tl.program_id(0), tl.program_id(1)
    o_d, o_r, o_c = tl.arange(0, BD), tl.arange(0, ROWS), tl.arange(0, BT * BF)
    j, f = o_c // BF, o_c % BF
    m_c = (j < K) & (f < F)
    row = o_r[:, None] + (K - 1 - j)[None, :]
    H: tl.constexpr = G * R
    for i in range(i_n * share, tl.minimum(i_n * share + share, tiles)):
        i_b = (i // NT).to(tl.int64)
        t0 = i % NT * ROWS
        dx = tl.zeros([ROWS, BD], tl.float32)
        for i_r in range(0, R):
            i_h = i_g * R + i_r
            m_W = m_c[:, None] & (o_d < D)[None, :]
            tap = tl.load(p_taps + (i_h * D + o_d[None, :]) * K + j[:, None], mask=m_W, other=0.0)
            W = tl.load(p_W + (i_h * D + o_d[None, :]) * F + f[:, None], mask=m_W, other=0.0)
            p = p_dl + ((i_b * T + t0) * H + i_h) * F
            mask = (t0 + row < T) & m_c[None, :]
            dl = tl.load(p + row * (H * F) + f[None, :], mask=mask, other=0.0).to(tl.float32)
            dx += mm(dl, tap.to(tl.float32) * W.to(tl.float32), MODE)
        store_rows(p_dx + ((i_b * T + t0) * G + i_g) * D, dx, o_r, t0 + o_r < T, G * D, o_d, D)


@torch.compiler.disable
def conv_feature_triton(x: Tensor, taps: Tensor, W: Tensor, buffer: Tensor | None) -> Tensor:
    """x [B,T,G,d], taps [H*d,K], W [H,d,f], buffer [B,H*d,K-1] or None (zeros)
    -> phi [B,T,H,2f] in x's dtype.

    Differentiable in all four. Sums are float32; the product with the W_j takes bfloat16 operands when x is
    bfloat16, and else splits each into two, as gla_triton does. d up to 128, f up to 64.
    """
    return _ConvFeature.apply(x, taps, W, buffer)


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _block(width: int) -> int:
    return max(16, triton.next_power_of_2(width))


class _Shares(NamedTuple):
    """How tokens are dealt out: NT tiles a sequence, `tiles` in all, `share` a program, n programs a head."""

    tile: Tile
    NT: int
    tiles: int
    share: int
    n: int

    @classmethod
    def of(cls, kernel: str, x: Tensor, D: int, heads: int) -> _Shares:
        tile = TILES[(64 if D <= 64 else 128, _mode(x))][kernel]
        NT = triton.cdiv(x.shape[1], tile.rows)
        tiles = x.shape[0] * NT
        share = triton.cdiv(tiles, triton.cdiv(tile.programs * _processors(x.device), heads))
        return cls(tile, NT, tiles, share, triton.cdiv(tiles, share))

    def sizes(self, T: int) -> tuple[int, int, int, int]:
        return T, self.NT, self.tiles, self.share


def _mode(x: Tensor) -> str:
    return "bf16" if x.dtype == torch.bfloat16 else "split"


class _ConvFeature(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, taps: Tensor, W: Tensor, buffer: Tensor | None
    ) -> Tensor:
        B, T, G, D = x.shape
        H, _, F = W.shape
        K = taps.shape[1]
        assert T > 0, "no tokens"
        assert H % G == 0, (H, G)
        assert K > 1, K
        assert W.shape[1] == D, (W.shape, x.shape)
        assert taps.shape[0] == H * D, (taps.shape, W.shape)
        assert buffer is None or buffer.shape == (B, H * D, K - 1), (buffer.shape, taps.shape)
        check_triton(x, W)
        x, taps, W = x.contiguous(), taps.contiguous(), W.contiguous()
        past = None if buffer is None else buffer.to(x.dtype).transpose(1, 2).contiguous()
        ctx.mode = _mode(x) if x.is_cuda else interpreted(_mode(x))
        s = _Shares.of("forward", x, D, H)
        phi = torch.empty(B, T, H, 2 * F, dtype=x.dtype, device=x.device)
        with torch.cuda.device_of(x):
            forward_kernel[(H, s.n)](
                x, taps, W, x if past is None else past, phi, *s.sizes(T), H, H // G, D, F, K, s.tile.rows,
                _block(D), _block(F), past is not None, ctx.mode,
                num_warps=s.tile.warps, num_stages=s.tile.stages,
            )  # fmt: skip
        ctx.save_for_backward(x, taps, W, past)
        ctx.buffer_dtype = None if buffer is None else buffer.dtype
        return phi

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dphi: Tensor) -> tuple[Tensor | None, ...]:
        x, taps, W, past = ctx.saved_tensors
        B, T, G, D = x.shape
        H, _, F = W.shape
        K = taps.shape[1]
        blocks = (_block(D), _block(F))
        s = _Shares.of("logits", x, D, H)
        dl = torch.empty(B, T, H, F, dtype=x.dtype, device=x.device)
        dx = torch.empty_like(x)
        before = x if past is None else past
        with torch.cuda.device_of(x):
            logits_grad_kernel[(H, s.n)](
                x, taps, W, before, dphi.contiguous(), dl, *s.sizes(T), H, H // G, D, F, K, s.tile.rows,
                *blocks, past is not None, ctx.mode, num_warps=s.tile.warps, num_stages=s.tile.stages,
            )  # fmt: skip
            s = _Shares.of("W", x, D, H * K)
            parts = torch.empty(s.n, H, K, D, F, dtype=torch.float32, device=x.device)
            weight_grad_kernel[(H, s.n, K)](
                x, before, dl, parts, *s.sizes(T), H, H // G, D, F, K, s.tile.rows, *blocks,
                past is not None, ctx.mode, num_warps=s.tile.warps, num_stages=s.tile.stages,
            )  # fmt: skip
            s = _Shares.of("x", x, D, G)
            input_grad_kernel[(G, s.n)](
                dl, taps, W, dx, *s.sizes(T), G, H // G, D, F, K, s.tile.rows, *blocks,
                triton.next_power_of_2(K), ctx.mode, num_warps=s.tile.warps, num_stages=s.tile.stages,
            )  # fmt: skip
        sums = parts.sum(0)  # dW_j [H,K,D,F]
        dtaps = torch.einsum("hkdf,hdf->hdk", sums, W.float()).flatten(0, 1)
        dW = torch.einsum("hkdf,hdk->hdf", sums, taps.float().view(H, D, K))
        dbuffer = None
        if past is not None and ctx.needs_input_grad[3]:
            dbuffer = _buffer_grad(dl, taps, W).to(ctx.buffer_dtype)
        return dx, dtaps.to(taps.dtype), dW.to(W.dtype), dbuffer


def _buffer_grad(dl: Tensor, taps: Tensor, W: Tensor) -> Tensor:
    """[B,H*D,K-1] in float32. Slot m of the buffer stands at time m-K+1 and meets tap j at time m-j."""
    r = taps.shape[1] - 1
    head = torch.einsum("bthf,hdf->bthd", dl[:, :r].float(), W.float()).flatten(2)  # [B,<=r,H*D]
    grad = torch.zeros(dl.shape[0], r, taps.shape[0], device=dl.device)
    for m in range(r):
        for j in range(max(0, m + 1 - head.shape[1]), m + 1):
            grad[:, m] += head[:, m - j] * taps[:, j].float()
    return grad.transpose(1, 2)
