"""``lawcat-edge compare``: accuracy against size of several schemes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from lawcat_edge.commands.options import CALIBRATION_TOKENS, CalibrationFiles, CalibrationTokens
from lawcat_edge.commands.progress import reporter
from lawcat_edge.runtime.errors import LawcatError


def compare(
    teacher: Annotated[str, typer.Argument(help="Folder, GGUF file, hub id, or smollm2.")],
    text: Annotated[list[str], typer.Option(help="Held-out text files or globs.")],
    out: Annotated[Path, typer.Option(help="Folder for the report, the bundles and what is measured.")],
    adapter: Annotated[Path | None, typer.Option(help="Adapter folder; without it, untrained.")] = None,
    schemes: Annotated[
        str, typer.Option(help="Built-in schemes or JSON files (your tables); fp32 is always measured.")
    ] = "fp32,int8,int8-dynamic,int8-static,int4",
    calibration: CalibrationFiles = None,
    calibration_tokens: CalibrationTokens = CALIBRATION_TOKENS,
    length: Annotated[int, typer.Option(help="Tokens of a sequence, for perplexity and KL.")] = 1024,
    samples: Annotated[int, typer.Option(help="Sequences.")] = 8,
    drift_length: Annotated[
        str, typer.Option(help="Tokens of the long text for KL by position, such as 4K or 16K.")
    ] = "4K",
    drift_samples: Annotated[int, typer.Option(help="Long texts, where there is so much text.")] = 2,
    task_lengths: Annotated[str, typer.Option(help="Tokens of the retrieval questions.")] = "512,1K",
    task_samples: Annotated[int, typer.Option(help="Questions at each length.")] = 20,
    context: Annotated[int, typer.Option(help="Tokens read when speed is measured.")] = 512,
    decode_tokens: Annotated[int, typer.Option(help="Tokens written when speed is measured.")] = 64,
    threads: Annotated[int | None, typer.Option(help="Processor threads; default: physical cores.")] = None,
    sensitivity: Annotated[
        bool,
        typer.Option(
            help="Also measure which kinds of linear layer, and which layers, mind being quantised."
        ),
    ] = False,
    max_kl: Annotated[
        float | None, typer.Option(help="Add a mixed scheme: the smallest with at most this KL.")
    ] = None,
    max_mb: Annotated[
        float | None, typer.Option(help="Add a mixed scheme: the closest to fp32 within this many MB.")
    ] = None,
    peers: Annotated[
        bool, typer.Option(help="Rows of the teacher in torch, and as GGUF in llama.cpp where installed.")
    ] = True,
    gguf: Annotated[Path | None, typer.Option(help="The teacher as GGUF, where TEACHER is none.")] = None,
    resume: Annotated[
        bool, typer.Option(help="Take again what OUT already holds of this comparison.")
    ] = True,
    json_: Annotated[bool, typer.Option("--json", help="Print the report as one JSON document.")] = False,
) -> None:
    """Export TEACHER with an adapter in several schemes, measure each, and write report.json, .md and .png.

    Which scheme shall I ship, and what do I lose? Size, perplexity, KL and agreement with fp32, drift along a
    long text, retrieval, speed and memory. A killed run goes on where it stopped. A scheme that fails has its
    reason in the report, the others go on, and the exit code is 1.

    Examples:

      lawcat-edge compare smollm2 --adapter adapter --text held_out.txt --out comparison

      lawcat-edge compare smollm2 --adapter adapter --text book.txt --out out --schemes int8,mine.json

      lawcat-edge compare smollm2 --adapter adapter --text book.txt --out out --max-kl 0.005 --max-mb 150
    """
    from lawcat_edge.calibration.comparison.compare import Comparison
    from lawcat_edge.calibration.comparison.compare import compare as run
    from lawcat_edge.calibration.comparison.report import errors, markdown, print_table
    from lawcat_edge.calibration.comparison.settings import Settings
    from lawcat_edge.commands.eval import parse_lengths
    from lawcat_edge.commands.students import open_student
    from lawcat_edge.runtime.files import write_json, write_text

    names = [name.strip() for name in schemes.split(",") if name.strip()]
    if not names:
        raise LawcatError("There is no scheme to compare; name some with --schemes fp32,int8,int4.")
    settings = Settings(
        length=length,
        samples=samples,
        drift_length=_one(drift_length),
        drift_samples=drift_samples,
        task_lengths=tuple(parse_lengths(task_lengths)),
        task_samples=task_samples,
        context=context,
        decode_tokens=decode_tokens,
        threads=threads,
    )
    student = open_student(teacher, adapter)
    with reporter() as show:
        job = Comparison.of(
            student,
            text,
            out,
            settings,
            calibration or (),
            calibration_tokens,
            resume=resume,
            gguf=gguf,
            progress=lambda row, what, done, total: show(row, done, total, what),
        )
        if sensitivity or max_kl is not None or max_mb is not None:
            from lawcat_edge.calibration.mixed.automatic import choose_schemes

            names += choose_schemes(job, max_kl, max_mb)
        report = run(job, names, peers)
    picture = _draw(report, out)
    write_json(out / "report.json", report)
    write_text(out / "report.md", markdown(report, picture))
    if json_:
        print(json.dumps(report))
    else:
        from rich.console import Console

        # Not in a terminal the width is unknown, and a cut table helps nobody
        print_table(report, Console(width=None if sys.stdout.isatty() else 160))
        print(f"Written to {out}: report.json, report.md{', report.png' if picture else ''}")
    asked = {row["name"] for row in report["rows"] if row["kind"] == "scheme"}
    if any(name in asked for name, _, _ in errors(report)):
        raise typer.Exit(1)


def _one(text: str) -> int:
    from lawcat_edge.commands.eval import parse_lengths

    try:
        (size,) = parse_lengths(text)
    except (LawcatError, ValueError):
        raise LawcatError(f"--drift-length must be one number of tokens such as 4K, not {text!r}.") from None
    return size


def _draw(report: dict[str, Any], out: Path) -> str | None:
    """The picture's name, or None where there is no matplotlib to draw it."""
    from lawcat_edge.calibration.comparison.picture import draw
    from lawcat_edge.runtime.files import atomic_file

    try:
        image = draw(report)
    except LawcatError as error:
        print(f"{error} The report has no picture.", file=sys.stderr)
        return None
    with atomic_file(out / "report.png") as file:
        file.write(image)
    return "report.png"
