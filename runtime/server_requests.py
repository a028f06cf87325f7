"""What a client asks for: the JSON of OpenAI's API, checked, as a prompt and a ``Request``.

A field that would change the answer and is not supported is refused; one that would not, or that nobody
knows, is ignored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lawcat_edge.runtime import files
from lawcat_edge.runtime.errors import LawcatError
from lawcat_edge.runtime.model import Request
from lawcat_edge.runtime.sampling import SamplingOptions
from lawcat_edge.runtime.template import Message

CHAT_TOKENS = 2048  # answer of a chat that names no limit
COMPLETION_TOKENS = 16  # OpenAI's own default

# Fields that change the answer, and the values that ask for nothing we lack.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "logit_bias": ({},),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
}
_ROLES = {"developer": "system"}


class BadRequest(LawcatError):  # noqa: N818 (it reads as what happened)
    """The client's mistake. status: HTTP's; param: the field; code: a word for programs."""

    def __init__(
        self, message: str, param: str | None = None, code: str | None = None, status: int = 400
    ) -> None:
        super().__init__(message)
        self.param, self.code, self.status = param, code, status


@dataclass(frozen=True)
class Asked:
    """A checked request. prompt: messages of a chat, or text or token ids to complete."""

    prompt: list[Message] | str | list[int]
    request: Request
    stream: bool
    include_usage: bool

    @property
    def chat(self) -> bool:
        return isinstance(self.prompt, list) and bool(self.prompt) and isinstance(self.prompt[0], dict)


def read_body(data: bytes) -> dict[str, Any]:
    """The JSON object of a request's body."""
    try:
        body = files.parse_json(data, "The request")
    except LawcatError as error:
        raise BadRequest(str(error), code="invalid_json") from error
    if not isinstance(body, dict):
        raise BadRequest("The request must be a JSON object.", code="invalid_json")
    return body


def parse_chat(body: dict[str, Any], max_tokens: int) -> Asked:
    """Check a request to /v1/chat/completions; max_tokens: the most the server gives."""
    _refuse_unsupported(body)
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise BadRequest("messages must be a list of at least one message.", "messages")
    wanted = _flag(body, "logprobs")
    top = _number(body, "top_logprobs", None, 0, 20, whole=True)
    if top is not None and not wanted:
        raise BadRequest("top_logprobs needs logprobs to be true.", "top_logprobs")
    name = "max_completion_tokens" if body.get("max_completion_tokens") is not None else "max_tokens"
    return Asked(
        [_message(message, i) for i, message in enumerate(messages)],
        _request(body, name, min(CHAT_TOKENS, max_tokens), max_tokens, (top or 0) if wanted else None),
        _flag(body, "stream"),
        _include_usage(body),
    )


def parse_completion(body: dict[str, Any], max_tokens: int) -> Asked:
    """Check a request to /v1/completions."""
    _refuse_unsupported(body)
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], (str, list)):
        prompt = prompt[0]
    if isinstance(prompt, list):
        if not all(type(token) is int for token in prompt):
            raise BadRequest("prompt must be one text or one list of token ids.", "prompt")
    elif not isinstance(prompt, str):
        raise BadRequest("prompt must be a text or a list of token ids.", "prompt")
    if not prompt:
        raise BadRequest("The prompt is empty; give some text to go on from.", "prompt")
    logprobs = _number(body, "logprobs", None, 0, 20, whole=True)
    request = _request(body, "max_tokens", min(COMPLETION_TOKENS, max_tokens), max_tokens, logprobs)
    return Asked(prompt, request, _flag(body, "stream"), _include_usage(body))


def check_model(body: dict[str, Any], names: tuple[str, ...]) -> None:
    """Refuse a model other than the one that is served; none at all means that one."""
    model = body.get("model")
    if model is not None and model not in names:
        raise BadRequest(
            f"There is no model {str(model)[:80]!r} here, only {', '.join(names)}; "
            "start the server with --name to serve it under another name.",
            "model",
            "model_not_found",
            404,
        )


def _request(
    body: dict[str, Any], limit_name: str, default_tokens: int, max_tokens: int, logprobs: int | None
) -> Request:
    seed = _number(body, "seed", None, -(1 << 63), (1 << 63) - 1, whole=True)
    options = SamplingOptions(
        # 1 is the API's default, and 2 its highest; a higher one is harmless.
        temperature=_number(body, "temperature", 1.0, 0, 100),
        top_p=_number(body, "top_p", 1.0, 0, 1),
        top_k=_number(body, "top_k", 0, 0, 1 << 24, whole=True),
        min_p=_number(body, "min_p", 0.0, 0, 1),
        repetition_penalty=_number(body, "repetition_penalty", 1.0, 0.01, 100),
        seed=None if seed is None else seed & ((1 << 63) - 1),
    )
    new_tokens = _number(body, limit_name, default_tokens, 1, max_tokens, whole=True)
    stop = body.get("stop")
    stops = [] if stop is None else [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list) or not all(isinstance(item, str) for item in stops):
        raise BadRequest("stop must be a text or a list of texts.", "stop")
    try:
        return Request.of(new_tokens, tuple(stops), logprobs, _flag(body, "ignore_eos"), options)
    except LawcatError as error:
        raise BadRequest(str(error), "stop") from error


def _message(message: Any, index: int) -> Message:
    param = f"messages[{index}]"
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise BadRequest('Every message must be an object with "role" and "content".', param)
    if message.get("tool_calls") or message.get("function_call") or message["role"] in ("tool", "function"):
        raise BadRequest("Tools are not supported.", param, "unsupported_parameter")
    content = message.get("content")
    if isinstance(content, list):
        texts = []
        for part in content:
            if (
                not isinstance(part, dict)
                or part.get("type") != "text"
                or not isinstance(part.get("text"), str)
            ):
                raise BadRequest(
                    "Only text content is supported.", f"{param}.content", "unsupported_parameter"
                )
            texts.append(part["text"])
        content = "".join(texts)
    if not isinstance(content, str):
        raise BadRequest('The "content" of every message must be text.', f"{param}.content")
    return {"role": _ROLES.get(message["role"], message["role"]), "content": content}


def _refuse_unsupported(body: dict[str, Any]) -> None:
    for name, harmless in _REFUSED.items():
        value = body.get(name)
        if value is not None and value not in harmless:
            raise BadRequest(
                f"{name} is not supported by this server; leave it out.", name, "unsupported_parameter"
            )


def _include_usage(body: dict[str, Any]) -> bool:
    options = body.get("stream_options")
    if options is None:
        return False
    if not isinstance(options, dict) or not _flag(body, "stream"):
        raise BadRequest("stream_options must be an object, and needs stream to be true.", "stream_options")
    return _flag(options, "include_usage")


def _flag(body: dict[str, Any], name: str) -> bool:
    value = body.get(name)
    if value is not None and type(value) is not bool:
        raise BadRequest(f"{name} must be true or false.", name)
    return bool(value)


def _number(body: dict[str, Any], name: str, default: Any, low: Any, high: Any, whole: bool = False) -> Any:
    value = body.get(name)
    if value is None:
        return default
    kinds = (int,) if whole else (int, float)
    if type(value) not in kinds or not low <= value <= high:
        what = "whole number" if whole else "number"
        raise BadRequest(f"{name} must be a {what} from {low:,} to {high:,}.", name)
    return value
