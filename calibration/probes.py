"""A bundle's recurrent graph with the inputs of its matrix products laid open, and a text read through it."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import numpy as np

from lawcat_edge.runtime import rotary
from lawcat_edge.runtime.bundle import Bundle
from lawcat_edge.runtime.errors import LawcatError

_PRODUCT = re.compile(r"(layers\.\d+/(?:qkv|o|gate_up|down)|head)")


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
        import onnxruntime

        self.manifest = bundle.manifest
        if "ort" not in self.manifest.ops:
            raise LawcatError("Ranges are measured on the graph of --ops ort; export the bundle with it.")
        model = onnx.load(bundle.path(self.manifest.graphs["ort"]["all"]), load_external_data=False)
        nodes = [node for node in model.graph.node if _PRODUCT.fullmatch(node.name)]
        products = {
            node.name: node.input[0] for node in nodes if node.op_type in ("FusedMatMul", "MatMulNBits")
        }
        if len(products) != 4 * self.manifest.num_layers + 1:
            raise LawcatError(
                f"The products of {self.manifest.scheme} cannot be watched; calibrate on the fp32 bundle."
            )
        self.probes = {tensor: name for name, tensor in products.items() if only is None or name in only}
        kept = [value for value in model.graph.output if value.name != "logits"]
        del model.graph.output[:]
        model.graph.output.extend(kept)
        for tensor in self.probes:
            model.graph.output.append(
                onnx.helper.make_tensor_value_info(tensor, onnx.TensorProto.FLOAT, None)
            )
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if threads is not None:
            options.intra_op_num_threads = threads
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", os.path.abspath(bundle.folder)
        )
        self.session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        self.inputs = {item.name for item in self.session.get_inputs()}
        self.outputs = [item.name for item in self.session.get_outputs()]
        self.states = {
            tensor.output: f"state.{i}"
            for i, tensor in enumerate(t for t in self.manifest.state if t.input.endswith("recurrent_state"))
        }
        if only is None:
            self.probes |= self.states

    def empty_state(self) -> dict[str, np.ndarray]:
        return {t.input: np.zeros((1, *t.shape), np.float32) for t in self.manifest.state}

    def run(
        self, ids: np.ndarray, state: dict[str, np.ndarray], position: int
    ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """ids [1,T] -> (what was seen by name, the state after)."""
        feeds: dict[str, np.ndarray] = {"input_ids": ids, **state}
        if "window_fill" in self.inputs:
            feeds["window_fill"] = np.array([min(position, self.manifest.window - 1)], np.int64)
        if "rotary_cos" in self.inputs:
            frequencies = rotary.inverse_frequencies(self.manifest.geometry)
            angle = rotary.angles(frequencies, position, ids.shape[1])
            feeds["rotary_cos"] = np.cos(angle).astype(np.float32)
            feeds["rotary_sin"] = np.sin(angle).astype(np.float32)
        found = dict(zip(self.outputs, self.session.run(self.outputs, feeds), strict=True))
        after = {tensor.input: found[tensor.output] for tensor in self.manifest.state}
        return {name: found[tensor] for tensor, name in self.probes.items()}, after

    def read(self, texts: np.ndarray, chunk: int, keep_state: bool = True) -> Iterator[Seen]:
        """Texts int [n,T], each from an empty state, in chunks that carry the state on (or do not)."""
        for number, row in enumerate(texts):
            state = self.empty_state()
            for start in range(0, len(row), chunk):
                if not keep_state:
                    state = self.empty_state()
                ids = row[None, start : start + chunk].astype(np.int64)
                tensors, state = self.run(ids, state, start if keep_state else 0)
                yield Seen(number, start, ids.shape[1], tensors)
