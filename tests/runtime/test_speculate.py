"""Speculative decoding by prompt lookup: the text never depends on it, and what it costs is bounded."""

from __future__ import annotations

from array import array
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_bundle import V, build_tiny_bundle

from lawcat_edge.runtime import LawcatError, Model
from lawcat_edge.runtime.generate.core import Core
from lawcat_edge.runtime.generate.draft import _AT_ONCE, _SHARE, Drafter, following
from lawcat_edge.runtime.generate.request import Request


def eager(model: Model) -> Drafter:
    """Drafts whatever it finds, however much was in vain."""
    drafter = Drafter(8)
    drafter._account = 1e9
    return drafter


PERIODS = st.lists(st.integers(0, V - 1), min_size=1, max_size=9)


@given(
    start=PERIODS,
    period=PERIODS,
    temperature=st.sampled_from([0.0, 0.3, 1.0]),
    penalty=st.sampled_from([1.0, 1.1]),
    top_k=st.sampled_from([0, 3]),
    speculate=st.sampled_from([1, 2, 8, 32]),
    new=st.integers(1, 40),
    seed=st.integers(0, 999),
)
@settings(deadline=None, max_examples=40)
def test_the_text_is_that_without_speculation(
    decoder: Model, start: list[int], period: list[int], speculate: int, new: int,
    temperature: float, penalty: float, top_k: int, seed: int,
) -> None:  # fmt: skip
    model, prompt = decoder, start + 4 * period
    options: dict[str, Any] = {
        "max_new_tokens": new, "temperature": temperature, "seed": seed, "top_k": top_k,
        "repetition_penalty": penalty, "ignore_eos": True, "logprobs": 2,
    }  # fmt: skip
    plain = model.generate(prompt, speculate=0, **options).result()
    assert plain.stats.drafted_tokens == 0
    fast = model.generate(prompt, speculate=speculate, **options)
    assert fast.result().tokens == plain.tokens
    assert fast.text == plain.text
    assert plain.logprobs is not None
    for mine, theirs in zip(fast.choices, plain.logprobs, strict=True):
        assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-4)
    assert fast.stats.accepted_tokens <= fast.stats.drafted_tokens
    # The context that is left goes on alike, and lacks the last token alone.
    context = model.context
    assert context.fed == len(context) - 1
    more = {**options, "max_new_tokens": 5}
    rest = model.generate(context=context, speculate=0, **more).result().tokens
    whole = model.generate(prompt, speculate=0, **{**options, "max_new_tokens": new + 5}).result().tokens
    assert plain.tokens + rest == whole


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_drafts_are_kept_in_part_in_whole_and_not_at_all(
    decoder: Model, monkeypatch: pytest.MonkeyPatch, temperature: float
) -> None:
    """Drafts that are right up to a random place, so that every way through a trial is taken."""
    model, seen = decoder, set()
    options: dict[str, Any] = {
        "max_new_tokens": 60,
        "temperature": temperature,
        "seed": 4,
        "ignore_eos": True,
    }
    plain = model.generate([5, 6, 7], speculate=0, **options).result().tokens
    rng = np.random.default_rng(0)

    def propose(self: Drafter, tokens: array, unread: int, room: int) -> list[int]:
        count, right = min(int(rng.integers(0, 9)), room), int(rng.integers(0, 9))
        draft = plain[len(tokens) - 3 :][:count]
        wrong = [(token + 1) % V for token in draft[right:]]
        return (draft[:right] + wrong)[:count]

    def report(self: Drafter, drafted: int, accepted: int) -> None:
        seen.add("all" if accepted == drafted else "some" if accepted else "none")

    monkeypatch.setattr(Drafter, "propose", propose)
    monkeypatch.setattr(Drafter, "report", report)
    running = model.generate([5, 6, 7], **options)
    assert running.result().tokens == plain
    assert seen == {"all", "some", "none"}
    assert 0 < running.stats.accepted_tokens < running.stats.drafted_tokens


def test_a_text_that_ends_within_a_draft_ends_there(decoders: dict[str, Model]) -> None:
    model, prompt = decoders["plain"], [3, 1, 4, 1, 5] * 6
    free = model.generate(prompt, speculate=0, max_new_tokens=40, ignore_eos=True).result()
    before = model.eos
    for at in range(3, 30, 3):
        token = free.tokens[at]
        try:
            model.eos = frozenset([token])
            ended = model.generate(prompt, max_new_tokens=40).result()
        finally:
            model.eos = before
        assert ended.stop_reason == "eos"
        assert ended.tokens == free.tokens[: free.tokens.index(token)]
        assert model.context.fed == len(model.context)  # all but the end token, which is no part of it
    for length in range(1, 12):
        cut = model.generate(prompt, max_new_tokens=length, ignore_eos=True).result()
        assert cut.tokens == free.tokens[:length]
    stop = free.text[7:9]
    assert stop.isprintable()
    stopped = model.generate(prompt, max_new_tokens=40, ignore_eos=True, stop=stop).result()
    assert (stopped.text, stopped.stop_reason) == (free.text[: free.text.find(stop)], "stop")


