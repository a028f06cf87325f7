"""What every retrieval task makes: a prompt in token ids with its answer; and how answers are scored."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from lawcat_edge.data.tasks.filler import Encoder

ROOMS = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")


@dataclass(frozen=True)
class Prompt:
    """One question.

    ids int32 [T]: the whole prompt; answer: what is looked for in the output; reply: the ideal
    continuation; depth: where the needle lies, as a share of the context (None where the task has none);
    question: the asking part of the text.
    """

    task: str
    ids: np.ndarray
    answer: str
    reply: str
    depth: float | None
    question: str

    def text(self, encoder: Encoder) -> str:
        return encoder.decode(self.ids)


def score_number(output: str, answer: str) -> bool:
    """Passkey: the first number of the output equals the key."""
    match = re.search(r"\d+", output)
    return match is not None and int(match.group()) == int(answer)


def score_contains(output: str, answer: str) -> bool:
    """S-NIAH: the value appears in the output, whatever the case."""
    return answer.lower() in output.lower()


def first_sentence(output: str) -> str:
    return re.split(r"[.!?\n]", output.strip(), maxsplit=1)[0]


def score_room(output: str, answer: str, question: str) -> bool:
    """BABILong: the rooms in the first sentence, less those in the question, are exactly the answer."""
    said, asked = first_sentence(output).lower(), question.lower()
    rooms = {room for room in ROOMS if room in said and room not in asked}
    return rooms == {answer}


def score(prompt: Prompt, output: str) -> bool:
    if prompt.task == "passkey":
        return score_number(output, prompt.answer)
    if prompt.task.startswith("niah"):
        return score_contains(output, prompt.answer)
    return score_room(output, prompt.answer, prompt.question)


def settled(prompt: Prompt, output: str) -> bool:
    """Whether no further text can change the score, so that decoding may stop."""
    if prompt.task == "passkey":
        return re.search(r"\d+\D", output) is not None
    if prompt.task.startswith("niah"):
        return score_contains(output, prompt.answer)
    return re.search(r"\S.*[.!?\n]", output.lstrip()) is not None


def wilson(correct: int, n: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson 1927): good for small n and for shares near 0 and 1."""
    assert 0 <= correct <= n
    if n == 0:
        return 0.0, 1.0
    share, z2 = correct / n, z * z
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = z * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    # At the ends rounding must not push the bound past the share itself.
    return (middle - half if correct else 0.0), (middle + half if correct < n else 1.0)


MakePrompt = Callable[[np.random.Generator, int, float], Prompt]
"""(rng, exact length in tokens, depth 0–1) -> Prompt."""
