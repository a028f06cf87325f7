"""A bundle's recurrent graph with the inputs of its matrix products laid open, and a text read through it."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from lawcat_edge.calibration.graph import RecurrentGraph
from lawcat_edge.runtime.bundle.manifest import Bundle
from lawcat_edge.runtime.engine.state import State
from lawcat_edge.runtime.errors import LawcatError

# The first node of a product, of any kind but the static one, reads what the product reads.
_PRODUCT = re.compile(r"(layers\.\d+/(?:qkv|o|gate_up|down)|head)(/abs)?")
_FIRST = {"FusedMatMul": None, "MatMulNBits": None, "Abs": "/abs"}


@dataclass(frozen=True)
class Seen:
    """What one chunk of a text showed: by name, activations [1,T,width] (and states)."""

    row: int
    start: int
    tokens: int
    tensors: dict[str, np.ndarray]


class Probed:
    """A bundle's graph of all positions, without its head, with the inputs of the products as outputs.

    only: the products to watch ("layers.3/down", "head"); default all of them, and the recurrent states.
    """

    def __init__(self, bundle: Bundle, threads: int | None, only: Collection[str] | None = None) -> None:
        import onnx

        self.manifest = bundle.manifest
        if "ort" not in self.manifest.ops:
            raise LawcatError("Ranges are measured on the graph of --ops ort; export the bundle with it.")
        model = onnx.load(bundle.path(self.manifest.graphs["ort"]["all"]), load_external_data=False)
        found = ((_PRODUCT.fullmatch(node.name), node) for node in model.graph.node)
        products = {
            match[1]: node.input[0]
            for match, node in found
            if match and node.op_type in _FIRST and match[2] == _FIRST[node.op_type]
        }
        if len(products) != 4 * self.manifest.num_layers + 1:
            raise LawcatError(
                f"The products of {self.manifest.scheme} cannot be watched; calibrate on another bundle."
            )
        self.probes = {tensor: name for name, tensor in products.items() if only is None or name in only}
        kept = [value for value in model.graph.output if value.name != "logits"]
        del model.graph.output[:]
        model.graph.output.extend(kept)
        for tensor in self.probes:
            model.graph.output.append(
                onnx.helper.make_tensor_value_info(tensor, onnx.TensorProto.FLOAT, None)
            )
        _prune(model.graph)
        source = self.manifest
        self.graph = RecurrentGraph(
            model.SerializeToString(), bundle.folder, source.geometry, source.lawcat, threads
        )
        self.states = {
            tensor.output: f"state.{i}"
            for i, tensor in enumerate(t for t in source.state if t.input.endswith("recurrent_state"))
        }
        if only is None:
            self.probes |= self.states

    def run(self, ids: np.ndarray, state: State) -> dict[str, np.ndarray]:
        """ids [1,T] -> what was seen by name; the state goes on."""
        seen = self.graph.run(ids, state)
        return {name: seen[tensor] for tensor, name in self.probes.items()}

    def read(self, texts: np.ndarray, chunk: int, keep_state: bool = True) -> Iterator[Seen]:
        """Texts int [n,T], each from an empty state, in chunks that carry the state on (or do not)."""
        for number, row in enumerate(texts):
            for start, ids, state in self.graph.pieces(row, chunk, keep_state):
                yield Seen(number, start, ids.shape[1], self.run(ids, state))


def _prune(graph: Any) -> None:
    """Remove the nodes that no output needs, which onnxruntime would run: here the head."""
    needed, kept = {value.name for value in graph.output}, []
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            needed.update(node.input)
            kept.append(node)
    del graph.node[:]
    graph.node.extend(reversed(kept))
