"""The weights file, written once from front to back, and resumable.

Tensors come in groups (a layer is one). When a group is on disk its tensors are noted in a journal beside the
data; a killed export with the same fingerprint finds the journal, cuts the data behind the last whole group,
and goes on from there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

DATA = "model.onnx.data"
JOURNAL = ".journal"
_PAGE = 4096  # memory-mapping starts at pages: large tensors do too
_SMALL = 64


class DataWriter:
    """Appends tensors to ``folder/model.onnx.data``. Use as a context manager."""

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.path = folder / DATA
        self._journal_path = folder / JOURNAL
        self.tensors: dict[str, ir.ExternalTensor] = {}
        self._groups: dict[str, dict[str, Any]] = {}
        self._current: list[dict[str, Any]] = []
        end = self._recover(fingerprint)
        self.resumed_groups = len(self._groups)
        self._data = open(self.path, "r+b" if end else "wb")  # noqa: SIM115 (closed in __exit__)
        self._data.truncate(end)
        self._data.seek(end)
        self._journal = open(self._journal_path, "a" if end else "w", encoding="utf-8")  # noqa: SIM115
        if not end:
            self._note({"fingerprint": fingerprint})

    def __enter__(self) -> DataWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._data.close()
        self._journal.close()

    def group(self, key: str, produce: Callable[[], None]) -> None:
        """Run ``produce`` (which calls ``write``) unless an earlier run has finished this group."""
        if key in self._groups:
            return
        self._current = []
        produce()
        self._data.flush()
        os.fsync(self._data.fileno())
        entry = {"group": key, "tensors": self._current, "end": self._data.tell()}
        self._note(entry)
        self._groups[key] = entry

    def write(
        self, name: str, dtype: ir.DataType, shape: Iterable[int], chunks: Iterable[np.ndarray]
    ) -> None:
        """Append one tensor from pieces that follow each other in memory order."""
        assert name not in self.tensors, name
        shape = list(shape)
        size = int(np.prod(shape, dtype=np.int64) * dtype.bitwidth) // 8
        align = _PAGE if size >= 16 * _PAGE else _SMALL
        offset = -(-self._data.tell() // align) * align
        self._data.seek(offset)
        for chunk in chunks:
            self._data.write(np.ascontiguousarray(chunk).reshape(-1).view(np.uint8).data)
        length = self._data.tell() - offset
        assert length == size, (name, length, size)
        entry = {"name": name, "dtype": dtype.name, "shape": shape, "offset": offset, "length": length}
        self._current.append(entry)
        self._add(entry)

    def array(self, name: str, value: np.ndarray) -> None:
        self.write(name, ir.DataType.from_numpy(value.dtype), value.shape, [value])

    def _add(self, entry: dict[str, Any]) -> None:
        self.tensors[entry["name"]] = ir.ExternalTensor(
            DATA,
            entry["offset"],
            entry["length"],
            ir.DataType[entry["dtype"]],
            shape=ir.Shape(entry["shape"]),
            name=entry["name"],
            base_dir=self.path.parent,
        )

    def _note(self, entry: dict[str, Any]) -> None:
        self._journal.write(json.dumps(entry) + "\n")
        self._journal.flush()
        os.fsync(self._journal.fileno())

    def _recover(self, fingerprint: str) -> int:
        """Offset behind the last whole group of an interrupted run of the same export, else 0."""
        end = 0
        try:
            lines = self._journal_path.read_text(encoding="utf-8").splitlines()
            if not lines or json.loads(lines[0]) != {"fingerprint": fingerprint}:
                return 0
            size = self.path.stat().st_size
            for line in lines[1:]:
                try:
                    entry = json.loads(line)
                except ValueError:  # the line that was being written when the process died
                    break
                if entry["end"] > size:
                    break
                self._groups[entry["group"]] = entry
                end = entry["end"]
        except (OSError, ValueError, KeyError, TypeError):
            return 0
        try:
            for entry in self._groups.values():
                for tensor in entry["tensors"]:
                    self._add(tensor)
        except (KeyError, TypeError, ValueError):  # not a journal of this version
            self._groups, self.tensors = {}, {}
            return 0
        if end:  # drop a half-written last line so that appending stays valid
            keep = [lines[0], *(json.dumps(entry) for entry in self._groups.values())]
            self._journal_path.write_text("\n".join(keep) + "\n", encoding="utf-8")
        return end
