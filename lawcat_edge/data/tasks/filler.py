"""Text as token ids that can be laid side by side.

Prompts of an exact number of tokens are put together from pieces that were tokenised once: whole sentences
with the space before them, so that laying ids side by side equals tokenising the joined text (byte-level
and Metaspace tokenizers split there anyway). That makes training samples at memory speed and lengths exact.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import tokenizers

from lawcat_edge.runtime.errors import LawcatError

_SENTENCE = re.compile(r"(?:\b(?:Mrs?|Ms|Dr|St|Capt|Col|Prof)\.|[^.!?])+[.!?]+[\"'”’)]*(?=\s|$)")
_CACHE_LIMIT = 1 << 16


class Encoder:
    """A tokenizer that encodes a text as it reads after other text."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.start = np.asarray(tokenizer.encode("", add_special_tokens=True).ids, np.int32)
        self._anchors = {anchor: self._plain(anchor) for anchor in (".", ".\n")}
        self._cache: dict[tuple[str, str], np.ndarray] = {}

    def _plain(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def _cut(self, ids: list[int], anchor: str, text: str) -> np.ndarray:
        before = self._anchors[anchor]
        if ids[: len(before)] != before:  # the tokenizer merges across the seam: tokenise on its own
            ids, before = self._plain(text), []
        return np.asarray(ids[len(before) :], np.int32)

    def after_text(self, text: str) -> np.ndarray:
        """int32 ids of ``text`` as it follows a sentence on the same line (begin it with a space or a
        newline)."""
        return self._after(".", text)

    def after_line(self, text: str) -> np.ndarray:
        """int32 ids of ``text`` as it follows a newline."""
        return self._after(".\n", text)

    def _after(self, anchor: str, text: str) -> np.ndarray:
        key = (anchor, text)
        if key not in self._cache:
            if len(self._cache) > _CACHE_LIMIT:
                self._cache.clear()
            self._cache[key] = self._cut(self._plain(anchor + text), anchor, text)
        return self._cache[key]

    def many_after_text(self, texts: Sequence[str]) -> list[np.ndarray]:
        encoded = self.tokenizer.encode_batch_fast(["." + text for text in texts], add_special_tokens=False)
        return [self._cut(item.ids, ".", text) for item, text in zip(encoded, texts, strict=True)]

    def first(self, text: str) -> np.ndarray:
        """int32 ids of ``text`` at the start of a prompt, with what the tokenizer puts before every text."""
        return np.concatenate([self.start, np.asarray(self._plain(text), np.int32)])

    def decode(self, ids: Iterable[int]) -> str:
        return self.tokenizer.decode(list(map(int, ids)), skip_special_tokens=True)


def split_sentences(text: str) -> list[str]:
    """Sentences of a prose text, 20 to 400 characters each, white space made single."""
    flat = re.sub(r"\s+", " ", text)
    found = (match.group().strip() for match in _SENTENCE.finditer(flat))
    # Angle bars would make special tokens; a sentence must open as one.
    return [s for s in found if 20 <= len(s) <= 400 and "<|" not in s and (s[0].isupper() or s[0] in "\"'“‘")]


@dataclass(frozen=True)
class Filler:
    """A ring of sentences in token ids.

    ids int32 [N]: every sentence after text, that is with its space in front; or, for ``lines``, with a
    newline behind. starts int64 [M]: where each sentence begins. ends bool [N]: whether a text may stop
    before this position: between two words, so that whatever follows cannot merge.
    """

    encoder: Encoder
    sentences: tuple[str, ...]
    ids: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    lines: bool

    @classmethod
    def build(cls, encoder: Encoder, sentences: Sequence[str], lines: bool = False) -> Filler:
        if not sentences:
            raise LawcatError(
                "The text has no whole sentence to use as background; give more prose with --text."
            )
        if lines:
            pieces = [encoder.after_line(sentence + "\n") for sentence in sentences]
        else:
            pieces = encoder.many_after_text([" " + sentence for sentence in sentences])
        ids = np.concatenate(pieces)
        starts = np.cumsum([0] + [len(piece) for piece in pieces[:-1]])
        names = {int(i): encoder.tokenizer.id_to_token(int(i)) or " " for i in np.unique(ids)}
        opens = np.isin(ids, [i for i, name in names.items() if name[0] in "Ġ▁"])
        closes = np.isin(ids, [i for i, name in names.items() if name[-1].isalnum()])
        return cls(encoder, tuple(sentences), ids, starts, opens & np.roll(closes, 1), lines)

    def take(self, begin: int, count: int) -> np.ndarray:
        """``count`` ids from position ``begin`` on, round the ring."""
        begin %= len(self.ids)
        if begin + count <= len(self.ids):
            return self.ids[begin : begin + count]
        return np.take(self.ids, np.arange(begin, begin + count), mode="wrap")

    def boundaries(self, begin: int, count: int) -> np.ndarray:
        """Sentence starts within the ``count`` ids from ``begin``, counted from there; ``begin`` is one
        itself."""
        size = len(self.ids)
        begin %= size
        rounds = np.arange((begin + count) // size + 1) * size
        every = (self.starts + rounds[:, None]).ravel() - begin
        return every[(every >= 0) & (every < count)]

    def line_start(self, begin: int) -> tuple[np.ndarray, int]:
        """The sentence at ``begin`` as it opens a line, without its space: (ids, how many ring ids they
        replace)."""
        begin %= len(self.ids)
        k = int(np.searchsorted(self.starts, begin))
        assert self.starts[k : k + 1] == [begin], "a line opens with a whole sentence"
        end = int(self.starts[k + 1]) if k + 1 < len(self.starts) else len(self.ids)
        if self.lines:
            return self.ids[begin:end], end - begin
        return self.encoder.after_line(self.sentences[k]), end - begin

    def opening(self, begin: int, count: int) -> np.ndarray:
        """``count`` ids that open a line with the sentence at ``begin`` and run on."""
        first, replaced = self.line_start(begin)
        if count <= len(first):
            return first[:count]
        return np.concatenate([first, self.take(begin + replaced, count - len(first))])

    def may_stop(self, begin: int, count: int) -> bool:
        """Whether ``opening(begin, count)`` ends between two words."""
        first, replaced = self.line_start(begin)
        if count <= len(first):  # a first sentence cut short: spares the question of what its tokens are
            return False
        return bool(self.ends[(begin + replaced + count - len(first)) % len(self.ids)])
