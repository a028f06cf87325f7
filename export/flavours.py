"""The same graph in other operators, over the same weights file.

``ort`` is what the stitcher makes: com.microsoft operators, onnxruntime from 1.25.1; of other templates
(``export.native``) it makes ``native``. The others are made from ``ort`` node by node:

- ``onnx``: standard operators of opset 27 alone, for interchange.
- ``portable``: operators of opset 17 alone, for runtimes without either (onnxruntime from 1.17). The linear
  attention becomes its recurrence for one token, or its quadratic form over the T tokens of a call, where
  memory grows with T^2: feed it at most 64 tokens at once. Weights in blocks are dequantised when the model
  is loaded; integer products there come from the scheme ``int8-dynamic``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from lawcat_edge.export.builder import GraphBuilder

OPSETS = {"onnx": 27, "portable": 17}
Values = list[ir.Value | None]


def rewrite(
    model: ir.Model,
    flavour: str,
    tensors: Mapping[str, ir.ExternalTensor],
    fixed: Mapping[str, int] | None = None,
) -> ir.Model:
    """A new model in the operators of ``flavour``; ``fixed``: sizes of dimensions that are named in it."""
    return _Rewriter(GraphBuilder(tensors), flavour, fixed or {}).run(model)


class _Rewriter:
    """One pass over the nodes. A rule is a method ``on_<operator>``; other nodes are copied."""

    def __init__(self, g: GraphBuilder, flavour: str, fixed: Mapping[str, int]) -> None:
        self.g, self.flavour, self.fixed, self.tokens = g, flavour, fixed, fixed.get("T")
        self.values: dict[ir.Value, ir.Value] = {}
        self._mask: tuple[ir.Value, ir.Value] | None = None
        self._common: dict[tuple[Any, ...], ir.Value] = {}
        self._grouped: dict[Any, int] = {}  # weights [B,G,nT,C] and their heads

    def run(self, model: ir.Model) -> ir.Model:
        g = self.g

        def shape_of(value: ir.Value) -> list[int | str]:
            assert value.shape is not None
            names = [dim if isinstance(dim, int) else str(dim.value) for dim in value.shape]
            return [self.fixed.get(dim, dim) if isinstance(dim, str) else dim for dim in names]

        for value in model.graph.inputs:
            assert value.dtype is not None
            assert value.name
            self.values[value] = g.input(value.name, value.dtype, shape_of(value))
        for name, value in model.graph.initializers.items():
            if isinstance(value.const_value, ir.ExternalTensor):
                self.values[value] = g.initializer(name, value.const_value)
            else:
                assert value.const_value is not None
                self.values[value] = g.constant(value.const_value.numpy(), name)
        for node in model.graph:
            own = [None if value is None else self.values[value] for value in node.inputs]
            rule: Callable[..., Any] | None = getattr(self, f"on_{node.op_type}", None)
            attributes = {name: attribute.value for name, attribute in node.attributes.items()}
            outputs = rule(own, attributes, node.name or "") if rule else None
            if outputs is None:
                outputs = self._copy(node, own, attributes)
            for old, new in zip(node.outputs, outputs, strict=False):
                self.values[old] = new
        for value in model.graph.outputs:
            assert value.name
            g.output(self.values[value], value.name, shape_of(value))
        used = {value.name for node in g.nodes for value in node.inputs if value is not None}
        return g.model({"": OPSETS[self.flavour]}, keep=used)

    def _copy(self, node: ir.Node, own: Values, attributes: dict[str, Any]) -> list[ir.Value]:
        assert not node.domain, f"no rule for {node.domain}::{node.op_type}"
        made = self.g.node(
            node.op_type, own, node.name or "", outputs=len(node.outputs), **_plain(attributes)
        )
        results = [made] if len(node.outputs) == 1 else list(made)
        for old, new in zip(node.outputs, results, strict=True):
            # known for stored tensors alone, whose sizes rules read
            new.type, new.shape = old.type, old.shape
        return results

    def _do(
        self, op: str, inputs: Sequence[ir.Value | None], path: str, what: str, **attributes: Any
    ) -> ir.Value:
        result: ir.Value = self.g.node(op, inputs, f"{path}/{what}", **attributes)
        return result

    def _ints(self, *values: int) -> ir.Value:
        return self.g.constant(np.array(values, np.int64))

    def _float(self, value: float) -> ir.Value:
        return self.g.constant(np.array(value, np.float32))

    # -- products --------------------------------------------------------------------------------------------

    def on_FusedMatMul(self, own: Values, attributes: dict[str, Any], path: str) -> list[ir.Value]:  # noqa: N802
        assert attributes == {"transB": 1}, attributes
        weight = self._do("Transpose", [own[1]], path, "weight", perm=[1, 0])
        return [self._do("MatMul", [own[0], weight], path, "product")]

    def on_MatMulNBits(self, own: Values, attributes: dict[str, Any], path: str) -> list[ir.Value]:  # noqa: N802
        g, N, K, bits, block = self.g, *(attributes[k] for k in ("N", "K", "bits", "block_size"))
        weights, blocks = _name(own[1]), -(-K // block)
        scales = self._do("Reshape", [own[2], self._ints(N, blocks, 1)], path, "scales")
        if self.flavour == "onnx":
            dtype = ir.DataType.UINT8 if bits == 8 else ir.DataType.UINT4
            codes = g.view(weights, [N, blocks, block], dtype)
            filled = ir.Tensor(np.array([1 << (bits - 1)], np.uint8))
            zero = self._do("ConstantOfShape", [self._ints(N, blocks, 1)], path, "zero8", value=filled)
            if bits == 4:
                zero = self._do("Cast", [zero], path, "zero4", to=dtype)
            weight = self._do(
                "DequantizeLinear", [codes, scales, zero], path, "weight", axis=2, block_size=block
            )
        else:
            codes = self._do("Cast", [own[1]], path, "codes", to=ir.DataType.FLOAT)
            if bits == 4:
                codes = self._nibbles(codes, path, self._ints(N, blocks, block))
            centred = self._do("Sub", [codes, self._float(1 << (bits - 1))], path, "centred")
            weight = self._do("Mul", [centred, scales], path, "weight")
        weight = self._do("Reshape", [weight, self._ints(N, blocks * block)], path, "matrix")
        if blocks * block != K:
            weight = self._do(
                "Slice", [weight, self._ints(0), self._ints(K), self._ints(1)], path, "unpadded"
            )
        weight = self._do("Transpose", [weight], path, "transposed", perm=[1, 0])
        result = self._do("MatMul", [own[0], weight], path, "product")
        if len(own) > 5:
            result = self._do("Add", [result, own[5]], path, "bias")
        return [result]

    def _nibbles(self, bytes_: ir.Value, path: str, shape: ir.Value) -> ir.Value:
        """Bytes as floats -> the two values in each, low first, in a shape of twice as many."""
        do = self._do
        high = do("Floor", [do("Mul", [bytes_, self._float(1 / 16)], path, "sixteenth")], path, "high")
        low = do("Sub", [bytes_, do("Mul", [high, self._float(16)], path, "upper")], path, "low")
        ends = [
            do("Unsqueeze", [part, self._ints(-1)], path, f"end{i}") for i, part in enumerate((low, high))
        ]
        return do("Reshape", [do("Concat", ends, path, "pairs", axis=-1), shape], path, "unpacked")

    def on_MatMulIntegerToFloat(self, own: Values, attributes: dict[str, Any], path: str) -> list[ir.Value]:  # noqa: N802
        a, b, a_scale, b_scale, a_zero, b_zero, *bias = own
        total = self._do("MatMulInteger", [a, b, a_zero, b_zero], path, "integer")
        total = self._do("Cast", [total], path, "float", to=ir.DataType.FLOAT)
        scales = self._do("Mul", [b_scale, a_scale], path, "scales")
        total = self._do("Mul", [total, scales], path, "scaled")
        return [self._do("Add", [total, *bias], path, "bias") if bias else total]

    def on_GatherBlockQuantized(self, own: Values, attributes: dict[str, Any], path: str) -> list[ir.Value]:  # noqa: N802
        codes, ids, scales = own
        bits, block = attributes["bits"], attributes["block_size"]
        width = _shape(codes)[1] * 8 // bits
        rows = self._do("Gather", [codes, ids], path, "codes", axis=0)
        rows = self._do("Cast", [rows], path, "float", to=ir.DataType.FLOAT)
        shape = self._ints(0, 0, width // block, block)
        if bits == 4:
            rows = self._nibbles(rows, path, shape)
        rows = self._do("Sub", [rows, self._float(1 << (bits - 1))], path, "centred")
        rows = self._do("Reshape", [rows, shape], path, "grouped")
        scale = self._do("Gather", [scales, ids], path, "scales", axis=0)
        scale = self._do("Unsqueeze", [scale, self._ints(3)], path, "scale")
        rows = self._do("Mul", [rows, scale], path, "scaled")
        return [self._do("Reshape", [rows, self._ints(0, 0, width)], path, "rows")]

    # -- norms and activation --------------------------------------------------------------------------------

    def on_SkipSimplifiedLayerNormalization(  # noqa: N802
        self, own: Values, attributes: dict[str, Any], path: str
    ) -> list[ir.Value]:
        total = self._do("Add", own[:2], path, "residual")
        if len(own) > 3:
            total = self._do("Add", [total, own[3]], path, "bias")
        normed = self.on_SimplifiedLayerNormalization([total, own[2]], attributes, path)[0]
        return [normed, total, total, total]  # the two in the middle are never read

    def on_SimplifiedLayerNormalization(  # noqa: N802
        self, own: Values, attributes: dict[str, Any], path: str
    ) -> list[ir.Value]:
        x, gamma = own
        epsilon = attributes["epsilon"]
        if self.flavour == "onnx":
            return [self._do("RMSNormalization", [x, gamma], path, "norm", axis=-1, epsilon=epsilon)]
        power = self._do(
            "ReduceMean", [self._do("Mul", [x, x], path, "square")], path, "power", axes=[-1], keepdims=1
        )
        root = self._do("Sqrt", [self._do("Add", [power, self._float(epsilon)], path, "eps")], path, "root")
        return [self._do("Mul", [self._do("Div", [x, root], path, "unit"), gamma], path, "norm")]

    def on_QuickGelu(self, own: Values, attributes: dict[str, Any], path: str) -> list[ir.Value]:  # noqa: N802
        assert attributes == {"alpha": 1.0}
        return [self._do("Mul", [own[0], self._do("Sigmoid", own, path, "sigmoid")], path, "silu")]

    # -- softmax attention -----------------------------------------------------------------------------------

    def on_RotaryEmbedding(self, own: Values, attributes: dict[str, Any], path: str) -> list[ir.Value]:  # noqa: N802
        x, positions, cos, sin = own
        return [self._rotated(x, attributes["num_heads"], (cos, sin, positions), path)]

    def _rotated(self, x: ir.Value | None, heads: int, tables: tuple[Any, Any, Any], path: str) -> ir.Value:
        """x [B,T,heads d], rotated by the rows of the tables cos and sin that positions name."""
        do, (cos, sin, positions) = self._do, tables
        if self.flavour == "onnx":
            return do("RotaryEmbedding", [x, cos, sin, positions], path, "rotated", num_heads=heads)
        x4 = do("Reshape", [x, self._ints(0, 0, heads, -1)], path, "heads")
        half = _shape(cos)[1]
        halves = self.g.node("Split", [x4, self._ints(half, half)], f"{path}/halves", outputs=2, axis=3)
        c, s = (self._shared(self._table, table, positions) for table in (cos, sin))
        rotated = [
            do(op, [do("Mul", [near, c], path, f"{op}c"), do("Mul", [far, s], path, f"{op}s")], path, op)
            for op, near, far in (("Sub", *halves), ("Add", *halves[::-1]))
        ]
        return do(
            "Reshape", [do("Concat", rotated, path, "joined", axis=3), self._ints(0, 0, -1)], path, "rotated"
        )

    def on_GroupQueryAttention(  # noqa: N802
        self, own: Values, attributes: dict[str, Any], path: str
    ) -> list[ir.Value]:
        q, k, v, key, value, seqlens, _, cos, sin, positions = own
        do, H, G = self._do, attributes["num_heads"], attributes["kv_num_heads"]
        d, n, span = _shape(key)[3], H // G, attributes["local_window_size"]
        if k is None:
            widths = self._ints(H * d, G * d, G * d)
            q, k, v = self.g.node("Split", [q, widths], f"{path}/qkv", outputs=3, axis=2)
        q, k = (
            self._rotated(x, heads, (cos, sin, positions), f"{path}/{name}")
            for x, heads, name in ((q, H, "q"), (k, G, "k"))
        )
        rows = [
            do(
                "Transpose",
                [do("Reshape", [x, self._ints(0, 0, G, d)], path, f"{name}4")],
                path,
                name,
                perm=[0, 2, 1, 3],
            )
            for x, name in ((k, "new_key"), (v, "new_value"))
        ]
        key, value = (
            self._written(old, new, seqlens, f"{path}/{name}")
            for old, new, name in ((key, rows[0], "key"), (value, rows[1], "value"))
        )
        mask = self._shared(self._visible, seqlens, key, span)
        if self.flavour == "onnx":
            q = do("Reshape", [q, self._ints(0, 0, H, d)], path, "q4")
            q = do("Transpose", [q], path, "queries", perm=[0, 2, 1, 3])
            scaled = "qk_output" in attributes  # then the weights are asked for
            extra: dict[str, Any] = {"qk_matmul_output_mode": 3} if scaled else {}
            made = self.g.node(
                "Attention",
                [q, key, value, mask],
                f"{path}/read",
                outputs=4 if scaled else 1,
                scale=attributes["scale"],
                **extra,
            )
            out = made[0] if scaled else made
            out = do("Transpose", [out], path, "rows", perm=[0, 2, 1, 3])
            out = do("Reshape", [out, self._ints(0, 0, H * d)], path, "out")
            return [out, key, value, *([made[3]] if scaled else [])]
        # heads that share keys are rows beside each other: [B,G,nT,d]
        q = do("Reshape", [q, self._ints(0, 0, G, n, d)], path, "q5")
        q = do("Transpose", [q], path, "queries5", perm=[0, 2, 3, 1, 4])
        q = do("Reshape", [q, self._ints(0, 0, -1, d)], path, "queries")
        q = do("Mul", [q, self._float(attributes["scale"])], path, "scaled")
        scores = do("MatMul", [q, do("Transpose", [key], path, "keyT", perm=[0, 1, 3, 2])], path, "scores")
        tiled = mask if n == 1 else self._shared(self._tiled, mask, n)
        weights = do("Softmax", [do("Add", [scores, tiled], path, "masked")], path, "weights", axis=-1)
        out = do("MatMul", [weights, value], path, "read")
        out = do("Reshape", [out, self._ints(0, 0, n, -1, d)], path, "heads5")
        out = do("Transpose", [out], path, "rows", perm=[0, 3, 1, 2, 4])
        self._grouped[weights] = H
        return [do("Reshape", [out, self._ints(0, 0, H * d)], path, "out"), key, value, weights]

    def _written(self, old: Any, new: ir.Value, seqlens: Any, path: str) -> ir.Value:
        """The buffer old [B,G,C,d] with the rows new [B,G,T,d] in the slots that end with seqlens."""
        if self.flavour == "onnx":
            first = self._shared(self._first, seqlens)
            after = self._do("TensorScatter", [old, new, first], path, "written", axis=2)
        else:
            index = self._shared(self._index, seqlens, new, tuple(_shape(old)[1::2]))
            after = self._do("ScatterElements", [old, index, new], path, "written", axis=2)
        return after

    def _shared(self, make: Callable[..., ir.Value], *inputs: Any) -> ir.Value:
        """What all layers have in common, made once."""
        apart = [x for x in inputs if not (make == self._index and x is inputs[1])]  # the new rows of a layer
        if make == self._visible:
            apart = [inputs[0], inputs[2]]  # any layer's buffer tells the number of slots
        key = (make.__name__, *apart)
        if key not in self._common:
            self._common[key] = make(*inputs)
        return self._common[key]

    def _tokens(self) -> ir.Value:
        """T, as [1]."""
        shape = self._do("Shape", [self.g.inputs[0]], "tokens", "shape")
        return self._do("Slice", [shape, self._ints(1), self._ints(2), self._ints(0)], "tokens", "T")

    def _first(self, seqlens: ir.Value) -> ir.Value:
        """The slot of the first new row, int64 [B]."""
        path = f"{_name(seqlens)}/first"
        last = self._do("Cast", [seqlens], path, "last", to=ir.DataType.INT64)
        end = self._do("Add", [last, self._ints(1)], path, "end")
        return self._do("Sub", [end, self._shared(self._tokens)], path, "slot")

    def _slots(self, seqlens: ir.Value) -> ir.Value:
        """The slot of every new row, int64 [B,T]."""
        path = f"{_name(seqlens)}/slots"
        tokens = self._do("Squeeze", [self._shared(self._tokens)], path, "T")
        zero, one = (self.g.constant(np.array(i, np.int64)) for i in (0, 1))
        steps = self._do("Range", [zero, tokens, one], path, "steps")
        first = self._do("Unsqueeze", [self._shared(self._first, seqlens), self._ints(1)], path, "first")
        return self._do("Add", [first, steps], path, "slot")

    def _index(self, seqlens: ir.Value, new: ir.Value, sizes: tuple[int, int]) -> ir.Value:
        """The slot of every number of the new rows, int64 [B,G,T,d]."""
        path = f"{_name(seqlens)}/index"
        slots = self._do("Unsqueeze", [self._shared(self._slots, seqlens), self._ints(1, 3)], path, "slots")
        return self._do("Expand", [slots, self._do("Shape", [new], path, "shape")], path, "index")

    def _visible(self, seqlens: ir.Value, key: ir.Value, span: int) -> ir.Value:
        """0 where a token sees a slot, -inf elsewhere: [B,1,T,C]."""
        path, do = f"{_name(seqlens)}/visible", self._do
        slots = do("Unsqueeze", [self._shared(self._slots, seqlens), self._ints(1, 3)], path, "slots")
        count = do(
            "Gather",
            [do("Shape", [key], path, "shape"), self.g.constant(np.array(2, np.int64))],
            path,
            "C",
            axis=0,
        )
        zero, one = (self.g.constant(np.array(i, np.int64)) for i in (0, 1))
        age = do("Sub", [slots, do("Range", [zero, count, one], path, "numbers")], path, "age")
        seen = do("GreaterOrEqual", [age, zero], path, "past")
        if span >= 0:
            near = do("Less", [age, self.g.constant(np.array(span, np.int64))], path, "near")
            seen = do("And", [seen, near], path, "seen")
        return do("Where", [seen, self._float(0), self._float(-np.inf)], path, "mask")

    def _tiled(self, mask: ir.Value, times: int) -> ir.Value:
        return self._do("Tile", [mask, self._ints(1, 1, times, 1)], f"{_name(mask)}", "tiled")

    def _table(self, table: ir.Value, positions: ir.Value) -> ir.Value:
        """Its rows for the tokens, [B,T,1,d/2]."""
        rows = self._do("Gather", [table, positions], f"{_name(table)}", "rows", axis=0)
        return self._do("Unsqueeze", [rows, self._ints(2)], f"{_name(table)}", "heads")

    # -- what changed between opset 17 and 23 ----------------------------------------------------------------

    def on_Split(self, own: Values, attributes: dict[str, Any], path: str) -> list[ir.Value] | None:  # noqa: N802
        if self.flavour == "onnx" or "num_outputs" not in attributes:
            return None
        axis, parts = attributes["axis"], attributes["num_outputs"]
        return list(self.g.node("Split", own, path, outputs=parts, axis=axis))

    def on_ReduceMax(self, own: Values, attributes: dict[str, Any], path: str) -> list[ir.Value] | None:  # noqa: N802
        if self.flavour == "onnx":
            return None
        axes: dict[str, Any] = {}
        if len(own) > 1:
            assert own[1] is not None
            assert own[1].const_value is not None
            axes["axes"] = [int(axis) for axis in own[1].const_value.numpy().reshape(-1)]
        top = self.g.node("ReduceMax", own[:1], path, keepdims=attributes["keepdims"], **axes)
        if own[0] not in self._grouped:
            return [top]
        return [self._do("Reshape", [top, self._ints(0, self._grouped[own[0]], -1, 1)], path, "heads")]

    # -- the two operators of the layer ----------------------------------------------------------------------

    def on_CausalConvWithState(self, own: Values, attributes: dict[str, Any], path: str) -> list[ir.Value]:  # noqa: N802
        x, taps, bias, past = own
        if self.flavour == "onnx":
            return list(self.g.node("CausalConvWithState", [x, taps, bias, past], path, outputs=2))
        channels, _, width = _shape(taps)
        padded = self._do("Concat", [past, x], path, "padded", axis=2)
        y = self._do("Conv", [padded, taps], path, "conv", group=channels, kernel_shape=[width])
        ends = (self._ints(1 - width), self._ints(np.iinfo(np.int64).max), self._ints(2))
        return [y, self._do("Slice", [padded, *ends], path, "present")]

    def on_LinearAttention(self, own: Values, attributes: dict[str, Any], path: str) -> list[ir.Value]:  # noqa: N802
        q, k, v, past, decay = own
        if self.flavour == "onnx":
            return list(self.g.node("LinearAttention", own, path, outputs=2, **_plain(attributes)))
        _, H, F, width = _shape(past)
        do = self._do
        if self.tokens == 1:  # S' = exp(g) S + k v^T ; o = q S'
            gain = do("Exp", [do("Reshape", [decay, self._ints(0, H, F, 1)], path, "g")], path, "gain")
            update = do(
                "Mul",
                [
                    do("Reshape", [k, self._ints(0, H, F, 1)], path, "k"),
                    do("Reshape", [v, self._ints(0, H, 1, width)], path, "v"),
                ],
                path,
                "update",
            )
            state = do("Add", [do("Mul", [past, gain], path, "kept"), update], path, "state")
            out = do("MatMul", [do("Reshape", [q, self._ints(0, H, 1, F)], path, "q"), state], path, "read")
            return [do("Reshape", [out, self._ints(0, 1, H * width)], path, "out"), state]

        def heads(x: ir.Value | None, name: str, size: int) -> ir.Value:  # [B,T,H*size] -> [B,H,T,size]
            split = do("Reshape", [x, self._ints(0, 0, H, size)], path, f"{name}4")
            return do("Transpose", [split], path, name, perm=[0, 2, 1, 3])

        qh, kh, vh, gh = heads(q, "q", F), heads(k, "k", F), heads(v, "v", width), heads(decay, "g", F)
        causal, mask = self._causal()
        b = do("MatMul", [causal, gh], path, "b")  # running sum of g: [B,H,T,F]
        # exp(b_i - b_j) for every pair i >= j: no exponent is positive, so nothing overflows
        rows = do("Unsqueeze", [b, self._ints(3)], path, "bi")
        columns = do("Unsqueeze", [b, self._ints(2)], path, "bj")
        lag = do("Add", [do("Sub", [rows, columns], path, "lag"), mask], path, "masked")
        keys = do(
            "Mul",
            [do("Exp", [lag], path, "fade"), do("Unsqueeze", [kh, self._ints(2)], path, "kj")],
            path,
            "kept",
        )
        scores = do("MatMul", [keys, do("Unsqueeze", [qh, self._ints(4)], path, "qi")], path, "scores5")
        scores = do("Squeeze", [scores, self._ints(4)], path, "scores")
        carried = do(
            "MatMul", [do("Mul", [qh, do("Exp", [b], path, "since")], path, "qs"), past], path, "carried"
        )
        out = do("Add", [do("MatMul", [scores, vh], path, "within"), carried], path, "sum")
        out = do("Transpose", [out], path, "rows", perm=[0, 2, 1, 3])
        out = do("Reshape", [out, self._ints(0, 0, H * width)], path, "out")
        end = do("Slice", [b, self._ints(-1), self._ints(np.iinfo(np.int64).max), self._ints(2)], path, "end")
        left = do("Mul", [kh, do("Exp", [do("Sub", [end, b], path, "rest")], path, "restfade")], path, "left")
        update = do("MatMul", [do("Transpose", [left], path, "leftT", perm=[0, 1, 3, 2]), vh], path, "update")
        gain = do("Exp", [do("Transpose", [end], path, "endT", perm=[0, 1, 3, 2])], path, "gain")
        return [out, do("Add", [do("Mul", [past, gain], path, "old"), update], path, "state")]

    def _causal(self) -> tuple[ir.Value, ir.Value]:
        """Lower triangle of ones [T,T], and 0 or -inf as [T,T,1]; made once for all layers."""
        if self._mask is None:
            do, path = self._do, "causal"
            shape = do("Shape", [self.g.inputs[0]], path, "shape")
            T = do("Gather", [shape, self.g.constant(np.array(1, np.int64))], path, "T", axis=0)
            one = self.g.constant(np.array(1, np.int64))
            numbers = do("Range", [self.g.constant(np.array(0, np.int64)), T, one], path, "numbers")
            row = do("Unsqueeze", [numbers, self._ints(1)], path, "row")
            past = do("LessOrEqual", [numbers, row], path, "past")
            ones = do("Cast", [past], path, "ones", to=ir.DataType.FLOAT)
            mask = do("Where", [past, self._float(0), self._float(-np.inf)], path, "mask")
            self._mask = ones, do("Unsqueeze", [mask, self._ints(2)], path, "mask3")
        return self._mask


def _name(value: ir.Value | None) -> str:
    assert value is not None
    assert value.name
    return value.name


def _shape(value: ir.Value | None) -> list[int]:
    """Fixed sizes; 0 for the batch."""
    assert value is not None
    assert value.shape is not None
    return [dim if isinstance(dim, int) else 0 for dim in value.shape]


def _plain(attributes: dict[str, Any]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in attributes.items()}
