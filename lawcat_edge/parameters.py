"""What LAWCAT adds to one layer: name, shape and initial value of every parameter, the one table of them.

The model is built from it, an adapter's file is checked against it, and an export without an adapter stores
its initial values: numpy draws them from (seed, layer, name) alone, so all of these agree to the last bit.
Letters as in ``lawcat_edge.attention``.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from lawcat_edge.config import LawcatConfig
from lawcat_edge.families import Geometry

TAP = 0.001  # of the convolution's older taps; the newest is 1, so that it starts as nearly nothing


@dataclass(frozen=True)
class Parameter:
    """Shape, and the start: normal numbers of this standard deviation, or taps, or zeros (std 0)."""

    shape: tuple[int, ...]
    std: float = 0.0
    taps: bool = False

    def initial(self, name: str, layer: int, seed: int) -> np.ndarray:
        """float32 of ``shape``, the same on every machine for the same name, layer and seed."""
        if self.taps:
            value = np.full(self.shape, TAP, np.float32)
            value[..., -1] = 1.0
            return value
        if not self.std:
            return np.zeros(self.shape, np.float32)
        generator = np.random.default_rng([seed, layer, zlib.crc32(name.encode())])
        return generator.standard_normal(self.shape, np.float32) * np.float32(self.std)


def parameters_of_layer(geometry: Geometry, config: LawcatConfig) -> dict[str, Parameter]:
    """The parameters of one linear-attention layer by name (the paper's initialisation)."""
    H, G, d, D = geometry.num_heads, geometry.num_kv_heads, geometry.head_dim, geometry.hidden_size
    K, f, F, rank = config.conv_kernel, config.feature_dim, config.key_dim, config.gate_rank
    table = {
        "conv_q": Parameter((H * d, K), taps=True),
        "conv_k": Parameter((H * d, K), taps=True),
        "feature": Parameter((H, d, f), std=d**-0.5),
        "gate_a": Parameter((D, rank), std=0.006),
        "gate_b": Parameter((rank, G * F), std=0.006),
        "gate_bias": Parameter((G * F,)),
    }
    if config.window:
        table["omega"] = Parameter((H,))
    return table


def parameter_shapes(geometry: Geometry, config: LawcatConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter of the model, by its name in an adapter (``layers.3.gate_a``)."""
    return {f"layers.{i}.{name}": parameter.shape for i, name, parameter in _of_all_layers(geometry, config)}


def initial_tensors(geometry: Geometry, config: LawcatConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Initial value of every parameter of the model, by its name in an adapter: where distillation begins."""
    return {
        f"layers.{i}.{name}": parameter.initial(name, i, seed)
        for i, name, parameter in _of_all_layers(geometry, config)
    }


def _of_all_layers(geometry: Geometry, config: LawcatConfig) -> Iterator[tuple[int, str, Parameter]]:
    """(layer, name, parameter); a full-attention layer has none."""
    table = parameters_of_layer(geometry, config)
    for i in range(geometry.num_layers):
        if not config.full_attention(i):
            for name, parameter in table.items():
                yield i, name, parameter
