"""Normalised gated linear attention, chunked: the torch form used for training and prefill on any device.

Within a chunk of 64 tokens, pairs are formed directly; between chunks, only the state travels. The one-level
form q exp(b), k exp(-b) overflows once the summed log-decay of a chunk is large, so a chunk is cut into
sub-chunks of 16: pairs in different sub-chunks are rescaled at the row sub-chunk's start, where both
exponents are <= 0, and pairs in the same sub-chunk use exp(b_t - b_j) as it stands. Where the summed decay
of every chunk is mild (> -MILD), the one-level form is exact to rounding and several times faster, so it is
used then: with chunks of 64, or of 16 where only those are mild.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 64
SUB = 16
MILD = 40.0  # exp(MILD) and its inverse are far inside float32, and the sum itself still has six digits


def gla_chunk(q: Tensor, k: Tensor, v: Tensor, g: Tensor, S0: Tensor, z0: Tensor) -> tuple[Tensor, ...]:
    """Shapes as in :func:`lawcat_edge.ops.gla.naive.gla_naive`; computes in float32 or wider."""
    with torch.autocast(q.device.type, enabled=False):
        return _gla_chunk(q, k, v, g, S0, z0)


def _gla_chunk(q: Tensor, k: Tensor, v: Tensor, g: Tensor, S0: Tensor, z0: Tensor) -> tuple[Tensor, ...]:
    out_dtype = q.dtype
    work = torch.promote_types(q.dtype, torch.float32)
    B, T, H, _ = q.shape
    repeat = H // v.shape[2]
    C, mild = _chunk_size(g.detach().to(work))
    N = -(-T // C)

    def chunks(x: Tensor) -> Tensor:  # [B,T,h,*] -> [B,h,N,C,*], zero-padded: k = 0 and g = 0 change no state
        x = F.pad(x.to(work), (0, 0, 0, 0, 0, N * C - T)).transpose(1, 2)
        return x.reshape(B, x.shape[1], N, C, x.shape[-1])

    one = torch.ones((*v.shape[:-1], 1), dtype=v.dtype, device=v.device)
    # The normaliser is one more value column that is always one.
    qc, kc, vc = chunks(q), chunks(k), chunks(torch.cat([v, one], -1)).repeat_interleave(repeat, 1)
    b = chunks(g).cumsum(3).repeat_interleave(repeat, 1)
    end = b[:, :, :, -1:]

    scores = _scores_mild(qc, kc, b) if mild else _scores_safe(qc, kc, b)
    within = scores @ vc

    update = (kc * (end - b).exp()).transpose(-1, -2) @ vc  # [B,H,N,F,d+1]
    keep = end.squeeze(3).exp()[..., None]  # [B,H,N,F,1]
    S = torch.cat([S0.to(work), z0.to(work)[..., None]], -1)
    before = []
    for n in range(N):
        before.append(S)
        S = keep[:, :, n] * S + update[:, :, n]
    carried = (qc * b.exp()) @ torch.stack(before, 2)

    out = (within + carried).reshape(B, H, N * C, -1)[:, :, :T].transpose(1, 2)
    return out[..., :-1].to(out_dtype), out[..., -1].to(out_dtype), S[..., :-1], S[..., -1]


def _chunk_size(g: Tensor) -> tuple[int, bool]:
    """Tokens a chunk for g [B,T,G,F], and whether every such chunk is mild."""
    T = g.shape[1]
    whole = min(CHUNK, -(-T // SUB) * SUB)
    for C in (whole, SUB):
        sums = F.pad(g, (0, 0, 0, 0, 0, -T % C)).unflatten(1, (-1, C)).sum(2)
        if bool((sums.amin() > -MILD).item()):
            return C, True
    return whole, False


def _scores_mild(q: Tensor, k: Tensor, b: Tensor) -> Tensor:
    C = q.shape[3]
    # any reference cancels; the middle keeps exponents small
    middle = b[:, :, :, C // 2 : C // 2 + 1].detach()
    return ((q * (b - middle).exp()) @ (k * (middle - b).exp()).transpose(-1, -2)).tril()


def _scores_safe(q: Tensor, k: Tensor, b: Tensor) -> Tensor:
    B, H, N, C, K = q.shape
    M = C // SUB
    qs, ks, bs = (x.reshape(B, H, N, M, SUB, K) for x in (q, k, b))
    # b just before each row sub-chunk; zero before the first
    start = F.pad(bs[:, :, :, :-1, -1], (0, 0, 1, 0))  # [B,H,N,M,K]
    rows = qs * (bs - start[..., None, :]).exp()
    # column exponent start_I - b_j is <= 0 for every j before sub-chunk I; later ones are masked before exp
    lag = start[:, :, :, :, None] - b[:, :, :, None]  # [B,H,N,M,C,K]
    earlier = torch.arange(C, device=q.device) < (torch.arange(M, device=q.device) * SUB)[:, None]
    columns = k[:, :, :, None] * torch.where(earlier[..., None], lag, torch.full_like(lag, -torch.inf)).exp()
    far = rows @ columns.transpose(-1, -2)  # [B,H,N,M,SUB,C]
    pair = bs[..., :, None, :] - bs[..., None, :, :]  # [B,H,N,M,SUB,SUB,K]
    causal = torch.ones(SUB, SUB, dtype=torch.bool, device=q.device).tril()[..., None]
    decay = torch.where(causal, pair, torch.full_like(pair, -torch.inf)).exp()
    near = torch.einsum("bhnmik,bhnmjk,bhnmijk->bhnmij", qs, ks, decay)
    eye = torch.eye(M, dtype=q.dtype, device=q.device)
    placed = torch.einsum("bhnmij,ml->bhnmilj", near, eye).reshape(B, H, N, M, SUB, C)
    return (far + placed).reshape(B, H, N, C, C)
