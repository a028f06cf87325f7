"""What a client asks for: the JSON of OpenAI's API, checked, as a prompt and a ``Request``.

A field that would change the answer and is not supported is refused; one that would not, or that nobody
knows, is ignored. Other servers' names for what this one does are taken (``repeat_penalty``, ``n_predict``).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from lawcat_edge.runtime import files
from lawcat_edge.runtime.errors import LawcatError
from lawcat_edge.runtime.generate.request import Request
from lawcat_edge.runtime.generate.sampling import SamplingOptions
from lawcat_edge.runtime.template.chat import Message

CHAT_TOKENS = 2048  # answer of a chat that names no limit
COMPLETION_TOKENS = 16  # OpenAI's own default
MAX_PROMPTS = 1024  # in one request
PLAIN = SamplingOptions(temperature=1.0)  # the API's defaults

# Fields that change the answer, and the values that ask for nothing we lack: OpenAI's, llama.cpp's, vLLM's.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "suffix": ("",),
    "tools": ([],),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "tool_choice": ("none", "auto"),
    "logit_bias": ({}, []),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "documents": ([],),
    "chat_template": (),
    # shapes of the answer
    **dict.fromkeys(("grammar", "json_schema", "guided_json", "guided_regex", "guided_choice"), ({}, "", [])),
    **dict.fromkeys(("guided_grammar", "structured_outputs", "regex", "ebnf"), ({}, "", [])),
    # lengths and ends
    "min_tokens": (0,),
    "stop_token_ids": ([],),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "truncate_prompt_tokens": (),
    "add_special_tokens": (),
    # which tokens may come
    **dict.fromkeys(("bad_words", "allowed_token_ids", "logits_processors", "samplers", "lora"), ([],)),
    # other ways to choose them
    **dict.fromkeys(("use_beam_search", "early_stopping"), (False,)),
    **dict.fromkeys(("mirostat", "dynatemp_range", "dry_multiplier", "xtc_probability", "top_a"), (0,)),
    **dict.fromkeys(("no_repeat_ngram_size", "n_keep", "epsilon_cutoff", "smoothing_factor"), (0,)),
    **dict.fromkeys(("length_penalty", "typical_p", "typical", "tfs_z", "num_beams"), (1,)),
    "repeat_last_n": (-1,),
    "prompt_logprobs": (),
    "image_data": ([],),
}
_ROLES = {"developer": "system", "function": "tool"}
_MESSAGE_TEXTS = (
    "name",
    "reasoning_content",
    "reasoning",
    "tool_call_id",
)  # what templates may ask of a message beside its content
_OWN_VARIABLES = ("messages", "add_generation_prompt", "tools", "documents")


class BadRequest(LawcatError):  # noqa: N818 (it reads as what happened)
    """The client's mistake. status: HTTP's; param: the field; code: a word for programs."""

    def __init__(
        self, message: str, param: str | None = None, code: str | None = None, status: int = 400
    ) -> None:
        super().__init__(message)
        self.param, self.code, self.status = param, code, status


@dataclass(frozen=True)
class Asked:
    """A checked request: messages of a chat, or prompts (each a text or token ids) to complete.

    template: how to write the messages (``ChatTemplate.render``). echo: give the prompts out too.
    """

    request: Request
    stream: bool
    include_usage: bool
    messages: list[Message] = field(default_factory=list)
    template: dict[str, Any] = field(default_factory=dict)
    prompts: list[str | list[int]] = field(default_factory=list)
    echo: bool = False

    @property
    def chat(self) -> bool:
        return bool(self.messages)


def read_body(data: bytes) -> dict[str, Any]:
    """The JSON object of a request's body."""
    try:
        body = files.parse_json(data, "The request")
    except LawcatError as error:
        raise BadRequest(str(error), code="invalid_json") from error
    if not isinstance(body, dict):
        raise BadRequest("The request must be a JSON object.", code="invalid_json")
    return body


