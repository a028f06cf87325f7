"""The command line: registers the commands and turns every error into one sentence and an exit code.

0 done · 1 a check failed · 2 the user's mistake · 130 interrupted. LAWCAT_EDGE_DEBUG=1 shows tracebacks.
A command's module is imported only when that command runs.
"""

from __future__ import annotations

import functools
import importlib
import os
import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperGroup
from typer.main import get_command_from_info
from typer.models import CommandInfo

try:  # newer versions of typer carry a click of their own, older ones need the package
    from typer._click.exceptions import ClickException
except ImportError:
    from click import ClickException  # type: ignore[assignment]

from lawcat_edge import __version__
from lawcat_edge.commands.output import write_any_text
from lawcat_edge.explain import explain

INTERRUPTED = 130
PLACES = ("model", "teacher", "adapter", "reference")  # options that are a path or a name
COMMANDS = {
    "demo": "The main job on the embedded teacher, start to end.",
    "distill": "Train an adapter: a teacher's attention becomes linear.",
    "calibrate": "Ranges of activations for linear layers with fixed 8-bit activations.",
    "export": "A teacher and an adapter become a bundle.",
    "verify": "Is a bundle whole, and does it compute what it should?",
    "info": "What a bundle or an adapter is, and where it comes from.",
    "generate": "Continue or answer a prompt from a bundle.",
    "chat": "A conversation in the terminal.",
    "serve": "OpenAI's API on this machine, from a bundle.",
    "eval": "Retrieval and perplexity of a bundle, an adapter or a teacher.",
    "compare": "Accuracy against size of several schemes.",
    "bench": "Speed and memory of a bundle by length of text.",
}


class Lazy(TyperGroup):
    """A group that knows its commands' names and imports one only to run it or to show its help."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in COMMANDS:
            return None
        function = getattr(importlib.import_module(f"lawcat_edge.commands.{cmd_name}"), cmd_name)
        info = CommandInfo(name=cmd_name, callback=_at_home(function), help=function.__doc__)
        return get_command_from_info(info, pretty_exceptions_short=True, rich_markup_mode=None)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


_interrupted: list[tuple[str, dict[str, Any]]] = []
"""The command that Ctrl-C ended last, and its options."""


def _at_home(function: Callable[..., Any]) -> Callable[..., Any]:
    """The command, with ``~`` read in its paths: a shell leaves it in ``--out=~/b`` and in quotes."""

    def expanded(name: str, value: Any) -> Any:
        from lawcat_edge.runtime.files import user_path

        if isinstance(value, (list, tuple)):
            return [expanded(name, item) for item in value]
        if isinstance(value, Path):
            return user_path(value)
        return str(user_path(value)) if name in PLACES and str(value).startswith("~") else value

    @functools.wraps(function)
    def command(**values: Any) -> Any:
        values = {name: expanded(name, value) for name, value in values.items()}
        try:
            return function(**values)
        except KeyboardInterrupt:
            _interrupted[:] = [(function.__name__, values)]  # typer hands on no more than a number
            raise

    return command


app = typer.Typer(
    cls=Lazy,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _version(show: bool) -> None:
    if show:
        print(f"lawcat-edge {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Show the version."
    ),
) -> None:
    """Put a long-context language model of constant memory on a phone-class CPU.

    Example: lawcat-edge generate bundle --chat --prompt "What is a lighthouse for?"
    """


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit."""
    write_any_text(sys.stdout, sys.stderr)
    sys.exit(run(arguments))


def run(arguments: list[str] | None = None, environment: Mapping[str, str] = os.environ) -> int:
    """Run the command line; the exit code instead of an exception, unless LAWCAT_EDGE_DEBUG is set."""
    _interrupted.clear()
    try:
        result = app(args=arguments, prog_name="lawcat-edge", standalone_mode=False)
        code = result if isinstance(result, int) else 0
    except ClickException as error:
        error.show()
        return 2
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except Exception as error:
        if environment.get("LAWCAT_EDGE_DEBUG"):
            raise
        message, code = explain(error)
        if message is None:
            raise
        rank = environment.get("RANK", "0")  # one of many processes: say which, since each may fail alone
        print(f"Error{'' if rank == '0' else f' in process {rank}'}: {message}", file=sys.stderr)
    if code == INTERRUPTED:  # typer turns Ctrl-C into this code itself
        step = _go_on(sys.argv[1:] if arguments is None else arguments)
        print(f"Interrupted; nothing half-written was left in place.{step}", file=sys.stderr)
    return code


def _go_on(arguments: list[str]) -> str:
    """How an interrupted command goes on where it was, or nothing for one that keeps nothing."""
    name, values = _interrupted[0] if _interrupted else ("", {})
    words = list(arguments)
    if name == "distill":
        from lawcat_edge.distill.run_folder import run_folder, unfinished

        words = [word for word in words if word not in ("--resume", "--fresh")]
        if unfinished(run_folder(values["out"])):
            words.append("--resume")
    elif name == "compare":
        words = [word for word in words if word != "--no-resume"]
    elif name not in ("export", "demo"):
        return ""
    return f" To go on: {shlex.join(['lawcat-edge', *words])}"
