"""Sensitivities of a comparison's student, and the mixed schemes chosen from them.

OUT/sensitivity.json .md .png hold the table; OUT/schemes/auto-….json each scheme, which ``export`` takes too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lawcat_edge.calibration.comparison.compare import Comparison, fp32_bytes
from lawcat_edge.calibration.comparison.rows import key_of
from lawcat_edge.calibration.mixed import search, sensitivity
from lawcat_edge.calibration.mixed.bench import FP32, Bench
from lawcat_edge.export.schemes import SCHEMES, Scheme
from lawcat_edge.runtime.errors import LawcatError
from lawcat_edge.runtime.files import atomic_file, write_json, write_text

SEQUENCES, TOKENS = 2, 512  # that each part is measured on, at most
ROTATE = True  # in the basis that the 8-bit schemes are in: rounding costs less there


def choose_schemes(job: Comparison, max_kl: float | None, max_mb: float | None) -> list[str]:
    """Measure the sensitivities, and choose: the smallest scheme with KL ≤ max_kl, the best under max_mb (of
    the whole bundle); the files of these schemes."""
    row = job.row("sensitivity", "sensitivity")
    ids, threads = job.texts.rows[:SEQUENCES, :TOKENS], job.settings.threads
    bench = Bench(job.student, job.out / "bench", ids, sensitivity.CHOICES, ROTATE, threads, job.shown(row))
    base, layers = bench.uniform(FP32), job.student.geometry.num_layers
    key = key_of(job.student.source, job.student.config.to_dict(), ids.tolist())
    found = sensitivity.sensitivity(bench.kl, base, layers, row, key, job.shown(row))
    _write(job.out, found)
    sizes = search.Sizes.of_bundle(job.student.geometry, job.student.config, SCHEMES["fp32"], fp32_bytes(job))
    chosen: list[Scheme] = []
    if max_kl is not None:
        chosen.append(search.smallest(found["kinds"], sizes, max_kl, ROTATE, bench.kl))
    if max_mb is not None:
        chosen.append(search.best_under(found["kinds"], sizes, int(max_mb * 1e6), ROTATE))
    bench.remove()
    return [str(_scheme_file(job.out, scheme)) for scheme in chosen]


def _write(out: Path, found: dict[str, Any]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "sensitivity.json", {"format": 1, **found})
    write_text(out / "sensitivity.md", sensitivity.markdown(found))
    try:
        image = sensitivity.draw(found)
    except LawcatError:  # no matplotlib: the table says the same
        return
    with atomic_file(out / "sensitivity.png") as file:
        file.write(image)


def _scheme_file(out: Path, scheme: Scheme) -> Path:
    path = out / "schemes" / f"{scheme.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, scheme.to_dict())
    return path
