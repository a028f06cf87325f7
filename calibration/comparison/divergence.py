"""How far one model's predictions are from another's, token by token, without keeping any logits.

Both models read a text side by side, chunk after chunk; of each pair of logits three numbers a token stay.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from lawcat_edge.evaluate.lm import LanguageModel
from lawcat_edge.losses import to_numpy, token_kl, token_nll
from lawcat_edge.runtime.errors import LawcatError

CHUNK = 256
"""Positions whose logits exist at once: 50 MB for each model at a vocabulary of 49,152."""


@dataclass(frozen=True)
class Losses:
    """Per predicted token of a text, float64 [n]: nll of the model, KL(reference ‖ model) and whether both
    like the same token best. kl and same are None where there was no reference. Natural logarithms."""

    nll: np.ndarray
    kl: np.ndarray | None = None
    same: np.ndarray | None = None

    def part(self, begin: int, end: int) -> Losses:
        cut = slice(begin, end)
        if self.kl is None or self.same is None:
            return Losses(self.nll[cut])
        return Losses(self.nll[cut], self.kl[cut], self.same[cut])

    @classmethod
    def join(cls, parts: list[Losses]) -> Losses:
        nll = np.concatenate([part.nll for part in parts])
        pairs = [(part.kl, part.same) for part in parts if part.kl is not None and part.same is not None]
        if len(pairs) < len(parts):
            return cls(nll)
        return cls(nll, np.concatenate([kl for kl, _ in pairs]), np.concatenate([same for _, same in pairs]))


def text_losses(
    model: LanguageModel,
    reference: LanguageModel | None,
    ids: np.ndarray,
    chunk: int = CHUNK,
    progress: Callable[[int], None] = lambda tokens: None,
) -> Losses:
    """Losses of the tokens 1 … T−1 of one text ids [T], read from an empty state.

    progress: called with the number of tokens read now. Raises LawcatError when logits are not finite.
    """
    inputs, targets = ids[None, :-1], ids[1:]
    known = reference.logits(inputs, chunk) if reference is not None else None
    parts: list[Losses] = []
    for start, logits in zip(range(0, inputs.shape[1], chunk), model.logits(inputs, chunk), strict=True):
        mine = _finite(to_numpy(logits)[0], model, start)
        wanted = targets[start : start + chunk]
        if known is None:
            parts.append(Losses(token_nll(mine, wanted)))
        else:
            theirs = to_numpy(next(known))[0]
            same = mine.argmax(-1) == theirs.argmax(-1)
            parts.append(Losses(token_nll(mine, wanted), token_kl(theirs, mine), same.astype(np.float64)))
        progress(len(wanted))
    return Losses.join(parts)


def _finite(logits: Any, model: LanguageModel, start: int) -> np.ndarray:
    if not np.isfinite(logits).all():
        raise LawcatError(
            f"{model.name} gave NaN or infinity at or after token {start:,}; take another scheme or adapter."
        )
    return np.asarray(logits)
