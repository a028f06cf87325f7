"""The adapter: all that distillation adds to a teacher, a few MB in a folder.

lawcat_config.json       LawcatConfig, geometry, LoRA rank and alpha, the teacher's name and sha256, training
adapter.safetensors      conv taps, feature map, gate, omega, LoRA A and B (names in ``LawcatModel``)
generation_config.json   how tokens are best chosen; the export takes it over (it need not be there)
train_log.jsonl          one line per logged step

An adapter is a folder, ``owner/name`` on the hub (``runtime.bundle.hub``), or the name of one that comes with
this package.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from msgspec import Struct

from lawcat_edge.config import LawcatConfig
from lawcat_edge.families import Geometry
from lawcat_edge.lora import LoraSettings
from lawcat_edge.parameters import parameter_shapes
from lawcat_edge.runtime import schema
from lawcat_edge.runtime.bundle.hub import located
from lawcat_edge.runtime.errors import LawcatError
from lawcat_edge.runtime.files import (
    atomic_folder,
    member_path,
    read_bytes,
    read_json,
    sha256_file,
    write_json,
)

if TYPE_CHECKING:
    from lawcat_edge.teacher import Teacher

FORMAT = 1
INSTALLED = Path(__file__).parent / "adapters"
GENERAL = "smollm2-135m-general"
GENERATION_CONFIG = "generation_config.json"
MAX_BYTES = 1 << 33
LITTLE_TOKENS = 1_000_000  # the published adapters were trained on millions


def little_training(tokens: int | None) -> str | None:
    """What to say of so many tokens of training, where these are next to nothing."""
    if tokens is None or tokens >= LITTLE_TOKENS:
        return None
    return f"trained on {tokens:,} tokens only, below {LITTLE_TOKENS:,}: it will hardly write sense"


class _Document(Struct):
    """The JSON of lawcat_config.json."""

    format: int
    lawcat: dict[str, Any]
    geometry: dict[str, Any]
    teacher: str
    teacher_sha256: str
    training: dict[str, Any]
    tensors_sha256: str
    lora: dict[str, Any] | None = None


@dataclass(frozen=True)
class Adapter:
    """Trained parameters of a LAWCAT student, as float32 arrays, with what they belong to."""

    config: LawcatConfig
    geometry: Geometry
    teacher: str
    teacher_sha256: str
    tensors: dict[str, np.ndarray]
    lora: LoraSettings | None = None
    training: dict[str, Any] = field(default_factory=dict)
    sha256: str = ""
    generation: dict[str, Any] = field(default_factory=dict)  # the content of generation_config.json

    def check_teacher(self, teacher: Teacher) -> None:
        if teacher.sha256 != self.teacher_sha256:
            raise LawcatError(
                f"This adapter belongs to the teacher {self.teacher!r} (sha256 {self.teacher_sha256[:12]}…), "
                f"not to {teacher.name!r} ({teacher.sha256[:12]}…); give the teacher that it was trained on."
            )

    def with_window(self, window: int | None) -> Adapter:
        """The same with another window, which no tensor depends on; None: as it is.

        A wider one brings the student nearer to its teacher without training, and costs state and time.
        """
        if window is None or window == self.config.window:
            return self
        if not self.config.window:
            raise LawcatError(
                "This adapter was trained without a window and has no weight for one; "
                "leave --window out, or train one with lawcat-edge distill --window."
            )
        if window < 1:
            raise LawcatError(f"--window must be at least 1 for an adapter with a window, not {window}.")
        return replace(self, config=replace(self.config, window=window))

    def with_span(self, span: int | None, sinks: int | None = None) -> Adapter:
        """The same with another span of its full-attention layers, or other sinks; None: as they are.

        No tensor depends on either. A shorter span takes less memory and time, and forgets sooner.
        """
        old = self.config
        if span is None and sinks is None:
            return self
        if not old.full_attention_layers:
            raise LawcatError("No layer of this adapter keeps full attention; leave --span and --sinks out.")
        config = replace(
            old,
            attention_span=old.attention_span if span is None else span,
            attention_sinks=old.attention_sinks if sinks is None else sinks,
        )
        config.check_geometry(self.geometry)
        return replace(self, config=config)

    def with_full_attention(self, layers: Iterable[int], span: int, sinks: int | None = None) -> Adapter:
        """A pure student's adapter with softmax attention given back to these layers: their own new
        parameters go, their low-rank updates stay."""
        config = self.config.with_full_attention(layers, span, self.geometry, sinks)
        hybrid = replace(self, config=config)
        kept = hybrid.expected_shapes()
        return replace(hybrid, tensors={name: x for name, x in self.tensors.items() if name in kept})

    @property
    def trained_tokens(self) -> int | None:
        """Tokens of all stages that trained it, as its config says; None where it does not."""
        stages = self.training.get("stages")
        stages = stages.values() if isinstance(stages, dict) else ()
        counts = [stage.get("tokens") for stage in stages if isinstance(stage, dict)]
        known = [count for count in counts if type(count) is int]
        return sum(known) if known else None

    def warning(self) -> str | None:
        """What a user should know before trusting it, if it was trained on next to nothing."""
        return little_training(self.trained_tokens)

    def expected_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor this adapter must hold, with its shape."""
        shapes = parameter_shapes(self.geometry, self.config)
        lora = self.lora.shapes(self.geometry) if self.lora is not None else {}
        for i in range(self.geometry.num_layers):
            shapes |= {f"layers.{i}.{name}": shape for name, shape in lora.items()}
        return shapes

    def save(self, folder: Path, half: bool = False, extra: dict[str, bytes] | None = None) -> None:
        """Write the whole folder at once (a kill leaves the old one); ``half``: float16, for publishing.

        extra: more files of the folder by name (the training log, plots, the model card).
        """
        from safetensors.numpy import save

        dtype = np.float16 if half else np.float32
        with np.errstate(over="ignore"):  # what float16 cannot hold is refused by name below
            tensors = {k: np.ascontiguousarray(v, dtype=dtype) for k, v in self.tensors.items()}
        for name, value in tensors.items():
            if not np.isfinite(value).all():
                raise LawcatError(
                    f"The adapter was not written to {folder}: {name!r} holds NaN or numbers beyond "
                    f"{value.dtype}; train at a lower rate{', or leave --half away' if half else ''}."
                )
        with atomic_folder(folder, "lawcat_config.json") as building:
            (building / "adapter.safetensors").write_bytes(save(tensors))
            for name, content in (extra or {}).items():
                (building / name).write_bytes(content)
            config = {
                "format": FORMAT,
                "lawcat": self.config.to_dict(),
                "geometry": self.geometry.to_dict(),
                "teacher": self.teacher,
                "teacher_sha256": self.teacher_sha256,
                "lora": None if self.lora is None else self.lora.to_dict(),
                "training": self.training,
                "tensors_sha256": sha256_file(building / "adapter.safetensors"),
            }
            write_json(building / "lawcat_config.json", config)

    @classmethod
    def load(cls, folder: str | Path) -> Adapter:
        folder = adapter_folder(folder)
        member = functools.partial(member_path, folder, installed=folder.parent == INSTALLED)
        path = folder / "lawcat_config.json"
        if not path.is_file():
            raise LawcatError(
                f"{folder} is no adapter: it has no lawcat_config.json; make one with lawcat-edge distill."
            )
        data = schema.convert(read_json(member(path.name)), _Document, functools.partial(_wrong, path))
        if data.format != FORMAT:
            raise LawcatError(
                f"{path} has format {data.format}, this version reads {FORMAT}; update lawcat-edge."
            )
        for name in ("teacher", "teacher_sha256"):
            if not getattr(data, name).isprintable():
                raise LawcatError(f"{path}: field {name!r} holds control characters; copy the adapter anew.")
        if not (folder / "adapter.safetensors").exists():
            raise LawcatError(f"{folder} has no adapter.safetensors; copy the whole adapter folder.")
        file = member("adapter.safetensors")
        generation = (folder / GENERATION_CONFIG).exists() and read_json(member(GENERATION_CONFIG))
        empty = cls(
            config=_within(path, "lawcat", LawcatConfig.from_dict, data.lawcat),
            geometry=_within(path, "geometry", Geometry.from_dict, data.geometry),
            teacher=data.teacher,
            teacher_sha256=data.teacher_sha256,
            tensors={},
            lora=None if data.lora is None else _within(path, "lora", LoraSettings.from_dict, data.lora),
            training=data.training,
            sha256=data.tensors_sha256,
            generation=generation if isinstance(generation, dict) else {},
        )
        _within(path, "lawcat", empty.config.check_geometry, empty.geometry)
        return replace(empty, tensors=_read_tensors(file, empty.expected_shapes(), empty.sha256))


