"""Progress of long work on stderr: a rich bar in a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

QUIET_SECONDS = 15.0  # between two lines when stderr is no terminal


class Reporter:
    """Called with (label, done, total) as often as the work likes; it shows a bar for each label in turn.

    bar: rich's, or None where stderr is no terminal; there ``lines`` decides whether a line is printed for
    every new label, every quarter of a minute, and at the end where ``last`` asks for it.
    """

    def __init__(self, bar: Any | None, lines: bool = True) -> None:
        self.bar, self.lines = bar, lines
        self.label, self.task, self.told = "", None, 0.0

    def __call__(self, label: str, done: int, total: int, info: str = "", last: bool = False) -> None:
        fresh = label != self.label
        self.label = label
        if self.bar is not None:
            if fresh:
                self.task = self.bar.add_task(label, total=max(total, 1), info=info)
            self.bar.update(self.task, completed=done, total=max(total, 1), info=info)
        elif self.lines and (
            fresh or (last and done >= total) or time.monotonic() - self.told > QUIET_SECONDS
        ):
            self.told = time.monotonic()
            print(f"{label} {done:,}/{total:,} {info}".rstrip(), file=sys.stderr, flush=True)


@contextmanager
def reporter(lines: bool = True, transient: bool = False) -> Iterator[Reporter]:
    """A reporter for the time of the work. transient: the bar goes away when the work is done."""
    if not sys.stderr.isatty():
        yield Reporter(None, lines)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description:14}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[info]}"),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Progress(*columns, console=Console(stderr=True), transient=transient) as bar:
        yield Reporter(bar, lines)


class TrainingProgress:
    """Shows training records (stage, step, steps, tokens, seconds, loss): loss, tokens/s, time left."""

    def __init__(self, show: Reporter) -> None:
        self.show, self.stage, self.began = show, "", (0.0, 0)
        self.told, self.first = False, 0

    def __call__(self, record: dict[str, Any]) -> None:
        now = time.monotonic()
        if record["stage"] != self.stage:
            self.stage, self.began = record["stage"], (now, record.get("tokens", 0))
            self.told, self.first = False, record["step"]
        seconds, tokens = now - self.began[0], record.get("tokens", 0) - self.began[1]
        info = f"loss {record['loss']:.4g}" if "loss" in record else ""
        if seconds > 0 and tokens:
            info += f" · {tokens / seconds:,.0f} tokens/s"
        if not self.told and record["step"] >= 3 and seconds > 0 and tokens:
            self.told = True
            left = (record["steps"] - record["step"]) * seconds / max(record["step"] - self.first, 1)
            print(f"{self.stage}: about {duration(left)} at this speed", file=sys.stderr, flush=True)
        self.show(self.stage, record["step"], record["steps"], info, last=True)


def duration(seconds: float) -> str:
    """A time as people say it: 40 s, 12 min, 3.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
