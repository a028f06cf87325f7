"""What the numbers of a student may be, at most: of a teacher to convert and of a bundle to open.

They are far beyond any model and small enough that no product of them overflows or fills a memory.
"""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from msgspec import Meta

LayerType = Literal["linear_attention", "full_attention"]  # as transformers writes them in ``layer_types``
LAYER_TYPES: tuple[LayerType, ...] = get_args(LayerType)
WindowScaling = Literal["max_score", "softmax"]
MAX_LAYERS, MAX_WINDOW, MAX_SPAN = 1024, 8192, 1 << 24
MAX_TAPS, MAX_FEATURES, MAX_SINKS = 16, 1024, 64
# The numbers of the geometry that the runner works with.
HiddenSize = Annotated[int, Meta(ge=1, le=1 << 17)]
Layers = Annotated[int, Meta(ge=1, le=MAX_LAYERS)]
Heads = Annotated[int, Meta(ge=1, le=4096)]
HeadDim = Annotated[int, Meta(ge=1, le=4096)]
VocabSize = Annotated[int, Meta(ge=1, le=1 << 22)]
