"""Normalised gated linear attention, recurrent: one token after another, as torch decodes.

What is exported computes the same with onnxruntime's own operator (``export.operators``).
"""

from __future__ import annotations

import torch
from torch import Tensor


def gla_step(q: Tensor, k: Tensor, v: Tensor, g: Tensor, S0: Tensor, z0: Tensor) -> tuple[Tensor, ...]:
    """Shapes as in :func:`lawcat_edge.ops.gla.naive.gla_naive`; any T, in a loop."""
    repeat = q.shape[2] // v.shape[2]
    v, decay = v.repeat_interleave(repeat, 2), g.exp().repeat_interleave(repeat, 2)
    S, z = S0, z0
    ns, dens = [], []
    for t in range(q.shape[1]):
        S = decay[:, t, :, :, None] * S + k[:, t, :, :, None] * v[:, t, :, None, :]
        z = decay[:, t] * z + k[:, t]
        ns.append(torch.einsum("bhf,bhfd->bhd", q[:, t], S))
        dens.append(torch.einsum("bhf,bhf->bh", q[:, t], z))
    return torch.stack(ns, 1), torch.stack(dens, 1), S, z
