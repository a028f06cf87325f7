"""``lawcat-edge chat`` as people use it: in a terminal (a pseudo-terminal here), and with documents."""

from __future__ import annotations

import io
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console
from tiny_bundle import build_tiny_bundle
from typer.testing import CliRunner

from lawcat_edge.cli import app
from lawcat_edge.commands.reading import about, read_ahead
from lawcat_edge.commands.terminal import MarkdownAnswer, printable, split_blocks
from lawcat_edge.runtime import Model
from lawcat_edge.runtime.errors import LawcatError

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = ["--max-new-tokens", "6", "--temperature", "0"]
PASTE = "\x1b[200~{}\x1b[201~"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_bundle(tmp_path_factory.mktemp("bundle") / "tiny", seed=3, eos=[])


class Terminal:
    """The command in a pseudo-terminal of 60 columns; ``seen`` is all that it wrote."""

    def __init__(self, folder: Path, *words: str, **environment: str) -> None:
        import fcntl
        import pty
        import struct
        import termios

        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 60, 0, 0))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "lawcat_edge", "chat", *words],
            stdin=slave, stdout=slave, stderr=slave, cwd=folder, start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
            env={
                **os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1",
                **environment,
            },
        )  # fmt: skip
        os.close(slave)
        self.seen = ""

    def wait(self, text: str, seconds: float = 60) -> None:
        """Until the terminal has shown `text`; what came until then is forgotten."""
        end = time.monotonic() + seconds
        while text not in self.seen:
            assert time.monotonic() < end, self.seen
            self.read(0.2)
        self.seen = self.seen.partition(text)[2]

    def prompt(self) -> None:
        """Until it waits for a question: pasting is turned on then."""
        self.wait("\x1b[?2004h")

    def read(self, seconds: float) -> bool:
        if not select.select([self.master], [], [], seconds)[0]:
            return True
        try:
            data = os.read(self.master, 65536)
        except OSError:  # Linux, when the other end is closed
            return False
        self.seen += data.decode("utf-8", "replace")
        return bool(data)

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def end(self, seconds: float = 60) -> int:
        end = time.monotonic() + seconds
        while self.read(1) and self.process.poll() is None:
            assert time.monotonic() < end, self.seen
        return self.process.wait(30)


@pytest.fixture
def terminal(bundle: Path, tmp_path: Path) -> Iterator[Terminal]:
    pytest.importorskip("pty")
    opened = Terminal(tmp_path, str(bundle), *OPTIONS)
    yield opened
    if opened.process.poll() is None:
        opened.process.send_signal(signal.SIGKILL)
        opened.process.wait()
    os.close(opened.master)


def asked(folder: Path, bundle: Path) -> list[str]:
    messages = Model.load(bundle, threads=1).restore(folder / "talk.state").messages
    return [message["content"] for message in messages if message["role"] == "user"]


def test_a_pasted_text_is_one_question_and_keys_edit(
    terminal: Terminal, bundle: Path, tmp_path: Path
) -> None:
    terminal.prompt()
    terminal.type(PASTE.format("first line\nsecond line"))
    terminal.type(" end\r")
    terminal.prompt()
    terminal.type("ac\x1b[Db\r")  # left, and a letter between
    terminal.prompt()
    terminal.type("one\x1b\rtwo\r")  # Alt-Enter
    terminal.prompt()
    terminal.type("\x1b[A\x1b[A\x1b[A\r")  # up to the one before: its two lines are passed too
    terminal.prompt()
    terminal.type("/save talk.state\r")
    terminal.wait("Saved to")
    terminal.prompt()  # an end that is typed before it asks is the line editor's to lose
    terminal.type("\x04")
    assert terminal.end() == 0
    assert asked(tmp_path, bundle) == ["first line\nsecond line end", "abc", "one\ntwo", "abc"]
    assert [path.name for path in tmp_path.iterdir()] == ["talk.state"]  # no history unless asked for


def test_ctrl_c_clears_the_line_and_help_helps(terminal: Terminal, bundle: Path, tmp_path: Path) -> None:
    terminal.prompt()
    terminal.type("not this")
    terminal.wait("this")
    terminal.type("\x03")
    terminal.prompt()
    terminal.type("\x03")
    terminal.wait("Ctrl-D or /exit ends")
    terminal.type("/help\r")
    terminal.wait("/read FILE")
    terminal.wait("pasted text is one question")
    terminal.type("this\r")  # perhaps before it asks again
    terminal.prompt()
    terminal.type("/save talk.state\r")
    terminal.wait("Saved to")
    terminal.prompt()
    terminal.type("/exit\r")
    assert terminal.end() == 0
    assert asked(tmp_path, bundle) == ["this"]


def test_ctrl_c_stops_an_answer_and_the_conversation_goes_on(bundle: Path, tmp_path: Path) -> None:
    terminal = Terminal(tmp_path, str(bundle), "--max-new-tokens", "1000000", "--temperature", "0", "--plain")
    terminal.prompt()
    terminal.type("go\r")
    terminal.wait("\x1b[?2004l")  # the question is read
    while not terminal.seen.strip():  # the answer comes
        terminal.read(1)
    terminal.type("\x03")
    terminal.prompt()
    terminal.type("/stats\r")
    terminal.wait("written at")
    terminal.prompt()
    terminal.type("/exit\r")
    assert terminal.end() == 0
    os.close(terminal.master)


