"""A mixed scheme chosen from sensitivities: the smallest with KL ≤ x, or the one of least KL under y MB.

Small errors of different products are independent, so their KLs add up: five kinds of product with four
choices each are 768 sums, all of which are looked at.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lawcat_edge.calibration.mixed.sensitivity import CHOICES
from lawcat_edge.config import LawcatConfig
from lawcat_edge.export.products import same_table
from lawcat_edge.export.rotation import rotation_of_down
from lawcat_edge.export.schemes import LINEARS, Linear, Scheme
from lawcat_edge.export.step import layer_module
from lawcat_edge.families import Geometry
from lawcat_edge.runtime.errors import LawcatError

_ALL = {"fp32": Linear("fp32"), **CHOICES}
_ROUNDS = 6  # of measuring a choice and asking for less, where the sum promised too much


@dataclass(frozen=True)
class Sizes:
    """Bytes of a bundle by scheme, before it exists. ``rest``: all but the products and the embedding."""

    geometry: Geometry
    config: LawcatConfig
    rest: int

    @classmethod
    def of_bundle(cls, geometry: Geometry, config: LawcatConfig, scheme: Scheme, total: int) -> Sizes:
        """From the size of one real bundle."""
        return cls(geometry, config, total - cls(geometry, config, 0).of(scheme))

    def of(self, scheme: Scheme) -> int:
        g = self.geometry
        table = (g.vocab_size, g.hidden_size)
        kinds = {full: layer_module(g, self.config, full).shapes() for full in (False, True)}
        total = sum(
            _bytes(scheme.linear(name, i), *kinds[self.config.full_attention(i)][f"{name}.weight"])
            for i in range(g.num_layers)
            for name in ("qkv", "o", "gate_up", "down")
        )
        head, embedding = scheme.linears["head"], scheme.embedding.fitted(g.hidden_size)
        if g.tie_embeddings:
            head = head.fitted(g.hidden_size)
        total += _bytes(embedding, *table)
        if not (g.tie_embeddings and same_table(embedding, head)):
            total += _bytes(head, *table)
        if scheme.rotate and g.tie_embeddings:
            total += (4 if head.kind == "fp32" else 2) * g.hidden_size**2
        rotated = any(scheme.rotates_down(i) for i in range(g.num_layers))
        own = rotation_of_down(g.intermediate_size) if rotated else None
        return self.rest + total + (own.nbytes if own is not None else 0)


def _bytes(spec: Linear, N: int, K: int) -> int:
    if spec.kind == "fp32":
        return 4 * N * K
    if spec.kind in ("dynamic", "static"):
        return N * K + 4 * N
    if spec.offsets:
        spec = spec.fitted(K)
    blocks = -(-K // spec.block)
    return N * blocks * (spec.block * spec.bits // 8 + 2 + spec.offsets)


def scheme_of(name: str, choice: dict[str, str], rotate: bool) -> Scheme:
    """choice: a name of CHOICES or fp32 for each product."""
    products = {product: _ALL[choice[product]] for product in LINEARS}
    return Scheme(name, products, products["head"], 10.0, 3.0, rotate)


def candidates(
    kinds: dict[str, dict[str, dict[str, float]]], sizes: Sizes, rotate: bool
) -> list[tuple[int, float, dict[str, str]]]:
    """(bytes, expected KL, choice) of every combination, smallest first."""
    options = [["fp32", *kinds[product]] for product in LINEARS]
    found = []
    for combination in itertools.product(*options):
        choice = dict(zip(LINEARS, combination, strict=True))
        expected = sum(kinds[p][name]["kl"] for p, name in choice.items() if name != "fp32")
        found.append((sizes.of(scheme_of("x", choice, rotate)), expected, choice))
    return sorted(found, key=lambda item: item[:2])


def smallest(
    kinds: dict[str, Any],
    sizes: Sizes,
    max_kl: float,
    rotate: bool,
    measured: Callable[[Scheme], dict[str, float]] | None = None,
) -> Scheme:
    """The smallest scheme with KL ≤ max_kl. measured: the real "kl" of a scheme; where the sum promised too
    much, the next try must promise less. Raises LawcatError when even 8 bits everywhere are too coarse."""
    if not max_kl > 0:
        raise LawcatError(f"The largest KL must be above zero, not {max_kl}.")
    wanted, table = max_kl, candidates(kinds, sizes, rotate)
    for _ in range(_ROUNDS):
        fitting = [item for item in table if item[1] <= wanted]
        if not fitting or all(name == "fp32" for name in fitting[0][2].values()):
            break
        scheme = scheme_of(f"auto-kl-{max_kl:g}", fitting[0][2], rotate)
        if measured is None:
            return scheme
        found = measured(scheme)["kl"]
        if found <= max_kl:
            return scheme
        wanted = min(wanted, fitting[0][1]) * max_kl / found * 0.95
    raise LawcatError(f"No quantised scheme stays within a KL of {max_kl:g}; allow more.")


def best_under(kinds: dict[str, Any], sizes: Sizes, max_bytes: int, rotate: bool) -> Scheme:
    """The scheme of least expected KL with at most max_bytes. Raises LawcatError when none is that small."""
    table = candidates(kinds, sizes, rotate)
    fitting = [item for item in table if item[0] <= max_bytes]
    if not fitting:
        least = f"{table[0][0] / 1e6:.1f} MB"
        raise LawcatError(f"The smallest scheme takes {least}, more than {max_bytes / 1e6:g} MB; allow more.")
    choice = min(fitting, key=lambda item: (item[1], item[0]))[2]
    return scheme_of(f"auto-{max_bytes / 1e6:g}mb", choice, rotate)
