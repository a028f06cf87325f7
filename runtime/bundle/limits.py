"""What the numbers of a student may be, at most: of a teacher to convert and of a bundle to open.

They are far beyond any model and small enough that no product of them overflows or fills a memory.
"""

from __future__ import annotations

from typing import Literal, get_args

LayerType = Literal["linear_attention", "full_attention"]  # as transformers writes them in ``layer_types``
LAYER_TYPES: tuple[LayerType, ...] = get_args(LayerType)
WindowScaling = Literal["max_score", "softmax"]
MAX_LAYERS, MAX_WINDOW, MAX_SPAN = 1024, 8192, 1 << 24
MAX_TAPS, MAX_FEATURES, MAX_SINKS = 16, 1024, 64
GEOMETRY = {
    "hidden_size": 1 << 17,
    "num_layers": MAX_LAYERS,
    "num_heads": 4096,
    "num_kv_heads": 4096,
    "head_dim": 4096,
    "vocab_size": 1 << 22,
}
"""Every number of the geometry that the runner works with, and the largest value it may have."""
