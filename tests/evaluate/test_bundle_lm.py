"""A bundle in onnxruntime is measured like the student it was exported from."""

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluation_toys import prose, save_teacher
from tiny_bundle import V, build_tiny_bundle

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from lawcat_edge.adapter import Adapter  # noqa: E402
from lawcat_edge.commands.eval import eval as eval_command  # noqa: E402
from lawcat_edge.commands.eval import open_model  # noqa: E402
from lawcat_edge.config import LawcatConfig  # noqa: E402
from lawcat_edge.evaluate.lm import BundleModel, greedy, step_by_step  # noqa: E402
from lawcat_edge.evaluate.run import run_task  # noqa: E402
from lawcat_edge.evaluate.torch_lm import StudentModel  # noqa: E402
from lawcat_edge.export.exporter import ExportOptions, export_bundle  # noqa: E402
from lawcat_edge.export.schemes import SCHEMES  # noqa: E402
from lawcat_edge.model import load_student  # noqa: E402
from lawcat_edge.runtime.engine.session import Engine  # noqa: E402
from lawcat_edge.runtime.engine.state import State  # noqa: E402
from lawcat_edge.runtime.errors import LawcatError  # noqa: E402
from lawcat_edge.student import Student  # noqa: E402
from lawcat_edge.teacher import resolve  # noqa: E402


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A toy teacher, a random adapter of it, and the fp32 bundle of both."""
    root = tmp_path_factory.mktemp("bundle")
    places = {
        "teacher": save_teacher(root / "teacher"),
        "adapter": root / "adapter",
        "bundle": root / "bundle",
    }
    teacher = resolve(places["teacher"])
    model = load_student(teacher, config=LawcatConfig(feature_dim=4, gate_rank=2))
    tensors = {name: value.detach().numpy() for name, value in model.adapter_parameters().items()}
    Adapter(model.config, teacher.geometry, str(places["teacher"]), teacher.sha256, tensors).save(
        places["adapter"]
    )
    adapter = Adapter.load(places["adapter"])
    options = ExportOptions(scheme=SCHEMES["fp32"])
    export_bundle(Student.of(teacher, adapter), places["bundle"], options)
    return places


def both(places: dict[str, Path]) -> tuple[BundleModel, StudentModel]:
    teacher = resolve(places["teacher"])
    student = StudentModel.load(teacher, Adapter.load(places["adapter"]), device="cpu")
    return BundleModel(places["bundle"]), student


def test_bundle_and_student_say_the_same(places: dict[str, Path]) -> None:
    bundle, student = both(places)
    ids = np.random.default_rng(0).integers(0, 250, size=(3, 300))
    assert greedy(bundle, ids, 16) == greedy(student, ids, 16)
    exported = np.concatenate([chunk.copy() for chunk in bundle.logits(ids, 128)], axis=1)
    expected = torch.cat(list(student.logits(ids, 128)), dim=1).numpy()
    np.testing.assert_allclose(exported, expected, rtol=1e-3, atol=1e-3)


def answers(write: Any, ids: np.ndarray, lengths: list[int]) -> list[list[int]]:
    """Tokens of each row, which is closed once it has so many."""
    rows: list[list[int]] = [[] for _ in ids]
    open_rows = set(range(len(rows)))
    for row, token in write(ids, 12, open_rows):
        rows[row].append(token)
        if len(rows[row]) == lengths[row]:
            open_rows.discard(row)
    return rows


@pytest.mark.parametrize("shape", [{}, {"window": 8, "rope": True}, {"span": 48}, {"span": 32, "sinks": 4}])
def test_the_core_answers_as_single_steps_do(tmp_path: Path, shape: dict[str, Any]) -> None:
    model = BundleModel(build_tiny_bundle(tmp_path / "bundle", **shape), threads=1)
    for seed in range(4):
        rng = np.random.default_rng(seed)
        ids = rng.integers(0, V, size=(5, int(rng.integers(1, 400))))
        lengths = [1, 12, 40, *rng.integers(1, 13, size=2).tolist()]
        expected = answers(functools.partial(step_by_step, model), ids, lengths)
        assert answers(model.write, ids, lengths) == expected
        assert [len(row) for row in expected] == [min(length, 12) for length in lengths]


def test_a_bundle_answers_through_the_core(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = BundleModel(build_tiny_bundle(tmp_path / "bundle"), threads=1)
    forward, batches = Engine.forward, []

    def counted(self: Engine, ids: np.ndarray, state: State, all_positions: bool = False) -> np.ndarray:
        batches.append(ids.shape)
        return forward(self, ids, state, all_positions)

    monkeypatch.setattr(Engine, "forward", counted)
    ids = np.random.default_rng(0).integers(0, V, size=(3, 10))
    texts = greedy(model, ids, 6, lambda row, text: row == 0)
    assert len(texts) == 3
    # Each prompt by itself; then the first row's answer is settled and takes no more steps.
    assert batches == [(1, 10)] * 3 + [(2, 1)] * 5

    def failing(*_: Any) -> np.ndarray:
        raise LawcatError("out of luck")

    monkeypatch.setattr(Engine, "forward", failing)
    with pytest.raises(LawcatError, match="out of luck"):
        greedy(model, ids, 6)


def test_reports_agree(places: dict[str, Path]) -> None:
    bundle, student = (run_task(model, "passkey", [400], 4, seed=2) for model in both(places))
    assert [sample.output for sample in bundle.samples] == [sample.output for sample in student.samples]
    assert (bundle.kind, student.kind) == ("bundle", "student")


def test_command_measures_a_bundle(
    places: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "t.txt"
    text.write_text(prose(300), encoding="utf-8")
    measured = []
    for name in ("bundle", "adapter"):
        eval_command(
            str(places[name]),
            "perplexity",
            "600",
            2,
            text=[str(text)],
            reference=str(places["teacher"]),
            json_=True,
        )
        measured.append(json.loads(capsys.readouterr().out))
    assert [report["kind"] for report in measured] == ["bundle", "student"]
    assert measured[0]["overall"]["perplexity"] == pytest.approx(
        measured[1]["overall"]["perplexity"], rel=1e-4
    )
    assert measured[0]["overall"]["kl"] == pytest.approx(measured[1]["overall"]["kl"], rel=1e-3)
    assert measured[0]["overall"]["kl"] > 0
    with pytest.raises(LawcatError, match="leave --adapter out"):
        open_model(str(places["bundle"]), str(places["adapter"]))
