"""The flavours of a graph: sets of operators that different runtimes know, in the order of preference.

Every flavour of a bundle is the same function over the same weights file. What else depends on the flavour
reads it from here: which one a runner takes unasked, and which one goes into the files of other runtimes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from lawcat_edge.runtime.errors import LawcatError


@dataclass(frozen=True)
class Flavour:
    """min_onnxruntime: the first version that has its operators. phones: whether ORT format can hold it."""

    min_onnxruntime: str
    phones: bool


FLAVOURS = {
    "ort": Flavour("1.25.1", phones=True),  # onnxruntime's own fused operators: the fastest
    "portable": Flavour("1.17.0", phones=True),  # operators of 2023, for old and for other runtimes
    "onnx": Flavour("1.32.0", phones=False),  # the standard's newest operators, no vendor's
}


def ranked(ops: Iterable[str]) -> list[str]:
    """These flavours, the preferred one first."""
    given = set(ops)
    return [name for name in FLAVOURS if name in given]


def check_flavours(ops: Iterable[str]) -> None:
    """Raise LawcatError for a name that is no flavour."""
    for op in ops:
        if op not in FLAVOURS:
            raise LawcatError(f"Unknown operators {op!r}; choose from {', '.join(FLAVOURS)}.")
