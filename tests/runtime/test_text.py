"""Streaming text, stop strings, chat templates: nothing is split, nothing escapes."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_bundle import TEMPLATE, V, tiny_tokenizer

from lawcat_edge.runtime.errors import LawcatError
from lawcat_edge.runtime.generate.text import Detokenizer, StopStrings, Tokenizer
from lawcat_edge.runtime.template.chat import ChatTemplate


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(tiny_tokenizer().to_str().encode(), V)


def stream(tokenizer: Tokenizer, ids: list[int], context: list[int] | None = None) -> list[str]:
    detokenizer = Detokenizer(tokenizer, context=context or [])
    return [*(detokenizer.push(token) for token in ids), detokenizer.flush()]


@given(st.text(max_size=40))
def test_streamed_text_is_the_text_and_no_piece_holds_half_a_character(text: str) -> None:
    tokenizer = Tokenizer(tiny_tokenizer().to_str().encode(), V)
    if any(special in text for special in ("<|im_start|>", "<|im_end|>", "<|extra_0|>", "<|extra_1|>")):
        return
    pieces = stream(tokenizer, tokenizer.encode(text))
    assert "".join(pieces) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@given(st.lists(st.integers(0, V - 1), max_size=60))
def test_any_tokens_stream_to_what_they_decode_to(ids: list[int]) -> None:
    tokenizer = Tokenizer(tiny_tokenizer().to_str().encode(), V)
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


def test_a_four_byte_character_comes_out_whole_at_its_last_byte(tokenizer: Tokenizer) -> None:
    assert stream(tokenizer, tokenizer.encode("🦉")) == ["", "", "", "🦉", ""]


def test_endless_garbage_is_not_held_back_for_ever(tokenizer: Tokenizer) -> None:
    bad = tokenizer.encode("ÿ")[:1] * 100  # the first byte of a two-byte character, again and again
    pieces = stream(tokenizer, bad)
    longest_silence = max(len(run) for run in "".join("x" if piece else " " for piece in pieces).split("x"))
    assert longest_silence <= 10
    assert "".join(pieces) == tokenizer.decode(bad)


def test_a_space_after_the_prompt_is_kept_by_decoders_that_strip_the_first_one() -> None:
    from tokenizers import Tokenizer as Engine
    from tokenizers import decoders, models

    engine = Engine(models.WordLevel({"▁one": 0, "▁two": 1, "<s>": 2}, unk_token="<s>"))
    engine.decoder = decoders.Metaspace()
    tokenizer = Tokenizer(engine.to_str().encode(), 3)
    assert "".join(stream(tokenizer, [1], context=[0])) == " two"


@given(
    st.text("ab\u00e9", max_size=30),
    st.lists(st.text("ab\u00e9", min_size=1, max_size=4), max_size=3),
    st.data(),
)
def test_stop_strings_do_not_depend_on_the_pieces(text: str, stops: list[str], data: st.DataObject) -> None:
    whole = StopStrings(stops)
    expected = whole.push(text) + ("" if whole.found else whole.flush())
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    assert expected == (text[: min(ends)[1]] if ends else text)
    cut = StopStrings(stops)
    got, rest = "", text
    while rest and cut.found is None:
        size = data.draw(st.integers(1, len(rest)))
        got, rest = got + cut.push(rest[:size]), rest[size:]
    got += "" if cut.found else cut.flush()
    assert got == expected
    assert (cut.found is None) == (not ends)


def test_bad_stop_strings_and_tokenizers_are_refused() -> None:
    with pytest.raises(LawcatError, match="A stop string is empty"):
        StopStrings(["x", ""])
    with pytest.raises(LawcatError, match="at most 1000 characters"):
        StopStrings(["x" * 1001])
    for data in (b"", b"{}", b"\xff\xfe", b'{"version":"1.0","model":{"type":"Nope"}}'):
        with pytest.raises(LawcatError, match="not a valid tokenizer"):
            Tokenizer(data, V)


def test_broken_text_and_too_many_tokens_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(LawcatError, match="UTF-8"):
        tokenizer.encode("caf\udce9")
    with pytest.raises(LawcatError, match="more tokens than the model"):
        Tokenizer(tiny_tokenizer().to_str().encode(), 10).encode("zebra")


HELLO = [{"role": "user", "content": "Hello"}]


def test_a_template_renders_messages() -> None:
    text = ChatTemplate(TEMPLATE).render([{"role": "system", "content": "Be brief"}, *HELLO])
    assert text == (
        "<|im_start|>system\nBe brief<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    )


def test_what_templates_of_real_models_use_works() -> None:
    source = (
        "{{ bos_token }}{% set ns = namespace(n=0) %}{% for m in messages if m.role != 'x' %}"
        "{% set ns.n = ns.n + 1 %}{{ loop.index }}{{ m['content'] | trim }}{{ m | tojson }}"
        "{% if loop.last %}{{ ['a', 'b'] | join('-') }}{% endif %}{% break %}{% endfor %}{{ ns.n }}"
        "{% for k, v in {'x': 1}.items() %}{{ k }}{{ v }}{% endfor %}{{ 'a' ~ 1 ~ messages | length }}"
        "{% set a, b = (1, 2) %}{{ a + b }}{% if messages[0]['content'].startswith('He') %}!{% endif %}"
    )
    text = ChatTemplate(source, {"bos_token": "<s>"}).render(HELLO)
    assert text == '<s>1Hello{"role": "user", "content": "Hello"}a-b1x1a113!'


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{{ 'a' * 10**9 }}",
        "{{ [1] * 10**9 }}",
        "{{ 10**10**9 }}{{ (10**200)**(10**5) }}",
        "{% set n = namespace(x='aa') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
        "{% set n=namespace(x='aa') %}{% for i in [1]*9 %}{% set n.x = n.x|replace('a', n.x) %}{% endfor %}",
        "{% set n = namespace(x=[1]) %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}",
        "{% set n = namespace(x=1) %}{% for i in range(99) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}",
        "{% set n = namespace(x=1) %}{% for i in range(99) %}{% set n.x = {1: n.x, 2: n.x} %}{% endfor %}",
        "{{ 'a'|center(10**9) }}",
        "{{ 'a'.center(10**9) }}",
        "{{ '{:>999999999}'.format(1) }}",
        "{{ '%999999999d' % 1 }}",
        "{{ '%*d' % (999999999, 1) }}",
        "{{ '%.999999999f' % 1 }}",
        "{{ '%999999999d' | format(1) }}",
        "{% set a = 'x' * 1000000 %}{{ ('%(a)s' * 100000) % {'a': a} }}",
        "{% set a = '\\n' * 1000000 %}{{ ('%(a)r' * 30) % {'a': a} }}",
        "{{ '{:{w}}'.format(1, w=999999999) }}",
        "{{ '{a:>999999999}'.format_map({'a': 1}) }}",
        "{% set a = 'x' * 1000000 %}{{ ('{0}' * 100000).format(a) }}",
        "{{ '{0.__class__.__mro__[1].__subclasses__}'.format(1) + 1 }}",
        "{{ 'a\\nb' | indent(10**9) }}",
        "{{ 'a\\nb' | indent(first=true, width=10**9) }}",
        "{{ ('a b ' * 10000) | wordwrap(1, wrapstring='x' * 1000000) }}",
        "{{ [1] | batch(10**9, 'x') | list }}",
        "{{ [1] | slice(10**9, 'x') | list }}",
        "{{ 'a'.ljust(10**9) }}",
        "{{ ('\\t' * 1000000).expandtabs(10**6) }}",
        "{{ 'x' | tojson(indent=10**9) }}",
        "{{ [1, 2] | tojson(separators=('x' * 100000, ':')) }}",
        "{{ range(100000) | map('string') | join('x' * 1000000) }}",
        "{{ ('x' * 1000000).join(range(100000) | map('string')) }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{% include 'secret' %}",
        "{% for x in range(3) recursive %}{{ loop(range(3)) }}{% endfor %}",
        "{{ raise_exception('no') }}",
        "{{ 1 / 0 }}",
        "{{ " + "(" * 9000 + "1" + ")" * 9000 + " }}",
        "{% if %}",
        "x" * 300_000,
    ],
)
def test_a_hostile_template_ends_in_an_error(source: str) -> None:
    with pytest.raises(LawcatError, match="chat template"):
        ChatTemplate(source).render(HELLO)


@pytest.mark.parametrize(
    "messages", ["Hello", [], [{"role": "user"}], [{"role": "user", "content": 1}], ["x"]]
)
def test_wrong_messages_are_refused(messages: object) -> None:
    with pytest.raises(LawcatError, match="essage"):
        ChatTemplate(TEMPLATE).render(messages)  # type: ignore[arg-type]


@settings(max_examples=50)
@given(st.text(max_size=200))
def test_any_source_renders_or_is_an_error(source: str) -> None:
    with contextlib.suppress(LawcatError):
        ChatTemplate("{{" + source + "}}").render(HELLO)
