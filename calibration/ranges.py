"""Ranges of the activations that matrix products read, for schemes with fixed (static) 8-bit activations.

They are measured on the recurrent graph itself, in onnxruntime, fed chunk by chunk with the state of all
tokens before: what a product reads after ten thousand tokens is not what it reads after ten, since the state
has grown (``Ranges.growth`` says by how much). Memory is that of one chunk, whatever the text.

    ranges = measure_ranges("out/bundles/fp32", texts)      # [n, T] token ids, each from an empty state
    ranges.save("ranges.json")
    low, high = Ranges.load("ranges.json").range("layers.3/down", "percentile")

The file is JSON: what it was measured on, and for each tensor its extremes, a histogram, and the extremes of
each ``SEGMENT`` tokens. Files of the same graph merge, so texts can be measured on different days.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from msgspec import Meta, Struct

from lawcat_edge.calibration.histogram import Histogram
from lawcat_edge.calibration.probes import Probed
from lawcat_edge.runtime import schema
from lawcat_edge.runtime.bundle.manifest import Bundle
from lawcat_edge.runtime.errors import LawcatError
from lawcat_edge.runtime.files import read_json, write_json

FORMAT = 1
SEGMENT = 512
"""Tokens whose extremes are kept together."""
LEAST_TOKENS = 1024
_BASIS = ("teacher_sha256", "adapter_sha256", "bundle_sha256")
ROTATED = "fp32-rotated"
"""Scheme of the bundle on which ranges for schemes with ``rotate`` are measured; others: on fp32."""


@dataclass
class Ranges:
    """tensors: by the product that reads them ("layers.0/qkv", …, "head"), and the states ("state.0").
    segments: the largest absolute value in each ``SEGMENT`` tokens of a text."""

    measured_on: dict[str, Any]
    tensors: dict[str, Histogram] = field(default_factory=dict)
    segments: dict[str, list[float]] = field(default_factory=dict)
    tokens: int = 0
    texts: list[str] = field(default_factory=list)

    def range(self, name: str, method: str = "minmax", share: float = 0.9999) -> tuple[float, float]:
        """(low, high) of a tensor; methods as ``Histogram.range``. Raises LawcatError for an unknown one."""
        if name not in self.tensors:
            raise LawcatError(f"There is no range of {name!r}; calibrate on the bundle that has it.")
        return self.tensors[name].range(method, share)

    def growth(self, name: str) -> float:
        """The largest absolute value of the later half of the segments over that of the first segment."""
        found = self.segments[name]
        return max(found[len(found) // 2 :]) / max(found[0], 1e-30)

    def check(self, bundle: Bundle) -> None:
        """Raise LawcatError unless this was measured on that bundle."""
        self._same(_basis(bundle), "the bundle at hand")

    def check_export(self, teacher_sha256: str, adapter_sha256: str | None, rotate: bool) -> None:
        """Raise LawcatError unless these fit an export of that teacher and adapter, in that basis."""
        basis = self.measured_on
        if (basis.get("teacher_sha256"), basis.get("adapter_sha256")) != (teacher_sha256, adapter_sha256):
            raise LawcatError(
                "These ranges were measured on another teacher or adapter; run lawcat-edge calibrate again."
            )
        if (basis.get("scheme") == ROTATED) != rotate:
            raise LawcatError(
                "These ranges are of another basis than the scheme's (rotate); calibrate with this --scheme."
            )

    def merge(self, other: Ranges) -> None:
        """Add what another run of the same graph saw. LawcatError for another graph or one text twice."""
        self._same(other.measured_on, "the other file")
        twice = set(self.texts) & set(other.texts)
        if twice:
            raise LawcatError("Both files saw the same text; merging would count it twice.")
        for name, histogram in other.tensors.items():
            if name in self.tensors:
                self.tensors[name].merge(histogram)
            else:
                self.tensors[name] = histogram.copy()
        for name, found in other.segments.items():
            mine = self.segments.get(name, [])
            longest = max(len(mine), len(found))
            pairs = [[xs[i] for xs in (mine, found) if i < len(xs)] for i in range(longest)]
            self.segments[name] = [max(pair) for pair in pairs]
        self.tokens += other.tokens
        self.texts += other.texts

    def _same(self, basis: dict[str, Any], what: str) -> None:
        if any(self.measured_on.get(key) != basis.get(key) for key in _BASIS):
            raise LawcatError(f"These ranges were measured on another graph than {what}; calibrate again.")

    # -- files -----------------------------------------------------------------------------------------------

    def save(self, path: Path | str) -> None:
        tensors = {name: histogram.to_dict() for name, histogram in self.tensors.items()}
        data = {
            "format": FORMAT,
            "measured_on": self.measured_on,
            "tokens": self.tokens,
            "texts": self.texts,
            "segment": SEGMENT,
            "tensors": {name: {**data, "segments": self.segments[name]} for name, data in tensors.items()},
        }
        write_json(path, data)

    @classmethod
    def load(cls, path: Path | str) -> Ranges:
        """Read and check a file of ``save``. Raises LawcatError."""

        def wrong(where: str, problem: str) -> LawcatError:
            problem = f"{where[:100]} {problem}"
            return LawcatError(
                f"{path} holds no activation ranges of this version: {problem}; calibrate again."
            )

        data = schema.convert(read_json(Path(path)), _Document, wrong)
        missing = sorted(set(_BASIS) - set(data.measured_on))
        if missing:
            raise wrong(f"measured_on.{missing[0]}", "is missing")
        found = cls(data.measured_on, tokens=data.tokens, texts=data.texts)
        for name, entry in data.tensors.items():
            segments = entry.pop("segments", None)
            found.segments[name] = schema.convert(segments, _Segments, wrong, f"tensors.{name}.segments")
            try:
                found.tensors[name] = Histogram.from_dict(entry, name[:100])
            except LawcatError as error:
                raise LawcatError(f"{path}: {error}") from None
        return found


_Segments = Annotated[list[Annotated[float, Meta(ge=0.0, lt=1e30)]], Meta(min_length=1)]


class _Document(Struct, forbid_unknown_fields=True):
    """The JSON of a file of ranges; a tensor's entry is a histogram's, and its segments."""

    format: Literal[1]
    measured_on: dict[str, Any]
    tokens: Annotated[int, Meta(ge=0, lt=1 << 53)]
    texts: list[str]
    segment: Literal[512]
    tensors: dict[str, dict[str, Any]]


def measure_ranges(
    folder: Path | str,
    texts: np.ndarray,
    chunk: int = 256,
    threads: int | None = None,
    keep_state: bool = True,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Ranges:
    """Read texts int [n,T] with the bundle in ``folder`` (fp32, or one whose products are fp32 or nbits).

    keep_state: False starts every chunk from an empty state, as calibrators for stateless graphs do: only to
    show what that misses. progress: (tokens, total). Raises LawcatError for too little text.
    """
    if texts.size < LEAST_TOKENS:
        raise LawcatError(
            f"The calibration text holds {texts.size:,} tokens and needs {LEAST_TOKENS:,}; give more text."
        )
    bundle = Bundle.open(folder)
    graph = Probed(bundle, threads)
    found = Ranges(_basis(bundle), {name: Histogram() for name in graph.probes.values()})
    found.segments = {name: [0.0] * -(-texts.shape[1] // SEGMENT) for name in found.tensors}
    for seen in graph.read(texts, chunk, keep_state):
        at = seen.start // SEGMENT
        for name, values in seen.tensors.items():
            found.tensors[name].add(values)
            found.segments[name][at] = max(found.segments[name][at], float(np.abs(values).max()))
        found.tokens += seen.tokens
        progress(found.tokens, texts.size)
    found.texts = [text_sha256(row) for row in texts]
    return found


def text_sha256(row: np.ndarray) -> str:
    """Of token ids [T]."""
    return hashlib.sha256(np.ascontiguousarray(row, np.int64).tobytes()).hexdigest()


def _basis(bundle: Bundle) -> dict[str, Any]:
    source = bundle.manifest.source
    return {
        "teacher_sha256": source.get("teacher_sha256"),
        "adapter_sha256": source.get("adapter_sha256"),
        "bundle_sha256": bundle.sha256,
        "scheme": bundle.manifest.scheme,
    }
