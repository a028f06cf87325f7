"""A document that is read before the question about it comes: with a progress bar, into the conversation."""

from __future__ import annotations

import secrets
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from lawcat_edge.commands.progress import reporter

if TYPE_CHECKING:
    from collections.abc import Callable

    from lawcat_edge.runtime import Model

PIECE = 512  # tokens between two looks at the bar


def about(document: str, question: str) -> str:
    """The message that asks something about a document."""
    return f"{document}\n\n{question}"


def read_ahead(model: Model, document: str, system: str | None, progress: Callable[[int, int], None]) -> int:
    """Read the beginning of the message ``about(document, ...)``; the number of tokens that were read.

    The message is to be sent with ``model.chat(about(document, question))``; what was read is recognised by
    its text and not read again. 0: nothing could be read ahead, and the message is read as a whole later, as
    where an answer was broken off before or the template writes messages in another way. progress: called
    with (tokens read, all tokens). Ctrl-C leaves the conversation as it was.
    """
    from lawcat_edge.runtime.generate.context import Mark

    # A copy, since a state cannot be wound back.
    context = model.context.fork() if len(model.context) else model.new_context()
    history = [dict(message) for message in context.messages]
    if system is not None and not history:
        history.append({"role": "system", "content": system})
    end = secrets.token_hex(16)  # of the document, in the text of the template
    text = model.template.render([*history, {"role": "user", "content": about(document, end)}])
    begin, found, _ = text.partition(end)
    known = context.mark.length if context.mark is not None and context.mark.begins(begin) else 0
    if not found or (len(context) and not known):
        return 0
    tokens = model.tokenizer.encode(begin[known:], special=False)
    base = context.has_base
    before = model.context
    try:
        for start in range(0, len(tokens), PIECE):
            progress(start, len(tokens))
            context = model.read(tokens[start : start + PIECE], context)
    except BaseException:
        model.context = before
        raise
    progress(len(tokens), len(tokens))
    context.messages, context.mark, context.has_base = history[:], Mark.of(begin), base
    return len(tokens)


@contextmanager
def reading_progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar for ``read_ahead`` in a terminal, and one line at the end."""
    begun, total = time.monotonic(), 0
    with reporter(lines=False, transient=True) as bar:

        def show(done: int, of: int) -> None:
            nonlocal total
            total = of
            bar(f"Reading {what}", done, of, "tokens")

        yield show
    seconds = time.monotonic() - begun
    if total:
        print(f"Read {what}: {total:,} tokens in {seconds:,.1f} s.", file=sys.stderr)
