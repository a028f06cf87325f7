"""Student -> bundle: trace one layer, stitch, stream the weights, verify, put in place."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
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
from lawcat_edge.export.schemes import LINEARS, SCHEMES, Scheme
from lawcat_edge.export.stitch import SLOTS, stitch
from lawcat_edge.export.trace import Template, trace_layer
from lawcat_edge.export.verify import Agreement, Reference, verify_folder
from lawcat_edge.export.writer import DATA, JOURNAL, DataWriter
from lawcat_edge.families import Geometry
from lawcat_edge.parameters import parameter_shapes
from lawcat_edge.progress import Progress, quiet
from lawcat_edge.runtime.bundle.flavours import DEFAULT_OPS, FLAVOURS, can_run, check_flavours, for_others
from lawcat_edge.runtime.bundle.manifest import (
    MANIFEST,
    Manifest,
    expected_spans,
    expected_state,
    save_manifest,
    write_manifest,
)
from lawcat_edge.runtime.bundle.signature import sign
from lawcat_edge.runtime.engine.session import PORTABLE_CHUNK
from lawcat_edge.runtime.errors import LawcatError
from lawcat_edge.runtime.files import FileLock, atomic_folder, write_json
from lawcat_edge.student import Student
from lawcat_edge.weights import check_shapes

VERIFY_TOKENS = 128


@dataclass(frozen=True)
class ExportOptions:
    """What a bundle shall hold besides the student.

    name: in the manifest; default: the folder's.
    ort_format: also write model.ort, the same model in onnxruntime's own format for mobile apps.
    verify: replay tokens in every graph. reference: tokens [T] -> logits [T,V] that they are held against;
    without it the graphs are only run and held against each other.
    ranges: (low, high) of what each static product reads, by "layers.3/down" (``calibration.ranges``).
    rounder_of: chooses the quantised values of a scheme with rounding "gptq" (``calibration.gptq``); without
    it weights are rounded to nearest.
    sampling: temperature, top_k, top_p, min_p, repetition_penalty for generation_config.json; what is left
    out is as the adapter or else the teacher has it.
    short_text: the losses of the bundle in a folder and of its teacher on a short text, for the manifest's
    source; asked once, after the verification.
    sign_with: a key of ``signature.load_private_key``. progress: called with (what, done, total).
    """

    scheme: Scheme = SCHEMES["int8"]
    ops: tuple[str, ...] = DEFAULT_OPS
    name: str | None = None
    ort_format: bool = False
    verify: bool = True
    reference: Reference | None = None
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    rounder_of: RounderOf | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    short_text: Callable[[Path], dict[str, Any]] | None = None
    sign_with: Any | None = None
    progress: Progress = quiet


def export_bundle(student: Student, out: Path | str, options: ExportOptions) -> dict[str, Any]:
    """Write the bundle ``out`` (a folder, replaced as a whole) and return a report.

    Raises CheckFailed when the bundle is further from the reference than the scheme allows, LawcatError for
    what does not fit together. A killed export is taken up again by the next one of the same student and
    options: what was stored is not stored again.
    """
    begun = time.perf_counter()
    layout = _checked_layout(student, options)
    out = Path(os.path.abspath(out))
    staging = out.with_name(f".{out.name}.export")
    out.parent.mkdir(parents=True, exist_ok=True)
    with _readable_errors(out), FileLock(staging):
        staging.mkdir(exist_ok=True)
        for path in staging.iterdir():  # of a killed export that had other options
            if path.name not in (DATA, JOURNAL):
                path.unlink()
        stored = _store(layout, staging, _fingerprint(layout, student.source), options.progress)
        options.progress("graph", 0, 1)
        nodes = _write_graphs(layout, staging, stored, options.ops)
        manifest = _complete(student, staging, options.name or out.name, options)
        measured = _verify(staging, manifest, options)
        if options.short_text is not None:
            options.progress("short text", 0, 1)
            manifest.source["short_text"] = options.short_text(staging)
            save_manifest(staging, manifest)
        if options.sign_with is not None:
            sign(staging, MANIFEST, options.sign_with)
        # The journal stays until all is done, so that a kill before does not repeat what was stored.
        written = [path for path in staging.iterdir() if path.name != JOURNAL]
        sizes = {path.name: path.stat().st_size for path in written}
        with atomic_folder(out, MANIFEST) as final:
            for path in written:
                path.rename(final / path.name)
        shutil.rmtree(staging, ignore_errors=True)
    return {
        "bundle": str(out),
        "scheme": options.scheme.name,
        "ops": list(options.ops),
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


def _checked_layout(student: Student, options: ExportOptions) -> Layout:
    """What is to be stored, after all checks that can be made before the slow steps."""
    geometry, config, ops = student.geometry, student.config, options.ops
    check_flavours(ops)
    if options.ort_format:
        mobile.ort_flavour(ops)
    spans = expected_spans(geometry.to_dict(), config.to_dict())
    by_onnxruntime = ("ort" in ops and spans) or ("native" in ops and "full" in spans)
    if geometry.head_dim % 16 and by_onnxruntime:
        raise LawcatError(
            f"onnxruntime's attention takes heads whose width is a multiple of 16, not {geometry.head_dim}; "
            "export with --ops portable."
        )
    check_shapes(student.teacher.weights(), geometry)
    check_adapter(student.tensors, geometry, config)
    merged, ranges, rounder_of = student.weights(), options.ranges, options.rounder_of
    layout = Layout(geometry, config, options.scheme, merged, student.tensors, ranges, rounder_of)
    _check_layers(layout)
    return layout


def _complete(student: Student, folder: Path, name: str, options: ExportOptions) -> Manifest:
    """The files beside weights and graphs, and the manifest of all."""
    geometry, config, ops, source = student.geometry, student.config, options.ops, student.teacher.folder
    adapter = student.adapter
    copy_tokenizer(source, folder, adapter.generation if adapter is not None else None, options.sampling)
    tokens = token_ids(source)
    graphs = {flavour: graph_files(flavour) for flavour in ops}
    if options.ort_format:
        options.progress("ort format", 0, 1)
        flavour = mobile.ort_flavour(ops)
        mobile.write_ort(folder, graphs[flavour]["last"])
        mobile.write_turns(folder)
        graphs[flavour]["ort_format"] = mobile.GRAPH
    best = for_others(ops)  # which onnxruntime-genai gets
    if genai.needs_own_graph(config):
        graphs[best]["genai"] = genai.GRAPH
    file = graphs[best].get("genai", graphs[best]["last"])
    write_json(folder / "genai_config.json", genai.genai_config(geometry, config, tokens, file, best))
    manifest = Manifest(
        name=name,
        created_by=f"lawcat-edge {_version()}",
        source=student.source,
        lawcat=config.to_dict(),
        geometry=geometry.to_dict(),
        scheme=options.scheme.name,
        ops=list(ops),
        graphs=graphs,
        state=expected_state(geometry.to_dict(), config.to_dict()),
        tokens=tokens,
        min_onnxruntime={op: FLAVOURS[op].min_onnxruntime for op in ops},
    )
    write_manifest(folder, manifest)
    return manifest


def _verify(folder: Path, manifest: Manifest, options: ExportOptions) -> dict[str, Agreement | None]:
    """Agreement with the reference of every flavour that can run here; what a device can replay goes into the
    manifest."""
    measured: dict[str, Agreement | None] = {}
    if not options.verify:
        return measured
    options.progress("verify", 0, 1)
    scheme, tokens = options.scheme, sample_tokens(manifest.vocab_size)
    for flavour in filter(can_run, options.ops):
        parity, measured[flavour] = verify_folder(
            folder, tokens, options.reference, scheme.max_rel_err, scheme.max_kl, flavour
        )
        manifest.parity = manifest.parity or parity
    save_manifest(folder, manifest)  # the files are those that were described before
    return measured


def _check_layers(layout: Layout) -> None:
    scheme, count = layout.scheme, layout.geometry.num_layers
    beyond = [i for i in scheme.layers if i >= count]
    if beyond:
        raise LawcatError(
            f"The scheme names layer {beyond[0]}, but the model has {count}; correct the scheme."
        )
    paths = [(i, name) for i in range(count) for name in LINEARS if name != "head"]
    for i, name in paths:
        if layout.spec(name, i).kind == "static" and f"layers.{i}/{name}" not in layout.ranges:
            raise LawcatError(
                f"The scheme {scheme.name} needs ranges of activations; run lawcat-edge calibrate."
            )


def _store(layout: Layout, folder: Path, fingerprint: str, report: Progress) -> dict[str, ir.ExternalTensor]:
    total = layout.geometry.num_layers
    what = "layers" if layout.rounder_of is None else f"layers, {layout.scheme.rounding}"
    with DataWriter(folder, fingerprint) as writer:
        report(what, 0, total)
        writer.group("embedding", lambda: layout.store_embedding(writer))
        writer.group("first_norm", lambda: layout.store_first_norm(writer))
        for i in range(layout.geometry.num_layers):
            writer.group(f"layer {i}", lambda i=i: layout.store_layer(writer, i))  # type: ignore[misc]
            report(what, i + 1, total)
        writer.group("head", lambda: layout.store_head(writer))
        return writer.tensors


def _write_graphs(
    layout: Layout, folder: Path, tensors: Mapping[str, ir.ExternalTensor], ops: Sequence[str]
) -> dict[str, float]:
    """The graphs of every flavour; returns the mean number of nodes a layer of each."""

    def traced(native: bool = False) -> dict[bool, Template]:
        kinds = {layout.config.full_attention(i) for i in range(layout.geometry.num_layers)}
        return {full: trace_layer(layout.geometry, layout.config, full, native) for full in kinds}

    layers = traced()
    counts = {}
    own_graph, best = genai.needs_own_graph(layout.config), for_others(ops)
    for kind in ("last", "all"):
        model = stitch(layout, tensors, layers, all_positions=kind == "all")
        for flavour in ops:
            if flavour == "native":
                every = kind == "all"
                own = traced(native=True)
                variant = stitch(layout, tensors, own, every, choosable=not every, native=True)
            elif flavour != "ort":
                variant = rewrite(model, flavour, tensors)
            elif kind == "last" and (own_graph or best != "ort"):
                # Not where onnxruntime-genai reads this graph: it takes logits of a free number for all.
                variant = stitch(layout, tensors, layers, all_positions=False, choosable=True)
            else:
                variant = model
            ir.save(variant, folder / graph_files(flavour)[kind])
            nodes = sum((node.name or "").startswith("layers.") for node in variant.graph)
            counts[flavour] = round(nodes / layout.geometry.num_layers, 2)
        if kind == "last" and "portable" in ops:
            for name, tokens in (("step", 1), ("chunk", PORTABLE_CHUNK)):
                fixed = fixed_sizes(layout.geometry, layout.config, tokens)
                ir.save(rewrite(model, "portable", tensors, fixed), folder / graph_files("portable")[name])
    if own_graph:
        interface = genai.GenaiInterface(layout, best)
        model = stitch(layout, tensors, layers, all_positions=False, interface=interface)
        ir.save(model if best == "ort" else rewrite(model, best, tensors), folder / genai.GRAPH)
    return counts


def fixed_sizes(geometry: Geometry, config: LawcatConfig, tokens: int) -> dict[str, int]:
    """Sizes of a graph without dynamic shapes, by the names of the dimensions."""
    spans = expected_spans(geometry.to_dict(), config.to_dict())
    slots = {SLOTS[name]: span.slots(tokens) for name, span in spans.items()}
    return {"B": 1, "T": tokens, **slots, "R": max(tokens, *slots.values(), 1)}


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


def sample_tokens(vocab_size: int) -> list[int]:
    """Token ids to replay, the same for every bundle of a vocabulary."""
    return [int(t) for t in np.random.default_rng(1).integers(0, vocab_size, VERIFY_TOKENS)]


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
