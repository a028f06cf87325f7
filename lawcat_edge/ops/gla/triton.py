"""Normalised gated linear attention on Triton: launches and gradients. The mathematics is with the kernels.

What a forward pass launches: chunk sums of the gate; where the sequence is cut into segments, their own
updates and a scan over them; the outputs. A backward pass: chunk sums, the state before every chunk, the
same walk backwards for the state's gradient, then dq, then dk, dv and dg.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from lawcat_edge.ops.backend import check_triton
from lawcat_edge.ops.gla.triton_backward import delta_kernel, dkv_kernel, dq_kernel
from lawcat_edge.ops.gla.triton_kernels import (
    cumsum_kernel,
    interpreted,
    output_kernel,
    scan_kernel,
    states_kernel,
    step_kernel,
)

SEGMENTS: int | None = None  # set by tests, to cut a sequence where the machine would not


class Launch(NamedTuple):
    """Tokens a chunk, and warps and pipeline stages of a kernel."""

    chunk: int
    warps: int
    stages: int


# Chosen so that tiles fit in 255 registers a thread; (widest of F and d, products) -> kernel -> launch.
# "states" of the forward pass take the chunk of "output", those of the backward pass the chunk of "dq" and
# "dkv".
LAUNCHES: dict[tuple[int, str], dict[str, Launch]] = {
    (64, "bf16"): {
        "states": Launch(64, 4, 2),
        "output": Launch(64, 4, 2),
        "dq": Launch(64, 4, 2),
        "dkv": Launch(64, 8, 2),
    },
    (64, "split"): {
        "states": Launch(32, 4, 2),
        "output": Launch(32, 4, 2),
        "dq": Launch(32, 4, 2),
        "dkv": Launch(32, 8, 2),
    },
    (128, "bf16"): {
        "states": Launch(32, 8, 2),
        "output": Launch(32, 8, 2),
        "dq": Launch(32, 8, 2),
        "dkv": Launch(32, 8, 2),
    },
    (128, "split"): {
        "states": Launch(32, 8, 2),
        "output": Launch(32, 8, 2),
        "dq": Launch(32, 8, 2),
        "dkv": Launch(32, 8, 2),
    },
}
COARSEST = 64  # segments are whole chunks of every size


@torch.compiler.disable
def gla_triton(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, S0: Tensor | None, z0: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Numerator, denominator and final state; differentiable in all six.

    q, k [B,T,H,F], v [B,T,G,d], g [B,T,G,F] log-decay <= 0, S0 [B,H,F,d], z0 [B,H,F] or None for zero ->
    n [B,T,H,d] and den [B,T,H] in q's dtype, S [B,H,F,d] and z [B,H,F] in float32. F and d up to 128.
    State and sums are float32. Products take bfloat16 operands for bfloat16 inputs, and for float32 too under
    ``torch.set_float32_matmul_precision("medium")``; else each operand is split into two bfloat16.
    """
    return _Gla.apply(q, k, v, g, S0, z0, None)


