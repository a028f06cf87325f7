"""The LAWCAT attention layer (arXiv 2509.18467): training form, prefill and recurrent step in one place.

Letters: B batch, T tokens, D model width, H query heads, G key/value heads, d head width, f feature width,
F = 2 f, K convolution taps, r = K - 1, w window.

    q, k, v = x Wq, x Wk, x Wv                       the teacher's own projections
    phi_q = phi(conv(q)),  phi_k = phi(conv(k))      phi(x) = [softmax(x W), softmax(-x W)]
    g = logsigmoid(x A B + b) / 16                   log-decay, one per key channel
    S_t = exp(g_t) S_{t-1} + phi_k (x) [v_t, 1]
    [n, z] = phi_q^T S_t
    y = (sigmoid(omega) N_w + n) / (sigmoid(omega) Z_w + z + eps)

N_w and Z_w are numerator and denominator of softmax attention over the last w tokens, each row scaled by its
largest score; without a window y = n / (z + eps).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lawcat_edge.config import LawcatConfig
from lawcat_edge.families import Geometry
from lawcat_edge.ops.conv import conv_feature
from lawcat_edge.ops.gla import gated_linear_attention, normalised_gla
from lawcat_edge.parameters import parameters_of_layer


@dataclass
class LayerState:
    """What one layer remembers; its size does not depend on the length of the text.

    conv [B, 2 H d, r]: last r pre-convolution vectors, q channels then (repeated) k channels, oldest first.
    recurrent [B, H, F, d+1]: the state S, the normaliser in the last column; float32.
    window_key, window_value [B, G, w-1, d]: un-rotated keys and values, newest last (None without a window).
    seen: tokens read so far (rotary positions of the linear branch; how much of the window is filled).
    """

    conv: Tensor
    recurrent: Tensor
    window_key: Tensor | None = None
    window_value: Tensor | None = None
    seen: int = 0


class LawcatAttention(nn.Module):
    """Drop-in for one layer's self-attention; keeps the teacher's projections and can run as the teacher.

    layer, seed: where the new parameters' initial values come from (``lawcat_edge.parameters``).
    """

    conv_q: nn.Parameter
    conv_k: nn.Parameter
    feature: nn.Parameter
    gate_a: nn.Parameter
    gate_b: nn.Parameter
    gate_bias: nn.Parameter
    omega: nn.Parameter | None

    def __init__(
        self,
        teacher: Any,
        geometry: Geometry,
        config: LawcatConfig,
        backend: str = "auto",
        layer: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.q_proj, self.k_proj = teacher.q_proj, teacher.k_proj
        self.v_proj, self.o_proj = teacher.v_proj, teacher.o_proj
        self.q_norm = teacher.q_norm if geometry.qk_norm else None
        self.k_norm = teacher.k_norm if geometry.qk_norm else None
        self.geometry, self.config, self.backend = geometry, config, backend
        self.omega = None
        for name, parameter in parameters_of_layer(geometry, config).items():
            setattr(self, name, nn.Parameter(torch.tensor(parameter.initial(name, layer, seed))))

    def new_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that LAWCAT adds, by their names in ``lawcat_edge.parameters``."""
        return {name: getattr(self, name) for name in parameters_of_layer(self.geometry, self.config)}

    def empty_state(self, batch: int, device: torch.device) -> LayerState:
        g, c = self.geometry, self.config
        zeros = lambda *shape: torch.zeros(batch, *shape, device=device)  # noqa: E731
        window = (g.num_kv_heads, c.window - 1, g.head_dim)
        return LayerState(
            conv=zeros(2 * g.num_heads * g.head_dim, c.conv_kernel - 1),
            recurrent=zeros(g.num_heads, c.key_dim, g.head_dim + 1),
            window_key=zeros(*window) if c.window else None,
            window_value=zeros(*window) if c.window else None,
        )

    # -- projections -----------------------------------------------------------------------------------------

    def project(self, x: Tensor, *, teacher: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """x [B,T,D] -> q [B,T,H,d], k and v [B,T,G,d]; ``teacher`` leaves low-rank updates out."""
        d = self.geometry.head_dim
        q, k, v = (
            (getattr(proj, "base_layer", proj) if teacher else proj)(x).unflatten(-1, (-1, d))
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v

    def out(self, y: Tensor, *, teacher: bool = False) -> Tensor:
        proj = getattr(self.o_proj, "base_layer", self.o_proj) if teacher else self.o_proj
        return proj(y.flatten(2))

    # -- the teacher -----------------------------------------------------------------------------------------

    def softmax(self, q: Tensor, k: Tensor, v: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """The teacher's attention before its output projection: [B,T,H,d]."""
        q, k = rotate(q, rotary), rotate(k, rotary)
        T, limit = q.shape[1], self.geometry.sliding_window
        mask = None
        if limit is not None and limit < T:
            ages = torch.arange(T, device=q.device)[:, None] - torch.arange(T, device=q.device)
            mask = (ages >= 0) & (ages < limit)
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=mask,
            is_causal=mask is None,
            enable_gqa=True,
        )
        return y.transpose(1, 2)

    # -- the student -----------------------------------------------------------------------------------------

    def linear(
        self,
        x: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rotary: tuple[Tensor, Tensor],
        state: LayerState | None,
    ) -> tuple[Tensor, LayerState | None]:
        """The student's attention before the output projection, y [B,T,H,d], and the state after it.

        rotary: cos and sin [T,d] at the tokens' positions, in use by the linear branch (``rope``) alone; the
        window rotates at positions of its own. Without a state, the text starts here and none is returned.
        """
        g, c = self.geometry, self.config
        H, d = g.num_heads, g.head_dim
        conv_q = conv_k = S0 = z0 = None
        if state is not None:
            conv_q, conv_k = state.conv[:, : H * d], state.conv[:, H * d :]
            S0, z0 = state.recurrent[..., :-1], state.recurrent[..., -1]
        ql, kl = (rotate(q, rotary), rotate(k, rotary)) if c.rope else (q, k)
        phi_q, conv_q = conv_feature(ql, self.conv_q, self.feature, conv_q, self.backend)
        phi_k, conv_k = conv_feature(kl, self.conv_k, self.feature, conv_k, self.backend)
        decay = self.log_decay(x)
        if not c.window:
            y, S, z = normalised_gla(phi_q, phi_k, v, decay, S0, z0, eps=c.eps, backend=self.backend)
        else:
            n, den, S, z = gated_linear_attention(phi_q, phi_k, v, decay, S0, z0, backend=self.backend)
            y = self.mix(n, den, *self.window_attention(q, k, v, state))
        if state is None:
            return y.to(v.dtype), None
        assert conv_q is not None
        assert conv_k is not None
        T, w = x.shape[1], c.window
        after = LayerState(
            torch.cat([conv_q, conv_k], 1), torch.cat([S, z[..., None]], -1), seen=state.seen + T
        )
        if w:
            assert state.window_key is not None
            assert state.window_value is not None
            keys = torch.cat([state.window_key, k.transpose(1, 2)], 2)
            values = torch.cat([state.window_value, v.transpose(1, 2)], 2)
            after.window_key, after.window_value = keys[:, :, T:], values[:, :, T:]
        return y.to(v.dtype), after

    def mix(self, n: Tensor, den: Tensor, N_w: Tensor, Z_w: Tensor) -> Tensor:
        """y [B,T,H,d] from n [B,T,H,d] and den [B,T,H] of the linear branch and from the window's parts."""
        assert self.omega is not None
        share = self.omega.sigmoid()[:, None]  # [H,1]
        return (share * N_w + n) / (share * Z_w + den[..., None] + self.config.eps)

    def log_decay(self, x: Tensor) -> Tensor:
        """g [B,T,G,F] in float32 whatever the autocast: errors here accumulate through the recurrence."""
        with torch.autocast(x.device.type, enabled=False):
            dtype = self.gate_a.dtype
            logits = (x.to(dtype) @ self.gate_a) @ self.gate_b + self.gate_bias
            return F.logsigmoid(logits).unflatten(-1, (-1, self.config.key_dim)) / self.config.gate_divisor

    def window_attention(
        self, q: Tensor, k: Tensor, v: Tensor, state: LayerState | None
    ) -> tuple[Tensor, Tensor]:
        """Softmax attention over the last w tokens: numerator [B,T,H,d], denominator [B,T,H,1], row-scaled.

        Queries in blocks of c see c + w - 1 keys. Scores depend on distance alone, so every block uses the
        same local positions: they stay right past any length.
        """
        B, T, H, d = q.shape
        G, w = k.shape[2], self.config.window
        c = min(max(w, 16), T)
        N = -(-T // c)
        past, filled = w - 1, 0 if state is None else min(state.seen, w - 1)

        def with_past(x: Tensor, old: Tensor | None) -> Tensor:  # -> [B,G,N,c+w-1,d]
            x = x.transpose(1, 2)
            old = x.new_zeros(B, G, past, d) if old is None else old.to(x.dtype)
            x = F.pad(torch.cat([old, x], 2), (0, 0, 0, N * c - T))
            return x.unfold(2, c + past, c).transpose(-1, -2)

        keys = with_past(k, None if state is None else state.window_key)
        values = with_past(v, None if state is None else state.window_value)
        cos, sin = local_rotary(self.geometry, c + past, q.device, q.dtype)
        qs = F.pad(q.transpose(1, 2), (0, 0, 0, N * c - T)).reshape(B, G, H // G, N, c, d)
        qs = rotate_pairs(qs, cos[past:], sin[past:])
        keys = rotate_pairs(keys, cos, sin)
        scores = torch.einsum("bghnid,bgnjd->bghnij", qs, keys) * d**-0.5
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        i = torch.arange(c, device=q.device)[:, None]
        j = torch.arange(c + past, device=q.device)
        band = (j >= i) & (j <= i + past)  # [c, c+w-1]
        slot = torch.arange(N, device=q.device)[:, None] * c + j  # key index in [old, new]
        allowed = band & (slot >= past - filled)[:, None]  # [N,c,c+w-1]
        scores = scores.masked_fill(~allowed, -torch.inf)
        # The largest score does not cancel against the linear branch: it has a gradient of its own.
        weights = (scores - scores.amax(-1, keepdim=True)).exp()
        N_w = torch.einsum("bghnij,bgnjd->bghnid", weights.to(values.dtype), values)
        Z_w = weights.sum(-1, keepdim=True)
        merge = lambda x: x.reshape(B, H, N * c, -1)[:, :, :T].transpose(1, 2)  # noqa: E731
        return merge(N_w), merge(Z_w)


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding in the half-split layout of Llama: x [..., T, d], cos and sin [T, d]."""
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat([-right, left], -1) * sin


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """x [B,T,heads,d], rotary [T,d] each."""
    cos, sin = (part[:, None].to(x.dtype) for part in rotary)
    return rotate_pairs(x, cos, sin)


def rotary_tables(geometry: Geometry, start: int, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin [length, d] at positions start.., in float64, so that late positions stay exact."""
    positions = torch.arange(start, start + length, dtype=torch.float64, device=device)
    inverse = torch.from_numpy(geometry.inv_freq()).to(device)
    angles = (positions[:, None] * inverse).repeat(1, 2)
    scale = geometry.attention_scaling
    return angles.cos() * scale, angles.sin() * scale


def local_rotary(
    geometry: Geometry, length: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    cos, sin = rotary_tables(geometry, 0, length, device)
    return cos.to(dtype), sin.to(dtype)
