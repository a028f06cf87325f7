"""Choosing the next token from logits: the same choice for the same seed on every platform.

All arithmetic is float64 numpy. The random number of the token at position p of a text is the p-th draw of
PCG64(seed), so a generation that was saved and restored goes on exactly as it would have without the pause.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Any

import numpy as np

from lawcat_edge.runtime.errors import LawcatError

# name: (lowest, highest); temperature above 100 is indistinguishable from uniform.
_RANGES = {
    "temperature": (0.0, 100.0),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.01, 100.0),
}


@dataclass(frozen=True)
class SamplingOptions:
    """How tokens are chosen.

    temperature: 0 is greedy; otherwise logits are divided by it.
    top_k: keep the k most likely (0: all). top_p: keep the fewest whose probabilities reach it (1: all).
    min_p: drop what is less likely than min_p times the most likely (0: none).
    repetition_penalty: logits of tokens in the text are divided (positive) or multiplied by it (1: off).
    seed: a whole number, or None for a fresh one each time.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
                raise LawcatError(f"{name} must be a number from {low:g} to {high:g}, not {value!r}.")
        if type(self.top_k) is not int or not 0 <= self.top_k <= 1 << 24:
            raise LawcatError(f"top_k must be a whole number from 0 to {1 << 24:,}, not {self.top_k!r}.")
        if self.seed is not None and (type(self.seed) is not int or not 0 <= self.seed < 1 << 63):
            raise LawcatError(f"seed must be a whole number from 0 to 2**63 - 1, not {self.seed!r}.")


def sampling_defaults(settings: Any, temperature: float) -> SamplingOptions:
    """What the content of a generation_config.json asks for; LawcatError for values that are none.

    temperature: where it says neither a temperature nor whether to sample. ``do_sample`` false is greedy.
    """
    settings = settings if isinstance(settings, dict) else {}
    sample = settings.get("do_sample")
    values = {"temperature": 0.0 if sample is False else 1.0 if sample is True else temperature}
    for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty"):
        value = settings.get(name)
        if value is not None and not (name == "temperature" and sample is False):
            values[name] = max(value, 0) if name == "top_k" and type(value) is int else value
    try:
        return SamplingOptions(**values)  # type: ignore[arg-type]
    except LawcatError as error:
        raise LawcatError(f"generation_config.json: {error}") from error


