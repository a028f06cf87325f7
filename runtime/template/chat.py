"""Chat templates: a jinja2 template from a file, run where it can do nothing and cannot run for long.

What it writes is what transformers' ``apply_chat_template`` writes from the same file and messages.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from lawcat_edge.runtime.errors import BundleFault, LawcatError
from lawcat_edge.runtime.template.meter import MAX_TEXT, TEXT_SHARE, Meter
from lawcat_edge.runtime.template.sandbox import RefusedError, make_environment, parse

MAX_SOURCE = 256 << 10
Message = dict[str, Any]

_REASONING = (
    "reasoning_content",
    "thinking",
    "reasoning",
)  # names that models and programs use for one thing
_MARK = "CONTINUE_FINAL_MESSAGE_TAG "  # its last space shows whether the template trims messages


class ChatTemplate:
    """A compiled chat template. ``render`` gives the text that the model is to continue.

    tokens: the tokenizer's special tokens by name ("bos_token", "eos_token", ...); one that it lacks is
    undefined in the template. Raises BundleFault for a source that cannot be compiled.
    """

    def __init__(self, source: str, tokens: Mapping[str, str] | None = None) -> None:
        if len(source) > MAX_SOURCE:
            raise BundleFault(f"The chat template has more than {MAX_SOURCE:,} characters; export it again.")
        try:
            self._environment = make_environment()
            self._template = self._environment.from_string(parse(self._environment, source))
        except LawcatError:
            raise
        except Exception as error:
            raise BundleFault(
                f"The chat template is not valid: {_short(error)}; export the bundle again."
            ) from error
        self._tokens = dict(tokens or {})
        # One that does not name them would leave them out without a word.
        self.knows_tool_calls = "tool_calls" in source

    def render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        continue_final: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The text of `messages`.

        add_generation_prompt: ending where the assistant's answer begins. continue_final: ending where the
        last message does, for the model to go on with it. variables: what else the template may ask for
        (``enable_thinking``, ``tools``, ``documents``, ...), of JSON's types.
        Raises LawcatError for messages that are none or that the template refuses, BundleFault where the
        template fails.
        """
        check_messages(messages)
        plain = [_named_as_templates_do(message) for message in messages]
        if continue_final:
            add_generation_prompt = False
            plain[-1]["content"] = plain[-1].get("content", "") + _MARK
        given = {"tools": None, "documents": None, **self._tokens, **(variables or {})}
        try:
            # Copies: a template sees plain lists and dicts, and the caller's cannot change under it.
            copied = json.dumps({**given, "messages": plain, "add_generation_prompt": add_generation_prompt})
        except (TypeError, ValueError) as error:
            raise LawcatError(f"The template's variables must be JSON values ({_short(error)}).") from error
        parts = []
        try:
            meter = self._environment.meter = Meter(MAX_TEXT + TEXT_SHARE * len(copied))
            for part in self._template.generate(json.loads(copied)):
                meter.step()
                parts.append(part)
        except RefusedError as error:
            raise LawcatError(f"The chat template refuses these messages: {_short(error)}.") from error
        except Exception as error:
            raise BundleFault(
                f"The chat template failed: {_short(error)}; export the bundle again."
            ) from error
        text = "".join(parts)
        return _up_to_mark(text) if continue_final else text


def check_messages(messages: Sequence[Message]) -> None:
    """Raise LawcatError unless messages are [{"role": text, "content": text}, ...], at least one.

    A message with "tool_calls" may be without content.
    """
    if isinstance(messages, (str, bytes)) or not messages:
        raise LawcatError('Messages must be a list such as [{"role": "user", "content": "Hello"}].')
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise LawcatError('Every message must be a dict with "role" and "content".')
        content = message.get("content")
        if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
            raise LawcatError('The "content" of every message must be text.')


def _named_as_templates_do(message: Message) -> Message:
    """Without keys of no value, and reasoning under the names that templates read, as in transformers."""
    plain = {key: value for key, value in message.items() if value is not None}
    reasoning = next((plain[name] for name in _REASONING if name in plain), None)
    return plain if reasoning is None else {"thinking": reasoning, **plain, "reasoning_content": reasoning}


def _up_to_mark(text: str) -> str:
    at = text.rfind(_MARK.strip())
    if at < 0:
        raise LawcatError("The chat template leaves the last message out, so it cannot be continued.")
    whole = text[at : at + len(_MARK)] == _MARK
    return text[:at] if whole else text[:at].rstrip()


def _short(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200].rstrip(".")
