"""Adds ``lawcat`` to ``optimum-cli export``. Installed as optimum/commands/register/register_lawcat.py.

optimum imports every file of that namespace when its command line starts, so this one imports nothing heavy.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from typing import Any

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand

# How chat and serve choose tokens; the options have the names of generation_config.json's keys.
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


class LawcatExportCommand(BaseOptimumCLICommand):
    """``optimum-cli export lawcat``: what ``lawcat-edge export`` does, under optimum's names."""

    COMMAND = CommandInfo(name="lawcat", help="A teacher and a LAWCAT adapter become a bundle (lawcat-edge).")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        from lawcat_edge.runtime.bundle.flavours import DEFAULT_OPS, FLAVOURS

        add: Any = parser.add_argument
        add("-m", "--model", required=True, help="Teacher: a folder, a GGUF file, a hub id, or smollm2.")
        add("--adapter", help="Adapter folder of lawcat-edge; without it, an untrained conversion.")
        add("--scheme", default="int8", help="fp32, int8, int8-dynamic, int4, or a JSON file.")
        known = ",".join(FLAVOURS)
        add("--ops", default=",".join(DEFAULT_OPS), help=f"Operators, one or several: {known}.")
        add("--ort-format", action="store_true", help="Also write model.ort, for mobile apps.")
        add("--no-verify", action="store_true", help="Do not replay tokens in onnxruntime against torch.")
        add("--overwrite", action="store_true", help="Replace a bundle that is of something else.")
        for name in _SAMPLING:
            add(_option(name), help="For generation_config.json; default: as the adapter or teacher.")
        add("output", help="Bundle folder to write.")

    def run(self) -> None:
        from lawcat_edge.cli import run

        given: Any = self.args
        arguments = ["export", given.model, "--out", given.output, "--scheme", given.scheme]
        arguments += ["--ops", given.ops]
        if given.adapter is not None:
            arguments += ["--adapter", given.adapter]
        if given.ort_format:
            arguments.append("--ort-format")
        if given.no_verify:
            arguments.append("--no-verify")
        if given.overwrite:
            arguments.append("--overwrite")
        for name in _SAMPLING:
            if getattr(given, name) is not None:
                arguments += [_option(name), getattr(given, name)]
        code = run(arguments)
        if code:
            sys.exit(code)


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


REGISTER_COMMANDS = [(LawcatExportCommand, ExportCommand)]
