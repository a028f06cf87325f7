"""``lawcat-edge export``: a teacher and an adapter become a bundle."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer


def export(
    teacher: Annotated[str, typer.Argument(help="Folder, GGUF file, hub id, or smollm2.")],
    out: Annotated[Path, typer.Option(help="Bundle folder to write; an old bundle there is replaced.")],
    adapter: Annotated[Path | None, typer.Option(help="Adapter folder; without it, untrained.")] = None,
    scheme: Annotated[
        str, typer.Option(help="fp32, int8, int8-dynamic, int4, or a JSON file (your table).")
    ] = "int8",
    ops: Annotated[str, typer.Option(help="Operators, one or several: ort,onnx,portable.")] = "ort",
    ort_format: Annotated[
        bool, typer.Option("--ort-format", help="Also write model.ort and its operators, for mobile apps.")
    ] = False,
    name: Annotated[str | None, typer.Option(help="Name in the manifest; default: the folder's.")] = None,
    verify: Annotated[bool, typer.Option(help="Replay tokens in onnxruntime against torch.")] = True,
    sign: Annotated[
        Path | None, typer.Option(help="Sign the manifest with this Ed25519 key (PEM; extra sign).")
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Write the bundle of TEACHER with an adapter: graphs, weights, tokenizer, manifest.

    Weights stream tensor by tensor, so a model larger than memory can be exported (with --no-verify, since
    the check runs the model in torch). A killed export goes on where it stopped when it is started again.

    Examples:

      lawcat-edge export smollm2 --adapter adapter --out bundle

      lawcat-edge export ./Llama-3.2-1B --adapter adapter --scheme int4 --ops ort,portable --out bundle
    """
    from lawcat_edge.adapter import Adapter
    from lawcat_edge.config import LawcatConfig
    from lawcat_edge.export.exporter import export_bundle
    from lawcat_edge.export.schemes import load_scheme
    from lawcat_edge.runtime.signature import load_private_key
    from lawcat_edge.teacher import resolve

    table = load_scheme(scheme)  # before the slow steps
    key = load_private_key(sign) if sign is not None else None
    source = resolve(teacher)
    loaded = Adapter.load(adapter) if adapter is not None else None
    if loaded is not None:
        loaded.check_teacher(source)
        config = loaded.config
    else:
        print("No --adapter: this is an untrained conversion, it will not write sense.", file=sys.stderr)
        config = LawcatConfig(feature_dim=source.geometry.head_dim // 2)
    report = export_bundle(
        source.weights(),
        source.geometry,
        config,
        loaded,
        out,
        scheme=table,
        ops=[op.strip() for op in ops.split(",")],
        ort_format=ort_format,
        tokenizer_files=source.folder,
        source={
            "teacher": source.name,
            "teacher_sha256": source.sha256,
            "adapter_sha256": loaded.sha256 if loaded is not None else None,
        },
        name=name,
        verify=verify,
        reference=_reference(source, loaded) if verify and loaded is not None else None,
        progress=_progress,
        sign_with=key,
    )
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


def _reference(source: Any, adapter: Any) -> Any:
    """The torch student's logits, loaded only when the verification asks for them."""

    def logits(tokens: Any) -> Any:
        import torch

        from lawcat_edge.model import load_student

        with torch.inference_mode():
            model = load_student(source, adapter)
            return model(torch.from_numpy(tokens)[None])[0][0].numpy()

    return logits


def _progress(what: str, done: int, total: int) -> None:
    if sys.stderr.isatty():
        end = "\n" if done == total else ""
        print(f"\r{what} {done}/{total} ", end=end, file=sys.stderr, flush=True)
