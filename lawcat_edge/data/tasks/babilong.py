"""BABILong-style QA2 and QA3: who carried what where, told in short facts scattered through unrelated
prose."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from lawcat_edge.data.tasks.filler import Encoder, Filler
from lawcat_edge.data.tasks.prompts import ROOMS, Prompt
from lawcat_edge.runtime.errors import LawcatError

PEOPLE = ("Mary", "John", "Daniel", "Sandra")
ITEMS = ("apple", "football", "milk")
MOVE = ("moved", "went", "went back", "travelled", "journeyed")
TAKE = ("got", "took", "grabbed", "picked up")
DROP = ("dropped", "left", "discarded", "put down")
FACTS = {2: (8, 14), 3: (12, 20)}
"""Fewest and most facts of a world."""
HEADROOM = 300
"""A task of N tokens has a background of N − 300."""

_RULES = (
    "Facts about people and things are hidden in the text below. An item goes wherever its holder goes, "
    "and it stays where it is dropped. "
)
HEAD = {
    2: _RULES + "Answer the question with the room where the item is now.\n"
    "Example: John went to the garden. John took the milk. John moved to the office. "
    "Where is the milk? The milk is in the office.\n"
    "Example: Mary got the football. Mary went to the kitchen. Mary dropped the football. "
    "Mary moved to the hallway. Where is the football? The football is in the kitchen.\n"
    "Always answer in this form: The milk is in the garden.\n",
    3: _RULES + "Answer the question with the room where the item was before.\n"
    "Example: John went to the garden. John took the milk. John moved to the office. "
    "Where was the milk before the office? Before the office the milk was in the garden.\n"
    "Example: Mary went to the bedroom. Mary got the football. Mary went to the kitchen. "
    "Mary moved to the hallway. Mary dropped the football. Where was the football before the hallway? "
    "Before the hallway the football was in the kitchen.\n"
    "Always answer in this form: Before the office the milk was in the garden.\n",
}


@dataclass(frozen=True)
class World:
    """Facts in order, a question about them, its answer (a room) and the ideal reply."""

    facts: tuple[str, ...]
    question: str
    answer: str
    reply: str


def simulate(rng: np.random.Generator, number: int) -> World:
    """A random world whose question needs two (QA2) or three (QA3) of its facts."""
    assert number in FACTS
    while True:
        world = _attempt(rng, number)
        if world is not None:
            return world


def _pick(rng: np.random.Generator, options: tuple[str, ...] | list[str]) -> str:
    return options[int(rng.integers(len(options)))]


def _attempt(rng: np.random.Generator, number: int) -> World | None:
    low, high = FACTS[number]
    where: dict[str, str] = {}  # known only once told, so every later fact can be followed
    lies = {item: _pick(rng, ROOMS) for item in ITEMS}
    holder: dict[str, str] = {}
    been: dict[str, list[str]] = {item: [] for item in ITEMS}
    facts: list[str] = []
    for _ in range(int(rng.integers(low, high + 1))):
        person = _pick(rng, PEOPLE)
        here = where.get(person)
        held = [item for item, who in holder.items() if who == person]
        near = [item for item in ITEMS if here is not None and item not in holder and lies[item] == here]
        roll = rng.random()
        if near and roll < 0.7:
            item = _pick(rng, near)
            holder[item] = person
            assert here is not None
            if been[item][-1:] != [here]:
                been[item].append(here)
            facts.append(f"{person} {_pick(rng, TAKE)} the {item}.")
        elif held and roll < 0.25:
            item = _pick(rng, held)
            del holder[item]
            assert here is not None
            lies[item] = here
            facts.append(f"{person} {_pick(rng, DROP)} the {item}.")
        else:
            room = _pick(rng, [room for room in ROOMS if room != here])
            where[person] = room
            for item in held:
                been[item].append(room)
            facts.append(f"{person} {_pick(rng, MOVE)} to the {room}.")
    asked: list[tuple[str, str, str, str]] = []
    for item, rooms in been.items():
        if number == 2 and rooms:
            asked.append((item, f"Where is the {item}?", rooms[-1], f"The {item} is in the {rooms[-1]}."))
        if number == 3:
            for before, room in itertools.pairwise(rooms):
                if rooms.count(room) == 1:  # visited twice, the question would have two answers
                    reply = f"Before the {room} the {item} was in the {before}."
                    asked.append((item, f"Where was the {item} before the {room}?", before, reply))
    if not asked:
        return None
    _, question, answer, reply = asked[int(rng.integers(len(asked)))]
    return World(tuple(facts), question, answer, reply)


class Babilong:
    """Makes the prompts of QA2 or QA3. ``prose`` may be missing only for prompts without background."""

    def __init__(self, encoder: Encoder, number: int, prose: Filler | None) -> None:
        self.encoder, self.number, self.filler = encoder, number, prose
        self.task = f"babilong-qa{number}"
        self.head = encoder.first(HEAD[number])

    def shortest(self) -> int:
        return len(self.head) + 320

    def make(self, rng: np.random.Generator, length: int, depth: float = 0.0) -> Prompt:
        """A prompt of exactly ``length`` tokens where words can be cut so, else a little shorter (for
        training)."""
        world = simulate(rng, self.number)
        extra = self.overhead(world)
        if length < extra + 2:
            raise LawcatError(f"A {self.task} prompt needs at least {extra + 2} tokens, not {length}.")
        return self.assemble(rng, world, length - extra)

    def cell(self, seed: int, length: int, samples: int) -> list[Prompt]:
        """The prompts of one length. Background: length − 300 tokens, and up to the cell's longest world
        more, so that all prompts of the cell have one length; none for length 0."""
        rngs = [np.random.default_rng([seed, self.number, length, k]) for k in range(samples)]
        worlds = [simulate(rng, self.number) for rng in rngs]
        if length == 0:
            return [self.assemble(rng, world, 0) for rng, world in zip(rngs, worlds, strict=True)]
        if length <= HEADROOM:
            raise LawcatError(f"BABILong lengths are 0 or above {HEADROOM} tokens, not {length}.")
        sizes = [self.overhead(world) for world in worlds]
        backgrounds = [length - HEADROOM + max(sizes) - size for size in sizes]
        return [
            self.assemble(rng, world, size)
            for rng, world, size in zip(rngs, worlds, backgrounds, strict=True)
        ]

    def _question(self, world: World) -> np.ndarray:
        return self.encoder.after_text(f"\nQuestion: {world.question}\nAnswer:")

    def overhead(self, world: World) -> int:
        """Tokens of everything but the background."""
        facts = sum(len(self.encoder.after_text(" " + fact)) for fact in world.facts)
        return len(self.head) + facts + len(self._question(world))

    def assemble(self, rng: np.random.Generator, world: World, background: int) -> Prompt:
        """The world in ``background`` tokens of prose, its facts in order in random gaps between
        sentences."""
        facts = [self.encoder.after_text(" " + fact) for fact in world.facts]
        opening = self.encoder.after_line(world.facts[0])
        pieces: list[np.ndarray] = [self.head]
        if background <= 0:
            pieces += [opening, *facts[1:]]
        else:
            if self.filler is None:
                raise LawcatError(f"{self.task} needs prose as background; name text files with --text.")
            pieces += self._scatter(rng, self.filler, background, facts, opening)
        pieces.append(self._question(world))
        ids = np.concatenate(pieces)
        return Prompt(self.task, ids, world.answer, f" {world.reply}", None, world.question)

    def _scatter(
        self,
        rng: np.random.Generator,
        filler: Filler,
        count: int,
        facts: list[np.ndarray],
        opening: np.ndarray,
    ) -> list[np.ndarray]:
        for _ in range(24):  # until the stretch can stop between two words at the wanted length
            begin = int(filler.starts[rng.integers(len(filler.starts))])
            first, replaced = filler.line_start(begin)
            gaps = np.sort(rng.choice(filler.boundaries(begin, count), size=len(facts), replace=True))
            # What opens the line has no space before it; the difference in tokens is made up at the end.
            opens_with_fact = gaps[0] == 0
            change = len(opening) - len(facts[0]) if opens_with_fact else len(first) - replaced
            end = max(count - change, int(gaps[-1]))
            if filler.ends[(begin + end) % len(filler.ids)]:
                break
        pieces: list[np.ndarray] = []
        at = 0
        for k, gap in enumerate(map(int, gaps)):
            if gap > at:
                stretch = filler.take(begin + at, gap - at)
                if at == 0 and not opens_with_fact:
                    stretch = np.concatenate([first, filler.take(begin + replaced, gap - replaced)])
                pieces.append(stretch)
                at = gap
            pieces.append(opening if k == 0 and opens_with_fact else facts[k])
        pieces.append(filler.take(begin + at, end - at))
        return pieces
