"""The rows of a comparison on disk: one JSON file a row, rewritten after each part, so a killed run goes on.

A part (accuracy, tasks, …) is kept with a key: the hash of everything that it depends on. It is taken again
when the key is the same, measured anew when not.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lawcat_edge.explain import explain
from lawcat_edge.runtime.errors import LawcatError
from lawcat_edge.runtime.files import read_json, write_json

FORMAT = 1


def key_of(*parts: Any) -> str:
    """sha256 of any JSON values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class Row:
    """One model of the comparison. ``parts[name]`` = {"key", "seconds", "result" or "error"}."""

    def __init__(self, path: Path, name: str, kind: str, resume: bool = True) -> None:
        self.path, self.name, self.kind = path, name, kind
        self.parts: dict[str, dict[str, Any]] = _stored(path, name) if resume else {}

    def measure(self, part: str, key: str, work: Callable[[], Any]) -> Any:
        """The stored result of ``part`` if its key is this one, else that of ``work()``, stored.

        What the user or the machine is to blame for, and what a runtime refuses to do, becomes the part's
        one sentence, and None comes back. A bug is raised.
        """
        held = self.parts.get(part)
        if held is not None and held.get("key") == key and "result" in held:
            return held["result"]
        began = time.perf_counter()
        entry: dict[str, Any] = {"key": key}
        try:
            entry["result"] = work()
        except Exception as error:
            said = sentence(error)
            if said is None or (os.environ.get("LAWCAT_EDGE_DEBUG") and not isinstance(error, LawcatError)):
                raise
            entry["error"] = said
        entry["seconds"] = round(time.perf_counter() - began, 2)
        self.parts[part] = entry
        write_json(self.path, {"format": FORMAT, "name": self.name, "kind": self.kind, "parts": self.parts})
        return entry.get("result")

    def keep(self, names: list[str]) -> None:
        """Forget the parts that this run did not ask for."""
        self.parts = {name: self.parts[name] for name in names if name in self.parts}

    @property
    def errors(self) -> dict[str, str]:
        return {name: part["error"] for name, part in self.parts.items() if "error" in part}

    def to_dict(self) -> dict[str, Any]:
        """For the report: results and seconds by part, without keys."""
        data: dict[str, Any] = {"name": self.name, "kind": self.kind, "errors": self.errors}
        data |= {name: part["result"] for name, part in self.parts.items() if "result" in part}
        data["seconds"] = {name: part["seconds"] for name, part in self.parts.items()}
        return data


def sentence(error: Exception) -> str | None:
    """What went wrong, on one line; None for a bug."""
    said, _ = explain(error)
    bug = isinstance(error, (NotImplementedError, RecursionError))
    if said is None and not bug and isinstance(error, (RuntimeError, *_of_onnxruntime())):
        said = f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no reason given'])[0]}"
    return said


def _of_onnxruntime() -> tuple[type[Exception], ...]:
    """Its own exceptions, which have nothing in common but their home."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    kinds = (kind for kind in vars(state).values() if isinstance(kind, type))
    return tuple(kind for kind in kinds if issubclass(kind, Exception))


def _stored(path: Path, name: str) -> dict[str, dict[str, Any]]:
    """The parts of an earlier run; none where the file is missing, damaged or of another row."""
    try:
        data = read_json(path)
    except (LawcatError, OSError):
        return {}
    if not isinstance(data, dict) or data.get("format") != FORMAT or data.get("name") != name:
        return {}
    parts = data.get("parts")
    if not isinstance(parts, dict):
        return {}
    return {
        name: part
        for name, part in parts.items()
        if isinstance(part, dict) and isinstance(part.get("seconds"), (int, float)) and "result" in part
    }


def file_name(name: str) -> str:
    """A row's name as a file name."""
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in name)[:80].lstrip(".") or "_"
