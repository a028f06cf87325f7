"""Data files as people have them: marks, compressions, formats, encodings, and names with brackets."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pytest
from evaluation_toys import toy_tokenizer

from lawcat_edge.data.mix import sequences
from lawcat_edge.data.readers import expand, read_parts
from lawcat_edge.distill.settings import load_recipe
from lawcat_edge.runtime.encoding import decode_text, guess
from lawcat_edge.runtime.errors import LawcatError
from lawcat_edge.runtime.files import parse_json

MARK = b"\xef\xbb\xbf"
LINES = b'{"text": "one"}\n{"text": "two"}\n'
RUSSIAN = "\u041c\u043e\u0440\u0435 \u0431\u044b\u043b\u043e \u0441\u0435\u0440\u043e\u0435."
TEXTS = {
    "cp1252": "Caf\u00e9 \u2013 \u201cna\u00efve\u201d, a word here and there in an English text.",
    "utf-16": "a plain text",
    "utf-32": "a plain text",
    "utf-16-le": "a plain text without a mark",
    "utf-16-be": "a plain text without a mark",
    "cp1251": RUSSIAN,
    "koi8-r": RUSSIAN,
    "cp932": "\u3053\u308c\u306f\u65e5\u672c\u8a9e\u306e\u6587\u7ae0\u3067\u3059\u3002",
    "euc-jp": "\u3053\u308c\u306f\u65e5\u672c\u8a9e\u306e\u6587\u7ae0\u3067\u3059\u3002",
    "euc-kr": "\ubc14\ub2e4\ub294 \uc870\uc6a9\ud558\uace0 \ud558\ub298\uc740 \ub9d1\ub2e4.",
    "gb18030": "\u5927\u6d77\u5f88\u5b89\u9759\uff0c\u5929\u7a7a\u5f88\u6674\u6717\u3002",
}


def zstd(data: bytes) -> bytes:
    zstandard = pytest.importorskip("zstandard")
    packed: bytes = zstandard.ZstdCompressor().compress(data)
    return packed


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd
}  # fmt: skip


def texts(path: Path) -> list[str]:
    return [part.text for part in read_parts(str(path))]


def refused(path: Path) -> str:
    with pytest.raises(LawcatError) as caught:
        texts(path)
    message = str(caught.value)
    assert path.name in message
    assert "\n" not in message
    assert message.endswith(".")
    return message


@pytest.mark.parametrize(
    ("name", "content", "want"),
    [
        ("a.txt", MARK + b"one\r\n\x0c\r\ntwo\r\n", ["one", "two\n"]),
        ("joined.txt", MARK + b"one\n\x0c\n" + MARK + b"two\n", ["one", "two\n"]),
        ("a.jsonl", MARK + LINES.replace(b"\n", b"\r\n"), ["one", "two"]),
        ("joined.jsonl", MARK + LINES + MARK + LINES, ["one", "two"] * 2),
        ("list.json", MARK + b'[{"text": "one"},\n {"text": "two"}]', ["one", "two"]),
        ("one.json", b'{\n "text": "one"\n}', ["one"]),
        ("lines.json", LINES, ["one", "two"]),
        ("chat.json", b'[{"messages": [{"role": "user", "content": "x"}]}]', ["user: x"]),
        ("a.csv", MARK + b'id,text\r\n1,"one, two"\r\n2,"three\nfour"\r\n', ["one, two", "three\nfour"]),
        ("a.tsv", b"text\tid\none\t1\n", ["one"]),
        ("half.jsonl", b'{"text": "a\\ud83d b"}\n{"text": "\\ud83d\\ude00"}\n', ["a\ufffd b", "\U0001f600"]),
        ("half.jsonl", b'{"messages": [{"role": "user", "content": "a\\udc00"}]}\n', ["user: a\ufffd"]),
    ],
)
def test_files_are_read_as_what_they_are(tmp_path: Path, name: str, content: bytes, want: list[str]) -> None:
    (tmp_path / name).write_bytes(content)
    assert texts(tmp_path / name) == want


@pytest.mark.parametrize("packer", PACKERS)
def test_compressed_files(tmp_path: Path, packer: str) -> None:
    pack = PACKERS[packer]
    (tmp_path / f"a.jsonl{packer}").write_bytes(pack(LINES) + pack(LINES))  # two, joined, as `cat` does
    assert texts(tmp_path / f"a.jsonl{packer}") == ["one", "two"] * 2
    long = "".join(f"line {i}\n" for i in range(200_000))
    (tmp_path / "no-such-suffix.txt").write_bytes(pack(long.encode()))
    assert "".join(texts(tmp_path / "no-such-suffix.txt")) == long
    (tmp_path / f"cut.txt{packer}").write_bytes(pack(long.encode())[:-9])
    assert "damaged or cut short" in refused(tmp_path / f"cut.txt{packer}")
    (tmp_path / f"latin.txt{packer}").write_bytes(pack(b"caf\xe9 au lait"))
    assert "CP1252" in refused(tmp_path / f"latin.txt{packer}")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", b"%PDF-1.7\n%\xe2\xe3\xcf\xd3", "is a PDF, not plain text; convert it to text first"),
        ("a.txt", b"%PDF-1.7\nplain", "is a PDF"),
        ("a.pdf", b"", "is a PDF"),
        ("a.txt", b"PK\x03\x04\x14\x00", "office document"),
        ("a.docx", b"PK\x03\x04\x14\x00", "office document"),
        ("a.tar.gz", gzip.compress(b"x", mtime=0), "an archive"),
        ("a.txt", b"{\\rtf1 text}", "rich-text"),
        ("a.txt", b"PAR1\x15\x04\x00", "Parquet"),
        ("a.json", b"some text", "not valid JSON"),
        ("a.json", b'[{"instruction": "x"}]', "record 1, has neither a string"),
        ("a.json", b'{"data": [{"text": "x"}]}', "'data'"),
        ("a.jsonl", b'{"content": "x"}', "but 'content'"),
        ("a.csv", b"body,id\nx,1\n", "no column \"text\" in its first line, but 'body', 'id'"),
        ("a.csv", b"", 'no column "text"'),
    ],
)
def test_what_is_no_text_is_named(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert said in refused(tmp_path / name)


@pytest.mark.parametrize("encoding", TEXTS)
def test_another_encoding_is_recognised_and_named(tmp_path: Path, encoding: str) -> None:
    data = TEXTS[encoding].encode(encoding)
    (tmp_path / "a.txt").write_bytes(data)
    assert f"iconv -f {encoding} -t utf-8" in refused(tmp_path / "a.txt")
    with pytest.raises(LawcatError, match=f"`iconv -f {encoding} -t utf-8`"):
        decode_text(data, "The standard input")


@pytest.mark.parametrize("text", [*TEXTS.values(), "plain"])
def test_utf8_of_any_script_is_utf8(tmp_path: Path, text: str) -> None:
    assert guess(text.encode()) == "utf-8"
    assert guess(text.encode()[:-1]) == "utf-8"  # a sample may end inside a character
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    assert texts(tmp_path / "a.txt") == [text]
    assert decode_text(MARK + text.encode(), "it") == text


@pytest.mark.parametrize("place", [0, 70_000, 300_000])
def test_the_place_of_a_bad_byte_is_told(tmp_path: Path, place: int) -> None:
    data = bytearray(("plain text \u00e9\n" * 30_000).encode())
    data[place] = 0xFF
    (tmp_path / "a.txt").write_bytes(data)
    message = refused(tmp_path / "a.txt")
    assert f"(byte {place:,}); mend or remove what is damaged there" in message
    with pytest.raises(LawcatError, match=rf"\(byte {place:,}\)"):
        decode_text(bytes(data), "it")


def test_brackets_in_a_path_that_exists_are_no_pattern(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "data [v2]" / "part*1"
    folder.mkdir(parents=True)
    for name in ("a.txt", "b.txt", "c[1].txt"):
        (folder / name).write_text("x")
    whole = [str(folder / name) for name in ("a.txt", "b.txt", "c[1].txt")]
    assert expand([folder / "*.txt"]) == whole
    assert expand([folder / "c[1].txt"]) == whole[2:]
    assert expand([folder / "[ab].txt"]) == whole[:2]
    assert expand([tmp_path / "data*" / "*" / "a.txt"]) == whole[:1]
    monkeypatch.chdir(tmp_path)
    assert expand(["data [v2]/**/a.txt"]) == ["data [v2]/part*1/a.txt"]
    with pytest.raises(LawcatError, match="is a folder; name its files"):
        expand([folder])


def test_home_in_a_pattern(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("x")
    assert expand(["~/*.txt", "~/a.txt"]) == [str(tmp_path / "a.txt")] * 2
    with pytest.raises(LawcatError, match="no home folder for '~nobody-of-this-name'"):
        expand(["~nobody-of-this-name/*.txt"])


def test_settings_and_requests_with_a_mark(tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_bytes(MARK + b'{"seq_len": 77}')
    assert load_recipe(str(tmp_path / "recipe.json")).seq_len == 77
    assert parse_json(MARK + b'{"a": 1}', "The request") == {"a": 1}


def test_a_half_pair_does_not_end_a_run(tmp_path: Path) -> None:
    record = json.dumps({"text": "the sea \ud83d " * 50})
    (tmp_path / "a.jsonl").write_text(record)
    row = next(sequences([tmp_path / "a.jsonl"], toy_tokenizer(), 64, seed=0, split="all"))
    assert len(row.ids) == 64