def parse_chat(body: dict[str, Any], max_tokens: int, defaults: SamplingOptions = PLAIN) -> Asked:
    """Check a request to /v1/chat/completions.

    max_tokens: the most the server gives. defaults: for what the request does not say.
    """
    _refuse_unsupported(body)
    if body.get("echo"):
        raise BadRequest("echo is not supported in a chat; leave it out.", "echo", "unsupported_parameter")
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise BadRequest("messages must be a list of at least one message.", "messages")
    wanted = _flag(body, "logprobs")
    top = _number(body, "top_logprobs", 0, 0, 20, whole=True)
    if top and not wanted:
        raise BadRequest("top_logprobs needs logprobs to be true.", "top_logprobs")
    return Asked(
        _request(body, min(CHAT_TOKENS, max_tokens), max_tokens, top if wanted else None, defaults),
        _flag(body, "stream"),
        _include_usage(body),
        messages=_messages(messages),
        template=_template(body),
    )


def parse_completion(body: dict[str, Any], max_tokens: int, defaults: SamplingOptions = PLAIN) -> Asked:
    """Check a request to /v1/completions; see ``parse_chat``."""
    _refuse_unsupported(body)
    given = body.get("prompt")
    several = isinstance(given, list) and given and isinstance(given[0], (str, list))
    prompts: list[Any] = given if several else [given]  # type: ignore[assignment]
    if len(prompts) > MAX_PROMPTS:
        raise BadRequest(f"prompt must be at most {MAX_PROMPTS:,} texts.", "prompt")
    for prompt in prompts:
        ids = isinstance(prompt, list) and all(type(token) is int for token in prompt)
        if not ids and not isinstance(prompt, str):
            raise BadRequest("prompt must be a text or a list of token ids, or a list of such.", "prompt")
        if not prompt:
            raise BadRequest("The prompt is empty; give some text to go on from.", "prompt")
    logprobs = None
    if body.get("logprobs") is not False:
        logprobs = _number(body, "logprobs", None, 0, 20, whole=True)
    echo = _flag(body, "echo")
    request = _request(
        body, min(COMPLETION_TOKENS, max_tokens), max_tokens, logprobs, defaults, least=0 if echo else 1
    )
    # Programs that score a text drop the last entry, the token they had to ask for; it must be there.
    request = replace(request, record_end=echo and logprobs is not None)
    return Asked(request, _flag(body, "stream"), _include_usage(body), prompts=prompts, echo=echo)


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
    body: dict[str, Any],
    default_tokens: int,
    max_tokens: int,
    logprobs: int | None,
    defaults: SamplingOptions,
    least: int = 1,
) -> Request:
    seed = _number(body, "seed", None, -(1 << 63), (1 << 63) - 1, whole=True)
    penalty = _named(body, "repetition_penalty", "repeat_penalty")
    top_k = _number(body, "top_k", defaults.top_k, -1, 1 << 24, whole=True)
    # 2 is the API's highest temperature; a higher one is harmless.
    temperature = _number(body, "temperature", defaults.temperature, 0, 100)
    if body.get("do_sample") is not None and not _flag(body, "do_sample"):
        temperature = 0.0
    options = SamplingOptions(
        temperature=temperature,
        top_p=_number(body, "top_p", defaults.top_p, 0, 1),
        top_k=max(top_k, 0),  # -1 is vLLM's word for all
        min_p=_number(body, "min_p", defaults.min_p, 0, 1),
        repetition_penalty=_number(body, penalty, defaults.repetition_penalty, 0.01, 100),
        seed=None if seed is None else seed & ((1 << 63) - 1),
    )
    limit_name = _named(body, "max_completion_tokens", "max_tokens", "max_new_tokens", "n_predict")
    if limit_name == "n_predict" and body["n_predict"] == -1:  # llama.cpp's word for no limit
        body = {**body, "n_predict": max_tokens}
    new_tokens = _number(body, limit_name, default_tokens, least, max_tokens, whole=True)
    stop = body.get("stop")
    stops = [] if stop is None else [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list) or not all(isinstance(item, str) for item in stops):
        raise BadRequest("stop must be a text or a list of texts.", "stop")
    try:
        return Request.of(new_tokens, tuple(stops), logprobs, _flag(body, "ignore_eos"), options)
    except LawcatError as error:
        raise BadRequest(str(error), "stop") from error


