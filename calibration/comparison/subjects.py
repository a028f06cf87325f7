"""What a row measures: a bundle, the teacher in torch, or a GGUF file; each opened when it is first read."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from lawcat_edge.calibration.comparison import measure, peers
from lawcat_edge.evaluate.lm import BundleModel, LanguageModel
from lawcat_edge.runtime.bundle.manifest import Bundle
from lawcat_edge.teacher import Teacher


class Subject:
    """identity: changes when the model does, so that measured parts can be taken again."""

    identity: str

    def _open(self) -> LanguageModel:
        raise NotImplementedError

    @cached_property
    def model(self) -> LanguageModel:
        return self._open()

    def close(self) -> None:
        """Give the memory back; the next use opens it again."""
        self.__dict__.pop("model", None)

    def speed(self, context: int, decode_tokens: int, threads: int | None) -> dict[str, Any]:
        """Tokens/s and peak memory, measured in a process of its own."""
        raise NotImplementedError


class BundleSubject(Subject):
    def __init__(self, folder: Path, threads: int | None) -> None:
        self.folder, self.threads = folder, threads
        self.identity = Bundle.open(folder, check_hashes=False).sha256

    def _open(self) -> LanguageModel:
        return BundleModel(self.folder, threads=self.threads)

    def speed(self, context: int, decode_tokens: int, threads: int | None) -> dict[str, Any]:
        return measure.bundle_speed(str(self.folder), context, decode_tokens, threads)


class TeacherSubject(Subject):
    def __init__(self, teacher: Teacher) -> None:
        self.teacher, self.identity = teacher, teacher.sha256

    def _open(self) -> LanguageModel:
        from lawcat_edge.evaluate.torch_lm import TeacherModel

        return TeacherModel.load(self.teacher, device="cpu")

    def speed(self, context: int, decode_tokens: int, threads: int | None) -> dict[str, Any]:
        return peers.peer_speed("torch", self.teacher.folder, context, decode_tokens, threads)


class GgufSubject(Subject):
    """room: tokens of the longest text that will be read."""

    def __init__(self, file: Path, sha256: str, teacher: Teacher, room: int, threads: int | None) -> None:
        self.file, self.identity = file, sha256
        self.teacher, self.room, self.threads = teacher, room, threads

    def _open(self) -> LanguageModel:
        return peers.GgufModel(self.file, self.teacher.tokenizer_path, self.room, self.threads)

    def speed(self, context: int, decode_tokens: int, threads: int | None) -> dict[str, Any]:
        return peers.peer_speed("gguf", self.file, context, decode_tokens, threads)
