"""Passkey retrieval in the style of Landmark attention: a number hidden in five sentences said over and
over."""

from __future__ import annotations

import numpy as np

from lawcat_edge.data.tasks.filler import Encoder, Filler
from lawcat_edge.data.tasks.prompts import Prompt
from lawcat_edge.runtime.errors import LawcatError

SENTENCES = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
)
HEAD = (
    "An important fact is hidden in a lot of irrelevant text. Find it and memorize it. "
    "You will be asked about it at the end.\n"
)
NEEDLE = "\nThe pass key is {key}. Remember it. {key} is the pass key.\n"
QUESTION = "\nWhat is the pass key? The pass key is"
HIGHEST_KEY = 50_000


class Passkey:
    """Makes passkey prompts of an exact number of tokens."""

    task = "passkey"

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder
        self.filler = Filler.build(encoder, SENTENCES)
        self.head = encoder.first(HEAD)
        self.question = encoder.after_text(QUESTION)
        self._least = len(self.filler.line_start(0)[0]) + 1  # a sentence and more
        # A line of filler may stop after n tokens or not; that repeats with the ring.
        ring = len(self.filler.ids)
        self._stops = np.array([self.filler.may_stop(0, ring + n) for n in range(ring)])

    def shortest(self) -> int:
        """The shortest prompt this tokenizer allows, whatever the key."""
        longest_needle = len(self.encoder.after_text(NEEDLE.format(key=HIGHEST_KEY)))
        return len(self.head) + longest_needle + len(self.question) + 2 * (self._least + len(self.filler.ids))

    def make(self, rng: np.random.Generator, length: int, depth: float) -> Prompt:
        """A prompt of exactly ``length`` tokens, the needle at ``depth`` of the filler, to within a
        sentence or two.

        Raises LawcatError for a length too short to hold it.
        """
        key = int(rng.integers(1, HIGHEST_KEY + 1))
        needle = self.encoder.after_text(NEEDLE.format(key=key))
        room = length - len(self.head) - len(needle) - len(self.question)
        if length < self.shortest():
            raise LawcatError(f"A passkey prompt needs at least {self.shortest()} tokens, not {length}.")
        before = self._before(room, depth)
        ids = np.concatenate(
            [
                self.head,
                self.filler.opening(0, before),
                needle,
                self.filler.opening(0, room - before),
                self.question,
            ]
        )
        return Prompt(self.task, ids, str(key), f" {key}.", before / room, QUESTION)

    def _before(self, room: int, depth: float) -> int:
        """Filler tokens before the needle: as near to depth as both stretches may stop between words."""
        wish = min(max(round(room * depth), self._least), room - self._least)
        ring = len(self.filler.ids)
        # With whole words as tokens more than half of the places may be cut, so the first search finds two
        # that add up; for a tokenizer that splits these words, cut within a word.
        for stops in (self._stops, np.ones_like(self._stops)):
            for shift in range(2 * ring + 1):
                for before in (wish - shift, wish + shift):
                    after = room - before
                    long_enough = min(before, after) >= self._least
                    if long_enough and stops[before % ring] and stops[after % ring]:
                        return before
        raise AssertionError("the length was checked to hold both stretches")
