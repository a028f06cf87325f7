"""An exception as one sentence with a next step: one table, for the command line and for rows of a report."""

from __future__ import annotations

import errno
import os
import re

from lawcat_edge.runtime.errors import LawcatError

_EXTRA_OF = {"typer": "", "matplotlib": "build", "pyarrow": "data", "triton": "triton", "starlette": "serve"}
_EXTRA_OF |= {"zstandard": "data", "uvicorn": "serve", "cryptography": "sign"}
_NO_MEMORY = re.compile(r"out of memory|can't allocate memory", re.IGNORECASE)
_DISK_FULL = re.compile(rf"os error {errno.ENOSPC}\b")  # as Rust words it, in safetensors' own exception


def explain(error: Exception) -> tuple[str | None, int]:
    """One sentence for an error and its exit code; (None, _) for a bug, which keeps its traceback."""
    if isinstance(error, LawcatError):
        return str(error), error.exit_code
    if isinstance(error, ModuleNotFoundError) and not str(error.name).startswith("lawcat_edge"):
        extra = _EXTRA_OF.get(str(error.name).split(".")[0], "build")
        return f"This command needs the package {error.name}; run pip install 'lawcat-edge[{extra}]'.", 2
    if _is_disk_full(error):
        return f"The disk is full{_at(error)}; free some space and run the command again.", 2
    if isinstance(error, OSError) and error.errno is not None:
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            return (
                f"No permission to write or read{_at(error)}; choose another place or change the permission.",
                2,
            )
        return f"{os.strerror(error.errno)}{_at(error)}; check the path and run the command again.", 2
    text = str(error).strip().split("\n")[0]
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _NO_MEMORY.search(text)):
        return "Memory ran out; close other programs, or use a smaller batch or model.", 2
    if isinstance(error, UnicodeDecodeError):
        return f"A file is not UTF-8 text (byte {error.start:,}); convert it to UTF-8 first.", 2
    if isinstance(error, OSError) and text:  # no number: transformers, numpy and the hub word their own
        return f"{text.rstrip('.')}; check the file or the name and run the command again.", 2
    return None, 1


def _is_disk_full(error: Exception) -> bool:
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return _DISK_FULL.search(str(error)) is not None


def _at(error: Exception) -> str:
    name = getattr(error, "filename", None)
    return f" ({name})" if name else ""
