"""Buffers of keys and values: which rows they hold, how far they grow, and what a copy of them is."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lawcat_edge.runtime.bundle.manifest import StateTensor
from lawcat_edge.runtime.bundle.span import Span
from lawcat_edge.runtime.engine.state import BLOCK, State

TENSORS = (
    StateTensor("past.conv", "present.conv", (2, 3)),
    StateTensor("past.key", "present.key", (2, "tokens", 4), "window"),
    StateTensor("past.far", "present.far", (1, "tokens", 2), "full"),
)


def read(state: State, numbers: np.ndarray) -> None:
    """As a graph does: the rows of tokens [B,T] go behind those in use; their number is what they hold."""
    T = min(numbers.shape[1], state.room)
    numbers, later = numbers[:, :T], numbers[:, T:]
    state.make_room(T)
    for i, tensor in enumerate(state.tensors):
        target = state.targets[i]
        if not tensor.buffer:
            target[...] = numbers[:, -1, None, None]
            continue
        if target is not state.arrays[i]:
            target[...] = state.arrays[i]
        for row in range(state.batch):
            at = int(state.buffers[tensor.buffer].fill[row])
            target[row, :, at : at + T] = numbers[row, None, :, None]
    state.advance(T)
    if later.size:
        read(state, later)


def remembered(text: list[int], span: Span) -> list[int]:
    """Token by token, what the docstring of Span says."""
    rows: list[int] = []
    for token in text:
        rows.append(token)
        if span.sinks and len(rows) == span.tokens:
            step = max(1, span.tokens // 16, min(128, span.tokens // 4))
            del rows[span.sinks : span.sinks + step]
    return rows if span.sinks else rows[max(0, len(rows) - span.tokens + 1) :] if span.tokens > 1 else []


def check(state: State, texts: list[list[int]]) -> None:
    """What each text goes on from is what its last tokens left."""
    for row, text in enumerate(texts):
        conv, *buffers = state.tensors_of(row)
        assert (conv == text[-1]).all()
        for (name, span), values in zip(state.spans.items(), buffers, strict=True):
            kept = remembered(text, span)
            assert values.shape[1] == len(kept), name
            assert (values == np.array(kept, np.float32)[None, :, None]).all(), name
        assert state.positions[row] == len(text)


FULL = st.one_of(
    st.integers(1, 700).map(Span),
    st.tuples(st.integers(8, 700), st.integers(1, 5)).map(lambda s: Span(*s)),
)
SPANS = st.tuples(st.integers(1, 80), FULL).map(lambda s: {"window": Span(s[0]), "full": s[1]})
EACH = pytest.mark.parametrize("full", [Span(50), Span(50, 3)], ids=["sliding", "sinks"])


@given(
    SPANS,
    st.lists(st.one_of(st.just(1), st.integers(1, 150)), min_size=1, max_size=40),
    st.booleans(),
)
@settings(deadline=None, max_examples=60)
def test_a_buffer_holds_the_last_rows_and_no_more_than_it_needs(
    spans: dict[str, Span], pieces: list[int], in_place: bool
) -> None:
    state, text, number = State(TENSORS, [in_place] * 3, 1, spans), [], 1
    for piece in pieces:
        new = list(range(number, number + piece))
        number += piece
        read(state, np.array([new], np.float32))
        text += new
        check(state, [text])
    longest = max(pieces)
    for name, buffer in state.buffers.items():
        assert buffer.slots <= buffer.span.slots(longest) + BLOCK, name
        if buffer.span.sinks:
            assert buffer.slots <= buffer.span.tokens


def test_keys_grow_with_the_text_up_to_the_span() -> None:
    state, sizes = State(TENSORS, [True] * 3, 1, {"window": Span(4), "full": Span(4096)}), []
    for start in range(0, 20_000, 100):
        read(state, np.arange(start, start + 100, dtype=np.float32)[None])
        sizes.append(state.buffers["full"].slots)
    assert sizes[0] == BLOCK
    assert sizes == sorted(sizes)
    assert max(sizes) == 4095 + 4096 // 16
    assert all(slots < 100 * (i + 1) + BLOCK for i, slots in enumerate(sizes))


@EACH
def test_rows_of_a_batch_have_lengths_of_their_own(full: Span) -> None:
    spans, texts, states = (
        {"window": Span(6), "full": full},
        [[1], [*range(100, 190)], [*range(300, 317)]],
        [],
    )
    for text in texts:
        states.append(State(TENSORS, [True, True, False], 1, spans))
        read(states[-1], np.array([text], np.float32))
    joined = State.stack(states)
    check(joined, texts)
    for step in range(120):
        read(joined, np.array([[500 + step], [700 + step], [900 + step]], np.float32))
        for text, number in zip(texts, (500, 700, 900), strict=True):
            text.append(number + step)
        check(joined, texts)
    some = joined.rows([2, 0])
    check(some, [texts[2], texts[0]])
    read(joined, np.zeros((3, 1), np.float32))  # the copy has its own memory
    check(some, [texts[2], texts[0]])


def test_a_copy_holds_no_free_slots() -> None:
    state = State(TENSORS, [True] * 3, 1, {"window": Span(100), "full": Span(10_000)})
    read(state, np.arange(300, dtype=np.float32)[None])
    assert state.copy().nbytes < state.nbytes
    assert state.copy().nbytes == 4 * (2 * 3 + 2 * 99 * 4 + 300 * 2)


@EACH
def test_what_was_kept_is_loaded_again(full: Span) -> None:
    spans = {"window": Span(7), "full": full}
    state, text = State(TENSORS, [True] * 3, 1, spans), [*range(1, 91)]
    read(state, np.array([text], np.float32))
    other = State(TENSORS, [False] * 3, 1, spans)
    read(other, np.full((1, 200), 5, np.float32))  # what was there before is gone
    other.load(state.tensors_of(), 90)
    check(other, [text])
    read(other, np.array([[7, 8, 9]], np.float32))
    check(other, [[*text, 7, 8, 9]])


def test_a_cleared_state_is_a_new_one() -> None:
    state = State(TENSORS, [True] * 3, 1, {"window": Span(7), "full": Span(50)})
    read(state, np.array([[1, 2, 3]], np.float32))
    state.clear()
    assert (state.arrays[0] == 0).all()
    read(state, np.array([[4, 5]], np.float32))
    check(state, [[4, 5]])


@EACH
def test_buffers_of_a_fixed_graph_never_grow(full: Span) -> None:
    state = State(TENSORS, [False] * 3, 1, {"window": Span(7), "full": full}, {"window": 10, "full": 60})
    text: list[int] = []
    for number in range(200):
        read(state, np.array([[number]], np.float32))
        text.append(number)
        check(state, [text])
        assert [array.shape[2] for array in state.arrays[1:]] == [10, 60]
    with pytest.raises(AssertionError, match="fixed shapes"):
        state.make_room(11)


def test_sinks_are_rotated_to_where_the_tokens_before_the_others_were() -> None:
    """Every key lies as if the rows that are left had consecutive positions up to the newest."""
    span, G, d = Span(16, 3), 2, 8
    frequencies = 10.0 ** -np.arange(4)
    tensors = (StateTensor("past.0.key", "present.0.key", (G, "tokens", d), "full"),)
    state = State(tensors, [True], 1, {"full": span}, frequencies=frequencies)
    raw = np.random.default_rng(0).standard_normal((200, G, d))

    def rotated(keys: np.ndarray, position: int) -> np.ndarray:
        turned = (keys[:, :4] + 1j * keys[:, 4:]) * np.exp(1j * position * frequencies)
        return np.concatenate([turned.real, turned.imag], -1)

    for number in range(200):
        state.make_room(1)
        state.arrays[0][0, :, state.buffers["full"].fill[0]] = rotated(raw[number], number)
        state.advance(1)
        rows = remembered(list(range(number + 1)), span)
        for slot, token in enumerate(rows):
            want = rotated(raw[token], number - len(rows) + 1 + slot)
            assert np.abs(state.arrays[0][0, :, slot] - want).max() < 1e-5, (number, slot)


def test_a_span_remembers_by_its_rule() -> None:
    for span in (Span(1), Span(9), Span(8, 1), Span(9, 2), Span(100, 4)):
        for length in range(3 * span.tokens + 5):
            rows = len(remembered(list(range(length)), span))
            assert span.kept(length) == rows <= span.most
            assert span.room(rows) >= 1
    assert not Span(4, 3).possible
    assert Span(4, 2).possible
