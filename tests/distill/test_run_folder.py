"""Nothing is lost silently: unfinished runs, finished adapters and bundles, and text half sampled."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_adapter import make_adapter
from tiny_teacher import byte_tokenizer, make_teacher, write_corpus

from lawcat_edge import cli
from lawcat_edge.adapter import Adapter
from lawcat_edge.distill import sample
from lawcat_edge.distill.run import distill
from lawcat_edge.distill.run_folder import unfinished
from lawcat_edge.distill.sample import ensure_samples
from lawcat_edge.distill.settings import DistillSettings
from lawcat_edge.model import LawcatModel, load_student
from lawcat_edge.runtime.bundle.manifest import Bundle
from lawcat_edge.runtime.errors import LawcatError
from lawcat_edge.teacher import resolve

SMALL = DistillSettings(
    transfer_tokens=64 * 4, finetune_tokens=64 * 4, seq_len=64, finetune_seq_len=64, checkpoint_every=2
)
OWN = SMALL.with_changes({"task_mix": "teacher:1.0", "teacher_tokens": 3000})


class Killed(BaseException):
    pass


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    make_teacher(folder / "teacher")
    write_corpus(folder / "text.txt")
    return folder


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample, "KEEP_SECONDS", 0.0)


def run(base: Path, out: Path, settings: DistillSettings, **options: Any) -> Adapter:
    data = [base / "text.txt"] if settings is not OWN else []
    return distill(resolve(base / "teacher"), data, out, settings, **options)


def killed_at(stage: str, step: int) -> Any:
    def report(record: dict[str, Any]) -> None:
        if (record["stage"], record["step"]) == (stage, step):
            raise Killed

    return report


def test_an_unfinished_run_is_not_lost_unasked(base: Path, tmp_path: Path) -> None:
    out, folder = tmp_path / "a", tmp_path / "a.run"
    with pytest.raises(Killed):
        run(base, out, SMALL, report=killed_at("transfer", 3))
    assert unfinished(folder) == "a checkpoint"
    before = (folder / "checkpoint" / "state.json").read_bytes()
    with pytest.raises(LawcatError, match=r"unfinished run \(a checkpoint\); go on with --resume.*--fresh"):
        run(base, out, SMALL)
    with pytest.raises(LawcatError, match="give one of them"):
        run(base, out, SMALL, resume=True, fresh=True)
    assert (folder / "checkpoint" / "state.json").read_bytes() == before
    steps: list[int] = []
    run(base, out, SMALL, fresh=True, report=lambda record: steps.append(record["step"]))
    assert steps == [1, 2, 3, 4] * 2
    assert unfinished(folder) is None  # its adapter is there: the next run may take its place
    run(base, out, SMALL.with_changes({"seed": 1}))


def test_what_is_lost_with_a_run_is_kept_however_it_ends(base: Path, tmp_path: Path) -> None:
    with pytest.raises(LawcatError, match="no checkpoint to resume"):
        run(base, tmp_path / "a", SMALL, resume=True)
    with pytest.raises(Killed):
        run(base, tmp_path / "a", SMALL, report=killed_at("transfer", 1))
    assert not (tmp_path / "a.run").exists()  # before the first checkpoint there is nothing to keep


def test_a_run_killed_while_sampling_goes_on(base: Path, tmp_path: Path) -> None:
    whole, out = run(base, tmp_path / "whole", OWN), tmp_path / "cut"
    with pytest.raises(Killed):
        run(base, out, OWN, report=killed_at("sample", 1))
    assert unfinished(tmp_path / "cut.run") == "text sampled from the teacher"
    with pytest.raises(LawcatError, match=r"text sampled from the teacher\); go on with --resume"):
        run(base, out, OWN)
    with pytest.raises(LawcatError, match="another 'teacher_tokens'"):
        run(base, out, OWN.with_changes({"teacher_tokens": 5000}), resume=True)
    first: list[dict[str, Any]] = []
    resumed = run(base, out, OWN, resume=True, report=first.append)
    assert first[0]["stage"] == "sample"
    assert first[0]["tokens"] > 3 * 256  # not from the start
    samples = [np.load(tmp_path / f"{name}.run" / "teacher_samples.npy") for name in ("whole", "cut")]
    assert samples[0].shape == samples[1].shape == (3, 1024)
    assert not (tmp_path / "cut.run" / "teacher_samples.npy.partial").exists()
    assert set(resumed.tensors) == set(whole.tensors)


@pytest.fixture
def exact(base: Path) -> LawcatModel:
    """In float64, where reading tokens at once and one by one round alike."""
    return load_student(resolve(base / "teacher")).double()


def test_sampling_goes_on_with_the_tokens_it_would_have_had(
    exact: LawcatModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample, "LENGTH", 256)
    monkeypatch.setattr(sample, "PREFILL", 100)  # in several pieces
    tokenizer, count = byte_tokenizer(), 3

    def make(path: Path, stop: int | None = None) -> np.ndarray:
        seen: list[int] = []

        def report(record: dict[str, Any]) -> None:
            seen.append(record["tokens"])
            if len(seen) == stop:
                raise Killed

        ensure_samples(exact, tokenizer, path, count * 256, 5, report)
        return np.asarray(np.load(path))

    whole = make(tmp_path / "whole.npy")
    path = tmp_path / "cut.npy"
    for stop in (1, 2):
        with pytest.raises(Killed):
            make(path, stop)
        kept = load_file(tmp_path / "cut.npy.partial")
        assert np.array_equal(kept["tokens"], whole[:, : kept["tokens"].shape[1]])
    assert np.array_equal(make(path), whole)


def test_a_partial_of_another_plan_or_a_damaged_one_is_not_used(
    exact: LawcatModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample, "LENGTH", 256)
    path, partial = tmp_path / "s.npy", tmp_path / "s.npy.partial"

    def kill(record: dict[str, Any]) -> None:
        raise Killed

    for damage in ("seed", "bytes", "shape", "token", "state"):
        with pytest.raises(Killed):
            ensure_samples(exact, byte_tokenizer(), path, 256, 1, kill)
        kept = load_file(partial)
        with safe_open(partial, "pt") as file:
            identity = file.metadata()
        if damage == "bytes":
            partial.write_bytes(partial.read_bytes()[:-7])
        changed = {"shape": ("rows", torch.zeros(3)), "token": ("tokens", kept["tokens"] + 257)}
        changed["state"] = ("state", torch.zeros(3, dtype=torch.uint8))
        if damage in changed:
            name, value = changed[damage]
            save_file({**kept, name: value}, partial, identity)
        assert first_report(exact, path, 2 if damage == "seed" else 1) == 64, damage  # from the start
        path.unlink()
    with pytest.raises(Killed):  # and one that is as it was is used
        ensure_samples(exact, byte_tokenizer(), path, 256, 1, kill)
    assert first_report(exact, path, 1) == 128


def first_report(model: LawcatModel, path: Path, seed: int) -> int:
    """Tokens that there were at the first report of sampling."""
    counts: list[int] = []
    ensure_samples(model, byte_tokenizer(), path, 256, seed, lambda record: counts.append(record["tokens"]))
    return counts[0]


def test_a_finished_adapter_and_a_bundle_are_replaced_when_asked(
    base: Path, tmp_path: Path, capsys: Any
) -> None:
    teacher = resolve(base / "teacher")
    out, bundle = tmp_path / "adapter", tmp_path / "bundle"
    make_adapter().save(out)
    held = Adapter.load(out).sha256
    train = ["distill", str(teacher.folder), "--data", str(base / "text.txt"), "--out", str(out)]
    assert cli.run([*train, "--tokens", "64", "--seq-len", "64"]) == 2
    assert "replace it with --overwrite, or give another --out" in capsys.readouterr().err
    assert Adapter.load(out).sha256 == held
    assert cli.run([*train, "--tokens", "64", "--seq-len", "64", "--overwrite"]) == 0
    assert Adapter.load(out).sha256 != held

    plain = ["export", str(teacher.folder), "--out", str(bundle), "--scheme", "fp32", "--no-verify"]
    assert cli.run(plain) == 0
    assert cli.run(plain) == 0  # the same once more
    before = (bundle / "lawcat_bundle.json").read_bytes()
    for more, what in (
        (["--adapter", str(out)], "adapter"),
        (["--scheme", "int8"], "scheme"),
        (["--ops", "ort,portable"], "operators"),
    ):
        capsys.readouterr()
        assert cli.run([*plain, *more]) == 2
        assert f"a bundle of another {what}; replace it with --overwrite" in capsys.readouterr().err
        assert (bundle / "lawcat_bundle.json").read_bytes() == before
    shutil.copytree(bundle, tmp_path / "broken")
    (tmp_path / "broken" / "lawcat_bundle.json").write_text("{}")
    assert cli.run([*plain, "--out", str(tmp_path / "broken")]) == 2
    assert "a bundle that cannot be read; replace it with --overwrite" in capsys.readouterr().err
    assert cli.run([*plain, "--adapter", str(out), "--overwrite"]) == 0
    assert Bundle.open(bundle).manifest.source["adapter_sha256"] == Adapter.load(out).sha256


@pytest.mark.parametrize(
    ("words", "goes_on"),
    [
        (["export", "my teacher", "--out", "b"], "lawcat-edge export 'my teacher' --out b"),
        (["distill", "t", "--out", "none", "--fresh"], "lawcat-edge distill t --out none"),
        (["distill", "t", "--out", "a", "--fresh"], "lawcat-edge distill t --out a --resume"),
        (
            ["compare", "t", "--text", "x", "--out", "o", "--no-resume"],
            "lawcat-edge compare t --text x --out o",
        ),
        (["info", "b"], None),
    ],
)
def test_interrupted_names_the_command_that_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, words: list[str], goes_on: str | None
) -> None:
    def interrupt(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.run" / "checkpoint").mkdir(parents=True)
    (tmp_path / "a.run" / "checkpoint" / "state.json").write_text(json.dumps({}))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "lawcat_bundle.json").write_text("{}")
    monkeypatch.setattr("lawcat_edge.teacher.resolve", interrupt)
    monkeypatch.setattr("lawcat_edge.distill.settings.DistillSettings.__init__", interrupt)
    monkeypatch.setattr("lawcat_edge.calibration.comparison.compare.Comparison.__init__", interrupt)
    monkeypatch.setattr("lawcat_edge.commands.info._bundle", interrupt)
    assert cli.run(words) == 130
    said = "Interrupted; nothing half-written was left in place."
    assert capsys.readouterr().err.splitlines()[-1] == said + (f" To go on: {goes_on}" if goes_on else "")
