"""Chat templates against what transformers renders from the same source, messages and variables."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from chat_templates import CONSTRUCTS, CONVERSATIONS, TEMPLATES, USER
from tiny_bundle import tiny_tokenizer

from lawcat_edge.runtime.errors import BundleFault, LawcatError
from lawcat_edge.runtime.template.chat import ChatTemplate

transformers = pytest.importorskip("transformers", reason="the reference is in the extra `build`")
TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}


@pytest.fixture(scope="module")
def reference() -> Any:
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer(), **TOKENS)


def theirs(reference: Any, source: str, messages: Any, **options: Any) -> str | None:
    """What transformers renders; None where it raises."""
    try:
        return reference.apply_chat_template(
            copy.deepcopy(messages), chat_template=source, tokenize=False, **options
        )
    except Exception:
        return None


def ours(
    source: str, messages: Any, add: bool, variables: Any = None, continue_final: bool = False
) -> str | None:
    try:
        return ChatTemplate(source, TOKENS).render(messages, add, continue_final, variables)
    except LawcatError:
        return None


def test_there_are_enough_and_transformers_renders_each(reference: Any) -> None:
    assert len(TEMPLATES) >= 25
    for name, source in TEMPLATES.items():
        rendered = [
            theirs(reference, source, messages, add_generation_prompt=True, **variables)
            for messages, variables in CONVERSATIONS.values()
        ]
        assert sum(text is not None for text in rendered) >= 4, name


@pytest.mark.parametrize("add", [True, False])
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_writes_what_transformers_writes(reference: Any, name: str, add: bool) -> None:
    for what, (messages, variables) in CONVERSATIONS.items():
        expected = theirs(reference, TEMPLATES[name], messages, add_generation_prompt=add, **variables)
        assert ours(TEMPLATES[name], messages, add, variables) == expected, what


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_final_message_is_continued_as_in_transformers(reference: Any, name: str) -> None:
    for content in ("It is", "It is ", " It\n\n"):
        messages = [USER, {"role": "assistant", "content": content}]
        expected = theirs(reference, TEMPLATES[name], messages, continue_final_message=True)
        assert ours(TEMPLATES[name], messages, False, continue_final=True) == expected, content


WRONG = {"undefined plus", "percent wrong", "generation missing end"}  # transformers fails too


@pytest.mark.parametrize("name", CONSTRUCTS)
def test_a_construct_writes_what_transformers_writes(reference: Any, name: str) -> None:
    messages = [USER, {"role": "assistant", "content": "yo", "name": None}]
    expected = theirs(reference, CONSTRUCTS[name], messages, add_generation_prompt=True)
    assert ours(CONSTRUCTS[name], messages, True) == expected
    assert (expected is None) == (name in WRONG)


def test_who_is_to_blame_is_told_apart() -> None:
    refusing = ChatTemplate("{{ raise_exception('no system role') }}")
    with pytest.raises(LawcatError, match="refuses these messages: no system role") as caught:
        refusing.render([USER])
    assert not isinstance(caught.value, BundleFault)
    with pytest.raises(BundleFault, match="not valid"):
        ChatTemplate("{% if %}")
    with pytest.raises(BundleFault, match="failed"):
        ChatTemplate("{{ 1 / 0 }}").render([USER])
    with pytest.raises(LawcatError, match="JSON values"):
        ChatTemplate("x").render([USER], variables={"a": {1, 2}})
    with pytest.raises(LawcatError, match="cannot be continued"):
        ChatTemplate("{{ messages | length }}").render([USER], continue_final=True)


def test_variables_cannot_take_the_place_of_the_messages() -> None:
    text = ChatTemplate("{{ messages | length }}{{ add_generation_prompt }}{{ own }}").render(
        [USER], variables={"messages": [], "add_generation_prompt": 7, "self": 1, "own": [1]}
    )
    assert text == "1True[1]"
