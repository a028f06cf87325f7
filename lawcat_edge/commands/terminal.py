"""A conversation's two ends in a terminal: questions typed with an editor's comfort, answers as Markdown."""

from __future__ import annotations

import re
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

PROMPT = "> "
WIDEST = 100  # columns of an answer: longer lines are hard to read
_FENCE = re.compile(r"^ {0,3}(```+|~~~+)", re.MULTILINE)


def at_terminal() -> bool:
    return sys.stdin.isatty() and sys.stdout.isatty()


def questions(history: Path | None = None) -> Callable[[], str]:
    """A function that asks for the next question; it raises EOFError at the end, KeyboardInterrupt on Ctrl-C.

    In a terminal: line editing, the arrow keys bring back earlier questions, what is pasted is one question
    whatever lines it has, and Alt-Enter begins a new line. history: a file that keeps questions for
    the next time; without one nothing is written. Elsewhere: a line is a question.
    """
    if not at_terminal():
        return lambda: input(PROMPT if sys.stdin.isatty() else "")
    try:
        return _edited(history)
    except ImportError:  # readline, where Python has it, is enough for editing and pasting
        import contextlib

        with contextlib.suppress(ImportError):
            import readline  # noqa: F401
        return lambda: input(PROMPT)


def _edited(history: Path | None) -> Callable[[], str]:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import FileHistory, InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()

    @keys.add("enter")
    def _(event: Any) -> None:
        event.current_buffer.validate_and_handle()

    # Not Ctrl-J too: what is typed ahead while an answer comes has it for Enter.
    @keys.add("escape", "enter")
    def _(event: Any) -> None:
        event.current_buffer.insert_text("\n")

    session: PromptSession[str] = PromptSession(
        multiline=True,
        key_bindings=keys,
        history=FileHistory(str(history)) if history else InMemoryHistory(),
        prompt_continuation=lambda width, *_: " " * width,
    )
    return lambda: session.prompt(PROMPT)


class PlainAnswer:
    """Writes an answer as it comes, for files, pipes and programs."""

    def write(self, text: str) -> None:
        print(text, end="", flush=True)

    def end(self) -> None:
        print()


class MarkdownAnswer:
    """Writes an answer as Markdown, wrapped between words: a block is shown while it grows, and then stays.

    Only the block that is being written is drawn again, so an answer may be longer than the screen. Control
    characters are left out: what a model writes must not steer a terminal.
    """

    def __init__(self, console: Any | None = None) -> None:
        from rich.console import Console

        self.console = console or Console()
        if self.console.width > WIDEST:
            self.console.width = WIDEST
        self.block = ""
        self.live: Any = None

    def write(self, text: str) -> None:
        from rich.live import Live

        self.block += printable(text)
        done, self.block = split_blocks(self.block)
        if done:
            self._stop()
            self._print(done)
        if self.block.strip():
            if self.live is None:
                self.live = Live(console=self.console, transient=True, refresh_per_second=8)
                self.live.start()
            self.live.update(self._markdown(self.block))

    def end(self) -> None:
        self._stop()
        if self.block.strip():
            self._print(self.block)
        self.block = ""
        self.console.print()

    def _stop(self) -> None:
        if self.live is not None:
            self.live.stop()
            self.live = None

    def _print(self, text: str) -> None:
        self.console.print(self._markdown(text))

    def _markdown(self, text: str) -> Any:
        from rich.markdown import Markdown

        # A link shows where it leads: its text is the model's word alone.
        return Markdown(text, hyperlinks=False)


def printable(text: str) -> str:
    """The text without the characters that control a terminal or hide what it says."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs"))


def split_blocks(text: str) -> tuple[str, str]:
    """(blocks of Markdown that are whole, the rest): cut at the last empty line outside of fenced code."""
    cut = 0
    for match in re.finditer(r"\n[ \t]*\n+", text):
        if len(_FENCE.findall(text[: match.start() + 1])) % 2 == 0:
            cut = match.end()
    # Spaces at the start of the rest may make it part of the list above: they stay together.
    if cut < len(text) and text[cut] in " \t":
        return "", text
    return text[:cut], text[cut:]
