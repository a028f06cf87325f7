"""Documents from text, JSONL and Parquet files, globs and hub datasets, read as streams of bounded memory.

A source is a path, a glob, or ``hub:owner/name[,config[,split]]``. A ``.txt`` file holds documents
separated by a line with one form feed; without such a line the whole file is one document. Very long
documents come in parts, so that a 100 GB file costs no more memory than a small one.
"""

from __future__ import annotations

import glob
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lawcat_edge.runtime.errors import LawcatError
from lawcat_edge.runtime.template import ChatTemplate

CHUNK = 1 << 16
"""Characters read at a time."""
PART = 1 << 18
"""Characters of the longest piece handed on; a longer document comes in several parts."""
LINE_LIMIT = 1 << 26
"""Characters of the longest JSONL line accepted (64 M)."""
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
        if glob.has_magic(source) and not Path(source).exists():
            matches = sorted(name for name in glob.glob(source, recursive=True) if Path(name).is_file())
            if not matches:
                raise LawcatError(f"No file matches {source!r}; check the pattern or quote it for the shell.")
            found += matches
        elif Path(source).is_file():
            found.append(source)
        else:
            raise LawcatError(
                f"No data file at {source!r}; give a file, a glob, or hub:owner/name for a hub dataset."
            )
    if not found:
        raise LawcatError("No data was given; name at least one text, JSONL or Parquet file.")
    return found


def _pieces_of_text(path: str) -> Iterator[tuple[str, bool]]:
    """(text, last) pieces of a form-feed separated file, each at most PART characters plus one chunk."""
    try:
        with open(path, encoding="utf-8", errors="strict") as file:
            held = ""
            while True:
                chunk = file.read(CHUNK)
                if "\0" in chunk:
                    raise LawcatError(f"{path} is a binary file; --data takes UTF-8 text, JSONL or Parquet.")
                held += chunk
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
    except UnicodeDecodeError as error:
        raise LawcatError(
            f"{path} is not valid UTF-8 (byte {error.start}); convert it to UTF-8 first."
        ) from None


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
            return record["text"]
        if "messages" in record:
            return render_messages(record["messages"], template, where)
    raise LawcatError(f'{where} has neither a string "text" nor a list "messages".')


def _jsonl(path: str, template: ChatForm | None) -> Iterator[str]:
    try:
        with open(path, encoding="utf-8", errors="strict") as file:
            number = 0
            while line := file.readline(LINE_LIMIT):
                number += 1
                if len(line) >= LINE_LIMIT:
                    raise LawcatError(f"{path}:{number} is longer than {LINE_LIMIT:,} characters; split it.")
                if not line.strip():
                    continue
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError):
                    raise LawcatError(
                        f"{path}:{number} is not valid JSON; write one object a line."
                    ) from None
                yield _text_of(record, template, f"{path}:{number}")
    except UnicodeDecodeError as error:
        raise LawcatError(
            f"{path} is not valid UTF-8 (byte {error.start}); convert it to UTF-8 first."
        ) from None


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
    suffix = Path(source).suffix.lower()
    pieces: Iterable[tuple[str, bool]]
    if source.startswith("hub:"):
        pieces = (piece for text in _hub(source, chat_template) for piece in _split_long(text))
    elif suffix in (".jsonl", ".ndjson"):
        pieces = (piece for text in _jsonl(source, chat_template) for piece in _split_long(text))
    elif suffix in (".parquet", ".pq"):
        pieces = (piece for text in _parquet(source, chat_template) for piece in _split_long(text))
    else:
        pieces = _pieces_of_text(source)
    first, heldout = True, False
    for text, last in pieces:
        if first:
            heldout = is_heldout(text, heldout_share)
        # An empty last part still ends its document; a document that is empty as a whole is dropped.
        if (text.strip() or not first) and split in ("all", "heldout" if heldout else "train"):
            yield Part(text, last, heldout)
        first = last
