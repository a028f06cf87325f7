"""The student: a teacher, and what makes its attention linear. All that is exported, measured or run is one.

student = Student.of(resolve("smollm2"), Adapter.load("adapter"))
student.weights()     # the teacher's, with the low-rank updates merged in, a tensor at a time
student.tensors       # LAWCAT's own parameters
student.model()       # both in torch
student.source        # what a manifest says of where it came from
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from lawcat_edge.adapter import Adapter
from lawcat_edge.config import LawcatConfig
from lawcat_edge.families import Geometry
from lawcat_edge.parameters import initial_tensors
from lawcat_edge.teacher import Teacher
from lawcat_edge.weights import MergedWeights, WeightSource

if TYPE_CHECKING:
    from lawcat_edge.model import LawcatModel


@dataclass(frozen=True)
class Student:
    """A teacher with a trained adapter, or with an untrained config (adapter None); see ``of``."""

    teacher: Teacher
    config: LawcatConfig
    adapter: Adapter | None = None

    @classmethod
    def of(
        cls, teacher: Teacher, adapter: Adapter | None = None, config: LawcatConfig | None = None
    ) -> Student:
        """With the adapter's config, or untrained with ``config``, by default that of the geometry.

        Raises LawcatError for an adapter of another teacher, and for layers that the teacher does not have.
        """
        if adapter is not None:
            adapter.check_teacher(teacher)
            return cls(teacher, adapter.config, adapter)
        config = config or LawcatConfig.for_geometry(teacher.geometry)
        config.check_geometry(teacher.geometry)
        return cls(teacher, config)

    @property
    def geometry(self) -> Geometry:
        return self.teacher.geometry

    @cached_property
    def tensors(self) -> dict[str, np.ndarray]:
        """LAWCAT's parameters by their names in an adapter, float32: trained, or where training begins."""
        if self.adapter is None:
            return initial_tensors(self.geometry, self.config)
        return self.adapter.tensors

    def weights(self) -> WeightSource:
        """The teacher's weights with the adapter's low-rank updates added, a tensor at a time."""
        base = self.teacher.weights()
        return base if self.adapter is None else MergedWeights(base, self.adapter)

    def model(self, backend: str = "auto") -> LawcatModel:
        """The student in torch, float32, in eval mode."""
        from lawcat_edge.model import load_student

        return load_student(self.teacher, self.adapter, self.config, backend)

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """tokens int64 [T] -> logits float32 [T,V] of the torch student, loaded for this one call."""
        import torch

        with torch.inference_mode():
            return self.model()(torch.from_numpy(tokens)[None])[0][0].numpy()

    @property
    def adapter_sha256(self) -> str | None:
        """None for an untrained student, and for an adapter that was never a file."""
        return (self.adapter.sha256 or None) if self.adapter is not None else None

    @property
    def source(self) -> dict[str, Any]:
        """Where it comes from, as a manifest says it."""
        return {
            "teacher": self.teacher.name,
            "teacher_sha256": self.teacher.sha256,
            "adapter_sha256": self.adapter_sha256,
            "trained_tokens": None if self.adapter is None else self.adapter.trained_tokens,
        }

    @property
    def warning(self) -> str | None:
        """What a user should know before trusting it."""
        if self.adapter is None:
            return "no adapter: an untrained conversion"
        return self.adapter.warning()
