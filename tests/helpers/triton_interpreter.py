"""What the tests of Triton's kernels share: the interpreter, memory that is poisoned, and how near is near.

``conftest.py`` turns the interpreter on before anything can import triton, so that they run in this process.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch


def is_interpreted(kernel: Any) -> bool:
    """Whether this process runs `kernel` in the interpreter."""
    from triton.runtime.interpreter import InterpretedFunction

    return isinstance(kernel, InterpretedFunction)


def assert_close(name: str, ref: torch.Tensor, got: torch.Tensor, ratio: float, least: float = 1e-30) -> None:
    """Root mean square error over the root mean square of the reference (its norm at least `least`); a NaN is
    never below a ratio."""
    assert got.shape == ref.shape, name
    error = (got.double() - ref.double()).norm() / ref.double().norm().clamp_min(least)
    assert error < ratio, f"{name}: {error:.2e} is not below {ratio:.0e}"


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory holds NaN (or the largest int), so that an output left unwritten fails."""
    empty = torch.empty

    def fill(x: torch.Tensor) -> torch.Tensor:
        return x.fill_(torch.nan if x.is_floating_point() else torch.iinfo(x.dtype).max)

    monkeypatch.setattr(torch, "empty", lambda *a, **k: fill(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda x: fill(empty(x.shape, dtype=x.dtype, device=x.device)))
