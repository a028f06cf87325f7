"""The training data: readers, packing, order, sharding, resuming and the errors a user can meet."""

import json
import sys
import tracemalloc
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from evaluation_toys import prose, toy_tokenizer

from lawcat_edge.data import corpus as corpora
from lawcat_edge.data import packing, readers
from lawcat_edge.data.corpus import (
    TokenArray,
    separator_ids,
    sidecar_path,
    tokenise_corpus,
    tokenizer_fingerprint,
)
from lawcat_edge.data.mix import parse_mix, sequences
from lawcat_edge.data.packing import permuted
from lawcat_edge.data.readers import ChatForm, Part, expand, read_parts
from lawcat_edge.runtime.errors import LawcatError


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """40 different documents in one form-feed file."""
    text = prose(800).split(". ")
    documents = [f"Document {i}. " + ". ".join(text[i * 20 : i * 20 + 20]) + "." for i in range(40)]
    path = tmp_path / "corpus.txt"
    path.write_text("\n\f\n".join(documents), encoding="utf-8")
    return path


def token_sequences(*arguments: Any, **options: Any) -> Iterator[np.ndarray]:
    return (row.ids for row in sequences(*arguments, **options))


def texts(path: Path, **options: object) -> list[str]:
    return [part.text for part in read_parts(str(path), **options)]  # type: ignore[arg-type]


def test_form_feed_lines_separate_documents(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one\n\f\ntwo has a \f inside\n\f\n\f\nthree\n", encoding="utf-8")
    assert list(read_parts(str(path))) == [
        Part("one", True, False),
        Part("two has a \f inside", True, False),
        Part("three\n", True, False),
    ]


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 1000])
def test_chunk_size_does_not_change_documents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one\n\f\ntwo — é\n\f \nthree\n\f", encoding="utf-8")
    monkeypatch.setattr(readers, "CHUNK", chunk)
    assert texts(path) == ["one", "two — é", "three"]


def test_long_document_comes_in_parts_that_join_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "PART", 500)
    monkeypatch.setattr(readers, "CHUNK", 64)
    whole = prose(60)
    (tmp_path / "a.txt").write_text(whole, encoding="utf-8")
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": whole}), encoding="utf-8")
    parts = list(read_parts(str(tmp_path / "a.txt")))
    assert len(parts) > 3
    assert "".join(part.text for part in parts) == whole
    assert [part.last for part in parts] == [False] * (len(parts) - 1) + [True]
    assert max(len(part.text) for part in parts) <= 500 + 64
    assert "".join(texts(tmp_path / "a.jsonl")) == whole
    ids = np.concatenate([ids for _, ids in corpora.encode_parts(parts, toy_tokenizer())])
    assert ids[:-1].tolist() == toy_tokenizer().encode(whole).ids, "cutting must not change the tokens"


