"""``lawcat-edge calibrate``: ranges of activations for static linear layers, as a small JSON file."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from lawcat_edge.commands.options import CALIBRATION_TOKENS, CalibrationFiles, CalibrationTokens
from lawcat_edge.runtime.errors import LawcatError


def calibrate(
    teacher: Annotated[str, typer.Argument(help="Folder, GGUF file, hub id, or smollm2.")],
    out: Annotated[Path, typer.Option(help="JSON file to write.")],
    adapter: Annotated[Path | None, typer.Option(help="Adapter folder; without it, untrained.")] = None,
    calibration: CalibrationFiles = None,
    calibration_tokens: CalibrationTokens = CALIBRATION_TOKENS,
    scheme: Annotated[str, typer.Option(help="Scheme that will use the ranges.")] = "int8-static",
    merge: Annotated[
        list[Path] | None, typer.Option(help="Range files of the same student to add, from other texts.")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Processor threads; default: physical cores.")] = None,
    seed: Annotated[int, typer.Option(help="Of the text that the teacher writes.")] = 0,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
    text: Annotated[list[str] | None, typer.Option(hidden=True, help="Once --calibration.")] = None,
    tokens: Annotated[int | None, typer.Option(hidden=True, help="Once --calibration-tokens.")] = None,
) -> None:
    """Measure what the linear layers of TEACHER with an adapter read, on the recurrent graph.

    Every text is read in one go, up to 4,096 tokens, since ranges drift with the state. The file says which
    student it was measured on and is refused for another.

    Examples:

      lawcat-edge calibrate smollm2 --adapter adapter --calibration "texts/*.txt" --out ranges.json

      lawcat-edge export smollm2 --adapter adapter --scheme int8-static --ranges ranges.json --out bundle
    """
    from lawcat_edge.calibration.calibrate import Calibration
    from lawcat_edge.calibration.ranges import Ranges
    from lawcat_edge.commands.progress import reporter
    from lawcat_edge.commands.students import open_student
    from lawcat_edge.export.schemes import load_scheme

    files, count = [*(calibration or ()), *(text or ())], tokens or calibration_tokens
    table = load_scheme(scheme)
    if not table.static:
        raise LawcatError(f"The scheme {table.name} needs no ranges; name one with static linear layers.")
    others = [Ranges.load(path) for path in merge or ()]
    student = open_student(teacher, adapter)
    with reporter(lines=False) as show, tempfile.TemporaryDirectory(prefix="lawcat-calibrate-") as folder:
        run = Calibration(student, Path(folder), files, count, threads, seed)
        ranges = run.ranges(table.rotate, show)
    for other in others:
        ranges.merge(other)
    ranges.save(out)
    growth = {name: ranges.growth(name) for name in ranges.tensors}
    grown = max(growth, key=lambda name: growth[name])
    report = {
        "ranges": str(out),
        "tokens": ranges.tokens,
        "tensors": len(ranges.tensors),
        "text": "given" if files else "sampled from the teacher",
        "most_grown": {"tensor": grown, "factor": growth[grown]},
        **ranges.measured_on,
    }
    if json_:
        print(json.dumps(report))
        return
    if not files:
        print("No --calibration: the teacher wrote the text itself.", file=sys.stderr)
    print(
        f"{out}: {len(ranges.tensors)} ranges from {ranges.tokens:,} tokens; {grown} grew most along a text, "
        f"{growth[grown]:.2f} times."
    )
