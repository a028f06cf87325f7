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

HELP = "/save FILE  /load FILE  /reset  /stats  /exit  (Ctrl-C stops an answer)"


def chat(
    model: Annotated[str, typer.Argument(help="Bundle folder.")],
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
    speculate: Annotated[str | None, typer.Option(help=SPECULATE_HELP)] = None,
    load_snapshot: Annotated[Path | None, typer.Option(help="Go on with this saved conversation.")] = None,
    threads: Annotated[int | None, typer.Option(help="Processor threads; default: physical cores.")] = None,
) -> None:
    """Talk with MODEL. The state keeps its size however long the conversation gets.

    How tokens are chosen is for the bundle's generation_config.json where no option says it.

    In the conversation: /save FILE, /load FILE, /reset, /stats, /exit; // says a line that begins with /.

    Examples:

      lawcat-edge chat bundle

      lawcat-edge chat bundle --system "Answer in one sentence." --temperature 0.7
    """
    from lawcat_edge.runtime import Model

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
    print(f"{loaded.bundle.manifest.name}: {HELP}", file=sys.stderr)
    _Conversation(loaded, system, options).run()


class _Conversation:
    def __init__(self, model: Model, system: str | None, options: dict[str, Any]) -> None:
        self.model, self.system, self.options = model, system, options
        self.last: Any = None

    def run(self) -> None:
        while True:
            try:
                line = input("> " if sys.stdin.isatty() else "").strip("\ufeff \t\r\n")
            except EOFError:
                return
            except UnicodeDecodeError:
                print("The input is not UTF-8 text; type or convert it again.", file=sys.stderr)
                continue
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
        context = self.model.context if len(self.model.context) else None
        running = self.model.chat(line, system=self.system, context=context, **self.options)
        try:
            for text in running:
                print(text, end="", flush=True)
        except KeyboardInterrupt:
            running.close()
        print()
        self.last = running.stats

    def command(self, name: str, argument: str | None = None) -> None:
        from lawcat_edge.runtime.files import user_path

        if name in ("/save", "/load") and argument is None:
            raise LawcatError(f"{name} needs a file: {name} talk.state")
        if name == "/save":
            assert argument is not None
            self.model.snapshot(user_path(argument))
            print(f"Saved to {argument}.", file=sys.stderr)
        elif name == "/load":
            assert argument is not None
            context = self.model.restore(user_path(argument))
            print(f"Back at {len(context):,} tokens, {len(context.messages)} messages.", file=sys.stderr)
        elif name == "/reset":
            self.model.reset()
            print("A new conversation.", file=sys.stderr)
        elif name == "/stats":
            from lawcat_edge.commands.generate import show_stats

            if self.last is None:
                print("Nothing was said yet.", file=sys.stderr)
            else:
                show_stats(self.last)
        else:
            raise LawcatError(
                f"There is no {name}; the commands are: {HELP}. To say a line that begins with /, write //."
            )
