"""Progress of long work on stderr: a rich bar in a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

QUIET_SECONDS = 15.0  # between two lines when stderr is no terminal


class TrainingProgress:
    """Shows training records (stage, step, steps, tokens, seconds, loss): loss, tokens/s, ETA."""

    def __init__(self, bar: Any | None) -> None:
        self.bar, self.stage, self.task, self.last, self.began = bar, "", None, 0.0, (0.0, 0)
        self.told, self.first = False, 0

    def __call__(self, record: dict[str, Any]) -> None:
        now = time.monotonic()
        if record["stage"] != self.stage:
            self.stage, self.began = record["stage"], (now, record.get("tokens", 0))
            self.told, self.first = False, record["step"]
            if self.bar is not None:
                self.task = self.bar.add_task(self.stage, total=record["steps"], info="")
        seconds, tokens = now - self.began[0], record.get("tokens", 0) - self.began[1]
        info = f"loss {record['loss']:.4g}" if "loss" in record else ""
        if seconds > 0 and tokens:
            info += f" · {tokens / seconds:,.0f} tokens/s"
        if not self.told and record["step"] >= 3 and seconds > 0 and tokens:
            self.told = True
            left = (record["steps"] - record["step"]) * seconds / max(record["step"] - self.first, 1)
            print(f"{self.stage}: about {duration(left)} at this speed", file=sys.stderr, flush=True)
        if self.bar is not None:
            self.bar.update(self.task, completed=record["step"], info=info)
        elif now - self.last > QUIET_SECONDS or record["step"] >= record["steps"]:
            self.last = now
            print(f"{self.stage} {record['step']}/{record['steps']} {info}", file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """A time as people say it: 40 s, 12 min, 3.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


@contextmanager
def training_progress(shown: bool = True) -> Iterator[TrainingProgress]:
    """A progress to call with records; ``shown`` false for a process that reports none."""
    if not shown or not sys.stderr.isatty():
        yield TrainingProgress(None)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description:9}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[info]}"),
        TextColumn("ETA"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        yield TrainingProgress(bar)
