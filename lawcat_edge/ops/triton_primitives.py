"""What the Triton kernels of all operators share: how products are formed, and rows read and written.

p_ pointer, b_ loaded block, o_ offsets, m_ mask.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROUND_SPLIT = (
    False  # set by tests: in the interpreter, split operands as a GPU does rather than keep them exact
)


def products(*operands: Tensor) -> str:
    """How a kernel forms products of these: ``bf16`` operands, or each ``split`` into two."""
    low = all(x.dtype == torch.bfloat16 for x in operands)
    medium = torch.get_float32_matmul_precision() == "medium" and torch.float16 not in {
        x.dtype for x in operands
    }
    return "bf16" if low or medium else "split"


def interpreted(mode: str) -> str:
    """What stands in for a mode of mm in the interpreter, whose dot knows no bfloat16."""
    return f"round {mode}" if mode == "bf16" or ROUND_SPLIT else "exact"


@triton.jit
def mm(a, b, MODE: tl.constexpr):
    """a @ b summed in float32, each operand rounded to bfloat16 (``bf16``) or split into two (``split``).

    The split keeps 16 bits of each operand at any scale, for float32 and float16 inputs: as TF32, but 32
    times finer, and its three products cost less than twice one of TF32. In the interpreter ``round bf16``
    and ``round split`` multiply the same rounded operands in float32, and ``exact`` rounds nothing.
    """
    a_high, b_high = a.to(tl.bfloat16), b.to(tl.bfloat16)
    if MODE == "bf16":
        y = tl.dot(a_high, b_high)
    elif MODE == "split":
        y = tl.dot(a_high, b_high)
        y = tl.dot((a - a_high.to(tl.float32)).to(tl.bfloat16), b_high, y)
        y = tl.dot(a_high, (b - b_high.to(tl.float32)).to(tl.bfloat16), y)
    elif MODE == "exact":
        y = tl.dot(a, b, input_precision="ieee")
    else:
        a_part, b_part = a_high.to(tl.float32), b_high.to(tl.float32)
        y = tl.dot(a_part, b_part, input_precision="ieee")
        if MODE == "round split":
            a_low, b_low = (a - a_part).to(tl.bfloat16), (b - b_part).to(tl.bfloat16)
            y += tl.dot(a_low.to(tl.float32), b_part, input_precision="ieee")
            y += tl.dot(a_part, b_low.to(tl.float32), input_precision="ieee")
    return y


@triton.jit
def load_rows(p, o_r, m_r, stride, o_k, WIDTH: tl.constexpr):
    """Rows o_r of a [rows, WIDTH] matrix as float32, zero outside."""
    mask = m_r[:, None] & (o_k < WIDTH)[None, :]
    return tl.load(p + o_r[:, None] * stride + o_k[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_rows(p, value, o_r, m_r, stride, o_k, WIDTH: tl.constexpr):
    mask = m_r[:, None] & (o_k < WIDTH)[None, :]
    tl.store(p + o_r[:, None] * stride + o_k[None, :], value.to(p.dtype.element_ty), mask=mask)
