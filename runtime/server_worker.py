"""The one thread that runs the model for all clients, and the bounded queue before it.

Jobs take turns: one turn is one token, or one chunk of a prompt. A turn never waits for a client. A job whose
reader is slow is passed over until there is room for its text again, and dropped after ``stall_seconds``.
"""

from __future__ import annotations

import sys
import threading
import time
import traceback
from array import array
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from lawcat_edge.runtime.context import Context, Generation
from lawcat_edge.runtime.errors import LawcatError
from lawcat_edge.runtime.model import Model, Request, Writer
from lawcat_edge.runtime.sampling import Choice, score
from lawcat_edge.runtime.server_cache import StateCache


@dataclass(frozen=True)
class Piece:
    """Text that became certain and the tokens chosen since the piece before; reason: set on the last one.

    reason: 'eos', 'stop' or 'length'; 'error' with the sentence in `text`, 'cancelled' without one: these two
    end all texts of a job. index: which of the job's texts it belongs to.
    """

    text: str
    choices: tuple[Choice, ...] = ()
    reason: str | None = None
    index: int = 0


class Job:
    """One request: token ids to go on from, and the pieces of the answer that wait for their reader.

    prompts: one or several, answered one after another. echo: their texts, to be given out (with the
    log-probabilities of their tokens, if the request asks for any) before what follows them.
    wake: called (from the model's thread) when there is something to ``take``; it must not block.
    """

    def __init__(
        self,
        prompts: Sequence[array],
        request: Request,
        wake: Callable[[], None],
        room: int = 64,
        echo: Sequence[str] | None = None,
    ) -> None:
        self.prompts = prompts
        self.request = request
        self.echo = echo
        self.prompt_tokens = sum(len(tokens) for tokens in prompts)
        self.reused_tokens, self.new_tokens = 0, 0
        self._wake = wake
        self._room = room
        self._lock = threading.Lock()
        self._pieces: deque[Piece] = deque()
        self._worker: Worker | None = None
        self.cancelled = False
        self.done = False
        self.began = 0.0
        self.stuck_since: float | None = None  # when its reader was first found to be behind
        self.turns: Iterator[None] | None = None

    @property
    def has_room(self) -> bool:
        return len(self._pieces) < self._room

    def put(self, piece: Piece) -> None:
        with self._lock:
            self._pieces.append(piece)
        self._wake()

    def take(self) -> list[Piece]:
        """All pieces that wait, in order; the last of a job has a reason."""
        with self._lock:
            pieces = list(self._pieces)
            self._pieces.clear()
        if self._worker is not None and pieces:
            self._worker.nudge()
        return pieces

    def is_last(self, piece: Piece) -> bool:
        """Whether nothing comes after `piece`."""
        whole = piece.reason is not None and piece.index == len(self.prompts) - 1
        return whole or piece.reason in ("error", "cancelled")

    def cancel(self) -> None:
        """The reader is gone: stop working on it. Harmless when it is over."""
        self.cancelled = True
        if self._worker is not None:
            self._worker.nudge()


