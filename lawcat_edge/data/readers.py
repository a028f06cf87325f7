"""Documents from text, JSON, CSV and Parquet files, globs and hub datasets, as streams of bounded memory.

A source is a path, a glob, or ``hub:owner/name[,config[,split]]``. Text formats may be compressed (gzip,
bzip2, xz, zstd). Records hold a string ``text`` or a list ``messages``: lines of ``.jsonl``, the objects of a
``.json`` list, rows of a ``.csv`` or ``.tsv`` with a header, rows of Parquet. A ``.txt`` file holds documents
separated by a line with one form feed; without such a line the whole file is one document. Very long
documents come in parts, so that a 100 GB file costs no more memory than a small one.
"""

from __future__ import annotations

import csv
import glob
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TextIO

from lawcat_edge.data.text_files import kind_of, open_text
from lawcat_edge.runtime.errors import LawcatError
from lawcat_edge.runtime.files import user_path
from lawcat_edge.runtime.template.chat import ChatTemplate

CHUNK = 1 << 16
"""Characters read at a time."""
PART = 1 << 18
"""Characters of the longest piece handed on; a longer document comes in several parts."""
LINE_LIMIT = 1 << 26
"""Characters of the longest JSONL line, CSV field or JSON document accepted (64 M)."""
MARK = "\ufeff"
"""A byte-order mark; in the middle of a file where such files were joined."""
HELDOUT_SHARE = 0.02
SPLITS = ("train", "heldout", "all")

_SEPARATOR = re.compile(r"(?:\A|\n)\f[ \t]*(?:\n|\Z)")


@dataclass(frozen=True)
class Part:
    """A document, or a stretch of a long one. ``last`` is true where the document ends; ``heldout`` is its
    side."""

    text: str
    last: bool
    heldout: bool


@dataclass(frozen=True)
class ChatForm:
    """How a teacher writes conversations: the source of its chat template, and its end token.

    It is compiled at the first conversation, so that a template beyond our means matters to no other data. It
    writes no start token: packing puts one before every document.
    """

    source: str
    end: str = ""

    @cached_property
    def template(self) -> ChatTemplate:
        return ChatTemplate(self.source, {"bos_token": "", "eos_token": self.end})

    def write(self, messages: list[dict[str, Any]]) -> str:
        return self.template.render(messages, add_generation_prompt=False)


