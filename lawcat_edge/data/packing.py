"""Sequences of exactly ``seq_len`` ids: from text files as a stream, or from tokenised arrays by index."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np
import tokenizers

from lawcat_edge.data.corpus import ARRAY_SUFFIXES, TokenArray, encode_parts, separator_ids, start_ids
from lawcat_edge.data.readers import SPLITS, ChatForm, Part, read_parts
from lawcat_edge.runtime.errors import LawcatError

T = TypeVar("T")
OPEN_FILES = 8
SHUFFLE_CHARACTERS = 1 << 25
"""Text held for shuffling (32 M characters): the bound of the reader's memory."""
SHUFFLE_SEQUENCES = 256
"""Packed sequences held for a second shuffle, so that a long document does not fill a whole batch."""


def open_source(
    paths: list[str],
    tokenizer: tokenizers.Tokenizer,
    seq_len: int,
    seed: int,
    split: str,
    heldout_share: float,
    chat_template: ChatForm | None,
) -> TextFiles | TokenFiles:
    arrays = [path for path in paths if Path(path).suffix in ARRAY_SUFFIXES]
    if arrays and len(arrays) != len(paths):
        raise LawcatError(
            "Give either tokenised arrays (.bin, .npy) or text as data, not both; tokenise the text too."
        )
    if arrays:
        return TokenFiles([TokenArray(path, tokenizer) for path in arrays], tokenizer, seq_len, seed, split)
    return TextFiles(paths, tokenizer, seq_len, seed, split, heldout_share, chat_template)


def _no_text(split: str, seq_len: int) -> LawcatError:
    if split == "heldout":
        return LawcatError(
            f"The held-out documents do not fill one sequence of {seq_len} tokens; give more documents."
        )
    return LawcatError(
        f"The data holds no usable text for one sequence of {seq_len} tokens; give more or longer text."
    )


def _draw(held: list[T], rng: np.random.Generator) -> T:
    """Take one at random out of a shuffle buffer, in constant time."""
    k = int(rng.integers(len(held)))
    held[k], held[-1] = held[-1], held[k]
    return held.pop()


class TextFiles:
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
        chat_template: ChatForm | None,
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
                part = _draw(held, rng)
                size -= len(part.text)
                yield part
        while held:
            yield _draw(held, rng)

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
                yield _draw(held, rng)
        while held:
            yield _draw(held, rng)

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


class TokenFiles:
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
