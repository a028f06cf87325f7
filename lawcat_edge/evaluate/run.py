"""Run a retrieval task on a model over lengths and depths, and report accuracies with their 95 %
intervals."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from lawcat_edge.data.corpus import tokenizer_fingerprint
from lawcat_edge.data.tasks.babilong import Babilong
from lawcat_edge.data.tasks.filler import Encoder, Filler, split_sentences
from lawcat_edge.data.tasks.niah import ANSWER_ROOM, DEPTHS, Niah
from lawcat_edge.data.tasks.passkey import Passkey
from lawcat_edge.data.tasks.prompts import Prompt, score, settled, wilson
from lawcat_edge.evaluate.lm import LanguageModel, greedy
from lawcat_edge.runtime.errors import LawcatError

RETRIEVAL_TASKS = ("passkey", "niah-1", "niah-2", "niah-3", "babilong-qa2", "babilong-qa3")
MAX_NEW = {"passkey": 12, "babilong-qa2": 24, "babilong-qa3": 32}
"""Most tokens of an answer; decoding stops earlier once nothing further can change the score. NIAH: 128."""


@dataclass(frozen=True)
class Sample:
    """One question asked: its target length and real tokens, where the needle lay, and what came of it."""

    length: int
    tokens: int
    depth: float | None
    correct: bool
    answer: str
    output: str


@dataclass(frozen=True)
class Cell:
    """Accuracy at one length (and one stated depth, where depths were stated), with its 95 % Wilson
    interval."""

    length: int
    depth: float | None
    n: int
    correct: int
    accuracy: float
    low: float
    high: float


@dataclass
class TaskReport:
    """Grows while a task runs; ``complete`` says whether every sample was asked."""

    task: str
    model: str
    kind: str
    settings: dict[str, Any]
    cells: list[Cell] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    seconds: float = 0.0
    complete: bool = False

    def by_length(self) -> list[Cell]:
        lengths = sorted({sample.length for sample in self.samples})
        return [_cell(length, None, [s for s in self.samples if s.length == length]) for length in lengths]

    def to_dict(self) -> dict[str, Any]:
        return {"format": 1, **asdict(self), "by_length": [asdict(cell) for cell in self.by_length()]}


def _cell(length: int, depth: float | None, samples: list[Sample]) -> Cell:
    correct = sum(sample.correct for sample in samples)
    low, high = wilson(correct, len(samples))
    return Cell(length, depth, len(samples), correct, correct / max(len(samples), 1), low, high)


def cell_prompts(
    task: str,
    encoder: Encoder,
    prose: Filler | None,
    length: int,
    samples: int,
    depths: Sequence[float] | None = None,
    seed: int = 0,
) -> list[tuple[float | None, Prompt]]:
    """(stated depth, prompt) of one length; the same for every model with this tokenizer.

    depths: ``samples`` prompts at each; None spreads ``samples`` prompts over the depths evenly (over
    NIAH's forty). BABILong has no depth. Raises LawcatError for an unknown task or a length too short for
    it.
    """
    if task not in RETRIEVAL_TASKS:
        raise LawcatError(f"Unknown task {task!r}; choose one of {', '.join(RETRIEVAL_TASKS)} or perplexity.")
    number = int(task[-1]) if task[-1].isdigit() else 0
    if task.startswith("babilong"):
        return [(None, prompt) for prompt in Babilong(encoder, number, prose).cell(seed, length, samples)]
    maker: Passkey | Niah = Passkey(encoder) if task == "passkey" else Niah(encoder, number, prose)
    target = length if task == "passkey" else length - ANSWER_ROOM
    stated: list[float] = []
    if depths is not None:
        stated = [depth for depth in depths for _ in range(samples)]
    elif task == "passkey":
        stated = list(np.linspace(0, 1, samples)) if samples > 1 else [0.5]
    else:
        rng = np.random.default_rng([seed, number, length, 1 << 20])
        rounds = [rng.permutation(len(DEPTHS)) for _ in range(samples // len(DEPTHS) + 1)]
        stated = [float(DEPTHS[k]) for k in itertools.islice(itertools.chain(*rounds), samples)]
    made = []
    for k, depth in enumerate(stated):
        prompt = maker.make(np.random.default_rng([seed, number, length, k]), target, float(depth))
        made.append((float(depth) if depths is not None else None, prompt))
    return made


def run_task(
    model: LanguageModel,
    task: str,
    lengths: Sequence[int],
    samples: int = 20,
    depths: Sequence[float] | None = None,
    seed: int = 0,
    prose: str | None = None,
    max_new_tokens: int | None = None,
    deadline: float | None = None,
    on_cell: Callable[[TaskReport], None] = lambda report: None,
) -> TaskReport:
    """Ask ``task`` at every length, greedily, prompts of one length in a batch; prompts depend on the seed
    alone.

    prose: background text for niah-2/3 and BABILong. deadline: time.monotonic() after which no batch is
    begun; the report is then not complete. on_cell: called after each length.
    """
    if samples < 1 or not lengths or any(length < 0 for length in lengths):
        raise LawcatError("Evaluation needs at least one sample and lengths that are not negative.")
    if depths is not None and (not depths or any(not 0 <= depth <= 1 for depth in depths)):
        raise LawcatError("Depths are shares of the text from 0 to 100 %.")
    encoder = Encoder(model.tokenizer)
    needs_prose = task in ("niah-2", "niah-3") or (task.startswith("babilong") and any(lengths))
    filler = Filler.build(encoder, split_sentences(prose or "")) if needs_prose else None
    limit = max_new_tokens or MAX_NEW.get(task, ANSWER_ROOM)
    settings = {
        "lengths": list(lengths),
        "samples": samples,
        "depths": list(depths) if depths is not None else None,
        "seed": seed,
        "max_new_tokens": limit,
        "decoding": "greedy",
        "prose_sentences": len(filler.sentences) if filler is not None else 0,
        "tokenizer_sha256": tokenizer_fingerprint(model.tokenizer),
    }
    report = TaskReport(task, model.name, model.kind, settings)
    began = time.monotonic()
    report.complete = True
    for length in lengths:
        asked = cell_prompts(task, encoder, filler, length, samples, depths, seed)
        results = _ask(model, asked, limit, deadline)
        if len(results) < len(asked):
            report.complete = False
        found = [(depth, _sample(length, prompt, output)) for depth, prompt, output in results]
        report.samples += [sample for _, sample in found]
        for depth in sorted({depth for depth, _ in found}, key=lambda d: -1.0 if d is None else d):
            report.cells.append(_cell(length, depth, [sample for d, sample in found if d == depth]))
        report.seconds = round(time.monotonic() - began, 2)
        on_cell(report)
    return report


def _sample(length: int, prompt: Prompt, output: str) -> Sample:
    return Sample(length, len(prompt.ids), prompt.depth, score(prompt, output), prompt.answer, output)


def _ask(
    model: LanguageModel, asked: list[tuple[float | None, Prompt]], limit: int, deadline: float | None
) -> list[tuple[float | None, Prompt, str]]:
    """The outputs, prompts of equal length together; those that the deadline cut off are missing."""
    order = sorted(range(len(asked)), key=lambda k: len(asked[k][1].ids))
    outputs: dict[int, str] = {}
    for size, same in itertools.groupby(order, key=lambda k: len(asked[k][1].ids)):
        rows = list(same)
        most = model.max_batch(size + limit)
        for start in range(0, len(rows), most):
            if deadline is not None and time.monotonic() > deadline:
                break
            batch = rows[start : start + most]
            prompts = [asked[k][1] for k in batch]
            texts = greedy(
                model,
                np.stack([prompt.ids for prompt in prompts]).astype(np.int64),
                limit,
                lambda row, text, prompts=prompts: settled(prompts[row], text),  # type: ignore[misc]
            )
            outputs.update(zip(batch, texts, strict=True))
    return [(*asked[k], outputs[k]) for k in sorted(outputs)]
