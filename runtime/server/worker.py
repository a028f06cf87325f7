"""The one thread that runs the model for all clients, and the bounded queue before it.

All jobs are written together, a token a step; between two steps one chunk of one prompt is read, so nobody
waits for another's whole prompt. A step never waits for a client. A job whose reader is slow is passed over
until there is room for its text again, and dropped after ``stall_seconds``.
"""

from __future__ import annotations

import sys
import threading
import time
import traceback
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from lawcat_edge.runtime.errors import LawcatError
from lawcat_edge.runtime.generate.core import Advance, Core
from lawcat_edge.runtime.generate.draft import LONGEST_DRAFT
from lawcat_edge.runtime.generate.model import Model
from lawcat_edge.runtime.generate.request import Request
from lawcat_edge.runtime.generate.sampling import Choice
from lawcat_edge.runtime.generate.writer import Writer
from lawcat_edge.runtime.server.prefix_cache import StateCache


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
        prompts: Sequence[array[int]],
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
        self.drafted_tokens, self.accepted_tokens = 0, 0
        self._wake = wake
        self._room = room
        self._lock = threading.Lock()
        self._pieces: deque[Piece] = deque()
        self._worker: Worker | None = None
        self.cancelled = False
        self.done = False
        self.began = 0.0
        self.stuck_since: float | None = None  # when its reader was first found to be behind
        self.writer: Writer | None = None  # of the text at hand
        self.index = 0
        self.told = 0  # of its choices, those that were given out
        self.before = 0  # tokens of the texts that are done

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
    """What the worker is doing: jobs under way, jobs that wait, states kept and their bytes."""

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

    parallel: jobs written together (each has a state of its own). queue: jobs that may wait for one to end.
    states: states kept for prompts that begin like an earlier text (0: none). deterministic: one job at a
    time, from the beginning of its text, for where the last bits depend on what is computed together.
    speculate: tokens drafted at most, for a job that is written alone (0: none).
    """

    def __init__(
        self,
        model: Model,
        parallel: int = 8,
        queue: int = 16,
        states: int = 8,
        stall_seconds: float = 60.0,
        deterministic: bool = False,
        speculate: int = LONGEST_DRAFT,
    ) -> None:
        assert parallel >= 1
        assert min(queue, states) >= 0
        if deterministic:
            parallel, states = 1, 0
        self.model = model
        self.deterministic = deterministic
        self.speculate = speculate
        self.parallel = parallel
        self.queue = queue
        self.stall_seconds = stall_seconds
        self._cache = StateCache(states)
        # Jobs whose readers were behind may come back while others have their places.
        self._core = Core(model.engine, capacity=parallel + queue, keep=states > 0)
        self._jobs: dict[Writer, Job] = {}
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
        while self._admit():
            for job in [job for job in self._running if job.writer is None]:
                self._begin(job)
            for advance in self._core.step(self._able()):
                self._tell(advance)
        for job in [*self._running, *self._waiting]:
            self._end(job, Piece("", reason="cancelled"))
        self._running.clear()
        self._waiting.clear()

    def _able(self) -> Callable[[Writer], bool]:
        """Which texts go on now: those whose readers keep up; of these the oldest alone, if deterministic."""
        able = [job.writer for job in self._running if job.has_room]
        chosen = set(able[:1] if self.deterministic else able)
        return lambda writer: writer in chosen

    def _admit(self) -> bool:
        """Wait until there is something to do and let in who may come; False: the worker is closing."""
        with self._changed:
            while not self._closing:
                self._drop_dead()
                able = sum(job.has_room for job in self._running)
                # A job that waits for its reader costs no time, so it does not keep others from running.
                while self._waiting and able < self.parallel:
                    self._running.append(self._waiting.popleft())
                    able += 1
                for job in self._running:
                    job.stuck_since = None if job.has_room else job.stuck_since or time.monotonic()
                if able:
                    return True
                # Without jobs there is nothing to time out.
                self._changed.wait(1.0 if self._running else None)
        return False

    def _drop_dead(self) -> None:
        now = time.monotonic()
        for job in [*self._running, *self._waiting]:
            stuck = job.stuck_since is not None and now - job.stuck_since > self.stall_seconds
            if job.cancelled or (stuck and not job.has_room):
                (self._running if job in self._running else self._waiting).remove(job)
                self._end(job, Piece("", reason="cancelled"))

    def _begin(self, job: Job) -> None:
        """Insert the next text of `job` into the core."""
        model, tokens = self.model, job.prompts[job.index]
        request = replace(job.request, speculate=self.speculate)
        job.began = job.began or time.monotonic()
        scored = job.echo is not None and request.logprobs is not None
        try:
            # A prompt whose tokens are scored is read from its beginning.
            context, logits, branch = (None, None, None) if scored else self._cache.find(tokens)
            context = context or model.new_context()
            context.tokens = tokens[:]
            writer = model.writer(request, context, logits=logits)
            self._core.insert(writer)
        except Exception as error:
            self._fail(job, error)
            return
        job.writer, job.told, self._jobs[writer] = writer, 0, job
        job.reused_tokens += context.fed
        echo = [] if job.echo is None else [job.echo[job.index]]
        if scored:
            writer.scores, writer.on_read = request.logprobs, lambda each: self._tell_scores(job, each, echo)
        else:
            writer.reach, writer.on_read = branch, self._keep_prompt
            for text in echo:
                job.put(Piece(text, index=job.index))

    def _tell_scores(self, job: Job, writer: Writer, echo: list[str]) -> None:
        """Give out what each token of the prompt had for a probability, and with the first ones its text."""
        if not writer.unread or len(writer.scored) >= 256:
            job.put(Piece(echo.pop() if echo else "", tuple(writer.scored), index=job.index))
            writer.scored.clear()

    def _keep_prompt(self, writer: Writer) -> None:
        context = writer.context
        if self._cache.limit and (context.fed == writer.reach or not writer.unread):
            kept = context.fork()
            del kept.tokens[context.fed :]
            self._cache.add(kept, writer.logits)

    def _tell(self, advance: Advance) -> None:
        """Give out what a step made of one text."""
        writer = advance.writer
        job, generation = self._jobs[writer], writer.generation
        if advance.error is not None:
            self._fail(job, advance.error)
            return
        job.new_tokens = job.before + len(generation.tokens)
        if writer.done:
            job.drafted_tokens += generation.stats.drafted_tokens
            job.accepted_tokens += generation.stats.accepted_tokens
            self._keep_answer(writer)
        if advance.text or writer.done:
            choices = tuple(generation.choices[job.told :])
            job.told += len(choices)
            reason = generation.stop_reason if writer.done else None
            job.put(Piece(advance.text, choices, reason, job.index))
        if not writer.done:
            return
        del self._jobs[writer]
        job.writer, job.before, job.index = None, job.new_tokens, job.index + 1
        if job.index == len(job.prompts):
            self._leave(job)

    def _keep_answer(self, writer: Writer) -> None:
        if self._cache.limit:
            context = writer.context
            # The last token was chosen but not read; what was read is what the state stands for.
            del context.tokens[context.fed :]
            self._cache.add(context)

    def _fail(self, job: Job, error: Exception) -> None:
        """End one request, whose failure must not end the others'."""
        message = str(error)
        if not isinstance(error, LawcatError):
            # The trace is for whoever runs the server.
            traceback.print_exception(error, file=sys.stderr)
            message = "The server failed on this request; see its log."
        self._leave(job)
        self._end(job, Piece(message, reason="error"))

    def _leave(self, job: Job) -> None:
        with self._changed:
            self._running.remove(job)
        self._pace.add(time.monotonic() - job.began)
        job.done = True

    def _end(self, job: Job, last: Piece) -> None:
        """Let go of `job`, wherever it is, with a last word to its reader."""
        if job.writer is not None:
            self._core.remove(job.writer)
            self._jobs.pop(job.writer, None)
            job.writer = None
        job.done = True
        job.put(last)
