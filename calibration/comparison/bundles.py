"""The bundles of a comparison: exported once, used again while they are of the same and whole."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lawcat_edge import __version__
from lawcat_edge.adapter import Adapter
from lawcat_edge.calibration.calibrate import Calibration
from lawcat_edge.calibration.comparison.measure import Progress
from lawcat_edge.calibration.comparison.rows import Row, file_name, key_of, sentence
from lawcat_edge.config import LawcatConfig
from lawcat_edge.evaluate.lm import BundleModel, LanguageModel
from lawcat_edge.export.exporter import export_bundle
from lawcat_edge.export.schemes import Scheme, load_scheme
from lawcat_edge.runtime.bundle.manifest import Bundle
from lawcat_edge.runtime.errors import LawcatError
from lawcat_edge.runtime.files import read_json, write_json
from lawcat_edge.teacher import Teacher


@dataclass
class Bundles:
    """OUT/SCHEME is a bundle, OUT/SCHEME.json says what it was exported from, and its sizes."""

    teacher: Teacher
    adapter: Adapter | None
    config: LawcatConfig
    out: Path
    resume: bool
    threads: int | None
    calibration: Calibration
    _open: dict[str, LanguageModel] = field(default_factory=dict)

    def export(self, row: Row, name: str, show: Progress) -> dict[str, Any] | None:
        """Part ``export`` of a row: its sizes, or None and the row's error. An old bundle serves when it was
        made of the same and is still whole."""
        try:
            table = load_scheme(name)
        except LawcatError as error:
            row.parts = {"export": {"key": "", "seconds": 0.0, "error": sentence(error)}}
            return None
        folder = self.folder(row.name)
        text = self.calibration.identity if table.static or table.rounding == "gptq" else None
        key = key_of(self._sources, table.to_dict(), text, __version__)
        mark = folder.with_name(f"{folder.name}.json")
        held = _still_there(folder, mark, key) if self.resume else None
        if held is None:
            row.parts.pop("export", None)
        return row.measure("export", key, lambda: held or self._make(table, folder, mark, key, show))

    def _make(self, table: Scheme, folder: Path, mark: Path, key: str, show: Progress) -> dict[str, Any]:
        began = time.perf_counter()
        self.close(folder.name)
        self.calibration.progress = show
        if table.rounding == "gptq" and not table.rotate:
            self.calibration.known.setdefault(False, self.folder("fp32"))
        report = export_bundle(
            self.teacher.weights(),
            self.teacher.geometry,
            self.config,
            self.adapter,
            folder,
            scheme=table,
            tokenizer_files=self.teacher.folder,
            source=self._sources,
            name=folder.name,
            reference=self._student if table.name == "fp32" else None,  # the others are held against it
            progress=show,
            **self.calibration.for_export(table),
        )
        made = {"key": key, **_sizes(Bundle.open(folder, check_hashes=False)), "scheme": table.to_dict()}
        made["nodes_per_layer"] = report["nodes_per_layer"]["ort"]
        made["export_seconds"] = round(time.perf_counter() - began, 2)
        write_json(mark, made)
        return made

    def _student(self, tokens: np.ndarray) -> np.ndarray:
        """tokens [T] -> logits [T,V]."""
        import torch

        from lawcat_edge.model import load_student

        with torch.inference_mode():
            model = load_student(self.teacher, self.adapter, self.config)
            return model(torch.from_numpy(tokens)[None])[0][0].numpy()

    @property
    def _sources(self) -> dict[str, Any]:
        return {
            "teacher": self.teacher.name,
            "teacher_sha256": self.teacher.sha256,
            "adapter_sha256": self.adapter.sha256 if self.adapter is not None else None,
        }

    def folder(self, name: str) -> Path:
        return self.out / file_name(name)

    def sha256(self, name: str) -> str:
        return Bundle.open(self.folder(name), check_hashes=False).sha256

    def open(self, name: str) -> LanguageModel:
        """Opened once, until ``close``."""
        key = file_name(name)
        if key not in self._open:
            self._open[key] = BundleModel(self.folder(name), threads=self.threads)
        return self._open[key]

    def close(self, name: str) -> None:
        self._open.pop(file_name(name), None)


def _still_there(folder: Path, mark: Path, key: str) -> dict[str, Any] | None:
    try:
        made = read_json(mark)
        if not isinstance(made, dict) or made.get("key") != key:
            return None
        bundle = Bundle.open(folder)
    except (LawcatError, OSError):
        return None
    return made if made.get("bundle_sha256") == bundle.sha256 else None


def _sizes(bundle: Bundle) -> dict[str, Any]:
    data = [size["size"] for name, size in bundle.manifest.files.items() if name.endswith(".data")]
    return {
        "bytes": bundle.bytes_on_disk,
        "weight_bytes": sum(data),
        "state_bytes": bundle.manifest.state_bytes(),
        "bundle_sha256": bundle.sha256,
    }
