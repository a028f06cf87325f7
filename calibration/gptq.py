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
_PANEL = 128  # columns that are rounded before the rest is brought up to date with one product
_STRIP = 8  # and, of these, before the panel is


class Gptq:
    """Gives the exporter its rounder for each product: ``Gptq(hessians)("layers.3/down", spec)``.

    rotation: [block,block] that the input of ``down`` was rotated by where the Hessians were measured.
    """

    def __init__(
        self, hessians: Hessians, progress: Progress = quiet, rotation: np.ndarray | None = None
    ) -> None:
        self.hessians, self.progress, self.rotation = hessians, progress, rotation
        what = [DAMPING, hessians.bundle.sha256, [text_sha256(row) for row in hessians.texts]]
        self.sha256 = hashlib.sha256(json.dumps(what).encode()).hexdigest()

    def __call__(self, path: str, spec: Linear) -> Rounder:
        hessian = self.hessians.of(path, self.progress)
        if self.rotation is not None and path.endswith("/down") and not spec.rotates_input:
            hessian = _rotated_back(hessian, self.rotation)
        state: list[_Rounding] = []

        def rounder(values: np.ndarray) -> Quantised:
            if not state:
                state.append(_Rounding(hessian, values.shape[1] * values.shape[2], spec))
            return state[0](values)

        return rounder


def _rotated_back(hessian: np.ndarray, rotation: np.ndarray) -> np.ndarray:
    """E[x xᵀ] [K,K] of x, from that of x with each block times ``rotation``, which is orthogonal."""
    rows = (hessian.reshape(len(hessian), -1, len(rotation)) @ rotation.T).reshape(hessian.shape)
    return (rows.T.reshape(len(hessian), -1, len(rotation)) @ rotation.T).reshape(hessian.shape)


def round_rows(values: np.ndarray, hessian: np.ndarray, spec: Linear) -> Quantised:
    """values [n, blocks, block] of a weight whose inputs have the Hessian ``hessian`` [K,K]."""
    return _Rounding(hessian, values.shape[1] * values.shape[2], spec)(values)


class _Rounding:
    """What all rows of one product share. width: K, with the padding of its last block."""

    def __init__(self, hessian: np.ndarray, width: int, spec: Linear) -> None:
        K = len(hessian)
        full = np.zeros((width, width), np.float32)
        full[:K, :K] = hessian
        diagonal = full.diagonal().copy()
        diagonal[:K] += DAMPING * max(diagonal[:K].mean(), 1e-30)
        diagonal[K:] = diagonal[:K].mean()
        np.fill_diagonal(full, diagonal)
        self.spec, self.order = spec, np.argsort(-diagonal, kind="stable")
        self.weight = diagonal.astype(np.float32)
        self.U = _factor(full[np.ix_(self.order, self.order)])

    def __call__(self, values: np.ndarray) -> Quantised:
        n, blocks, block = values.shape
        found = grid(values, self.spec, self.weight.reshape(blocks, block))
        low, high = (np.float32(bound) for bound in bounds(self.spec))
        left, block_of = np.ascontiguousarray(values.reshape(n, -1).T[self.order]), self.order // block
        quantised, K = np.empty_like(left), len(left)
        scales = np.ascontiguousarray(found.scales.T)
        offsets = None if found.offsets is None else np.ascontiguousarray(found.offsets.T)
        U, steps = self.U, 1 / self.U.diagonal()
        errors, told = np.empty((_PANEL, n), np.float32), np.empty((_STRIP, n), np.float32)
        value = np.empty(n, np.float32)
        for start in range(0, K, _PANEL):
            end = min(start + _PANEL, K)
            for strip in range(start, end, _STRIP):
                last = min(strip + _STRIP, end)
                for j in range(strip, last):
                    code, error, scale = quantised[j], errors[j - start], scales[block_of[j]]
                    np.divide(left[j], scale, out=code)
                    if offsets is not None:
                        code -= offsets[block_of[j]]
                    np.rint(code, out=code)
                    np.minimum(np.maximum(code, low, out=code), high, out=code)
                    stands = code if offsets is None else np.add(code, offsets[block_of[j]], out=value)
                    np.multiply(stands, scale, out=value)
                    np.subtract(left[j], value, out=error)
                    error *= steps[j]
                    rest = np.multiply(U[j, j + 1 : last, None], error, out=told[: last - j - 1])
                    left[j + 1 : last] -= rest
                left[last:end] -= U[strip:last, last:end].T @ errors[strip - start : last - start]
            left[end:] -= U[start:end, end:].T @ errors[: end - start]
        back = np.empty_like(quantised)
        back[self.order] = quantised
        return Quantised(np.ascontiguousarray(back.T).reshape(values.shape), found.scales, found.offsets)


def _factor(hessian: np.ndarray) -> np.ndarray:
    """The upper U with UᵀU the inverse of the matrix, float32: damping bounds how badly it is conditioned.

    With V Vᵀ the matrix and V upper, U is V⁻¹: one factor and one triangular inverse, a fourth of the work of
    inverting first and factoring then. V is the lower factor of the matrix read backwards, read backwards.
    """
    import torch

    backwards = torch.from_numpy(np.ascontiguousarray(hessian[::-1, ::-1]))
    lower = torch.linalg.cholesky(backwards)
    unit = torch.eye(len(hessian))
    return np.ascontiguousarray(torch.linalg.solve_triangular(lower, unit, upper=False).flip(0, 1).numpy())
