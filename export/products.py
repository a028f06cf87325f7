"""The kinds of matrix product: how each stores its weights, and which nodes compute it.

Weights arrive as blocks of rows [n, K] float32 (out-features first) and leave through the writer, so a
product of any size needs the memory of a block, not of the matrix. 8-bit weights are symmetric, stored
unsigned with the zero point 128 that MatMulNBits assumes.

The ``dynamic`` and the ``static`` product multiply unsigned activations by signed weights, which is the fast
instruction everywhere. Processors without VNNI add two of these products in 16 bits with saturation: 8-bit
weights are right there because the runner asks onnxruntime to widen them first (session.x64quantprecision,
which is slower, and has no effect elsewhere). Weights within +-63 (7 bits) are right under any settings:
2 * 255 * 63 = 32130 stays below 2^15. The two products differ in one thing: the scale of a static one's
activations is a constant, from a range measured beforehand.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from lawcat_edge.export.builder import MS, GraphBuilder
from lawcat_edge.export.rounding import OFFSET_STEPS, Quantised, Rounder, blocked, nearest
from lawcat_edge.export.schemes import Linear
from lawcat_edge.export.writer import DataWriter
from lawcat_edge.runtime.native import DOMAIN

Rows = Iterable[np.ndarray]
Range = tuple[float, float]
_EMPTY = np.empty(0, np.float32)


def store(
    writer: DataWriter,
    spec: Linear,
    name: str,
    rows: Rows,
    N: int,
    K: int,
    rounder: Rounder | None = None,
) -> None:
    """Write the tensors of one product under ``name``. rounder: instead of rounding to nearest."""
    if spec.kind == "fp32":
        writer.write(f"{name}.weight", ir.DataType.FLOAT, [N, K], rows)
        return
    if spec.kind == "nbits":
        blocks = -(-K // spec.block)
        shape = [N, blocks, spec.block * spec.bits // 8]
        parts: list[Quantised] = []
        packed = (_packed(part, spec) for part in _quantised(rows, spec, rounder, parts))
        writer.write(f"{name}.q{spec.bits}", ir.DataType.UINT8, shape, packed)
        writer.array(f"{name}.scales", np.concatenate([part.scales for part in parts]).astype(np.float16))
        if spec.offsets:
            steps = [part.offsets * OFFSET_STEPS for part in parts if part.offsets is not None]
            writer.array(f"{name}.offsets", np.concatenate(steps).astype(np.int8))
        return
    # MatMulInteger wants [K, N], so this one matrix is transposed in memory, a byte a weight
    weight, scale, at = np.empty((K, N), np.int8), np.empty(N, np.float32), 0
    for part in _quantised(rows, spec, rounder, []):
        n = len(part.quantised)
        scale[at : at + n] = part.scales[:, 0]
        weight[:, at : at + n] = part.quantised[:, 0].T
        at += n
    assert at == N, (name, at, N)
    writer.array(f"{name}.s8", weight)
    writer.array(f"{name}.column_scales", scale)


def _quantised(
    rows: Rows, spec: Linear, rounder: Rounder | None, kept: list[Quantised]
) -> Iterator[Quantised]:
    """The quantised values of each block of rows; ``kept`` collects their scales and offsets alone."""
    for block in rows:
        values = blocked(block, spec)
        part = nearest(values, spec) if rounder is None else rounder(values)
        kept.append(replace(part, quantised=_EMPTY))
        yield part


def _packed(part: Quantised, spec: Linear) -> np.ndarray:
    """Bytes [n, blocks, bytes]: unsigned, two to a byte where there are 4 bits, low first."""
    if spec.bits == 8:
        return (part.quantised + 128).astype(np.uint8)
    nibbles = (part.quantised + 8).astype(np.uint8)
    return nibbles[..., ::2] | nibbles[..., 1::2] << 4


def emit(
    g: GraphBuilder,
    spec: Linear,
    name: str,
    x: ir.Value,
    N: int,
    K: int,
    bias: str | None,
    path: str,
    seen: Range | None = None,
) -> ir.Value:
    """Nodes for x [..., K] times the stored weights (+ bias), named ``path``; returns [..., N].

    seen: (low, high) of x, which a static product needs.
    """
    if g.native and spec.kind == "nbits" and _whole_chunks(spec):
        stored = [g.raw(f"{name}.q{spec.bits}"), g.raw(f"{name}.scales")]
        offsets = g.raw(f"{name}.offsets") if spec.offsets else None
        own: ir.Value = g.node(
            "BlockProduct",
            [x, *stored, offsets, g.stored(bias) if bias else None],
            path,
            DOMAIN,
            N=N,
            K=K,
            bits=spec.bits,
            block_size=spec.block,
            offset_unit=1 / OFFSET_STEPS,
        )
        return own
    if spec.kind == "nbits":
        inputs: list[ir.Value | None] = [x, g.stored(f"{name}.q{spec.bits}"), g.stored(f"{name}.scales")]
        if bias:
            inputs += [None, None, g.stored(bias)]
        attributes = {
            "K": K,
            "N": N,
            "bits": spec.bits,
            "block_size": spec.block,
            "accuracy_level": spec.accuracy,
        }
        if not spec.offsets:
            whole: ir.Value = g.node("MatMulNBits", inputs, path, MS, **attributes)
            return whole
        y = g.node("MatMulNBits", inputs, f"{path}/quantised", MS, **attributes)
        return g.node("Add", [y, _offsets(g, spec, name, x, K, path)], path)
    if spec.kind == "fp32":
        y = g.node("FusedMatMul", [x, g.stored(f"{name}.weight")], path, MS, transB=1)
        return g.node("Add", [y, g.stored(bias)], f"{path}/bias") if bias else y
    if spec.kind == "static":
        assert seen is not None, path
        scale, zero = input_grid(*seen)
        scale_in, zero_in = g.scalar(scale), g.scalar(zero)
        quantised = g.node("QuantizeLinear", [x, scale_in, zero_in], f"{path}/quantise")
        return _integer(g, name, quantised, scale_in, zero_in, bias, path)
    # Each row is divided by its largest entry: one scale serves all rows, and no row depends on another.
    top = g.node("ReduceMax", [g.node("Abs", [x], f"{path}/abs"), _ints(g, [-1])], f"{path}/top", keepdims=1)
    top = g.node("Max", [top, g.scalar(np.float32(1e-30))], f"{path}/safe")
    scale_in, zero_in = g.scalar(np.float32(1 / 127)), g.scalar(np.uint8(128))
    unit = g.node("Div", [x, top], f"{path}/unit")
    quantised = g.node("QuantizeLinear", [unit, scale_in, zero_in], f"{path}/quantise")
    y = _integer(g, name, quantised, scale_in, zero_in, None, f"{path}/product")
    y = g.node("Mul", [y, top], path)
    return g.node("Add", [y, g.stored(bias)], f"{path}/bias") if bias else y


def _whole_chunks(spec: Linear) -> bool:
    """Whether runtime/native/products.h has the product: int8 activations, blocks of whole chunks."""
    return spec.accuracy == 4 and spec.block % (64 if spec.bits == 8 else 32) == 0


def input_grid(low: float, high: float) -> tuple[np.float32, np.uint8]:
    """Scale and zero point of unsigned 8 bits over a range; zero itself is always exact."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = np.float32(max(high - low, 1e-30) / 255)
    return scale, np.uint8(min(max(round(-low / float(scale)), 0), 255))


