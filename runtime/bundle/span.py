"""How far back softmax attention sees, and which tokens it remembers: the one place of these rules."""

from __future__ import annotations

from dataclasses import dataclass

_LEAST_SLACK = 32
_NO_LIMIT = 1 << 62


@dataclass(frozen=True)
class Span:
    """What the softmax attention of one kind of layer sees of the tokens before.

    tokens: as many, the newest included. sinks: of these, so many are the first of the text.

    Without sinks a token sees exactly the last ``tokens`` tokens. Models put much of their attention on the
    first tokens of a text, whatever these say, and lose their footing once those are gone (attention sinks:
    Xiao et al., arXiv 2309.17453). With sinks the first ones stay: whenever ``tokens`` rows are remembered,
    the oldest ``step`` behind the sinks are forgotten, and the sinks move up to where those were, so that
    positions stay consecutive. A token then sees between ``tokens - step`` and ``tokens`` rows, and between
    two such moments attention is causal and no more.
    """

    tokens: int
    sinks: int = 0

    @property
    def step(self) -> int:
        """Rows that are forgotten at once, with sinks: moving the others costs time.

        A sixteenth, but for short spans enough that a prompt is not read in tiny pieces.
        """
        return max(1, self.tokens // 16, min(128, self.tokens // 4))

    @property
    def most(self) -> int:
        """Rows that a text goes on from, at most."""
        return self.tokens - 1

    @property
    def possible(self) -> bool:
        """Whether something is left to see beside the sinks when rows are forgotten."""
        return not self.sinks or self.sinks + self.step < self.tokens

    def kept(self, tokens: int) -> int:
        """Rows that a text of so many tokens goes on from."""
        if not self.sinks or tokens < self.tokens:
            return min(tokens, self.most)
        return self.tokens - self.step + (tokens - self.tokens) % self.step

    def room(self, rows: int) -> int:
        """Tokens that can be read at once when there are so many rows: at least one."""
        return self.tokens - rows if self.sinks else _NO_LIMIT

    def slots(self, tokens: int) -> int:
        """Slots that a buffer needs at most when so many tokens are read at once.

        Without sinks, rows that nobody sees any more wait for others to be forgotten with: each costs a
        little attention, and moving the others costs more.
        """
        if self.sinks:
            return self.tokens
        return self.most + max(tokens, _LEAST_SLACK, self.tokens // 16)
