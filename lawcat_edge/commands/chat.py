"""``lawcat-edge chat``: a conversation in the terminal."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lawcat_edge.commands.generate import SPECULATE_HELP, speculation
from lawcat_edge.runtime.errors import LawcatError

if TYPE_CHECKING:
    from lawcat_edge.runtime import Model

COMMANDS = {
    "/read FILE": "read a text before your next question about it",
    "/save FILE": "save the conversation's state",
    "/load FILE": "go on with a saved one",
    "/reset": "begin a new conversation",
    "/stats": "tokens, speed and memory of the last answer",
    "/help": "this list",
    "/exit": "end (so does Ctrl-D)",
    "//...": "say a line that begins with /",
}
KEYS = """\
Enter sends, Alt-Enter begins a new line, pasted text is one question; the arrow keys bring earlier
questions back; Ctrl-C stops an answer, and clears the line at the prompt."""


def chat(
    model: Annotated[str, typer.Argument(help="Bundle folder, or owner/name on the hub.")],
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 512,
    temperature: Annotated[float | None, typer.Option(help="0 always takes the most likely token.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Keep the k most likely tokens (0: all).")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Keep the fewest tokens of this total probability.")
    ] = None,
    min_p: Annotated[
        float | None, typer.Option(help="Drop tokens less likely than this times the best.")
    ] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="Above 1 discourages repeating.")] = None,
    seed: Annotated[int | None, typer.Option(help="Same seed, same answers.")] = None,
    file: Annotated[
        Path | None, typer.Option(help="A UTF-8 text to read first; your first question is about it.")
    ] = None,
    speculate: Annotated[str | None, typer.Option(help=SPECULATE_HELP)] = None,
    load_snapshot: Annotated[Path | None, typer.Option(help="Go on with this saved conversation.")] = None,
    history: Annotated[
        Path | None, typer.Option(help="Keep your questions in this file, for the arrow keys next time.")
    ] = None,
    plain: Annotated[
        bool, typer.Option("--plain", help="Write answers as they are, not rendered as Markdown.")
    ] = False,
    threads: Annotated[int | None, typer.Option(help="Processor threads; default: physical cores.")] = None,
) -> None:
    """Talk with MODEL.

    How tokens are chosen is for the bundle's generation_config.json where no option says it.

    In the conversation, /help lists its commands: /read, /save, /load, /reset, /stats, /exit.

    Examples:

      lawcat-edge chat bundle

      lawcat-edge chat bundle --file report.txt

      lawcat-edge chat bundle --system "Answer in one sentence." --temperature 0.7
    """
    from lawcat_edge.commands.generate import read_text
    from lawcat_edge.commands.terminal import at_terminal
    from lawcat_edge.runtime import Model

    document = read_text(file) if file else None  # before the slow steps
    loaded = Model.load(model, threads=threads)
    assert loaded.template is not None  # says at once when the bundle has none
    if load_snapshot:
        loaded.restore(load_snapshot)
    given = {
        "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p,
        "repetition_penalty": repetition_penalty, "seed": seed,
    }  # fmt: skip
    chosen = {name: value for name, value in given.items() if value is not None} | speculation(speculate)
    options = {"max_new_tokens": max_new_tokens, **asdict(loaded.sampling_defaults()), **chosen}
    talk = _Conversation(loaded, system, options, rendered=at_terminal() and not plain)
    print(f"{loaded.bundle.manifest.name}: /help for help", file=sys.stderr)
    if document is not None:
        assert file is not None
        talk.read(document, file.name)
    talk.run(history)


class _Conversation:
    """rendered: answers are shown as Markdown."""

    def __init__(self, model: Model, system: str | None, options: dict[str, Any], rendered: bool) -> None:
        self.model, self.system, self.options, self.rendered = model, system, options, rendered
        self.last: Any = None
        self.document: str | None = None  # what the next question is about

    def run(self, history: Path | None) -> None:
        from lawcat_edge.commands.terminal import at_terminal, questions

        ask, cleared = questions(history), False
        while True:
            try:
                line = ask().strip("\ufeff \t\r\n")
            except EOFError:
                return
            except KeyboardInterrupt:
                if not at_terminal():
                    raise
                if cleared:
                    print("Ctrl-D or /exit ends the conversation.", file=sys.stderr)
                cleared = True
                continue
            except UnicodeDecodeError:
                print("The input is not UTF-8 text; type or convert it again.", file=sys.stderr)
                continue
            cleared = False
            if line in ("/exit", "/quit"):
                return
            if not line:
                continue
            try:
                if line.startswith("/") and not line.startswith("//"):
                    self.command(*line.split(maxsplit=1))
                else:
                    self.answer(line.removeprefix("/") if line.startswith("//") else line)
            except LawcatError as error:  # a slip in a conversation does not end it
                print(error, file=sys.stderr)

    def answer(self, line: str) -> None:
        from lawcat_edge.commands.reading import about
        from lawcat_edge.commands.terminal import MarkdownAnswer, PlainAnswer

        context = self.model.context if len(self.model.context) else None
        message = line if self.document is None else about(self.document, line)
        running = self.model.chat(message, system=self.system, context=context, **self.options)
        self.document = None
        shown = MarkdownAnswer() if self.rendered else PlainAnswer()
        try:
            for text in running:
                shown.write(text)
        except KeyboardInterrupt:
            running.close()
        finally:
            shown.end()
        self.last = running.stats

    def read(self, document: str, name: str) -> None:
        """Read a document for the next question."""
        from lawcat_edge.commands.reading import about, read_ahead, reading_progress

        if self.document is not None:  # two documents for one question
            document = about(self.document, document)
        with reading_progress(name) as progress:
            read = read_ahead(self.model, document, self.system, progress)
        self.document = document
        if not read:
            print(f"{name} is read with your next question.", file=sys.stderr)

    def command(self, name: str, argument: str | None = None) -> None:
        from lawcat_edge.commands.generate import read_text, show_stats
        from lawcat_edge.runtime.files import user_path

        if name in ("/save", "/load", "/read") and argument is None:
            raise LawcatError(
                f"{name} needs a file: {name} {'report.txt' if name == '/read' else 'talk.state'}"
            )
        if name == "/read":
            assert argument is not None
            path = user_path(argument)
            try:
                self.read(read_text(path), path.name)
            except KeyboardInterrupt:
                print(f"{argument} was not read; the conversation is as before.", file=sys.stderr)
        elif name == "/save":
            assert argument is not None
            if self.document is not None:
                raise LawcatError("Ask your question about the text first; then save the conversation.")
            self.model.snapshot(user_path(argument))
            print(f"Saved to {argument}.", file=sys.stderr)
        elif name == "/load":
            assert argument is not None
            context = self.model.restore(user_path(argument))
            self.document = None
            print(f"Back at {len(context):,} tokens, {len(context.messages)} messages.", file=sys.stderr)
        elif name == "/reset":
            self.model.reset()
            self.document = None
            print("A new conversation.", file=sys.stderr)
        elif name == "/stats":
            if self.last is None:
                print("Nothing was said yet.", file=sys.stderr)
            else:
                show_stats(self.last)
        elif name == "/help":
            lines = [f"{command:12} {does}" for command, does in COMMANDS.items()]
            print("\n".join([*lines, KEYS]), file=sys.stderr)
        else:
            raise LawcatError(
                f"There is no {name}; /help lists the commands. To say a line that begins with /, write //."
            )
