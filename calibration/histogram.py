"""Values of one tensor, counted as they stream by; ranges for 8 bits from the counts.

The bins cover ±2^e and are as many whatever e: a value beyond doubles the range, and neighbouring bins become
one. So two histograms of the same tensor merge without loss, in any order.
"""

from __future__ import annotations

import math
from typing import Annotated, Any

import numpy as np
from msgspec import Meta, Struct

from lawcat_edge.export.schemes import METHODS
from lawcat_edge.runtime import schema
from lawcat_edge.runtime.errors import LawcatError

BINS = 2048
_ENTROPY_BINS = 512  # onnxruntime's search takes time with the square of them
_LEAST, _MOST = -60, 100  # exponents


_Value = Annotated[float, Meta(ge=-(2.0**_MOST), le=2.0**_MOST)]


class _Stored(Struct, forbid_unknown_fields=True):
    """The JSON of a histogram."""

    low: _Value
    high: _Value
    exponent: Annotated[int, Meta(ge=_LEAST, le=_MOST)]
    first: Annotated[int, Meta(ge=0, le=BINS)]
    counts: list[Annotated[int, Meta(ge=0, lt=1 << 53)]]


class Histogram:
    """low, high: the smallest and largest value seen; counts int64 [BINS] over ±2^exponent."""

    def __init__(self) -> None:
        self.exponent, self.low, self.high = _LEAST, math.inf, -math.inf
        self.counts = np.zeros(BINS, np.int64)

    @property
    def total(self) -> int:
        return int(self.counts.sum())

    def add(self, values: np.ndarray) -> None:
        """Count values of any shape. Raises LawcatError when one is not finite."""
        low, high = float(values.min()), float(values.max())
        if not (math.isfinite(low) and math.isfinite(high)):
            raise LawcatError("An activation is NaN or infinite; nothing can be calibrated on this model.")
        self.low, self.high = min(self.low, low), max(self.high, high)
        # frexp gives |x| < 2^e, strictly, so that the top of the range is a bin's too
        self._grow(math.frexp(max(-low, high))[1])
        scale = BINS / 2 ** (self.exponent + 1)
        bins = np.floor(values.ravel().astype(np.float64) * scale).astype(np.int64) + BINS // 2
        self.counts += np.bincount(bins, minlength=BINS)

    def merge(self, other: Histogram) -> None:
        self._grow(other.exponent)
        aligned = other.copy()
        aligned._grow(self.exponent)
        self.counts += aligned.counts
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)

    def copy(self) -> Histogram:
        twin = Histogram()
        twin.exponent, twin.low, twin.high = self.exponent, self.low, self.high
        twin.counts = self.counts.copy()
        return twin

    def _grow(self, exponent: int) -> None:
        while self.exponent < exponent:
            if not self.counts.any():  # nothing to move
                self.exponent = exponent
                return
            halved = self.counts.reshape(-1, 2).sum(1)
            self.counts = np.pad(halved, BINS // 4)
            self.exponent += 1

    def range(self, method: str, share: float = 0.9999) -> tuple[float, float]:
        """(low, high) that 8 bits should cover. share: of the values that ``percentile`` keeps inside.

        minmax: all that was seen. entropy: onnxruntime's search for the least KL between the values and their
        rounding. mse: the symmetric bound of least expected squared error, rounding and cutting together.
        """
        if self.total == 0:
            raise LawcatError("No activation was seen, so there is no range; calibrate on more text.")
        if method == "minmax":
            return self.low, self.high
        if method == "percentile":
            return self._percentile(share)
        if method == "entropy":
            return self._entropy()
        if method == "mse":
            return self._mse()
        raise LawcatError(f"Unknown method {method!r}; choose one of {', '.join(METHODS)}.")

    @property
    def edges(self) -> np.ndarray:
        return np.linspace(-(2.0**self.exponent), 2.0**self.exponent, BINS + 1)

    def _percentile(self, share: float) -> tuple[float, float]:
        if not 0.5 < share <= 1:
            raise LawcatError(f"The share of a percentile must be above 0.5 and at most 1, not {share}.")
        below = self.counts.cumsum() / self.total
        outside = (1 - share) / 2
        first = int(np.searchsorted(below, outside, side="right"))
        last = int(np.searchsorted(below, 1 - outside, side="left"))
        return max(self.low, float(self.edges[first])), min(
            self.high, float(self.edges[min(last, BINS - 1) + 1])
        )

    def _entropy(self) -> tuple[float, float]:
        from onnxruntime.quantization.calibrate import HistogramCollector

        counts = self.counts.reshape(_ENTROPY_BINS, -1).sum(1)
        edges = self.edges[:: BINS // _ENTROPY_BINS]
        collector = HistogramCollector("entropy", False, _ENTROPY_BINS, 128, 99.99, "same")
        seen = counts, edges, np.float64(self.low), np.float64(self.high)
        low, high = collector.get_entropy_threshold(seen, 128)
        return float(low), float(high)

    def _mse(self) -> tuple[float, float]:
        middles = np.abs((self.edges[1:] + self.edges[:-1]) / 2)
        top = max(-self.low, self.high)
        best, bound = math.inf, top
        for candidate in np.geomspace(top / 256, top, 128):
            step = candidate / 127
            cut = np.where(middles > candidate, (middles - candidate) ** 2, step * step / 12)
            error = float(cut @ self.counts)
            if error < best:
                best, bound = error, float(candidate)
        return -bound, bound

    # -- as JSON ---------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Counts without the empty bins at both ends."""
        used = np.flatnonzero(self.counts)
        first, last = (int(used[0]), int(used[-1]) + 1) if len(used) else (0, 0)
        return {
            "low": self.low,
            "high": self.high,
            "exponent": self.exponent,
            "first": first,
            "counts": self.counts[first:last].tolist(),
        }

    @classmethod
    def from_dict(cls, data: Any, name: str) -> Histogram:
        """Check every field; LawcatError names the tensor."""

        def wrong(where: str, problem: str) -> LawcatError:
            return LawcatError(f"The range of {name!r} is damaged ({where} {problem}); calibrate again.")

        stored = schema.convert(data, _Stored, wrong)
        low, high, first, counts = stored.low, stored.high, stored.first, stored.counts
        if not low <= high or max(-low, high) > 2.0**stored.exponent:
            raise wrong("low", "and high do not fit the exponent")
        if first + len(counts) > BINS or not any(counts):
            raise wrong("counts", "do not fit the bins")
        found = cls()
        found.low, found.high, found.exponent = low, high, stored.exponent
        found.counts[first : first + len(counts)] = counts
        return found
