"""KL and nll of logits in chunks, against float64 and against what they must be."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lawcat_edge.calibration.comparison.divergence import Losses, text_losses
from lawcat_edge.calibration.comparison.measure import drift, summary
from lawcat_edge.losses import token_kl, token_nll
from lawcat_edge.runtime.errors import LawcatError


def exact(logits: np.ndarray) -> np.ndarray:
    x = logits.astype(np.float64)
    x -= x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


@pytest.mark.parametrize("noise", [3.0, 0.1, 1e-3])
def test_kl_is_that_of_float64_even_where_it_is_tiny(noise: float) -> None:
    rng = np.random.default_rng(0)
    reference = rng.standard_normal((37, 1000)).astype(np.float32) * 5
    mine = reference + rng.standard_normal((37, 1000)).astype(np.float32) * np.float32(noise) + np.float32(9)
    known, seen = exact(reference), exact(mine)
    np.testing.assert_allclose(token_kl(reference, mine), (np.exp(known) * (known - seen)).sum(-1), rtol=2e-3)


def test_kl_of_itself_is_zero_and_of_opposites_finite() -> None:
    logits = np.zeros((1, 4), np.float32)
    logits[0, 0] = 300
    assert token_kl(logits, logits)[0] == 0
    assert token_kl(logits, logits[:, ::-1])[0] == pytest.approx(300)


def test_nll_is_that_of_float64() -> None:
    rng = np.random.default_rng(1)
    logits, targets = rng.standard_normal((40, 300)).astype(np.float32) * 8, rng.integers(0, 300, 40)
    want = -np.take_along_axis(exact(logits), targets[:, None], -1)[:, 0]
    np.testing.assert_allclose(token_nll(logits, targets), want, rtol=1e-5, atol=1e-6)


class Table:
    """A model whose logits depend on the position and the token, and which counts what it holds."""

    kind, tokenizer = "toy", None

    def __init__(self, name: str, noise: float, growing: bool = False, bad: int | None = None) -> None:
        self.name, self.noise, self.growing, self.bad = name, noise, growing, bad
        self.largest = 0

    def logits(self, ids: np.ndarray, chunk: int) -> Iterator[np.ndarray]:
        for start in range(0, ids.shape[1], chunk):
            piece = ids[:, start : start + chunk]
            self.largest = max(self.largest, piece.shape[1])
            base = np.random.default_rng(3).standard_normal((50, 50)).astype(np.float32) * 3
            own = np.random.default_rng(4).standard_normal((50, 50)).astype(np.float32) * self.noise
            where = np.arange(start, start + piece.shape[1], dtype=np.float32)[None, :, None]
            found = base[piece] + own[piece] * (where / 100 if self.growing else 1)
            if self.bad is not None and start <= self.bad < start + chunk:
                found[:, self.bad - start] = np.nan
            yield found


def toy(*arguments: Any, **options: Any) -> Any:
    return Table(*arguments, **options)


def subject(model: Any) -> Any:
    return SimpleNamespace(model=model)


IDS = np.random.default_rng(2).integers(0, 50, 1025)


def test_chunks_do_not_change_the_losses_and_bound_what_is_held() -> None:
    model, reference = toy("a", 0.5), toy("b", 0.0)
    small, large = text_losses(model, reference, IDS, 64), text_losses(model, reference, IDS, 2000)
    assert small.kl is not None
    assert large.kl is not None
    np.testing.assert_allclose(small.nll, large.nll)
    np.testing.assert_allclose(small.kl, large.kl)
    assert small.nll.shape == (1024,)
    model.largest = 0
    text_losses(model, reference, IDS, 64)
    assert model.largest == 64


def test_drift_sees_an_error_that_grows_and_none_that_stays() -> None:
    texts, exact = np.stack([IDS, IDS[::-1]]), subject(toy("b", 0.0))
    still = drift(subject(toy("a", 0.5)), exact, texts, lambda *_: None)
    grown = drift(subject(toy("a", 0.5, growing=True)), exact, texts, lambda *_: None)
    assert 0.7 < still["ratio"] < 1.4
    assert grown["ratio"] > 20
    assert [b["tokens"] for b in grown["buckets"]] == [256] * 8


def test_logits_that_are_not_finite_are_an_error_that_says_where() -> None:
    with pytest.raises(LawcatError, match="a gave NaN or infinity at or after token 512"):
        text_losses(toy("a", 0.5, bad=600), None, IDS, 256)


def test_summary_has_the_99th_percentile_and_no_kl_without_reference() -> None:
    losses = Losses(np.full(200, np.log(4.0)), np.arange(200.0), np.tile([1.0, 0.0], 100))
    found = summary(losses)
    assert found["perplexity"] == pytest.approx(4)
    assert found["kl_p99"] == pytest.approx(197.01)
    assert found["top1"] == 0.5
    assert summary(Losses.join([losses, Losses(np.ones(3))]))["kl"] is None