def test_a_sequence_that_is_joined_by_another_goes_on_without_drafts(decoders: dict[str, Model]) -> None:
    model = decoders["hybrid"]
    prompts = ([7, 8, 9] * 8, [1, 2])
    wanted = [
        model.generate(prompt, speculate=0, max_new_tokens=60, ignore_eos=True).result().tokens
        for prompt in prompts
    ]
    core = Core(model.engine, capacity=2)
    writers: list[Any] = []
    for prompt in prompts:
        context = model.new_context()
        context.tokens.extend(prompt)
        length = 60 if not writers else 20
        writers.append(model.writer(Request.of(max_new_tokens=length, ignore_eos=True), context))
        writers[-1].drafter = eager(model)
        core.insert(writers[-1])
        for _ in range(3):
            core.step()
    while len(core):
        assert all(advance.error is None for advance in core.step())
    assert writers[0].generation.tokens == wanted[0]
    assert writers[1].generation.tokens == wanted[1][:20]
    assert writers[0].generation.stats.drafted_tokens > 0


def test_what_follows_is_found_by_the_longest_match() -> None:
    def after(*tokens: int, count: int = 3) -> list[int]:
        return following(array("I", tokens), count)

    assert after(1, 2, 3, 4, 5, 6, 9, 1, 2, 3) == [4, 5, 6]
    assert after(1, 2, 3, 4, 5, 2, 3) == [4, 5, 2]
    assert after(1, 2, 3, 4, 5, 9, 3) == []  # one token alike is chance
    # 7 2 3 4 is more like the end than the later 8 2 3 4.
    assert after(7, 2, 3, 4, 50, 51, 52, 8, 2, 3, 4, 60, 61, 7, 2, 3, 4) == [50, 51, 52]
    assert after(1, 2, 3, 50, 1, 2, 3, 60, 1, 2, 3, count=2) == [60, 1]  # the last of equals
    assert after(0, 1, 2, 3, 1, 2, 3, 1, 2, 3, count=8) == [1, 2, 3, 1, 2, 3, 1, 2]
    assert after(4, 4, 4, 4, count=2) == [4, 4]
    assert after(1) == []
    tokens = array("I", [1, 2, 3, 1, 2, 3])
    following(tokens, 2)
    tokens.append(4)  # no view of the array is kept


@given(st.integers(1, 32), st.integers(10, 2000))
@settings(deadline=None, max_examples=40)
def test_drafts_in_vain_cost_no_more_than_their_share(longest: int, steps: int) -> None:
    """A text that always looks like repeating and never does."""
    drafter, tokens = Drafter(longest), array("I", [1, 2, 3, 1, 2, 3])
    cost = 0.0
    unread = 1
    for _ in range(steps):
        draft = drafter.propose(tokens, unread, 100)
        # A pass of T tokens takes 1 + 0.09 (T - 1) steps of one token, and 0.05 more on trial.
        cost += 0.09 * (unread + len(draft) - 1) + (0.05 if draft else 0.0)
        if draft:
            drafter.report(len(draft), 0)
        unread = 2 if draft else 1
    assert cost <= _AT_ONCE + _SHARE * steps
    if steps >= 100:
        assert cost > 0.5  # else nothing was tried


def test_what_is_accepted_pays_for_more() -> None:
    drafter, tokens = Drafter(16), array("I", range(100, 103)) * 30
    lengths = []
    for _ in range(6):
        draft = drafter.propose(tokens, 1, 100)
        lengths.append(len(draft))
        drafter.report(len(draft), len(draft))
    assert lengths == [3, 6, 12, 16, 16, 16]
    assert len(drafter.propose(tokens, 1, 5)) == 5
    assert drafter.propose(tokens, 1, 0) == []


def test_speculation_out_of_range_is_refused(decoders: dict[str, Model]) -> None:
    for wrong in (-1, 33, 1.5, True, None):
        with pytest.raises(LawcatError, match="speculate must be from 0"):
            decoders["plain"].generate("x", speculate=wrong)


def test_without_a_graph_of_all_positions_nothing_is_drafted(tmp_path: Path) -> None:
    from tiny_bundle import rewrite_manifest

    folder = build_tiny_bundle(tmp_path / "last")
    rewrite_manifest(folder, lambda data: data["graphs"]["ort"].pop("all"))
    (folder / "model_all.onnx").unlink()
    rewrite_manifest(folder, lambda data: data["files"].pop("model_all.onnx"))
    model = Model.load(folder, threads=1)
    running = model.generate([1, 2, 3] * 5, max_new_tokens=20, ignore_eos=True)
    assert len(running.result().tokens) == 20
    assert running.stats.drafted_tokens == 0
