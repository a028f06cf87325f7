"""Text to tokens and back, piece by piece, without ever splitting a character or a stop string."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from lawcat_edge.runtime.errors import BundleFault, LawcatError

_BROKEN = "\ufffd"  # what decoders put for bytes that are not (yet) a character
_HOLD = 8  # tokens held back for the rest of a character before it is taken to be garbage


MAX_TOKENIZER = 64 << 20


def load_tokenizer(data: bytes, what: str = "tokenizer.json") -> Any:
    """A `tokenizers.Tokenizer` that neither cuts nor pads, from the bytes of a tokenizer.json.

    Raises LawcatError naming `what` for anything else.
    """
    try:
        from tokenizers import Tokenizer as Engine
    except ImportError as error:
        raise LawcatError("tokenizers is missing; install it with `pip install tokenizers`.") from error
    try:
        engine: Any = Engine.from_buffer(data)
        engine.no_truncation()
        engine.no_padding()
    except BaseException as error:  # the package's own panics do not derive from Exception
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        raise LawcatError(
            f"{what} is not a valid tokenizer ({str(error)[:120]}); copy or export it again."
        ) from error
    return engine


SPECIAL_TOKENS = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


def special_tokens(settings: Any) -> dict[str, str]:
    """The special tokens that a tokenizer_config.json names, as templates get them: {"bos_token": "<s>"}."""
    if not isinstance(settings, dict):
        return {}
    more = settings.get("extra_special_tokens")
    named = {f"{name}_token": settings.get(f"{name}_token") for name in SPECIAL_TOKENS}
    named |= more if isinstance(more, dict) else {}
    found = {}
    for name, token in named.items():
        text = token.get("content") if isinstance(token, dict) else token
        if isinstance(text, str):
            found[name] = text
    return found


class Tokenizer:
    """A tokenizer.json through the `tokenizers` package."""

    def __init__(self, data: bytes, vocab_size: int) -> None:
        self._engine: Any = load_tokenizer(data)
        self.vocab_size = vocab_size

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids of `text`; special: let the tokenizer add its own begin and end tokens."""
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise LawcatError(
                "The text holds broken characters (lone surrogates); save it as UTF-8."
            ) from error
        ids = list(self._engine.encode(text, add_special_tokens=special).ids)
        if ids and max(ids) >= self.vocab_size:
            raise BundleFault("tokenizer.json has more tokens than the model; export the bundle again.")
        return ids

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        return str(self._engine.decode(list(ids), skip_special_tokens=skip_special))

    def id_of(self, token: str) -> int | None:
        found = self._engine.token_to_id(token)
        return None if found is None else int(found)

    def token(self, token_id: int) -> str:
        """The token's own written form ('' for an id without one)."""
        return self._engine.id_to_token(token_id) or ""


class TokenTexts:
    """What single tokens stand for where text goes before them: `▁the` is " the", and `the` is "the".

    Decoded alone, a token would lose the space that some decoders strip at the very start of a text.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        # Some token with a text of its own, to stand before.
        known = (
            ([token], tokenizer.decode([token])) if (token := _anchor(tokenizer)) is not None else ([], "")
        )
        self._before, self._text = known

    def of(self, token: int) -> str:
        text = self._tokenizer.decode([*self._before, token], skip_special=False)
        if text.startswith(self._text):
            return text[len(self._text) :]
        return self._tokenizer.decode([token], skip_special=False)

    def is_special(self, token: int) -> bool:
        """Whether it is no part of a text."""
        return not self._tokenizer.decode([*self._before, token])[len(self._text) :]


def _anchor(tokenizer: Tokenizer) -> int | None:
    for text in ("a", "e", ".", "1"):
        ids = tokenizer.encode(text, special=False)
        if ids and (written := tokenizer.decode(ids[-1:])) and _BROKEN not in written:
            return ids[-1]
    return None


class Detokenizer:
    """Turns a stream of tokens into a stream of text; the parts joined equal the text of all tokens.

    Text is the difference of decoding a short window of tokens with and without the new one, because a
    token's text depends on its neighbours. While the window ends in an incomplete character nothing is given.
    context: the tokens before the stream (the prompt's last ones); their text is not given out.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True, context: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._ids: list[int] = list(context[-_HOLD:])
        self._done = len(self._ids)  # tokens at the front of the window whose text was given out

    def push(self, token: int) -> str:
        """The text that became certain with `token`; often empty."""
        self._ids.append(token)
        text = self._decode(self._ids)
        if not text.endswith(_BROKEN):
            return self._give(len(self._ids), text)
        if len(self._ids) - self._done > _HOLD:
            # Invalid bytes, not an unfinished character (at most three): give out what lies before a cut
            # that no character crosses.
            for cut in range(len(self._ids) - 3, self._done, -1):
                head = self._decode(self._ids[:cut])
                if head and text == head + self._decode(self._ids[cut:]):
                    return self._give(cut, head)
        return ""

    def flush(self) -> str:
        """The rest, at the end of the text; an unfinished character comes out as U+FFFD."""
        return self._give(len(self._ids), self._decode(self._ids))

    def _give(self, upto: int, text: str) -> str:
        before = self._decode(self._ids[: self._done])
        fresh = text[len(before) :] if text.startswith(before) else text
        # Keep the last given tokens as the context that the next ones are decoded in; tokens without text
        # (special ones) give no context, since some decoders strip a space at the very start.
        if fresh or len(self._ids) > 64:
            self._ids = self._ids[self._done :]
            upto -= self._done
        self._done = upto
        return fresh

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, self._skip_special) if ids else ""


class StopStrings:
    """Ends a stream at the first of `stops`, across any number of pieces; it is not given out itself."""

    def __init__(self, stops: Iterable[str] = ()) -> None:
        self.stops = tuple(stops)
        if "" in self.stops:
            raise LawcatError("A stop string is empty, and would end every answer at once; leave it out.")
        if any(len(stop) > 1000 for stop in self.stops) or len(self.stops) > 64:
            raise LawcatError("Stop strings have at most 1000 characters, and at most 64 may be given.")
        self.found: str | None = None
        self._held = ""

    def push(self, text: str) -> str:
        """What can be given out now; sets ``found`` when a stop string is complete."""
        if self.found is not None or not self.stops:
            return "" if self.found is not None else text
        text = self._held + text
        # The one that is complete first wins: that does not depend on how the text was cut into pieces.
        hits = [(at + len(stop), at, stop) for stop in self.stops if (at := text.find(stop)) >= 0]
        if hits:
            _, at, self.found = min(hits)
            self._held = ""
            return text[:at]
        keep = 0
        for stop in self.stops:
            for size in range(min(len(stop) - 1, len(text)), keep, -1):
                if text.endswith(stop[:size]):
                    keep = size
                    break
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """What was held back in case it began a stop string."""
        held, self._held = self._held, ""
        return held
