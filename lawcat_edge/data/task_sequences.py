"""Training sequences made of whole questions with their answers, at memory speed (NumPy concatenation alone).

Each sequence is filled to the last token with prompts of a quarter of it up to all of it, each followed by
its answer and the separator, so that one run sees many lengths and depths.
"""

from __future__ import annotations

import numpy as np
import tokenizers

from lawcat_edge.data.corpus import separator_ids
from lawcat_edge.data.mix import Sequence, TeacherText
from lawcat_edge.data.tasks.babilong import Babilong
from lawcat_edge.data.tasks.filler import Encoder, Filler, split_sentences
from lawcat_edge.data.tasks.niah import Niah
from lawcat_edge.data.tasks.passkey import Passkey
from lawcat_edge.runtime.errors import LawcatError

PROSE_TASKS = ("niah-2", "niah-3", "babilong-qa2", "babilong-qa3")
LONGEST_REPLY = {
    "passkey": 16,
    "niah-1": 16,
    "niah-2": 16,
    "niah-3": 64,
    "babilong-qa2": 40,
    "babilong-qa3": 60,
}
"""Tokens kept free for an answer; far above what any tokenizer of the supported families needs."""


class TaskMaker:
    """Makes training sequences of exactly ``seq_len`` ids for a task by name.

    prose: background text for the tasks that need it. answer_weight: loss weight of an answer and its end;
    the other tokens count 1 (no weights are given when it is 1).
    """

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        seq_len: int,
        prose: str | None = None,
        teacher: TeacherText | None = None,
        answer_weight: float = 1.0,
    ) -> None:
        self.encoder, self.seq_len = Encoder(tokenizer), seq_len
        self.prose, self.teacher, self.answer_weight = prose, teacher, answer_weight
        separator = separator_ids(tokenizer)
        # A prompt brings its own start token, so what follows an answer is the end token alone.
        self.end = np.asarray(separator[:1], np.int32)
        self.separator = np.asarray(separator, np.int32)
        self._tasks: dict[str, Passkey | Niah | Babilong] = {}
        self._filler: Filler | None = None

    def _task(self, name: str) -> Passkey | Niah | Babilong:
        if name not in self._tasks:
            filler = None
            if name in PROSE_TASKS:
                if self._filler is None:
                    self._filler = Filler.build(self.encoder, split_sentences(self.prose or ""))
                filler = self._filler
            if name == "passkey":
                self._tasks[name] = Passkey(self.encoder)
            elif name.startswith("niah-"):
                self._tasks[name] = Niah(self.encoder, int(name[-1]), filler)
            else:
                self._tasks[name] = Babilong(self.encoder, int(name[-1]), filler)
        return self._tasks[name]

    def make(self, name: str, rng: np.random.Generator) -> Sequence:
        """One sequence of the task. Raises LawcatError when ``seq_len`` is too short for it."""
        if name == "teacher":
            return self._teacher_text(rng)
        task = self._task(name)
        shortest = task.shortest() + LONGEST_REPLY[name]
        if self.seq_len < shortest:
            raise LawcatError(
                f"Sequences of {self.seq_len} tokens are too short for {name}; take {shortest} or more."
            )
        low = max(self.seq_len // 4, shortest)
        ids = np.full(self.seq_len, self.end[0], np.int32)
        # What a prompt that could not be cut exactly leaves over: end tokens that teach nothing.
        weight = np.zeros(self.seq_len, np.float32)
        at = 0
        while (room := self.seq_len - at) >= low:
            length = int(rng.integers(low, room + 1))
            if room - length < low:
                length = room
            prompt, reply = self._fit(task, rng, length)
            middle, end = at + len(prompt), at + len(prompt) + len(reply)
            ids[at:middle], ids[middle:end] = prompt, reply
            weight[at:middle], weight[middle:end] = 1.0, self.answer_weight
            at = end
        return Sequence(ids, weight if self.answer_weight != 1.0 or at < self.seq_len else None, name)

    def _fit(
        self, task: Passkey | Niah | Babilong, rng: np.random.Generator, length: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ids of a prompt and of its answer, together ``length`` tokens where that can be, never more."""
        state = rng.bit_generator.state
        prompt = task.make(rng, length - LONGEST_REPLY[task.task], float(rng.random()))
        reply = np.concatenate([self.encoder.after_text(prompt.reply), self.end])
        if len(prompt.ids) + len(reply) == length:
            return prompt.ids, reply
        # The same draws again, now that the length of the answer is known.
        rng.bit_generator.state = state
        again = task.make(rng, length - len(reply), float(rng.random()))
        reply_again = np.concatenate([self.encoder.after_text(again.reply), self.end])
        if len(again.ids) + len(reply_again) <= length:
            return again.ids, reply_again
        assert len(prompt.ids) + len(reply) <= length, "the longest reply is within its bound"
        return prompt.ids, reply

    def _teacher_text(self, rng: np.random.Generator) -> Sequence:
        assert self.teacher is not None
        pieces: list[np.ndarray] = [self.encoder.start]
        size = len(self.encoder.start)
        while size < self.seq_len:
            piece = np.asarray(self.teacher(rng, self.seq_len - size), np.int32)
            if not len(piece):
                raise LawcatError("The teacher sampled no text; check its generation settings.")
            pieces += [piece, self.separator]
            size += len(piece) + len(self.separator)
        return Sequence(np.concatenate(pieces)[: self.seq_len], None, "teacher")
