"""Rotary angles for bundles with softmax attention, or a rotary linear branch (``rope``)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from lawcat_edge.runtime.errors import LawcatError


def inverse_frequencies(geometry: dict[str, Any]) -> np.ndarray:
    """Radians a token, float64 [d/2], for the rope types default, linear and llama3."""
    d = geometry["head_dim"]
    theta: Any = geometry.get("rope_theta")
    if type(theta) not in (int, float) or not 1 <= theta < 1e12:
        raise LawcatError("The bundle gives no valid rope_theta; export it again.")
    base = float(theta) ** -(np.arange(0, d, 2, dtype=np.float64) / d)
    scaling = geometry.get("rope_scaling") or {"rope_type": "default"}
    try:
        kind = scaling.get("rope_type")
        if kind == "default":
            return base
        factor = float(scaling["factor"])
        if kind == "linear":
            return _finite(base * (1 / factor))
        if kind == "llama3":
            low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
            turns = float(scaling["original_max_position_embeddings"]) * base / (2 * math.pi)
            # Slow dimensions are stretched by the factor, fast ones kept, those between blended.
            keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
            return _finite(base * keep + base * (1 / factor) * (1 - keep))
    except (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise LawcatError("The bundle's rope_scaling is incomplete; export it again.") from error
    raise LawcatError(f"The bundle uses rope scaling {str(kind)[:40]!r}, unknown here; update lawcat-edge.")


def _finite(frequencies: np.ndarray) -> np.ndarray:
    # Written so that a NaN fails too; a position times 1e4 is still an exact number.
    if not (np.abs(frequencies) <= 1e4).all():
        raise ValueError("not finite")
    return frequencies


def angles(frequencies: np.ndarray, start: int, count: int) -> np.ndarray:
    """Angles of positions start .. start+count-1, float64 [count, d/2]: both halves of a head turn alike."""
    return np.arange(start, start + count, dtype=np.float64)[:, None] * frequencies
