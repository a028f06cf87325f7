"""Adapters of random tensors for a teacher that does not exist, for what only reads and writes them."""

from __future__ import annotations

import numpy as np

from lawcat_edge.adapter import Adapter
from lawcat_edge.config import LawcatConfig
from lawcat_edge.families import Geometry
from lawcat_edge.lora import LoraSettings

CONFIG = LawcatConfig(feature_dim=4, gate_rank=2, window=5)
GEOMETRY = Geometry(
    family="llama",
    hidden_size=12,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    intermediate_size=8,
    vocab_size=20,
    tie_embeddings=True,
    rms_norm_eps=1e-5,
    rope_theta=1e4,
)


def make_adapter(config: LawcatConfig = CONFIG, lora: LoraSettings | None = None, seed: int = 0) -> Adapter:
    empty = Adapter(config, GEOMETRY, "toy", "ab" * 32, {}, lora, {"stages": {}})
    rng = np.random.default_rng(seed)
    tensors = {
        name: rng.standard_normal(shape).astype(np.float32) for name, shape in empty.expected_shapes().items()
    }
    return Adapter(config, GEOMETRY, "toy", "ab" * 32, tensors, lora, {"stages": {}})
