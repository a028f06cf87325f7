"""A rotation of the residual stream, folded into the weights: the same function, easier to quantise.

Some channels of a language model's residual stream are hundreds of times larger than the others, and a
block that holds one has no resolution left for its neighbours. RMSNorm does not care in which orthogonal
basis its input is written once its gains sit in the weights behind it. So every weight that reads the
stream becomes W diag(gain) R, every one that writes it R^T W, and the outliers are spread over all
channels, in activations and weights alike, at no cost at run time (QuaRot, arXiv 2404.00456). So are the
values of each head. The gated units before ``down`` have no such basis: they are rotated as the model runs.

R is the Kronecker product of a random orthogonal matrix for the odd part of the width and Hadamard
matrices with random signs, so that rotating costs some hundred operations a weight, not the width.
"""

from __future__ import annotations

import math
from functools import cached_property

import numpy as np

_FACTOR = 64  # a Hadamard matrix of up to this size is one product; larger ones are made of two
_BLOCK = 64  # columns of the input of ``down`` that are mixed; more costs more than it gives


def rotation_of_down(width: int) -> np.ndarray | None:
    """The orthogonal matrix for blocks of an input that has no basis of its own to be rotated in, as that of
    ``down``: applied at run time, undone in the weights. None where the width leaves no block worth it."""
    block = math.gcd(width, _BLOCK)
    return Rotation(block, seed=2).matrix if block >= 8 else None


def rotation_of_values(width: int) -> np.ndarray:
    """Orthogonal [d,d] for the values of every head. What the attention reads out is linear in them, so it is
    undone in the weights of ``o`` and costs nothing at run time."""
    return Rotation(width, seed=1).matrix


class Rotation:
    """An orthogonal matrix of the given width; the same for the same width and seed."""

    def __init__(self, width: int, seed: int = 0) -> None:
        self.width = width
        generator = np.random.default_rng((seed, width))
        self._signs = generator.choice(np.array([-1.0, 1.0], np.float32), width)
        even = width & -width
        odd = width // even
        small = min(even, _FACTOR)
        mixed = np.linalg.qr(generator.standard_normal((odd, odd)))[0]
        # the three factors act on the axes of x viewed as [odd, even / small, small]
        self._factors = [mixed.astype(np.float32), _hadamard(even // small), _hadamard(small)]

    def rows(self, x: np.ndarray) -> np.ndarray:
        """x [..., width] -> x R."""
        a, b, c = (len(factor) for factor in self._factors)
        y = (x * self._signs).reshape(-1, a, b * c)
        if a > 1:
            y = np.einsum("nax,ay->nyx", y, self._factors[0], optimize=True)
        y = y.reshape(-1, a * b, c) @ self._factors[2]
        if b > 1:
            y = self._factors[1].T @ y.reshape(-1, b, c)
        return np.ascontiguousarray(y.reshape(x.shape))

    def columns(self, x: np.ndarray) -> np.ndarray:
        """x [width, n] -> R^T x."""
        return self.rows(np.ascontiguousarray(x.T)).T

    @cached_property
    def matrix(self) -> np.ndarray:
        """R itself [width, width]."""
        return self.rows(np.eye(self.width, dtype=np.float32))


def _hadamard(size: int) -> np.ndarray:
    """Orthonormal, for a power of two."""
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]]) / 2**0.5
    return matrix.astype(np.float32)
