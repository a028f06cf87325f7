"""Rounding by what a text says matters (GPTQ, Frantar et al., arXiv 2210.17323), block by block of rows.

Rounding W to Q costs tr((W − Q) M (W − Q)ᵀ) in the product's output, with M = E[x xᵀ] of its input, which is
the Hessian of that cost but for a factor of 2. Columns are rounded one after another, those with the largest
inputs first, and the error of each is made good by the columns that are still free: with U the upper Cholesky
factor of M⁻¹, row j of it says by how much.

Scales are chosen beforehand, by least squares weighted with the diagonal of M, and rows do not depend on each
other; so a matrix of any height streams through in blocks of rows, and memory is that of M and of one block.
"""

from __future__ import annotations

import hashlib
import json

import numpy as np

from lawcat_edge.calibration.hessian import Hessians
from lawcat_edge.calibration.ranges import text_sha256
from lawcat_edge.export.rounding import Quantised, Rounder, bounds, grid
from lawcat_edge.export.schemes import Linear
from lawcat_edge.progress import Progress, quiet

DAMPING = 0.01
"""Of M's mean diagonal, added to it: directions that the text hardly shows must not rule."""
_COLUMNS = 64  # rounded before the rest is brought up to date with one product


class Gptq:
    """Gives the exporter its rounder for each product: ``Gptq(hessians)("layers.3/down", spec)``."""

    def __init__(self, hessians: Hessians, progress: Progress = quiet) -> None:
        self.hessians, self.progress = hessians, progress
        what = [DAMPING, hessians.bundle.sha256, [text_sha256(row) for row in hessians.texts]]
        self.sha256 = hashlib.sha256(json.dumps(what).encode()).hexdigest()

    def __call__(self, path: str, spec: Linear) -> Rounder:
        hessian = self.hessians.of(path, self.progress)
        state: list[_Rounding] = []

        def rounder(values: np.ndarray) -> Quantised:
            if not state:
                state.append(_Rounding(hessian, values.shape[1] * values.shape[2], spec))
            return state[0](values)

        return rounder


def round_rows(values: np.ndarray, hessian: np.ndarray, spec: Linear) -> Quantised:
    """values [n, blocks, block] of a weight whose inputs have the Hessian ``hessian`` [K,K]."""
    return _Rounding(hessian, values.shape[1] * values.shape[2], spec)(values)


class _Rounding:
    """What all rows of one product share. width: K, with the padding of its last block."""

    def __init__(self, hessian: np.ndarray, width: int, spec: Linear) -> None:
        K = len(hessian)
        full = np.zeros((width, width))
        full[:K, :K] = hessian
        diagonal = full.diagonal().copy()
        diagonal[:K] += DAMPING * max(diagonal[:K].mean(), 1e-30)
        diagonal[K:] = diagonal[:K].mean()
        np.fill_diagonal(full, diagonal)
        self.spec, self.order = spec, np.argsort(-diagonal, kind="stable")
        self.weight = diagonal.astype(np.float32)
        inverse = np.linalg.inv(full[np.ix_(self.order, self.order)])
        self.U = np.linalg.cholesky((inverse + inverse.T) / 2).T.astype(np.float32)

    def __call__(self, values: np.ndarray) -> Quantised:
        n, blocks, block = values.shape
        found = grid(values, self.spec, self.weight.reshape(blocks, block))
        low, high = bounds(self.spec)
        left, block_of = np.ascontiguousarray(values.reshape(n, -1).T[self.order]), self.order // block
        quantised = np.empty_like(left)
        scales = np.ascontiguousarray(found.scales.T)
        offsets = None if found.offsets is None else np.ascontiguousarray(found.offsets.T)
        for start in range(0, len(left), _COLUMNS):
            end = min(start + _COLUMNS, len(left))
            errors = np.empty((end - start, n), np.float32)
            for j in range(start, end):
                scale = scales[block_of[j]]
                offset = 0 if offsets is None else offsets[block_of[j]]
                quantised[j] = np.clip(np.rint(left[j] / scale - offset), low, high)
                errors[j - start] = (left[j] - (quantised[j] + offset) * scale) / self.U[j, j]
                left[j + 1 : end] -= self.U[j, j + 1 : end, None] * errors[j - start]
            left[end:] -= self.U[start:end, end:].T @ errors
        back = np.empty_like(quantised)
        back[self.order] = quantised
        return Quantised(np.ascontiguousarray(back.T).reshape(values.shape), found.scales, found.offsets)
