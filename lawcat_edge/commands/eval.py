"""``lawcat-edge eval``: retrieval tasks and perplexity on a bundle, an adapter or a teacher."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lawcat_edge.runtime.errors import LawcatError

if TYPE_CHECKING:
    from lawcat_edge.evaluate.lm import LanguageModel
    from lawcat_edge.evaluate.perplexity import PerplexityReport
    from lawcat_edge.evaluate.run import TaskReport

DEFAULT_LENGTHS = {"passkey": "256,512,1K,2K,4K", "perplexity": "8K"}
SAMPLED_PROSE = 20_000
"""Tokens of background the model writes itself where --text names none."""


def parse_lengths(text: str) -> list[int]:
    """``"256,1K,32K"`` as numbers of tokens. Raises LawcatError."""
    lengths = []
    for item in text.split(","):
        number = item.strip().lower()
        factor = 1024 if number.endswith("k") else 1
        if not number.removesuffix("k").isdecimal() or len(number) > 8:
            raise LawcatError(f"--lengths has {item.strip()!r}; write numbers of tokens such as 512,1K,32K.")
        lengths.append(int(number.removesuffix("k")) * factor)
    return lengths


def parse_depths(text: str | None) -> list[float] | None:
    """``"0,50,100"`` (percent) as shares. Raises LawcatError."""
    if text is None:
        return None
    depths = []
    for item in text.split(","):
        try:
            depth = float(item)
        except ValueError:
            depth = float("nan")
        if not 0 <= depth <= 100:
            raise LawcatError(f"--depths has {item.strip()!r}; write percentages such as 0,50,100.")
        depths.append(depth / 100)
    return depths


def open_model(
    name: str,
    adapter: str | None = None,
    device: str = "auto",
    threads: int | None = None,
    window: int | None = None,
    span: int | None = None,
    sinks: int | None = None,
) -> LanguageModel:
    """MODEL as the command line takes it: a bundle, an adapter folder, or a teacher with or without an
    adapter. window, span, sinks: others than the adapter was trained with."""
    from lawcat_edge.adapter import GENERAL, adapter_folder
    from lawcat_edge.runtime.bundle.hub import PREFIX

    # A bare owner/name is a teacher's.
    folder = adapter_folder(name) if name == GENERAL or name.startswith(PREFIX) else Path(name)
    if (folder / "lawcat_bundle.json").is_file():
        if adapter is not None:
            raise LawcatError("A bundle already holds its adapter; leave --adapter out.")
        if any(value is not None for value in (window, span, sinks)):
            raise LawcatError(
                "A bundle's window, span and sinks are fixed; leave them out, or export it again."
            )
        from lawcat_edge.evaluate.lm import BundleModel

        return BundleModel(folder, threads=threads)
    from lawcat_edge import teacher as teachers
    from lawcat_edge.adapter import Adapter
    from lawcat_edge.evaluate.torch_lm import StudentModel, TeacherModel

    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    if (folder / "lawcat_config.json").is_file():
        if adapter is not None:
            raise LawcatError(f"{name} is an adapter itself; leave --adapter out, or give the teacher first.")
        loaded = Adapter.load(folder).with_window(window).with_span(span, sinks)
        return StudentModel.load(teachers.resolve(loaded.teacher), loaded, name=name, device=device)
    teacher = teachers.resolve(name)
    if adapter is None:
        if any(value is not None for value in (window, span, sinks)):
            raise LawcatError("--window, --span and --sinks change an adapter's; give one with --adapter.")
        return TeacherModel.load(teacher, device=device)
    student = Adapter.load(adapter).with_window(window).with_span(span, sinks)
    return StudentModel.load(teacher, student, name=str(adapter), device=device)


def eval(
    model: Annotated[
        str, typer.Argument(help="A bundle or adapter folder, or a teacher (folder, GGUF, hub id, smollm2).")
    ],
    task: Annotated[
        str, typer.Option(help="passkey, niah-1, niah-2, niah-3, babilong-qa2, babilong-qa3 or perplexity.")
    ] = "passkey",
    lengths: Annotated[
        str | None, typer.Option(help="Tokens, such as 512,1K,32K; for perplexity one length.")
    ] = None,
    samples: Annotated[
        int, typer.Option(help="Questions a length (and depth); sequences for perplexity.")
    ] = 20,
    depths: Annotated[
        str | None, typer.Option(help="Percent, such as 0,50,100; default: spread evenly.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Sets keys, values and background.")] = 0,
    text: Annotated[
        list[str] | None, typer.Option(help="Text files or globs: prose for niah-2/3, BABILong, perplexity.")
    ] = None,
    adapter: Annotated[str | None, typer.Option(help="Adapter folder, when MODEL is a teacher.")] = None,
    window: Annotated[
        int | None, typer.Option(help="Tokens of softmax attention; default: as the adapter was trained.")
    ] = None,
    span: Annotated[
        int | None, typer.Option(help="Tokens that full-attention layers see; default: the adapter's.")
    ] = None,
    sinks: Annotated[
        int | None,
        typer.Option(help="Of these, first tokens of the text, never forgotten; as the adapter's."),
    ] = None,
    reference: Annotated[str | None, typer.Option(help="Teacher to take KL against (perplexity).")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Longest answer; default 12 to 128 by task.", min=1)
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda (torch models).")] = "auto",
    threads: Annotated[int | None, typer.Option(help="Processor threads; default: all cores.")] = None,
    seconds: Annotated[float | None, typer.Option(help="Begin no further batch after this long.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the whole report as JSON here.")] = None,
    heatmap: Annotated[Path | None, typer.Option(help="Write depth × length as a PNG here.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print the report as one JSON document.")] = False,
) -> None:
    """Measure retrieval or perplexity of MODEL, with 95 % intervals.

    Examples:

      lawcat-edge eval bundle --task passkey --lengths 1K,4K,16K --samples 20 --heatmap passkey.png

      lawcat-edge eval smollm2 --adapter adapters/passkey --task niah-2 --text prose.txt

      lawcat-edge eval bundle --task perplexity --lengths 8K --text held_out.txt --reference smollm2
    """
    from lawcat_edge.evaluate.perplexity import perplexity
    from lawcat_edge.evaluate.run import RETRIEVAL_TASKS, run_task

    if task not in (*RETRIEVAL_TASKS, "perplexity"):
        raise LawcatError(f"Unknown task {task!r}; choose one of {', '.join(RETRIEVAL_TASKS)} or perplexity.")
    sizes, shares = parse_lengths(lengths or DEFAULT_LENGTHS.get(task, "1K,2K,4K")), parse_depths(depths)
    deadline = None if seconds is None else time.monotonic() + seconds
    if task == "perplexity":
        if not text:
            raise LawcatError("Perplexity needs text to read; name files with --text.")
        if len(sizes) != 1 or depths is not None or heatmap is not None:
            raise LawcatError("Perplexity takes one length, and neither --depths nor --heatmap.")
        measured = open_model(model, adapter, device, threads, window, span, sinks)
        teacher = open_model(reference, None, device, threads) if reference is not None else None
        if teacher is not None and teacher.tokenizer.get_vocab() != measured.tokenizer.get_vocab():
            raise LawcatError(
                f"{reference} has another vocabulary than {model}; KL needs the model's own teacher."
            )
        result = perplexity(measured, text, sizes[0], samples, teacher, deadline=deadline)
        _finish(result.to_dict(), out, json_, lambda: _show_perplexity(result))
        return
    measured = open_model(model, adapter, device, threads, window, span, sinks)
    prose = _prose(task, sizes, text, measured, seed)
    report = run_task(
        measured,
        task,
        sizes,
        samples,
        shares,
        seed,
        prose,
        max_new_tokens,
        deadline,
        on_cell=_progress,
    )
    report.settings["prose"] = [Path(name).name for name in text] if text else ("sampled" if prose else None)
    if heatmap is not None:
        from lawcat_edge.evaluate.heatmap import draw

        draw(report, heatmap)
    _finish(report.to_dict(), out, json_, lambda: _show(report))


def read_prose(files: list[str], characters: int = 1 << 22) -> str:
    """The first 4 M characters of the files' documents."""
    from lawcat_edge.data.readers import expand, read_parts

    taken, size = [], 0
    for path in expand(files):
        for part in read_parts(path):
            taken.append(part.text)
            size += len(part.text)
            if size >= characters:
                return "\n".join(taken)
    return "\n".join(taken)


