"""``lawcat-edge export``: a teacher and an adapter become a bundle."""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lawcat_edge.commands.options import CALIBRATION_TOKENS, CalibrationFiles, CalibrationTokens
from lawcat_edge.runtime.bundle.flavours import DEFAULT_OPS, FLAVOURS
from lawcat_edge.runtime.errors import LawcatError

if TYPE_CHECKING:
    from lawcat_edge.calibration.calibrate import Calibration
    from lawcat_edge.calibration.ranges import Ranges
    from lawcat_edge.export.exporter import ExportOptions
    from lawcat_edge.export.schemes import Scheme
    from lawcat_edge.progress import Progress
    from lawcat_edge.student import Student

OPERATORS = ",".join(FLAVOURS)


def export(
    teacher: Annotated[str, typer.Argument(help="Folder, GGUF file, hub id, or smollm2.")],
    out: Annotated[Path, typer.Option(help="Bundle folder to write.")],
    adapter: Annotated[Path | None, typer.Option(help="Adapter folder; without it, untrained.")] = None,
    window: Annotated[
        int | None, typer.Option(help="Tokens of softmax attention; default: as the adapter was trained.")
    ] = None,
    span: Annotated[
        int | None,
        typer.Option(
            help="Tokens that full-attention layers see; shorter: less memory. Default: the adapter's."
        ),
    ] = None,
    sinks: Annotated[
        int | None,
        typer.Option(help="Of these, first tokens of the text, never forgotten; as the adapter's."),
    ] = None,
    scheme: Annotated[
        str, typer.Option(help="fp32, int8, int8-dynamic, int8-static, int4, or a JSON file (your table).")
    ] = "int8",
    ops: Annotated[str, typer.Option(help=f"Operators, one or several: {OPERATORS}.")] = ",".join(
        DEFAULT_OPS
    ),
    ort_format: Annotated[
        bool, typer.Option("--ort-format", help="Also write model.ort and its operators, for mobile apps.")
    ] = False,
    ranges: Annotated[
        Path | None, typer.Option(help="Ranges of activations, from lawcat-edge calibrate (int8-static).")
    ] = None,
    calibration: CalibrationFiles = None,
    calibration_tokens: CalibrationTokens = CALIBRATION_TOKENS,
    rounding: Annotated[
        str | None,
        typer.Option(help="nearest or gptq (by what a text says matters); default: gptq with --calibration."),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name in the manifest; default: the folder's.")] = None,
    verify: Annotated[bool, typer.Option(help="Replay tokens in onnxruntime against torch.")] = True,
    sign: Annotated[
        Path | None, typer.Option(help="Sign the manifest with this Ed25519 key (PEM; extra sign).")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a bundle in OUT that is of something else.")
    ] = False,
    temperature: Annotated[
        float | None,
        typer.Option(help="How chat and serve choose tokens; default: as the adapter or teacher."),
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="The same: keep the k most likely (0: all).")] = None,
    top_p: Annotated[float | None, typer.Option(help="The same: the fewest of this probability.")] = None,
    min_p: Annotated[
        float | None, typer.Option(help="The same: drop tokens less likely than this times the best.")
    ] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option(help="The same: above 1 discourages repeating.")
    ] = None,
    push: Annotated[
        str | None, typer.Option(help="Then put the bundle on the hub as owner/name, with a model card.")
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="If --push makes a new repository there, a private one.")
    ] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Write the bundle of TEACHER with an adapter: graphs, weights, tokenizer, manifest.

    Weights stream tensor by tensor, so a model larger than memory can be exported (with --no-verify, since
    the check runs the model in torch). A killed export goes on where it stopped when it is started again.

    Examples:

      lawcat-edge export smollm2 --adapter adapter --out bundle

      lawcat-edge export ./Llama-3.2-1B --adapter adapter --scheme int4 --calibration "*.txt" --out bundle

      lawcat-edge export smollm2 --adapter adapter --scheme int8-static --ranges ranges.json --out bundle
    """
    from lawcat_edge.calibration.calibrate import Calibration
    from lawcat_edge.calibration.ranges import Ranges
    from lawcat_edge.commands.progress import reporter
    from lawcat_edge.commands.students import open_student
    from lawcat_edge.evaluate import short_text
    from lawcat_edge.export.exporter import ExportOptions, export_bundle
    from lawcat_edge.export.schemes import load_scheme
    from lawcat_edge.runtime.bundle.hub import check_name
    from lawcat_edge.runtime.bundle.signature import load_private_key
    from lawcat_edge.runtime.generate.sampling import sampling_defaults

    table = load_scheme(scheme, rounding)  # before the slow steps
    if calibration and rounding is None and not table.exact:
        table = replace(table, rounding="gptq")
    if push is not None:
        check_name(push)
    asked = {
        "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p,
        "repetition_penalty": repetition_penalty,
    }  # fmt: skip
    sampling = {name: value for name, value in asked.items() if value is not None}
    sampling_defaults(sampling, 0.0)
    key = load_private_key(sign) if sign is not None else None
    measured = Ranges.load(ranges) if ranges is not None else None
    if measured is not None and not table.static:
        raise LawcatError(f"The scheme {table.name} uses no ranges; drop --ranges or take int8-static.")
    student = open_student(teacher, adapter, window, span, sinks)
    options = ExportOptions(
        scheme=table,
        ops=tuple(op.strip() for op in ops.split(",")),
        ort_format=ort_format,
        name=name,
        verify=verify,
        reference=student.logits if verify and student.adapter is not None else None,
        short_text=partial(short_text.against_teacher, teacher=student.teacher) if verify else None,
        sign_with=key,
        sampling=sampling,
    )
    if not overwrite:
        _check_replaced(out, student, options)
    with reporter(lines=False) as show, tempfile.TemporaryDirectory(prefix="lawcat-calibrate-") as work:
        run = Calibration(student, Path(work), calibration or [], calibration_tokens)
        needed = _needed(run, table, measured, show)
        report = export_bundle(student, out, replace(options, progress=show, **needed))
    said = [student.warning, short_text.warning(report["short_text"])]
    report["warning"] = "; ".join(filter(None, said)) or None
    if push is not None:
        from lawcat_edge.export.push import push as upload

        report["pushed"] = upload(out, push, private)
    if json_:
        print(json.dumps(report))
        return
    print(
        f"{report['bundle']}: {report['bytes'] / 1e6:,.1f} MB ({report['scheme']}) in {report['seconds']} s"
    )
    for flavour, parity in report["parity"].items():
        if parity is not None:
            print(
                f"{flavour} against torch: relative error {parity['rel_err']:.1e}, KL {parity['kl']:.1e}, "
                f"same best token {parity['top1']:.1%}"
            )
    if report["short_text"] is not None:
        print(short_text.describe(report["short_text"]))
    if report["warning"]:
        print(f"WARNING: {report['warning']}")
    if push is not None:
        print(f"pushed: {report['pushed']}")


def _check_replaced(out: Path, student: Student, options: ExportOptions) -> None:
    """Refuse to replace a bundle of another teacher, adapter, scheme, window or set of operators."""
    from lawcat_edge.runtime.bundle.manifest import MANIFEST, Bundle

    if not (out / MANIFEST).is_file():
        return
    step = "replace it with --overwrite, or give another --out"
    try:
        manifest = Bundle.open(out, check_hashes=False).manifest
    except LawcatError:
        raise LawcatError(f"{out} holds a bundle that cannot be read; {step}.") from None
    before = {
        "teacher": manifest.source.get("teacher_sha256"),
        "adapter": manifest.source.get("adapter_sha256"),
        "scheme": manifest.scheme,
        "operators": sorted(manifest.ops),
        "settings": manifest.lawcat,
    }
    now = {
        "teacher": student.teacher.sha256,
        "adapter": student.adapter_sha256,
        "scheme": options.scheme.name,
        "operators": sorted(options.ops),
        "settings": student.config.to_dict(),
    }
    differing = next((name for name, value in now.items() if before[name] != value), None)
    if differing is not None:
        raise LawcatError(f"{out} holds a bundle of another {differing}; {step}.")


def _needed(run: Calibration, table: Scheme, ranges: Ranges | None, progress: Progress) -> dict[str, Any]:
    """What the scheme has to know of activations: ranges are measured now, the rest while it is exported."""
    if ranges is not None and not run.files and table.rounding == "gptq":
        print("With --ranges and no --calibration, weights are rounded to nearest.", file=sys.stderr)
        return run.ranges_for(table, ranges, progress)
    wanted = (table.static and ranges is None) or table.rounding == "gptq"
    if wanted and not run.files:
        print(
            f"The scheme {table.name} is calibrated, and without --calibration the teacher writes the text "
            "itself: some minutes on a CPU.",
            file=sys.stderr,
        )
    return run.for_export(table, ranges, progress)
