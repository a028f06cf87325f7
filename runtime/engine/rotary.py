"""Rotary angles for bundles with softmax attention, or a rotary linear branch (``rope``)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from lawcat_edge.runtime.errors import LawcatError

ROPE_TYPES = ("default", "linear", "llama3")


class UnknownScalingError(ValueError):
    """A rope type that is none of ``ROPE_TYPES``."""

    def __init__(self, kind: Any) -> None:
        super().__init__(f"rope scaling {str(kind)[:40]!r}")
        self.kind = kind


def scaled_frequencies(head_dim: int, theta: float, scaling: Any) -> np.ndarray:
    """Rotary frequencies as transformers defines them: radians a token, float64 [head_dim / 2].

    scaling: None, or {"rope_type": one of ROPE_TYPES, ...} with the parameters of that type as transformers
    names them. Raises UnknownScalingError for another type, and KeyError, TypeError, ValueError or
    ZeroDivisionError for parameters that are missing or make no sense.
    """
    base = float(theta) ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    kind = (
        "default" if scaling is None else scaling.get("rope_type") if isinstance(scaling, dict) else scaling
    )
    if kind not in ROPE_TYPES:
        raise UnknownScalingError(kind)
    if kind == "default":
        return base
    factor = float(scaling["factor"])
    if kind == "linear":
        return _finite(base * (1 / factor))
    low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
    old = float(scaling["original_max_position_embeddings"])
    if not min(factor, low, old, high - low) > 0:  # so that a NaN fails too
        raise ValueError("not above zero")
    revolutions = old * base / (2 * math.pi)
    # Slow dimensions are stretched by the factor, fast ones kept, those between blended.
    keep = np.clip((revolutions - low) / (high - low), 0.0, 1.0)
    return _finite(base * keep + base * (1 / factor) * (1 - keep))


def inverse_frequencies(geometry: dict[str, Any]) -> np.ndarray:
    """``scaled_frequencies`` of a bundle's geometry, of which nothing is trusted. Raises LawcatError."""
    theta: Any = geometry.get("rope_theta")
    if type(theta) not in (int, float) or not 1 <= theta < 1e12:
        raise LawcatError("The bundle gives no valid rope_theta; export it again.")
    try:
        return scaled_frequencies(geometry["head_dim"], theta, geometry.get("rope_scaling") or None)
    except UnknownScalingError as error:
        raise LawcatError(f"The bundle uses {error}, unknown here; update lawcat-edge.") from None
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise LawcatError("The bundle's rope_scaling is incomplete; export it again.") from error


def _finite(frequencies: np.ndarray) -> np.ndarray:
    # Written so that a NaN fails too; a position times 1e4 is still an exact number.
    if not (np.abs(frequencies) <= 1e4).all():
        raise ValueError("not finite")
    return frequencies


def angles(frequencies: np.ndarray, start: int, count: int) -> np.ndarray:
    """Angles of positions start .. start+count-1, float64 [count, d/2]: for both halves of a head."""
    found: np.ndarray = np.arange(start, start + count, dtype=np.float64)[:, None] * frequencies
    return found
