"""What a runner remembers of texts: tensors of constant size, and buffers of keys and values that grow.

A buffer holds one row a token in slots from 0 on. It grows in blocks up to the tokens that its layers see;
then rows that no later token will see are forgotten and the others moved to the front, once in many tokens.
Keys are rotated at their positions before they are stored, so a row may lie in any slot. The first tokens of
a text may be kept (``Span``): their keys are rotated on when others behind them are forgotten.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lawcat_edge.runtime.bundle.manifest import StateTensor
from lawcat_edge.runtime.bundle.span import Span
from lawcat_edge.runtime.engine import rotary

BLOCK = 256  # rows by which a buffer grows
_AT_ONCE = 512  # a buffer that never needs more has all its slots from the first token on


def slots_for(span: Span, rows: int, tokens: int) -> int:
    """Slots of a buffer that is to hold so many rows and takes so many tokens at once."""
    most = span.slots(tokens)
    return max(rows, most if most <= _AT_ONCE else min(most, -(-rows // BLOCK) * BLOCK))


class Buffer:
    """The buffers of one kind, alike in all layers: how many slots they have, and which rows are in use."""

    def __init__(self, span: Span, batch: int) -> None:
        self.span = span
        self.slots = 0
        self.fill = np.zeros(batch, np.int64)  # rows in use, of every sequence

    @property
    def kept(self) -> np.ndarray:
        """Rows that a later token will see, [B]."""
        return np.minimum(self.fill, self.span.most)


class State:
    """The state of `batch` sequences, in the first rows of arrays that may have more (``put``).

    positions: tokens that each has read, [capacity]. spans: what layers with buffers of each kind see.
    in_place: tensors whose step may write where it reads; the others alternate between two arrays.
    slots: of buffers that cannot grow, because their graph has shapes of fixed size.
    capacity: rows of the arrays; default: as many as there are sequences.
    frequencies: of ``rotary.inverse_frequencies``; None where the graph has no rotary embedding.
    """

    def __init__(
        self,
        tensors: Sequence[StateTensor],
        in_place: Sequence[bool],
        batch: int,
        spans: dict[str, Span] | None = None,
        slots: dict[str, int] | None = None,
        capacity: int = 0,
        frequencies: np.ndarray | None = None,
    ) -> None:
        self.tensors = tuple(tensors)
        self.in_place = tuple(in_place)
        self.batch = batch
        self.capacity = max(batch, capacity)
        self.positions = np.zeros(self.capacity, np.int64)
        self.spans = dict(spans or {})
        self.buffers = {name: Buffer(span, self.capacity) for name, span in self.spans.items()}
        self._fixed = slots
        self.frequencies = frequencies
        for name, count in (slots or {}).items():
            self.buffers[name].slots = count
        self.arrays: list[np.ndarray] = []
        self._spare: list[np.ndarray] = []
        for tensor, same in zip(self.tensors, self.in_place, strict=True):
            shape = (self.capacity, *tensor.sizes(self._slots(tensor)))
            self.arrays.append(aligned(shape))
            self._spare.append(self.arrays[-1] if same else aligned(shape))
        self._cos = self._sin = aligned((0, 0))
        self._apart: list[np.ndarray] = []
        self.phase = self.turn = 0  # which of their two arrays the tensors are in
        self.bindings: dict[Any, Any] = {}

    def _slots(self, tensor: StateTensor) -> int:
        return self.buffers[tensor.buffer].slots if tensor.buffer else 0

    @property
    def position(self) -> int:
        """Tokens read, of the longest sequence."""
        return int(self.positions[: self.batch].max())

    @position.setter
    def position(self, tokens: int) -> None:
        self.positions[:] = tokens

    @property
    def nbytes(self) -> int:
        """Bytes of the state as it is held: buffers with all their slots."""
        return sum(array.nbytes for array in self.arrays)

    @property
    def targets(self) -> list[np.ndarray]:
        """Where the next step writes (the same arrays where that is safe)."""
        return self._spare

    @property
    def trial_targets(self) -> list[np.ndarray]:
        """Where a step writes that may have to be forgotten: nothing that is read again is overwritten.

        What it appends to a buffer counts only once the step is accepted.
        """
        if not self._apart:
            self._apart = [
                aligned(array.shape) if same and not tensor.buffer else spare
                for tensor, same, array, spare in zip(
                    self.tensors, self.in_place, self.arrays, self._spare, strict=True
                )
            ]
        return [
            apart if same and not tensor.buffer else spare
            for tensor, same, apart, spare in zip(
                self.tensors, self.in_place, self._apart, self._spare, strict=True
            )
        ]

    def accept(self, tokens: int) -> None:
        """Become what the last step on trial left, which read so many tokens."""
        self.advance(tokens)
        for i, tensor in enumerate(self.tensors):
            if self.in_place[i] and not tensor.buffer:
                self.arrays[i], self._apart[i] = self._apart[i], self.arrays[i]
                self._spare[i] = self.arrays[i]
        self.turn ^= 1

    def advance(self, tokens: int) -> None:
        self.arrays, self._spare = self._spare, self.arrays
        if not all(self.in_place):
            self.phase ^= 1
        self._count(tokens)

    def _count(self, tokens: int) -> None:
        self.positions[: self.batch] += tokens
        for name, buffer in self.buffers.items():
            buffer.fill[: self.batch] += tokens
            if buffer.span.sinks:
                self._forget_between(name)

    # -- buffers ---------------------------------------------------------------------------------------------

    @property
    def room(self) -> int:
        """Tokens that every sequence can read at once: at least one."""
        filled = ((b.span, int(b.fill[: self.batch].max(initial=0))) for b in self.buffers.values())
        return min((span.room(fill) for span, fill in filled), default=Span(1).room(0))

    def make_room(self, tokens: int) -> None:
        """Slots for so many more tokens of every sequence, in every buffer; at most ``room`` of them."""
        for name, buffer in self.buffers.items():
            after = int(buffer.fill.max()) + tokens
            allowed = buffer.span.slots(tokens)
            if after > min(allowed, buffer.slots if self._fixed else allowed):
                self._forget(name)
                after = int(buffer.fill.max()) + tokens
            if after > buffer.slots:
                assert not self._fixed, "more tokens at once than a graph of fixed shapes has slots for"
                self._grow(name, self._more_slots(buffer, after, tokens))

    def _more_slots(self, buffer: Buffer, rows: int, tokens: int) -> int:
        # Growing copies every sequence, so where there may be many it doubles, to happen a few times at most.
        doubled = min(2 * buffer.slots, buffer.span.tokens) if self.capacity > 1 else 0
        return slots_for(buffer.span, max(rows, doubled), tokens)

    def _forget(self, name: str) -> None:
        """Move the rows that are still seen to the front."""
        buffer = self.buffers[name]
        fill, kept = buffer.fill[: self.batch], buffer.kept[: self.batch]
        if (fill == kept).all():
            return
        alike = bool((fill == fill[0]).all())
        for tensor, array in zip(self.tensors, self.arrays, strict=True):
            if tensor.buffer == name:
                for row in (slice(None),) if alike else range(self.batch):
                    end, count = (int(x[0 if alike else row]) for x in (fill, kept))
                    rows = array[: self.batch][row]
                    rows[..., :count, :] = rows[..., end - count : end, :]
        fill[:] = kept

    def _forget_between(self, name: str) -> None:
        """Where all rows of the span are in use, forget the oldest behind the sinks, and move both up."""
        buffer = self.buffers[name]
        span = buffer.span
        full = np.flatnonzero(buffer.fill[: self.batch] == span.tokens)
        for tensor, array in zip(self.tensors, self.arrays, strict=True):
            if tensor.buffer == name:
                for row in full:
                    if tensor.input.endswith(".key"):
                        self._rotate_on(array[row, :, : span.sinks], span.step)
                    end = span.tokens - span.step
                    array[row, :, span.sinks : end] = array[row, :, span.sinks + span.step : span.tokens]
        buffer.fill[full] -= span.step

    def _rotate_on(self, keys: np.ndarray, positions: int) -> None:
        """Keys [G,n,d] as if they stood so many positions later, in place."""
        assert self.frequencies is not None
        cos, sin = (f(positions * self.frequencies) for f in (np.cos, np.sin))
        a, b = np.split(keys.astype(np.float64), 2, -1)
        keys[...] = np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    def _grow(self, name: str, slots: int) -> None:
        self.bindings.clear()  # they hold the old arrays
        buffer = self.buffers[name]
        used = int(buffer.fill.max())
        for i, tensor in enumerate(self.tensors):
            if tensor.buffer == name:
                old, shape = self.arrays[i], (self.capacity, *tensor.sizes(slots))
                self.arrays[i] = aligned(shape)
                # Rows without a sequence are left untouched, so that they take no memory yet.
                self.arrays[i][: self.batch, :, :used] = old[: self.batch, :, :used]
                self._spare[i] = self.arrays[i] if self.in_place[i] else aligned(shape)
        buffer.slots = slots

    # -- what a graph takes beside tokens and tensors --------------------------------------------------------

    def new_inputs(self, tokens: int) -> dict[str, np.ndarray]:
        """Arrays for the graph inputs that tell positions and lengths, for so many tokens of every sequence.

        The tables have the rows of the tokens at hand and then as many more as onnxruntime asks for.
        """
        shape = (self.batch, tokens)
        inputs: dict[str, np.ndarray] = {
            f"{name}_seqlens_k": np.zeros(self.batch, np.int32) for name in self.buffers
        }
        if self.frequencies is not None:
            slots = [buffer.slots for buffer in self.buffers.values()]
            rows = max(self.batch * tokens, self._cos.shape[0], *slots)
            if self._cos.shape != (rows, self.frequencies.size):
                self.bindings.clear()  # they hold the old tables
                self._cos, self._sin = (aligned((rows, self.frequencies.size)) for _ in range(2))
            inputs["position_ids"] = np.arange(self.batch * tokens, dtype=np.int64).reshape(shape)
            inputs["cos_cache"], inputs["sin_cache"] = self._cos, self._sin
        return inputs

    def fill_inputs(self, inputs: dict[str, np.ndarray]) -> None:
        """Write the positions and lengths of the next tokens into arrays of ``new_inputs``."""
        for name, buffer in self.buffers.items():
            inputs[f"{name}_seqlens_k"][:] = buffer.fill[: self.batch] + (self._tokens(inputs) - 1)
        if self.frequencies is not None:
            T = self._tokens(inputs)
            for row, position in enumerate(self.positions[: self.batch]):
                angle = rotary.angles(self.frequencies, int(position), T)
                own = slice(row * T, (row + 1) * T)
                np.cos(angle, out=inputs["cos_cache"][own], casting="same_kind")
                np.sin(angle, out=inputs["sin_cache"][own], casting="same_kind")

    @staticmethod
    def _tokens(inputs: dict[str, np.ndarray]) -> int:
        return int(inputs["position_ids"].shape[1])

    def feeds(self, ids: np.ndarray) -> dict[str, np.ndarray]:
        """All inputs of a graph by name, for a session that is run without bindings: ids [B,T]."""
        self.make_room(ids.shape[1])
        inputs = self.new_inputs(ids.shape[1])
        self.fill_inputs(inputs)
        tensors = {t.input: array for t, array in zip(self.tensors, self.arrays, strict=True)}
        return {"input_ids": ids, **inputs, **tensors}

    def take(self, outputs: Mapping[str, np.ndarray], tokens: int) -> None:
        """The state after those tokens, from the outputs of such a session."""
        assert not any(self.in_place)
        self.arrays = [outputs[tensor.output] for tensor in self.tensors]
        self._count(tokens)

    # -- whole states ----------------------------------------------------------------------------------------

    def row(self, index: int) -> State:
        """The sequence `index` as a state of its own over the same memory and counts.

        Its tensors are those of now: a step of the batch may put others in their place, of which the view
        does not learn. What it says of lengths stays right.
        """
        view = State(self.tensors, self.in_place, 0, self.spans, frequencies=self.frequencies)
        at = slice(index, index + 1)
        view.batch, view.capacity, view.positions = 1, 1, self.positions[at]
        for name, buffer in self.buffers.items():
            view.buffers[name].slots, view.buffers[name].fill = buffer.slots, buffer.fill[at]
        view.arrays = [array[at] for array in self.arrays]
        view._spare = [array[at] for array in self._spare]
        return view

    def rows(self, which: Sequence[int]) -> State:
        """A new state of the sequences `which` (any number, any order); its memory is its own.

        Its buffers hold the rows that are still seen, and no free slots before the next token.
        """
        return State.stack([self], [list(which)])

    def copy(self) -> State:
        return self.rows(range(self.batch))

    @staticmethod
    def stack(states: Sequence[State], which: Sequence[Sequence[int]] | None = None) -> State:
        """One state of all sequences of `states`, in order; of those named by ``which`` alone."""
        first = states[0]
        chosen = [list(rows) for rows in which] if which else [list(range(state.batch)) for state in states]
        count, frequencies = sum(map(len, chosen)), first.frequencies
        joined = State(
            first.tensors, first.in_place, count, first.spans, first._fixed, frequencies=frequencies
        )
        joined.positions = np.concatenate([s.positions[rows] for s, rows in zip(states, chosen, strict=True)])
        for name, buffer in joined.buffers.items():
            kept = [s.buffers[name].kept[rows] for s, rows in zip(states, chosen, strict=True)]
            buffer.fill = np.concatenate(kept)
            if not first._fixed:
                buffer.slots = int(buffer.fill.max())
        at = 0
        for i, tensor in enumerate(joined.tensors):
            shape = (joined.batch, *tensor.sizes(joined._slots(tensor)))
            joined.arrays[i] = aligned(shape)
            joined._spare[i] = joined.arrays[i] if joined.in_place[i] else aligned(shape)
        for state, rows in zip(states, chosen, strict=True):
            for row in rows:
                state._copy_row(row, joined, at)
                at += 1
        return joined

    def _copy_row(self, row: int, other: State, at: int) -> None:
        for tensor, mine, theirs in zip(self.tensors, self.arrays, other.arrays, strict=True):
            if tensor.buffer:
                buffer = self.buffers[tensor.buffer]
                end, count = int(buffer.fill[row]), int(buffer.kept[row])
                theirs[at, :, :count] = mine[row, :, end - count : end]
            else:
                theirs[at] = mine[row]

    # -- sequences that come and go --------------------------------------------------------------------------

    def put(self, row: int, other: State) -> None:
        """Copy the one sequence of `other` into `row`: a free one among the sequences, or the next."""
        assert row <= self.batch < self.capacity or row < self.batch
        for name, buffer in self.buffers.items():
            count = int(other.buffers[name].kept[0])
            if count > buffer.slots:
                self._grow(name, self._more_slots(buffer, count, 1))
            buffer.fill[row] = count
        self.positions[row] = other.positions[0]
        other._copy_row(0, self, row)
        self.batch = max(self.batch, row + 1)

    def move(self, row: int, to: int) -> None:
        """The sequence of `row` goes to the free row `to`."""
        assert row != to
        self._copy_row(row, self, to)
        self.positions[to] = self.positions[row]
        for buffer in self.buffers.values():
            buffer.fill[to] = buffer.kept[row]
        self.free(row)

    def free(self, row: int) -> None:
        """`row` has no sequence any more. Before the next step one must be in it, or none behind it."""
        self.positions[row] = 0
        for buffer in self.buffers.values():
            buffer.fill[row] = 0

    def clear(self) -> None:
        """Back to the state before any token."""
        for tensor, array in zip(self.tensors, self.arrays, strict=True):
            if not tensor.buffer:
                array[...] = 0
        self.positions[:] = 0
        for buffer in self.buffers.values():
            buffer.fill[:] = 0

    def tensors_of(self, row: int = 0) -> list[np.ndarray]:
        """Copies of what one sequence goes on from, in the order of the tensors."""
        single = self.rows([row])
        return [
            array[0, :, : int(single.buffers[tensor.buffer].fill[0])] if tensor.buffer else array[0]
            for tensor, array in zip(single.tensors, single.arrays, strict=True)
        ]

    def load(self, tensors: Sequence[np.ndarray], position: int) -> None:
        """Become the one text whose ``tensors_of`` these are, after so many tokens."""
        assert self.batch == 1
        self.positions[:] = position
        for name, buffer in self.buffers.items():
            count = buffer.span.kept(position)
            buffer.fill[:] = 0
            if count > buffer.slots:
                self._grow(name, count)
            buffer.fill[:] = count
        for tensor, mine, theirs in zip(self.tensors, self.arrays, tensors, strict=True):
            if tensor.buffer:
                mine[0, :, : theirs.shape[1]] = theirs
            else:
                mine[0] = theirs


def aligned(shape: tuple[int, ...]) -> np.ndarray:
    """Zeros, float32, on a 64-byte boundary as onnxruntime's own buffers are."""
    count = int(np.prod(shape, dtype=np.int64))
    raw = np.zeros(count * 4 + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + count * 4].view(np.float32).reshape(shape)
