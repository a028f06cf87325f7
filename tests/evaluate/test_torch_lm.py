"""Teacher and student in torch: chunks and batches do not change what they say; the command line."""

import json
from pathlib import Path

import numpy as np
import pytest
from evaluation_toys import prose, save_teacher

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from lawcat_edge.commands.eval import eval as eval_command  # noqa: E402
from lawcat_edge.commands.eval import open_model, parse_depths, parse_lengths  # noqa: E402
from lawcat_edge.evaluate.lm import greedy  # noqa: E402
from lawcat_edge.evaluate.perplexity import sequence_losses  # noqa: E402
from lawcat_edge.evaluate.run import run_task  # noqa: E402
from lawcat_edge.evaluate.torch_lm import StudentModel, TeacherModel, choose_device  # noqa: E402
from lawcat_edge.runtime.errors import LawcatError  # noqa: E402
from lawcat_edge.teacher import resolve  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama with the toy tokenizer, saved as a teacher."""
    return save_teacher(tmp_path_factory.mktemp("teacher"))


def models(folder: Path, chunk_tokens: int) -> list[StudentModel | TeacherModel]:
    teacher = resolve(folder)
    return [
        TeacherModel.load(teacher, device="cpu", chunk_tokens=chunk_tokens),
        StudentModel.load(teacher, None, device="cpu", chunk_tokens=chunk_tokens),
    ]


def test_chunks_do_not_change_what_is_read(folder: Path) -> None:
    ids = np.random.default_rng(0).integers(0, 250, size=(2, 333))
    for coarse, fine in zip(models(folder, 100_000), models(folder, 1), strict=True):
        assert fine._chunk(2) == 64
        whole, state = coarse.prefill(ids)
        pieces, state_fine = fine.prefill(ids)
        torch.testing.assert_close(pieces, whole, rtol=1e-4, atol=1e-4)
        after, _ = coarse.step(np.array([3, 4]), state)
        after_fine, _ = fine.step(np.array([3, 4]), state_fine)
        torch.testing.assert_close(after_fine, after, rtol=1e-4, atol=1e-4)
        longer, _ = coarse.prefill(np.concatenate([ids, [[3], [4]]], axis=1))
        torch.testing.assert_close(after, longer, rtol=1e-4, atol=1e-4)
        every = torch.cat(list(coarse.logits(ids, 50)), dim=1)
        assert every.shape[:2] == (2, 333)
        torch.testing.assert_close(every[:, -1], whole, rtol=1e-4, atol=1e-4)
        with pytest.raises(LawcatError, match="no tokens"):
            coarse.prefill(np.zeros((1, 0), np.int64))


def test_teacher_is_the_transformers_model(folder: Path) -> None:
    ids = np.random.default_rng(1).integers(0, 250, size=(1, 90))
    model = models(folder, 1)[0]
    plain = transformers.LlamaForCausalLM.from_pretrained(folder)(torch.from_numpy(ids)).logits
    torch.testing.assert_close(torch.cat(list(model.logits(ids, 32)), dim=1), plain, rtol=1e-4, atol=1e-4)


def test_batching_does_not_change_the_answers(folder: Path) -> None:
    ids = np.random.default_rng(0).integers(0, 250, size=(4, 60))
    for model in models(folder, 4096):
        together = greedy(model, ids, 12)
        alone = [greedy(model, row[None], 12)[0] for row in ids]
        assert together == alone
        assert len(set(together)) > 1


def test_kl_between_torch_models_is_the_numpy_one(folder: Path) -> None:
    teacher, student = models(folder, 4096)
    row = np.random.default_rng(0).integers(0, 250, size=80).astype(np.int32)
    nll, kl, _ = sequence_losses(student, teacher, row, 16)
    assert (kl > -1e-6).all()
    assert kl.mean() > 0.01
    q = torch.cat(list(student.logits(row[None, :-1], 100)), 1)[0].detach().numpy().astype(np.float64)
    p = torch.cat(list(teacher.logits(row[None, :-1], 100)), 1)[0].detach().numpy().astype(np.float64)
    q -= np.log(np.exp(q).sum(-1, keepdims=True))
    p -= np.log(np.exp(p).sum(-1, keepdims=True))
    np.testing.assert_allclose(kl, (np.exp(p) * (p - q)).sum(-1), atol=2e-5)
    np.testing.assert_allclose(nll, -q[np.arange(79), row[1:]], atol=2e-5)


def test_teacher_batch_is_bounded_by_its_cache(folder: Path) -> None:
    teacher, student = models(folder, 4096)
    assert teacher.max_batch(100) == student.max_batch(100) == 8
    assert teacher.max_batch(32_768) == 1
    assert student.max_batch(65_536) == 8
    with pytest.raises(LawcatError, match="cannot use the device"):
        choose_device("cuda:99")


def test_run_task_on_a_student(folder: Path) -> None:
    report = run_task(models(folder, 4096)[1], "passkey", [400], samples=3, seed=1)
    assert report.kind == "student"
    assert report.cells[0].n == 3
    assert {sample.tokens for sample in report.samples} == {400}


def test_command_prints_one_json_document(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, picture = tmp_path / "r.json", tmp_path / "r.png"
    common = {"device": "cpu", "json_": True, "out": out}
    eval_command(str(folder), "passkey", "400", 2, depths="0,100", heatmap=picture, **common)  # type: ignore[arg-type]
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    assert [cell["depth"] for cell in document["cells"]] == [0.0, 1.0]
    assert document == json.loads(out.read_text())
    assert picture.is_file()
    assert "passkey 400" in captured.err
    text = tmp_path / "t.txt"
    text.write_text(prose(300), encoding="utf-8")
    eval_command(
        str(folder),
        "perplexity",
        "1K",
        1,
        text=[str(text)],
        reference=str(folder),
        **common,  # type: ignore[arg-type]
    )
    assert json.loads(capsys.readouterr().out)["overall"]["kl"] == pytest.approx(0, abs=1e-6)
    eval_command(str(folder), "niah-2", "1K", 1, text=[str(text)], device="cpu")
    shown = capsys.readouterr().out
    assert "niah-2" in shown
    assert "95 % interval" in shown
    eval_command(str(folder), "perplexity", "256", 1, text=[str(text)], device="cpu")
    assert "perplexity of" in capsys.readouterr().out


def test_command_refuses_bad_requests(folder: Path) -> None:
    name = str(folder)
    with pytest.raises(LawcatError, match="Unknown task"):
        eval_command(name, "poetry")
    with pytest.raises(LawcatError, match="needs text"):
        eval_command(name, "perplexity")
    with pytest.raises(LawcatError, match="one length"):
        eval_command(name, "perplexity", "1K,2K", text=["x"])
    with pytest.raises(LawcatError, match="--lengths has"):
        parse_lengths("1K,x")
    with pytest.raises(LawcatError, match="--depths has"):
        parse_depths("0,101")
    assert parse_lengths("256, 1K,32k") == [256, 1024, 32_768]
    assert parse_depths("0,50") == [0.0, 0.5]
    assert parse_depths(None) is None


def test_open_model_tells_the_kinds_apart(folder: Path, tmp_path: Path) -> None:
    assert open_model(str(folder), device="cpu").kind == "teacher"
    (tmp_path / "lawcat_bundle.json").write_text("{}")
    with pytest.raises(LawcatError, match="leave --adapter out"):
        open_model(str(tmp_path), adapter="x")
    with pytest.raises(LawcatError, match="window, span and sinks are fixed"):
        open_model(str(tmp_path), window=8)
    with pytest.raises(LawcatError, match="give one with --adapter"):
        open_model(str(folder), device="cpu", window=8)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "lawcat_config.json").write_text("{}")
    with pytest.raises(LawcatError, match="is an adapter itself"):
        open_model(str(tmp_path / "adapter"), adapter="x")
