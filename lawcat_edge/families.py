"""The teachers that can be converted, and the numbers that describe one.

A family is supported when its attention is q, k, v, o projections (with or without biases and q/k norms)
under rotary embedding, and its MLP is SwiGLU behind RMSNorm. Anything else is refused by name.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated, Any

import numpy as np
from msgspec import Meta

from lawcat_edge.runtime import schema
from lawcat_edge.runtime.bundle.limits import HeadDim, Heads, HiddenSize, Layers, VocabSize
from lawcat_edge.runtime.engine.rotary import ROPE_TYPES, UnknownScalingError, scaled_frequencies
from lawcat_edge.runtime.errors import LawcatError

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True)
class Geometry:
    """Sizes and switches of a teacher; stored as JSON in the adapter and in the bundle.

    Widths count numbers, not bytes. ``rope_scaling`` is None or
    ``{"rope_type": "linear" | "llama3", ...}`` with the parameters of that type as transformers names them.
    ``sliding_window`` is the teacher's own, in tokens.
    """

    family: str
    hidden_size: HiddenSize
    num_layers: Layers
    num_heads: Heads
    num_kv_heads: Heads
    head_dim: HeadDim
    intermediate_size: Annotated[int, Meta(ge=1, le=1 << 20)]
    vocab_size: VocabSize
    tie_embeddings: bool
    rms_norm_eps: Annotated[float, Meta(ge=1e-30, le=1.0)]
    rope_theta: Annotated[float, Meta(ge=1.0, le=1e12)]
    rope_scaling: Any = None  # ``inv_freq`` checks it
    attention_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_window: Annotated[int, Meta(ge=1)] | None = None
    max_positions: Annotated[int, Meta(ge=1, le=1 << 31)] = 2048

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise LawcatError(
                f"The {self.family!r} family is not supported; take a teacher of {', '.join(FAMILIES)}."
            )
        schema.check_fields(self, _wrong)
        if self.num_heads % self.num_kv_heads:
            raise LawcatError(
                f"{self.num_heads} heads are no multiple of {self.num_kv_heads} kv heads; check config.json."
            )
        if self.head_dim % 2:
            raise LawcatError(f"head_dim must be even for the rotary embedding, not {self.head_dim}.")
        self.inv_freq()  # refuses an unknown or incomplete rope_scaling now

    @property
    def groups(self) -> int:
        """Query heads that share one key/value head."""
        return self.num_heads // self.num_kv_heads

    @property
    def query_width(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def attention_scaling(self) -> float:
        """Factor on cos and sin; 1 for every supported rope type."""
        return 1.0

    def inv_freq(self) -> np.ndarray:
        """Rotary frequencies, radians per token, float64 [head_dim / 2], as transformers defines them."""
        scaling = self.rope_scaling
        try:
            return scaled_frequencies(self.head_dim, self.rope_theta, scaling)
        except UnknownScalingError as error:
            raise LawcatError(
                f"Rope scaling {error.kind!r} is not supported; take a teacher with {', '.join(ROPE_TYPES)}."
            ) from None
        except (KeyError, TypeError, ValueError, ZeroDivisionError):
            raise LawcatError(
                f"Rope scaling {scaling!r} is incomplete or wrong; check config.json."
            ) from None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Geometry:
        """From JSON; an unknown or missing key is the user's error."""
        return schema.build(data, cls, _wrong, "The geometry")

    @classmethod
    def from_hf(cls, config: Any) -> Geometry:
        """From a transformers config object or its dict (``config.json``), old and new rope keys alike."""
        data = config.to_dict() if hasattr(config, "to_dict") else config
        if not isinstance(data, dict):
            raise LawcatError("config.json must hold one JSON object; get the model anew.")
        family = str(data.get("model_type"))
        if family not in FAMILIES:
            raise LawcatError(
                f"The {family!r} family is not supported; take a teacher of {', '.join(FAMILIES)}."
            )
        if data.get("hidden_act", "silu") != "silu":
            raise LawcatError(
                f"Activation {data['hidden_act']!r} is not supported; take a teacher with 'silu'."
            )
        try:
            hidden, heads = data["hidden_size"], data["num_attention_heads"]
            rope = data.get("rope_parameters") or {**(data.get("rope_scaling") or {})}
            kind = rope.get("rope_type", rope.get("type", "default"))
            partial = rope.get("partial_rotary_factor")
            if partial is not None and float(partial) != 1.0:
                raise LawcatError("A partial rotary embedding is not supported; take another teacher.")
            theta = float(rope.get("rope_theta") or data.get("rope_theta") or 10000.0)
            extra = {
                key: value for key, value in rope.items() if key not in ("rope_theta", "type", "rope_type")
            }
            bias = bool(data.get("attention_bias", False))
            # Qwen2 always has q, k, v biases and none on o; in Llama and Qwen3 one switch covers all four.
            return cls(
                family=family,
                hidden_size=hidden,
                num_layers=data["num_hidden_layers"],
                num_heads=heads,
                num_kv_heads=data.get("num_key_value_heads") or heads,
                head_dim=data.get("head_dim") or hidden // heads,
                intermediate_size=data["intermediate_size"],
                vocab_size=data["vocab_size"],
                tie_embeddings=bool(data.get("tie_word_embeddings", False)),
                rms_norm_eps=float(data["rms_norm_eps"]),
                rope_theta=theta,
                rope_scaling=None if kind == "default" else {"rope_type": kind, **extra},
                attention_bias=family == "qwen2" or (bias and family != "mistral"),
                output_bias=bias and family in ("llama", "qwen3"),
                mlp_bias=bool(data.get("mlp_bias", False)) and family == "llama",
                qk_norm=family == "qwen3",
                sliding_window=_own_window(family, data),
                max_positions=data.get("max_position_embeddings", 2048),
            )
        except KeyError as missing:
            raise LawcatError(f"config.json has no {missing}; the teacher's folder is incomplete.") from None
        except (TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
            raise LawcatError(f"config.json holds a wrong value ({error}); get the model anew.") from None


def _own_window(family: str, data: dict[str, Any]) -> int | None:
    """The teacher's sliding window where it is the same in all layers; a mixture is refused."""
    window = data.get("sliding_window")
    if family == "llama" or window is None:
        return None
    if family == "mistral":
        return int(window)
    if not data.get("use_sliding_window", False):
        return None
    # Qwen: layers from max_window_layers on slide
    layers = data["num_hidden_layers"]
    kinds = data.get("layer_types") or [
        "sliding_attention" if i >= data.get("max_window_layers", layers) else "full_attention"
        for i in range(layers)
    ]
    if len(set(kinds)) > 1:
        raise LawcatError(
            "A teacher that mixes sliding and full attention is not supported; take another one."
        )
    return int(window) if kinds[0] == "sliding_attention" else None


def _wrong(where: str, problem: str) -> LawcatError:
    return LawcatError(f"{where} {problem}; check config.json, or copy the file anew.")
