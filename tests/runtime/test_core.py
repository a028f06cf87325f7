"""The decoding core: whatever comes and goes beside a sequence, it gets the tokens that it gets alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_bundle import V

from lawcat_edge.runtime import LawcatError, Model
from lawcat_edge.runtime.engine.state import State
from lawcat_edge.runtime.generate.core import Core
from lawcat_edge.runtime.generate.request import Request
from lawcat_edge.runtime.generate.writer import Writer


def writer_of(model: Model, tokens: list[int], **options: Any) -> Writer:
    context = model.new_context()
    context.tokens.extend(tokens)
    return model.writer(Request.of(**{"ignore_eos": True, **options}), context)


def alone(model: Model, tokens: list[int], **options: Any) -> list[int]:
    """A token at a time by the engine itself, and the whole text's sampler."""
    writer = writer_of(model, tokens, **options)
    state, text = model.engine.new_state(), list(tokens)
    logits = model.engine.prefill(tokens, state)[0]
    made: list[int] = []
    while len(made) < options["max_new_tokens"]:
        choice = writer.sampler.choose(logits, len(text))
        made.append(choice.token)
        text.append(choice.token)
        writer.sampler.observe([choice.token])
        logits = model.engine.forward(np.array([[choice.token]]), state)[0]
    return made


SEQUENCES = st.lists(
    st.fixed_dictionaries({
        "prompt": st.lists(st.integers(0, V - 1), min_size=1, max_size=40),
        "comes": st.integers(0, 25),
        "leaves": st.one_of(st.none(), st.integers(1, 30)),
        "sleeps": st.lists(st.integers(0, 40), max_size=6),
        "max_new_tokens": st.integers(1, 12),
        "temperature": st.sampled_from([0.0, 1.0]),
        "seed": st.integers(0, 99),
        "repetition_penalty": st.sampled_from([1.0, 1.2]),
    }),
    min_size=1,
    max_size=6,
)  # fmt: skip


@given(asked=SEQUENCES)
@settings(deadline=None, max_examples=25)
def test_sequences_that_come_and_go_get_what_each_gets_alone(
    decoder: Model, asked: list[dict[str, Any]]
) -> None:
    model = decoder
    core, writers = Core(model.engine, capacity=len(asked)), {}
    keys = ("max_new_tokens", "temperature", "seed", "repetition_penalty")
    now = 0
    while now < 30 or len(core):
        for i, one in enumerate(asked):
            if one["comes"] == now:
                writers[i] = writer_of(model, one["prompt"], **{key: one[key] for key in keys})
                core.insert(writers[i])
            elif i in writers and one["leaves"] == now - one["comes"]:
                core.remove(writers[i])
        asleep = {id(writers[i]) for i, one in enumerate(asked) if i in writers and now in one["sleeps"]}
        for advance in core.step(lambda writer: id(writer) not in asleep):  # noqa: B023
            assert advance.error is None
        now += 1
    for i, one in enumerate(asked):
        wanted = alone(model, one["prompt"], **{key: one[key] for key in keys})
        writer = writers[i]
        if one["leaves"] is None:
            assert writer.done
            assert writer.generation.tokens == wanted
        else:
            assert writer.generation.tokens == wanted[: len(writer.generation.tokens)]
        # What it left is a context like any other: it goes on as if it had been alone all the time.
        if writer.context.fed and len(writer.generation.tokens) < len(wanted):
            rest = {key: one[key] for key in keys[1:]}
            more = model.generate(
                context=writer.context,
                max_new_tokens=len(wanted) - len(writer.generation.tokens),
                ignore_eos=True,
                **rest,
            )
            assert writer.generation.tokens + more.result().tokens == wanted


def test_joining_and_leaving_copies_no_other_sequence(
    decoders: dict[str, Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, copied = decoders["hybrid"], []
    original = State._copy_row

    def copy(self: State, row: int, other: State, at: int) -> None:
        copied.append(int(self.positions[row]))
        original(self, row, other, at)

    monkeypatch.setattr(State, "_copy_row", copy)
    core = Core(model.engine, capacity=6, keep=False)
    # Told apart by their lengths.
    writers = [writer_of(model, [1] * length, max_new_tokens=100) for length in (10, 30, 50, 70)]
    for writer in writers[:3]:
        core.insert(writer)
    while core.read():
        pass
    core.write()
    assert sorted(copied) == [10, 30, 50]
    copied.clear()
    core.insert(writers[3])
    while core.read():
        pass
    arrays = [array.ctypes.data for array in core._rows.state.arrays]
    core.write()
    assert copied == [70]
    assert [array.ctypes.data for array in core._rows.state.arrays] == arrays
    copied.clear()
    core.remove(writers[1])
    core.write()
    assert copied == [71]  # the last row alone moves into the hole
    copied.clear()
    core.remove(writers[0])
    core.insert(writer_of(model, [1] * 90, max_new_tokens=100))
    while core.read():
        pass
    core.write()
    assert copied == [90]  # the new sequence takes the hole


def test_one_sequence_that_fails_does_not_hurt_the_others(
    decoders: dict[str, Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = decoders["both"]
    core = Core(model.engine, capacity=3)
    prompts = ([1, 2, 3], [4, 5], [6])
    writers = [writer_of(model, list(prompt), max_new_tokens=10) for prompt in prompts]
    for writer in writers:
        core.insert(writer)
    while core.read():
        pass
    core.write()
    row = core._rows._writers.index(writers[1])
    for array in core._rows.state.arrays:
        array[row] = np.nan
    failed = [advance for advance in core.write() if advance.error is not None]
    assert [advance.writer for advance in failed] == [writers[1]]
    assert isinstance(failed[0].error, LawcatError)
    assert "not finite" in str(failed[0].error)
    while len(core):
        assert all(advance.error is None for advance in core.step())
    for i in (0, 2):
        assert writers[i].generation.tokens == alone(model, list(prompts[i]), max_new_tokens=10)


def test_an_insert_that_is_taken_back_leaves_no_trace(decoders: dict[str, Model]) -> None:
    model = decoders["plain"]
    core = Core(model.engine, capacity=2)
    stays = writer_of(model, [1, 2, 3], max_new_tokens=6)
    goes = writer_of(model, [7] * 60, max_new_tokens=6)
    core.insert(goes)
    core.insert(stays)
    core.step()
    assert goes.context.fed == 16  # a chunk
    core.remove(goes)
    core.remove(goes)
    while len(core):
        core.step()
    assert stays.generation.tokens == alone(model, [1, 2, 3], max_new_tokens=6)
    assert not goes.generation.tokens
    with pytest.raises(LawcatError, match="nothing to go on from"):
        core.insert(writer_of(model, []))


def test_a_chunk_of_a_prompt_is_read_between_two_steps(decoders: dict[str, Model]) -> None:
    model = decoders["plain"]
    core = Core(model.engine, capacity=3)
    short = writer_of(model, [1], max_new_tokens=100)
    core.insert(short)
    core.step()
    long, other = (writer_of(model, [2] * 64, max_new_tokens=1) for _ in range(2))
    core.insert(long)
    core.insert(other)
    made = []
    for _ in range(8):
        core.step()
        made.append((len(short.generation.tokens), long.context.fed, other.context.fed))
    assert [step[0] for step in made] == list(range(3, 11))
    assert [step[1:] for step in made[:4]] == [(16, 0), (16, 16), (32, 16), (32, 32)]
    assert long.done
    assert other.done
