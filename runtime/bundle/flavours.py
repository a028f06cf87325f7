"""The flavours of a graph: sets of operators that different runtimes know, in the order of preference.

Every flavour of a bundle is the same function over the same weights file. What else depends on the flavour
reads it from here: which one a runner takes unasked, and which one goes into the files of other runtimes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lawcat_edge.runtime.errors import LawcatError
from lawcat_edge.runtime.native import library


@dataclass(frozen=True)
class Flavour:
    """min_onnxruntime: the first version that has its operators. phones: whether ORT format can hold it.

    own: some of its operators are this package's (``runtime.native``), so that no other runtime can read it.
    """

    min_onnxruntime: str
    phones: bool
    own: bool = False


FLAVOURS = {
    "native": Flavour("1.25.1", phones=False, own=True),  # a layer's attention in one operator: the fastest
    "ort": Flavour("1.25.1", phones=True),  # onnxruntime's own fused operators
    "portable": Flavour("1.17.0", phones=True),  # operators of 2023, for old and for other runtimes
    "onnx": Flavour("1.32.0", phones=False),  # the standard's newest operators, no vendor's
}


DEFAULT_OPS = ("ort", "native")  # what a bundle has unless it is told otherwise


def ranked(ops: Iterable[str]) -> list[str]:
    """These flavours, the preferred one first."""
    given = set(ops)
    return [name for name in FLAVOURS if name in given]


def can_run(op: str) -> bool:
    """Whether this package has what the flavour needs beside onnxruntime, and for this processor."""
    return not FLAVOURS[op].own or library() is not None


def runnable(ops: Iterable[str]) -> list[str]:
    """Those of these flavours that this package can run, the preferred one first."""
    return [name for name in ranked(ops) if can_run(name)]


def for_others(ops: Iterable[str]) -> str:
    """The one of these flavours that goes into the files of other runtimes."""
    return next(name for name in ranked(ops) if not FLAVOURS[name].own)


def check_flavours(ops: Sequence[str]) -> None:
    """Raise LawcatError for a name that is no flavour, and where none is for other runtimes."""
    for op in ops:
        if op not in FLAVOURS:
            raise LawcatError(f"Unknown operators {op!r}; choose from {', '.join(FLAVOURS)}.")
    if all(FLAVOURS[op].own for op in ops):
        raise LawcatError(
            f"Only this package's runner knows the operators {', '.join(ops)}, and not everywhere; "
            "export with `--ops ort,native`."
        )