def _prose(
    task: str, sizes: list[int], text: list[str] | None, model: LanguageModel, seed: int
) -> str | None:
    if task not in ("niah-2", "niah-3") and not (task.startswith("babilong") and any(sizes)):
        return None
    if text:
        return read_prose(text)
    from lawcat_edge.evaluate.lm import sample_prose

    print("No --text given: the model writes its own background prose.", file=sys.stderr)
    return sample_prose(model, SAMPLED_PROSE, seed)


def _progress(report: TaskReport) -> None:
    cell = report.by_length()[-1] if report.samples else None
    if cell is not None:
        print(f"{report.task} {cell.length}: {cell.correct} of {cell.n}", file=sys.stderr)


def _finish(document: dict[str, Any], out: Path | None, as_json: bool, show: Any) -> None:
    if out is not None:
        from lawcat_edge.runtime.files import write_json

        write_json(out, document)
    if as_json:
        print(json.dumps(document))
    else:
        show()


def _show(report: TaskReport) -> None:
    print(f"{report.task} on {report.model} ({report.kind}), greedy, seed {report.settings['seed']}")
    print(f"{'length':>8} {'n':>5} {'accuracy':>9}   95 % interval")
    for cell in report.by_length():
        interval = f"{cell.low * 100:.0f}–{cell.high * 100:.0f} %"
        print(f"{cell.length:>8,} {cell.n:>5} {cell.accuracy * 100:>7.1f} %   {interval}")
    if not report.complete:
        print("The time was up before every question was asked.")


def _show_perplexity(report: PerplexityReport) -> None:
    print(f"perplexity of {report.model} ({report.kind}) on {', '.join(report.settings['text'])}")
    print(f"{'positions':>15} {'tokens':>9} {'perplexity':>11} {'KL':>8} {'same top':>9}   95 % interval")
    for bucket in (*report.buckets, report.overall):
        kl = "–" if bucket.kl is None else f"{bucket.kl:.4f}"
        same = "–" if bucket.agreement is None else f"{bucket.agreement * 100:.1f} %"
        where = f"{bucket.begin:,}–{bucket.end:,}"
        interval = "–" if bucket.low is None else f"{bucket.low:.2f}–{bucket.high:.2f}"
        if bucket.kl_margin is not None:
            interval += f", KL ± {bucket.kl_margin:.4f}"
        print(f"{where:>15} {bucket.tokens:>9,} {bucket.perplexity:>11.3f} {kl:>8} {same:>9}   {interval}")
