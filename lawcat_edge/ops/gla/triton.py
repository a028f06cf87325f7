"""Normalised gated linear attention on Triton: launches and gradients. The mathematics is with the kernels.

What a forward pass launches: what every chunk adds to the state; a scan over the chunks; the outputs. A
backward pass: the first two again, the same two backwards for the state's gradient, then dq, then dk, dv and
dg.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from lawcat_edge.ops.backend import check_triton
from lawcat_edge.ops.gla.triton_backward import delta_kernel, dkv_kernel, dq_kernel
from lawcat_edge.ops.gla.triton_kernels import output_kernel, scan_kernel, states_kernel, step_kernel
from lawcat_edge.ops.triton_primitives import interpreted, products


class Launch(NamedTuple):
    """Tokens a chunk, warps and pipeline stages of a kernel; columns of the value that a program takes and,
    for outputs, its rows and how many keys at a time; a limit to registers, where that lets more programs in.
    """

    chunk: int
    warps: int
    stages: int
    columns: int = 128
    rows: int = 64
    keys: int = 64
    registers: int | None = None


# Chosen so that tiles fit in 255 registers a thread; (widest of F and d, products) -> kernel -> launch.
# "states" of the forward pass take the chunk of "output", those of the backward pass the chunk of "dq" and
# "dkv".
LAUNCHES: dict[tuple[int, str], dict[str, Launch]] = {
    (64, "bf16"): {
        "states": Launch(64, 4, 1, 64),
        "output": Launch(64, 4, 1, 64, keys=32),
        "dq": Launch(64, 4, 2),
        "dkv": Launch(64, 8, 2),
    },
    (64, "split"): {
        "states": Launch(32, 4, 2, 64),
        "output": Launch(32, 4, 1, 64, rows=32, keys=32),
        "dq": Launch(32, 4, 2),
        "dkv": Launch(32, 8, 2),
    },
    (128, "bf16"): {
        "states": Launch(128, 8, 2),
        "output": Launch(128, 4, 1, keys=32, registers=168),
        "dq": Launch(32, 8, 2),
        "dkv": Launch(32, 8, 2),
    },
    (128, "split"): {
        "states": Launch(32, 8, 2, 64),
        "output": Launch(32, 8, 1, 64, rows=32, keys=32),
        "dq": Launch(32, 8, 2),
        "dkv": Launch(32, 8, 2),
    },
}
SCAN = {"BR": 8, "STAGES": 8, "UNROLL": 1, "num_warps": 4}  # rows of the state a program carries


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


def _block(width: int) -> int:
    return max(16, triton.next_power_of_2(width))


class _Run(NamedTuple):
    """The chunks of one pass: N of so many tokens; the running sums b [B,T,G,F] of the gate in each, and
    which of the B*G*N are mild; how products are formed and kernels launched.
    """

    b: Tensor
    mild: Tensor
    chunk: int
    N: int
    dims: _Dims
    mode: str
    launches: dict[str, Launch]

    @classmethod
    def of(cls, dims: _Dims, kernel: str, mode: str, device: torch.device) -> _Run:
        """Room for a pass with the chunk of this kernel. ``states`` of k and v fill b and mild."""
        launches = LAUNCHES[(64 if max(dims.F, dims.D) <= 64 else 128, mode)]
        chunk = launches[kernel].chunk
        N = triton.cdiv(dims.T, chunk)
        b = torch.empty(dims.B, dims.T, dims.G, dims.F, dtype=torch.float32, device=device)
        mild = torch.empty(dims.B * dims.G * N, dtype=torch.int32, device=device)
        mode = mode if device.type == "cuda" else interpreted(mode)
        return cls(b, mild, chunk, N, dims, mode, launches)

    def states(
        self,
        x: Tensor,
        y: Tensor,
        initial: tuple[Tensor, Tensor] | None,
        g: Tensor | None = None,
        weight: Tensor | None = None,
        scale: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """State before every chunk, S [B,H,N,F,d] and z [B,H,N,F], and after all, [B,H,F,d] and [B,H,F].

        With g, forwards from k and v; with weight, backwards from q and dn (see states_kernel). The carry is
        float32; its copies at the chunks are operands, and S is in the operands' type.
        """
        B, T, H, G, F, D = self.dims
        operand = torch.bfloat16 if "bf16" in self.mode else torch.float32
        S = torch.empty(B, H, self.N, F, D, dtype=operand, device=x.device)
        z = torch.empty(B, H, self.N, F, dtype=torch.float32, device=x.device)
        S_end = torch.empty(B, H, F, D, dtype=torch.float32, device=x.device)
        z_end = torch.empty(B, H, F, dtype=torch.float32, device=x.device)
        launch, reverse = self.launches["states"], g is None
        BV = min(_block(D), launch.columns)
        states_kernel[(B * G * self.N, triton.cdiv(D, BV))](
            x, y, x if weight is None else weight, x if scale is None else scale, self.b if g is None else g,
            self.b, self.mild, S, z, T, self.N, G, H // G, F, D, self.chunk, _block(F), BV, reverse,
            scale is not None, self.mode, num_warps=launch.warps, num_stages=launch.stages,
            maxnreg=launch.registers,
        )  # fmt: skip
        scan_kernel[(B * H, triton.cdiv(F, SCAN["BR"]))](
            S, z, self.b, *(initial or (S, z)), S_end, z_end, T, self.N, H, H // G, F, D, self.chunk,
            BV=_block(D), REVERSE=reverse, HAS_INIT=initial is not None, **SCAN,
        )  # fmt: skip
        return S, z, S_end, z_end


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
        mode = products(q, k, v)
        q, k, v, g = (x.contiguous() for x in (q, k, v, g))
        initial = None if S0 is None or z0 is None else (S0.float().contiguous(), z0.float().contiguous())
        n = torch.empty(B, T, H, D, dtype=q.dtype, device=q.device)
        den = torch.empty(B, T, H, dtype=q.dtype if eps is None else torch.float32, device=q.device)
        with torch.cuda.device_of(q):
            run = _Run.of(dims, "output", mode, q.device)
            launch = run.launches["output"]
            before, z_before, S, z = run.states(k, v, initial, g)
            # never below 64 with bfloat16 operands: narrower, triton 3.6 gave wrong numerators (LOG.md)
            BV = min(max(_block(D), 64 if mode == "bf16" else 16), launch.columns)
            for safe in (False, True):
                rows, keys = (run.chunk, run.chunk) if safe else (launch.rows, launch.keys)
                output_kernel[(B * H * run.N * (run.chunk // rows), triton.cdiv(D, BV))](
                    q, k, v, run.b, run.mild, before, z_before, n, den, T, run.N, eps or 0.0, H, H // G, F, D,
                    run.chunk, rows, keys, _block(F), BV, eps is not None, safe, run.mode,
                    num_warps=8 if safe else launch.warps, num_stages=launch.stages,
                    maxnreg=None if safe else launch.registers,
                )  # fmt: skip
        ctx.dims, ctx.mode, ctx.eps = dims, mode, eps
        ctx.initial_dtypes = None if S0 is None or z0 is None else (S0.dtype, z0.dtype)
        ctx.save_for_backward(
            q, k, v, g, *(initial or (None, None)), *((n, den) if eps is not None else (None, None))
        )
        ctx.set_materialize_grads(False)
        return (n, den, S, z) if eps is None else (n, S, z)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, g, S0, z0, y, den = ctx.saved_tensors
        dims = ctx.dims
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
            run = _Run.of(dims, "dq", ctx.mode, q.device)
            scale = None
            if ctx.eps is None:
                dden = q.new_zeros(B, T, H) if grads[1] is None else grads[1].contiguous()
            else:
                scale, dden = torch.empty_like(den), torch.empty_like(den)
                rows, BR = B * T * H, 32
                delta_kernel[(triton.cdiv(rows, BR),)](
                    dn, y, den, scale, dden, rows, ctx.eps, D, BR, _block(D), run.mode
                )
            before = run.states(k, v, None if S0 is None else (S0, z0), g)[:2]
            *after, dS0, dz0 = run.states(q, dn, final, weight=dden, scale=scale)
            qdq = torch.empty(B, T, G, F, dtype=torch.float32, device=q.device)
            common = (G, H // G, F, D, run.chunk, _block(F), _block(D), scale is not None)
            factor = q if scale is None else scale
            for safe in (False, True):
                dq_kernel[(B * G * run.N,)](
                    q, k, v, run.b, run.mild, *before, dn, dden, factor, dq, qdq, T, run.N, *common, safe,
                    run.mode, num_warps=run.launches["dq"].warps, num_stages=run.launches["dq"].stages,
                )  # fmt: skip
                dkv_kernel[(B * G * run.N,)](
                    q, k, v, run.b, run.mild, *before, *after, dn, dden, factor, qdq, dk, dv, dg, T, run.N,
                    *common, safe, run.mode,
                    num_warps=run.launches["dkv"].warps, num_stages=run.launches["dkv"].stages,
                )  # fmt: skip
        if ctx.initial_dtypes is None:
            return dq, dk, dv, dg, None, None, None
        return dq, dk, dv, dg, dS0.to(ctx.initial_dtypes[0]), dz0.to(ctx.initial_dtypes[1]), None
