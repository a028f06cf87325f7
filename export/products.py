"""The kinds of matrix product: how each stores its weights, and which nodes compute it.

Weights arrive as blocks of rows [n, K] float32 (out-features first) and leave through the writer, so a
product of any size needs the memory of a block, not of the matrix. 8-bit weights are symmetric, stored
unsigned with the zero point 128 that MatMulNBits assumes.

The ``dynamic`` product must be right on processors without VNNI too, where the fast u8 x s8 instruction adds
two products in 16 bits with saturation. So its weights are unsigned (8 bits; the kernel widens first), or
signed and within +-63 (7 bits): 2 * 255 * 63 = 32130 stays below 2^15.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import onnx_ir as ir

from lawcat_edge.export.builder import MS, GraphBuilder
from lawcat_edge.export.schemes import Product
from lawcat_edge.export.writer import DataWriter

Rows = Iterable[np.ndarray]


def store(writer: DataWriter, spec: Product, name: str, rows: Rows, N: int, K: int) -> None:
    """Write the tensors of one product under ``name``."""
    if spec.kind == "fp32":
        writer.write(f"{name}.weight", ir.DataType.FLOAT, [N, K], rows)
    elif spec.kind == "nbits":
        blocks = -(-K // spec.block)
        scales: list[np.ndarray] = []
        shape = [N, blocks, spec.block * spec.bits // 8]
        writer.write(f"{name}.q{spec.bits}", ir.DataType.UINT8, shape, _blockwise(rows, spec, scales))
        writer.array(f"{name}.scales", np.concatenate(scales))
    else:
        # MatMulInteger wants [K, N], so this one matrix is transposed in memory, a byte a weight
        signed = spec.bits == 7
        weight, scale = np.empty((K, N), np.int8 if signed else np.uint8), np.empty(N, np.float32)
        at, high, zero = 0, (1 << (spec.bits - 1)) - 1, 0 if signed else 128
        for block in rows:
            n = len(block)
            scale[at : at + n] = np.maximum(np.abs(block).max(1), 1e-30) / high
            weight[:, at : at + n] = (np.rint(block / scale[at : at + n, None]) + zero).T
            at += n
        assert at == N, (name, at, N)
        writer.array(f"{name}.{'s' if signed else 'u'}8", weight)
        writer.array(f"{name}.column_scales", scale)


def emit(
    g: GraphBuilder, spec: Product, name: str, x: ir.Value, N: int, K: int, bias: str | None, path: str
) -> ir.Value:
    """Nodes for x [..., K] times the stored weights (+ bias), named ``path``; returns [..., N]."""
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
        return g.node("MatMulNBits", inputs, path, MS, **attributes)
    if spec.kind == "fp32":
        y = g.node("FusedMatMul", [x, g.stored(f"{name}.weight")], path, MS, transB=1)
        return g.node("Add", [y, g.stored(bias)], f"{path}/bias") if bias else y
    # Each row is divided by its largest entry: one scale serves all rows, and no row depends on another.
    top = g.node("ReduceMax", [g.node("Abs", [x], f"{path}/abs"), _ints(g, [-1])], f"{path}/top", keepdims=1)
    top = g.node("Max", [top, g.scalar(np.float32(1e-30))], f"{path}/safe")
    quantised = g.node(
        "QuantizeLinear",
        [g.node("Div", [x, top], f"{path}/unit"), g.scalar(np.float32(1 / 127)), g.scalar(np.uint8(128))],
        f"{path}/quantise",
    )
    signed = spec.bits == 7
    y = g.node(
        "MatMulIntegerToFloat",
        [
            quantised,
            g.stored(f"{name}.{'s' if signed else 'u'}8"),
            g.scalar(np.float32(1 / 127)),
            g.stored(f"{name}.column_scales"),
            g.scalar(np.uint8(128)),
            g.scalar(np.int8(0) if signed else np.uint8(128)),
        ],
        f"{path}/product",
        MS,
    )
    y = g.node("Mul", [y, top], path)
    return g.node("Add", [y, g.stored(bias)], f"{path}/bias") if bias else y


def same_table(embedding: Product, head: Product) -> bool:
    """Whether one stored table can serve the embedding and a tied head."""
    if "fp32" in (embedding.kind, head.kind):
        return embedding.kind == head.kind
    return head.kind == "nbits" and (embedding.bits, embedding.block) == (head.bits, head.block)


def emit_embedding(g: GraphBuilder, spec: Product, name: str, ids: ir.Value, V: int, D: int) -> ir.Value:
    """Rows of the table ``name``: ids [B,T] -> [B,T,D]."""
    if spec.kind == "fp32":
        return g.node("Gather", [g.stored(f"{name}.weight"), ids], "embedding", axis=0)
    # Same bytes as the head's [V, blocks, block]: a second view of them, not a copy and not a Reshape
    table = g.view(f"{name}.q{spec.bits}", [V, D * spec.bits // 8])
    inputs = [table, ids, g.stored(f"{name}.scales")]
    attributes = {"bits": spec.bits, "block_size": spec.block, "gather_axis": 0, "quantize_axis": 1}
    return g.node("GatherBlockQuantized", inputs, "embedding", MS, **attributes)


def _ints(g: GraphBuilder, values: list[int]) -> ir.Value:
    return g.constant(np.array(values, np.int64))


def _blockwise(rows: Rows, spec: Product, scales: list[np.ndarray]) -> Iterator[np.ndarray]:
    """Quantised blocks [n, blocks, bytes]; appends their scales [n, blocks] to ``scales``."""
    for block in rows:
        n, K = block.shape
        padded = -(-K // spec.block) * spec.block
        if padded != K:
            block = np.pad(block, ((0, 0), (0, padded - K)))
        values = block.reshape(n, -1, spec.block)
        quantised, scale = (quantise8 if spec.bits == 8 else quantise4)(values)
        scales.append(scale)
        yield quantised


def quantise8(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """values [..., block] -> bytes with zero point 128, and scales [...]."""
    scale = np.maximum(np.abs(values).max(-1), 1e-30) / np.float32(127)
    scaled = values * (1 / scale)[..., None]
    return (np.rint(scaled, out=scaled) + 128).astype(np.uint8), scale.astype(np.float32)


def quantise4(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """values [..., block] -> two to a byte, low first, zero point 8, and scales [...].

    The value of largest size takes the code 0 (-8), the end with one more step; then the scale is refitted by
    least squares to the codes it gave, which costs nothing at run time.
    """
    at = np.abs(values).argmax(-1)[..., None]
    scale = np.take_along_axis(values, at, -1) / np.float32(-8)
    scale = np.where(scale == 0, np.float32(1), scale)
    codes = np.clip(np.rint(values / scale), -8, 7)
    power = (codes * codes).sum(-1, keepdims=True)
    scale = np.where(power > 0, (values * codes).sum(-1, keepdims=True) / np.maximum(power, 1), scale)
    bytes_ = (codes + 8).astype(np.uint8)
    return bytes_[..., ::2] | bytes_[..., 1::2] << 4, scale[..., 0].astype(np.float32)
