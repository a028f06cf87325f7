"""The sampler keeps what its options say, and draws the same from the same seed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lawcat_edge.runtime.errors import LawcatError
from lawcat_edge.runtime.generate.sampling import Sampler, SamplingOptions

V = 50
LOGITS = hnp.arrays(np.float32, V, elements=st.floats(-30, 30, width=32))
OPTIONS = st.builds(
    SamplingOptions,
    temperature=st.floats(0.01, 5),
    top_k=st.integers(0, 60),
    top_p=st.floats(0, 1),
    min_p=st.floats(0, 1),
    seed=st.integers(0, 1 << 40),
)


@given(LOGITS, OPTIONS)
def test_the_filters_keep_what_they_promise(logits: np.ndarray, options: SamplingOptions) -> None:
    scores = logits.astype(np.float64)
    tokens, probabilities = Sampler(options, V).probabilities(scores)
    assert abs(probabilities.sum() - 1) < 1e-9
    assert len(set(tokens.tolist())) == tokens.size >= 1
    # In order of likelihood, ties by id; and all that is dropped is no likelier than all that is kept.
    assert all(a > b or (a == b and i < j) for a, b, i, j in zip(
        scores[tokens], scores[tokens][1:], tokens, tokens[1:], strict=False
    ))  # fmt: skip
    dropped = np.setdiff1d(np.arange(V), tokens)
    assert dropped.size == 0 or scores[dropped].max() <= scores[tokens].min()
    p = np.exp((scores - scores.max()) / options.temperature)
    if options.top_k:
        assert tokens.size <= options.top_k
    if options.min_p > 0:
        assert p[tokens].min() >= options.min_p * (1 - 1e-9)
    if options.top_p == 1 and options.min_p == 0:
        assert tokens.size == min(options.top_k or V, V)


@given(LOGITS, st.floats(0.05, 0.95))
def test_top_p_is_the_smallest_set_that_reaches_it(logits: np.ndarray, top_p: float) -> None:
    options = SamplingOptions(temperature=1.0, top_p=top_p, seed=0)
    tokens, _ = Sampler(options, V).probabilities(logits.astype(np.float64))
    p = np.exp(logits.astype(np.float64) - logits.max())
    p /= p.sum()
    assert p[tokens].sum() >= top_p - 1e-9
    assert p[tokens[:-1]].sum() < top_p + 1e-9


@given(LOGITS, OPTIONS, st.lists(st.integers(0, 1000), min_size=1, max_size=6))
def test_the_draw_depends_on_seed_and_position_alone(
    logits: np.ndarray, options: SamplingOptions, positions: list[int]
) -> None:
    running = Sampler(options, V)
    for position in positions:  # in any order: a pause in between changes nothing
        assert running.choose(logits, position).token == Sampler(options, V).choose(logits, position).token


def test_draws_follow_the_probabilities() -> None:
    logits = np.log(np.array([0.5, 0.25, 0.125, 0.125], np.float32))
    sampler = Sampler(SamplingOptions(temperature=1.0, seed=3), 4)
    counts = np.bincount([sampler.choose(logits, i).token for i in range(8000)], minlength=4) / 8000
    assert np.abs(counts - np.exp(logits)).max() < 0.02


@pytest.mark.parametrize(
    "options", [{}, {"top_p": 0.9}, {"top_p": 0.999999}, {"min_p": 0.001}, {"top_k": 5000}]
)
@pytest.mark.parametrize("spread", [0.0, 1.0, 8.0])
def test_a_large_vocabulary_is_drawn_from_as_if_it_were_sorted_whole(options: dict, spread: float) -> None:
    logits = (np.random.default_rng(0).standard_normal(20_000) * spread).astype(np.float32)
    sampler = Sampler(SamplingOptions(temperature=1.0, seed=1, **options), logits.size)
    order = np.argsort(-logits.astype(np.float64), kind="stable")
    p = np.exp(logits[order].astype(np.float64) - logits.max())
    p[p < options.get("min_p", 0)] = 0
    p[options.get("top_k", p.size) :] = 0
    if "top_p" in options:
        p[int(np.searchsorted(np.cumsum(p), options["top_p"] * p.sum())) + 1 :] = 0
    expected = np.cumsum(p) / p.sum()
    uniforms = (np.random.PCG64(1).random_raw(60) >> np.uint64(11)) * 2.0**-53
    drawn = [sampler.choose(logits, i).token for i in range(60)]
    assert drawn == [int(order[np.searchsorted(expected, u, side="right")]) for u in uniforms]


def test_known_draws_stay_the_same_on_every_platform() -> None:
    logits = (np.arange(V, dtype=np.float32) % 7) / 2
    sampler = Sampler(SamplingOptions(temperature=0.9, top_k=40, top_p=0.95, min_p=0.01, seed=42), V)
    assert [sampler.choose(logits, i).token for i in range(8)] == [11, 48, 39, 40, 13, 45, 11, 18]


def test_greedy_takes_the_first_of_the_best() -> None:
    logits = np.zeros(V, np.float32)
    logits[[7, 3]] = 2
    assert Sampler(SamplingOptions(), V).choose(logits, 0).token == 3


def test_repetition_penalty_lowers_seen_tokens_of_either_sign() -> None:
    sampler = Sampler(SamplingOptions(repetition_penalty=2.0), 3)
    sampler.observe([0])
    assert sampler.choose(np.array([1.0, 0.9, 0.0], np.float32), 0).token == 1
    assert sampler.choose(np.array([-0.5, -0.9, -9], np.float32), 0).token == 1


@given(LOGITS)
def test_logprobs_are_those_of_the_model(logits: np.ndarray) -> None:
    choice = Sampler(SamplingOptions(temperature=0.7, top_k=5, seed=1), V, logprobs=4).choose(logits, 0)
    x = logits.astype(np.float64)
    expected = x - (x.max() + np.log(np.exp(x - x.max()).sum()))
    assert choice.logprob == pytest.approx(expected[choice.token])
    assert [lp for _, lp in choice.top] == pytest.approx(sorted(expected)[::-1][:4])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_an_error(bad: float) -> None:
    logits = np.zeros(V, np.float32)
    logits[3] = bad
    with pytest.raises(LawcatError, match="not finite"):
        Sampler(SamplingOptions(), V).choose(logits, 0)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1}, {"temperature": float("nan")}, {"top_p": 1.1}, {"top_k": -1}, {"top_k": 1.5},
        {"min_p": 2}, {"repetition_penalty": 0}, {"seed": -1}, {"seed": 1.0}, {"temperature": "hot"},
    ],
)  # fmt: skip
def test_wrong_options_are_refused_by_name(options: dict) -> None:
    with pytest.raises(LawcatError, match=next(iter(options))):
        SamplingOptions(**options)


def test_a_top_k_that_is_too_large_is_told_its_limit() -> None:
    with pytest.raises(LawcatError, match="from 0 to 16,777,216, not 16777217"):
        SamplingOptions(top_k=(1 << 24) + 1)
