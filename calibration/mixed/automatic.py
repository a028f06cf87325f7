"""Sensitivities of a comparison's student, and the mixed schemes chosen from them.

OUT/sensitivity.json .md .png hold the table; OUT/schemes/auto-….json each scheme, which ``export`` takes too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lawcat_edge.calibration.comparison.compare import Comparison, fp32_bytes
from lawcat_edge.calibration.comparison.rows import key_of
from lawcat_edge.calibration.mixed import search, sensitivity
from lawcat_edge.calibration.mixed.simulate import Simulated
from lawcat_edge.export.schemes import SCHEMES, Scheme
from lawcat_edge.runtime.errors import LawcatError
from lawcat_edge.runtime.files import atomic_file, write_json, write_text

SEQUENCES, TOKENS = 2, 512  # that each part is measured on, at most
ROTATE = True  # in the basis that the 8-bit schemes are in: rounding costs less there


class Automatic:
    """Measures once, chooses as often as asked."""

    def __init__(self, run: Comparison) -> None:
        self.run, self.out = run, run.out
        self.ids = run.texts.rows[:SEQUENCES, :TOKENS]
        self._simulated: Simulated | None = None
        self._text: sensitivity.Text | None = None

    def measure(self) -> dict[str, Any]:
        """The sensitivities (see ``sensitivity``), written to OUT as well."""
        run = self.run
        student = run.student
        key = key_of(student.teacher.sha256, student.adapter_sha256, student.config.to_dict(), ROTATE)
        row = run.row("sensitivity", "sensitivity")
        layers = student.geometry.num_layers
        show = run.shown(row)
        found = sensitivity.sensitivity(self._make, layers, self.ids, row, key, show)
        write_json(self.out / "sensitivity.json", {"format": 1, "tokens": int(self.ids.size), **found})
        write_text(self.out / "sensitivity.md", sensitivity.markdown(found))
        try:
            image = sensitivity.draw(found)
        except LawcatError:  # no matplotlib: the table says the same
            return found
        with atomic_file(self.out / "sensitivity.png") as file:
            file.write(image)
        return found

    def choose(self, max_kl: float | None, max_mb: float | None) -> list[str]:
        """Scheme files: the smallest with KL ≤ max_kl, the best under max_mb (of the whole bundle)."""
        kinds, g = self.measure()["kinds"], self.run.student.geometry
        fp32 = fp32_bytes(self.run)
        sizes = search.Sizes.of_bundle(g, self.run.student.config, SCHEMES["fp32"], fp32)
        chosen = []
        if max_kl is not None:
            chosen.append(search.smallest(kinds, sizes, max_kl, ROTATE, self._kl))
        if max_mb is not None:
            chosen.append(search.best_under(kinds, sizes, int(max_mb * 1e6), ROTATE))
        return [str(self._write(scheme)) for scheme in chosen]

    def _write(self, scheme: Scheme) -> Path:
        path = self.out / "schemes" / f"{scheme.name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, scheme.to_dict())
        return path

    def _make(self) -> Simulated:
        if self._simulated is None:
            self._simulated = Simulated(self.run.student.model(backend="torch"), ROTATE)
        return self._simulated

    def _kl(self, scheme: Scheme) -> float:
        """Of the whole scheme, simulated."""
        simulated = self._make()
        if self._text is None:
            self._text = sensitivity.Text(simulated, self.ids)
        simulated.set_scheme(scheme)
        found = self._text.kl()["kl"]
        simulated.clear()
        return found
