"""Hessians of what rounding a product costs, E[x xᵀ] of its input x, measured on the recurrent graph.

They are large (the square of the width, a layer has four), so only as many layers as fit a budget are
measured in one reading of the text, and they are forgotten when the next are asked for. A model of 135 M
parameters fits one reading; one of 7 B takes a reading for every layer or two, in the same memory.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from lawcat_edge.calibration.probes import Probed, Seen
from lawcat_edge.config import LawcatConfig
from lawcat_edge.export.step import layer_module
from lawcat_edge.families import Geometry
from lawcat_edge.progress import Progress, quiet
from lawcat_edge.runtime.bundle.manifest import Bundle
from lawcat_edge.runtime.errors import LawcatError

BUDGET = 1 << 30
"""Bytes of Hessians in memory at once (one product's may be more)."""
LEAST_TOKENS = 1024
_ROWS = 1024


class Hessians:
    """Of the bundle in ``folder`` on texts int [n,T]; ``of`` measures when it must.

    Raises LawcatError for too little text.
    """

    def __init__(
        self,
        folder: Path | str,
        texts: np.ndarray,
        threads: int | None = None,
        chunk: int = 256,
        budget: int = BUDGET,
    ) -> None:
        if texts.size < LEAST_TOKENS:
            raise LawcatError(
                f"The calibration text holds {texts.size:,} tokens, {LEAST_TOKENS:,} are needed; give more."
            )
        self.bundle, self.texts = Bundle.open(folder), texts
        self.threads, self.chunk, self.budget = threads, chunk, budget
        self.readings = 0
        manifest = self.bundle.manifest
        geometry, config = Geometry.from_dict(manifest.geometry), LawcatConfig.from_dict(manifest.lawcat)
        self._shapes = layer_module(geometry, config, full=False).shapes()
        self._held: dict[str, np.ndarray] = {}

    @property
    def paths(self) -> list[str]:
        """In the order in which an export asks for them."""
        layers = range(self.bundle.manifest.num_layers)
        return ["head", *(f"layers.{i}/{name}" for i in layers for name in ("qkv", "o", "gate_up", "down"))]

    def of(self, path: str, progress: Progress = quiet) -> np.ndarray:
        """Float32 [K,K], the mean over all tokens of x xᵀ for the input x of ``layers.3/down``, ``head`` …"""
        if path not in self._held:
            self._held.clear()
            self._held = self._measure(self._group(path), progress)
        return self._held[path]

    def _group(self, first: str) -> list[str]:
        """The products from this one on that fit the budget. The head comes first where it shares the
        embedding's table, which is stored first, and else last: so it follows the last layer here too."""
        paths = self.paths
        start, size = paths.index(first), 0
        group: list[str] = []
        for path in [*paths[start:], *paths[: min(start, 1)]]:
            size += 4 * self._width(path) ** 2
            if group and size > self.budget:
                break
            group.append(path)
        return group

    def _width(self, path: str) -> int:
        """K of a product: the numbers that it reads of every token."""
        name = path.rpartition("/")[2]
        if name == "head":
            return int(self.bundle.manifest.geometry["hidden_size"])
        return self._shapes[f"{name}.weight"][1]

    def _measure(self, group: list[str], progress: Progress) -> dict[str, np.ndarray]:
        graph = Probed(self.bundle, self.threads, group)
        sums = {path: _Sum(self._width(path)) for path in group}
        done = 0

        def add(seen: Seen) -> None:
            for path, values in seen.tensors.items():
                sums[path].add(values.reshape(-1, values.shape[-1]))

        # Many of the graph's operators leave a processor idle, so one chunk is summed while the next is read.
        with ThreadPoolExecutor(1) as pool:
            last: Future[None] | None = None
            for seen in graph.read(self.texts, self.chunk):
                if last is not None:
                    last.result()
                last = pool.submit(add, seen)
                done += seen.tokens
                progress("hessians", done, self.texts.size)
            if last is not None:
                last.result()
        self.readings += 1
        return {path: own.total() / np.float32(done) for path, own in sums.items()}


class _Sum:
    """x xᵀ over rows x, float32 [K,K], some rows at once: each product reads and writes the whole sum."""

    def __init__(self, width: int) -> None:
        self._sum = np.zeros((width, width), np.float32)
        self._rows = np.empty((min(_ROWS, max(256, width)), width), np.float32)
        self._filled = 0

    def add(self, rows: np.ndarray) -> None:
        while len(rows):
            taken = rows[: len(self._rows) - self._filled]
            self._rows[self._filled : self._filled + len(taken)] = taken
            self._filled += len(taken)
            rows = rows[len(taken) :]
            if self._filled == len(self._rows):
                self._flush()

    def total(self) -> np.ndarray:
        self._flush()
        return self._sum

    def _flush(self) -> None:
        x = self._rows[: self._filled]
        self._sum += x.T @ x  # numpy knows that this is symmetric, and computes half of it
        self._filled = 0
