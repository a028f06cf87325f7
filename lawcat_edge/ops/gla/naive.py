"""Normalised gated linear attention in its quadratic form: the reference the fast forms are tested against.

    S_t = exp(g_t) * S_{t-1} + k_t (x) v_t        z_t = exp(g_t) * z_{t-1} + k_t
    n_t = q_t^T S_t                               d_t = q_t . z_t

(LAWCAT, arXiv 2509.18467; gated linear attention, arXiv 2312.06635.) Every pair (t, j) is formed explicitly
with the decay exp(b_t - b_j), b the running sum of g, so nothing is rescaled and nothing can overflow.
Memory is O(T^2 F): small T only. Call it with float64.
"""

from __future__ import annotations

import torch
from torch import Tensor


def gla_naive(q: Tensor, k: Tensor, v: Tensor, g: Tensor, S0: Tensor, z0: Tensor) -> tuple[Tensor, ...]:
    """q, k [B,T,H,F], v [B,T,G,d], g [B,T,G,F], S0 [B,H,F,d], z0 [B,H,F] -> n [B,T,H,d], den [B,T,H],
    S, z.
    """
    repeat = q.shape[2] // v.shape[2]
    v, g = v.repeat_interleave(repeat, 2), g.repeat_interleave(repeat, 2)
    T = q.shape[1]
    b = g.cumsum(1)
    lag = b[:, :, None] - b[:, None]  # [B,T,T,H,F], entry (t, j) = b_t - b_j
    causal = torch.ones(T, T, dtype=torch.bool, device=q.device).tril()[None, :, :, None, None]
    decay = torch.where(causal, lag, torch.full_like(lag, -torch.inf)).exp()
    scores = torch.einsum("bthf,bjhf,btjhf->bhtj", q, k, decay)
    carried = q * b.exp()
    n = torch.einsum("bhtj,bjhd->bthd", scores, v) + torch.einsum("bthf,bhfd->bthd", carried, S0)
    den = scores.sum(-1).transpose(1, 2) + torch.einsum("bthf,bhf->bth", carried, z0)
    to_end = k * (b[:, -1:] - b).exp()
    S = b[:, -1].exp()[..., None] * S0 + torch.einsum("bthf,bthd->bhfd", to_end, v)
    z = b[:, -1].exp() * z0 + to_end.sum(1)
    return n, den, S, z