class QueueFull(Exception):  # noqa: N818 (an answer, not a failure)
    """No room for another request; `retry_after`: seconds until there probably is."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"The server is busy; try again in {retry_after} s.")
        self.retry_after = retry_after


class Closing(Exception):  # noqa: N818
    """The server is shutting down."""


@dataclass(frozen=True)
class Load:
    """What the worker is doing: jobs taking turns, jobs that wait, states kept and their bytes."""

    running: int
    waiting: int
    kept_states: int
    kept_bytes: int


@dataclass
class _Pace:
    """Mean seconds of a job, the recent ones counting most."""

    seconds: float = field(default=2.0)

    def add(self, seconds: float) -> None:
        self.seconds += 0.2 * (seconds - self.seconds)


class Worker:
    """Runs jobs on `model` in a thread of its own; nothing else may use the model meanwhile.

    parallel: jobs that take turns (each has a state of its own). queue: jobs that may wait for a turn.
    states: states kept for prompts that begin like an earlier text (0: none).
    """

    def __init__(
        self, model: Model, parallel: int = 4, queue: int = 16, states: int = 8, stall_seconds: float = 60.0
    ) -> None:
        assert parallel >= 1
        assert min(queue, states) >= 0
        self.model = model
        self.parallel = parallel
        self.queue = queue
        self.stall_seconds = stall_seconds
        self._cache = StateCache(states)
        self._pace = _Pace()
        self._changed = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._running: deque[Job] = deque()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="lawcat-model", daemon=True)
        self._thread.start()

    @property
    def load(self) -> Load:
        return Load(len(self._running), len(self._waiting), len(self._cache), self._cache.nbytes)

    def submit(self, job: Job) -> None:
        """Queue `job`. Raises QueueFull or Closing instead of waiting."""
        with self._changed:
            self.check_room()
            job._worker = self
            self._waiting.append(job)
            self._changed.notify()

    def check_room(self) -> None:
        """Raise what ``submit`` would raise now, before anything is spent on a request."""
        with self._changed:
            if self._closing:
                raise Closing("The server is shutting down.")
            if len(self._waiting) + len(self._running) >= self.parallel + self.queue:
                ahead = 1 + len(self._waiting) // self.parallel
                raise QueueFull(max(1, min(60, round(ahead * self._pace.seconds))))

    def nudge(self) -> None:
        """Something about a job changed that the thread may be waiting for."""
        with self._changed:
            self._changed.notify()

    def stop(self) -> None:
        """Cancel everything and take nothing more; idempotent."""
        with self._changed:
            self._closing = True
            self._changed.notify()

    def close(self, timeout: float = 10.0) -> None:
        """``stop``, and wait for the thread's end."""
        self.stop()
        self._thread.join(timeout)

    def _run(self) -> None:
        while (job := self._next()) is not None:
            self._turn(job)
        for job in [*self._running, *self._waiting]:
            self._end(job, Piece("", reason="cancelled"))
        self._running.clear()
        self._waiting.clear()

    def _next(self) -> Job | None:
        """The job whose turn it is; waits for one. None: the worker is closing."""
        with self._changed:
            while not self._closing:
                self._drop_dead()
                able = sum(job.has_room for job in self._running)
                # A job that waits for its reader costs no time, so it does not keep others from running.
                while self._waiting and able < self.parallel:
                    self._running.append(self._waiting.popleft())
                    able += 1
                for _ in range(len(self._running)):
                    job = self._running.popleft()
                    self._running.append(job)
                    if job.has_room:
                        job.stuck_since = None
                        return job
                    job.stuck_since = job.stuck_since or time.monotonic()
                # Without jobs there is nothing to time out.
                self._changed.wait(1.0 if self._running else None)
        return None

    def _drop_dead(self) -> None:
        now = time.monotonic()
        for job in [*self._running, *self._waiting]:
            stuck = job.stuck_since is not None and now - job.stuck_since > self.stall_seconds
            if job.cancelled or (stuck and not job.has_room):
                (self._running if job in self._running else self._waiting).remove(job)
                self._end(job, Piece("", reason="cancelled"))

    def _turn(self, job: Job) -> None:
        last: Piece | None = None
        try:
            if job.turns is None:
                job.began = time.monotonic()
                job.turns = self._turns(job)
            next(job.turns)
            return
        except StopIteration:
            pass
        except LawcatError as error:
            last = Piece(str(error), reason="error")
        except Exception:
            # One request's failure must not end the others'; the trace is for whoever runs the server.
            traceback.print_exc(file=sys.stderr)
            last = Piece("The server failed on this request; see its log.", reason="error")
        with self._changed:
            self._running.remove(job)
        self._pace.add(time.monotonic() - job.began)
        self._end(job, last)

    def _end(self, job: Job, last: Piece | None) -> None:
        job.done, job.turns = True, None
        if last is not None:
            job.put(last)

    def _turns(self, job: Job) -> Generator[None, None, None]:
        """The work of a job, a turn at a time; every piece but a failure's is put from here."""
        for index in range(len(job.prompts)):
            yield from self._text_turns(job, index)
            if index < len(job.prompts) - 1:
                yield

    def _text_turns(self, job: Job, index: int) -> Generator[None, None, None]:
        model, request, tokens = self.model, job.request, job.prompts[index]
        if job.echo is not None and request.logprobs is not None:
            context = model.new_context()
            logits = yield from self._echo_turns(job, index, context)
        else:
            if job.echo is not None:
                job.put(Piece(job.echo[index], index=index))
            context, logits = yield from self._read_turns(job, tokens)
        if request.max_new_tokens == 0:
            job.put(Piece("", reason="length", index=index))
            return
        generation = Generation(lambda _: _nothing(), request.logprobs is not None)
        writer = Writer(model, request, context, generation)
        told, before = 0, job.new_tokens
        while True:
            text = writer.choose(logits[0])
            job.new_tokens = before + len(generation.tokens)
            reason = generation.stop_reason if writer.done else None
            if text or reason:
                choices = tuple(generation.choices[told:])
                told += len(choices)
                if reason:
                    self._keep_answer(writer)
                job.put(Piece(text, choices, reason, index))
            if writer.done:
                return
            yield
            following = model._feed(context, len(context))
            assert following is not None
            logits = following

    def _echo_turns(self, job: Job, index: int, context: Context) -> Generator[None, None, np.ndarray]:
        """Read a prompt from its beginning and give out what each of its tokens had for a probability."""
        engine, tokens, count = self.model.engine, job.prompts[index], job.request.logprobs
        assert count is not None
        context.tokens = tokens[:]
        text, choices = (job.echo or ())[index], [Choice(tokens[0], float("nan"))]
        while True:
            begin = context.fed
            ids = np.asarray(tokens[begin : begin + engine.chunk], np.int64)
            logits = engine.forward(ids[None], context.state, all_positions=True)[0]
            following = tokens[begin + 1 : begin + 1 + len(ids)]
            # Past the last token there is none to score.
            choices += [score(row, token, count) for row, token in zip(logits, following, strict=False)]
            last = logits[-1:].copy()
            done = context.fed == len(tokens)
            if done or len(choices) >= 256:
                job.put(Piece(text, tuple(choices), index=index))
                text, choices = "", []
            if done:
                return last
            yield

    def _read_turns(self, job: Job, tokens: array) -> Generator[None, None, tuple[Context, np.ndarray]]:
        """Read a prompt, from a kept state where there is one: (its context, the logits [1,V] after it)."""
        model = self.model
        context, logits, branch = self._cache.find(tokens)
        context = context or model.new_context()
        reused = context.fed
        job.reused_tokens += reused
        context.tokens = tokens[:]
        while context.fed < len(tokens):
            upto = min(len(tokens), context.fed + model.engine.chunk)
            if branch is not None and context.fed < branch:
                upto = min(upto, branch)
            logits = model._feed(context, upto)
            if context.fed == branch and branch < len(tokens):
                kept = context.fork()
                del kept.tokens[branch:]
                self._cache.add(kept)
            if context.fed < len(tokens):
                yield
        assert logits is not None
        if reused < len(tokens):
            self._cache.add(context.fork(), logits)
        return context, logits

    def _keep_answer(self, writer: Writer) -> None:
        context = writer.context
        # The last token was chosen but not read; what was read is what the state stands for.
        del context.tokens[context.fed :]
        self._cache.add(context)


def _nothing() -> Generator[str, None, None]:
    yield from ()
