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
largest score (``window_scaling`` "softmax": N_w is the softmax output and Z_w is 1); without a window
y = n / (z + eps).
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
from lawcat_edge.ops.window import window_attention
from lawcat_edge.parameters import parameters_of_layer
from lawcat_edge.rotary import Tables, rotate
from lawcat_edge.softmax_attention import SoftmaxAttention


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


class LawcatAttention(SoftmaxAttention):
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
        super().__init__(teacher, geometry)
        self.config, self.backend = config, backend
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

    def attend(  # type: ignore[override]
        self,
        x: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rotary: Tables,
        state: LayerState | None,
    ) -> tuple[Tensor, LayerState | None]:
        """The student's attention before the output projection, y [B,T,H,d], and the state after it.

        x [B,T,D] normed; q [B,T,H,d], k and v [B,T,G,d]. rotary: cos and sin [T,d] at the tokens' positions.
        Without a state, the text starts here and none is returned.
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
            y = self.mix(n, den, *self.window(q, k, v, rotary, state))
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
        if self.config.window_scaling == "softmax":
            N_w, Z_w = N_w / Z_w, torch.ones_like(Z_w)
        return (share * N_w + n) / (share * Z_w + den[..., None] + self.config.eps)

    def log_decay(self, x: Tensor) -> Tensor:
        """g [B,T,G,F] in float32 whatever the autocast: errors here accumulate through the recurrence."""
        with torch.autocast(x.device.type, enabled=False):
            dtype = self.gate_a.dtype
            logits = (x.to(dtype) @ self.gate_a) @ self.gate_b + self.gate_bias
            return F.logsigmoid(logits).unflatten(-1, (-1, self.config.key_dim)) / self.config.gate_divisor

    def window(
        self, q: Tensor, k: Tensor, v: Tensor, rotary: Tables, state: LayerState | None
    ) -> tuple[Tensor, Tensor]:
        """Numerator [B,T,H,d] and denominator [B,T,H,1] of softmax attention over the last w tokens."""
        past_key = past_value = None
        if state is not None:
            filled = min(state.seen, self.config.window - 1)
            assert state.window_key is not None
            assert state.window_value is not None
            past_key, past_value = (
                x[:, :, x.shape[2] - filled :] for x in (state.window_key, state.window_value)
            )
        return window_attention(
            q, k, v, self.config.window, self.geometry, rotary, past_key, past_value, self.backend
        )
