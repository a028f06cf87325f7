"""How the C library gives memory back, which decides how fast a CPU trains."""

from __future__ import annotations

import contextlib
import ctypes

# Numbers of mallopt(3)
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_NEVER = -1


def keep_freed_memory() -> None:
    """Have glibc keep what is freed instead of returning it to the system (no effect elsewhere).

    A training step frees and asks again for hundreds of MB of activations. By default each large one is a
    mapping of its own, whose pages the kernel clears every time: a third of the time of a step on two cores
    (LOG.md, 2026-11-25).
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, _NEVER)
        mallopt(_M_TOP_PAD, 256 << 20)
