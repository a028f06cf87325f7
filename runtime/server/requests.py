"""What a client asks for: the JSON of OpenAI's API, checked, as a prompt and a ``Request``.

A field that would change the answer and is not supported is refused; one that would not, or that nobody
knows, is ignored. Other servers' names for what this one does are taken (``repeat_penalty``, ``n_predict``).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated, Any, TypeVar

from msgspec import Meta, Struct

from lawcat_edge.runtime import files, schema
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


_Penalty = Annotated[float, Meta(ge=0.01, le=100.0)]
_Share = Annotated[float, Meta(ge=0.0, le=1.0)]
_LIMITS = ("max_completion_tokens", "max_tokens", "max_new_tokens", "n_predict")
_TOP = 20  # most tokens whose log-probabilities are told
_Prompts = Annotated[
    list[str | list[int]],
    Meta(
        max_length=MAX_PROMPTS,
        description=f"a text or a list of token ids, or a list of at most {MAX_PROMPTS:,} such",
    ),
]


class _StreamOptions(Struct):
    include_usage: bool | None = None


class _Body(Struct):
    """What is read of a request; None: it does not say. Other fields are ignored."""

    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    # 2 is the API's highest temperature; a higher one is harmless.
    temperature: Annotated[float, Meta(ge=0.0, le=100.0)] | None = None
    top_p: _Share | None = None
    min_p: _Share | None = None
    top_k: Annotated[int, Meta(ge=-1, le=1 << 24)] | None = None
    repetition_penalty: _Penalty | None = None
    repeat_penalty: _Penalty | None = None
    seed: Annotated[int, Meta(ge=-(1 << 63), le=(1 << 63) - 1)] | None = None
    do_sample: bool | None = None
    ignore_eos: bool | None = None
    stop: Annotated[str | list[str], Meta(description="a text or a list of texts")] | None = None
    max_completion_tokens: Any = None  # the server's limit is not known here
    max_tokens: Any = None
    max_new_tokens: Any = None
    n_predict: Any = None


B = TypeVar("B", bound=_Body)


class _Message(Struct):
    role: str


class _Chat(_Body, kw_only=True):
    messages: Annotated[
        list[Annotated[_Message, Meta(description='an object with "role" and "content"')]],
        Meta(min_length=1),
    ]
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=_TOP)] | None = None
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: Any = None  # an object; what is empty says nothing
    reasoning_effort: Any = None


class _Completion(_Body, kw_only=True):
    prompt: Any = None
    logprobs: Any = None  # false or a number, unlike a chat's
    echo: bool | None = None


class _TextPart(Struct, tag="text"):
    text: str


class _RefusalPart(Struct, tag="refusal"):
    refusal: str


_Part: Any = _TextPart | _RefusalPart


class _Function(Struct):
    name: str


class _Call(Struct):
    function: _Function


_CALLS = 'a list of objects with a "function" that has a "name"'
_Calls = Annotated[list[_Call], Meta(description=_CALLS)]


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
    asked = _read(body, _Chat)
    wanted, top = bool(asked.logprobs), asked.top_logprobs or 0
    if top and not wanted:
        raise BadRequest("top_logprobs needs logprobs to be true.", "top_logprobs")
    return Asked(
        _request(asked, min(CHAT_TOKENS, max_tokens), max_tokens, top if wanted else None, defaults),
        bool(asked.stream),
        _include_usage(asked),
        messages=_messages(body["messages"]),
        template=_template(asked),
    )


def parse_completion(body: dict[str, Any], max_tokens: int, defaults: SamplingOptions = PLAIN) -> Asked:
    """Check a request to /v1/completions; see ``parse_chat``."""
    _refuse_unsupported(body)
    asked = _read(body, _Completion)
    given = asked.prompt
    several = isinstance(given, list) and given and isinstance(given[0], (str, list))
    prompts = schema.convert(given if several else [given], _Prompts, _wrong, "prompt")
    if not all(prompts):
        raise BadRequest("The prompt is empty; give some text to go on from.", "prompt")
    logprobs, echo = None, bool(asked.echo)
    if asked.logprobs is not None and asked.logprobs is not False:
        logprobs = schema.convert(asked.logprobs, schema.whole(0, _TOP), _wrong, "logprobs")
    request = _request(
        asked, min(COMPLETION_TOKENS, max_tokens), max_tokens, logprobs, defaults, least=0 if echo else 1
    )
    # Programs that score a text drop the last entry, the token they had to ask for; it must be there.
    request = replace(request, record_end=echo and logprobs is not None)
    return Asked(request, bool(asked.stream), _include_usage(asked), prompts=prompts, echo=echo)


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


def _read(body: dict[str, Any], kind: type[B]) -> B:
    """The fields of a request that this server knows."""
    known = {name: body[name] for name in kind.__struct_fields__ if name in body}
    # JavaScript and Go write 4.0 for 4.
    whole = {n: int(x) for n, x in known.items() if type(x) is float and x.is_integer()}
    return schema.convert(known | whole, kind, _wrong)


def _wrong(where: str, problem: str) -> BadRequest:
    return BadRequest(f"{where} {problem}.", where)


def _request(
    asked: _Body,
    default_tokens: int,
    max_tokens: int,
    logprobs: int | None,
    defaults: SamplingOptions,
    least: int = 1,
) -> Request:
    said: dict[str, Any] = {
        "temperature": 0.0 if asked.do_sample is False else asked.temperature,
        "top_p": asked.top_p,
        "top_k": None if asked.top_k is None else max(asked.top_k, 0),  # -1 is vLLM's word for all
        "min_p": asked.min_p,
        "repetition_penalty": asked.repeat_penalty
        if asked.repetition_penalty is None
        else asked.repetition_penalty,
    }
    said = {name: value for name, value in said.items() if value is not None}
    options = replace(defaults, **said, seed=None if asked.seed is None else asked.seed & ((1 << 63) - 1))
    limit_name = next((name for name in _LIMITS if getattr(asked, name) is not None), _LIMITS[0])
    limit = getattr(asked, limit_name)
    if limit is None:
        limit = default_tokens
    elif limit_name == "n_predict" and limit == -1:  # llama.cpp's word for no limit
        limit = max_tokens
    new_tokens = schema.convert(limit, schema.whole(least, max_tokens), _wrong, limit_name)
    stops = [asked.stop] if isinstance(asked.stop, str) else asked.stop or []
    try:
        return Request.of(new_tokens, tuple(stops), logprobs, bool(asked.ignore_eos), options)
    except LawcatError as error:
        raise BadRequest(str(error), "stop") from error


def _template(asked: _Chat) -> dict[str, Any]:
    """What a chat's request says about how its messages are written."""
    variables: dict[str, Any] = schema.convert(
        asked.chat_template_kwargs or {}, dict[str, Any], _wrong, "chat_template_kwargs"
    )
    for name in _OWN_VARIABLES:
        if variables.get(name):
            raise BadRequest(
                f"chat_template_kwargs cannot hold {name}.", "chat_template_kwargs", "unsupported_parameter"
            )
    if asked.reasoning_effort is not None:
        variables = {"reasoning_effort": asked.reasoning_effort, **variables}
    go_on, prompt = bool(asked.continue_final_message), asked.add_generation_prompt
    if go_on and prompt:
        raise BadRequest(
            "continue_final_message and add_generation_prompt cannot both be true.", "continue_final_message"
        )
    return {
        "add_generation_prompt": not go_on if prompt is None else prompt,
        "continue_final": go_on,
        "variables": variables,
    }


def _messages(given: list[dict[str, Any]]) -> list[Message]:
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


def _message(message: dict[str, Any], param: str) -> Message:
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

    def refuse(where: str, problem: str) -> BadRequest:
        return BadRequest("Only text content is supported.", f"{param}.content", "unsupported_parameter")

    made = schema.convert(part, _Part, refuse)
    text: str = made.text if isinstance(made, _TextPart) else made.refusal
    return text


def _tool_calls(message: dict[str, Any], param: str) -> list[dict[str, Any]]:
    """The calls of an earlier answer, as templates read them: arguments as an object, not as its JSON."""
    calls = message.get("tool_calls") or []
    if not calls and message.get("function_call"):  # the API's name for one call, before there were several
        calls = [{"type": "function", "function": message["function_call"]}]
    schema.convert(calls, _Calls, _wrong, f"{param}.tool_calls")
    made = []
    for call in calls:
        function = call["function"]
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


def _include_usage(asked: _Body) -> bool:
    if asked.stream_options is None:
        return False
    if not asked.stream:
        raise BadRequest("stream_options needs stream to be true.", "stream_options")
    return bool(asked.stream_options.include_usage)
