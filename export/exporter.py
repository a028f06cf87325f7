"""Teacher weights + adapter -> bundle: trace one layer, stitch, stream the weights, verify, put in place."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from lawcat_edge.config import LawcatConfig
from lawcat_edge.export import genai, mobile
from lawcat_edge.export.extras import copy_tokenizer, token_ids
from lawcat_edge.export.flavours import rewrite
from lawcat_edge.export.layout import Layout, RounderOf
from lawcat_edge.export.schemes import PRODUCTS, Scheme, load_scheme
from lawcat_edge.export.stitch import SLOTS, stitch
from lawcat_edge.export.trace import trace_layer
from lawcat_edge.export.verify import Agreement, Reference, verify_folder
from lawcat_edge.export.writer import DATA, JOURNAL, DataWriter
from lawcat_edge.families import Geometry
from lawcat_edge.parameters import initial_tensors, parameter_shapes
from lawcat_edge.runtime.bundle.manifest import (
    MANIFEST,
    Manifest,
    expected_spans,
    expected_state,
    write_manifest,
)
from lawcat_edge.runtime.bundle.signature import SIGNATURE, sign
from lawcat_edge.runtime.engine.state import slack
from lawcat_edge.runtime.errors import LawcatError
from lawcat_edge.runtime.files import FileLock, atomic_folder, write_json
from lawcat_edge.weights import MergedWeights, WeightSource, check_shapes

FLAVOURS = ("ort", "onnx", "portable")
CHUNK = 32  # tokens of the portable graph of fixed length
VERIFY_TOKENS = 128
MIN_ONNXRUNTIME = {"ort": "1.25.1", "onnx": "1.32.0", "portable": "1.17.0"}
Progress = Callable[[str, int, int], None]


def export_bundle(
    weights: WeightSource,
    geometry: Geometry,
    config: LawcatConfig,
    adapter: Any | None,
    out: Path | str,
    *,
    scheme: str | Scheme = "int8",
    ops: Sequence[str] = ("ort",),
    tokenizer_files: Path | str,
    source: Mapping[str, Any] | None = None,
    name: str | None = None,
    ort_format: bool = False,
    verify: bool = True,
    verify_tokens: Sequence[int] | None = None,
    reference: Reference | None = None,
    ranges: Mapping[str, tuple[float, float]] | None = None,
    rounder_of: RounderOf | None = None,
    progress: Progress | None = None,
    sign_with: Any | None = None,
    sampling: Mapping[str, Any] | None = None,
    short_text: Callable[[Path], dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Write the bundle ``out`` (a folder, replaced as a whole) and return a report.

    weights: the teacher's, without low-rank updates (these are in the adapter and are merged here).
    adapter: ``.tensors`` and ``.lora``; None takes an untrained conversion, as distillation starts from.
    tokenizer_files: folder with tokenizer.json (and chat template, generation config where there are any).
    ort_format: also write model.ort, the same model in onnxruntime's own format for mobile apps.
    source: {"teacher", "teacher_sha256", "adapter_sha256"} for the manifest.
    reference: tokens [T] -> logits [T,V] of the torch student; without it the bundle is only run.
    ranges: (low, high) of what each static product reads, by "layers.3/down" (``calibration.ranges``).
    rounder_of: chooses the codes of a scheme with rounding "gptq" (``calibration.gptq``); without it they are
    rounded to nearest.
    sampling: temperature, top_k, top_p, min_p, repetition_penalty for generation_config.json; what is left
    out is as the adapter or else the teacher has it.
    short_text: the losses of the bundle in a folder and of its teacher on a short text, for the manifest's
    source; asked once, after the verification.
    progress: called with (what, done, total). sign_with: a key of ``signature.load_private_key``.

    Raises CheckFailed when the bundle is further from the reference than the scheme allows, LawcatError for
    what does not fit together. A killed export is taken up again by the next one with the same arguments.
    """
    begun = time.perf_counter()
    scheme = load_scheme(scheme) if isinstance(scheme, str) else scheme
    for op in ops:
        if op not in FLAVOURS:
            raise LawcatError(f"Unknown operators {op!r}; choose from {', '.join(FLAVOURS)}.")
    if ort_format:
        mobile.ort_flavour(ops)  # before the slow steps
    if "ort" in ops and geometry.head_dim % 16 and expected_spans(geometry.to_dict(), config.to_dict()):
        raise LawcatError(
            f"onnxruntime's attention takes heads whose width is a multiple of 16, not {geometry.head_dim}; "
            "export with --ops portable."
        )
    check_shapes(weights, geometry)
    tensors = initial_tensors(geometry, config) if adapter is None else adapter.tensors
    check_adapter(tensors, geometry, config)
    merged = weights if adapter is None else MergedWeights(weights, adapter)
    layout = Layout(geometry, config, scheme, merged, tensors, dict(ranges or {}), rounder_of)
    _check_layers(layout)
    out = Path(os.path.abspath(out))
    source = {"teacher": "", "teacher_sha256": "0" * 64, "adapter_sha256": None, **(source or {})}
    report = progress or (lambda what, done, total: None)

    staging = out.with_name(f".{out.name}.export")
    out.parent.mkdir(parents=True, exist_ok=True)
    with _readable_errors(out), FileLock(staging):
        staging.mkdir(exist_ok=True)
        for path in staging.iterdir():  # of a killed export that had other options
            if path.name not in (DATA, JOURNAL):
                path.unlink()
        stored = _store(layout, staging, _fingerprint(layout, source), report)
        report("graph", 0, 1)
        nodes = _write_graphs(layout, staging, stored, ops)
        copy_tokenizer(Path(tokenizer_files), staging, getattr(adapter, "generation", None), sampling)
        tokens = token_ids(Path(tokenizer_files))
        graphs = {flavour: graph_files(flavour) for flavour in ops}
        if ort_format:
            report("ort format", 0, 1)
            flavour = mobile.ort_flavour(ops)
            mobile.write_ort(staging, graphs[flavour]["last"])
            mobile.write_turns(staging)
            graphs[flavour]["ort_format"] = mobile.GRAPH
        best = genai_flavour(ops)
        if genai.needs_own_graph(config):
            graphs[best]["genai"] = genai.GRAPH
        file = graphs[best].get("genai", graphs[best]["last"])
        write_json(staging / "genai_config.json", genai.genai_config(geometry, config, tokens, file, best))
        (staging / JOURNAL).rename(staging.with_name(f".{out.name}.journal"))
        manifest = Manifest(
            name=name or out.name,
            created_by=f"lawcat-edge {_version()}",
            source=dict(source),
            lawcat=config.to_dict(),
            geometry=geometry.to_dict(),
            scheme=scheme.name,
            ops=list(ops),
            graphs=graphs,
            state=expected_state(geometry.to_dict(), config.to_dict()),
            tokens=tokens,
            min_onnxruntime={op: MIN_ONNXRUNTIME[op] for op in ops},
        )
        write_manifest(staging, manifest)
        measured: dict[str, Agreement | None] = {}
        if verify:
            report("verify", 0, 1)
            ids = verify_tokens if verify_tokens is not None else sample_tokens(geometry)
            for flavour in ops:
                parity, measured[flavour] = verify_folder(
                    staging, ids, reference, scheme.max_rel_err, scheme.max_kl, flavour
                )
                manifest.parity = manifest.parity or parity
            write_manifest(staging, manifest)
        if short_text is not None:
            report("short text", 0, 1)
            manifest.source["short_text"] = short_text(staging)
            write_manifest(staging, manifest)
        (staging / SIGNATURE).unlink(missing_ok=True)  # of a killed export
        if sign_with is not None:
            sign(staging, MANIFEST, sign_with)
        sizes = {path.name: path.stat().st_size for path in staging.iterdir()}
        with atomic_folder(out, MANIFEST) as final:
            for path in staging.iterdir():
                path.rename(final / path.name)
        shutil.rmtree(staging, ignore_errors=True)
        with contextlib.suppress(OSError):
            staging.with_name(f".{out.name}.journal").unlink()
    return {
        "bundle": str(out),
        "scheme": scheme.name,
        "ops": list(ops),
        "bytes": sum(sizes.values()),
        "files": sizes,
        "nodes_per_layer": nodes,
        "state_bytes": manifest.state_bytes(),
        "short_text": manifest.source.get("short_text"),
        "seconds": round(time.perf_counter() - begun, 2),
        "parity": {
            flavour: asdict(agreement) if agreement else None for flavour, agreement in measured.items()
        },
    }


