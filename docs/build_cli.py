#!/usr/bin/env python3
"""Write docs/cli.md from the commands' own help texts; --check only says whether it is current."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
from pathlib import Path

from lawcat_edge.cli import COMMANDS, run

TARGET = Path(__file__).parent / "cli.md"


def help_of(*command: str) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        run([*command, "--help"])
    return "\n".join(line.rstrip() for line in out.getvalue().strip().splitlines())


def page() -> str:
    os.environ["COLUMNS"] = os.environ["TERMINAL_WIDTH"] = "100"
    parts = [
        "# The command line\n\nWritten by `make docs` from the commands' own help.\n",
        f"```\n{help_of()}\n```\n",
    ]
    parts += [f"## {name}\n\n```\n{help_of(name)}\n```\n" for name in COMMANDS]
    return "\n".join(parts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    text = page()
    if parser.parse_args().check:
        current = TARGET.is_file() and TARGET.read_text(encoding="utf-8") == text
        print("docs/cli.md is current." if current else "docs/cli.md is old: run make docs.")
        return 0 if current else 1
    TARGET.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