def is_heldout(start_of_document: str, share: float = HELDOUT_SHARE) -> bool:
    """Whether a document belongs to the held-out split: by the hash of its text, so the same in every run
    and seed."""
    digest = hashlib.sha256(start_of_document.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def expand(sources: Sequence[str | Path]) -> list[str]:
    """Paths of ``sources`` with globs expanded, sorted within a glob; hub names stay as they are.

    Raises LawcatError for an empty list, a glob without a match and a path that is not a file.
    """
    if isinstance(sources, (str, Path)):
        sources = [sources]
    found: list[str] = []
    for source in map(str, sources):
        if source.startswith("hub:"):
            found.append(source)
            continue
        path = user_path(source)
        if path.is_file():
            found.append(str(path))
        elif path.is_dir():
            raise LawcatError(f"{source} is a folder; name its files, for example '{source}/*.txt'.")
        elif glob.has_magic(source):
            pattern = _pattern(path)
            matches = sorted(name for name in glob.glob(pattern, recursive=True) if Path(name).is_file())
            if not matches:
                raise LawcatError(f"No file matches {source!r}; check the pattern or quote it for the shell.")
            found += matches
        else:
            raise LawcatError(
                f"No data file at {source!r}; give a file, a glob, or hub:owner/name for a hub dataset."
            )
    if not found:
        raise LawcatError("No data was given; name at least one text, JSONL or Parquet file.")
    return found


def _pattern(path: Path) -> str:
    """The glob of a path whose leading folders may have brackets in their names."""
    exists, pattern = True, Path()
    for name in path.parts:
        here = Path(glob.escape(str(pattern / name))) if not pattern.parts else pattern / glob.escape(name)
        exists = exists and bool(glob.glob(str(here)))
        pattern = here if exists else pattern / name
    return str(pattern)


def _pieces_of_text(path: str) -> Iterator[tuple[str, bool]]:
    """(text, last) pieces of a form-feed separated file, each at most PART characters plus one chunk."""
    with open_text(path) as file:
        held = ""
        while True:
            chunk = file.read(CHUNK)
            if "\0" in chunk:
                raise LawcatError(f"{path} is a binary file; --data takes text, JSON, CSV or Parquet.")
            held += chunk.replace(MARK, "")
            at_end = not chunk
            while match := _SEPARATOR.search(held):
                if match.end() == len(held) and not at_end:
                    break  # the line may go on in the next chunk
                yield held[: match.start()], True
                # The newline that ends the separator may also begin the next one.
                held = held[match.end() :]
            if at_end:
                yield held, True
                return
            while len(held) > PART + 8:
                cut = _cut(held)
                yield held[:cut], False
                held = held[cut:]


def _cut(text: str) -> int:
    """Where to cut a long text: the last paragraph, line or space before PART characters, else just there."""
    for mark in ("\n\n", "\n", " "):
        # Before the mark, so that a word keeps the space in front of it and tokenises as in the whole.
        position = text.rfind(mark, PART // 2, PART)
        if position > 0:
            return position
    return PART


def _split_long(text: str) -> Iterator[tuple[str, bool]]:
    while len(text) > PART:
        cut = _cut(text)
        yield text[:cut], False
        text = text[cut:]
    yield text, True


def render_messages(messages: Any, template: ChatForm | None, where: str) -> str:
    """The text of a chat: through the teacher's template, or as ``role: content`` lines without one."""
    valid = isinstance(messages, list) and all(
        isinstance(item, dict) and isinstance(item.get("role"), str) and isinstance(item.get("content"), str)
        for item in messages
    )
    if not valid:
        raise LawcatError(
            f'{where}: "messages" must be a list of objects with the strings "role" and "content".'
        )
    if template is None:
        return "\n".join(f"{item['role']}: {item['content']}" for item in messages)
    try:
        return template.write(messages)
    except LawcatError as error:
        reason = str(error).removesuffix(".").removesuffix("; export the bundle again")
        raise LawcatError(
            f'{where} does not fit the teacher\'s chat template ({reason}); change it, or give it as "text".'
        ) from error


def _text_of(record: Any, template: ChatForm | None, where: str) -> str:
    if isinstance(record, dict):
        if isinstance(record.get("text"), str):
            return _whole(record["text"])
        if "messages" in record:
            return _whole(render_messages(record["messages"], template, where))
        if record:
            names = ", ".join(map(repr, list(record)[:8]))
            raise LawcatError(
                f'{where} has neither a string "text" nor a list "messages", but {names[:200]}; rename what '
                f"holds the text."
            )
    raise LawcatError(f'{where} has neither a string "text" nor a list "messages".')


def _whole(text: str) -> str:
    """Half a pair of UTF-16 (``"\\ud83d"``, where a text was cut) becomes U+FFFD: no tokenizer takes it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _jsonl(path: str, template: ChatForm | None) -> Iterator[str]:
    with open_text(path) as file:
        for where, record in _json_lines(file, path):
            yield _text_of(record, template, where)


def _json_lines(file: TextIO, path: str, number: int = 0) -> Iterator[tuple[str, Any]]:
    while line := file.readline(LINE_LIMIT):
        number += 1
        if len(line) >= LINE_LIMIT:
            raise LawcatError(f"{path}:{number} is longer than {LINE_LIMIT:,} characters; split it.")
        line = line.strip().strip(MARK)
        if not line:
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            raise LawcatError(f"{path}:{number} is not valid JSON; write one object a line.") from None
        yield f"{path}:{number}", record


def _json(path: str, template: ChatForm | None) -> Iterator[str]:
    """A ``.json`` file: a list of records, one record, or lines of them (as many such files are)."""
    with open_text(path) as file:
        first = file.readline(LINE_LIMIT).strip().strip(MARK)
    try:
        by_lines = isinstance(json.loads(first), dict)
    except (ValueError, RecursionError):
        by_lines = False
    if by_lines:
        yield from _jsonl(path, template)
        return
    with open_text(path) as file:
        text = file.read(LINE_LIMIT)
    if len(text) >= LINE_LIMIT:
        raise LawcatError(
            f"{path} is longer than {LINE_LIMIT:,} characters; write it as .jsonl, one object a line."
        )
    try:
        found = json.loads(text.strip().strip(MARK))
    except (ValueError, RecursionError):
        raise LawcatError(f"{path} is not valid JSON; mend it, or name it .txt if it is text.") from None
    for number, record in enumerate(found if isinstance(found, list) else [found], 1):
        yield _text_of(record, template, f"{path}, record {number},")


def _csv(path: str, kind: str) -> Iterator[str]:
    csv.field_size_limit(LINE_LIMIT)
    with open_text(path) as file:
        rows = csv.reader(file, delimiter="\t" if kind == ".tsv" else ",")
        try:
            header = [name.strip().strip(MARK) for name in next(rows, [])]
            if "text" not in header:
                names = ", ".join(map(repr, header[:8]))[:200] or "nothing"
                raise LawcatError(
                    f'{path} has no column "text" in its first line, but {names}; rename the column that '
                    f"holds the text."
                )
            column = header.index("text")
            for row in rows:
                if len(row) > column:
                    yield row[column]
        except csv.Error as error:
            raise LawcatError(f"{path}:{rows.line_num} cannot be read as CSV ({error}); mend it.") from None


def _parquet(path: str, template: ChatForm | None) -> Iterator[str]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise LawcatError(f"Reading {path} needs pyarrow; install lawcat-edge[data].") from None
    try:
        with pyarrow.parquet.ParquetFile(path, memory_map=True) as file:
            columns = [name for name in ("text", "messages") if name in file.schema_arrow.names]
            if not columns:
                raise LawcatError(f'{path} has neither a column "text" nor a column "messages".')
            row = 0
            for batch in file.iter_batches(batch_size=64, columns=columns):
                for record in batch.to_pylist():
                    row += 1
                    yield _text_of(record, template, f"{path} row {row}")
    except (pyarrow.ArrowException, OSError) as error:
        raise LawcatError(f"{path} cannot be read as Parquet: {str(error).splitlines()[0]}") from None


def _hub(source: str, template: ChatForm | None) -> Iterator[str]:
    try:
        import datasets
    except ImportError:
        raise LawcatError(
            f"{source} needs the package datasets; pip install datasets, or give local files."
        ) from None
    if int(datasets.__version__.split(".")[0]) < 4:  # older ones run code that comes with a dataset
        raise LawcatError(f"datasets {datasets.__version__} is too old for {source}; take 4 or newer.")
    name, *rest = source.removeprefix("hub:").split(",")
    config = rest[0] if rest and rest[0] else None
    split = rest[1] if len(rest) > 1 else "train"
    try:
        rows = datasets.load_dataset(name, config, split=split, streaming=True)
    except Exception as error:
        # datasets raises a dozen unrelated types for a wrong name, a wrong config and no network.
        raise LawcatError(
            f"The hub dataset {name!r} cannot be opened: {str(error).splitlines()[0]}"
        ) from error
    for number, record in enumerate(rows, 1):
        yield _text_of(record, template, f"{source} row {number}")


def read_parts(
    source: str,
    split: str = "all",
    heldout_share: float = HELDOUT_SHARE,
    chat_template: ChatForm | None = None,
) -> Iterator[Part]:
    """The documents of one source in order, as parts of at most about PART characters.

    source: a path or ``hub:...`` as ``expand`` returns it. split: ``train``, ``heldout`` or ``all``.
    chat_template: how ``messages`` become text; None writes ``role: content`` lines.
    """
    assert split in SPLITS, split
    kind = "hub" if source.startswith("hub:") else kind_of(source)
    texts: Iterable[str] | None = None
    if kind == "hub":
        texts = _hub(source, chat_template)
    elif kind in (".jsonl", ".ndjson"):
        texts = _jsonl(source, chat_template)
    elif kind == ".json":
        texts = _json(source, chat_template)
    elif kind in (".csv", ".tsv"):
        texts = _csv(source, kind)
    elif kind in (".parquet", ".pq"):
        texts = _parquet(source, chat_template)
    pieces: Iterable[tuple[str, bool]]
    pieces = _pieces_of_text(source) if texts is None else (p for text in texts for p in _split_long(text))
    first, heldout = True, False
    for text, last in pieces:
        if first:
            heldout = is_heldout(text, heldout_share)
        # An empty last part still ends its document; a document that is empty as a whole is dropped.
        if (text.strip() or not first) and split in ("all", "heldout" if heldout else "train"):
            yield Part(text, last, heldout)
        first = last
