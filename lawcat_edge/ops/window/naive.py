"""The window with every score formed: the reference that the kernels are held against."""

from __future__ import annotations

import torch
from torch import Tensor


def window_naive(q: Tensor, k: Tensor, v: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """N [B,T,H,d] and Z [B,T,H] of rotated q [B,T,H,d] and k, v [B,T,G,d]; takes T squared memory.

    Differentiable; the gradient of a row's largest score is that of ``amax``, exact where it is unique.
    """
    T, H, d = q.shape[1:]
    k, v = (x.repeat_interleave(H // x.shape[2], 2) for x in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / d**0.5
    age = torch.arange(T, device=q.device)[:, None] - torch.arange(T, device=q.device)
    scores = scores.masked_fill((age < 0) | (age >= window), -torch.inf)
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    return torch.einsum("bhij,bjhd->bihd", weights, v), weights.sum(-1).transpose(1, 2)