def _check_layers(layout: Layout) -> None:
    scheme, count = layout.scheme, layout.geometry.num_layers
    beyond = [i for i in scheme.layers if i >= count]
    if beyond:
        raise LawcatError(
            f"The scheme names layer {beyond[0]}, but the model has {count}; correct the scheme."
        )
    paths = [(i, name) for i in range(count) for name in PRODUCTS if name != "head"]
    for i, name in paths:
        if layout.spec(name, i).kind == "static" and f"layers.{i}/{name}" not in layout.ranges:
            raise LawcatError(
                f"The scheme {scheme.name} needs ranges of activations; run lawcat-edge calibrate."
            )


def _store(layout: Layout, folder: Path, fingerprint: str, report: Progress) -> dict[str, ir.ExternalTensor]:
    total = layout.geometry.num_layers + 2
    with DataWriter(folder, fingerprint) as writer:
        report("weights", 0, total)
        writer.group("embedding", lambda: layout.store_embedding(writer))
        writer.group("first_norm", lambda: layout.store_first_norm(writer))
        for i in range(layout.geometry.num_layers):
            writer.group(f"layer {i}", lambda i=i: layout.store_layer(writer, i))  # type: ignore[misc]
            report("weights", i + 1, total)
        writer.group("head", lambda: layout.store_head(writer))
        report("weights", total, total)
        return writer.tensors


