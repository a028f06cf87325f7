"""The settings of a student: one frozen dataclass, stored as JSON beside every artefact."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

from msgspec import Meta

from lawcat_edge.runtime import schema
from lawcat_edge.runtime.bundle.limits import (
    LAYER_TYPES,
    MAX_FEATURES,
    MAX_LAYERS,
    MAX_SINKS,
    MAX_SPAN,
    MAX_TAPS,
    MAX_WINDOW,
    LayerType,
    WindowScaling,
)
from lawcat_edge.runtime.bundle.span import Span
from lawcat_edge.runtime.errors import LawcatError

if TYPE_CHECKING:
    from lawcat_edge.families import Geometry

LINEAR, FULL = LAYER_TYPES
SINKS = 4  # as many as Xiao et al. (arXiv 2309.17453) found to be enough


@dataclass(frozen=True)
class LawcatConfig:
    """How softmax attention is replaced (LAWCAT, arXiv 2509.18467), and in which layers it stays.

    conv_kernel: taps K of the causal convolution on q and k.
    feature_dim: f; the feature map has width F = 2 f.
    gate_rank: inner width of the low-rank gate projection.
    gate_divisor: the log-decay is logsigmoid(...) divided by this.
    window: tokens of softmax attention mixed in (0: none).
    rope: rotary embedding on q and k of the linear branch.
    eps: added to the normaliser.
    layer_types: ``linear_attention`` (LAWCAT) or ``full_attention`` (the teacher's softmax attention) for
        every layer; empty: a pure LAWCAT student, as in the paper.
    attention_span: tokens that a full-attention layer sees, the newest included; 0 without such layers.
    attention_sinks: first tokens of the text that such a layer sees for ever (``Span``); 0 forgets them too.
    window_scaling: what the window adds to the common denominator. ``max_score``: its sums, each row scaled
        by its largest score. ``softmax``: its softmax output, with a weight of one.
    """

    conv_kernel: Annotated[int, Meta(ge=2, le=MAX_TAPS)] = 4
    feature_dim: Annotated[int, Meta(ge=1, le=MAX_FEATURES)] = 32
    gate_rank: Annotated[int, Meta(ge=1, le=1024)] = 16
    # Far below 1e-30 float32 has no eps left, and a normaliser of zero would divide.
    gate_divisor: Annotated[float, Meta(ge=1e-3, lt=1e6)] = 16.0
    window: Annotated[int, Meta(ge=0, le=MAX_WINDOW)] = 0
    rope: bool = False
    eps: Annotated[float, Meta(ge=1e-30, lt=1e6)] = 1e-6
    layer_types: Annotated[tuple[LayerType, ...], Meta(max_length=MAX_LAYERS)] = ()
    attention_span: Annotated[int, Meta(ge=0, le=MAX_SPAN)] = 0
    attention_sinks: Annotated[int, Meta(ge=0, le=MAX_SINKS)] = 0
    window_scaling: WindowScaling = "max_score"

    def __post_init__(self) -> None:
        schema.check_fields(self, _wrong)
        kinds = self.layer_types
        if kinds and LINEAR not in kinds:
            raise LawcatError("All layers keep full attention, which is the teacher itself; name fewer.")
        if (FULL in kinds) != (self.attention_span > 0):
            raise LawcatError(
                "attention_span must be at least 1 token where layers keep full attention, and 0 where none "
                f"does, not {self.attention_span}."
            )
        if self.attention_sinks and not (self.attention_span and self.span.possible):
            raise LawcatError(
                f"{self.attention_sinks} attention_sinks leave nothing else to see in an attention_span of "
                f"{self.attention_span} tokens; keep fewer, or a longer span."
            )

    @property
    def span(self) -> Span:
        """What full-attention layers see."""
        return Span(self.attention_span, self.attention_sinks)

    def full_attention(self, layer: int) -> bool:
        """Whether this layer keeps softmax attention."""
        return bool(self.layer_types) and self.layer_types[layer] == FULL

    @property
    def full_attention_layers(self) -> tuple[int, ...]:
        return tuple(i for i, kind in enumerate(self.layer_types) if kind == FULL)

    def with_full_attention(
        self, layers: Iterable[int], span: int, geometry: Geometry, sinks: int | None = None
    ) -> LawcatConfig:
        """The same student with full attention in these layers; none at all makes it a pure one.

        sinks: default 4 where the span has room for them and the teacher itself does not forget them.

        Raises LawcatError for a layer that does not exist or is named twice, for all of them, and for a span
        that is 0 or beyond the teacher's range.
        """
        chosen, count = list(layers), geometry.num_layers
        if not chosen:
            return replace(self, layer_types=(), attention_span=0, attention_sinks=0)
        for layer in chosen:
            if not 0 <= layer < count:
                raise LawcatError(f"There is no layer {layer}: the teacher has layers 0 to {count - 1}.")
            if chosen.count(layer) > 1:
                raise LawcatError(f"Layer {layer} is named twice as a full-attention layer; name it once.")
        kinds = tuple(FULL if i in chosen else LINEAR for i in range(count))
        if sinks is None:
            sinks = 0 if geometry.sliding_window or not Span(span, SINKS).possible else SINKS
        config = replace(self, layer_types=kinds, attention_span=span, attention_sinks=sinks)
        config.check_geometry(geometry)
        return config

    def check_geometry(self, geometry: Geometry) -> None:
        """Raise LawcatError where the layers named do not fit a teacher of this geometry."""
        if self.layer_types and len(self.layer_types) != geometry.num_layers:
            raise LawcatError(
                f"layer_types names {len(self.layer_types)} layers, the teacher has {geometry.num_layers}."
            )
        if self.attention_span > geometry.max_positions:
            raise LawcatError(
                f"The span ({self.attention_span} tokens) is beyond the teacher's range of "
                f"{geometry.max_positions}; lower --span."
            )
        if self.attention_sinks and geometry.sliding_window:
            raise LawcatError(
                f"The teacher itself sees {geometry.sliding_window} tokens back and no first ones, so its "
                "layers cannot keep attention sinks; set --sinks 0."
            )

    @property
    def key_dim(self) -> int:
        """F, the key width of the state."""
        return 2 * self.feature_dim

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "layer_types": list(self.layer_types)}

    @classmethod
    def for_geometry(cls, geometry: Geometry, **settings: Any) -> LawcatConfig:
        """The untrained student of a teacher: features half as wide as a head unless told otherwise."""
        return cls(**{"feature_dim": geometry.head_dim // 2, **settings})

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> LawcatConfig:
        if isinstance(data, dict) and isinstance(data.get("layer_types"), list):  # JSON has no tuples
            data = {**data, "layer_types": tuple(data["layer_types"])}
        return schema.build(data, cls, _wrong, "The LAWCAT config")


def _wrong(where: str, problem: str) -> LawcatError:
    return LawcatError(f"{where} {problem}; change it or copy the file anew.")
