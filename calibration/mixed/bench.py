"""A student's graph in any mixture of a few kinds of product, without an export for each.

Every product is stored once in float32 and once in each of the choices, by the exporter's own functions, and
the graph of a scheme is stitched over whichever of these files it needs: it computes what the bundle of that
scheme would, and costs no more than loading it. For SmolLM2-135M with three choices that is 1.1 GB of disk,
the reference logits included.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path

import numpy as np
import onnx_ir as ir

from lawcat_edge import __version__
from lawcat_edge.calibration.comparison.rows import key_of
from lawcat_edge.calibration.graph import RecurrentGraph
from lawcat_edge.export.layout import Layout
from lawcat_edge.export.schemes import LINEARS, Linear, Scheme
from lawcat_edge.export.stitch import stitch
from lawcat_edge.export.trace import Template, trace_layer
from lawcat_edge.export.writer import DataWriter
from lawcat_edge.losses import token_kl
from lawcat_edge.progress import Progress, quiet
from lawcat_edge.student import Student

FP32 = Linear("fp32")
_CHUNK = 256  # positions whose logits exist at once


class Bench:
    """Graphs of ``student`` for schemes whose products are among ``choices`` or fp32, held against fp32.

    choices: by a name that serves as the folder's. rotate: whether all graphs are in the rotated basis.
    folder: for the weights, which ``remove`` deletes; what a killed run has stored is taken up again.
    ids: sequences [n,T], each read from an empty state.
    """

    def __init__(
        self,
        student: Student,
        folder: Path,
        ids: np.ndarray,
        choices: Mapping[str, Linear],
        rotate: bool,
        threads: int | None = None,
        progress: Progress = quiet,
    ) -> None:
        self.student, self.folder, self.ids, self.rotate = student, folder, ids, rotate
        self.threads, self.progress = threads, progress
        self.choices = {"fp32": FP32, **choices}

    def uniform(self, product: Linear) -> Scheme:
        """Every product alike. The head and the embedding, which cannot be of every kind, are fp32 then."""
        head = product if product.kind in ("fp32", "nbits") and not product.offsets else FP32
        products = {name: head if name == "head" else product for name in LINEARS}
        return Scheme("bench", products, head, 10.0, 3.0, self.rotate)

    def kl(self, scheme: Scheme) -> dict[str, float]:
        """Mean and 99th percentile of KL(fp32 ‖ scheme) over all tokens."""
        reference, graph = self._reference, self.graph(scheme)
        losses = []
        for row, known in zip(self.ids, reference, strict=True):
            at = 0
            for seen in self._read(graph, row):  # in pieces that a full buffer may shorten
                losses.append(token_kl(known[at : at + len(seen)], seen))
                at += len(seen)
        joined = np.concatenate(losses)
        return {"kl": float(joined.mean()), "kl_p99": float(np.quantile(joined, 0.99))}

    def logits(self, scheme: Scheme) -> np.ndarray:
        """float32 [n,T,V]."""
        graph = self.graph(scheme)
        return np.stack([np.concatenate(list(self._read(graph, row))) for row in self.ids])

    def graph(self, scheme: Scheme) -> RecurrentGraph:
        assert scheme.rotate == self.rotate, scheme.name
        layout = self._layout(scheme)
        model = stitch(layout, self._tensors(scheme), self._templates, all_positions=True)
        proto = ir.serde.serialize_model(model)
        geometry, config = layout.geometry.to_dict(), layout.config.to_dict()
        return RecurrentGraph(proto.SerializeToString(), self.folder, geometry, config, self.threads)

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _read(self, graph: RecurrentGraph, row: np.ndarray) -> Iterator[np.ndarray]:
        return (seen["logits"][0] for seen in graph.read(row, _CHUNK))

    def _layout(self, scheme: Scheme) -> Layout:
        student = self.student
        return Layout(student.geometry, student.config, scheme, student.weights(), student.tensors)

    @cached_property
    def _templates(self) -> dict[bool, Template]:
        geometry, config = self.student.geometry, self.student.config
        kinds = {config.full_attention(i) for i in range(geometry.num_layers)}
        return {full: trace_layer(geometry, config, full) for full in kinds}

    @cached_property
    def _reference(self) -> np.ndarray:
        """Logits of the fp32 graph [n,T,V], on disk: they may be hundreds of megabytes."""
        shape = (*self.ids.shape, self.student.geometry.vocab_size)
        self.folder.mkdir(parents=True, exist_ok=True)
        held = np.lib.format.open_memmap(self.folder / "logits.npy", "w+", np.float32, shape)
        graph = self.graph(self.uniform(FP32))
        for row, into in zip(self.ids, held, strict=True):
            at = 0
            for seen in self._read(graph, row):
                into[at : at + len(seen)] = seen
                at += len(seen)
        return held

    # -- the weights -----------------------------------------------------------------------------------------

    @cached_property
    def _stored(self) -> dict[str, dict[str, ir.ExternalTensor]]:
        """The tensors of every choice; those that are no product's are with fp32."""
        stored = {}
        for done, (name, product) in enumerate(self.choices.items()):
            self.progress("storing", done, len(self.choices))
            stored[name] = self._store(name, product)
        self.progress("storing", len(self.choices), len(self.choices))
        return stored

    def _store(self, name: str, product: Linear) -> dict[str, ir.ExternalTensor]:
        layout = self._layout(self.uniform(product))
        place = self.folder / name
        place.mkdir(parents=True, exist_ok=True)
        key = key_of(self.student.source, layout.config.to_dict(), layout.scheme.to_dict(), __version__)
        whole = product == FP32
        with DataWriter(place, key) as writer:
            if whole or layout.scheme.linears["head"] != FP32:
                writer.group("embedding", lambda: layout.store_embedding(writer))
                writer.group("head", lambda: layout.store_head(writer))
            if whole:
                writer.group("first_norm", lambda: layout.store_first_norm(writer))
            for i in range(layout.geometry.num_layers):
                store = layout.store_layer if whole else layout.store_linears
                writer.group(f"layer {i}", lambda i=i, store=store: store(writer, i))  # type: ignore[misc]
        return {key: _moved(tensor, self.folder, name) for key, tensor in writer.tensors.items()}

    def _tensors(self, scheme: Scheme) -> dict[str, ir.ExternalTensor]:
        """Those that the graph of a scheme may ask for."""
        names = {product: name for name, product in self.choices.items()}
        found = dict(self._stored["fp32"])

        def take(product: Linear, prefixes: tuple[str, ...]) -> None:
            own = self._stored[names[product]]
            found.update({name: tensor for name, tensor in own.items() if name.startswith(prefixes)})

        take(scheme.linears["head"], ("embedding.", "head"))
        for i in range(self.student.geometry.num_layers):
            for name in LINEARS:
                if name != "head":
                    take(scheme.linear(name, i), (f"layers.{i}.{name}.",))
        return found


def _moved(tensor: ir.ExternalTensor, root: Path, folder: str) -> ir.ExternalTensor:
    """The same bytes, named from the folder above."""
    return ir.ExternalTensor(
        f"{folder}/{tensor.location}",
        tensor.offset,
        tensor.length,
        tensor.dtype,
        shape=tensor.shape,
        name=tensor.name,
        base_dir=root,
    )
