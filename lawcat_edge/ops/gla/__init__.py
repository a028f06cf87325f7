"""Normalised gated linear attention: one entry, several forms, and the place that chooses between them."""

from __future__ import annotations

import torch
from torch import Tensor

from lawcat_edge.ops.backend import choose
from lawcat_edge.ops.gla.chunk import gla_chunk
from lawcat_edge.ops.gla.step import gla_step

__all__ = ["gated_linear_attention", "gla_chunk", "gla_step", "normalised_gla"]


def gated_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    S0: Tensor | None = None,
    z0: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Numerator and denominator of the linear branch, and the state after the last token.

    q, k [B,T,H,F]; v [B,T,G,d]; g [B,T,G,F], log-decay <= 0; S0 [B,H,F,d] and z0 [B,H,F] in float32, zero
    when None. Returns n [B,T,H,d], den [B,T,H], S [B,H,F,d], z [B,H,F]; y = n / (den + eps).
    """
    if choose(backend, q) == "triton":
        from lawcat_edge.ops.gla.triton import gla_triton

        return gla_triton(q, k, v, g, S0, z0)
    B, _, H, K = q.shape
    work = torch.promote_types(q.dtype, torch.float32)
    if S0 is None:
        S0 = torch.zeros(B, H, K, v.shape[-1], dtype=work, device=q.device)
    if z0 is None:
        z0 = torch.zeros(B, H, K, dtype=work, device=q.device)
    if q.shape[1] == 1:
        return gla_step(q, k, v, g, S0, z0)  # type: ignore[return-value]
    return gla_chunk(q, k, v, g, S0, z0)  # type: ignore[return-value]


def normalised_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    S0: Tensor | None = None,
    z0: Tensor | None = None,
    *,
    eps: float,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """y = n / (den + eps) [B,T,H,d] with the state S, z after the last token; shapes as above.

    On Triton the division is part of the kernel, and one token without gradients takes the decoding kernel.
    """
    if choose(backend, q) == "triton":
        from lawcat_edge.ops.gla.triton import gla_step_triton, gla_triton_normalised

        if q.shape[1] == 1 and S0 is not None and z0 is not None and not torch.is_grad_enabled():
            y, _, S, z = gla_step_triton(q, k, v, g, S0, z0, eps)
            return y, S, z
        return gla_triton_normalised(q, k, v, g, S0, z0, eps)
    n, den, S, z = gated_linear_attention(q, k, v, g, S0, z0, backend)
    return n / (den[..., None] + eps), S, z
