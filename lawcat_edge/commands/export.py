"""``lawcat-edge export``: a teacher and an adapter become a bundle."""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from lawcat_edge.runtime.errors import LawcatError


def export(
    teacher: Annotated[str, typer.Argument(help="Folder, GGUF file, hub id, or smollm2.")],
    out: Annotated[Path, typer.Option(help="Bundle folder to write.")],
    adapter: Annotated[Path | None, typer.Option(help="Adapter folder; without it, untrained.")] = None,
    window: Annotated[
        int | None, typer.Option(help="Tokens of softmax attention; default: as the adapter was trained.")
    ] = None,
    scheme: Annotated[
        str, typer.Option(help="fp32, int8, int8-dynamic, int8-static, int4, or a JSON file (your table).")
    ] = "int8",
    ops: Annotated[str, typer.Option(help="Operators, one or several: ort,onnx,portable.")] = "ort",
    ort_format: Annotated[
        bool, typer.Option("--ort-format", help="Also write model.ort and its operators, for mobile apps.")
    ] = False,
    ranges: Annotated[
        Path | None, typer.Option(help="Ranges of activations, from lawcat-edge calibrate (int8-static).")
    ] = None,
    calibration: Annotated[
        list[str] | None,
        typer.Option(help="Text files for schemes that want some; without any, the teacher writes it."),
    ] = None,
    calibration_tokens: Annotated[
        int, typer.Option(help="Tokens of it that are read; more takes longer.", min=1024)
    ] = 8192,
    rounding: Annotated[
        str | None,
        typer.Option(help="nearest or gptq (by what the text says matters); default: the scheme's."),
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
    from lawcat_edge.adapter import Adapter
    from lawcat_edge.calibration.ranges import Ranges
    from lawcat_edge.evaluate import short_text
    from lawcat_edge.export.exporter import export_bundle
    from lawcat_edge.export.schemes import load_scheme
    from lawcat_edge.runtime.bundle.hub import check_name
    from lawcat_edge.runtime.bundle.signature import load_private_key
    from lawcat_edge.runtime.generate.sampling import sampling_defaults
    from lawcat_edge.teacher import resolve

    table = load_scheme(scheme, rounding)  # before the slow steps
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
    source = resolve(teacher)
    if window is not None and adapter is None:
        raise LawcatError("--window changes that of an adapter; give one with --adapter.")
    given = Adapter.load(adapter).with_window(window) if adapter is not None else None
    loaded, config = student(source, given)
    operators = [op.strip() for op in ops.split(",")]
    if not overwrite:
        _check_replaced(out, source, loaded, config, table.name, operators)
    with _needed(table, measured, calibration or [], calibration_tokens, source, loaded, config) as needed:
        report = export_bundle(
            source.weights(),
            source.geometry,
            config,
            loaded,
            out,
            scheme=table,
            ops=operators,
            ort_format=ort_format,
            tokenizer_files=source.folder,
            source={
                "teacher": source.name,
                "teacher_sha256": source.sha256,
                "adapter_sha256": loaded.sha256 if loaded is not None else None,
                "trained_tokens": loaded.trained_tokens if loaded is not None else None,
            },
            name=name,
            verify=verify,
            reference=_reference(source, loaded) if verify and loaded is not None else None,
            progress=progress,
            sign_with=key,
            sampling=sampling,
            short_text=(lambda folder: short_text.against_teacher(folder, source)) if verify else None,
            **needed,
        )
    measured = report["short_text"]
    few = loaded.warning() if loaded is not None else "no adapter: an untrained conversion"
    report["warning"] = "; ".join(filter(None, [few, short_text.warning(measured)])) or None
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
    if measured is not None:
        print(short_text.describe(measured))
    if report["warning"]:
        print(f"WARNING: {report['warning']}")
    if push is not None:
        print(f"pushed: {report['pushed']}")


def _check_replaced(
    out: Path, source: Any, adapter: Any | None, config: Any, scheme: str, ops: list[str]
) -> None:
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
        "teacher": source.sha256,
        "adapter": adapter.sha256 if adapter is not None else None,
        "scheme": scheme,
        "operators": sorted(ops),
        "settings": config.to_dict(),
    }
    differing = next((name for name, value in now.items() if before[name] != value), None)
    if differing is not None:
        raise LawcatError(f"{out} holds a bundle of another {differing}; {step}.")


def student(source: Any, adapter: Any | None) -> tuple[Any | None, Any]:
    """The adapter, checked against its teacher, and the layer's settings; without one, a conversion's."""
    from lawcat_edge.config import LawcatConfig

    if adapter is not None:
        adapter.check_teacher(source)
        return adapter, adapter.config
    print("No --adapter: this is an untrained conversion, it will not write sense.", file=sys.stderr)
    return None, LawcatConfig(feature_dim=source.geometry.head_dim // 2)


@contextlib.contextmanager
def _needed(
    table: Any,
    ranges: Any | None,
    files: list[str],
    tokens: int,
    source: Any,
    adapter: Any | None,
    config: Any,
) -> Iterator[dict[str, Any]]:
    """What the scheme has to know of activations; measured while the export asks for it."""
    from lawcat_edge.calibration.calibrate import Calibration

    if ranges is not None and not files and table.rounding == "gptq":
        print("With --ranges and no --calibration, weights are rounded to nearest.", file=sys.stderr)
        yield Calibration(source, adapter, config, Path()).ranges_for(table, ranges)
        return
    wanted = (table.static and ranges is None) or table.rounding == "gptq"
    if wanted and not files:
        print(
            f"The scheme {table.name} is calibrated, and without --calibration the teacher writes the text "
            "itself: some minutes on a CPU.",
            file=sys.stderr,
        )
    with tempfile.TemporaryDirectory(prefix="lawcat-calibrate-") as folder:
        run = Calibration(source, adapter, config, Path(folder), files, tokens, progress=progress)
        yield run.for_export(table, ranges)


def _reference(source: Any, adapter: Any) -> Any:
    """The torch student's logits, loaded only when the verification asks for them."""

    def logits(tokens: Any) -> Any:
        import torch

        from lawcat_edge.model import load_student

        with torch.inference_mode():
            model = load_student(source, adapter)
            return model(torch.from_numpy(tokens)[None])[0][0].numpy()

    return logits


def progress(what: str, done: int, total: int) -> None:
    if sys.stderr.isatty():
        end = "\n" if done == total else ""
        print(f"\r{what} {done}/{total} ", end=end, file=sys.stderr, flush=True)