def _template(body: dict[str, Any]) -> dict[str, Any]:
    """What a chat's request says about how its messages are written."""
    variables = body.get("chat_template_kwargs") or {}
    if not isinstance(variables, dict):
        raise BadRequest("chat_template_kwargs must be an object.", "chat_template_kwargs")
    for name in _OWN_VARIABLES:
        if variables.get(name):
            raise BadRequest(
                f"chat_template_kwargs cannot hold {name}.", "chat_template_kwargs", "unsupported_parameter"
            )
    effort = body.get("reasoning_effort")
    if effort is not None:
        variables = {"reasoning_effort": effort, **variables}
    go_on, prompt = _flag(body, "continue_final_message"), body.get("add_generation_prompt")
    if prompt is not None:
        prompt = _flag(body, "add_generation_prompt")
    if go_on and prompt:
        raise BadRequest(
            "continue_final_message and add_generation_prompt cannot both be true.", "continue_final_message"
        )
    return {
        "add_generation_prompt": not go_on if prompt is None else prompt,
        "continue_final": go_on,
        "variables": variables,
    }


def _messages(given: list[Any]) -> list[Message]:
    """The conversation; it may hold calls of tools, which a client had elsewhere."""
    messages: list[Message] = []
    called = False  # whether the last answer called tools, whose results come next
    for i, message in enumerate(given):
        made = _message(message, f"messages[{i}]")
        if made["role"] == "tool" and not called:
            raise BadRequest(
                "A message with the role 'tool' must follow one with 'tool_calls'.", f"messages[{i}]"
            )
        called = bool(made.get("tool_calls")) or (called and made["role"] == "tool")
        messages.append(made)
    return messages


def _message(message: Any, param: str) -> Message:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise BadRequest('Every message must be an object with "role" and "content".', param)
    role = _ROLES.get(message["role"], message["role"])
    calls = _tool_calls(message, param)
    if calls and role != "assistant":
        raise BadRequest("Only a message of the assistant can hold tool_calls.", f"{param}.tool_calls")
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(_part(part, param) for part in content)
    elif content is None and role == "assistant" and isinstance(message.get("refusal"), str):
        content = message["refusal"]
    if not isinstance(content, str) and not (content is None and calls):
        raise BadRequest('The "content" of every message must be text.', f"{param}.content")
    made: Message = {key: message[key] for key in _MESSAGE_TEXTS if isinstance(message.get(key), str)}
    made |= {"role": role, "content": content}
    return made | ({"tool_calls": calls} if calls else {})


def _part(part: Any, param: str) -> str:
    """The text of one part of a message's content."""
    kind = part.get("type") if isinstance(part, dict) else None
    text = part.get(kind) if kind in ("text", "refusal") else None
    if not isinstance(text, str):
        raise BadRequest("Only text content is supported.", f"{param}.content", "unsupported_parameter")
    return text


def _tool_calls(message: dict[str, Any], param: str) -> list[dict[str, Any]]:
    """The calls of an earlier answer, as templates read them: arguments as an object, not as its JSON."""
    calls = message.get("tool_calls") or []
    if not calls and message.get("function_call"):  # the API's name for one call, before there were several
        calls = [{"type": "function", "function": message["function_call"]}]
    if not isinstance(calls, list):
        raise BadRequest("tool_calls must be a list.", f"{param}.tool_calls")
    made = []
    for call in calls:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadRequest(
                'Every tool call must be an object with a "function" that has a "name".',
                f"{param}.tool_calls",
            )
        arguments = function.get("arguments") or "{}"
        if isinstance(arguments, str):
            try:
                arguments = files.parse_json(arguments.encode("utf-8", "surrogatepass"), "arguments")
            except LawcatError as error:
                raise BadRequest(
                    "The arguments of a tool call must be JSON.", f"{param}.tool_calls"
                ) from error
        made.append({**call, "function": {**function, "arguments": arguments}})
    return made


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
    if whole and type(value) is float and value.is_integer():
        value = int(value)  # JavaScript and Go write 4.0 for 4
    kinds = (int,) if whole else (int, float)
    if type(value) not in kinds or not low <= value <= high:
        what = "whole number" if whole else "number"
        raise BadRequest(f"{name} must be a {what} from {low:,} to {high:,}.", name)
    return value


def _named(body: dict[str, Any], *names: str) -> str:
    """The first of `names` that the request sets, else the first."""
    return next((name for name in names if body.get(name) is not None), names[0])
