"""Accuracy against size: plan -> bundle -> measure -> row -> report, one row after another.

    OUT/bundles/SCHEME/      the bundle of a scheme (used again for the same teacher, adapter and table)
    OUT/bundles/SCHEME.json  what it was exported from
    OUT/rows/NAME.json       measured so far of one row, so that a killed run goes on
    OUT/report.json .md .png

The reference of every scheme is the fp32 bundle, that of a GGUF file the teacher in fp32: KL and agreement
then say what quantisation costs, and nothing else. How far the student is from the teacher is said once.
"""

from __future__ import annotations

import functools
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import onnxruntime

from lawcat_edge import __version__
from lawcat_edge.calibration import TOKENS
from lawcat_edge.calibration.calibrate import Calibration
from lawcat_edge.calibration.comparison import measure, peers
from lawcat_edge.calibration.comparison.bundles import bundle_folder, export_scheme
from lawcat_edge.calibration.comparison.plan import REFERENCE, Planned, plan
from lawcat_edge.calibration.comparison.rows import Row, file_name, key_of
from lawcat_edge.calibration.comparison.settings import Settings, Texts
from lawcat_edge.calibration.comparison.subjects import BundleSubject, GgufSubject, Subject, TeacherSubject
from lawcat_edge.export.schemes import SCHEMES
from lawcat_edge.progress import Progress
from lawcat_edge.runtime.engine.processor import physical_cores
from lawcat_edge.runtime.errors import LawcatError
from lawcat_edge.runtime.files import FileLock, sha256_file
from lawcat_edge.student import Student
from lawcat_edge.weights import weight_files

PARTS = ("export", "accuracy", "drift", "tasks", "speed")
RowProgress = Callable[[str, str, int, int], None]
"""(row, what, done, total)"""


@dataclass(frozen=True)
class Comparison:
    """What is compared, on which text, and where to. It holds what was given, and does nothing by itself."""

    student: Student
    texts: Texts
    out: Path
    settings: Settings
    calibration: Calibration
    resume: bool = True
    gguf: Path | None = None
    progress: RowProgress = field(default=lambda row, what, done, total: None)

    @classmethod
    def of(
        cls,
        student: Student,
        files: Sequence[Path | str],
        out: Path,
        settings: Settings,
        calibration: Sequence[str] = (),
        calibration_tokens: int = TOKENS,
        **options: Any,
    ) -> Comparison:
        """files: the held-out text. calibration: text for the schemes that want some; without any, the
        teacher writes it. options: resume, gguf, progress. Raises LawcatError for too little text."""
        settings.check()
        # one number of threads for all rows, or their speeds could not be compared
        settings = replace(settings, threads=settings.threads or physical_cores())
        texts = Texts([str(name) for name in files], student.teacher.tokenizer_path, settings)
        calibrated = Calibration(
            student,
            out / "calibration",
            calibration,
            calibration_tokens,
            threads=settings.threads,
            plain=bundle_folder(out, REFERENCE),
        )
        return cls(student, texts, out, settings, calibrated, **options)

    def row(self, name: str, kind: str) -> Row:
        (self.out / "rows").mkdir(parents=True, exist_ok=True)
        return Row(self.out / "rows" / f"{file_name(name)}.json", name, kind, self.resume)

    def shown(self, row: Row) -> Progress:
        return functools.partial(self.progress, row.name)


def compare(job: Comparison, schemes: Sequence[str], with_peers: bool = True) -> dict[str, Any]:
    """The report. Every row that fails has its errors in it, and the others go on.

    Raises LawcatError when there is no fp32 bundle, which all others are held against.
    """
    job.out.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(job.out):  # two comparisons in one folder would take each other's rows
        began = time.perf_counter()
        rows = _rows(job, plan(schemes, job.student.teacher.name, with_peers))
        return _report(job, rows, time.perf_counter() - began)


def fp32_bytes(job: Comparison) -> int:
    """Of the fp32 bundle, which is exported where it is not there yet."""
    row = job.row(REFERENCE, "scheme")
    made = _exported(job, row, Planned(REFERENCE, "scheme", SCHEMES[REFERENCE]))
    if made is None:
        raise LawcatError(row.errors["export"])
    return int(made["bytes"])


def _rows(job: Comparison, planned: Sequence[Planned]) -> list[Row]:
    """Export and measure what is planned, fp32 first: the others are held against it."""
    rows: list[Row] = []
    student: Subject | None = None  # the fp32 bundle
    teacher = TeacherSubject(job.student.teacher)
    for entry in planned:
        row = job.row(entry.name, entry.kind)
        if entry.kind == "scheme":
            subject = _scheme(job, row, entry, student)
            if entry.name == REFERENCE:
                if subject is None:
                    said = row.errors["export"]
                    raise LawcatError(f"The fp32 bundle is what all others are held against: {said}")
                student = subject
            elif subject is not None:
                subject.close()
        elif entry.kind == "teacher":
            assert student is not None
            _teacher(job, row, teacher, student)
            student.close()
        else:
            _gguf(job, row, teacher)
        rows.append(row)
    return rows


