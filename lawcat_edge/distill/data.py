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

from lawcat_edge.distill.corpus import (
    ARRAY_SUFFIXES,
    TokenArray,
    encode_parts,
    separator_ids,
    start_ids,
    tokenise_corpus,
    tokenizer_fingerprint,
)
from lawcat_edge.distill.readers import HELDOUT_SHARE, SPLITS, Part, expand, read_parts
from lawcat_edge.runtime.errors import LawcatError

__all__ = [
    "Sequence",
    "parse_mix",
    "sequences",
    "start_ids",
    "token_sequences",
    "tokenise_corpus",
    "tokenizer_fingerprint",
]

TASKS = ("text", "teacher", "passkey", "niah-1", "niah-2", "niah-3", "babilong-qa2", "babilong-qa3")
OPEN_FILES = 8
SHUFFLE_CHARACTERS = 1 << 25
"""Text held for shuffling (32 M characters): the bound of the reader's memory."""
SHUFFLE_SEQUENCES = 256
"""Packed sequences held for a second shuffle, so that a long document does not fill a whole batch."""
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


def token_sequences(
    sources: Rows[str | Path],
    tokenizer: tokenizers.Tokenizer,
    seq_len: int,
    seed: int,
    rank: int = 0,
    world: int = 1,
    mix: str | Mapping[str, float] | None = None,
    split: str = "train",
    **options: object,
) -> Iterator[np.ndarray]:
    """The ids alone of ``sequences``: int32 [seq_len] each."""
    rows = sequences(sources, tokenizer, seq_len, seed, rank, world, mix, split, **options)  # type: ignore[arg-type]
    return (row.ids for row in rows)


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
    chat_template: str | None = None,
) -> Iterator[Sequence]:
    """Sequences start ≤ i, i mod world = rank, of the numbered row (see the module).

    sources: paths, globs and ``hub:`` names of text, or tokenised ``.bin``/``.npy`` arrays; may be empty
    for a mix that needs no prose. split: ``train`` and ``all`` go round for ever unless ``epochs`` bounds
    the passes over the text; ``heldout`` makes one pass, in order. teacher: for the task ``teacher``.
    answer_weight: the loss weight of the answer's tokens in generated tasks (1: no weights are given).
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
    source = _open(paths, tokenizer, seq_len, seed, split, heldout_share, chat_template) if paths else None
    return _rows(
        source, tokenizer, seq_len, seed, rank, world, shares, split, start, epochs, teacher, answer_weight
    )


def _rows(
    source: _TextFiles | _TokenFiles | None,
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
                from lawcat_edge.distill.tasks_mix import TaskMaker

                prose = source.prose() if source is not None else None
                maker = TaskMaker(tokenizer, seq_len, prose, teacher, answer_weight)
            yield maker.make(task, rng)


def _open(
    paths: list[str],
    tokenizer: tokenizers.Tokenizer,
    seq_len: int,
    seed: int,
    split: str,
    heldout_share: float,
    chat_template: str | None,
) -> _TextFiles | _TokenFiles:
    arrays = [path for path in paths if Path(path).suffix in ARRAY_SUFFIXES]
    if arrays and len(arrays) != len(paths):
        raise LawcatError(
            "Give either tokenised arrays (.bin, .npy) or text as data, not both; tokenise the text too."
        )
    if arrays:
        return _TokenFiles([TokenArray(path, tokenizer) for path in arrays], tokenizer, seq_len, seed, split)
    return _TextFiles(paths, tokenizer, seq_len, seed, split, heldout_share, chat_template)


def _no_text(split: str, seq_len: int) -> LawcatError:
    if split == "heldout":
        return LawcatError(
            f"The held-out documents do not fill one sequence of {seq_len} tokens; give more documents."
        )
    return LawcatError(
        f"The data holds no usable text for one sequence of {seq_len} tokens; give more or longer text."
    )


class _TextFiles:
    """Text packed into sequences as it is read; a shuffle buffer bounds memory."""

    random_access = False

    def __init__(
        self,
        paths: list[str],
        tokenizer: tokenizers.Tokenizer,
        seq_len: int,
        seed: int,
        split: str,
        heldout_share: float,
        chat_template: str | None,
    ) -> None:
        self.paths, self.tokenizer, self.seq_len, self.seed, self.split = (
            paths,
            tokenizer,
            seq_len,
            seed,
            split,
        )
        self.heldout_share, self.chat_template = heldout_share, chat_template

    def _read(self, path: str) -> Iterator[Part]:
        return read_parts(path, self.split, self.heldout_share, self.chat_template)

    def _shuffled(self, epoch: int) -> Iterator[Part]:
        """All parts once, in an order set by seed and epoch: some files at a time, then a bounded buffer."""
        rng = np.random.default_rng([self.seed, SPLITS.index(self.split), 3, epoch])
        waiting = [self.paths[k] for k in rng.permutation(len(self.paths))]
        streams = [self._read(waiting.pop()) for _ in range(min(OPEN_FILES, len(waiting)))]
        held: list[Part] = []
        size = 0

        def take() -> Part:
            k = int(rng.integers(len(held)))
            held[k], held[-1] = held[-1], held[k]
            return held.pop()

        while streams:
            k = int(rng.integers(len(streams)))
            part = next(streams[k], None)
            if part is None:
                streams.pop(k)
                if waiting:
                    streams.append(self._read(waiting.pop()))
                continue
            held.append(part)
            size += len(part.text)
            while size > SHUFFLE_CHARACTERS:
                part = take()
                size -= len(part.text)
                yield part
        while held:
            yield take()

    def sequences(self, first: int, epochs: int | None) -> Iterator[np.ndarray]:
        """int32 [seq_len] from the ``first`` sequence on."""
        packed = self._pack(epochs)
        return itertools.islice(packed if self.split == "heldout" else self._mixed(packed), first, None)

    def _mixed(self, packed: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        rng = np.random.default_rng([self.seed, 6])
        held: list[np.ndarray] = []
        for ids in packed:
            held.append(ids)
            if len(held) > SHUFFLE_SEQUENCES:
                k = int(rng.integers(len(held)))
                held[k], held[-1] = held[-1], held[k]
                yield held.pop()
        for k in rng.permutation(len(held)):
            yield held[k]

    def _pack(self, epochs: int | None) -> Iterator[np.ndarray]:
        prefix = np.asarray(start_ids(self.tokenizer), np.int32)
        held, size, made = [prefix], len(prefix), 0
        for epoch in itertools.count() if epochs is None else range(epochs):
            ordered = self.split == "heldout"
            parts = (p for path in self.paths for p in self._read(path)) if ordered else self._shuffled(epoch)
            seen = 0
            for _, ids in encode_parts(parts, self.tokenizer, separate_all=not ordered):
                seen += len(ids)
                held.append(ids)
                size += len(ids)
                if size < self.seq_len:
                    continue
                joined = np.concatenate(held)
                for k in range(size // self.seq_len):
                    made += 1
                    yield joined[k * self.seq_len : (k + 1) * self.seq_len].copy()
                rest = joined[size - size % self.seq_len :].copy()
                held, size = [rest], len(rest)
            if seen == 0 or made == 0:
                raise _no_text(self.split, self.seq_len)

    def prose(self, characters: int = 1 << 21) -> str:
        """About 2 M characters to draw background sentences from, the same for every rank."""
        taken: list[str] = []
        size = 0
        share = max(characters // len(self.paths), 1 << 14)
        for path in self.paths:
            here = 0
            for part in self._read(path):
                taken.append(part.text[:share])
                here += len(taken[-1])
                if here >= share:
                    break
            size += here
            if size >= characters:
                break
        return "\n".join(taken)


class _TokenFiles:
    """Windows of tokenised arrays, found by index; a fresh cut and a fresh order every epoch."""

    random_access = True

    def __init__(
        self, arrays: list[TokenArray], tokenizer: tokenizers.Tokenizer, seq_len: int, seed: int, split: str
    ) -> None:
        self.arrays, self.tokenizer, self.seq_len, self.seed, self.split = (
            arrays,
            tokenizer,
            seq_len,
            seed,
            split,
        )
        self.bounds = [array.bounds(split) for array in arrays]
        if split == "heldout":
            counts = [(end - begin) // seq_len for begin, end in self.bounds]
        else:  # one window less, so that an epoch may begin anywhere within the first
            counts = [
                max((end - begin) // seq_len - 1, int(end - begin >= seq_len)) for begin, end in self.bounds
            ]
        self.ends = np.cumsum(counts)
        if self.ends[-1] == 0:
            raise _no_text(split, seq_len)

    def sequences(self, first: int, epochs: int | None) -> Iterator[np.ndarray]:
        count = int(self.ends[-1])
        for j in itertools.count(first):
            epoch, k = divmod(j, count)
            if epochs is not None and epoch >= epochs:
                return
            shuffled = self.split != "heldout"
            yield self._window(
                permuted(k, count, self.seed, epoch) if shuffled else k, epoch if shuffled else None
            )

    def _window(self, k: int, epoch: int | None) -> np.ndarray:
        which = int(np.searchsorted(self.ends, k, side="right"))
        begin, end = self.bounds[which]
        at = begin + (k - (int(self.ends[which - 1]) if which else 0)) * self.seq_len
        if epoch is not None:
            room = min(self.seq_len, end - begin - self.seq_len + 1)
            at += int(np.random.default_rng([self.seed, 4, epoch, which]).integers(room))
        return self.arrays[which].read(at, at + self.seq_len)

    def prose(self, tokens: int = 1 << 19) -> str:
        share = max(tokens // len(self.arrays), self.seq_len)
        separator = separator_ids(self.tokenizer)[0]
        taken = []
        for array, (begin, end) in zip(self.arrays, self.bounds, strict=True):
            ids = array.read(begin, min(end, begin + share))
            cuts = np.flatnonzero(ids == separator)
            taken += [self.tokenizer.decode(piece.tolist()) for piece in np.split(ids, cuts)]
        return "\n".join(taken)


def permuted(k: int, count: int, seed: int, epoch: int) -> int:
    """The k-th entry of a permutation of range(count) set by seed and epoch, in constant memory.

    A four-round Feistel network over the next even power of two, walked until it lands inside the range.
    """
    assert 0 <= k < count
    half = max(((count - 1).bit_length() + 1) // 2, 1)
    mask = (1 << half) - 1
    keys = [int(x) for x in np.random.default_rng([seed, 5, epoch]).integers(1, 1 << 32, size=4)]
    while True:
        left, right = k >> half, k & mask
        for key in keys:
            mixed = (right * 0x9E3779B1 + key) & 0xFFFFFFFF
            mixed = ((mixed ^ (mixed >> 15)) * 0x85EBCA77) & 0xFFFFFFFF
            left, right = right, left ^ ((mixed ^ (mixed >> 13)) & mask)
        k = (left << half) | right
        if k < count:
            return k
