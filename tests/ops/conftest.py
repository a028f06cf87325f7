"""Fixtures of the tests of operators."""

from triton_interpreter import poisoned

__all__ = ["poisoned"]
