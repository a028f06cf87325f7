"""The bundles of a comparison: exported once, used again while they are of the same and whole."""

from __future__ import annotations

import functools
import time
from pathlib import Path
from typing import Any

from lawcat_edge import __version__
from lawcat_edge.calibration.calibrate import Calibration
from lawcat_edge.calibration.comparison.plan import REFERENCE
from lawcat_edge.calibration.comparison.rows import Row, file_name, key_of
from lawcat_edge.export.exporter import ExportOptions, export_bundle
from lawcat_edge.export.schemes import Scheme
from lawcat_edge.progress import Progress
from lawcat_edge.runtime.bundle.flavours import DEFAULT_OPS, runnable
from lawcat_edge.runtime.bundle.manifest import Bundle
from lawcat_edge.runtime.errors import LawcatError
from lawcat_edge.runtime.files import read_json, write_json
from lawcat_edge.student import Student


def bundle_folder(out: Path, name: str) -> Path:
    """Where the bundle of a row lies; FOLDER.json beside it says what it was exported from, and its sizes."""
    return out / "bundles" / file_name(name)


def export_scheme(
    row: Row,
    scheme: Scheme,
    student: Student,
    folder: Path,
    calibration: Calibration,
    progress: Progress,
    resume: bool,
) -> dict[str, Any] | None:
    """Part ``export`` of a row: its sizes, or None and the row's error.

    resume: an old bundle serves when it was made of the same and is still whole.
    """
    text = calibration.identity if scheme.static or scheme.rounding == "gptq" else None
    key = key_of(student.source, scheme.to_dict(), text, __version__, DEFAULT_OPS)
    mark = folder.with_name(f"{folder.name}.json")
    held = _still_there(folder, mark, key) if resume else None
    if held is None:
        row.parts.pop("export", None)
        work = functools.partial(_make, scheme, student, folder, calibration, progress, key)
        return row.measure("export", key, work)
    return row.measure("export", key, functools.partial(dict, held))


def _make(
    scheme: Scheme, student: Student, folder: Path, calibration: Calibration, progress: Progress, key: str
) -> dict[str, Any]:
    began = time.perf_counter()
    options = ExportOptions(
        scheme=scheme,
        name=folder.name,
        reference=student.logits if scheme.name == REFERENCE else None,  # the others are held against it
        progress=progress,
        **calibration.for_export(scheme, progress=progress),
    )
    report = export_bundle(student, folder, options)
    bundle = Bundle.open(folder, check_hashes=False)
    data = [size["size"] for name, size in bundle.manifest.files.items() if name.endswith(".data")]
    made = {
        "key": key,
        "bytes": bundle.bytes_on_disk,
        "weight_bytes": sum(data),
        "state_bytes": bundle.manifest.state_bytes(),
        "bundle_sha256": bundle.sha256,
        "scheme": scheme.to_dict(),
        "nodes_per_layer": report["nodes_per_layer"][runnable(options.ops)[0]],
        "export_seconds": round(time.perf_counter() - began, 2),
    }
    write_json(folder.with_name(f"{folder.name}.json"), made)
    return made


def _still_there(folder: Path, mark: Path, key: str) -> dict[str, Any] | None:
    try:
        made = read_json(mark)
        if not isinstance(made, dict) or made.get("key") != key:
            return None
        bundle = Bundle.open(folder)
    except (LawcatError, OSError):
        return None
    return made if made.get("bundle_sha256") == bundle.sha256 else None
