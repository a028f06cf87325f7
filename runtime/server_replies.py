"""What a client gets: OpenAI's JSON for answers, pieces of an answer, and errors."""

from __future__ import annotations

import json
import re
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lawcat_edge.runtime.sampling import Choice
from lawcat_edge.runtime.server_worker import Job
from lawcat_edge.runtime.text import Tokenizer

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
    """Token counts; cached_tokens of the prompt were in a kept state already."""
    return {
        "prompt_tokens": job.prompt_tokens,
        "completion_tokens": job.new_tokens,
        "total_tokens": job.prompt_tokens + job.new_tokens,
        "prompt_tokens_details": {"cached_tokens": job.reused_tokens},
    }


def sse(data: dict[str, Any] | str) -> bytes:
    """One server-sent event."""
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return f"data: {text}\n\n".encode()


def token_bytes(tokenizer: Tokenizer, token: int) -> list[int] | None:
    """The bytes a token stands for, also where they are only a part of a character; None: not known."""
    text = tokenizer.decode([token], skip_special=False)
    written = tokenizer.token(token)
    if "\ufffd" not in text or written == text:
        return list(text.encode())
    if match := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", written):
        return [int(match[1], 16)]
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
    _offset: int = 0  # characters of the answer before the next token with logprobs

    def __post_init__(self) -> None:
        self.id = ("chatcmpl-" if self.chat else "cmpl-") + secrets.token_hex(12)

    def whole(self, text: str, choices: Sequence[Choice], reason: str, job: Job) -> dict[str, Any]:
        """The answer to a request that does not stream."""
        body = (
            {"message": {"role": "assistant", "content": text, "refusal": None}}
            if self.chat
            else {"text": text}
        )
        data = self._frame(
            "chat.completion" if self.chat else "text_completion", body, choices, _FINISH[reason]
        )
        return {**data, "usage": usage_json(job)}

    def first(self) -> dict[str, Any] | None:
        """What a stream begins with, before anything is computed."""
        return self._chunk({"role": "assistant", "content": ""}, (), None) if self.chat else None

    def piece(self, text: str, choices: Sequence[Choice]) -> dict[str, Any]:
        return self._chunk({"content": text} if self.chat else text, choices, None)

    def last(self, reason: str) -> dict[str, Any]:
        return self._chunk({} if self.chat else "", (), _FINISH[reason])

    def usage(self, job: Job) -> dict[str, Any]:
        """The extra piece that `include_usage` asks for."""
        data = self._chunk({} if self.chat else "", (), None)
        return {**data, "choices": [], "usage": usage_json(job)}

    def _chunk(self, delta: Any, choices: Sequence[Choice], finish: str | None) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return self._frame(kind, {"delta" if self.chat else "text": delta}, choices, finish)

    def _frame(
        self, kind: str, body: dict[str, Any], choices: Sequence[Choice], finish: str | None
    ) -> dict[str, Any]:
        logprobs = None
        if self.logprobs and choices:
            logprobs = self._chat_logprobs(choices) if self.chat else self._old_logprobs(choices)
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "choices": [{"index": 0, **body, "logprobs": logprobs, "finish_reason": finish}],
        }

    def _text(self, token: int) -> str:
        return self.tokenizer.decode([token], skip_special=False)

    def _chat_logprobs(self, choices: Sequence[Choice]) -> dict[str, Any]:
        def entry(token: int, logprob: float) -> dict[str, Any]:
            return {
                "token": self._text(token),
                "logprob": logprob,
                "bytes": token_bytes(self.tokenizer, token),
            }

        content = [
            {**entry(c.token, c.logprob), "top_logprobs": [entry(*other) for other in c.top]} for c in choices
        ]
        return {"content": content, "refusal": None}

    def _old_logprobs(self, choices: Sequence[Choice]) -> dict[str, Any]:
        texts = [self._text(c.token) for c in choices]
        offsets = []
        for text in texts:
            offsets.append(self._offset)
            self._offset += len(text)
        return {
            "tokens": texts,
            "token_logprobs": [c.logprob for c in choices],
            "top_logprobs": [{self._text(token): logprob for token, logprob in c.top} for c in choices],
            "text_offset": offsets,
        }