def test_the_history_is_kept_where_the_user_says(bundle: Path, tmp_path: Path) -> None:
    for turn in ("typed before", "\x1b[A"):
        terminal = Terminal(tmp_path, str(bundle), *OPTIONS, "--history", "asked.txt")
        terminal.prompt()
        terminal.type(f"{turn}\r")
        terminal.prompt()
        terminal.type("/save talk.state\r")
        terminal.wait("Saved to")
        terminal.prompt()
        terminal.type("\x04")
        assert terminal.end() == 0
        os.close(terminal.master)
        assert asked(tmp_path, bundle) == ["typed before"]
        (tmp_path / "asked.txt").write_text(
            "".join(line for line in (tmp_path / "asked.txt").open() if "save" not in line)
        )


def test_a_document_is_read_before_the_question(bundle: Path, tmp_path: Path) -> None:
    text = "The mill burned in 1871.\n\n" + "It was rebuilt. " * 100
    (tmp_path / "report.txt").write_text(text)
    expected = Model.load(bundle, threads=1).chat(about(text, "When?"), max_new_tokens=6)
    answer = expected.text
    question = "When?\n/stats\n"
    result = CliRunner().invoke(
        app, ["chat", str(bundle), *OPTIONS, "--file", str(tmp_path / "report.txt")], input=question
    )
    assert result.stdout == answer + "\n"
    assert "Read report.txt: 1" in result.stderr
    read = int(re.search(r"\[([\d,]+) tokens read", result.stderr)[1].replace(",", ""))  # type: ignore[index]
    assert read < 60 < expected.stats.prompt_tokens  # with the question, only what follows the document
    typed = f"/read {tmp_path / 'report.txt'}\n{question}"
    assert CliRunner().invoke(app, ["chat", str(bundle), *OPTIONS], input=typed).stdout == answer + "\n"


def test_documents_in_the_middle_of_a_conversation(bundle: Path) -> None:
    ours, theirs = (Model.load(bundle, threads=1) for _ in range(2))
    for model in (ours, theirs):
        # One token, a letter: the text of several need not be that of their reply.
        model.chat("Hello", system="Be brief.", max_new_tokens=1, stop=()).result()
        assert model.context.mark is not None
    assert read_ahead(ours, "A text. " * 30, "Be brief.", lambda done, of: None) > 200
    assert read_ahead(ours, about("A text. " * 30, "Another."), "Be brief.", lambda done, of: None) < 20
    message = about(about("A text. " * 30, "Another."), "And?")
    results = [
        model.chat(message, context=model.context, max_new_tokens=8).result() for model in (ours, theirs)
    ]
    assert results[0].text == results[1].text
    assert ours.context.messages == theirs.context.messages
    assert ours.context.tokens == theirs.context.tokens
    assert results[0].stats.prompt_tokens < 60 < results[1].stats.prompt_tokens


def test_a_reading_that_is_broken_off_leaves_the_conversation(bundle: Path) -> None:
    model = Model.load(bundle, threads=1)
    model.chat("Hello", max_new_tokens=4).result()
    before = model.context.tokens[:]

    def stop(done: int, of: int) -> None:
        if done > 600:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        read_ahead(model, "word " * 500, None, stop)
    assert model.context.tokens == before
    expected = Model.load(bundle, threads=1)
    expected.chat("Hello", max_new_tokens=4).result()
    assert model.chat("More", max_new_tokens=4).text == expected.chat("More", max_new_tokens=4).text


def test_slips_with_documents(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Some text.")
    lines = f"/read\n/read {tmp_path / 'none'}\n/read {tmp_path / 'a.txt'}\n/save {tmp_path / 's'}\n"
    result = CliRunner().invoke(app, ["chat", str(bundle), *OPTIONS], input=lines)
    for words in (
        "/read needs a file: /read report.txt",
        "Cannot read",
        "Ask your question about the text first",
    ):
        assert words in result.stderr
    assert not (tmp_path / "s").exists()
    (tmp_path / "p.pdf").write_bytes(b"%PDF-1.7\n")
    with pytest.raises(LawcatError, match="convert it to text first"):
        CliRunner().invoke(
            app, ["chat", str(bundle), "--file", str(tmp_path / "p.pdf")], catch_exceptions=False
        )


def render(pieces: list[str], width: int = 40) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=False, color_system=None)
    answer = MarkdownAnswer(console)
    for piece in pieces:
        answer.write(piece)
    answer.end()
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_answers_are_rendered_the_same_in_any_pieces() -> None:
    text = "# Head\n\nSome **bold** words that are long enough to wrap.\n\n- one\n- two\n\n"
    text += "```\na  =  1\n\nb\n```\n\nEnd."
    whole = render([text])
    assert "**" not in whole
    assert "```" not in whole
    assert "a  =  1" in whole
    assert all(len(line) <= 40 for line in whole.splitlines())
    assert not any(line.startswith(("ong", "rap")) for line in whole.splitlines())  # words stay whole
    by_letter = render(list(text))
    assert [line.strip() for line in by_letter.splitlines() if line.strip()] == [
        line.strip() for line in whole.splitlines() if line.strip()
    ]


def test_blocks_are_cut_at_empty_lines_outside_of_code() -> None:
    assert split_blocks("one\n\ntwo") == ("one\n\n", "two")
    assert split_blocks("one\ntwo") == ("", "one\ntwo")
    assert split_blocks("```\na\n\nb") == ("", "```\na\n\nb")
    assert split_blocks("```\na\n\nb\n```\n\nc") == ("```\na\n\nb\n```\n\n", "c")
    assert split_blocks("- a\n\n  still a") == ("", "- a\n\n  still a")


def test_what_steers_a_terminal_is_left_out() -> None:
    assert printable("a\x1b[2Jb\tc\x07\n\x9b1mé🦉") == "a[2Jb\tc\n1mé🦉"
    assert "\x1b" not in render(["\x1b]0;title\x07 text"])
