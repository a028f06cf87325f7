"""Softmax attention with the teacher's projections: the teacher itself, and the layers that a hybrid keeps.

Letters: B batch, T tokens, D model width, H query heads, G key/value heads, d head width.

    q, k, v = x Wq, x Wk, x Wv          (with the family's biases and q/k norms)
    y_t = softmax(q_t k_j / sqrt(d)) v_j    over the last ``span`` tokens j <= t, rotary on q and k
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lawcat_edge.families import Geometry
from lawcat_edge.rotary import Tables, local_tables, rotate, rotate_pairs


@dataclass
class KeyValueState:
    """What a full-attention layer remembers: the keys and values that exist, at most ``span - 1`` of them.

    key, value [B, G, n, d]: un-rotated, newest last. seen: tokens read so far.
    """

    key: Tensor
    value: Tensor
    seen: int = 0


class SoftmaxAttention(nn.Module):
    """The teacher's attention of one layer, with its projections; as a student, over ``span`` tokens.

    span None: all tokens (or the teacher's own sliding window, which bounds any span).
    """

    def __init__(self, teacher: Any, geometry: Geometry, span: int | None = None) -> None:
        super().__init__()
        self.q_proj, self.k_proj = teacher.q_proj, teacher.k_proj
        self.v_proj, self.o_proj = teacher.v_proj, teacher.o_proj
        self.q_norm = teacher.q_norm if geometry.qk_norm else None
        self.k_norm = teacher.k_norm if geometry.qk_norm else None
        self.geometry, self.span = geometry, span

    def new_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that LAWCAT adds, by adapter tensor name."""
        return {}

    # -- projections -----------------------------------------------------------------------------------------

    def project(self, x: Tensor, *, teacher: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """x [B,T,D] -> q [B,T,H,d], k and v [B,T,G,d]; ``teacher`` leaves low-rank updates out."""
        d = self.geometry.head_dim
        q, k, v = (
            without_lora(proj, teacher)(x).unflatten(-1, (-1, d))
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v

    def out(self, y: Tensor, *, teacher: bool = False) -> Tensor:
        return without_lora(self.o_proj, teacher)(y.flatten(2))

    # -- attention before the output projection --------------------------------------------------------------

    def softmax(self, q: Tensor, k: Tensor, v: Tensor, rotary: Tables) -> Tensor:
        """The teacher's attention over a whole text: [B,T,H,d]."""
        return self._attend_from_start(q, k, v, rotary, self.geometry.sliding_window)

    def full_attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rotary: Tables,
        state: KeyValueState | None,
        span: int | None = None,
    ) -> tuple[Tensor, KeyValueState | None]:
        """The student's softmax attention over the last ``span`` tokens, y [B,T,H,d], and the state after it.

        rotary: tables at the tokens' positions, for a text that starts here (without a state, and none is
        returned). With a state, stored keys and new ones are rotated at local positions.
        """
        limit = self.geometry.sliding_window
        if span is not None and (limit is None or span < limit):
            limit = span
        if state is None:
            return self._attend_from_start(q, k, v, rotary, limit), None
        T, n = q.shape[1], state.key.shape[2]
        keys = torch.cat([state.key.to(k.dtype), k.transpose(1, 2)], 2)
        values = torch.cat([state.value.to(v.dtype), v.transpose(1, 2)], 2)
        cos, sin = local_tables(self.geometry, n + T, q)
        y = F.scaled_dot_product_attention(
            rotate_pairs(q.transpose(1, 2), cos[n:], sin[n:]),
            rotate_pairs(keys, cos, sin),
            values,
            attn_mask=_visible(T, n, limit, q.device),
            enable_gqa=True,
        )
        kept = n + T if limit is None else min(n + T, limit - 1)
        after = KeyValueState(keys[:, :, n + T - kept :], values[:, :, n + T - kept :], state.seen + T)
        return y.transpose(1, 2), after

    def attend(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, rotary: Tables, state: KeyValueState | None
    ) -> tuple[Tensor, KeyValueState | None]:
        """The student's attention of this layer; x is the normed input, which softmax needs nothing of."""
        return self.full_attention(q, k, v, rotary, state, self.span)

    def empty_state(self, batch: int, device: torch.device) -> Any:
        g = self.geometry
        none = torch.zeros(batch, g.num_kv_heads, 0, g.head_dim, device=device)
        return KeyValueState(none, none.clone())

    def _attend_from_start(
        self, q: Tensor, k: Tensor, v: Tensor, rotary: Tables, limit: int | None
    ) -> Tensor:
        q, k = rotate(q, rotary), rotate(k, rotary)
        T = q.shape[1]
        mask = None if limit is None or limit >= T else _visible(T, 0, limit, q.device)
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=mask,
            is_causal=mask is None,
            enable_gqa=True,
        )
        return y.transpose(1, 2)


def without_lora(proj: Any, teacher: bool) -> Any:
    """The projection as the teacher has it, or with its low-rank update where it has one."""
    return getattr(proj, "base_layer", proj) if teacher else proj


def _visible(T: int, n: int, limit: int | None, device: torch.device) -> Tensor:
    """Which of n stored and T new tokens each new token sees: [T, n+T]."""
    ages = torch.arange(n, n + T, device=device)[:, None] - torch.arange(n + T, device=device)
    return (ages >= 0) & (ages < (n + T if limit is None else limit))
