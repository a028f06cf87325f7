"""What a scheme must know of activations, measured on the student at hand: ranges, and moments for rounding.

Both are measured on an fp32 bundle in the scheme's own basis (rotated or not), on text that the user gives
or, without any, on text that the teacher writes itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lawcat_edge.adapter import Adapter
from lawcat_edge.calibration.comparison.measure import Progress
from lawcat_edge.calibration.comparison.settings import Named, spread
from lawcat_edge.calibration.gptq import Gptq
from lawcat_edge.calibration.hessian import Moments
from lawcat_edge.calibration.ranges import ROTATED, Ranges, measure_ranges
from lawcat_edge.config import LawcatConfig
from lawcat_edge.data.readers import expand
from lawcat_edge.evaluate.lm import load_tokenizer
from lawcat_edge.export.exporter import export_bundle
from lawcat_edge.export.schemes import SCHEMES, Product, Scheme
from lawcat_edge.runtime.errors import LawcatError
from lawcat_edge.runtime.files import sha256_file
from lawcat_edge.teacher import Teacher

LENGTH = 4096
"""Tokens of a text: states are not what they were after a few hundred."""
TOKENS = 8192


@dataclass
class Calibration:
    """``folder`` keeps fp32 bundles and sampled text; ``known``: fp32 bundles, by rotate, that exist."""

    teacher: Teacher
    adapter: Adapter | None
    config: LawcatConfig
    folder: Path
    files: Sequence[str] = ()
    tokens: int = TOKENS
    threads: int | None = None
    seed: int = 0
    progress: Progress = lambda what, done, total: None
    known: dict[bool, Path] = field(default_factory=dict)
    _ranges: dict[bool, Ranges] = field(default_factory=dict)
    _gptq: dict[bool, Gptq] = field(default_factory=dict)
    _texts: np.ndarray | None = None

    def for_export(self, scheme: Scheme, ranges: Ranges | None = None) -> dict[str, Any]:
        """The arguments ``ranges`` and ``rounder_of`` of ``export_bundle`` that the scheme needs.

        ranges: measured before. Raises LawcatError when they are another student's or of another basis.
        """
        needed = self.ranges_for(scheme, ranges)
        if scheme.rounding == "gptq":
            needed["rounder_of"] = self.gptq(scheme.rotate)
        return needed

    def ranges_for(self, scheme: Scheme, ranges: Ranges | None = None) -> dict[str, Any]:
        """``for_export`` without ``rounder_of``."""
        return {"ranges": static_ranges(self._checked(scheme, ranges), scheme)} if scheme.static else {}

    def _checked(self, scheme: Scheme, ranges: Ranges | None) -> Ranges:
        if ranges is None:
            return self.ranges(scheme.rotate)
        adapter = self.adapter.sha256 if self.adapter is not None else None
        ranges.check_export(self.teacher.sha256, adapter, scheme.rotate)
        return ranges

    def ranges(self, rotate: bool) -> Ranges:
        if rotate not in self._ranges:
            self._ranges[rotate] = measure_ranges(
                self._bundle(rotate), self.texts(), threads=self.threads, progress=self._shown("ranges")
            )
        return self._ranges[rotate]

    def gptq(self, rotate: bool) -> Gptq:
        if rotate not in self._gptq:
            moments = Moments(
                self._bundle(rotate), self.texts(), self.threads, progress=self._shown("moments")
            )
            self._gptq = {rotate: Gptq(moments)}  # one basis at a time in memory
        return self._gptq[rotate]

    @property
    def identity(self) -> list[Any]:
        """Of the text, without reading or sampling it: JSON values."""
        given = [sha256_file(Path(name)) for name in expand(list(self.files))] if self.files else None
        return [given, self.tokens, self.seed]

    def texts(self) -> np.ndarray:
        """int32 [n,T] token ids, T at most ``LENGTH``."""
        if self._texts is None:
            self._texts = self._given() if self.files else self._sampled()
        return self._texts

    def _given(self) -> np.ndarray:
        tokenizer: Any = Named(load_tokenizer(self.teacher.tokenizer_path))
        for length in (LENGTH, LENGTH // 4, LENGTH // 16):  # short texts are taken short
            try:
                return spread(list(self.files), tokenizer, length, max(1, self.tokens // length))
            except LawcatError as error:
                found = error
        raise LawcatError(
            f"The calibration text is too short: one file needs {LENGTH // 16:,} tokens or more; give more."
        ) from found

    def _sampled(self) -> np.ndarray:
        from lawcat_edge.distill.sample import LENGTH as SAMPLE
        from lawcat_edge.distill.sample import ensure_samples
        from lawcat_edge.model import load_student

        tokenizer = load_tokenizer(self.teacher.tokenizer_path)
        path = self.folder / f"sampled-{self.teacher.sha256[:12]}-{self.seed}.npy"
        self.folder.mkdir(parents=True, exist_ok=True)
        show = self._shown("sampling")
        model = load_student(self.teacher, config=self.config, backend="torch")
        ensure_samples(
            model, tokenizer, path, self.tokens, self.seed, lambda made: show(made["tokens"], self.tokens)
        )
        rows = np.load(path, allow_pickle=False)
        joined = max(1, min(len(rows), LENGTH // SAMPLE))  # one after another, as a long conversation
        return np.ascontiguousarray(rows[: len(rows) // joined * joined].reshape(-1, joined * SAMPLE))

    def _bundle(self, rotate: bool) -> Path:
        if rotate not in self.known:
            out = self.folder / (ROTATED if rotate else "fp32")
            export_bundle(
                self.teacher.weights(),
                self.teacher.geometry,
                self.config,
                self.adapter,
                out,
                scheme=basis_scheme(rotate),
                tokenizer_files=self.teacher.folder,
                source={
                    "teacher": self.teacher.name,
                    "teacher_sha256": self.teacher.sha256,
                    "adapter_sha256": self.adapter.sha256 if self.adapter is not None else None,
                },
                verify=False,
                progress=self.progress,
            )
            self.known[rotate] = out
        return self.known[rotate]

    def _shown(self, what: str) -> Callable[[int, int], None]:
        return lambda done, total: self.progress(what, done, total)


def basis_scheme(rotate: bool) -> Scheme:
    """fp32, in the basis that schemes with ``rotate`` have."""
    if not rotate:
        return SCHEMES["fp32"]
    exact = Product("fp32")
    products = dict.fromkeys(SCHEMES["fp32"].products, exact)
    return Scheme(ROTATED, products, exact, 0.05, 1e-3, rotate=True)


def static_ranges(ranges: Ranges, scheme: Scheme) -> dict[str, tuple[float, float]]:
    """(low, high) for each product that the scheme computes with static activations."""
    found = {}
    for path in ranges.tensors:
        layer, slash, name = path.partition("/")
        if not slash:
            continue
        spec = scheme.product(name, int(layer.removeprefix("layers.")))
        if spec.kind == "static":
            found[path] = ranges.range(path, spec.method)
    return found
