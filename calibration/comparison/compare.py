"""Accuracy against size: export each scheme of one adapter, measure each, and put them in one table.

    OUT/bundles/SCHEME/      the bundle of a scheme (used again for the same teacher, adapter and table)
    OUT/bundles/SCHEME.json  what it was exported from
    OUT/rows/NAME.json       measured so far of one row, so that a killed run goes on
    OUT/report.json .md .png

The reference of every scheme is the fp32 bundle, that of a GGUF file the teacher in fp32: KL and agreement
then say what quantisation costs, and nothing else. How far the student is from the teacher is said once.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import onnxruntime

from lawcat_edge import __version__
from lawcat_edge.adapter import Adapter
from lawcat_edge.calibration.calibrate import Calibration
from lawcat_edge.calibration.comparison import measure, peers
from lawcat_edge.calibration.comparison.bundles import Bundles
from lawcat_edge.calibration.comparison.divergence import Losses, text_losses
from lawcat_edge.calibration.comparison.rows import Row, file_name, key_of
from lawcat_edge.calibration.comparison.settings import Settings, Texts
from lawcat_edge.config import LawcatConfig
from lawcat_edge.evaluate.lm import LanguageModel
from lawcat_edge.export.schemes import SCHEMES
from lawcat_edge.runtime.engine.processor import physical_cores
from lawcat_edge.runtime.errors import LawcatError
from lawcat_edge.runtime.files import FileLock, sha256_file
from lawcat_edge.teacher import Teacher
from lawcat_edge.weights import weight_files

PARTS = ("export", "accuracy", "drift", "tasks", "speed")
Progress = Callable[[str, str, int, int], None]
"""(row, what, done, total)"""


class Comparison:
    """One run. ``run`` returns the report; every row that fails has its errors in it, the others go on."""

    def __init__(
        self,
        teacher: Teacher,
        adapter: Adapter | None,
        files: Sequence[Path | str],
        out: Path,
        settings: Settings,
        progress: Progress = lambda row, what, done, total: None,
        resume: bool = True,
        gguf: Path | None = None,
        calibration: Sequence[str] = (),
    ) -> None:
        settings.check()
        if adapter is not None:
            adapter.check_teacher(teacher)
        self.teacher, self.adapter, self.out = teacher, adapter, Path(out)
        # one number of threads for all rows, or their speeds could not be compared
        self.settings = replace(settings, threads=settings.threads or physical_cores())
        self.progress, self.resume, self.gguf = progress, resume, gguf
        self.config = (
            adapter.config
            if adapter is not None
            else LawcatConfig(feature_dim=teacher.geometry.head_dim // 2)
        )
        self.texts = Texts([str(name) for name in files], teacher.tokenizer_path, self.settings)
        threads = self.settings.threads
        calibrated = Calibration(
            teacher, adapter, self.config, self.out / "calibration", calibration, threads=threads
        )
        self.bundles = Bundles(
            teacher, adapter, self.config, self.out / "bundles", resume, threads, calibrated
        )
        self._teacher: LanguageModel | None = None

    # -- the run ---------------------------------------------------------------------------------------------

    def run(self, schemes: Sequence[str], with_peers: bool = True) -> dict[str, Any]:
        self.out.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self.out):  # two comparisons in one folder would take each other's rows
            return self._run(schemes, with_peers)

    def _run(self, schemes: Sequence[str], with_peers: bool) -> dict[str, Any]:
        began = time.perf_counter()
        names = ["fp32", *(name for name in dict.fromkeys(schemes) if name != "fp32")]
        rows = [self._scheme_row(name) for name in names]
        apart = None
        if with_peers:
            rows.append(self._teacher_row())
            apart = rows[-1].parts.get("student", {}).get("result")
            rows += [self._gguf_row(name) for name in peers.gguf_rows(self.teacher.name)]
        self._teacher = None
        return {
            "format": 1,
            "created_by": f"lawcat-edge {__version__}",
            "onnxruntime": onnxruntime.__version__,
            "machine": _processor(),
            "teacher": self.teacher.name,
            "teacher_sha256": self.teacher.sha256,
            "adapter_sha256": self.adapter.sha256 if self.adapter is not None else None,
            "text": self.texts.names,
            "settings": asdict(self.settings),
            "student_from_teacher": apart,
            "rows": [row.to_dict() for row in rows],
            "seconds": round(time.perf_counter() - began, 2),
        }

    def fp32_bytes(self) -> int:
        """Of the fp32 bundle, which is exported where it is not there yet."""
        row = self.row("fp32", "scheme")
        made = self.bundles.export(row, "fp32", self.shown(row))
        if made is None:
            raise LawcatError(row.errors["export"])
        return int(made["bytes"])

    def row(self, name: str, kind: str) -> Row:
        (self.out / "rows").mkdir(parents=True, exist_ok=True)
        return Row(self.out / "rows" / f"{file_name(name)}.json", name, kind, self.resume)

    def _scheme_row(self, name: str) -> Row:
        shown = name if name in SCHEMES else Path(name).stem
        row = self.row(f"{shown}-file" if shown in SCHEMES and name not in SCHEMES else shown, "scheme")
        made = self.bundles.export(row, name, self.shown(row))
        if made is None:
            row.keep(["export"])
            if name == "fp32":
                raise LawcatError(
                    f"The fp32 bundle is what all others are held against: {row.errors['export']}"
                )
            return row
        self._measure(
            row,
            key=[made["bundle_sha256"], self.bundles.sha256("fp32")],
            open_model=lambda: self.bundles.open(row.name),
            reference=None if row.name == "fp32" else lambda: self.bundles.open("fp32"),
            speed=lambda context, decode, threads: measure.bundle_speed(
                str(self.bundles.folder(row.name)), context, decode, threads
            ),
        )
        row.keep(list(PARTS))
        if row.name != "fp32":
            self.bundles.close(row.name)
        return row

    def _measure(
        self,
        row: Row,
        key: Any,
        open_model: Callable[[], LanguageModel],
        reference: Callable[[], LanguageModel] | None,
        speed: Callable[[int, int, int | None], dict[str, Any]],
        with_drift: bool = True,
    ) -> None:
        s, show = self.settings, self.shown(row)

        def other() -> LanguageModel | None:
            return reference() if reference is not None else None

        texts = key_of([self.texts.rows.tolist(), s.threads])
        row.measure(
            "accuracy",
            key_of(key, texts),
            lambda: measure.accuracy(open_model(), other(), self.texts.rows, show),
        )
        if with_drift:
            row.measure(
                "drift",
                key_of(key, self.texts.long.tolist(), s.threads),
                lambda: measure.drift(open_model(), other(), self.texts.long, show),
            )
        row.measure(
            "tasks",
            key_of(key, s.task_lengths, s.task_samples, s.seed, s.threads),
            lambda: measure.tasks(open_model(), s.task_lengths, s.task_samples, s.seed, show),
        )

        def timed() -> dict[str, Any]:
            show("speed", 0, 1)
            found = speed(s.context, s.decode_tokens, s.threads)
            show("speed", 1, 1)
            return found

        row.measure("speed", key_of(key, s.context, s.decode_tokens, s.threads), timed)

    def shown(self, row: Row) -> measure.Progress:
        return lambda what, done, total: self.progress(row.name, what, done, total)

    # -- the teacher -----------------------------------------------------------------------------------------

    def _teacher_row(self) -> Row:
        row = self.row("teacher-fp32", "teacher")
        key = self.teacher.sha256
        weights = sum(path.stat().st_size for path in weight_files(self.teacher.folder)[0])
        row.measure("export", key, lambda: {"bytes": weights, "weight_bytes": weights})
        self._measure(
            row,
            key=key,
            open_model=self._torch_teacher,
            reference=None,
            speed=lambda *sizes: peers.peer_speed("torch", self.teacher.folder, *sizes),
        )
        student = self.bundles.sha256("fp32")
        student_key = key_of(key, student, self.texts.rows.tolist())
        row.measure("student", student_key, lambda: self._apart(self.shown(row)))
        self.bundles.close("fp32")
        row.keep([*PARTS, "student"])
        return row

    def _torch_teacher(self) -> LanguageModel:
        from lawcat_edge.evaluate.torch_lm import TeacherModel

        if self._teacher is None:
            self._teacher = TeacherModel.load(self.teacher, device="cpu")
        return self._teacher

    def _apart(self, show: measure.Progress) -> dict[str, Any]:
        """KL(teacher ‖ fp32 student) on the same text: what distillation left to learn."""
        student, teacher = self.bundles.open("fp32"), self._torch_teacher()
        count = measure.Counter("student", self.texts.rows.size - len(self.texts.rows), show)
        parts = [text_losses(student, teacher, row, progress=count) for row in self.texts.rows]
        return measure.summary(Losses.join(parts))

    def _gguf_row(self, name: str) -> Row:
        """No drift: the teacher's cache grows with the text, and llama.cpp would keep all logits of it."""
        row = self.row(name, "gguf")
        s = self.settings
        paths: list[Path] = []

        def make() -> dict[str, Any]:
            peers.need_llama_cpp()
            source = peers.teacher_gguf(self.teacher.name, self.gguf)
            paths.append(peers.requantise(source, self.out / "gguf", name, s.threads))
            size = paths[0].stat().st_size
            return {"bytes": size, "weight_bytes": size, "sha256": sha256_file(paths[0])}

        row.parts.pop("export", None)
        made = row.measure("export", key_of(self.teacher.sha256, str(self.gguf)), make)
        if made is None:
            row.keep(["export"])
            return row
        room = max(s.length, *s.task_lengths, 1) + 512  # a prompt and its answer
        opened: list[LanguageModel] = []

        def model() -> LanguageModel:
            if not opened:
                opened.append(peers.GgufModel(paths[0], self.teacher.tokenizer_path, room, s.threads))
            return opened[0]

        self._measure(
            row,
            key=[made["sha256"], self.teacher.sha256],
            open_model=model,
            reference=self._torch_teacher,
            speed=lambda *sizes: peers.peer_speed("gguf", paths[0], *sizes),
            with_drift=False,
        )
        row.keep(list(PARTS))
        return row


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
