"""Which encoding bytes are in, and what a file is that is no text: for messages that name the next step."""

from __future__ import annotations

import codecs
from collections.abc import Callable

from lawcat_edge.runtime.errors import LawcatError

SAMPLE = 1 << 16
"""Bytes that a guess looks at."""

_MARKS = (  # UTF-32 first: its mark begins like that of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_KINDS = (
    (b"%PDF-", "a PDF", "convert it to text first, for example with `pdftotext -layout`"),
    (b"PK\x03\x04", "a ZIP archive or an office document", "unpack it, or save it as plain text first"),
    (b"\xd0\xcf\x11\xe0", "an office document", "save it as plain text first"),
    (b"{\\rtf", "a rich-text document", "save it as plain text first"),
    (b"7z\xbc\xaf", "a 7z archive", "unpack it first"),
    (b"Rar!", "a RAR archive", "unpack it first"),
    (b"PAR1", "a Parquet file", "name it .parquet"),
    (b"\x1f\x8b", "compressed with gzip", "unpack it first"),
    (b"BZh", "compressed with bzip2", "unpack it first"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd", "unpack it first"),
    (b"\xfd7zXZ", "compressed with xz", "unpack it first"),
    (b"GGUF", "a GGUF model", "give a text file"),
)


def check_kind(head: bytes, what: str) -> None:
    """Raise LawcatError where the beginning of a file says that it is a known kind other than UTF-8 text."""
    for magic, kind, step in _KINDS:
        # "BZh" and "GGUF" could begin a text; what is compressed or packed goes on with other bytes
        if head.startswith(magic) and (not magic.isalnum() or not _is_utf8(head)):
            raise LawcatError(f"{what} is {kind}, not plain text; {step}.")
    encoding = guess(head)
    if encoding.startswith(("utf-16", "utf-32")):
        raise not_utf8(what, head)


def decode_text(data: bytes, what: str) -> str:
    """Bytes in UTF-8, with or without its mark, as text; LawcatError names another kind or encoding."""
    check_kind(data[:SAMPLE], what)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        begin = max(error.start - SAMPLE // 2, 0)
        raise not_utf8(what, data[begin : begin + SAMPLE], error.start) from error
    if "\0" in text:
        raise LawcatError(f"{what} is a binary file, not text; give a text file in UTF-8.")
    if not text.strip():
        raise LawcatError(f"{what} is empty; give a file with text.")
    return text


def not_utf8(what: str, sample: bytes, position: int | None = None) -> LawcatError:
    """The sentence for a file in another encoding, which ``sample`` of it gives away."""
    where = "" if position is None else f" (byte {position:,})"
    encoding = guess(sample)
    if encoding == "utf-8":  # the sample is good, so what is broken is one place of a UTF-8 text
        return LawcatError(f"{what} is not valid UTF-8{where}; mend or remove what is damaged there.")
    return LawcatError(
        f"{what} is not valid UTF-8{where}; it looks like {encoding.upper()}: convert it with "
        f"`iconv -f {encoding} -t utf-8`."
    )


def guess(sample: bytes) -> str:
    """The likely encoding, by the name that Python and iconv share; "utf-8" where it is that.

    By marks, by zero bytes (UTF-16 of mostly Latin text), then by which encoding gives the letters of its own
    script; Windows-1252, a superset of Latin-1, where none does.
    """
    for mark, name in _MARKS:
        if sample.startswith(mark):
            return name
    zeros = [sample[i::2].count(0) / max(len(sample[i::2]), 1) for i in (0, 1)]
    if len(sample) >= 8 and max(zeros) > 0.4 and min(zeros) < 0.1:
        return "utf-16-be" if zeros[0] > zeros[1] else "utf-16-le"
    if _is_utf8(sample):
        return "utf-8"
    scripts: tuple[tuple[str, float, Callable[[str], bool]], ...] = (
        ("cp932", 0.3, lambda c: "\u3040" <= c <= "\u30ff"),  # Japanese has kana beside Chinese characters
        ("euc-jp", 0.3, lambda c: "\u3040" <= c <= "\u30ff"),
        ("euc-kr", 0.9, lambda c: "\uac00" <= c <= "\ud7a3"),
        ("gb18030", 0.8, lambda c: "\u4e00" <= c <= "\u9fff" or "\u3000" <= c <= "\u303f" or c > "\uff00"),
        # Cyrillic in the wrong one of these comes out with small and capital letters changed over
        ("cp1251", 0.8, lambda c: "\u0430" <= c <= "\u044f"),
        ("koi8-r", 0.8, lambda c: "\u0430" <= c <= "\u044f"),
    )
    for name, least, own in scripts:
        other = [c for c in _decoded(sample, name) if c > "\x7f"]
        if len(other) > 3 and sum(map(own, other)) >= least * len(other):
            return name
    return "cp1252"


def _decoded(sample: bytes, encoding: str) -> str:
    """Empty where it is not in that encoding; the sample may end inside a character."""
    try:
        return codecs.getincrementaldecoder(encoding)().decode(sample)
    except UnicodeDecodeError:
        return ""


def _is_utf8(sample: bytes) -> bool:
    """Also where a few places are damaged, or the sample begins or ends inside a character."""
    other = [c for c in sample.decode("utf-8", "replace") if c > "\x7f"]
    broken = other.count("\ufffd")
    return broken == 0 or len(other) > 2 * broken
