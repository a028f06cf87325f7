"""Softmax attention with the teacher's projections: the teacher itself, and the layers that a hybrid keeps.

Letters: B batch, T tokens, D model width, H query heads, G key/value heads, d head width.

    q, k, v = x Wq, x Wk, x Wv          (with the family's biases and q/k norms)
    y_t = softmax(q_t k_j / sqrt(d)) v_j    over the tokens j <= t that its ``Span`` has, rotary on q and k
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lawcat_edge.families import Geometry
from lawcat_edge.rotary import Tables, local_tables, rotate, rotate_pairs
from lawcat_edge.runtime.bundle.span import Span


@dataclass
class KeyValueState:
    """What a full-attention layer remembers: the keys and values that exist, n = ``span.kept(seen)``.

    key, value [B, G, n, d]: un-rotated, newest last. seen: tokens read so far.
    """

    key: Tensor
    value: Tensor
    seen: int = 0


class SoftmaxAttention(nn.Module):
    """The teacher's attention of one layer, with its projections; as a student, over ``span``.

    span None: all tokens (or the teacher's own sliding window, which bounds any span).
    """

    def __init__(self, teacher: Any, geometry: Geometry, span: Span | None = None) -> None:
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
        span: Span | None = None,
    ) -> tuple[Tensor, KeyValueState | None]:
        """The student's softmax attention over ``span``, y [B,T,H,d], and the state after it.

        rotary: tables at the tokens' positions, for a text that starts here (without a state, and none is
        returned). With a state, stored keys and new ones are rotated at local positions.
        """
        if span is not None and span.sinks:
            if state is None and q.shape[1] <= span.tokens:
                return self._attend_from_start(q, k, v, rotary, None), None
            y, after = self._attend_in_steps(q, k, v, state, span)
            return y, None if state is None else after
        limit = self.geometry.sliding_window
        if span is not None and (limit is None or span.tokens < limit):
            limit = span.tokens
        if state is None:
            return self._attend_from_start(q, k, v, rotary, limit), None
        y, keys, values = self._attend_from_state(q, k, v, state, limit)
        n = keys.shape[2]
        kept = n if limit is None else min(n, limit - 1)
        return y, KeyValueState(keys[:, :, n - kept :], values[:, :, n - kept :], state.seen + q.shape[1])

    def _attend_in_steps(
        self, q: Tensor, k: Tensor, v: Tensor, state: KeyValueState | None, span: Span
    ) -> tuple[Tensor, KeyValueState]:
        """Between two moments at which rows are forgotten attention is causal over what is remembered.

        Local positions keep those of the sinks and of the others consecutive.
        """
        state = state or self.empty_state(q.shape[0], q.device)
        outputs, at, T = [], 0, q.shape[1]
        while at < T:
            part = slice(at, at + span.room(state.key.shape[2]))
            y, keys, values = self._attend_from_state(q[:, part], k[:, part], v[:, part], state, None)
            outputs.append(y)
            at += y.shape[1]
            if keys.shape[2] == span.tokens:
                keys, values = (
                    torch.cat([x[:, :, : span.sinks], x[:, :, span.sinks + span.step :]], 2)
                    for x in (keys, values)
                )
            state = KeyValueState(keys, values, state.seen + y.shape[1])
        return torch.cat(outputs, 1), state

    def _attend_from_state(
        self, q: Tensor, k: Tensor, v: Tensor, state: KeyValueState, limit: int | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """y [B,T,H,d] over the last ``limit`` of the stored tokens and new ones, and all keys and values."""
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
        return y.transpose(1, 2), keys, values

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
