"""Normalised gated linear attention on Triton: launches and gradients. The mathematics is with the kernels."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from lawcat_edge.ops.gla.triton_backward import backward_kernel, delta_kernel
from lawcat_edge.ops.gla.triton_kernels import (
    cumsum_kernel,
    output_kernel,
    scan_kernel,
    states_kernel,
    step_kernel,
)
from lawcat_edge.runtime.errors import LawcatError

CHUNK = 64
WIDEST = 128  # widest F and d: a state tile must fit in registers


def gla_triton(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, S0: Tensor | None, z0: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Numerator, denominator and final state; differentiable in all six.

    q, k [B,T,H,F], v [B,T,G,d], g [B,T,G,F] log-decay, S0 [B,H,F,d], z0 [B,H,F] or None for zero ->
    n [B,T,H,d] and den [B,T,H] in q's dtype, S [B,H,F,d] and z [B,H,F] in float32. F and d up to 128.
    State and sums are float32; products take bfloat16 operands for bfloat16 inputs, TF32 for float16, and for
    float32 three TF32 products in place of one, or one where torch.set_float32_matmul_precision allows it.
    """
    return _Gla.apply(q, k, v, g, S0, z0, None)


def gla_triton_normalised(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, S0: Tensor | None, z0: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """y = n / (den + eps) with the division in the epilogue, and the final state; else as :func:`gla_triton`."""
    return _Gla.apply(q, k, v, g, S0, z0, eps)


def gla_step_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    S0: Tensor,
    z0: Tensor,
    eps: float | None = None,
    inplace: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One token for every sequence, without gradients: (n, or y when eps is given; den; S; z).

    q, k [B,1,H,F], v [B,1,G,d], g [B,1,G,F], S0 [B,H,F,d], z0 [B,H,F]. ``inplace`` writes S over S0, which must
    then be contiguous float32; z is always new.
    """
    dims = _check(q, k, v, g, S0, z0)
    B, _, H, G, F, D = dims
    q, k, v, g = (x.contiguous() for x in (q, k, v, g))
    assert not inplace or (S0.dtype == torch.float32 and S0.is_contiguous())
    S0, z0 = S0.float().contiguous(), z0.float().contiguous()
    n = torch.empty(B, 1, H, D, dtype=q.dtype, device=q.device)
    den = torch.empty(B, 1, H, dtype=q.dtype, device=q.device)
    S, z = S0 if inplace else torch.empty_like(S0), torch.empty_like(z0)
    BV = min(32, _block(D))
    with torch.cuda.device_of(q):
        step_kernel[(B * H, triton.cdiv(D, BV))](
            q, k, v, g, S0, z0, n, den, S, z, eps or 0.0, H, H // G, F, D, _block(F), BV, eps is not None,
            num_warps=4,
        )  # fmt: skip
    return n, den, S, z


class _Dims(NamedTuple):
    B: int
    T: int
    H: int
    G: int
    F: int
    D: int


class _Plan(NamedTuple):
    """How the T tokens are walked: N chunks in P segments of L chunks, and the constants of every kernel."""

    N: int
    P: int
    L: int
    DT: Any
    IP: str
    warps: int

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor, dims: _Dims, segments: int | None = None) -> _Plan:
        N = triton.cdiv(dims.T, CHUNK)
        if segments is None:  # a few programs for every multiprocessor
            segments = triton.cdiv(4 * _processors(q.device), dims.B * dims.H)
        L = triton.cdiv(N, min(N, segments))
        if q.dtype == k.dtype == v.dtype == torch.bfloat16:
            DT, IP = tl.bfloat16, "tf32"
        elif (
            torch.float16 in (q.dtype, k.dtype, v.dtype) or torch.get_float32_matmul_precision() != "highest"
        ):
            DT, IP = tl.float32, "tf32"
        else:
            DT, IP = tl.float32, "tf32x3"
        if not q.is_cuda:
            IP = "interpreter"
        return cls(N, triton.cdiv(N, L), L, DT, IP, 4 if max(dims.F, dims.D) <= 64 else 8)


SEGMENTS: int | None = None  # set by tests to walk several segments where the machine would take one


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _block(width: int) -> int:
    return max(16, triton.next_power_of_2(width))


def _check(q: Tensor, k: Tensor, v: Tensor, g: Tensor, S0: Tensor | None, z0: Tensor | None) -> _Dims:
    B, T, H, F = q.shape
    G, D = v.shape[2], v.shape[3]
    assert T > 0 and H % G == 0, (T, H, G)
    assert k.shape == q.shape and v.shape == (B, T, G, D) and g.shape == (B, T, G, F), (
        k.shape,
        v.shape,
        g.shape,
    )
    assert (S0 is None) == (z0 is None)
    assert S0 is None or z0 is None or (S0.shape == (B, H, F, D) and z0.shape == (B, H, F)), (S0, z0)
    if max(F, D) > WIDEST:
        raise LawcatError(
            f"The Triton kernels hold feature and head widths up to {WIDEST}, not {max(F, D)}; use --backend torch."
        )
    if any(x.dtype not in (torch.float32, torch.bfloat16, torch.float16) for x in (q, k, v, g)):
        raise LawcatError(
            "The Triton kernels take float32, bfloat16 or float16; use --backend torch for others."
        )
    return _Dims(B, T, H, G, F, D)


def _state_tensors(
    B: int, H: int, n: int, dims: _Dims, like: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    S = torch.empty(B, H, n, dims.F, dims.D, dtype=dtype, device=like.device)
    return S, torch.empty(B, H, n, dims.F, dtype=torch.float32, device=like.device)


def _walk(
    x: Tensor, y: Tensor, weight: Tensor | None, scale: Tensor | None, b: Tensor, starts: tuple[Tensor, Tensor] | None,
    dims: _Dims, plan: _Plan, each: bool, dtype: torch.dtype,
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:  # fmt: skip
    """Run states_kernel: (states, last state) where ``each``, else (segment sums, log-decays twice)."""
    B, T, H, G, F, D = dims
    reverse = weight is not None
    S, z = _state_tensors(B, H, plan.N if each else plan.P, dims, x, dtype)
    decay = torch.empty(B, H, plan.P, F, dtype=torch.float32, device=x.device)
    end = _state_tensors(B, H, 1, dims, x, torch.float32) if each else (S, z)
    S0, z0 = starts if starts is not None else (S, z)
    BV = min(64, _block(D))
    states_kernel[(B * H * plan.P, triton.cdiv(D, BV))](
        x, y, x if weight is None else weight, x if scale is None else scale, b, S0, z0, S, z, decay, *end,
        T, plan.N, plan.L, plan.P, H, H // G, F, D, CHUNK, _block(F), BV, reverse, each, starts is not None,
        scale is not None, plan.DT, plan.IP, num_warps=plan.warps,
    )  # fmt: skip
    return (S, z), (end if each else (decay, decay))


def _segment_starts(
    x: Tensor, y: Tensor, weight: Tensor | None, scale: Tensor | None, b: Tensor, initial: tuple[Tensor, Tensor] | None,
    dims: _Dims, plan: _Plan,
) -> tuple[Tensor, Tensor] | None:  # fmt: skip
    """The state every segment starts from, S [B,H,P,F,d] and z [B,H,P,F]; None where that is zero."""
    if plan.P == 1:
        return initial
    (S, z), (decay, _) = _walk(x, y, weight, scale, b, None, dims, plan, False, torch.float32)
    S0, z0 = initial if initial is not None else (S, z)
    BR = 16
    scan_kernel[(dims.B * dims.H, triton.cdiv(dims.F, BR))](
        S, z, decay, S0, z0, plan.P, dims.F, dims.D, BR, _block(dims.D), weight is not None, initial is not None,
        num_warps=4,
    )  # fmt: skip
    return S, z


class _Gla(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        S0: Tensor | None,
        z0: Tensor | None,
        eps: float | None,
    ) -> tuple[Tensor, ...]:
        dims = _check(q, k, v, g, S0, z0)
        B, T, H, G, F, D = dims
        plan = _Plan.of(q, k, v, dims, SEGMENTS)
        q, k, v, g = (x.contiguous() for x in (q, k, v, g))
        initial = None if S0 is None or z0 is None else (S0.float().contiguous(), z0.float().contiguous())
        b = torch.empty(B, T, G, F, dtype=torch.float32, device=q.device)
        mild = torch.empty(B * G * plan.N, dtype=torch.int32, device=q.device)
        n = torch.empty(B, T, H, D, dtype=q.dtype, device=q.device)
        den = torch.empty(B, T, H, dtype=q.dtype if eps is None else torch.float32, device=q.device)
        S = torch.empty(B, H, F, D, dtype=torch.float32, device=q.device)
        z = torch.empty(B, H, F, dtype=torch.float32, device=q.device)
        with torch.cuda.device_of(q):
            cumsum_kernel[(B * G * plan.N,)](g, b, mild, T, plan.N, G, F, CHUNK, _block(F), num_warps=4)
            starts = _segment_starts(k, v, None, None, b, initial, dims, plan)
            S_start, z_start = starts if starts is not None else (S, z)
            BV = _block(D) if plan.DT == tl.bfloat16 else min(64, _block(D))
            output_kernel[(B * H * plan.P, triton.cdiv(D, BV))](
                q, k, v, b, mild, S_start, z_start, n, den, S, z, T, plan.N, plan.L, plan.P, eps or 0.0,
                H, H // G, F, D, CHUNK, _block(F), BV, starts is not None, eps is not None, plan.DT, plan.IP,
                num_warps=plan.warps,
            )  # fmt: skip
        ctx.dims, ctx.plan, ctx.eps = dims, plan, eps
        ctx.dtypes = (g.dtype, None if S0 is None else S0.dtype, None if z0 is None else z0.dtype)
        kept = (n, den) if eps is not None else (None, None)
        ctx.save_for_backward(q, k, v, b, mild, *(starts or (None, None)), *kept)
        ctx.set_materialize_grads(False)
        return (n, den, S, z) if eps is None else (n, S, z)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, b, mild, S_start, z_start, y, den = ctx.saved_tensors
        dims, plan = ctx.dims, ctx.plan
        B, T, H, G, F, D = dims
        dn, dS, dz = grads[0], grads[-2], grads[-1]
        dn = q.new_zeros(B, T, H, D) if dn is None else dn.contiguous()
        scale = None
        with torch.cuda.device_of(q):
            if ctx.eps is None:
                dden = q.new_zeros(B, T, H) if grads[1] is None else grads[1].contiguous()
            else:
                scale, dden = torch.empty_like(den), torch.empty_like(den)
                rows, BR = B * T * H, 32
                delta_kernel[(triton.cdiv(rows, BR),)](
                    dn, y, den, scale, dden, rows, ctx.eps, D, BR, _block(D)
                )
            final = None
            if dS is not None or dz is not None:
                dS = torch.zeros(B, H, F, D, device=q.device) if dS is None else dS.float().contiguous()
                dz = torch.zeros(B, H, F, device=q.device) if dz is None else dz.float().contiguous()
                final = (dS, dz)
            # The carry stays float32; its per-chunk copies are only operands, so they take the operands' type.
            copy = torch.bfloat16 if plan.DT == tl.bfloat16 else torch.float32
            starts = None if S_start is None else (S_start, z_start)
            before, _ = _walk(k, v, None, None, b, starts, dims, plan, True, copy)
            ends = _segment_starts(q, dn, dden, scale, b, final, dims, plan)
            after, (dS0, dz0) = _walk(q, dn, dden, scale, b, ends, dims, plan, True, copy)
            dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
            dg = torch.empty(B, T, G, F, dtype=ctx.dtypes[0], device=q.device)
            backward_kernel[(B * G * plan.N,)](
                q, k, v, b, mild, *before, *after, dn, dden, q if scale is None else scale, dq, dk, dv, dg, T, plan.N,
                G, H // G, F, D, CHUNK, _block(F), _block(D), scale is not None, plan.DT, plan.IP, num_warps=8,
            )  # fmt: skip
        S_dtype, z_dtype = ctx.dtypes[1:]
        return (
            dq, dk, dv, dg, None if S_dtype is None else dS0[:, :, 0].to(S_dtype),
            None if z_dtype is None else dz0[:, :, 0].to(z_dtype), None,
        )  # fmt: skip
