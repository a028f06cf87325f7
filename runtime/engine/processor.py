"""What the runner must know of the processor it is on."""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Iterable
from pathlib import Path

_X86 = ("x86_64", "amd64", "i386", "i686", "x86")


def saturates(machine: str | None = None, cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether products of unsigned by signed bytes are summed with saturation here: on x86 without VNNI.

    True as well where an x86 does not say what it has, for a slow answer is better than a wrong one.
    """
    if (machine or platform.machine()).lower() not in _X86:
        return False
    return not {"avx512_vnni", "avx_vnni"} & _features(cpuinfo, "flags")


def has_vector_products(machine: str | None = None, cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether ``runtime/native`` has products in vector instructions that this processor knows.

    False where one does not say what it has, unless it is Apple's, which all have the dot product.
    """
    machine = (machine or platform.machine()).lower()
    if machine in ("x86_64", "amd64"):
        return {"avx2", "fma", "f16c"} <= _features(cpuinfo, "flags")
    if machine in ("arm64", "aarch64"):
        return platform.system() == "Darwin" or "asimddp" in _features(cpuinfo, "Features")
    return False


def _features(cpuinfo: Path, key: str) -> set[str]:
    """What the first processor's line of this name lists; nothing where there is none to read."""
    try:
        about = cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return set()
    lines = (line for line in about.splitlines() if line.startswith(key))
    return set(next(lines, "").partition(":")[2].split())


def physical_cores() -> int:
    """Physical cores this process may use: hyper-threads share the units a matrix product needs."""
    try:
        allowed: Iterable[int] = os.sched_getaffinity(0)  # type: ignore[attr-defined,unused-ignore]
    except AttributeError:  # macOS, Windows: no way without another package; arm has no hyper-threads
        share = 1 if platform.machine().lower() in ("arm64", "aarch64") else 2
        return max(1, (os.cpu_count() or 1) // share)
    cores = set()
    for cpu in allowed:
        siblings = str(cpu)
        with contextlib.suppress(OSError):
            siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text()
        cores.add(siblings.strip())
    count = max(1, len(cores))
    with contextlib.suppress(OSError, ValueError):  # a container's share of the machine
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        count = min(count, max(1, int(quota) // int(period)))
    return count