def test_jsonl_parquet_and_messages_give_the_same_documents(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    rows = [{"text": "first text"}, {"text": "second text"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n", encoding="utf-8")
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert texts(tmp_path / "a.jsonl") == texts(tmp_path / "a.parquet") == ["first text", "second text"]
    chat = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
    (tmp_path / "c.jsonl").write_text(json.dumps(chat), encoding="utf-8")
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    assert texts(tmp_path / "c.jsonl") == ["user: Hi\nassistant: Hello"]
    assert texts(tmp_path / "c.jsonl", chat_template=ChatForm(template)) == ["<user>Hi<assistant>Hello"]
    with pytest.raises(LawcatError, match=r"c\.jsonl:1 does not fit .*only users speak") as caught:
        texts(tmp_path / "c.jsonl", chat_template=ChatForm("{{ raise_exception('only users speak') }}"))
    assert "bundle" not in str(caught.value)
    broken = ChatForm("{% for %}")
    assert texts(tmp_path / "a.jsonl", chat_template=broken) == ["first text", "second text"]
    with pytest.raises(LawcatError, match="not valid"):
        texts(tmp_path / "c.jsonl", chat_template=broken)


class FakeHub(ModuleType):
    """The package datasets, as far as it is used."""

    __version__ = "4.1.0"

    def load_dataset(self, *arguments: Any, **options: Any) -> Iterator[dict[str, Any]]:
        assert arguments == ("owner/name", "small")
        assert options == {"split": "test", "streaming": True}
        return iter([{"text": "one", "id": 1}, {"messages": [{"role": "user", "content": "Hi"}]}, {"id": 3}])


def test_hub_datasets_are_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = FakeHub("datasets")
    monkeypatch.setitem(sys.modules, "datasets", hub)
    parts = read_parts("hub:owner/name,small,test")
    assert [next(parts).text, next(parts).text] == ["one", "user: Hi"]
    with pytest.raises(LawcatError, match=r"hub:owner/name,small,test row 3 has neither"):
        next(parts)
    monkeypatch.setattr(hub, "__version__", "2.19.0", raising=False)
    with pytest.raises(LawcatError, match="too old"):
        next(read_parts("hub:owner/name,small,test"))


def test_hub_datasets_through_the_real_package(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    rows = [{"text": f"Document {i}."} for i in range(100)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (tmp_path / "test.jsonl").write_text(json.dumps({"text": "other"}), encoding="utf-8")
    assert [part.text for part in read_parts(f"hub:{tmp_path}")] == [row["text"] for row in rows]
    assert [part.text for part in read_parts(f"hub:{tmp_path},default,test")] == ["other"]
    with pytest.raises(LawcatError, match="cannot be opened"):
        next(read_parts(f"hub:{tmp_path},default,none"))


def test_globs_expand_in_order(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "c.md"):
        (tmp_path / name).write_text("x", encoding="utf-8")
    assert expand([str(tmp_path / "*.txt")]) == [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]
    assert expand(["hub:owner/name"]) == ["hub:owner/name"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"\x00\x01binary", "binary file"),
        ("a.txt", b"caf\xe9", "not valid UTF-8"),
        ("a.jsonl", b"{not json}", "a.jsonl:1 is not valid JSON"),
        ("a.jsonl", b'\n{"body": "x"}', "a.jsonl:2 has neither"),
        ("a.jsonl", b'{"messages": "x"}', '"messages" must be a list'),
        ("a.jsonl", b'{"text": "\xff"}', "not valid UTF-8"),
        ("a.parquet", b"no parquet", "cannot be read as Parquet"),
        ("a.txt", b"", "no usable text"),
        ("a.txt", b" \n\n \t", "no usable text"),
        ("a.txt", b"too short", "no usable text"),
    ],
)
def test_bad_files_are_one_sentence(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(LawcatError, match=message) as caught:
        next(sequences([path], toy_tokenizer(), 64, seed=0, split="all"))
    assert "\n" not in str(caught.value)


def test_missing_sources_are_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LawcatError, match="No data file at"):
        sequences([tmp_path / "none.txt"], toy_tokenizer(), 64, seed=0)
    with pytest.raises(LawcatError, match="No file matches"):
        sequences([tmp_path / "*.txt"], toy_tokenizer(), 64, seed=0)
    with pytest.raises(LawcatError, match="No data was given"):
        sequences([], toy_tokenizer(), 64, seed=0)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(LawcatError, match="needs the package datasets"):
        next(sequences(["hub:owner/name"], toy_tokenizer(), 64, seed=0))


def test_sequences_hold_every_document_with_separators(corpus: Path) -> None:
    tokenizer = toy_tokenizer()
    rows = list(sequences([corpus], tokenizer, 50, seed=1, split="all", epochs=1))
    assert all(row.ids.shape == (50,) and row.ids.dtype == np.int32 and row.weight is None for row in rows)
    expected = sum(len(tokenizer.encode(text).ids) + 1 for text in texts(corpus))
    assert len(rows) == expected // 50
    ends = sum(int((row.ids == tokenizer.token_to_id("<|endoftext|>")).sum()) for row in rows)
    assert ends in (39, 40), "one separator a document; the last may fall into the rest"


def test_bos_of_the_tokenizer_starts_every_document(corpus: Path) -> None:
    tokenizer = toy_tokenizer(bos=True)
    assert separator_ids(tokenizer) == [0, 1]
    rows = np.stack(
        [ids for ids in token_sequences([corpus], tokenizer, 50, seed=1, split="heldout", heldout_share=0.5)]
    )
    flat = rows.ravel()
    assert flat[0] == 1
    inner = np.flatnonzero(flat[:-1] == 0)
    assert len(inner) > 5
    assert (flat[inner + 1] == 1).all()


def test_order_follows_the_seed(corpus: Path) -> None:
    def first(seed: int) -> np.ndarray:
        return np.stack(list(islice(token_sequences([corpus], toy_tokenizer(), 50, seed=seed), 20)))

    assert (first(3) == first(3)).all()
    assert (first(3) != first(4)).any()


@pytest.mark.parametrize("tokenised", [False, True])
def test_ranks_share_one_row_and_resume_anywhere(corpus: Path, tmp_path: Path, tokenised: bool) -> None:
    tokenizer = toy_tokenizer()
    source = corpus
    if tokenised:
        source = tmp_path / "c.bin"
        tokenise_corpus([corpus], tokenizer, source)
    options = {"mix": "text:0.6,passkey:0.4"}

    def row(count: int, rank: int = 0, world: int = 1, start: int = 0) -> list[np.ndarray]:
        made = sequences([source], tokenizer, 200, 5, rank, world, start=start, **options)  # type: ignore[arg-type]
        return [item.ids for item in islice(made, count)]

    whole = row(150)
    assert len({ids.tobytes() for ids in whole}) > 50
    for rank in range(3):
        part = row(50, rank, 3)
        assert all((a == b).all() for a, b in zip(part, whole[rank::3], strict=True))
    for start in (1, 77):
        assert all((a == b).all() for a, b in zip(row(20, start=start), whole[start:], strict=False))
    resumed = row(10, 1, 2, start=60)
    assert all((a == b).all() for a, b in zip(resumed, whole[61::2], strict=False))


def test_heldout_documents_never_train(corpus: Path, tmp_path: Path) -> None:
    share = 0.3
    train = set(texts(corpus, split="train", heldout_share=share))
    held = set(texts(corpus, split="heldout", heldout_share=share))
    assert not train & held
    assert len(train) + len(held) == 40
    assert 4 <= len(held) <= 20
    out = tmp_path / "c.bin"
    note = tokenise_corpus([corpus], toy_tokenizer(), out, heldout_share=share)
    assert (note["train_documents"], note["heldout_documents"]) == (len(train), len(held))
    array = TokenArray(out, toy_tokenizer())
    decoded = toy_tokenizer().decode(array.read(*array.bounds("heldout")).tolist(), skip_special_tokens=False)
    assert [text for text in decoded.split("<|endoftext|>") if text] == texts(
        corpus, split="heldout", heldout_share=share
    )


def test_tokenised_epoch_is_a_permutation_with_a_fresh_cut(tmp_path: Path) -> None:
    tokenizer = toy_tokenizer()
    path = tmp_path / "c.npy"
    ids = np.arange(1000) % 300
    np.save(path, ids.astype(np.uint16))
    note = {"format": 1, "dtype": "uint16", "tokens": 1000, "train_tokens": 1000}
    note["tokenizer_sha256"] = tokenizer_fingerprint(tokenizer)
    sidecar_path(path).write_text(json.dumps(note), encoding="utf-8")
    rows = list(token_sequences([path], tokenizer, 100, seed=0, epochs=2))
    assert len(rows) == 18
    for epoch in (rows[:9], rows[9:]):
        starts = sorted(int(row[0]) for row in epoch)
        assert len({int(row[0]) % 100 for row in epoch}) == 1
        assert len(starts) == 9
    assert int(rows[0][0]) % 100 != int(rows[9][0]) % 100


@pytest.mark.parametrize("count", [1, 2, 3, 17, 64, 1000])
def test_permuted_is_a_permutation(count: int) -> None:
    order = [permuted(k, count, seed=2, epoch=1) for k in range(count)]
    assert sorted(order) == list(range(count))
    if count >= 17:
        assert order != list(range(count))
        assert order != [permuted(k, count, seed=2, epoch=2) for k in range(count)]


def test_tokenised_corpus_is_checked(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "c.bin"
    tokenise_corpus([corpus], toy_tokenizer(), out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.bin", "c.bin.json", "corpus.txt"]

    def opened() -> None:
        next(sequences([out], toy_tokenizer(), 64, seed=0))

    opened()
    with pytest.raises(LawcatError, match="another tokenizer"):
        next(sequences([out], toy_tokenizer(bos=True), 64, seed=0))
    with pytest.raises(LawcatError, match="not both"):
        sequences([out, corpus], toy_tokenizer(), 64, seed=0)
    good, note = out.read_bytes(), sidecar_path(out).read_text()
    out.write_bytes(good[:-2])
    with pytest.raises(LawcatError, match="has not the size"):
        opened()
    out.write_bytes(b"\xff" * len(good))
    with pytest.raises(LawcatError, match="beyond the vocabulary"):
        opened()
    for broken in (
        "[]",
        "{}",
        "nope",
        note.replace('"format": 1', '"format": 2'),
        note.replace("uint16", "object"),
    ):
        sidecar_path(out).write_text(broken)
        with pytest.raises(LawcatError, match=r"sidecar|cannot be read|not valid JSON"):
            opened()
    sidecar_path(out).unlink()
    with pytest.raises(LawcatError, match="has no sidecar"):
        opened()
    with pytest.raises(LawcatError, match=r"NAME\.bin"):
        tokenise_corpus([corpus], toy_tokenizer(), tmp_path / "c.txt")


def test_reader_memory_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "SHUFFLE_CHARACTERS", 1 << 18)
    path = tmp_path / "big.txt"
    line = prose(40) + "\n"
    with open(path, "w", encoding="utf-8") as file:
        for i in range(12_000_000 // len(line)):
            file.write(line + "\f\n" * (i % 50 == 0))
    source = packing.TextFiles([str(path)], toy_tokenizer(), 64, 0, "all", 0.0, None)
    tracemalloc.start()
    read = sum(len(part.text) for part in source._shuffled(0))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert read > 11_900_000
    assert peak < 4_000_000


@pytest.mark.parametrize(
    ("mix", "message"),
    [
        ("text:0.7,passkey:0.2", "add up to 0.9"),
        ("text:0.7,poetry:0.3", "known tasks are"),
        ("text", "without a share"),
        ("text:x,passkey:1", "must be a number"),
        ("text:nan", "must be a number"),
        ("text:0.5,text:0.5", "twice"),
        ("text:1.5,passkey:-0.5", "must be a number"),
        ("", "without a share"),
    ],
)
def test_bad_mixes_are_refused(mix: str, message: str) -> None:
    with pytest.raises(LawcatError, match=message):
        parse_mix(mix)


def test_good_mixes() -> None:
    assert parse_mix(None) == {"text": 1.0}
    assert parse_mix(" text:0.7, passkey:0.3") == {"text": 0.7, "passkey": 0.3}
    assert parse_mix({"niah-1": 1}) == {"niah-1": 1.0}


def test_bad_arguments(corpus: Path) -> None:
    for change, message in (
        ({"seq_len": 4}, "sequence length"),
        ({"rank": 2, "world": 2}, "does not exist"),
        ({"split": "test"}, "Unknown split"),
        ({"mix": "teacher:1"}, "no teacher"),
    ):
        arguments = {"seq_len": 64, "seed": 0} | change
        with pytest.raises(LawcatError, match=message):
            sequences([corpus], toy_tokenizer(), **arguments)  # type: ignore[arg-type]
    with pytest.raises(LawcatError, match="held-out documents do not fill"):
        next(sequences([corpus], toy_tokenizer(), 64, seed=0, split="heldout", heldout_share=0.0))