@dataclass(frozen=True)
class Choice:
    """A chosen token, its log-probability under the unfiltered model, and the most likely alternatives."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class Sampler:
    """Chooses tokens by `options`; remembers the text's tokens if a repetition penalty needs them."""

    def __init__(self, options: SamplingOptions, vocab_size: int, logprobs: int | None = None) -> None:
        if logprobs is not None and not 0 <= logprobs <= min(100, vocab_size):
            raise LawcatError(f"logprobs must be from 0 to {min(100, vocab_size)}, not {logprobs}.")
        self.options = options
        self.seed = secrets.randbits(62) if options.seed is None else options.seed
        self.logprobs = logprobs
        self._generator = np.random.PCG64(self.seed)
        self._drawn = 0
        self._seen = np.zeros(vocab_size, np.bool_) if options.repetition_penalty != 1.0 else None
        # Arrays of this size are new memory every time they are allocated, which costs more than the sums.
        self._scores, self._scaled, self._weights = np.empty((3, vocab_size))

    def observe(self, tokens: object) -> None:
        """Tell which tokens the text holds (prompt and generated); only the repetition penalty uses it."""
        if self._seen is not None:
            self._seen[np.asarray(tokens, np.int64)] = True

    def choose(self, logits: np.ndarray, position: int) -> Choice:
        """The token for `position` (number of tokens before it) from float32 logits [V]."""
        greedy = self.options.temperature == 0
        if greedy and self._seen is None:
            token = int(logits.argmax())  # where there is a NaN, it counts as the largest
            finite = np.isfinite(logits[token])
        else:
            scores = self._scores
            np.copyto(scores, logits)
            finite = np.isfinite(scores.max())  # NaN if any is
            if finite and self._seen is not None:
                penalty = self.options.repetition_penalty
                seen = scores[self._seen]
                scores[self._seen] = np.where(seen > 0, seen / penalty, seen * penalty)
            if finite:
                token = int(scores.argmax()) if greedy else self._draw(scores, position)
        if not finite:
            raise LawcatError("The model's output is not finite; run `lawcat-edge verify` on the bundle.")
        return Choice(token, float("nan")) if self.logprobs is None else score(logits, token, self.logprobs)

    def probabilities(self, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(token ids, probabilities) that remain after the filters, most likely first; ties by lower id."""
        tokens, cumulative, mass = self._kept(scores, 1.0)
        weights = np.diff(cumulative, prepend=0.0)
        return tokens, weights / mass

    def _kept(self, scores: np.ndarray, share: float) -> tuple[np.ndarray, np.ndarray, float]:
        """(token ids, cumulative weights, mass of all kept): best first, as far as `share` of the mass.

        Sorting a whole vocabulary takes as long as half a step of the model, and the first few hundred tokens
        nearly always hold the mass that is asked for; so more are sorted only when needed.
        """
        options = self.options
        values = np.divide(scores, max(options.temperature, 1e-6), out=self._scaled)
        best = values.max()
        kept = None  # the tokens that `values` are of; None: all
        # min_p first: it needs no sorting and leaves few to sort.
        if options.min_p > 0:
            kept = np.flatnonzero(values >= best + np.log(options.min_p))
            values = values[kept]
        if 0 < options.top_k < values.size:
            first = np.sort(_descending(values, options.top_k))
            kept, values = first if kept is None else kept[first], values[first]
        weights = self._weights[: values.size]
        total = float(np.exp(np.subtract(values, best, out=weights), out=weights).sum())
        # top_p counts the probability that the other two left, as the usual order of filters has it.
        target = total * options.top_p
        for size in (256, 4096, values.size):
            order = _descending(values, min(size, values.size))
            cumulative = np.cumsum(weights[order])
            if order.size == values.size or cumulative[-1] >= target * (share if options.top_p == 1 else 1.0):
                break
        complete = order.size == values.size
        order = order if kept is None else kept[order]
        if options.top_p < 1:
            count = int(np.searchsorted(cumulative, target, side="left")) + 1
            order, cumulative = order[:count], cumulative[:count]
            return order, cumulative, float(cumulative[-1])
        return order, cumulative, float(cumulative[-1]) if complete else total

    def _draw(self, scores: np.ndarray, position: int) -> int:
        self._generator.advance(position - self._drawn)
        # random_raw, unlike Generator's methods, is fixed for ever by numpy's compatibility promise.
        uniform = (int(self._generator.random_raw()) >> 11) * 2.0**-53
        self._drawn = position + 1
        tokens, cumulative, mass = self._kept(scores, uniform)
        index = int(np.searchsorted(cumulative, uniform * mass, side="right"))
        return int(tokens[min(index, tokens.size - 1)])


def score(logits: np.ndarray, token: int, count: int) -> Choice:
    """`token` with its log-probability under logits [V], and the `count` most likely ones."""
    raw = logits.astype(np.float64, copy=False)
    best = float(raw.max())
    log_z = best + float(np.log(np.exp(raw - best).sum()))
    top = _descending(raw, count) if count else np.empty(0, np.int64)
    return Choice(token, float(raw[token]) - log_z, tuple((int(i), float(raw[i]) - log_z) for i in top))


def _descending(values: np.ndarray, count: int) -> np.ndarray:
    """Indices of the `count` largest values, largest first, ties by lower index."""
    if count < values.size // 4:
        # A few comparisons find a bound faster than a partition does, where the best stand out.
        best, reach = values.max(), 4.0
        candidates = np.flatnonzero(values >= best - reach)
        while candidates.size < count and reach < 64:
            reach *= 1.3
            candidates = np.flatnonzero(values >= best - reach)
        if not count <= candidates.size <= 16 * count + 2048:
            threshold = np.partition(values, values.size - count)[values.size - count]
            candidates = np.flatnonzero(values >= threshold)
        return candidates[np.argsort(-values[candidates], kind="stable")][:count]
    return np.argsort(-values, kind="stable")[:count]