def _scheme(job: Comparison, row: Row, entry: Planned, reference: Subject | None) -> Subject | None:
    """Measure a scheme's bundle, which comes back; None where it could not be exported."""
    if _exported(job, row, entry) is None:
        row.keep(["export"])
        return None
    subject = BundleSubject(bundle_folder(job.out, entry.name), job.settings.threads)
    identity = [subject.identity, reference.identity if reference is not None else subject.identity]
    _measure(job, row, identity, subject, reference)
    row.keep(list(PARTS))
    return subject


def _exported(job: Comparison, row: Row, entry: Planned) -> dict[str, Any] | None:
    if entry.scheme is None:
        row.parts = {"export": {"key": "", "seconds": 0.0, "error": entry.error}}
        return None
    folder = bundle_folder(job.out, entry.name)
    return export_scheme(row, entry.scheme, job.student, folder, job.calibration, job.shown(row), job.resume)


def _teacher(job: Comparison, row: Row, teacher: Subject, student: Subject) -> None:
    """The teacher in torch; and how far the fp32 student is from it: what distillation left to learn."""
    weights = sum(path.stat().st_size for path in weight_files(job.student.teacher.folder)[0])
    row.measure("export", teacher.identity, functools.partial(dict, bytes=weights, weight_bytes=weights))
    _measure(job, row, teacher.identity, teacher, None)
    key = key_of(teacher.identity, student.identity, job.texts.rows.tolist())
    work = functools.partial(
        measure.accuracy, student, teacher, job.texts.rows, job.shown(row), what="student"
    )
    row.measure("student", key, work)
    row.keep([*PARTS, "student"])


def _gguf(job: Comparison, row: Row, teacher: Subject) -> None:
    """No drift: the teacher's cache grows with the text, and llama.cpp would keep all logits of it."""
    settings, source = job.settings, job.student.teacher
    row.parts.pop("export", None)
    key = key_of(source.sha256, str(job.gguf))
    made = row.measure("export", key, functools.partial(_gguf_sizes, job, row.name))
    if made is None:
        row.keep(["export"])
        return
    file = _gguf_file(job, row.name)  # there by now
    room = max(settings.length, *settings.task_lengths, 1) + 512  # a prompt and its answer
    subject = GgufSubject(file, made["sha256"], source, room, settings.threads)
    _measure(job, row, [subject.identity, teacher.identity], subject, teacher, with_drift=False)
    row.keep(list(PARTS))


def _gguf_sizes(job: Comparison, name: str) -> dict[str, Any]:
    peers.need_llama_cpp()
    file = _gguf_file(job, name)
    size = file.stat().st_size
    return {"bytes": size, "weight_bytes": size, "sha256": sha256_file(file)}


def _gguf_file(job: Comparison, name: str) -> Path:
    source = peers.teacher_gguf(job.student.teacher.name, job.gguf)
    return peers.requantise(source, job.out / "gguf", name, job.settings.threads)


def _measure(
    job: Comparison,
    row: Row,
    identity: Any,
    subject: Subject,
    reference: Subject | None,
    with_drift: bool = True,
) -> None:
    """Accuracy, drift, tasks and speed of a subject, each kept under a key of all that it depends on."""
    s, texts, show = job.settings, job.texts, job.shown(row)
    row.measure(
        "accuracy",
        key_of(identity, key_of([texts.rows.tolist(), s.threads])),
        functools.partial(measure.accuracy, subject, reference, texts.rows, show),
    )
    if with_drift:
        row.measure(
            "drift",
            key_of(identity, texts.long.tolist(), s.threads),
            functools.partial(measure.drift, subject, reference, texts.long, show),
        )
    row.measure(
        "tasks",
        key_of(identity, s.task_lengths, s.task_samples, s.seed, s.threads),
        functools.partial(measure.tasks, subject, s.task_lengths, s.task_samples, s.seed, show),
    )
    row.measure(
        "speed",
        key_of(identity, s.context, s.decode_tokens, s.threads),
        functools.partial(measure.speed, subject, s.context, s.decode_tokens, s.threads, show),
    )


def _report(job: Comparison, rows: Sequence[Row], seconds: float) -> dict[str, Any]:
    teacher = next((row for row in rows if row.kind == "teacher"), None)
    return {
        "format": 1,
        "created_by": f"lawcat-edge {__version__}",
        "onnxruntime": onnxruntime.__version__,
        "machine": _processor(),
        "teacher": job.student.teacher.name,
        "teacher_sha256": job.student.teacher.sha256,
        "adapter_sha256": job.student.adapter_sha256,
        "text": job.texts.names,
        "settings": asdict(job.settings),
        "student_from_teacher": None if teacher is None else teacher.parts.get("student", {}).get("result"),
        "rows": [row.to_dict() for row in rows],
        "seconds": round(seconds, 2),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
