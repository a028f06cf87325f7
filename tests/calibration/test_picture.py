"""The picture of a comparison: each point against its own reference, no name over another or over a point."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="the picture needs the extra build")

from matplotlib.text import Annotation, Text
from matplotlib.transforms import Bbox

from lawcat_edge.calibration.comparison import picture


def row(name: str, kind: str, megabytes: float, kl: float | None, top1: float | None = 0.9) -> dict[str, Any]:
    top1 = None if kl is None else top1
    accuracy = {"kl": kl, "top1": top1, "perplexity": 2.0}
    return {
        "name": name,
        "kind": kind,
        "errors": {},
        "export": {"bytes": megabytes * 1e6},
        "accuracy": accuracy,
    }


SCHEMES = [row("fp32", "scheme", 544.9, None), row("int8", "scheme", 145.5, 0.003)]
SCHEMES += [row("int8-dynamic", "scheme", 142.9, 0.0029), row("int4", "scheme", 92.3, 0.06)]
PEERS = [row("teacher-fp32", "teacher", 538.1, None), row("gguf-q8_0", "gguf", 144.8, 0.0051)]
PEERS += [row("gguf-q4_0", "gguf", 91.7, 0.29)]
STEP = {"kl": 0.2, "top1": 0.78}


def points_of(axes: Any) -> set[tuple[float, float]]:
    markers = [line for line in axes.lines if line.get_marker() in ("o", "D")]
    return {(round(x, 6), round(y, 6)) for line in markers for x, y in zip(*line.get_data(), strict=True)}


def test_each_point_stands_in_the_panel_of_its_reference() -> None:
    figure = picture.figure({"rows": [*SCHEMES, *PEERS], "student_from_teacher": STEP})
    teacher, step, student, _ = figure.axes
    assert points_of(student) == {(544.9, 0.0), (145.5, 0.003), (142.9, 0.0029), (92.3, 0.06)}
    assert points_of(teacher) == {(538.1, 0.0), (144.8, 0.0051), (91.7, 0.29)}
    assert "fp32 student" in student.get_ylabel()
    assert "fp32 teacher" in teacher.get_ylabel()
    (arrow,) = (text for text in step.texts if isinstance(text, Annotation))
    assert (arrow.xy, arrow.xyann) == ((0.5, 0.2), (0.5, 0))
    assert "0.2" in step.get_xlabel()
    assert teacher.get_ylim() == step.get_ylim() == student.get_ylim()


@pytest.mark.parametrize(
    ("rows", "step", "panels"),
    [
        (SCHEMES, None, 2),
        ([*SCHEMES, PEERS[0]], STEP, 3),
        ([*SCHEMES, *PEERS], STEP, 4),
        (SCHEMES[:1], None, 2),
    ],
)
def test_panels_without_anything_in_them_are_left_out(rows: Any, step: Any, panels: int) -> None:
    report = {"rows": rows, "student_from_teacher": step}
    assert len(picture.figure(report).axes) == panels
    assert picture.draw(report).startswith(b"\x89PNG")


@pytest.mark.parametrize("seed", [0, 2, 5])
def test_no_name_covers_another_or_a_point(seed: int) -> None:
    """Also where many schemes are as good as one another; by what the renderer draws."""
    rng = np.random.default_rng(seed)
    count = 4 + 3 * seed
    rows = [row("fp32", "scheme", 544.9, None)]
    rows += [
        row(f"scheme-{k}", "scheme", 90 + 60 * rng.random(), 0.003 * (1 + rng.random() / (1 + seed)))
        for k in range(count)
    ]
    rows += [row(f"twin-{k}", "scheme", 145.5, 0.003) for k in range(3)]
    rows += [PEERS[0], *(row(f"gguf-{k}", "gguf", 140 + rng.random(), 0.005) for k in range(4))]
    figure = picture.figure({"rows": rows, "student_from_teacher": STEP})
    renderer = figure.canvas.get_renderer()
    figure.canvas.draw()  # what savefig does, too: it must not move what was placed
    for axes in (figure.axes[0], figure.axes[2]):
        names = [text for text in axes.texts if text.get_text()]
        boxes = [Text.get_window_extent(text, renderer) for text in names]
        points = [axes.transData.transform(point) for point in points_of(axes)]
        dots = [Bbox.from_bounds(x - 4, y - 4, 8, 8) for x, y in points]
        held = len([r for r in rows if (r["kind"] == "scheme") == (axes is figure.axes[2])])
        assert len(names) == held
        for i, box in enumerate(boxes):
            covered = [names[k].get_text() for k in range(i) if box.overlaps(boxes[k])]
            assert not covered, (names[i].get_text(), covered)
            assert not any(box.overlaps(dot) for dot in dots), names[i].get_text()
        legend = axes.get_legend()
        if legend is not None:
            assert not any(box.overlaps(legend.get_window_extent(renderer)) for box in boxes)
        inside = axes.get_window_extent()
        assert all(inside.x0 <= box.x0 and box.x1 <= inside.x1 for box in boxes)
