"""A picture of a retrieval report: accuracy by length, and by depth where depths are known."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lawcat_edge.evaluate.run import TaskReport
from lawcat_edge.runtime.errors import LawcatError

BINS = 10


def depth_table(report: TaskReport) -> tuple[list[int], np.ndarray]:
    """Lengths, and accuracies [BINS or 1, lengths] by tenth of depth; NaN where nothing was asked."""
    lengths = sorted({sample.length for sample in report.samples})
    rows = BINS if any(sample.depth is not None for sample in report.samples) else 1
    right, asked = np.zeros((rows, len(lengths))), np.zeros((rows, len(lengths)))
    for sample in report.samples:
        row = min(int((sample.depth or 0.0) * rows), rows - 1)
        column = lengths.index(sample.length)
        right[row, column] += sample.correct
        asked[row, column] += 1
    with np.errstate(invalid="ignore"):
        return lengths, right / np.where(asked, asked, np.nan)


def draw(report: TaskReport, path: str | Path) -> None:
    """Write the heat map of depth × length as a PNG. Raises LawcatError for an empty report or without
    matplotlib."""
    if not report.samples:
        raise LawcatError("There is nothing to draw: no question was asked.")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise LawcatError("The heat map needs matplotlib; install lawcat-edge[build].") from None
    lengths, table = depth_table(report)
    figure = Figure(figsize=(1.6 + 0.9 * len(lengths), 4.2 if len(table) > 1 else 2.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    image = axes.imshow(table * 100, vmin=0, vmax=100, cmap="RdYlGn", aspect="auto", origin="upper")
    for (row, column), value in np.ndenumerate(table):
        if not np.isnan(value):
            axes.text(column, row, f"{value * 100:.0f}", ha="center", va="center", fontsize=8)
    totals = [f"{cell.accuracy * 100:.0f} %" for cell in report.by_length()]
    labels = [f"{n // 1024}K" if n and n % 1024 == 0 else str(n) for n in lengths]
    axes.set_xticks(range(len(lengths)), [f"{a}\n{b}" for a, b in zip(labels, totals, strict=True)])
    axes.set_xlabel("length in tokens; accuracy over all depths")
    if len(table) > 1:
        axes.set_yticks(range(len(table)), [f"{100 * k // len(table)} %" for k in range(len(table))])
        axes.set_ylabel("depth of the needle")
    else:
        axes.set_yticks([])
    axes.set_title(f"{report.task}, {report.model} ({report.kind})", fontsize=9)
    figure.colorbar(image, ax=axes, label="accuracy in %")
    figure.savefig(path, format="png", dpi=120)
