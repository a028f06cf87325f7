"""Opening data files as people have them: compressed or not, with a byte-order mark or without, and no other.

The bytes decide about compression and the name about the format, so ``rows.jsonl.gz`` is JSON lines. What is
no UTF-8 text is refused with its kind or encoding named, and never trained on.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TextIO, cast

from lawcat_edge.runtime.encoding import SAMPLE, check_kind, not_utf8
from lawcat_edge.runtime.errors import LawcatError

COMPRESSED = (".gz", ".bz2", ".zst", ".xz")
_NO_TEXT = {".tar": "an archive", ".tgz": "an archive", ".zip": "an archive", ".xlsx": "a spreadsheet"}
_NO_TEXT |= {".docx": "an office document", ".odt": "an office document", ".pdf": "a PDF"}


def kind_of(path: str) -> str:
    """The suffix that tells the format, in lower case and without that of a compression: ``.jsonl``."""
    name = Path(path).name.lower()
    for suffix in COMPRESSED:
        if name.endswith(suffix):
            name = name.removesuffix(suffix)
    kind = Path(name).suffix
    if kind in _NO_TEXT:
        raise LawcatError(f"{path} is {_NO_TEXT[kind]}; unpack it or convert it to plain text first.")
    return kind


@contextmanager
def open_text(path: str) -> Iterator[TextIO]:
    """A UTF-8 file for reading, unpacked as it is read; LawcatError for any other kind of file.

    Newlines become ``\\n``. A mark at the start is dropped. Errors that come while reading (cut archives,
    bytes that are no UTF-8) are LawcatErrors too.
    """
    with open(path, "rb") as raw:
        binary = _unpacked(raw, path)
        source = _Counted(binary)
        try:
            check_kind(source.head, path)
            with io.TextIOWrapper(cast(Any, io.BufferedReader(source)), "utf-8-sig", "strict") as file:
                yield file
        except UnicodeDecodeError as error:
            position = source.position - len(error.object) + error.start
            raise not_utf8(path, error.object[max(error.start - 64, 0) :], max(position, 0)) from None
        except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
            raise LawcatError(f"{path} is damaged or cut short ({error}); get it again.") from None
        except OSError as error:
            if error.errno is not None:
                raise
            raise LawcatError(f"{path} is damaged ({error}); get it again.") from None


def _unpacked(raw: IO[bytes], path: str) -> IO[bytes]:
    head = raw.read(6)
    raw.seek(0)
    if head.startswith(b"\x1f\x8b"):
        return cast(IO[bytes], gzip.GzipFile(fileobj=raw))
    if head.startswith(b"BZh") and head[3:4].isdigit():
        return cast(IO[bytes], bz2.BZ2File(raw))
    if head.startswith(b"\xfd7zXZ"):
        return cast(IO[bytes], lzma.LZMAFile(raw))
    if head.startswith(b"\x28\xb5\x2f\xfd"):
        try:
            import zstandard
        except ImportError:
            raise LawcatError(
                f"Reading {path} needs zstandard; pip install 'lawcat-edge[data]', or unpack it with zstd -d."
            ) from None
        return cast(IO[bytes], _Zstd(raw, zstandard))
    return raw


class _Zstd:
    """zstd frames one after the other; unlike the package's own reader, it tells a file that was cut."""

    CHUNK = 1 << 13  # packed bytes at a time: what they can unpack to has to fit in memory

    def __init__(self, raw: IO[bytes], package: Any) -> None:
        self.raw, self.package = raw, package
        self.frame: Any = None
        self.packed, self.held = b"", b""

    def read(self, size: int) -> bytes:
        while not self.held:
            self.packed = self.packed or self.raw.read(self.CHUNK)
            if not self.packed:
                if self.frame is not None:
                    raise EOFError("the last frame has no end")
                return b""
            if self.frame is None:
                self.frame = self.package.ZstdDecompressor().decompressobj()
            try:
                self.held = self.frame.decompress(self.packed)
            except self.package.ZstdError as error:
                raise EOFError(error) from None
            self.packed = self.frame.unused_data if self.frame.eof else b""
            if self.frame.eof:
                self.frame = None
        data, self.held = self.held[:size], self.held[size:]
        return data


class _Counted(io.RawIOBase):
    """The same bytes, counted, with a look at the first of them before any is taken."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.stream, self.position = stream, 0
        self.head = stream.read(SAMPLE)
        self.waiting = self.head

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self.waiting or self.stream.read(len(buffer))
        data, self.waiting = data[: len(buffer)], data[len(buffer) :]
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)
