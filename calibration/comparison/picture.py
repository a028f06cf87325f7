"""The picture of a comparison: what a smaller file costs, and whether the error grows along the text.

Each point is held against its own reference: a scheme against the fp32 student, a GGUF file against the
teacher in fp32. The step from the teacher to its student, which is distillation's, stands between them.
"""

from __future__ import annotations

import io
from typing import Any

from lawcat_edge.calibration.comparison.report import get, pareto
from lawcat_edge.runtime.errors import LawcatError

Point = tuple[str, float, float, dict[str, Any]]
"""(name, MB, KL, row)"""
_REFERENCES = ("fp32", "teacher-fp32")


def draw(report: dict[str, Any]) -> bytes:
    """PNG of KL against size, the Pareto front as a line, and of KL by position. Raises LawcatError without
    matplotlib."""
    out = io.BytesIO()
    figure(report).savefig(out, format="png")
    return out.getvalue()


def figure(report: dict[str, Any]) -> Any:
    """The matplotlib figure that ``draw`` writes, its labels placed.

    Panels, left to right: GGUF files against the teacher and the step to the student (where there are any),
    schemes against the fp32 student, drift.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise LawcatError("The picture needs matplotlib; install lawcat-edge[build].") from None
    schemes = _points(report["rows"], ("scheme",))
    peers = _points(report["rows"], ("gguf", "teacher"))
    peers = peers if any(row["kind"] == "gguf" for *_, row in peers) else []
    step = (report.get("student_from_teacher") or {}).get("kl")
    widths = [*([3.0] if peers else []), *([0.9] if step is not None else []), 3.6, 3.6]
    made = Figure(figsize=(1.5 * sum(widths), 4.6), dpi=120, layout="constrained")
    FigureCanvasAgg(made)
    panels = list(made.subplots(1, len(widths), width_ratios=widths))
    scaled = panels[:-1]
    for axes in scaled[1:]:
        axes.sharey(scaled[0])
    _drift(panels.pop(), report["rows"])
    _sizes(panels.pop(), schemes, "student, quantised", "mean KL to the fp32 student")
    _front(scaled[-1], schemes, report["rows"])
    if step is not None:
        _step(panels.pop(), step)
    if peers:
        _sizes(panels.pop(), peers, "teacher, quantised (GGUF)", "mean KL to the fp32 teacher")
    _scale(scaled[0], [kl for _, _, kl, _ in (*schemes, *peers)] + ([] if step is None else [step]))
    # Positions are known only when the figure has been laid out; they must not move afterwards.
    made.canvas.draw()
    made.set_layout_engine("none")
    _label(scaled[-1], schemes)
    if peers:
        _label(scaled[0], peers)
    return made


def _points(rows: list[dict[str, Any]], kinds: tuple[str, ...]) -> list[Point]:
    """What was measured of these kinds; a reference has KL 0 to itself."""
    points = []
    for row in rows:
        size, kl = get(row, "export", "bytes"), get(row, "accuracy", "kl")
        kl = 0.0 if row["name"] in _REFERENCES else kl
        if row["kind"] in kinds and size is not None and kl is not None:
            points.append((row["name"], size / 1e6, kl, row))
    return points


def _sizes(axes: Any, points: list[Point], title: str, ylabel: str) -> None:
    for _, size, kl, row in points:
        filled = row["kind"] == "scheme"
        colour = "tab:blue" if filled else "tab:gray"
        axes.plot(
            size, kl, marker="o" if filled else "D", ms=7, color=colour, mfc=colour if filled else "none"
        )
    axes.set_xlim(0, 1.25 * max((size for _, size, _, _ in points), default=1.0))
    axes.set(xlabel="MB on disk", ylabel=ylabel, title=title)
    axes.grid(alpha=0.3)


def _front(axes: Any, points: list[Point], rows: list[dict[str, Any]]) -> None:
    """The Pareto front of the schemes, on their panel."""
    names = pareto(rows)
    front = sorted((size, kl) for name, size, kl, _ in points if name in names)
    axes.step(*zip(*front, strict=True), where="post", color="tab:green", lw=1, label="Pareto front")
    axes.plot(*zip(*front, strict=True), "o", ms=7, color="tab:green")
    axes.legend(fontsize=8, loc="upper right")


def _step(axes: Any, kl: float) -> None:
    """From the teacher, at 0, to its student: an arrow as long as what distillation left to learn."""
    axes.annotate("", (0.5, kl), (0.5, 0), arrowprops={"arrowstyle": "->", "color": "tab:red", "lw": 1.5})
    axes.set(xlim=(0, 1), xticks=[], title="teacher\nto student")
    axes.set_xlabel(f"KL {kl:.3g}\n(distillation)", color="tab:red", fontsize=8)
    axes.tick_params(labelleft=False)
    axes.grid(alpha=0.3, axis="y")


def _scale(axes: Any, values: list[float]) -> None:
    """Logarithmic, and linear below the smallest value: a reference has KL 0, which no logarithm shows."""
    least = min((kl for kl in values if kl > 0), default=1e-3)
    axes.set_yscale("symlog", linthresh=least / 2)
    axes.set_ylim(-least / 8, 4 * max([*values, least]))


def _label(axes: Any, points: list[Point]) -> None:
    """Names beside the points, each at the nearest place where it covers no other name and no point."""
    from matplotlib.transforms import Bbox

    renderer, inside = axes.figure.canvas.get_renderer(), axes.get_window_extent()
    unit = axes.figure.dpi / 72  # pixels a point of print
    places = {name: axes.transData.transform((size, kl)) for name, size, kl, _ in points}
    taken = [Bbox.from_bounds(x - 5 * unit, y - 5 * unit, 10 * unit, 10 * unit) for x, y in places.values()]
    if axes.get_legend() is not None:
        taken.append(axes.get_legend().get_window_extent(renderer))
    steps = sorted(range(-40, 41), key=abs)
    for name, size, kl, row in sorted(points, key=lambda point: point[2]):
        top = get(row, "accuracy", "top1")
        label = name if top is None else f"{name}, same top {top * 100:.1f} %"
        text = axes.annotate(
            label, (size, kl), xytext=(9, -3), textcoords="offset points", fontsize=8,
            bbox={"fc": "white", "ec": "none", "alpha": 0.8, "pad": 0.5},
            arrowprops={"arrowstyle": "-", "lw": 0.5, "color": "tab:gray", "shrinkA": 0, "shrinkB": 4},
        )  # fmt: skip
        x, y = places[name]
        here = _text_box(text, renderer)
        found = None
        for up in steps:
            for left in (x + 9 * unit, x - 9 * unit - here.width):
                box = Bbox.from_bounds(left, y + (11 * up - 4) * unit, here.width, here.height)
                free = not any(box.overlaps(other) for other in taken)
                if free and (found is None or (_within(box, inside) and not _within(found, inside))):
                    found = box
            if found is not None and _within(found, inside):
                break
        assert found is not None, "eighty lines hold every label"
        taken.append(found)
        text.set_position(((found.x0 - x) / unit, (found.y0 - y) / unit))
        text.set_verticalalignment("bottom")
        if abs(found.y0 - y) < 8 * unit:
            text.arrow_patch.set_visible(False)


def _text_box(text: Any, renderer: Any) -> Any:
    """Of the words alone, without the line to the point."""
    from matplotlib.text import Text

    return Text.get_window_extent(text, renderer)


def _within(box: Any, outer: Any) -> bool:
    return bool(box.x0 >= outer.x0 and box.x1 <= outer.x1 and box.y0 >= outer.y0 and box.y1 <= outer.y1)


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
    axes.set(
        xlabel="position in the text", ylabel="mean KL to the fp32 student", title="drift along the text"
    )
    axes.grid(alpha=0.3)
