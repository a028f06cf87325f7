"""Perplexity and mean KL against a teacher, by position: where a linear model forgets, it shows there
first."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from lawcat_edge.data.corpus import encode_parts, start_ids
from lawcat_edge.data.readers import expand, read_parts
from lawcat_edge.evaluate.lm import LanguageModel
from lawcat_edge.losses import token_losses
from lawcat_edge.runtime.errors import LawcatError

EDGES = (0, 1024, 2048, 4096, 8192, 16_384, 32_768, 65_536)


@dataclass(frozen=True)
class Bucket:
    """Means over the predicted tokens at positions begin ≤ t < end. Natural logarithms; stderr as if tokens
    were independent; kl is KL(teacher ‖ model), agreement the share of equal likeliest tokens (both None
    without a teacher).

    low, high: the 95 % interval of the perplexity by Student's t over sequences, whose tokens hang
    together; kl_margin: half of that of kl. None with a single sequence, which says nothing of others.
    """

    begin: int
    end: int
    tokens: int
    nll: float
    nll_stderr: float
    perplexity: float
    kl: float | None = None
    agreement: float | None = None
    low: float | None = None
    high: float | None = None
    kl_margin: float | None = None


@dataclass(frozen=True)
class PerplexityReport:
    model: str
    kind: str
    teacher: str | None
    settings: dict[str, Any]
    buckets: tuple[Bucket, ...]
    overall: Bucket
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return {"format": 1, "task": "perplexity", **asdict(self)}


def text_sequences(
    files: Sequence[str | Path], tokenizer: tokenizers.Tokenizer, length: int, samples: int
) -> np.ndarray:
    """The first ``samples`` sequences of ``length`` ids of the files' text, documents joined by the
    separator: int32 [samples, length]. Raises LawcatError when the text is too short for one; fewer than
    ``samples`` may come back."""
    parts = (part for path in expand(files) for part in read_parts(path))
    held = [np.asarray(start_ids(tokenizer), np.int32)]
    size = len(held[0])
    for _, ids in encode_parts(parts, tokenizer):
        held.append(ids)
        size += len(ids)
        if size >= samples * length:
            break
    flat = np.concatenate(held)[: samples * length]
    count = len(flat) // length
    if count == 0:
        raise LawcatError(
            f"The text holds {size:,} tokens, less than one sequence of {length:,}; give more text."
        )
    return flat[: count * length].reshape(count, length)


def perplexity(
    model: LanguageModel,
    files: Sequence[str | Path],
    length: int = 8192,
    samples: int = 8,
    teacher: LanguageModel | None = None,
    chunk: int = 512,
    deadline: float | None = None,
) -> PerplexityReport:
    """Perplexity of ``model`` on the files' text in sequences of ``length`` tokens, by position bucket.

    teacher: adds KL and agreement. chunk: positions whose logits exist at once. deadline: time.monotonic()
    after which no further sequence is begun (at least one is read).
    """
    if length < 2:
        raise LawcatError(f"Perplexity needs at least 2 tokens a sequence, not {length}.")
    if samples < 1:
        raise LawcatError(f"Perplexity needs at least one sequence, not {samples}.")
    began = time.monotonic()
    rows = text_sequences(files, model.tokenizer, length, samples)
    losses: list[np.ndarray] = []
    for row in rows:
        if losses and deadline is not None and time.monotonic() > deadline:
            break
        losses.append(sequence_losses(model, teacher, row, chunk))
    table = np.stack(losses)  # [n, 3, T-1]
    buckets = []
    # Position t is that of the predicted token, so position 0 never occurs.
    for begin, end in zip(EDGES, (*EDGES[1:], length), strict=True):
        if max(begin, 1) < min(end, length):
            buckets.append(
                _bucket(
                    table[:, :, max(begin - 1, 0) : min(end, length) - 1], begin, min(end, length), teacher
                )
            )
    settings = {
        "length": length,
        "samples": len(table),
        "chunk": chunk,
        "text": [Path(f).name for f in map(str, files)],
    }
    overall = _bucket(table, 0, length, teacher)
    seconds = round(time.monotonic() - began, 2)
    name = teacher.name if teacher is not None else None
    return PerplexityReport(model.name, model.kind, name, settings, tuple(buckets), overall, seconds)


def sequence_losses(
    model: LanguageModel, teacher: LanguageModel | None, row: np.ndarray, chunk: int
) -> np.ndarray:
    """nll, KL and agreement of the tokens 1 … T−1 of one sequence: float64 [3, T−1]."""
    inputs, targets = row[None, :-1], row[None, 1:]
    references = teacher.logits(inputs, chunk) if teacher is not None else None
    found = []
    for start, logits in zip(range(0, inputs.shape[1], chunk), model.logits(inputs, chunk), strict=True):
        reference = next(references) if references is not None else None
        found.append(np.concatenate(token_losses(logits, reference, targets[:, start : start + chunk])))
    return np.concatenate(found, axis=1)


def _bucket(table: np.ndarray, begin: int, end: int, teacher: LanguageModel | None) -> Bucket:
    nll, kl, same = (table[:, k].ravel() for k in range(3))
    mean, margin = float(nll.mean()), _margin(table[:, 0])
    return Bucket(
        begin,
        end,
        len(nll),
        mean,
        float(nll.std() / math.sqrt(len(nll))),
        _exp(mean),
        float(kl.mean()) if teacher is not None else None,
        float(same.mean()) if teacher is not None else None,
        None if margin is None else _exp(mean - margin),
        None if margin is None else _exp(mean + margin),
        _margin(table[:, 1]) if teacher is not None else None,
    )


def _exp(x: float) -> float:
    return math.exp(min(x, 700.0))


def _margin(values: np.ndarray) -> float | None:
    """Half of the 95 % interval of the mean of values [sequences, tokens], sequences drawn at random."""
    count = len(values)
    if count < 2:
        return None
    return _student_t(count - 1) * float(values.mean(1).std(ddof=1)) / math.sqrt(count)


def _student_t(freedom: int) -> float:
    """The 97.5 % quantile of Student's t distribution: a table, then Cornish and Fisher's expansion."""
    if freedom <= len(_T_TABLE):
        return _T_TABLE[freedom - 1]
    z = 1.959964
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + (z**3 + z) / (4 * freedom) + second / freedom**2 + third / freedom**3


_T_TABLE = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281)
