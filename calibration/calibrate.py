"""What a scheme must know of activations, measured on the student at hand: ranges, and Hessians for rounding.

Both are measured in the scheme's own basis (rotated or not), ranges in fp32 and Hessians in 8 bits, on text
that the user gives or, without any, on text that the teacher writes itself.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from lawcat_edge.calibration import TOKENS
from lawcat_edge.calibration.gptq import Gptq
from lawcat_edge.calibration.hessian import Hessians
from lawcat_edge.calibration.ranges import ROTATED, Ranges, measure_ranges
from lawcat_edge.calibration.texts import spread
from lawcat_edge.data.readers import expand
from lawcat_edge.evaluate.lm import load_tokenizer
from lawcat_edge.export.exporter import ExportOptions, export_bundle
from lawcat_edge.export.rotation import rotation_of_down
from lawcat_edge.export.schemes import SCHEMES, Linear, Scheme
from lawcat_edge.progress import Progress, quiet
from lawcat_edge.runtime.errors import LawcatError
from lawcat_edge.runtime.files import sha256_file
from lawcat_edge.student import Student

LENGTH = 4096
"""Tokens of a text: states are not what they were after a few hundred."""


@dataclass
class Calibration:
    """``folder`` keeps fp32 bundles and sampled text. plain: an fp32 bundle of the student that will be there
    when it is asked for; without it one is made in ``folder``."""

    student: Student
    folder: Path
    files: Sequence[str] = ()
    tokens: int = TOKENS
    threads: int | None = None
    seed: int = 0
    plain: Path | None = None
    _ranges: dict[bool, Ranges] = field(default_factory=dict)
    _hessians: dict[bool, Hessians] = field(default_factory=dict)
    _texts: np.ndarray | None = None
    _made: set[bool] = field(default_factory=set)

    def for_export(
        self, scheme: Scheme, ranges: Ranges | None = None, progress: Progress = quiet
    ) -> dict[str, Any]:
        """The fields ``ranges`` and ``rounder_of`` of ``ExportOptions`` that the scheme needs.

        ranges: measured before. Raises LawcatError when they are another student's or of another basis.
        """
        needed = self.ranges_for(scheme, ranges, progress)
        if scheme.rounding == "gptq":
            needed["rounder_of"] = self.gptq(scheme.rotate, progress)
        return needed

    def ranges_for(
        self, scheme: Scheme, ranges: Ranges | None = None, progress: Progress = quiet
    ) -> dict[str, Any]:
        """``for_export`` without ``rounder_of``."""
        if not scheme.static:
            return {}
        if ranges is None:
            ranges = self.ranges(scheme.rotate, progress)
        else:
            ranges.check_export(self.student.teacher.sha256, self.student.adapter_sha256, scheme.rotate)
        return {"ranges": static_ranges(ranges, scheme)}

    def ranges(self, rotate: bool, progress: Progress = quiet) -> Ranges:
        if rotate not in self._ranges:
            self._ranges[rotate] = measure_ranges(
                self._bundle(rotate, progress),
                self.texts(progress),
                threads=self.threads,
                progress=functools.partial(progress, "ranges"),
            )
        return self._ranges[rotate]

    def gptq(self, rotate: bool, progress: Progress = quiet) -> Gptq:
        if rotate not in self._hessians:
            folder = self.folder / ("hessians-rotated" if rotate else "hessians")
            options = ExportOptions(scheme=hessian_scheme(rotate), verify=False, progress=progress)
            export_bundle(self.student, folder, options)
            hessians = Hessians(folder, self.texts(progress), self.threads)
            self._hessians = {rotate: hessians}  # one basis at a time in memory
        own = rotation_of_down(self.student.teacher.geometry.intermediate_size) if rotate else None
        return Gptq(self._hessians[rotate], progress, own)

    @property
    def identity(self) -> list[Any]:
        """Of the text, without reading or sampling it: JSON values."""
        given = [sha256_file(Path(name)) for name in expand(list(self.files))] if self.files else None
        return [given, self.tokens, self.seed]

    def texts(self, progress: Progress = quiet) -> np.ndarray:
        """int32 [n,T] token ids, T at most ``LENGTH``."""
        if self._texts is None:
            self._texts = self._given() if self.files else self._sampled(progress)
        return self._texts

    def _given(self) -> np.ndarray:
        tokenizer = load_tokenizer(self.student.teacher.tokenizer_path)
        for length in (LENGTH, LENGTH // 4, LENGTH // 16):  # short texts are taken short
            try:
                return spread(self.files, tokenizer, length, max(1, self.tokens // length))
            except LawcatError as error:
                found = error
        raise LawcatError(
            f"The calibration text is too short: one file needs {LENGTH // 16:,} tokens or more; give more."
        ) from found

    def _sampled(self, progress: Progress) -> np.ndarray:
        from lawcat_edge.distill.sample import LENGTH as SAMPLE
        from lawcat_edge.distill.sample import ensure_samples
        from lawcat_edge.model import load_student

        teacher = self.student.teacher
        tokenizer = load_tokenizer(teacher.tokenizer_path)
        path = self.folder / f"sampled-{teacher.sha256[:12]}-{self.seed}.npy"
        self.folder.mkdir(parents=True, exist_ok=True)
        model = load_student(teacher, config=self.student.config, backend="torch")
        ensure_samples(
            model,
            tokenizer,
            path,
            self.tokens,
            self.seed,
            lambda made: progress("sampling", made["tokens"], self.tokens),
        )
        rows = np.load(path, allow_pickle=False)
        joined = max(1, min(len(rows), LENGTH // SAMPLE))  # one after another, as a long conversation
        return np.ascontiguousarray(rows[: len(rows) // joined * joined].reshape(-1, joined * SAMPLE))

    def _bundle(self, rotate: bool, progress: Progress) -> Path:
        if not rotate and self.plain is not None:
            return self.plain
        out = self.folder / (ROTATED if rotate else "fp32")
        if rotate not in self._made:
            options = ExportOptions(scheme=basis_scheme(rotate), verify=False, progress=progress)
            export_bundle(self.student, out, options)
            self._made.add(rotate)
        return out


def basis_scheme(rotate: bool) -> Scheme:
    """fp32, in the basis that schemes with ``rotate`` have."""
    if not rotate:
        return SCHEMES["fp32"]
    exact = Linear("fp32")
    products = dict.fromkeys(SCHEMES["fp32"].linears, exact)
    return Scheme(ROTATED, products, exact, 0.05, 1e-3, rotate=True)


def hessian_scheme(rotate: bool) -> Scheme:
    """8 bits, in the same basis: Hessians are as good as those of fp32, and read in less time."""
    if rotate:
        return replace(SCHEMES["int8-dynamic"], rounding="nearest")
    return replace(SCHEMES["int8"], rotate=False)


def static_ranges(ranges: Ranges, scheme: Scheme) -> dict[str, tuple[float, float]]:
    """(low, high) for each product that the scheme computes with static activations."""
    found = {}
    for path in ranges.tensors:
        layer, slash, name = path.partition("/")
        if not slash:
            continue
        spec = scheme.linear(name, int(layer.removeprefix("layers.")))
        if spec.kind == "static":
            found[path] = ranges.range(path, spec.method)
    return found