def adapter_folder(name: str | Path) -> Path:
    """The folder that the user calls `name`: a path, one that comes with this package, or one of the hub."""
    installed = INSTALLED / str(name)
    if not Path(name).exists() and installed.parent == INSTALLED and installed.is_dir():
        return installed
    return located(name)


def _wrong(path: Path, where: str, problem: str) -> LawcatError:
    return LawcatError(f"{path}: field {where!r} {problem}; copy the adapter anew.")


def _within(path: Path, name: str, make: Callable[[Any], Any], value: Any) -> Any:
    try:
        return make(value)
    except LawcatError as error:
        raise LawcatError(f"{path}: field {name!r}: {error}") from error


def _read_tensors(file: Path, expected: dict[str, tuple[int, ...]], sha256: str) -> dict[str, np.ndarray]:
    """The tensors of a file with that sha256, exactly those expected, as float32.

    The bytes are read once: what is used is what was hashed, even if the file changes meanwhile.
    """
    from lawcat_edge.weights import DTYPES, as_float32, check_header

    largest = 4 * sum(math.prod(shape) for shape in expected.values())
    if largest > MAX_BYTES:
        raise LawcatError(f"{file} would take {largest:,} bytes, more than an adapter has; copy it anew.")
    data = read_bytes(file, largest + (8 << 20))
    if hashlib.sha256(data).hexdigest() != sha256:
        raise LawcatError(
            f"{file} is damaged or of another adapter: its sha256 is not the recorded one; copy it anew."
        )
    found = check_header(data, len(data), file)
    tensors = {}
    for name in sorted(set(expected) | set(found)):
        kind, shape, offset = found.get(name, ("", None, 0))
        if name in found and kind not in ("F16", "F32"):
            raise LawcatError(f"{file}: tensor {name!r} must be F16 or F32, not {kind}; distil again.")
        if shape is None or shape != expected.get(name):
            raise LawcatError(
                f"{file}: tensor {name!r} is {shape}, the config asks for {expected.get(name)}."
            )
        raw = np.frombuffer(data, DTYPES[kind], math.prod(shape), offset).reshape(shape)
        tensors[name] = as_float32(raw, kind)
        if not np.isfinite(tensors[name]).all():
            raise LawcatError(f"{file}: tensor {name!r} holds NaN or infinity; distil again or copy it anew.")
    return tensors