def _integer(
    g: GraphBuilder,
    name: str,
    x: ir.Value,
    scale: ir.Value,
    zero: ir.Value,
    bias: str | None,
    path: str,
) -> ir.Value:
    """x, in unsigned bytes, times the stored weights, as floats."""
    weight, columns = g.stored(f"{name}.s8"), g.stored(f"{name}.column_scales")
    inputs = [x, weight, scale, columns, zero, None, *([g.stored(bias)] if bias else [])]
    return g.node("MatMulIntegerToFloat", inputs, path, MS)


def _offsets(g: GraphBuilder, spec: Linear, name: str, x: ir.Value, K: int, path: str) -> ir.Value:
    """What the blocks' offsets add: the sum of x over each block, times offset * scale."""
    blocks = K // spec.block
    parts = g.node("Reshape", [x, _ints(g, [0, 0, blocks, spec.block])], f"{path}/blocks")
    sums = g.node("ReduceSum", [parts, _ints(g, [-1])], f"{path}/sums", keepdims=0)
    # constants all, so that a runtime folds these three when it loads the model
    steps = g.node("Cast", [g.stored(f"{name}.offsets")], f"folded/{name}.steps", to=ir.DataType.FLOAT)
    unit = g.node("Mul", [steps, g.scalar(np.float32(1 / OFFSET_STEPS))], f"folded/{name}.unit")
    matrix = g.node("Mul", [unit, g.stored(f"{name}.scales")], f"folded/{name}.matrix")
    return g.node("FusedMatMul", [sums, matrix], f"{path}/offsets", MS, transB=1)


def same_table(embedding: Linear, head: Linear) -> bool:
    """Whether one stored table can serve the embedding and a tied head."""
    if "fp32" in (embedding.kind, head.kind):
        return embedding.kind == head.kind
    return head.kind == "nbits" and (embedding.bits, embedding.block) == (head.bits, head.block)


def emit_rotation(g: GraphBuilder, name: str, block: int, x: ir.Value, path: str) -> ir.Value:
    """x [B,T,K], each block of its columns times the stored matrix ``name`` [block, block]."""
    blocks = g.node("Reshape", [x, _ints(g, [0, 0, -1, block])], f"{path}/blocks")
    rotated = g.node("MatMul", [blocks, g.stored(name)], f"{path}/rotated")
    return g.node("Reshape", [rotated, _ints(g, [0, 0, -1])], path)


def emit_embedding(g: GraphBuilder, spec: Linear, name: str, ids: ir.Value, V: int, D: int) -> ir.Value:
    """Rows of the table ``name``: ids [B,T] -> [B,T,D]."""
    if spec.kind == "fp32":
        return g.node("Gather", [g.stored(f"{name}.weight"), ids], "embedding", axis=0)
    # Same bytes as the head's [V, blocks, block]: a second view of them, not a copy and not a Reshape
    table = g.view(f"{name}.q{spec.bits}", [V, D * spec.bits // 8])
    inputs = [table, ids, g.stored(f"{name}.scales")]
    attributes = {"bits": spec.bits, "block_size": spec.block, "gather_axis": 0, "quantize_axis": 1}
    rows: ir.Value = g.node("GatherBlockQuantized", inputs, "embedding", MS, **attributes)
    return rows


def _ints(g: GraphBuilder, values: list[int]) -> ir.Value:
    return g.constant(np.array(values, np.int64))
