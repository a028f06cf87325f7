"""Weights to whole numbers and back: what a product stores, chosen by rounding to nearest.

    weight = scale * (quantised + offset)

with one scale for each block of a row (one for the whole row where the product is an integer one), and an
offset only where the product asks for it. Scales are kept in float16 and chosen as such, so that nothing is
lost when they are written. ``calibration.gptq`` chooses by what a text says matters, on the same grid.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from lawcat_edge.export.schemes import Linear

OFFSET_STEPS = 16
"""Offsets are whole multiples of 1/16 of a scale, in a byte each."""
_LEAST = np.float32(2.0**-24)  # the smallest float16
_CACHED = 1 << 16  # values
_SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)


@dataclass(frozen=True)
class Quantised:
    """quantised float32 [n, blocks, block], whole numbers; scales float32 [n, blocks]; offsets alike or
    None."""

    quantised: np.ndarray
    scales: np.ndarray
    offsets: np.ndarray | None = None

    def values(self) -> np.ndarray:
        """The weights that these stand for: [n, blocks * block]."""
        quantised = self.quantised if self.offsets is None else self.quantised + self.offsets[..., None]
        values: np.ndarray = quantised * self.scales[..., None]
        return values.reshape(len(quantised), -1)


Rounder = Callable[[np.ndarray], Quantised]
"""values [n, blocks, block] -> those quantised; rows do not depend on each other."""


def bounds(spec: Linear) -> tuple[int, int]:
    """The smallest and the largest quantised value. 8 and 7 bits are symmetric."""
    high = (1 << (spec.bits - 1)) - 1
    return (-high - 1 if spec.bits == 4 else -high), high


def blocked(rows: np.ndarray, spec: Linear) -> np.ndarray:
    """rows [n, K] -> [n, blocks, block], filled up with zeros."""
    n, K = rows.shape
    block = spec.block if spec.kind == "nbits" else K
    if K % block:
        rows = np.pad(rows, ((0, 0), (0, -K % block)))
    return rows.reshape(n, -1, block)


def nearest(values: np.ndarray, spec: Linear) -> Quantised:
    """Each value to the nearest one of the grid."""
    found = grid(values, spec)
    return Quantised(rounded(values, found, spec), found.scales, found.offsets)


def grid(values: np.ndarray, spec: Linear, weight: np.ndarray | None = None) -> Quantised:
    """Scales and offsets for values [n, blocks, block], with quantised values of no meaning.

    8 and 7 bits: the largest value is the last of the grid. 4 bits: the bound of least squared error, each
    position weighted by ``weight`` [blocks, block] where it is given. With offsets the grid covers least to
    most, which gives back a block that was of 16 evenly spaced values before (a GGUF in Q4_1, say).
    """
    if spec.bits != 4:
        return Quantised(values, as_float16(np.abs(values).max(-1) / np.float32(bounds(spec)[1])))
    if spec.offsets:
        least, most = np.minimum(values.min(-1), 0), np.maximum(values.max(-1), 0)
        scale = as_float16((most - least) / np.float32(15))
        offset = np.rint((least / scale + 8) * OFFSET_STEPS)
        return Quantised(values, scale, np.clip(offset, -128, 127).astype(np.float32) / OFFSET_STEPS)
    # a piece that fits the processor's cache at once, of the many passes over it
    rows = max(1, _CACHED // values[0].size)
    pieces = [_searched(values[k : k + rows], spec, weight) for k in range(0, len(values), rows)]
    return Quantised(values, np.concatenate(pieces))


def _searched(values: np.ndarray, spec: Linear, weight: np.ndarray | None) -> np.ndarray:
    """Scales of 4 bits: the best of some, each refitted to the quantised values that it gives."""
    low, high = bounds(spec)
    at = np.abs(values).argmax(-1)[..., None]
    # the value of largest size takes the end with one more step
    top = np.take_along_axis(values, at, -1)[..., 0] / np.float32(low)
    best, chosen = np.full(top.shape, np.inf, np.float32), as_float16(top)
    for shrink in _SHRINK:
        scale = as_float16(top * np.float32(shrink))
        quantised = np.clip(np.rint(values / scale[..., None]), low, high)
        mass = quantised if weight is None else quantised * weight
        power = (quantised * mass).sum(-1)  # the scale that suits these best
        scale = as_float16(np.where(power > 0, (values * mass).sum(-1) / np.maximum(power, 1e-30), scale))
        error = (values - quantised * scale[..., None]) ** 2
        error = (error if weight is None else error * weight).sum(-1)
        better = error < best
        best, chosen = np.where(better, error, best), np.where(better, scale, chosen)
    return chosen


def rounded(values: np.ndarray, found: Quantised, spec: Linear) -> np.ndarray:
    """The quantised values nearest to values on a grid."""
    scaled: np.ndarray = values / found.scales[..., None]
    if found.offsets is not None:
        scaled -= found.offsets[..., None]
    np.clip(np.rint(scaled, out=scaled), *bounds(spec), out=scaled)
    return scaled


def as_float16(scale: np.ndarray) -> np.ndarray:
    """The nearest float16 that is not zero, as float32."""
    half = np.asarray(scale, np.float32).astype(np.float16).astype(np.float32)
    return np.where(half == 0, _LEAST, half)
