"""One sequence of the decoding core: a text that is read, then written on until it is done."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection

import numpy as np

from lawcat_edge.runtime.generate.context import Context, Generation, Result
from lawcat_edge.runtime.generate.draft import Drafter
from lawcat_edge.runtime.generate.request import Request
from lawcat_edge.runtime.generate.sampling import Choice, Sampler, score
from lawcat_edge.runtime.generate.stats import peak_memory
from lawcat_edge.runtime.generate.text import Detokenizer, StopStrings, Tokenizer


class Writer:
    """The end of one text: chooses its tokens, gives out their text, knows when to stop.

    logits: float32 [V] after the last token, where `context` is read already. reach: a number of tokens at
    which reading pauses, for `on_read`, which is told of every piece of the prompt that was read (with
    `logits` set once all of it is). scores: alternatives recorded for each token of the prompt, whose
    log-probabilities then come in `scored`; None: not asked for.
    """

    def __init__(
        self,
        request: Request,
        context: Context,
        generation: Generation,
        tokenizer: Tokenizer,
        vocab_size: int,
        eos: Collection[int],
        logits: np.ndarray | None = None,
    ) -> None:
        self.request = request
        self.context = context
        self.generation = generation
        self.logits = logits
        self.reach: int | None = None
        self.on_read: Callable[[Writer], None] = lambda writer: None
        self.scores: int | None = None
        self.scored: list[Choice] = []
        self.drafter = Drafter(request.speculate) if request.speculate else None
        self.done = False
        self.began = time.perf_counter()
        self.sampler = Sampler(request.sampling, vocab_size, request.logprobs)
        self.sampler.observe(context.tokens)
        generation.stats.seed = self.sampler.seed
        self._eos = frozenset() if request.ignore_eos else frozenset(eos)
        self._detokenizer = Detokenizer(tokenizer, context=context.tokens)
        self._stops = StopStrings(request.stop)

    @property
    def unread(self) -> int:
        """Tokens of the text that the state has not seen."""
        return len(self.context) - self.context.fed

    def score(self, begin: int, logits: np.ndarray) -> None:
        """Record the prompt's tokens behind those from `begin` on, which logits [T,V] are of."""
        assert self.scores is not None
        tokens = self.context.tokens
        if not begin:
            self.scored.append(Choice(tokens[0], float("nan")))  # nothing tells of the first one
        following = tokens[begin + 1 : begin + 1 + len(logits)]
        # Past the last token there is none to score.
        self.scored += [score(row, token, self.scores) for row, token in zip(logits, following, strict=False)]

    def choose(self, logits: np.ndarray) -> str:
        """Choose from logits [V]; the text that became certain. Sets ``done`` at the end."""
        choice = self.sampler.choose(logits, len(self.context))
        if self.generation.stats.first_token_seconds is None:
            self.generation.stats.first_token_seconds = time.perf_counter() - self.began
        if choice.token in self._eos:
            # Not added to the text: what comes after it is for the template to say.
            if self.request.record_end:
                self.generation.choices.append(choice)
            return self.end("eos")
        self.context.tokens.append(choice.token)
        self.sampler.observe([choice.token])
        self.generation.tokens.append(choice.token)
        if self.request.logprobs is not None:
            self.generation.choices.append(choice)
        text = self._stops.push(self._detokenizer.push(choice.token))
        if self._stops.found is not None:
            self.done, self.generation.stop_reason = True, "stop"
        elif len(self.generation.tokens) >= self.request.max_new_tokens:
            text += self.end("length")
        return text

    def draft(self, longest: int) -> list[int]:
        """What may come next, by what the text repeats; often nothing.

        longest: tokens that are read in one pass at most.
        """
        assert self.drafter is not None
        room = min(longest - self.unread, self.request.max_new_tokens - len(self.generation.tokens) - 1)
        return self.drafter.propose(self.context.tokens, self.unread, room)

    def report(self, drafted: int, accepted: int) -> None:
        """Tell what became of a draft."""
        assert self.drafter is not None
        self.drafter.report(drafted, accepted)
        self.generation.stats.drafted_tokens += drafted
        self.generation.stats.accepted_tokens += accepted

    def end(self, reason: str) -> str:
        """Nothing more is written, for `reason`; the text that was held back."""
        text = self._stops.push(self._detokenizer.flush())
        if self._stops.found is not None:
            reason = "stop"
        self.done, self.generation.stop_reason = True, reason
        return text + self._stops.flush()

    def settle(self) -> None:
        """Complete the figures of what was written so far."""
        stats = self.generation.stats
        stats.new_tokens, stats.context_tokens = len(self.generation.tokens), len(self.context)
        stats.peak_memory_bytes = peak_memory()

    def result(self, text: str) -> Result:
        """What was written, whose text is `text`."""
        self.settle()
        generation, recorded = self.generation, self.request.logprobs is not None
        return Result(
            text,
            generation.tokens,
            generation.stop_reason,
            generation.stats,
            generation.choices if recorded else None,
        )
