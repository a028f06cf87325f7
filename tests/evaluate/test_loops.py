"""What benchmarks/sampling.py calls a loop, and that the published adapter's sampling has none."""

from __future__ import annotations

import importlib.util
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from lawcat_edge.adapter import GENERAL, Adapter
from lawcat_edge.runtime import Model

_spec = importlib.util.spec_from_file_location(
    "sampling", Path(__file__).parents[2] / "benchmarks" / "sampling.py"
)
assert _spec is not None
assert _spec.loader is not None
sampling = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(sampling)

SENTENCE = "Avoid drinking alcohol before you go to bed."


def test_loops_are_found_and_ordinary_text_has_none() -> None:
    assert sampling.loops("Sleep well. " + f"{SENTENCE} " * 3)
    assert sampling.loops("\n".join(f"{n}. {SENTENCE}" for n in ("One", "Two", "Three")))
    assert not sampling.loops(f"{SENTENCE} {SENTENCE}")
    assert not sampling.loops(Path(__file__).read_text())
    assert sampling.loops("", [5, 1, 2, 3] * 6)
    assert sampling.loops("", [7] * 24)
    assert not sampling.loops("", [5, 1, 2, 3] * 5)
    assert not sampling.loops("", list(range(100)))


@pytest.mark.slow
def test_the_published_adapters_sampling_keeps_it_from_looping(
    demo: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Questions that greedy decoding answers with a loop within 200 tokens."""
    questions = (
        "red wine",
        "sleeping better",
        "inflation",
        "yellow leaves",
        "poem",
        "interview",
        "refrigerator",
    )
    asked = [q for q in sampling.QUESTIONS if any(words in q for words in questions)]
    monkeypatch.setattr(sampling, "QUESTIONS", asked)
    model = Model.load(demo[0] / "bundle")
    own = {name: value for name, value in asdict(model.sampling_defaults()).items() if name != "seed"}
    assert {name: own[name] for name in ("temperature", "min_p", "repetition_penalty")} == {
        name: Adapter.load(GENERAL).generation[name]
        for name in ("temperature", "min_p", "repetition_penalty")
    }
    greedy = {"temperature": 0.0, "repetition_penalty": 1.0}
    assert sampling.measure(model, greedy, 1, 200, 7, False)["loops"] >= 3
    assert sampling.measure(model, own, 1, 200, 7, False)["loops"] == 0
