"""What distill says before it begins, and what an adapter that was hardly trained says of itself."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_adapter import make_adapter

from lawcat_edge.adapter import GENERAL, Adapter
from lawcat_edge.cli import run
from lawcat_edge.commands.distill import plan
from lawcat_edge.commands.progress import Reporter, TrainingProgress, duration
from lawcat_edge.distill.settings import DistillSettings


def test_the_plan_names_tokens_and_says_when_they_are_too_few() -> None:
    few = DistillSettings().with_changes({"transfer_tokens": 20_000, "finetune_tokens": 10_000})
    text = plan(few, None, "0" * 64)
    assert "30,000 tokens (transfer 20,000, finetune 10,000)" in text
    assert "too little" in text
    assert "--start-from" not in text
    published = Adapter.load(GENERAL)
    assert f"--start-from {GENERAL}" in plan(few, None, published.teacher_sha256)
    assert "--start-from" not in plan(few, published, published.teacher_sha256)
    many = few.with_changes({"transfer_tokens": 4_000_000, "stage": "transfer"})
    assert "too little" not in plan(many, None, "0" * 64)
    assert "4,000,000 tokens (transfer 4,000,000)" in plan(many, None, "0" * 64)


def test_the_time_comes_from_the_first_steps(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([100.0, 102.0, 104.0, 106.0])
    monkeypatch.setattr("lawcat_edge.commands.progress.time.monotonic", lambda: next(clock))
    progress = TrainingProgress(Reporter(None, lines=False))
    for step in range(1, 5):
        progress({"stage": "transfer", "step": step, "steps": 403, "tokens": step * 512})
    assert capsys.readouterr().err.count("about 13 min at this speed") == 1
    assert (duration(40), duration(7200)) == ("40 s", "2.0 h")


def test_an_adapter_trained_on_next_to_nothing_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stages = {"transfer": {"tokens": 30_000}, "finetune": {"tokens": 12_000}}
    replace(make_adapter(), training={"stages": stages}).save(tmp_path / "few")
    assert run(["info", str(tmp_path / "few")]) == 0
    assert "WARNING   trained on 42,000 tokens only" in capsys.readouterr().out
    stages["finetune"]["tokens"] = 5_000_000
    replace(make_adapter(), training={"stages": stages}).save(tmp_path / "many")
    assert run(["info", str(tmp_path / "many"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["warning"] is None
    assert Adapter.load(GENERAL).warning() is None
