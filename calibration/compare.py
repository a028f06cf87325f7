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
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from lawcat_edge import __version__
from lawcat_edge.adapter import Adapter
from lawcat_edge.calibration import measure, peers
from lawcat_edge.calibration.divergence import Losses, text_losses
from lawcat_edge.calibration.rows import Row, key_of, sentence
from lawcat_edge.config import LawcatConfig
from lawcat_edge.distill.readers import expand
from lawcat_edge.evaluate.filler import Encoder
from lawcat_edge.evaluate.lm import BundleModel, LanguageModel, load_tokenizer
from lawcat_edge.evaluate.perplexity import text_sequences
from lawcat_edge.evaluate.run import cell_prompts
from lawcat_edge.export.exporter import export_bundle
from lawcat_edge.export.schemes import SCHEMES, Scheme, load_scheme
from lawcat_edge.runtime.bundle import Bundle
from lawcat_edge.runtime.engine import physical_cores
from lawcat_edge.runtime.errors import LawcatError
from lawcat_edge.runtime.files import read_json, sha256_file, write_json
from lawcat_edge.teacher import Teacher

PARTS = ("export", "accuracy", "drift", "tasks", "speed")
Progress = Callable[[str, str, int, int], None]
"""(row, what, done, total)"""


@dataclass(frozen=True)
class Settings:
    """What is measured, and on how much. Lengths in tokens."""

    length: int = 1024
    samples: int = 8
    drift_length: int = 4096
    drift_samples: int = 2
    task_lengths: tuple[int, ...] = (512, 1024)
    task_samples: int = 20
    context: int = 512
    decode_tokens: int = 64
    threads: int | None = None
    seed: int = 0

    def check(self) -> None:
        bounds = {
            "length": (2, self.length),
            "samples": (1, self.samples),
            "drift-length": (2 * measure.BUCKETS, self.drift_length),
            "drift-samples": (1, self.drift_samples),
            "task-samples": (1, self.task_samples),
            "context": (1, self.context),
            "decode-tokens": (2, self.decode_tokens),
        }
        for name, (least, value) in bounds.items():
            if value < least:
                raise LawcatError(f"--{name} must be at least {least}, not {value}.")


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
        tokenizer: Any = _Named(load_tokenizer(teacher.tokenizer_path))
        names = [str(name) for name in files]
        self.texts = [Path(name).name for name in names]
        self.rows = spread(names, tokenizer, settings.length, settings.samples)
        try:
            self.long = spread(names, tokenizer, settings.drift_length + 1, settings.drift_samples)
        except LawcatError as error:
            raise LawcatError(
                f"The text is too short to follow the error over {settings.drift_length:,} tokens; give "
                "more text or a smaller --drift-length."
            ) from error
        for task in measure.TASKS:  # a length too short for a question is said before anything is made
            for size in settings.task_lengths:
                try:
                    cell_prompts(task, Encoder(tokenizer.tokenizer), None, size, 1, seed=settings.seed)
                except LawcatError as error:
                    said = str(error).rstrip(".")
                    raise LawcatError(f"{said}; --task-lengths {size:,} is too short for {task}.") from error
        self._open: dict[str, LanguageModel] = {}

    # -- the run ---------------------------------------------------------------------------------------------

    def run(self, schemes: Sequence[str], with_peers: bool = True) -> dict[str, Any]:
        began = time.perf_counter()
        names = ["fp32", *(name for name in dict.fromkeys(schemes) if name != "fp32")]
        rows = [self._scheme_row(name) for name in names]
        apart = None
        if with_peers:
            rows.append(self._teacher_row())
            apart = rows[-1].parts.get("student", {}).get("result")
            rows += [self._gguf_row(name) for name in peers.gguf_rows(self.teacher.name)]
        self._open.clear()
        return {
            "format": 1,
            "created_by": f"lawcat-edge {__version__}",
            "onnxruntime": onnxruntime.__version__,
            "machine": _processor(),
            "teacher": self.teacher.name,
            "teacher_sha256": self.teacher.sha256,
            "adapter_sha256": self.adapter.sha256 if self.adapter is not None else None,
            "text": self.texts,
            "settings": asdict(self.settings),
            "student_from_teacher": apart,
            "rows": [row.to_dict() for row in rows],
            "seconds": round(time.perf_counter() - began, 2),
        }

    def row(self, name: str, kind: str) -> Row:
        (self.out / "rows").mkdir(parents=True, exist_ok=True)
        return Row(self.out / "rows" / f"{_file_name(name)}.json", name, kind, self.resume)

    def _scheme_row(self, name: str) -> Row:
        shown = name if name in SCHEMES else Path(name).stem
        row = self.row(f"{shown}-file" if shown in SCHEMES and name not in SCHEMES else shown, "scheme")
        folder = self.out / "bundles" / _file_name(row.name)
        made = self._export(row, name, folder)
        if made is None:
            row.keep(["export"])
            if name == "fp32":
                raise LawcatError(
                    f"The fp32 bundle is what all others are held against: {row.errors['export']}"
                )
            return row
        self._measure(
            row,
            key=[made["bundle_sha256"], self._reference_key],
            open_model=lambda: self._bundle(folder),
            reference=None if row.name == "fp32" else lambda: self._bundle(self.out / "bundles" / "fp32"),
            speed=lambda context, decode, threads: measure.bundle_speed(
                str(folder), context, decode, threads
            ),
        )
        row.keep(list(PARTS))
        if row.name != "fp32":
            self._open.pop(str(folder), None)
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

        texts = key_of([self.rows.tolist(), s.threads])
        row.measure(
            "accuracy",
            key_of(key, texts),
            lambda: measure.accuracy(open_model(), other(), self.rows, show),
        )
        if with_drift:
            row.measure(
                "drift",
                key_of(key, self.long.tolist(), s.threads),
                lambda: measure.drift(open_model(), other(), self.long, show),
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

    # -- bundles ---------------------------------------------------------------------------------------------

    def _export(self, row: Row, name: str, folder: Path) -> dict[str, Any] | None:
        """The row's part ``export``; an old bundle serves when it was made of the same and is still whole."""
        try:
            table = load_scheme(name)
        except LawcatError as error:
            row.parts = {"export": {"key": "", "seconds": 0.0, "error": sentence(error)}}
            return None
        key = key_of(self._sources, table.to_dict(), __version__)
        mark = folder.with_name(f"{folder.name}.json")
        held = _still_there(folder, mark, key) if self.resume else None
        if held is None:
            row.parts.pop("export", None)
        return row.measure(
            "export", key, lambda: held or self._make(table, folder, mark, key, self.shown(row))
        )

    def _make(
        self, table: Scheme, folder: Path, mark: Path, key: str, show: measure.Progress
    ) -> dict[str, Any]:
        began = time.perf_counter()
        self._open.pop(str(folder), None)
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
            reference=self._torch_student if table.name == "fp32" else None,  # the others are held against it
            progress=show,
        )
        made = {"key": key, **_sizes(Bundle.open(folder, check_hashes=False)), "scheme": table.to_dict()}
        made["nodes_per_layer"] = report["nodes_per_layer"]["ort"]
        made["export_seconds"] = round(time.perf_counter() - began, 2)
        write_json(mark, made)
        return made

    def _torch_student(self, tokens: np.ndarray) -> np.ndarray:
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

    def fp32_bytes(self) -> int:
        """Of the fp32 bundle, which is exported where it is not there yet."""
        row = self.row("fp32", "scheme")
        made = self._export(row, "fp32", self.out / "bundles" / "fp32")
        if made is None:
            raise LawcatError(row.errors["export"])
        return int(made["bytes"])

    @property
    def _reference_key(self) -> str:
        return Bundle.open(self.out / "bundles" / "fp32", check_hashes=False).sha256

    def _bundle(self, folder: Path) -> LanguageModel:
        """Opened once; the fp32 one stays open as the reference."""
        if str(folder) not in self._open:
            self._open[str(folder)] = BundleModel(folder, threads=self.settings.threads)
        return self._open[str(folder)]

    # -- the teacher -----------------------------------------------------------------------------------------

    def _teacher_row(self) -> Row:
        row = self.row("teacher-fp32", "teacher")
        key = self.teacher.sha256
        weights = sum(path.stat().st_size for path in self.teacher.folder.glob("*.safetensors"))
        row.measure("export", key, lambda: {"bytes": weights, "weight_bytes": weights})
        self._measure(
            row,
            key=key,
            open_model=self._torch_teacher,
            reference=None,
            speed=lambda *sizes: peers.peer_speed("torch", self.teacher.folder, *sizes),
        )
        student = self._reference_key
        row.measure("student", key_of(key, student, self.rows.tolist()), lambda: self._apart(self.shown(row)))
        row.keep([*PARTS, "student"])
        return row

    def _torch_teacher(self) -> LanguageModel:
        from lawcat_edge.evaluate.torch_lm import TeacherModel

        if "teacher" not in self._open:
            self._open["teacher"] = TeacherModel.load(self.teacher, device="cpu")
        return self._open["teacher"]

    def _apart(self, show: measure.Progress) -> dict[str, Any]:
        """KL(teacher ‖ fp32 student) on the same text: what distillation left to learn."""
        student, teacher = self._bundle(self.out / "bundles" / "fp32"), self._torch_teacher()
        count = measure.Counter("student", self.rows.size - len(self.rows), show)
        parts = [text_losses(student, teacher, row, progress=count) for row in self.rows]
        return measure.summary(Losses.join(parts))

    def _gguf_row(self, name: str) -> Row:
        """No drift: the teacher's cache grows with the text, and llama.cpp would keep all logits of it."""
        row = self.row(name, "gguf")
        s = self.settings
        paths: list[Path] = []

        def make() -> dict[str, Any]:
            if not peers.llama_cpp_installed():
                raise LawcatError(
                    "llama-cpp-python is not installed; run pip install llama-cpp-python for this row."
                )
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


def spread(names: list[str], tokenizer: Any, length: int, samples: int) -> np.ndarray:
    """``samples`` sequences of ``length`` ids, as many from each file: int32 [≤samples,length].

    One domain alone says little of another, and the first file may be long enough for all. A file that is too
    short for a sequence is left out; LawcatError when that leaves none.
    """
    files = expand(names)[:samples]
    share = -(-samples // len(files))
    found = []
    for k, file in enumerate(files):
        try:
            found.append(text_sequences([file], tokenizer, length, share))
        except LawcatError:
            if not found and k + 1 == len(files):
                raise
    return np.concatenate(found)[:samples]


@dataclass(frozen=True)
class _Named:
    """A tokenizer where a model is asked for."""

    tokenizer: Any


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
        "state_bytes": bundle.manifest.state_bytes,
        "bundle_sha256": bundle.sha256,
    }


def _file_name(name: str) -> str:
    """A row's name as a file name."""
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in name)[:80].lstrip(".") or "_"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
