"""The one place where an operator's backend is chosen."""

from __future__ import annotations

import functools
import importlib.util
import os

import torch
from torch import Tensor

from lawcat_edge.runtime.errors import LawcatError

BACKENDS = ("auto", "triton", "torch")
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TRITON_WIDEST = 128  # of a head or of its features: a state tile must fit in registers


@functools.cache
def triton_available() -> bool:
    return importlib.util.find_spec("triton") is not None


def choose(backend: str, tensor: Tensor) -> str:
    """``triton`` or ``torch`` for an operator whose first input is this tensor [..., width].

    ``auto`` takes Triton on a CUDA device, for the types and widths its kernels hold, and torch elsewhere.
    On CPU Triton runs only when asked for by name, in its interpreter (TRITON_INTERPRET=1), which is for
    tests.
    """
    if backend not in BACKENDS:
        raise LawcatError(f"Unknown backend {backend!r}; choose one of {', '.join(BACKENDS)}.")
    if backend == "auto":
        fits = tensor.dtype in TRITON_DTYPES and tensor.shape[-1] <= TRITON_WIDEST
        return "triton" if tensor.is_cuda and fits and triton_available() else "torch"
    if backend == "triton":
        if not triton_available():
            raise LawcatError(
                "The Triton backend needs triton; install lawcat-edge[triton] or choose --backend torch."
            )
        if not tensor.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
            raise LawcatError("The Triton backend needs a CUDA device; choose --backend auto or torch.")
    return backend


def check_triton(*tensors: Tensor) -> None:
    """Raise LawcatError for a type or width (last axis) that the Triton kernels do not hold."""
    for x in tensors:
        if x.shape[-1] > TRITON_WIDEST:
            raise LawcatError(
                f"The Triton kernels take feature and head widths up to {TRITON_WIDEST}, not {x.shape[-1]}; "
                "choose --backend torch."
            )
        if x.dtype not in TRITON_DTYPES:
            raise LawcatError(f"The Triton kernels do not take {x.dtype}; choose --backend torch.")
