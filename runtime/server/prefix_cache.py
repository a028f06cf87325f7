"""States of texts the server has read, so that what begins like an earlier text is not read again.

A recurrent state cannot be wound back to a shorter text, so it matters where states are kept: at the end of
every prompt, at the end of every answer, and where a prompt leaves an earlier text (``branch``): the second
question about one document leaves a state at the document's end, and the third starts from there.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np

from lawcat_edge.runtime.generate.context import Context

MIN_BRANCH = 32  # tokens that a state within a prompt must save before it is worth its megabytes


@dataclass
class _Entry:
    context: Context  # every token of it was fed
    logits: np.ndarray | None  # [V] after the last token, if kept

    @property
    def tokens(self) -> np.ndarray:
        return np.frombuffer(self.context.tokens, np.uint32)


class StateCache:
    """The `limit` most recently used states. Not thread-safe: it belongs to the model's thread."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._entries: OrderedDict[int, _Entry] = OrderedDict()
        self._count = 0

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def nbytes(self) -> int:
        return sum(entry.context.state.nbytes for entry in self._entries.values())

    def find(self, tokens: array[int]) -> tuple[Context | None, np.ndarray | None, int | None]:
        """(a copy of the state of the longest beginning of `tokens`, its logits if all are read, branch).

        branch: number of tokens after which the caller should ``add`` its state, because an earlier text
        began with the same; None if that saves too little.
        """
        wanted = np.frombuffer(tokens, np.uint32)
        best, shared = None, 0
        for key, entry in self._entries.items():
            common = _common(entry.tokens, wanted)
            shared = max(shared, common)
            if common < len(entry.tokens) or (common == len(wanted) and entry.logits is None):
                continue
            if best is None or common > len(self._entries[best].tokens):
                best = key
        context, logits = None, None
        if best is not None:
            self._entries.move_to_end(best)
            entry = self._entries[best]
            context = entry.context.fork()
            logits = entry.logits if len(entry.tokens) == len(wanted) else None
        reused = 0 if context is None else context.fed
        worth = reused + MIN_BRANCH <= shared < len(wanted)
        return context, logits, shared if worth else None

    def add(self, context: Context, logits: np.ndarray | None = None) -> None:
        """Keep `context`, which becomes the cache's own; give a fork to go on with it."""
        assert context.fed == len(context)
        if not self.limit or not context.fed:
            return
        context.state.bindings.clear()  # they hold buffers that only a running text needs
        tokens = np.frombuffer(context.tokens, np.uint32)
        for key, entry in list(self._entries.items()):
            if np.array_equal(entry.tokens, tokens):
                logits = entry.logits if logits is None else logits
                del self._entries[key]
        self._count += 1
        self._entries[self._count] = _Entry(context, None if logits is None else logits.copy())
        while len(self._entries) > self.limit:
            self._entries.popitem(last=False)


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """Length of the common beginning of two token sequences."""
    size = min(len(a), len(b))
    differs = a[:size] != b[:size]
    return int(differs.argmax()) if differs.any() else size
