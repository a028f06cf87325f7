"""The picture of a comparison: what a smaller file costs, and whether the error grows along the text."""

from __future__ import annotations

import io
from typing import Any

from lawcat_edge.calibration.comparison.report import get, pareto
from lawcat_edge.runtime.errors import LawcatError


def draw(report: dict[str, Any]) -> bytes:
    """PNG of KL to fp32 against size, the Pareto front as a line, and of KL by position. Raises LawcatError
    without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise LawcatError("The picture needs matplotlib; install lawcat-edge[build].") from None
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    _sizes(left, report["rows"])
    _drift(right, report["rows"])
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=120)
    return out.getvalue()


def _sizes(axes: Any, rows: list[dict[str, Any]]) -> None:
    points = {}
    for row in rows:
        size, kl = get(row, "export", "bytes"), get(row, "accuracy", "kl")
        if size is not None and (kl is not None or row["name"] == "fp32"):
            points[row["name"]] = (size / 1e6, kl or 0.0, row)
    front = sorted(points[name][:2] for name in pareto(rows) if name in points)
    axes.step(*zip(*front, strict=True), where="post", color="tab:green", lw=1, label="Pareto front")
    for size, kl, row in points.values():
        ours = row["kind"] == "scheme"
        best = (size, kl) in front and ours
        colour = "tab:green" if best else "tab:blue" if ours else "tab:gray"
        axes.plot(size, kl, marker="o" if ours else "D", ms=7, color=colour, mfc=colour if ours else "none")
    least = min((kl for _, kl, _ in points.values() if kl > 0), default=1e-3)
    # fp32 has KL 0, which no logarithmic axis shows: linear below the smallest of the others
    axes.set_yscale("symlog", linthresh=least / 2)
    axes.set_ylim(-least / 8, 3 * max([kl for _, kl, _ in points.values()] + [least]))
    axes.set_xlim(0, 1.25 * max(size for size, _, _ in points.values()))
    _label(axes, points)
    axes.set(xlabel="MB on disk", ylabel="mean KL to fp32 (less is better)", title="accuracy against size")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _label(axes: Any, points: dict[str, tuple[float, float, dict[str, Any]]]) -> None:
    """Names beside the points, each above the one below where these are close."""
    free: list[tuple[float, float]] = []  # (left end, height) of labels that are placed, in points of print
    scale = 72 / axes.figure.dpi
    for name, (size, kl, row) in sorted(points.items(), key=lambda item: item[1][1]):
        top = get(row, "accuracy", "top1")
        label = name if top is None else f"{name}, same top {top * 100:.1f} %"
        x, y = axes.transData.transform((size, kl)) * scale
        near = [height for left, height in free if abs(left - x) < 140]
        up = max([3.0, *(height + 10 - y for height in near if height + 10 > y + 3)])
        free.append((x, y + up))
        axes.annotate(label, (size, kl), xytext=(12, up), textcoords="offset points", fontsize=8)


def _drift(axes: Any, rows: list[dict[str, Any]]) -> None:
    for row in rows:
        buckets = get(row, "drift", "buckets") or []
        if buckets and buckets[0]["kl"] is not None:
            middle = [(bucket["begin"] + bucket["end"]) / 2 for bucket in buckets]
            ratio = get(row, "drift", "ratio")
            label = row["name"] if ratio is None else f"{row['name']} (last/first {ratio:.2f})"
            axes.plot(middle, [bucket["kl"] for bucket in buckets], marker="o", ms=4, label=label)
    if axes.lines:
        axes.set_yscale("log")
        axes.legend(fontsize=8)
    axes.set(xlabel="position in the text", ylabel="mean KL to fp32", title="drift along the text")
    axes.grid(alpha=0.3)
