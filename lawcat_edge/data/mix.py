"""Training data: a deterministic, endless, resumable row of sequences of exactly ``seq_len`` token ids.

The row is numbered: sequence i is a function of the sources, the tokenizer, ``seq_len``, the mix and the
seed, and not of the number of processes. Rank r of w takes every i with i mod w = r, so a run resumes at
any i on any number of processes. Tokenised corpora (``tokenise_corpus``) and generated tasks are reached by
index at once; text files are read again up to i, at the speed of the tokenizer, so tokenise large text
first.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Rows
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tokenizers

from lawcat_edge.data.packing import TextFiles, TokenFiles, open_source
from lawcat_edge.data.readers import HELDOUT_SHARE, SPLITS, ChatForm, expand
from lawcat_edge.runtime.errors import LawcatError

TASKS = ("text", "teacher", "passkey", "niah-1", "niah-2", "niah-3", "babilong-qa2", "babilong-qa3")
_BLOCK = 4096

TeacherText = Callable[[np.random.Generator, int], "np.ndarray | list[int]"]
"""(rng, wanted number of tokens) -> at least one token id of text sampled from the teacher."""


@dataclass(frozen=True)
class Sequence:
    """One training sequence. ids int32 [T]; weight float32 [T] or None (all ones): how much the loss counts
    where ids[t] is the token to predict; task: the part of the mix it comes from."""

    ids: np.ndarray
    weight: np.ndarray | None = None
    task: str = "text"


def parse_mix(mix: str | Mapping[str, float] | None) -> dict[str, float]:
    """``"text:0.7,passkey:0.3"`` as a dictionary of shares that add up to 1; None is text alone.

    Raises LawcatError for an unknown task, a share that is no positive number, a task named twice, and a
    wrong sum.
    """
    if mix is None:
        return {"text": 1.0}
    pairs: list[tuple[str, str | float]] = []
    if isinstance(mix, str):
        for item in mix.split(","):
            name, colon, text = item.strip().rpartition(":")
            if not colon:
                raise LawcatError(
                    f'The task mix has {item.strip()!r} without a share; write "text:0.7,passkey:0.3".'
                )
            pairs.append((name.strip(), text))
    else:
        pairs = list(mix.items())
    shares: dict[str, float] = {}
    for name, share in pairs:
        if name not in TASKS:
            raise LawcatError(f"The task mix names {name!r}; known tasks are {', '.join(TASKS)}.")
        if name in shares:
            raise LawcatError(f"The task mix names {name!r} twice; add its shares up.")
        try:
            value = float(share)
        except ValueError:
            value = float("nan")
        if not 0 < value <= 1:
            raise LawcatError(
                f"The share of {name!r} in the task mix must be a number above 0 and up to 1, not {share!r}."
            )
        shares[name] = value
    total = sum(shares.values())
    if abs(total - 1) > 1e-6:
        raise LawcatError(f"The shares of the task mix add up to {total:g}; make them add up to 1.")
    return shares


def sequences(
    sources: Rows[str | Path],
    tokenizer: tokenizers.Tokenizer,
    seq_len: int,
    seed: int,
    rank: int = 0,
    world: int = 1,
    mix: str | Mapping[str, float] | None = None,
    split: str = "train",
    *,
    start: int = 0,
    epochs: int | None = None,
    teacher: TeacherText | None = None,
    answer_weight: float = 1.0,
    heldout_share: float = HELDOUT_SHARE,
    chat_template: ChatForm | None = None,
) -> Iterator[Sequence]:
    """Sequences start ≤ i, i mod world = rank, of the numbered row (see the module).

    sources: paths, globs and ``hub:`` names of text, or tokenised ``.bin``/``.npy`` arrays; may be empty
    for a mix that needs no prose. split: ``train`` and ``all`` go round for ever unless ``epochs`` bounds
    the passes over the text; ``heldout`` makes one pass, in order. teacher: for the task ``teacher``.
    answer_weight: the loss weight of the answer's tokens in generated tasks (1: no weights are given).
    chat_template: the teacher's, for documents that are lists of messages.
    Arguments are checked at once, data as it is read; both raise LawcatError.
    """
    shares = parse_mix(mix)
    if type(seq_len) is not int or not 8 <= seq_len <= 1 << 22:
        raise LawcatError(f"The sequence length must be a whole number from 8 to 4194304, not {seq_len!r}.")
    if not 0 <= rank < world:
        raise LawcatError(f"Rank {rank} of {world} processes does not exist.")
    if split not in SPLITS:
        raise LawcatError(f"Unknown split {split!r}; choose one of {', '.join(SPLITS)}.")
    if "teacher" in shares and teacher is None:
        raise LawcatError("The task mix asks for teacher text, but no teacher to sample from was given.")
    if split == "heldout" and epochs is None:
        epochs = 1
    needs_prose = bool({"text", "niah-2", "niah-3", "babilong-qa2", "babilong-qa3"} & set(shares))
    paths = expand(sources) if sources or needs_prose else []
    source = (
        open_source(paths, tokenizer, seq_len, seed, split, heldout_share, chat_template) if paths else None
    )
    return _rows(
        source, tokenizer, seq_len, seed, rank, world, shares, split, start, epochs, teacher, answer_weight
    )


def _rows(
    source: TextFiles | TokenFiles | None,
    tokenizer: tokenizers.Tokenizer,
    seq_len: int,
    seed: int,
    rank: int,
    world: int,
    shares: dict[str, float],
    split: str,
    start: int,
    epochs: int | None,
    teacher: TeacherText | None,
    answer_weight: float,
) -> Iterator[Sequence]:
    names = list(shares)
    maker = None
    text: Iterator[np.ndarray] | None = None
    text_at = 0  # text sequences already taken or skipped
    for i in itertools.count():
        if i % _BLOCK == 0:
            # Drawn by block, so that a resumed run need not draw one by one.
            rng = np.random.default_rng([seed, SPLITS.index(split), 1, i // _BLOCK])
            picks = rng.choice(
                len(names), size=_BLOCK, p=np.fromiter(shares.values(), float) / sum(shares.values())
            )
        task = names[picks[i % _BLOCK]]
        mine = i >= start and i % world == rank
        if task == "text":
            assert source is not None
            if not mine:
                text_at += 1
                continue
            if text is None or source.random_access:
                text = source.sequences(text_at, epochs)
            else:
                next(itertools.islice(text, text_at, text_at), None)
            ids = next(text, None)
            text_at = text_at + 1 if source.random_access else 0
            if ids is None:
                return
            yield Sequence(ids)
        elif mine:
            rng = np.random.default_rng([seed, SPLITS.index(split), 2, i])
            if maker is None:
                from lawcat_edge.data.task_sequences import TaskMaker

                prose = source.prose() if source is not None else None
                maker = TaskMaker(tokenizer, seq_len, prose, teacher, answer_weight)
            yield maker.make(task, rng)
