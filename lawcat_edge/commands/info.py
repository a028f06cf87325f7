"""``lawcat-edge info``: what a bundle or an adapter is, where it comes from, how large it is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from lawcat_edge.commands.output import dump_json
from lawcat_edge.runtime.errors import LawcatError

if TYPE_CHECKING:
    from pathlib import Path


def info(
    model: Annotated[str, typer.Argument(help="Bundle or adapter: a folder, or owner/name on the hub.")],
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Say what MODEL is, where it comes from, its sizes and the size of its state.

    Examples:

      lawcat-edge info bundle

      lawcat-edge info adapters/general --json
    """
    from lawcat_edge.adapter import adapter_folder

    folder = adapter_folder(model)
    if (folder / "lawcat_bundle.json").exists():
        document = _bundle(folder)
    elif (folder / "lawcat_config.json").exists():
        document = _adapter(folder)
    else:
        raise LawcatError(
            f"{model} is neither a bundle nor an adapter folder; make one with export or distill."
        )
    if json_:
        print(dump_json(document))
    else:
        _show(document)


def _bundle(folder: Path) -> dict[str, Any]:
    from lawcat_edge.adapter import little_training
    from lawcat_edge.evaluate import short_text
    from lawcat_edge.runtime.bundle.manifest import Bundle, state_sizes

    bundle = Bundle.open(folder, check_hashes=False)
    manifest = bundle.manifest
    parity = manifest.parity
    # Bundles of earlier versions note neither.
    said = [little_training(manifest.source.get("trained_tokens"))]
    said.append(short_text.warning(manifest.source.get("short_text")))
    return {
        "kind": "bundle",
        "name": manifest.name,
        "created_by": manifest.created_by,
        "sha256": bundle.sha256,
        "source": manifest.source,
        "warning": "; ".join(filter(None, said)) or None,
        "scheme": manifest.scheme,
        "ops": manifest.ops,
        "min_onnxruntime": manifest.min_onnxruntime,
        "lawcat": manifest.lawcat,
        "geometry": manifest.geometry,
        "state_bytes": state_sizes(manifest.state, manifest.spans),
        "bytes": bundle.bytes_on_disk,
        "files": {name: entry["size"] for name, entry in manifest.files.items()},
        "parity": None
        if parity is None
        else {
            "tokens": len(parity.tokens),
            "max_rel_err": parity.max_rel_err,
            "kl": parity.kl,
            "bound": parity.bound,
        },
    }


def _adapter(folder: Path) -> dict[str, Any]:
    from lawcat_edge.adapter import Adapter

    adapter = Adapter.load(folder)
    geometry, config = adapter.geometry.to_dict(), adapter.config.to_dict()
    from lawcat_edge.runtime.bundle.manifest import expected_spans, expected_state, state_sizes

    return {
        "kind": "adapter",
        "name": folder.name,
        "sha256": adapter.sha256,
        "source": {"teacher": adapter.teacher, "teacher_sha256": adapter.teacher_sha256},
        "lawcat": config,
        "trained_tokens": adapter.trained_tokens,
        "warning": adapter.warning(),
        "lora": None if adapter.lora is None else adapter.lora.to_dict(),
        "geometry": geometry,
        "parameters": int(sum(tensor.size for tensor in adapter.tensors.values())),
        "state_bytes": state_sizes(expected_state(geometry, config), expected_spans(geometry, config)),
        "bytes": sum(path.stat().st_size for path in folder.iterdir() if path.is_file()),
        "files": {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()},
    }


def _show(document: dict[str, Any]) -> None:
    from lawcat_edge.evaluate import short_text
    from lawcat_edge.runtime.bundle.manifest import describe_state

    source, geometry, lawcat = document["source"], document["geometry"], document["lawcat"]
    print(f"{document['kind']} {document['name']}")
    print(f"  teacher   {source['teacher']} (sha256 {source['teacher_sha256'][:16]})")
    if source.get("adapter_sha256"):
        print(f"  adapter   sha256 {source['adapter_sha256'][:16]}")
    print(
        f"  model     {geometry.get('family', '?')}, {geometry['num_layers']} layers, width "
        f"{geometry['hidden_size']:,}, {geometry['num_heads']} heads ({geometry['num_kv_heads']} key/value), "
        f"vocabulary {geometry['vocab_size']:,}"
    )
    print(
        f"  attention linear, features {2 * lawcat['feature_dim']}, convolution {lawcat['conv_kernel']}, "
        f"window {lawcat.get('window', 0)}, rotary {'on' if lawcat.get('rope') else 'off'}"
    )
    full = [str(i) for i, kind in enumerate(lawcat.get("layer_types") or []) if kind == "full_attention"]
    if full:
        first = lawcat.get("attention_sinks", 0)
        print(
            f"  full      attention in layers {', '.join(full)}, over {lawcat['attention_span']:,} tokens"
            + (f", the text's first {first} always among them" if first else "")
        )
    if document["kind"] == "bundle":
        print(f"  scheme    {document['scheme']}; graphs {', '.join(document['ops'])}; made by ", end="")
        needs = ", ".join(f"{version} ({op})" for op, version in document["min_onnxruntime"].items())
        print(f"{document['created_by']}; needs onnxruntime {needs}")
        parity = document["parity"]
        if parity and parity["max_rel_err"] == 0:
            print("  against torch: not compared at export; `verify` replays its recorded logits")
        elif parity:
            print(
                f"  against torch, {parity['tokens']} tokens: KL {parity['kl']:.2e}, "
                f"largest relative error {parity['max_rel_err']:.2e}"
            )
        if source.get("short_text"):
            print(f"  writes    {short_text.describe(source['short_text'])}")
    else:
        print(f"  adds      {document['parameters']:,} parameters")
    if document["warning"]:
        print(f"  WARNING   {document['warning']}")
    print(f"  state     {describe_state(document['state_bytes'])}")
    print(f"  files     {document['bytes'] / 1e6:,.1f} MB")
    for name, size in sorted(document["files"].items(), key=lambda item: -item[1]):
        print(f"    {size:>14,}  {name}")
