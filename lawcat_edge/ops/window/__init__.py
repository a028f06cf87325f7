"""Softmax attention over the last w tokens, in parts that can be mixed with linear attention."""

from __future__ import annotations

import torch
from torch import Tensor

from lawcat_edge.families import Geometry
from lawcat_edge.ops.backend import choose
from lawcat_edge.ops.window.blocks import window_blocks
from lawcat_edge.rotary import Tables, local_tables, rotate

__all__ = ["window_attention", "window_blocks"]


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    geometry: Geometry,
    rotary: Tables,
    past_key: Tensor | None = None,
    past_value: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Numerator N [B,T,H,d] and denominator Z [B,T,H,1] of softmax attention over the last ``window`` tokens.

    q [B,T,H,d], k and v [B,T,G,d], un-rotated; rotary: tables at the tokens' positions; past_key, past_value
    [B,G,n,d]: the n < window tokens before, un-rotated (None: the text starts here). Rows are scaled by their
    largest score m: N_i = sum_j exp(s_ij - m_i) v_j, Z_i = sum_j exp(s_ij - m_i), with the scores
    s = q k / sqrt(d). The scale does not cancel against a linear branch, so m has a gradient too.

    Triton's form never writes the scores, and takes texts that start here; torch's takes blocks of them.
    """
    if past_key is None and choose(backend, q) == "triton":
        from lawcat_edge.ops.window.triton import window_triton

        N, Z = window_triton(rotate(q, rotary), rotate(k, rotary), v, window)
        return N, Z[..., None]
    block = min(max(window, 16), q.shape[1])
    tables = local_tables(geometry, block + window - 1, q)
    if past_key is not None and past_value is not None:
        past_key, past_value = past_key.to(k.dtype), past_value.to(v.dtype)
    else:
        none = k.new_zeros(k.shape[0], k.shape[2], 0, k.shape[3])
        past_key, past_value = none, torch.zeros_like(none, dtype=v.dtype)
    return window_blocks(q, k, v, window, block, tables, past_key, past_value)
