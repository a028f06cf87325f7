"""Random small students and their bundles, for the tests of export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny_teacher import make_teacher

from lawcat_edge.adapter import Adapter
from lawcat_edge.config import LawcatConfig
from lawcat_edge.export.exporter import ExportOptions, export_bundle
from lawcat_edge.export.schemes import load_scheme
from lawcat_edge.model import LawcatModel, load_student
from lawcat_edge.student import Student
from lawcat_edge.teacher import Teacher, resolve


def make_student(
    folder: Path,
    family: str = "llama",
    config: LawcatConfig | None = None,
    lora: int = 0,
    start: int = 0,
    **changes: Any,
) -> tuple[Teacher, LawcatModel, Adapter]:
    """A teacher, a student with every new parameter away from its start (of that seed), and that as an
    adapter."""
    teacher = resolve(make_teacher(folder, family, **changes))
    config = config or LawcatConfig(feature_dim=8)
    model = load_student(teacher, config=config, seed=start)
    if lora:
        model.add_lora(lora, 16)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.adapter_parameters().values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    tensors = {name: value.detach().numpy().copy() for name, value in model.adapter_parameters().items()}
    return teacher, model, Adapter(config, teacher.geometry, "tiny", teacher.sha256, tensors, model.lora)


def logits_of(model: LawcatModel, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(tokens)[None])[0][0].numpy()


def make_bundle(
    teacher: Teacher, model: LawcatModel, adapter: Adapter, out: Path, **options: Any
) -> dict[str, Any]:
    """options: fields of ExportOptions; the scheme may be a name."""
    options = {"scheme": "fp32", "reference": lambda tokens: logits_of(model, tokens), **options}
    if isinstance(options["scheme"], str):
        options["scheme"] = load_scheme(options["scheme"])
    return export_bundle(Student.of(teacher, adapter), out, ExportOptions(**options))
