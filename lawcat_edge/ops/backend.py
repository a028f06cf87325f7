"""The one place where an operator's backend is chosen."""

from __future__ import annotations

import functools
import importlib.util

from torch import Tensor

from lawcat_edge.runtime.errors import LawcatError

BACKENDS = ("auto", "triton", "torch")


@functools.cache
def triton_available() -> bool:
    return importlib.util.find_spec("triton") is not None


def choose(backend: str, tensor: Tensor) -> str:
    """``triton`` or ``torch`` for this tensor. ``auto`` takes Triton on a CUDA device and torch elsewhere."""
    if backend not in BACKENDS:
        raise LawcatError(f"Unknown backend {backend!r}; choose one of {', '.join(BACKENDS)}.")
    if backend == "auto":
        return "triton" if tensor.is_cuda and triton_available() else "torch"
    if backend == "triton" and not triton_available():
        raise LawcatError(
            "The Triton backend needs triton; install lawcat-edge[triton] or choose --backend torch."
        )
    return backend
