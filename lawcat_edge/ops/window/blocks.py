"""The window in blocks of queries, in plain torch: scores of c queries against c + w - 1 keys at once."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lawcat_edge.rotary import Tables, rotate_pairs


def window_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    block: int,
    tables: Tables,
    past_key: Tensor,
    past_value: Tensor,
) -> tuple[Tensor, Tensor]:
    """N [B,T,H,d] and Z [B,T,H,1] as :func:`lawcat_edge.ops.window.window_attention` defines them.

    block: c, queries that are taken together. tables [c+w-1, d]: every block is rotated at the same local
    positions, which stay right past any length. past_key, past_value [B,G,n,d], n < w.
    """
    B, T, H, d = q.shape
    G, c, past, filled = k.shape[2], block, window - 1, past_key.shape[2]
    blocks = -(-T // c)
    cos, sin = tables

    def with_past(x: Tensor, old: Tensor) -> Tensor:  # -> [B,G,blocks,c+w-1,d]
        x = torch.cat([old, x.transpose(1, 2)], 2)
        return F.pad(x, (0, 0, past - filled, blocks * c - T)).unfold(2, c + past, c).transpose(-1, -2)

    keys, values = with_past(k, past_key), with_past(v, past_value)
    qs = F.pad(q.transpose(1, 2), (0, 0, 0, blocks * c - T)).reshape(B, G, H // G, blocks, c, d)
    qs, keys = rotate_pairs(qs, cos[past:], sin[past:]), rotate_pairs(keys, cos, sin)
    scores = torch.einsum("bghnid,bgnjd->bghnij", qs, keys) * d**-0.5
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    i = torch.arange(c, device=q.device)[:, None]
    j = torch.arange(c + past, device=q.device)
    band = (j >= i) & (j <= i + past)  # [c, c+w-1]
    slot = (
        torch.arange(blocks, device=q.device)[:, None] * c + j
    )  # index of a key among padding, past and new
    allowed = band & (slot >= past - filled)[:, None]  # [blocks,c,c+w-1]
    scores = scores.masked_fill(~allowed, -torch.inf)
    # The largest score does not cancel against the linear branch: it has a gradient of its own.
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    N = torch.einsum("bghnij,bgnjd->bghnid", weights.to(values.dtype), values)
    Z = weights.sum(-1, keepdim=True)
    merge = lambda x: x.reshape(B, H, blocks * c, -1)[:, :, :T].transpose(1, 2)  # noqa: E731
    return merge(N), merge(Z)
