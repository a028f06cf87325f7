"""The decoding core: sequences come, are read in chunks, written on a token a step, and go.

    core = Core(engine, capacity=8)
    core.insert(writer)                 # at any time, as many as there is room for
    for advance in core.step(): ...     # one chunk of one prompt, and a token of every sequence that is read

A sequence alone runs on its context's own state. Several run as one batch, whose arrays have a row for
each, so that all share a pass over the weights. A state is copied into a free row when its sequence joins
and out of it when it leaves. No other is touched, except that the last row moves into a hole that nobody
filled.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from lawcat_edge.runtime.engine.session import Engine
from lawcat_edge.runtime.engine.state import State
from lawcat_edge.runtime.errors import LawcatError
from lawcat_edge.runtime.generate.writer import Writer


@dataclass(frozen=True)
class Advance:
    """What a step did for one sequence: the text that became certain, or the error that ended it."""

    writer: Writer
    text: str = ""
    error: Exception | None = None


class Core:
    """Runs any number of sequences on `engine`.

    capacity: the most sequences that are written together. keep: a sequence that ends takes its state with
    it, so that its context can go on; False saves that copy.
    """

    def __init__(self, engine: Engine, capacity: int = 1, keep: bool = True) -> None:
        assert capacity >= 1
        self.engine = engine
        self._keep = keep
        self._rows = _Rows(engine, capacity)
        self._reading: deque[Writer] = deque()
        self._writing: list[Writer] = []

    def __len__(self) -> int:
        return len(self._reading) + len(self._writing)

    def insert(self, writer: Writer) -> None:
        """Take `writer` in. Raises LawcatError where its text gives nothing to go on from."""
        if not writer.unread and writer.logits is None:
            raise LawcatError("There is nothing to go on from; give a prompt.")
        stats = writer.generation.stats
        stats.state_bytes, stats.prompt_tokens = writer.context.state.nbytes, writer.unread
        self._reading.append(writer)

    def remove(self, writer: Writer) -> None:
        """Let `writer` go, done or not. Harmless when it is gone."""
        if writer in self._reading:
            self._reading.remove(writer)
        elif writer in self._writing:
            self._writing.remove(writer)
            self._rows.release(writer, self._keep)

    def step(self, able: Callable[[Writer], bool] = lambda writer: True) -> list[Advance]:
        """``read``, then ``write``, for the sequences that are `able` to go on."""
        return self.read(able) + self.write(able)

    def read(self, able: Callable[[Writer], bool] = lambda writer: True) -> list[Advance]:
        """Read one chunk of one prompt, in turn, and at its end choose the first token; [] without any."""
        writer = next((each for each in self._reading if able(each)), None)
        if writer is None:
            return []
        self._reading.remove(writer)
        begin = time.perf_counter()
        try:
            logits = self._read_chunk(writer)
            text = None if logits is None else self._first(writer, logits)
        except Exception as error:
            return [Advance(writer, error=error)]
        finally:
            writer.generation.stats.prefill_seconds += time.perf_counter() - begin
        if text is None:
            self._reading.append(writer)  # the others' turn
            return [Advance(writer)]
        if not writer.done:
            self._writing.append(writer)
        return [Advance(writer, text)]

    def write(self, able: Callable[[Writer], bool] = lambda writer: True) -> list[Advance]:
        """One token for every sequence whose prompt is read; [] without any."""
        writers = [each for each in self._writing if able(each)]
        if not writers:
            return []
        begin = time.perf_counter()
        advances = [self._write_alone(writers[0])] if len(writers) == 1 else self._write_together(writers)
        seconds = time.perf_counter() - begin
        for advance in advances:
            advance.writer.generation.stats.decode_seconds += seconds
            if advance.writer.done or advance.error is not None:
                self.remove(advance.writer)
        return advances

    def _read_chunk(self, writer: Writer) -> np.ndarray | None:
        """Read on; logits [V] when the prompt is at its end."""
        context = writer.context
        if writer.unread:
            upto = min(len(context), context.fed + self.engine.chunk)
            if writer.reach is not None and context.fed < writer.reach:
                upto = min(upto, writer.reach)
            begin = context.fed
            ids = np.asarray(context.tokens[begin:upto], np.int64)[None]
            if writer.scores is None:
                logits = self.engine.forward(ids, context.state)[0]
            else:
                every = self.engine.forward(ids, context.state, all_positions=True)[0]
                writer.score(begin, every)
                logits = every[-1]
            if not writer.unread:
                writer.logits = logits
            writer.on_read(writer)
        logits, writer.logits = (None, None) if writer.unread else (writer.logits, None)
        return logits

    @staticmethod
    def _first(writer: Writer, logits: np.ndarray) -> str:
        return writer.choose(logits) if writer.request.max_new_tokens else writer.end("length")

    def _write_together(self, writers: list[Writer]) -> list[Advance]:
        try:
            for each in writers:
                self._catch_up(each)
            order = self._rows.arrange(writers)
            ids = np.array([[each.context.tokens[-1]] for each in order], np.int64)
            logits = self.engine.forward(ids, self._rows.state)
        except Exception as error:
            return [Advance(each, error=error) for each in writers]
        return [_choose(each, logits[i]) for i, each in enumerate(order)]

    def _write_alone(self, writer: Writer) -> Advance:
        try:
            self._rows.arrange([])
            if writer.drafter is not None and self.engine.can_try:
                draft = writer.draft(self.engine.trial_room(writer.context.state))
                if draft:
                    return Advance(writer, self._try(writer, draft))
            context = writer.context
            ids = np.asarray(context.tokens[context.fed :], np.int64)[None]
            return Advance(writer, writer.choose(self.engine.forward(ids, context.state)[0]))
        except Exception as error:
            return Advance(writer, error=error)

    def _try(self, writer: Writer, draft: list[int]) -> str:
        """Read the unread tokens and `draft` in one pass, and choose as long as what is chosen was drafted.

        Every token is chosen from the logits after the tokens before it, with the random number of its
        position: as without a draft. Where one differs the state stays what it was, and the tokens chosen are
        read by the next pass, which costs little more for it.
        """
        context = writer.context
        unread = context.tokens[context.fed :].tolist()
        ids = np.array([unread + draft], np.int64)
        logits = self.engine.try_tokens(ids, context.state)[len(unread) - 1 :]
        text, accepted = writer.choose(logits[0]), 0
        while not writer.done and accepted < len(draft) and context.tokens[-1] == draft[accepted]:
            accepted += 1
            text += writer.choose(logits[accepted])
        if accepted == len(draft):
            context.state.accept(ids.size)
        elif writer.done:
            self._catch_up(writer)
        writer.report(len(draft), accepted)
        return text

    def _catch_up(self, writer: Writer) -> None:
        """Read all but the token chosen last (which an end token is not: it is no part of the text)."""
        context = writer.context
        upto = len(context) - (writer.generation.stop_reason != "eos")
        if context.fed < upto:
            self.engine.prefill(context.tokens[context.fed : upto], context.state)


def _choose(writer: Writer, logits: np.ndarray) -> Advance:
    try:
        return Advance(writer, writer.choose(logits))
    except Exception as error:  # of this sequence alone: its logits, its tokens, its options
        return Advance(writer, error=error)


class _Rows:
    """The states of the sequences that run as one batch, a row each."""

    def __init__(self, engine: Engine, capacity: int) -> None:
        self._engine, self._capacity = engine, capacity
        self._state: State | None = None
        self._writers: list[Writer | None] = []  # by row

    @property
    def state(self) -> State:
        if self._state is None:
            self._state = self._engine.new_state(0, capacity=self._capacity)
        return self._state

    def arrange(self, writers: Sequence[Writer]) -> list[Writer]:
        """Have `writers` and no others in the first rows; their order there."""
        for each in self._writers:
            if each is not None and each not in writers:
                self.release(each, keep=True)
        for each in writers:
            if each not in self._writers:
                self._join(each)
        while None in self._writers:
            hole, last = self._writers.index(None), self._writers.pop()
            if last is not None:
                self.state.move(len(self._writers), hole)
                self._place(last, hole)
        if self._writers:
            self.state.batch = len(self._writers)
        return [each for each in self._writers if each is not None]

    def release(self, writer: Writer, keep: bool) -> None:
        """Give up the row of `writer`, if it has one; keep: its context gets a state of its own again."""
        if writer not in self._writers:
            return
        row = self._writers.index(writer)
        if keep:
            writer.context.state = self.state.rows([row])
        self._writers[row] = None
        self.state.free(row)

    def _join(self, writer: Writer) -> None:
        row = self._writers.index(None) if None in self._writers else len(self._writers)
        if row == len(self._writers):
            self._writers.append(None)
        self.state.put(row, writer.context.state)
        self._place(writer, row)

    def _place(self, writer: Writer, row: int) -> None:
        self._writers[row] = writer
        writer.context.state = self.state.row(row)  # lets go of the memory that it had
