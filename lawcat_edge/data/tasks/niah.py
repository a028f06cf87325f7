"""S-NIAH-1/2/3 in the style of RULER: one "magic number" sentence in noise or prose, asked for by its key."""

from __future__ import annotations

import uuid

import numpy as np

from lawcat_edge.data.tasks.filler import Encoder, Filler
from lawcat_edge.data.tasks.passkey import SENTENCES
from lawcat_edge.data.tasks.prompts import Prompt
from lawcat_edge.data.tasks.words import ADJECTIVES, NOUNS
from lawcat_edge.runtime.errors import LawcatError

HEAD = (
    "A special magic {kind} is hidden within the following text. Make sure to memorize it. "
    "You will be asked about the {kind} afterwards.\n"
)
NEEDLE = "One of the special magic {kind}s for {key} is: {value}."
QUESTION = "\nWhat is the special magic {kind} for {key} mentioned in the provided text?"
PREFIX = " The special magic {kind} for {key} mentioned in the provided text is"
ANSWER_ROOM = 128
"""Tokens left for the answer: prompt + 128 ≤ the stated length."""
DEPTHS = tuple(np.linspace(0.0, 1.0, 40))
_TRIES = 24


def draw_key(rng: np.random.Generator) -> str:
    return f"{ADJECTIVES[rng.integers(len(ADJECTIVES))]}-{NOUNS[rng.integers(len(NOUNS))]}"


def draw_number(rng: np.random.Generator) -> str:
    return str(rng.integers(1_000_000, 10_000_000))


def draw_uuid(rng: np.random.Generator) -> str:
    return str(uuid.UUID(bytes=rng.bytes(16), version=4))


class Niah:
    """Makes the prompts of one of the three tasks. ``prose`` is the background of 2 and 3, unused for 1."""

    def __init__(self, encoder: Encoder, number: int, prose: Filler | None = None) -> None:
        assert number in (1, 2, 3)
        self.encoder, self.task = encoder, f"niah-{number}"
        if number == 1:
            self.filler = Filler.build(encoder, (" ".join(SENTENCES),), lines=True)
        elif prose is None:
            raise LawcatError(f"niah-{number} needs prose as background; name text files with --text.")
        else:
            self.filler = prose
        self.kind = "uuid" if number == 3 else "number"
        self.draw_value = draw_uuid if number == 3 else draw_number
        self.head = encoder.first(HEAD.format(kind=self.kind))
        self._shortest: int | None = None

    def shortest(self) -> int:
        """A length that holds the needle and the question whatever the key and the value."""
        if self._shortest is None:
            adjective, noun = (
                max(words, key=lambda word: len(self.encoder.after_text(" " + word)))
                for words in (ADJECTIVES, NOUNS)
            )
            words = {"kind": self.kind, "key": f"{adjective}-{noun}", "value": ""}
            needle = len(self.encoder.after_line(NEEDLE.format(**words) + "\n"))
            question = len(self.encoder.after_text(QUESTION.format(**words) + PREFIX.format(**words)))
            value = len(self.draw_value(np.random.default_rng(0)))  # a token is a character at least
            # The cut of a key within a word may differ from that of its parts by a token or two, thrice.
            self._shortest = len(self.head) + max(160, needle + question + value + 6)
        return self._shortest

    def make(self, rng: np.random.Generator, length: int, depth: float) -> Prompt:
        """A prompt of exactly ``length`` tokens, the needle between two sentences nearest to ``depth`` of
        the context.

        Where no cut between words gives that length, the nearest shorter one. Raises LawcatError for a
        length too short to hold it.
        """
        if length < self.shortest():
            raise LawcatError(f"A {self.task} prompt needs at least {self.shortest()} tokens, not {length}.")
        best: Prompt | None = None
        for _ in range(_TRIES):
            prompt = self._attempt(rng, length, depth)
            if best is None or len(prompt.ids) > len(best.ids):
                best = prompt
            if len(best.ids) == length:
                break
        assert best is not None
        return best

    def _attempt(self, rng: np.random.Generator, length: int, depth: float) -> Prompt:
        key, value = draw_key(rng), self.draw_value(rng)
        words = {"kind": self.kind, "key": key, "value": value}
        question = self.encoder.after_text(QUESTION.format(**words) + PREFIX.format(**words))
        filler = self.filler
        begin = int(filler.starts[rng.integers(len(filler.starts))])
        needle = NEEDLE.format(**words)
        bounds = filler.boundaries(begin, length)
        room = length - len(self.head) - len(question)
        at = int(bounds[np.argmin(np.abs(bounds - depth * room))])
        if at == 0 or filler.lines:
            line = self.encoder.after_line(needle + "\n" * filler.lines)
        else:
            line = self.encoder.after_text(" " + needle)
        left = room - len(line)
        if at > left:
            at = int(bounds[bounds <= left][-1])
        # The first sentence of a line loses its space, so what stands there decides how many ring ids follow.
        before = filler.opening(begin, at) if at else filler.ids[:0]
        if at and not filler.lines:
            first, replaced = filler.line_start(begin)
            before = filler.opening(begin, at + len(first) - replaced)
        tail = left - len(before)
        while tail > 1 and not filler.ends[(begin + at + tail) % len(filler.ids)]:
            tail -= 1
        ids = np.concatenate([self.head, before, line, filler.take(begin + at, tail), question])
        return Prompt(
            self.task,
            ids,
            value,
            f" {value}.",
            len(before) / (len(before) + tail),
            QUESTION.format(**words).strip(),
        )