def _write_graphs(
    layout: Layout, folder: Path, tensors: Mapping[str, ir.ExternalTensor], ops: Sequence[str]
) -> dict[str, float]:
    """The graphs of every flavour; returns the mean number of nodes a layer of each."""
    kinds = {layout.config.full_attention(i) for i in range(layout.geometry.num_layers)}
    layers = {full: trace_layer(layout.geometry, layout.config, full) for full in kinds}
    counts = {}
    own_graph = genai.needs_own_graph(layout.config)
    for kind in ("last", "all"):
        model = stitch(layout, tensors, layers, all_positions=kind == "all")
        for flavour in ops:
            if flavour != "ort":
                variant = rewrite(model, flavour, tensors)
            elif kind == "last" and (own_graph or genai_flavour(ops) != "ort"):
                # Not where onnxruntime-genai reads this graph: it takes logits of a free number for all.
                variant = stitch(layout, tensors, layers, all_positions=False, choosable=True)
            else:
                variant = model
            ir.save(variant, folder / graph_files(flavour)[kind])
            nodes = sum((node.name or "").startswith("layers.") for node in variant.graph)
            counts[flavour] = round(nodes / layout.geometry.num_layers, 2)
        if kind == "last" and "portable" in ops:
            for name, tokens in (("step", 1), ("chunk", CHUNK)):
                fixed = fixed_sizes(layout.geometry, layout.config, tokens)
                ir.save(rewrite(model, "portable", tensors, fixed), folder / graph_files("portable")[name])
    if own_graph:
        best = genai_flavour(ops)
        interface = genai.GenaiInterface(layout, best)
        model = stitch(layout, tensors, layers, all_positions=False, interface=interface)
        ir.save(model if best == "ort" else rewrite(model, best, tensors), folder / genai.GRAPH)
    return counts


def fixed_sizes(geometry: Geometry, config: LawcatConfig, tokens: int) -> dict[str, int]:
    """Sizes of a graph without dynamic shapes, by the names of the dimensions."""
    spans = expected_spans(geometry.to_dict(), config.to_dict())
    slots = {SLOTS[name]: span - 1 + max(tokens, slack(span)) for name, span in spans.items()}
    return {"B": 1, "T": tokens, **slots, "R": max(tokens, *slots.values(), 1)}


def genai_flavour(ops: Sequence[str]) -> str:
    """The flavour that onnxruntime-genai gets."""
    return next(op for op in ("ort", "portable", "onnx") if op in ops)


def graph_files(flavour: str) -> dict[str, str]:
    """File of each graph of a flavour; the first flavour has the plain names that other tools expect."""
    stem = "model" if flavour == "ort" else f"model_{flavour}"
    files = {"last": f"{stem}.onnx", "all": f"{stem}_all.onnx"}
    if flavour == "portable":
        files |= {"step": f"{stem}_step.onnx", "chunk": f"{stem}_chunk.onnx"}
    return files


def check_adapter(tensors: Mapping[str, np.ndarray], geometry: Geometry, config: LawcatConfig) -> None:
    """Raise LawcatError when a new parameter is missing or has another shape than the settings imply."""
    for name, like in parameter_shapes(geometry, config).items():
        got = tensors[name].shape if name in tensors else None
        if got != like:
            raise LawcatError(f"The adapter's {name} is {got}, its settings imply {like}; it is damaged.")


def sample_tokens(geometry: Geometry, count: int = VERIFY_TOKENS, seed: int = 1) -> list[int]:
    """Token ids to replay when the caller has no text: random ones."""
    generator = np.random.default_rng(seed)
    return [int(t) for t in generator.integers(0, geometry.vocab_size, count)]


def _fingerprint(layout: Layout, source: Mapping[str, Any]) -> str:
    """Of everything the weights file depends on."""
    digest = hashlib.sha256()
    what = [
        layout.geometry.to_dict(),
        layout.config.to_dict(),
        layout.scheme.to_dict(),
        sorted(layout.ranges.items()),
        getattr(layout.rounder_of, "sha256", None),
        dict(source),
        _version(),
    ]
    digest.update(json.dumps(what, sort_keys=True).encode())
    for name in sorted(layout.adapter):
        digest.update(name.encode() + np.ascontiguousarray(layout.adapter[name]).tobytes())
    return digest.hexdigest()


@contextlib.contextmanager
def _readable_errors(out: Path) -> Any:
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise LawcatError(f"Cannot write {out}: {reason}; make room or choose another folder.") from error


def _version() -> str:
    try:
        return version("lawcat-edge")
    except PackageNotFoundError:
        return "0.1.0"
