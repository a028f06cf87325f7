"""What a comparison will measure: a list of rows, made before anything slow begins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lawcat_edge.calibration.comparison.peers import gguf_rows
from lawcat_edge.export.schemes import SCHEMES, Scheme, load_scheme
from lawcat_edge.runtime.errors import LawcatError

REFERENCE = "fp32"
"""The scheme that all others are held against."""
TEACHER = "teacher-fp32"


@dataclass(frozen=True)
class Planned:
    """One row: its name, its kind (``scheme``, ``teacher`` or ``gguf``), and the table of a scheme, or the
    sentence that says why there is none."""

    name: str
    kind: str
    scheme: Scheme | None = None
    error: str | None = None


def plan(schemes: Sequence[str], teacher: str, with_peers: bool) -> list[Planned]:
    """The rows of a comparison in order: fp32 first, then the schemes (names or files), then the teacher.

    with_peers: the teacher in torch and, after it, as GGUF in llama.cpp.
    """
    names = [REFERENCE, *(name for name in dict.fromkeys(schemes) if name != REFERENCE)]
    rows = [_scheme(name) for name in names]
    if with_peers:
        rows.append(Planned(TEACHER, "teacher"))
        rows += [Planned(name, "gguf") for name in gguf_rows(teacher)]
    return rows


def _scheme(given: str) -> Planned:
    name = given if given in SCHEMES else Path(given).stem
    if name in SCHEMES and given not in SCHEMES:
        name = f"{name}-file"
    try:
        return Planned(name, "scheme", load_scheme(given))
    except LawcatError as error:
        return Planned(name, "scheme", error=str(error))
