"""How far a bundle is from its teacher on the short text: the export notes it, info says it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import tokenizers
from tiny_bundle import build_tiny_bundle, rewrite_manifest
from tiny_teacher import make_teacher

from lawcat_edge.cli import run
from lawcat_edge.evaluate import short_text
from lawcat_edge.evaluate.lm import BundleModel
from lawcat_edge.evaluate.torch_lm import TeacherModel
from lawcat_edge.runtime.bundle.manifest import Bundle
from lawcat_edge.runtime.errors import LawcatError
from lawcat_edge.teacher import resolve


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_teacher(tmp_path_factory.mktemp("teacher") / "t")


def test_the_loss_on_the_short_text_is_transformers(teacher_folder: Path) -> None:
    """Of the teacher read in pieces, against the loss that the real package computes of the whole."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    count, mean = short_text.loss(TeacherModel.load(resolve(teacher_folder), device="cpu"))
    model = transformers.AutoModelForCausalLM.from_pretrained(teacher_folder)
    ids = tokenizers.Tokenizer.from_file(str(teacher_folder / "tokenizer.json")).encode(short_text.TEXT).ids
    tokens = torch.tensor(ids[: short_text.MOST_TOKENS + 1])[None]
    with torch.no_grad():
        expected = model(tokens, labels=tokens).loss.item()
    assert count == short_text.MOST_TOKENS
    assert mean == pytest.approx(expected, rel=1e-4)


def test_export_and_info_say_how_far_a_bundle_is_from_its_teacher(
    teacher_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "bundle"
    assert run(["export", str(teacher_folder), "--scheme", "fp32", "--out", str(out), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    measured = report["short_text"]
    assert measured == Bundle.open(out).manifest.source["short_text"]
    assert measured["tokens"] == short_text.MOST_TOKENS
    assert measured["loss"] == pytest.approx(short_text.loss(BundleModel(out))[1])
    assert measured["teacher_loss"] == pytest.approx(
        short_text.loss(TeacherModel.load(resolve(teacher_folder), device="cpu"))[1]
    )
    monkeypatch.setattr(short_text, "FAR", math.exp(measured["loss"] - measured["teacher_loss"]) * 0.99)
    assert run(["info", str(out)]) == 0
    said = capsys.readouterr().out
    assert short_text.describe(measured) in said
    assert "it will not write as its teacher does" in said.split("WARNING")[1]
    monkeypatch.setattr(short_text, "FAR", math.exp(measured["loss"] - measured["teacher_loss"]) * 1.01)
    assert run(["info", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["warning"] is None


def test_the_words_of_the_short_text() -> None:
    near = {"tokens": 451, "loss": math.log(30.0), "teacher_loss": math.log(20.0)}
    assert short_text.warning(near) is None
    assert short_text.warning(None) is None
    assert short_text.describe(near) == (
        "perplexity 30 on 451 tokens of a short text, 1.5 times its teacher's 20"
    )
    far = {**near, "loss": math.log(42.0)}
    assert "2.1 times its teacher's 20: it will not write" in (short_text.warning(far) or "")
    assert "times its teacher's" in short_text.describe({**near, "loss": 1e5})  # beyond what exp can hold


def test_a_bundle_of_an_earlier_version_has_no_such_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = build_tiny_bundle(tmp_path / "b")
    assert run(["info", str(bundle)]) == 0
    said = capsys.readouterr().out
    assert "short text" not in said
    assert "WARNING" not in said
    rewrite_manifest(bundle, lambda data: data["source"].update(trained_tokens=1234))
    assert run(["info", str(bundle)]) == 0
    assert "trained on 1,234 tokens only" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change",
    [
        {"trained_tokens": -1},
        {"trained_tokens": "many"},
        {"short_text": [1]},
        {"short_text": {"tokens": 1}},
        {"short_text": {"tokens": 0, "loss": 1.0, "teacher_loss": 1.0}},
        {"short_text": {"tokens": 1, "loss": "1", "teacher_loss": 1.0}},
        {"short_text": {"tokens": 1, "loss": 1.0, "teacher_loss": 1e300}},
    ],
)
def test_what_a_manifest_notes_of_it_is_checked(tmp_path: Path, change: dict[str, object]) -> None:
    bundle = build_tiny_bundle(tmp_path / "b")
    rewrite_manifest(bundle, lambda data: data["source"].update(change))
    with pytest.raises(LawcatError, match=r"source\.(trained_tokens|short_text)"):
        Bundle.open(bundle)