@torch.compiler.disable
def gla_triton_normalised(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, S0: Tensor | None, z0: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """y = n / (den + eps), divided in the epilogue, and the final state; else as :func:`gla_triton`."""
    return _Gla.apply(q, k, v, g, S0, z0, eps)


@torch.compiler.disable
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

    q, k [B,1,H,F], v [B,1,G,d], g [B,1,G,F], S0 [B,H,F,d], z0 [B,H,F]. ``inplace`` writes S over S0, which
    must then be contiguous float32; z is always new.
    """
    B, T, H, G, F, D = _check(q, k, v, g, S0, z0)
    assert T == 1, T
    q, k, v, g = (x.contiguous() for x in (q, k, v, g))
    assert not inplace or (S0.dtype == torch.float32 and S0.is_contiguous())
    S0, z0 = S0.float().contiguous(), z0.float().contiguous()
    n = torch.empty(B, 1, H, D, dtype=q.dtype, device=q.device)
    den = torch.empty(B, 1, H, dtype=q.dtype, device=q.device)
    S, z = S0 if inplace else torch.empty_like(S0), torch.empty_like(z0)
    BV = min(32, _block(D))
    with torch.cuda.device_of(q):
        step_kernel[(B * H, triton.cdiv(D, BV))](
            q, k, v, g, S0, z0, n, den, S, z, eps or 0.0, H, H // G, F, D, _block(F), BV, eps is not None
        )
    return n, den, S, z


class _Dims(NamedTuple):
    B: int
    T: int
    H: int
    G: int
    F: int
    D: int


def _check(q: Tensor, k: Tensor, v: Tensor, g: Tensor, S0: Tensor | None, z0: Tensor | None) -> _Dims:
    B, T, H, F = q.shape
    G, D = v.shape[2], v.shape[3]
    assert T > 0, "no tokens"
    assert H % G == 0, (H, G)
    assert k.shape == q.shape, (k.shape, q.shape)
    assert v.shape == (B, T, G, D), (v.shape, q.shape)
    assert g.shape == (B, T, G, F), (g.shape, q.shape)
    assert (S0 is None) == (z0 is None)
    assert S0 is None or S0.shape == (B, H, F, D), S0.shape
    assert z0 is None or z0.shape == (B, H, F), z0.shape
    check_triton(q, k, v, g)
    return _Dims(B, T, H, G, F, D)


class _Plan(NamedTuple):
    """Segments of so many tokens, P of them; how products are formed; the launch of each kernel."""

    segment: int
    P: int
    mode: str
    launches: dict[str, Launch]

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor, dims: _Dims) -> _Plan:
        whole = triton.cdiv(dims.T, COARSEST)
        # a few programs for every multiprocessor, or the whole sequence in one
        wanted = SEGMENTS or triton.cdiv(4 * _processors(q.device), dims.B * dims.H)
        segment = COARSEST * triton.cdiv(whole, min(whole, wanted))
        mode = products(q, k, v)
        launches = LAUNCHES[(64 if max(dims.F, dims.D) <= 64 else 128, mode)]
        if not q.is_cuda:
            mode = interpreted(mode)
        return cls(segment, triton.cdiv(dims.T, segment), mode, launches)


def products(*operands: Tensor) -> str:
    """How a kernel forms products of these: ``bf16`` operands, or each ``split`` into two."""
    low = all(x.dtype == torch.bfloat16 for x in operands)
    medium = torch.get_float32_matmul_precision() == "medium" and torch.float16 not in {
        x.dtype for x in operands
    }
    return "bf16" if low or medium else "split"


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _block(width: int) -> int:
    return max(16, triton.next_power_of_2(width))


class _Run(NamedTuple):
    """The sums b [B,T,G,F] over chunks of one size, which of the B*G*N chunks are mild, and the walks."""

    b: Tensor
    mild: Tensor
    chunk: int
    N: int
    dims: _Dims
    plan: _Plan

    @classmethod
    def of(cls, g: Tensor, chunk: int, dims: _Dims, plan: _Plan) -> _Run:
        N = triton.cdiv(dims.T, chunk)
        b = torch.empty(g.shape, dtype=torch.float32, device=g.device)
        mild = torch.empty(dims.B * dims.G * N, dtype=torch.int32, device=g.device)
        cumsum_kernel[(dims.B * dims.G * N,)](g, b, mild, dims.T, N, dims.G, dims.F, chunk, _block(dims.F))
        return cls(b, mild, chunk, N, dims, plan)

    def states(self, n: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Room for n states a head: S [B,H,n,F,d], z [B,H,n,F]."""
        B, _, H, _, F, D = self.dims
        S = torch.empty(B, H, n, F, D, dtype=dtype, device=self.b.device)
        return S, torch.empty(B, H, n, F, dtype=torch.float32, device=self.b.device)

    def walk(
        self, x: Tensor, y: Tensor, weight: Tensor | None, scale: Tensor | None,
        starts: tuple[Tensor, Tensor] | None, out: tuple[Tensor, Tensor], last: tuple[Tensor, Tensor],
    ) -> None:  # fmt: skip
        """states_kernel: from the segments' starts to every chunk's state, `out`, and after all, `last`."""
        self._launch(x, y, weight, scale, starts, out, last, True)

    def segment_starts(
        self,
        x: Tensor,
        y: Tensor,
        weight: Tensor | None,
        scale: Tensor | None,
        initial: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, Tensor] | None:
        """The state every segment starts from, S [B,H,P,F,d] and z [B,H,P,F]; None where that is zero."""
        P = self.plan.P
        if P == 1:
            return initial
        B, _, H, _, F, D = self.dims
        S, z = self.states(P)
        decay = torch.empty_like(z)
        self._launch(x, y, weight, scale, None, (S, z), (decay, decay), False)
        BR = 16
        scan_kernel[(B * H, triton.cdiv(F, BR))](
            S, z, decay, *(initial or (S, z)), P, F, D, BR, _block(D), weight is not None, initial is not None
        )
        return S, z

    def _launch(
        self, x: Tensor, y: Tensor, weight: Tensor | None, scale: Tensor | None,
        starts: tuple[Tensor, Tensor] | None, out: tuple[Tensor, Tensor],
        last: tuple[Tensor, Tensor], each: bool,
    ) -> None:  # fmt: skip
        B, T, H, G, F, D = self.dims
        BV, launch = min(64, _block(D)), self.plan.launches["states"]
        states_kernel[(B * H * self.plan.P, triton.cdiv(D, BV))](
            x, y, x if weight is None else weight, x if scale is None else scale, self.b, *(starts or out),
            *out, last[1], *last, T, self.N, self.plan.segment // self.chunk, self.plan.P, H, H // G, F, D,
            self.chunk, _block(F), BV, weight is not None, each, starts is not None,
            scale is not None, self.plan.mode, num_warps=launch.warps, num_stages=launch.stages,
        )  # fmt: skip


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
        plan = _Plan.of(q, k, v, dims)
        q, k, v, g = (x.contiguous() for x in (q, k, v, g))
        initial = None if S0 is None or z0 is None else (S0.float().contiguous(), z0.float().contiguous())
        n = torch.empty(B, T, H, D, dtype=q.dtype, device=q.device)
        den = torch.empty(B, T, H, dtype=q.dtype if eps is None else torch.float32, device=q.device)
        S = torch.empty(B, H, F, D, dtype=torch.float32, device=q.device)
        z = torch.empty(B, H, F, dtype=torch.float32, device=q.device)
        with torch.cuda.device_of(q):
            launch = plan.launches["output"]
            run = _Run.of(g, launch.chunk, dims, plan)
            starts = run.segment_starts(k, v, None, None, initial)
            # split products need registers for two operands: half the columns at a time, the scores twice
            # never below 64 with bfloat16 operands: narrower, triton 3.6 gave wrong numerators (LOG.md)
            BV = min(max(_block(D), 64), 128) if "bf16" in plan.mode else min(_block(D), 64)
            output_kernel[(B * H * plan.P, triton.cdiv(D, BV))](
                q, k, v, run.b, run.mild, *(starts or (S, z)), n, den, S, z, T, run.N,
                plan.segment // run.chunk, plan.P, eps or 0.0, H, H // G, F, D, run.chunk, _block(F), BV,
                starts is not None, eps is not None, plan.mode,
                num_warps=launch.warps, num_stages=launch.stages,
            )  # fmt: skip
        ctx.dims, ctx.plan, ctx.eps = dims, plan, eps
        ctx.initial_dtypes = None if S0 is None or z0 is None else (S0.dtype, z0.dtype)
        ctx.save_for_backward(
            q, k, v, g, *(starts or (None, None)), *((n, den) if eps is not None else (None, None))
        )
        ctx.set_materialize_grads(False)
        return (n, den, S, z) if eps is None else (n, S, z)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, g, S_start, z_start, y, den = ctx.saved_tensors
        dims, plan = ctx.dims, ctx.plan
        B, T, H, G, F, D = dims
        dn, dS, dz = grads[0], grads[-2], grads[-1]
        dn = q.new_zeros(B, T, H, D) if dn is None else dn.contiguous()
        final = None
        if dS is not None or dz is not None:
            dS = torch.zeros(B, H, F, D, device=q.device) if dS is None else dS.float().contiguous()
            dz = torch.zeros(B, H, F, device=q.device) if dz is None else dz.float().contiguous()
            final = (dS, dz)
        dq, dk, dv, dg = (torch.empty_like(x) for x in (q, k, v, g))
        with torch.cuda.device_of(q):
            scale = None
            if ctx.eps is None:
                dden = q.new_zeros(B, T, H) if grads[1] is None else grads[1].contiguous()
            else:
                scale, dden = torch.empty_like(den), torch.empty_like(den)
                rows, BR = B * T * H, 32
                delta_kernel[(triton.cdiv(rows, BR),)](
                    dn, y, den, scale, dden, rows, ctx.eps, D, BR, _block(D), plan.mode
                )
            run = _Run.of(g, plan.launches["dq"].chunk, dims, plan)
            # The carry stays float32; its copies at the chunks are operands, and take the operands' type.
            copy = torch.bfloat16 if "bf16" in plan.mode else torch.float32
            before, after, initial = run.states(run.N, copy), run.states(run.N, copy), run.states(1)
            run.walk(k, v, None, None, None if S_start is None else (S_start, z_start), before, run.states(1))
            ends = run.segment_starts(q, dn, dden, scale, final)
            run.walk(q, dn, dden, scale, ends, after, initial)
            qdq = torch.empty(B, T, G, F, dtype=torch.float32, device=q.device)
            common = (G, H // G, F, D, run.chunk, _block(F), _block(D), scale is not None)
            factor = q if scale is None else scale
            for safe in (False, True):
                dq_kernel[(B * G * run.N,)](
                    q, k, v, run.b, run.mild, *before, dn, dden, factor, dq, qdq, T, run.N, *common, safe,
                    plan.mode, num_warps=plan.launches["dq"].warps, num_stages=plan.launches["dq"].stages,
                )  # fmt: skip
                dkv_kernel[(B * G * run.N,)](
                    q, k, v, run.b, run.mild, *before, *after, dn, dden, factor, qdq, dk, dv, dg, T, run.N,
                    *common, safe, plan.mode,
                    num_warps=plan.launches["dkv"].warps, num_stages=plan.launches["dkv"].stages,
                )  # fmt: skip
        if ctx.initial_dtypes is None:
            return dq, dk, dv, dg, None, None, None
        dS0, dz0 = (x[:, :, 0].to(dtype) for x, dtype in zip(initial, ctx.initial_dtypes, strict=True))
        return dq, dk, dv, dg, dS0, dz0, None
