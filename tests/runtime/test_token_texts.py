"""The texts of single tokens, of SentencePiece-like ones too: a word with its space is another token."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_bundle import V, build_tiny_bundle, tiny_tokenizer
from tokenizers import Tokenizer as Engine
from tokenizers import decoders, models, normalizers, pre_tokenizers

pytest.importorskip("uvicorn", reason="the server's tests need the extra `serve`")

from served import Running, load, running

from lawcat_edge.runtime.generate.text import Tokenizer, TokenTexts
from lawcat_edge.runtime.server.replies import token_bytes

WORDS = ["the", "sea", "is", "grey", "a"]


def sentencepiece_like(modern: bool = False) -> Engine:
    """As Llama 2 has it: spaces are `▁`, bytes stand in for unknown letters, the first space is stripped."""
    vocabulary = {text: i for i, text in enumerate(["<unk>", "<s>", "</s>"])}
    merges = []

    def add(text: str) -> None:
        vocabulary.setdefault(text, len(vocabulary))

    for letter in sorted({*"".join(WORDS), "▁"}):
        add(letter)
    for word in WORDS:
        for text in ("▁" + word, word):
            for size in range(2, len(text) + 1):
                add(text[:size])
                if (text[: size - 1], text[size - 1]) not in merges:
                    merges.append((text[: size - 1], text[size - 1]))
    for byte in "é".encode():
        add(f"<0x{byte:02X}>")
    for number in range((V - len(vocabulary)) // 2):  # as many as the bundle has room for
        add(f"x{number}")
        add(f"▁x{number}")
    engine = Engine(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if modern:
        engine.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        engine.decoder = decoders.Metaspace(prepend_scheme="first", split=False)
    else:
        engine.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        engine.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    engine.add_special_tokens(["<unk>", "<s>", "</s>"])
    return engine


def tokenizer_of(engine: Engine) -> Tokenizer:
    return Tokenizer(engine.to_str().encode(), engine.get_vocab_size())


@pytest.mark.parametrize("modern", [False, True])
def test_a_word_and_the_word_with_its_space_have_different_texts(modern: bool) -> None:
    tokenizer = tokenizer_of(sentencepiece_like(modern))
    texts = TokenTexts(tokenizer)
    for word in WORDS:
        plain, spaced = tokenizer.id_of(word), tokenizer.id_of("▁" + word)
        assert plain is not None
        assert spaced is not None
        assert (texts.of(plain), texts.of(spaced)) == (word, " " + word)
        assert token_bytes(tokenizer, spaced, texts.of(spaced)) == list(f" {word}".encode())
    end = tokenizer.id_of("</s>") or 0
    assert texts.of(end) == "</s>"
    assert texts.is_special(end)
    assert not texts.is_special(tokenizer.id_of("▁") or 0)


def test_bytes_of_letters_that_are_no_tokens() -> None:
    tokenizer = tokenizer_of(sentencepiece_like())
    ids = tokenizer.encode("é")[1:]
    texts = TokenTexts(tokenizer)
    found = [byte for i in ids for byte in token_bytes(tokenizer, i, texts.of(i)) or []]
    assert bytes(found) == "é".encode()


def test_byte_level_tokens_have_the_texts_they_had() -> None:
    tokenizer = tokenizer_of(tiny_tokenizer())
    texts = TokenTexts(tokenizer)
    assert [texts.of(token) for token in range(V)] == [
        tokenizer.decode([token], skip_special=False) for token in range(V)
    ]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder: Path = tmp_path_factory.mktemp("texts") / "bundle"
    with running(build_tiny_bundle(folder, tokenizer=sentencepiece_like(), eos=[])) as found:
        yield found


def complete(server: Running, **body: Any) -> Any:
    body = {"prompt": "the sea is", "max_tokens": 20, "temperature": 1.0, "seed": 2, **body}
    status, _, answer = server.raw("POST", "/v1/completions", json.dumps(body).encode())
    assert status == 200, answer
    return answer["choices"][0]


def test_tokens_join_to_the_text_and_begin_at_their_offsets(server: Running) -> None:
    tokenizer = load(server.server.service.model.bundle.folder).tokenizer
    spaces = 0
    for seed in range(8):
        choice = complete(server, seed=seed, logprobs=5)
        found = choice["logprobs"]
        if any("\ufffd" in token or token in ("<unk>", "<s>", "</s>") for token in found["tokens"]):
            continue  # parts of characters, and what is no text
        assert "".join(found["tokens"]) == choice["text"]
        for token, at in zip(found["tokens"], found["text_offset"], strict=True):
            assert choice["text"][at : at + len(token)] == token
        spaces += sum(token.startswith(" ") for token in found["tokens"])
    assert spaces
    for top in complete(server, logprobs=20)["logprobs"]["top_logprobs"]:
        assert len(top) == 20  # none lost to another of the same name
    assert tokenizer.encode("the sea")[0] == tokenizer.id_of("▁the")


def test_an_echoed_prompt_begins_without_the_space_that_its_text_lacks(server: Running) -> None:
    choice = complete(server, echo=True, logprobs=1, max_tokens=0)
    assert choice["text"] == "the sea is"
    assert choice["logprobs"]["tokens"] == ["the", " sea", " is"]
    assert choice["logprobs"]["text_offset"] == [0, 3, 7]


def test_chats_have_the_space_too(server: Running) -> None:
    body = {
        "messages": [{"role": "user", "content": "the sea"}],
        "max_tokens": 12,
        "logprobs": True,
        "top_logprobs": 20,
    }
    _, _, answer = server.raw("POST", "/v1/chat/completions", json.dumps(body).encode())
    entries = answer["choices"][0]["logprobs"]["content"]
    names = {top["token"] for entry in entries for top in entry["top_logprobs"]}
    assert any(name.startswith(" ") and len(name) > 1 for name in names)
    for entry in entries:
        if "\ufffd" not in entry["token"]:
            assert bytes(entry["bytes"]).decode() == entry["token"]
