"""A text with its state, and a generation that is under way."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Generator, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from lawcat_edge.runtime.engine.state import State
from lawcat_edge.runtime.generate.sampling import Choice
from lawcat_edge.runtime.generate.stats import Stats
from lawcat_edge.runtime.template.chat import Message


@dataclass(frozen=True)
class Mark:
    """Length and hash of the template text that a context's conversation stands for."""

    length: int
    sha256: str

    @classmethod
    def of(cls, text: str) -> Mark:
        return cls(len(text), hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest())

    def begins(self, text: str) -> bool:
        return len(text) >= self.length and Mark.of(text[: self.length]) == self


class Context:
    """A text the model has read or written: its tokens, and the state after the first ``fed`` of them.

    messages: the conversation, if it is one. Four bytes a token; the state does not grow.
    """

    def __init__(self, state: State) -> None:
        self.state = state
        self.tokens = array("I")
        self.messages: list[Message] = []
        self.mark: Mark | None = None  # None: the tokens do not stand for exactly `messages`
        self.has_base = False  # a text was read before the conversation began
        self.busy = False

    @property
    def fed(self) -> int:
        return self.state.position

    def __len__(self) -> int:
        return len(self.tokens)

    def __bool__(self) -> bool:
        """True, without tokens too: ``context or another`` must not drop one that is still empty."""
        return True

    def fork(self) -> Context:
        """An independent copy: many questions on one document that was read once."""
        other = Context(self.state.copy())
        other.tokens = self.tokens[:]
        other.messages = [dict(message) for message in self.messages]
        other.mark, other.has_base = self.mark, self.has_base
        return other

    def clear(self) -> None:
        """Back to nothing read."""
        self.state.clear()
        del self.tokens[:]
        self.messages, self.mark, self.has_base = [], None, False

    def to_extra(self) -> dict[str, Any]:
        mark = None if self.mark is None else asdict(self.mark)
        return {"messages": self.messages, "mark": mark, "has_base": self.has_base} if self.messages else {}


@dataclass
class Result:
    """A finished generation. stop_reason: 'eos', 'stop' (a stop string), 'length', or 'closed'."""

    text: str
    tokens: list[int]
    stop_reason: str
    stats: Stats
    logprobs: list[Choice] | None = None

    def to_dict(self) -> dict[str, Any]:
        data = {"text": self.text, "tokens": self.tokens, "stop_reason": self.stop_reason}
        if self.logprobs is not None:
            data["logprobs"] = [asdict(choice) for choice in self.logprobs]
        return {**data, "stats": self.stats.to_dict()}


class Generation:
    """A running generation: iterate for pieces of text as they come, or ask for ``.text`` or ``.result()``.

    Nothing runs before the first of these. ``close()`` ends it early and leaves the context usable.
    """

    def __init__(self, start: Callable[[Generation], Generator[str, None, None]], logprobs: bool) -> None:
        self.tokens: list[int] = []
        self.choices: list[Choice] = []
        self.stop_reason = "closed"
        self.stats = Stats()
        self._logprobs = logprobs
        self._parts: list[str] = []
        self._pieces = start(self)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        piece = next(self._pieces)
        self._parts.append(piece)
        return piece

    @property
    def text(self) -> str:
        """All of the text; runs to the end."""
        for _ in self:
            pass
        return "".join(self._parts)

    def result(self) -> Result:
        text = self.text
        choices = list(self.choices) if self._logprobs else None
        return Result(text, list(self.tokens), self.stop_reason, self.stats, choices)

    def close(self) -> None:
        self._pieces.close()

    def __str__(self) -> str:
        return self.text
