"""A thin layer over onnx_ir: nodes and initialisers by name, templates instantiated with other inputs."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal, overload

import numpy as np
import onnx_ir as ir
from onnx import helper

MS = "com.microsoft"


class GraphBuilder:
    """Collects the nodes of one graph. Initialisers are made on first use and shared by name."""

    def __init__(self, tensors: Mapping[str, ir.ExternalTensor], native: bool = False) -> None:
        """native: whether operators may be of ``runtime.native``."""
        self._tensors, self.native = tensors, native
        self._initializers: dict[str, ir.Value] = {}
        self._widened: dict[str, ir.Value] = {}
        self.nodes: list[ir.Node] = []
        self.inputs: list[ir.Value] = []
        self.outputs: list[ir.Value] = []

    def input(
        self, name: str, dtype: ir.DataType, shape: Sequence[int | str], default: np.ndarray | None = None
    ) -> ir.Value:
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
        if default is not None:  # an initialiser that is an input too: a caller may leave it out
            value.const_value = ir.Tensor(default, name=name)
            self._initializers[name] = value
        self.inputs.append(value)
        return value

    def output(self, value: ir.Value, name: str, shape: Sequence[int | str]) -> None:
        value.name, value.type, value.shape = name, ir.TensorType(ir.DataType.FLOAT), ir.Shape(shape)
        self.outputs.append(value)

    def raw(self, name: str) -> ir.Value:
        """A tensor of the weights file as it is stored."""
        return self.initializer(name, self._tensors[name])

    def stored(self, name: str) -> ir.Value:
        """A tensor of the weights file; one in float16 behind a Cast to float32, which loading folds away."""
        tensor = self._tensors[name]
        if tensor.dtype != ir.DataType.FLOAT16:
            return self.initializer(name, tensor)
        if name not in self._widened:
            half = self.initializer(name, tensor)
            wide = self.node("Cast", [half], f"folded/{name}", to=ir.DataType.FLOAT)
            # flavours read the sizes
            wide.type, wide.shape = ir.TensorType(ir.DataType.FLOAT), half.shape
            self._widened[name] = wide
        return self._widened[name]

    def view(self, name: str, shape: list[int], dtype: ir.DataType | None = None) -> ir.Value:
        """A stored tensor under another shape (and type): the same bytes, not a copy and not a Reshape."""
        whole = self._tensors[name]
        other = f"{name}.as_{'x'.join(map(str, shape))}"
        tensor = ir.ExternalTensor(
            whole.location,
            whole.offset,
            whole.length,
            dtype or whole.dtype,
            shape=ir.Shape(shape),
            name=other,
            base_dir=whole.base_dir,
        )
        return self.initializer(other, tensor)

    def constant(self, value: np.ndarray, name: str | None = None) -> ir.Value:
        """A small tensor inside the graph file; equal ones are one."""
        value = np.asarray(value)
        digest = hashlib.sha1(value.tobytes(), usedforsecurity=False).hexdigest()[:16]
        name = name or f"const_{value.dtype}_{'x'.join(map(str, value.shape))}_{digest}"
        return self.initializer(name, ir.Tensor(value, name=name))

    def scalar(self, value: np.generic) -> ir.Value:
        return self.constant(np.asarray(value))

    def initializer(self, name: str, tensor: Any) -> ir.Value:
        """The initialiser of this name, made from ``tensor`` on first use."""
        if name not in self._initializers:
            self._initializers[name] = ir.Value(
                name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor
            )
        return self._initializers[name]

    @overload
    def node(
        self,
        op: str,
        inputs: Sequence[ir.Value | None],
        name: str,
        domain: str = "",
        outputs: Literal[1] = 1,
        **attributes: Any,
    ) -> ir.Value: ...

    @overload
    def node(
        self,
        op: str,
        inputs: Sequence[ir.Value | None],
        name: str,
        domain: str = "",
        *,
        outputs: int,
        **attributes: Any,
    ) -> Any: ...

    def node(
        self,
        op: str,
        inputs: Sequence[ir.Value | None],
        name: str,
        domain: str = "",
        outputs: int = 1,
        **attributes: Any,
    ) -> Any:
        """Add a node; its output, or a tuple of them, named after the node."""
        node = ir.node(op, inputs, attributes=attributes, domain=domain, num_outputs=outputs, name=name)
        for i, value in enumerate(node.outputs):
            value.name = name if i == 0 else f"{name}:{i}"
        self.nodes.append(node)
        return node.outputs[0] if outputs == 1 else tuple(node.outputs)

    def model(self, opset_imports: dict[str, int], keep: set[str | None] | None = None) -> ir.Model:
        """keep: names of the initialisers to write; default all."""
        graph = ir.Graph(
            self.inputs,
            self.outputs,
            nodes=self.nodes,
            initializers=[v for v in self._initializers.values() if keep is None or v.name in keep],
            opset_imports=opset_imports,
            name="lawcat",
        )
        # Runtimes refuse a file format newer than they know, so write the oldest that holds these operators
        known = [helper.make_opsetid("", opset_imports[""])]
        ir_version = helper.find_min_ir_version_for(known)
        return ir.Model(graph, ir_version=ir_version, producer_name="lawcat-edge")
