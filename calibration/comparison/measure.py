"""What is measured of one model: accuracy on a text, drift along a long one, retrieval, speed and memory."""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from lawcat_edge.calibration.comparison.divergence import Losses, text_losses
from lawcat_edge.data.tasks.prompts import wilson
from lawcat_edge.evaluate.lm import LanguageModel
from lawcat_edge.evaluate.run import run_task
from lawcat_edge.progress import Progress
from lawcat_edge.runtime.errors import LawcatError

BUCKETS = 8
TASKS = ("passkey", "niah-1")


class Readable(Protocol):
    """What is measured (``subjects``): opened when its model is first asked for."""

    @property
    def model(self) -> LanguageModel: ...

    def speed(self, context: int, decode_tokens: int, threads: int | None) -> dict[str, Any]: ...


def accuracy(
    subject: Readable,
    reference: Readable | None,
    rows: np.ndarray,
    progress: Progress,
    what: str = "accuracy",
) -> dict[str, Any]:
    """Perplexity over sequences [n,T], each from an empty state; KL and agreement with a reference."""
    return summary(Losses.join(_losses(subject, reference, rows, progress, what)))


def _losses(
    subject: Readable, reference: Readable | None, rows: np.ndarray, progress: Progress, what: str
) -> list[Losses]:
    other = reference.model if reference is not None else None
    count = Counter(what, rows.size - len(rows), progress)
    return [text_losses(subject.model, other, row, progress=count) for row in rows]


def summary(losses: Losses) -> dict[str, Any]:
    """Means over the tokens, the 99th percentile of KL, and the standard error of the mean nll."""
    nll, kl, same = losses.nll, losses.kl, losses.same
    return {
        "tokens": len(nll),
        "perplexity": math.exp(min(float(nll.mean()), 700.0)),
        "nll": float(nll.mean()),
        "nll_stderr": float(nll.std() / math.sqrt(len(nll))),
        "kl": None if kl is None else float(kl.mean()),
        "kl_p99": None if kl is None else float(np.quantile(kl, 0.99)),
        "top1": None if same is None else float(same.mean()),
    }


def drift(
    subject: Readable, reference: Readable | None, rows: np.ndarray, progress: Progress
) -> dict[str, Any]:
    """Texts [n,T], each read in one go, in ``BUCKETS`` equal parts: does the error grow with the state?

    ratio: mean KL of the last part over that of the first; None without a reference.
    """
    texts = _losses(subject, reference, rows, progress, "drift")
    edges = np.linspace(0, rows.shape[1] - 1, BUCKETS + 1).astype(int)
    buckets = []
    for begin, end in itertools.pairwise(edges):
        part = Losses.join([losses.part(begin, end) for losses in texts])
        buckets.append({"begin": int(begin) + 1, "end": int(end) + 1, **summary(part)})
    first, last = buckets[0]["kl"], buckets[-1]["kl"]
    return {"buckets": buckets, "ratio": last / first if first else None}


def tasks(
    subject: Readable, lengths: Sequence[int], samples: int, seed: int, progress: Progress
) -> dict[str, Any]:
    """Retrieval accuracy with its 95 % interval, over all lengths and by length."""
    found: dict[str, Any] = {}
    total = len(TASKS) * len(lengths)
    done = 0
    progress("tasks", 0, total)
    for task in TASKS:
        cells = []
        for length in lengths:
            report = run_task(subject.model, task, [length], samples, seed=seed)
            cells += report.by_length()
            done += 1
            progress("tasks", done, total)
        right, asked = sum(cell.correct for cell in cells), sum(cell.n for cell in cells)
        low, high = wilson(right, asked)
        found[task] = {
            "correct": right,
            "asked": asked,
            "accuracy": right / asked,
            "low": low,
            "high": high,
            "by_length": [
                {"length": cell.length, "correct": cell.correct, "asked": cell.n} for cell in cells
            ],
        }
    return found


def speed(
    subject: Readable, context: int, decode_tokens: int, threads: int | None, progress: Progress
) -> dict[str, Any]:
    """Tokens/s of reading ``context`` tokens and of writing ``decode_tokens``, and peak memory."""
    progress("speed", 0, 1)
    found = subject.speed(context, decode_tokens, threads)
    progress("speed", 1, 1)
    return found


def bundle_speed(folder: str, context: int, decode_tokens: int, threads: int | None) -> dict[str, Any]:
    """Tokens/s and peak memory of a bundle, by ``lawcat-edge bench`` in a process of its own."""
    arguments = ["lawcat_edge", "bench", folder, "--contexts", str(context), "--json"]
    arguments += ["--decode-tokens", str(decode_tokens)]
    if threads is not None:
        arguments += ["--threads", str(threads)]
    report = fresh_process(arguments)
    row = report["contexts"][-1]
    return {
        "context": context,
        "threads": report["threads"],
        "prefill_tokens_per_second": row["prefill_tokens_per_second"],
        "decode_tokens_per_second": row["decode_tokens_per_second"],
        "peak_memory_bytes": row["peak_memory_bytes"],
        "load_seconds": report["load_seconds"],
    }


def fresh_process(arguments: list[str]) -> Any:
    """Run ``python -m`` with these arguments and return the JSON document on the last line of its output.

    Another process, since memory once taken is not given back: its peak is that of this one model.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(
        [sys.executable, "-m", *arguments], capture_output=True, text=True, env=environment, check=False
    )
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["it said nothing"])[-1].removeprefix("Error: ")
        if done.returncode < 0:
            said = f"killed by signal {-done.returncode} (was there enough memory?)"
        raise LawcatError(f"The measurement of speed failed: {said}")
    return json.loads(done.stdout.strip().splitlines()[-1])


class Counter:
    """Adds up tokens for a progress callback."""

    def __init__(self, what: str, total: int, progress: Progress) -> None:
        self.what, self.total, self.progress, self.done = what, total, progress, 0
        progress(what, 0, total)

    def __call__(self, tokens: int) -> None:
        self.done += tokens
        self.progress(self.what, self.done, self.total)
