"""TEACHER with --adapter, --window, --span and --sinks, as export, calibrate and compare take them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from lawcat_edge.runtime.errors import LawcatError

if TYPE_CHECKING:
    from lawcat_edge.student import Student


def open_student(
    teacher: str,
    adapter: Path | str | None,
    window: int | None = None,
    span: int | None = None,
    sinks: int | None = None,
) -> Student:
    """The student that the options name; without an adapter an untrained one, which is said on stderr."""
    from lawcat_edge.adapter import Adapter
    from lawcat_edge.student import Student
    from lawcat_edge.teacher import resolve

    source = resolve(teacher)
    if adapter is not None:
        return Student.of(source, Adapter.load(adapter).with_window(window).with_span(span, sinks))
    if any(value is not None for value in (window, span, sinks)):
        raise LawcatError("--window, --span and --sinks change an adapter's; give one with --adapter.")
    print("No --adapter: this is an untrained conversion, it will not write sense.", file=sys.stderr)
    return Student.of(source)
