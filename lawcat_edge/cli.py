"""The command line: registers the commands and turns every error into one sentence and an exit code.

0 done · 1 a check failed · 2 the user's mistake · 130 interrupted. LAWCAT_EDGE_DEBUG=1 shows tracebacks.
A command's module is imported only when that command runs.
"""

from __future__ import annotations

import errno
import functools
import importlib
import os
import re
import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperGroup
from typer.main import get_command_from_info
from typer.models import CommandInfo

from lawcat_edge import __version__
from lawcat_edge.commands.output import write_any_text
from lawcat_edge.runtime.errors import LawcatError

INTERRUPTED = 130
PLACES = ("model", "teacher", "adapter", "reference")  # options that are a path or a name
COMMANDS = {
    "demo": "The main job on the embedded teacher, start to end.",
    "distill": "Train an adapter: a teacher's attention becomes linear.",
    "calibrate": "Ranges of activations for fixed 8-bit products.",
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
# Newer versions of typer carry a click of their own and older ones need the package; this fits both.
_ClickException: Any = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")
_EXTRA_OF = {"typer": "", "matplotlib": "build", "pyarrow": "data", "triton": "triton", "starlette": "serve"}
_EXTRA_OF |= {"zstandard": "data", "uvicorn": "serve", "cryptography": "sign"}
_NO_MEMORY = re.compile(r"out of memory|can't allocate memory", re.IGNORECASE)


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
    except _ClickException as error:
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


def explain(error: Exception) -> tuple[str | None, int]:
    """One sentence for an error and its exit code; (None, _) for a bug, which keeps its traceback."""
    if isinstance(error, LawcatError):
        return str(error), error.exit_code
    if isinstance(error, ModuleNotFoundError) and not str(error.name).startswith("lawcat_edge"):
        extra = _EXTRA_OF.get(str(error.name).split(".")[0], "build")
        return f"This command needs the package {error.name}; run pip install 'lawcat-edge[{extra}]'.", 2
    if _is_disk_full(error):
        return f"The disk is full{_at(error)}; free some space and run the command again.", 2
    if isinstance(error, OSError) and error.errno is not None:
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            return (
                f"No permission to write or read{_at(error)}; choose another place or change the permission.",
                2,
            )
        return f"{os.strerror(error.errno)}{_at(error)}; check the path and run the command again.", 2
    text = str(error).strip().split("\n")[0]
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _NO_MEMORY.search(text)):
        return "Memory ran out; close other programs, or use a smaller batch or model.", 2
    if isinstance(error, UnicodeDecodeError):
        return f"A file is not UTF-8 text (byte {error.start:,}); convert it to UTF-8 first.", 2
    if isinstance(error, OSError) and text:  # no number: transformers, numpy and the hub word their own
        return f"{text.rstrip('.')}; check the file or the name and run the command again.", 2
    return None, 1


def _is_disk_full(error: Exception) -> bool:
    # safetensors writes from Rust and raises an error of its own, with the system's number in the text
    rust = type(error).__name__ == "SafetensorError" and f"os error {errno.ENOSPC}" in str(error)
    return rust or (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT))


def _at(error: Exception) -> str:
    name = getattr(error, "filename", None)
    return f" ({name})" if name else ""
