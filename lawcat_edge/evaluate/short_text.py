"""Whether a bundle writes as its teacher does, by the perplexity of both on a short text that is kept here.

The text is of this project's own writing and in no training set; a few hundred words take seconds. It tells a
student that was hardly trained from one that was, and no more than that: ``lawcat-edge eval`` measures.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from lawcat_edge.data.corpus import start_ids
from lawcat_edge.evaluate.lm import BundleModel, LanguageModel
from lawcat_edge.evaluate.perplexity import token_losses
from lawcat_edge.runtime.errors import LawcatError

MOST_TOKENS = 512
"""Of the text: a tokenizer of bytes would make 2,000 of it."""
FAR = 2.0
"""Perplexity over the teacher's from which a bundle is warned of; the published hybrid has 1.01."""
_CHUNK = 128
_LARGEST = 700.0  # nats of which the exponential is still a number

TEXT = """\
The ferry to the island leaves twice a day, at eight in the morning and at five in the afternoon, and in
winter only when the wind allows it. Most passengers are people who live there and have been to the dentist,
the bank or the hospital. They sit in the cabin with their shopping between their feet and talk about the
price of heating oil. The few visitors stand outside, because they want to see the water, and after ten
minutes they come in again because they have seen it and are cold.

The captain has done this for twenty-six years. He says that the crossing has not changed, but the boat has.
The old one had to be started by hand and could be heard from both shores. The new one is quiet, has a
screen instead of a compass, and tells him when a part is worn before it breaks. He trusts it, but he still
looks at the sky before he looks at the screen, and he keeps the compass in a drawer.

Once, in his third year, the engine stopped half way across. There was fog, and the tide was carrying them
slowly towards the rocks at the north end. He told everybody to put on a life jacket and asked whether
anyone knew something about engines. A woman who had come to visit her brother raised her hand. She repaired
sewing machines, she said, and a machine is a machine. It took her a quarter of an hour to find that the
fuel line was blocked, and another five minutes to clear it with a hairpin. When they arrived, the whole
village was standing on the pier, since somebody had heard the silence and understood what it meant.

She stayed on the island for a week, as she had planned, and then for another one, as she had not. Today she
has a small workshop behind the post office, where she repairs everything that has a motor, and she is
married to the captain. If you ask them how they met, he tells the story with the fog and the rocks, and it
becomes a little longer every year. She only smiles and says that he should have changed the filter.
"""


def against_teacher(folder: Path, teacher: Any) -> dict[str, Any]:
    """Mean loss, in nats a token, of the bundle in `folder` and of its teacher (a ``Teacher``, loaded here).

    {"tokens": predicted tokens, "loss": the bundle's, "teacher_loss": the teacher's}. The bundle is let go
    before the teacher is loaded. Raises LawcatError where a loss is not finite.
    """
    from lawcat_edge.evaluate.torch_lm import TeacherModel

    count, mine = loss(BundleModel(folder))
    _, theirs = loss(TeacherModel.load(teacher, device="cpu"))
    return {"tokens": count, "loss": mine, "teacher_loss": theirs}


def loss(model: LanguageModel) -> tuple[int, float]:
    """How many tokens of the text the model was to predict, and its mean loss in nats."""
    ids = [*start_ids(model.tokenizer), *model.tokenizer.encode(TEXT, add_special_tokens=False).ids]
    tokens = np.asarray(ids[: MOST_TOKENS + 1], np.int64)[None]
    losses, at = [], 0
    for logits in model.logits(tokens[:, :-1], _CHUNK):
        size = logits.shape[1]
        losses.append(token_losses(logits, None, tokens[:, at + 1 : at + 1 + size])[0])
        at += size
    mean = float(np.concatenate(losses, 1).mean())
    if not math.isfinite(mean):
        raise LawcatError("The model's loss on a short text is not finite; check its weights.")
    return tokens.shape[1] - 1, mean


def describe(measured: dict[str, Any]) -> str:
    """``against_teacher`` in words."""
    mine, theirs = (math.exp(min(measured[key], _LARGEST)) for key in ("loss", "teacher_loss"))
    return (
        f"perplexity {mine:.4g} on {measured['tokens']:,} tokens of a short text, "
        f"{_ratio(measured):.3g} times its teacher's {theirs:.4g}"
    )


def warning(measured: dict[str, Any] | None) -> str | None:
    """What a user should know before trusting a bundle that is far from its teacher; None where it is not,
    or where nothing was measured."""
    if not measured or _ratio(measured) < FAR:
        return None
    return f"{describe(measured)}: it will not write as its teacher does"


def _ratio(measured: dict[str, Any]) -> float:
    return math.exp(min(measured["loss"] - measured["teacher_loss"], _LARGEST))
