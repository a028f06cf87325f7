"""How long work says how far it is: it calls a function with (what, done, total)."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""(what, done, total); done == total when that part is finished."""


def quiet(what: str, done: int, total: int) -> None:
    """The progress of a caller who wants none."""
