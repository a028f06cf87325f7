"""What a client gets: OpenAI's JSON for answers, pieces of an answer, and errors."""

from __future__ import annotations

import json
import math
import re
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lawcat_edge.runtime.generate.sampling import Choice
from lawcat_edge.runtime.generate.text import Tokenizer, TokenTexts
from lawcat_edge.runtime.server.worker import Job, Piece

_FINISH = {"eos": "stop", "stop": "stop", "length": "length"}
_TYPES = {401: "authentication_error", 429: "rate_limit_error"}


def error_json(
    message: str, status: int, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """OpenAI's error object."""
    kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def model_json(name: str, created: int) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created, "owned_by": "lawcat-edge"}


def usage_json(job: Job) -> dict[str, Any]:
    """Token counts; cached_tokens of the prompt were in a kept state already.

    The details of the completion tell how many drafted tokens were taken, and how many were not.
    """
    return {
        "prompt_tokens": job.prompt_tokens,
        "completion_tokens": job.new_tokens,
        "total_tokens": job.prompt_tokens + job.new_tokens,
        "prompt_tokens_details": {"cached_tokens": job.reused_tokens},
        "completion_tokens_details": {
            "accepted_prediction_tokens": job.accepted_tokens,
            "rejected_prediction_tokens": job.drafted_tokens - job.accepted_tokens,
        },
    }


def sse(data: dict[str, Any] | str) -> bytes:
    """One server-sent event."""
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return f"data: {text}\n\n".encode()


def token_bytes(tokenizer: Tokenizer, token: int, text: str) -> list[int] | None:
    """The bytes a token stands for, also where they are only a part of a character; None: not known.

    text: what it stands for as text (``TokenTexts``).
    """
    written = tokenizer.token(token)
    if match := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", written):
        return [int(match[1], 16)]
    if "\ufffd" not in text or written == text:
        return list(text.encode())
    if written and all(letter in _BYTE_OF for letter in written):
        return [_BYTE_OF[letter] for letter in written]
    return None


def _byte_letters() -> dict[str, int]:
    """The alphabet of byte-level tokenizers: printable bytes are themselves, the rest start at U+0100."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(rest)}


_BYTE_OF = _byte_letters()


@dataclass
class Reply:
    """Writes the answer to one request, whole or in pieces, for a chat or a completion."""

    tokenizer: Tokenizer
    model: str
    fingerprint: str
    chat: bool
    logprobs: bool
    id: str = ""
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.id = ("chatcmpl-" if self.chat else "cmpl-") + secrets.token_hex(12)
        self._texts = TokenTexts(self.tokenizer)
        self._offsets: dict[int, int] = {}  # by choice: characters before its next token with logprobs

    def whole(self, pieces: Sequence[Piece], job: Job) -> dict[str, Any]:
        """The answer to a request that does not stream, from all of its pieces."""
        answers = []
        for index in range(len(job.prompts)):
            own = [piece for piece in pieces if piece.index == index]
            text = "".join(piece.text for piece in own)
            body = (
                {"message": {"role": "assistant", "content": text, "refusal": None}}
                if self.chat
                else {"text": text}
            )
            choices = [choice for piece in own for choice in piece.choices]
            answers.append(self._choice(body, Piece(text, tuple(choices), own[-1].reason, index)))
        data = self._frame("chat.completion" if self.chat else "text_completion", answers)
        return {**data, "usage": usage_json(job)}

    def first(self) -> dict[str, Any] | None:
        """What a stream begins with, before anything is computed."""
        return self._chunk({"role": "assistant", "content": ""}, Piece("")) if self.chat else None

    def piece(self, piece: Piece) -> dict[str, Any]:
        """Text and log-probabilities of a piece, without its end."""
        return self._chunk({"content": piece.text} if self.chat else piece.text, replace(piece, reason=None))

    def last(self, piece: Piece) -> dict[str, Any]:
        """The end that comes with a piece."""
        return self._chunk({} if self.chat else "", Piece("", (), piece.reason, piece.index))

    def usage(self, job: Job) -> dict[str, Any]:
        """The extra piece that `include_usage` asks for."""
        return {**self._frame(self._kind, []), "usage": usage_json(job)}

    @property
    def _kind(self) -> str:
        return "chat.completion.chunk" if self.chat else "text_completion"

    def _chunk(self, delta: Any, piece: Piece) -> dict[str, Any]:
        return self._frame(self._kind, [self._choice({"delta" if self.chat else "text": delta}, piece)])

    def _frame(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "choices": choices,
        }

    def _choice(self, body: dict[str, Any], piece: Piece) -> dict[str, Any]:
        logprobs = None
        if self.logprobs and piece.choices:
            logprobs = self._chat_logprobs(piece.choices) if self.chat else self._old_logprobs(piece)
        finish = None if piece.reason is None else _FINISH[piece.reason]
        return {"index": piece.index, **body, "logprobs": logprobs, "finish_reason": finish}

    def _chat_logprobs(self, choices: Sequence[Choice]) -> dict[str, Any]:
        def entry(token: int, logprob: float) -> dict[str, Any]:
            text = self._texts.of(token)
            return {"token": text, "logprob": logprob, "bytes": token_bytes(self.tokenizer, token, text)}

        content = [
            {**entry(c.token, c.logprob), "top_logprobs": [entry(*other) for other in c.top]} for c in choices
        ]
        return {"content": content, "refusal": None}

    def _old_logprobs(self, piece: Piece) -> dict[str, Any]:
        offset = self._offsets.get(piece.index, 0)
        texts, offsets = [], []
        for choice in piece.choices:
            text = self._texts.of(choice.token)
            special = self._texts.is_special(choice.token)
            if offset == 0 and text[:1] == " " != piece.text[:1] and not special:
                text = text[1:]  # at the very start of a text, which the decoder writes without it
            texts.append(text)
            offsets.append(offset)
            offset += 0 if special else len(text)
        self._offsets[piece.index] = offset
        first = [math.isnan(choice.logprob) for choice in piece.choices]  # has nothing before it
        return {
            "tokens": texts,
            "token_logprobs": [None if n else c.logprob for c, n in zip(piece.choices, first, strict=True)],
            "top_logprobs": [
                None if n else self._named(c.top) for c, n in zip(piece.choices, first, strict=True)
            ],
            "text_offset": offsets,
        }

    def _named(self, top: Sequence[tuple[int, float]]) -> dict[str, float]:
        """Alternatives by their texts; parts of characters by their bytes, as OpenAI names them."""
        found: dict[str, float] = {}
        for token, logprob in top:
            text = self._texts.of(token)
            data = token_bytes(self.tokenizer, token, text) if "\ufffd" in text else None
            name = text if data is None else "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
            found.setdefault(name, logprob)  # the likeliest of those that look alike
        return found
