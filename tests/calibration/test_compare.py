"""lawcat-edge compare on a small random teacher: rows, resuming, failing schemes, what the numbers say."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from exported import make_student
from tiny_teacher import make_teacher, write_corpus

from lawcat_edge import cli
from lawcat_edge.adapter import Adapter
from lawcat_edge.calibration.comparison import bundles, measure
from lawcat_edge.calibration.comparison import compare as comparing
from lawcat_edge.calibration.comparison.report import pareto, ppl_change
from lawcat_edge.calibration.comparison.rows import Row
from lawcat_edge.calibration.comparison.settings import Settings
from lawcat_edge.calibration.texts import spread
from lawcat_edge.evaluate.lm import load_tokenizer
from lawcat_edge.runtime.bundle.manifest import Bundle
from lawcat_edge.runtime.errors import LawcatError
from lawcat_edge.runtime.files import read_json
from lawcat_edge.student import Student

SMALL = ["--length", "96", "--samples", "2", "--drift-length", "256", "--task-lengths", "600"]
SMALL += ["--task-samples", "2", "--context", "32", "--decode-tokens", "4", "--threads", "1"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A teacher with an adapter, and one comparison of it by the command line."""
    folder = tmp_path_factory.mktemp("compare")
    teacher, _, student = make_student(folder / "teacher")
    adapter = Adapter(student.config, teacher.geometry, "tiny", teacher.sha256, student.tensors)
    adapter.save(folder / "adapter")
    text = write_corpus(folder / "text.txt")
    arguments = [
        "compare",
        str(teacher.folder),
        "--adapter",
        str(folder / "adapter"),
        "--text",
        str(text),
        *SMALL,
        "--calibration",
        str(text),
    ]
    made = SimpleNamespace(folder=folder, teacher=teacher, text=text, arguments=arguments, out=folder / "out")
    made.code = cli.run([*arguments, "--out", str(made.out), "--schemes", "fp32,int8,int4,int3,int8-static"])
    made.report = read_json(made.out / "report.json")
    made.rows = {row["name"]: row for row in made.report["rows"]}
    return made


def settings() -> Settings:
    return Settings(96, 2, 256, 2, (600,), 2, 32, 4, 1)


def run(made: SimpleNamespace, out: Path, names: list[str], **options: Any) -> dict[str, Any]:
    adapter = Adapter.load(made.folder / "adapter")
    options = {"calibration": [str(made.text)], **options}
    student = Student.of(made.teacher, adapter)
    job = comparing.Comparison.of(student, [made.text], out, settings(), **options)
    return comparing.compare(job, names, with_peers=False)


def test_every_row_is_there_with_every_part(made: SimpleNamespace) -> None:
    assert list(made.rows) == [
        "fp32",
        "int8",
        "int4",
        "int3",
        "int8-static",
        "teacher-fp32",
        "gguf-q8_0",
        "gguf-q4_0",
    ]
    for name in ("fp32", "int8", "int4", "int8-static", "teacher-fp32"):
        row = made.rows[name]
        assert not row["errors"], name
        assert row["accuracy"]["tokens"] == 2 * 95
        assert row["tasks"]["passkey"]["asked"] == row["tasks"]["niah-1"]["asked"] == 2
        assert row["speed"]["prefill_tokens_per_second"] > 0
        assert row["speed"]["decode_tokens_per_second"] > 0
        assert row["speed"]["peak_memory_bytes"] > 1 << 20
        buckets = row["drift"]["buckets"]
        assert len(buckets) == 8
        assert (buckets[0]["begin"], buckets[-1]["end"]) == (1, 257)


def test_sizes_are_those_on_disk(made: SimpleNamespace) -> None:
    for name in ("fp32", "int8", "int4"):
        folder = made.out / "bundles" / name
        assert made.rows[name]["export"]["bytes"] == sum(
            file.stat().st_size for file in folder.iterdir() if file.name != "lawcat_bundle.json"
        )
        assert made.rows[name]["export"]["weight_bytes"] == (folder / "model.onnx.data").stat().st_size
    assert made.rows["int4"]["export"]["weight_bytes"] < made.rows["fp32"]["export"]["weight_bytes"]


def test_fp32_is_its_own_reference_and_fewer_bits_cost_more(made: SimpleNamespace) -> None:
    assert made.rows["fp32"]["accuracy"]["kl"] is None
    eight, four = made.rows["int8"]["accuracy"], made.rows["int4"]["accuracy"]
    assert 0 < eight["kl"] < four["kl"]
    assert eight["kl"] <= eight["kl_p99"]
    assert four["top1"] <= 1
    # the student is far from its teacher, and the report says so apart from the schemes
    assert made.report["student_from_teacher"]["kl"] > four["kl"]


def test_an_unknown_scheme_has_its_sentence_and_the_exit_code_says_so(made: SimpleNamespace) -> None:
    assert made.code == 1
    assert made.rows["int3"]["errors"]["export"].startswith("There is no scheme 'int3'; choose one of")
    assert "accuracy" not in made.rows["int3"]
    assert "int3, export: There is no scheme" in (made.out / "report.md").read_text()


def test_a_missing_llama_cpp_or_gguf_is_a_row_that_says_so(made: SimpleNamespace) -> None:
    said = made.rows["gguf-q8_0"]["errors"]["export"]
    assert said.startswith(("llama-cpp-python is not installed", "The teacher is no GGUF file"))


def test_absent_peers_take_one_line_of_a_table(made: SimpleNamespace) -> None:
    text = (made.out / "report.md").read_text()
    both = [line for line in text.splitlines() if "gguf-q8_0" in line]
    assert [line.split(",")[1].split()[0] for line in both] == ["gguf-q4_0"] * 3  # two tables, what failed
    assert sum("is not installed" in line or "is no GGUF" in line for line in both) == 1
    assert len([line for line in text.splitlines() if "gguf-q4_0" in line]) == 3


def test_markdown_and_picture(made: SimpleNamespace) -> None:
    text = (made.out / "report.md").read_text()
    assert text.count("| int8 ") == 3  # quality, cost, drift
    assert "report.png" in text
    assert (made.out / "report.png").read_bytes().startswith(b"\x89PNG")


def test_resuming_measures_nothing_again(
    made: SimpleNamespace, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("measured again")

    for name in ("accuracy", "drift", "tasks", "bundle_speed"):
        monkeypatch.setattr(measure, name, never)
    monkeypatch.setattr(bundles, "export_bundle", never)
    code = cli.run([*made.arguments, "--out", str(made.out), "--schemes", "int8", "--no-peers", "--json"])
    assert code == 0
    again = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in again["rows"]] == ["fp32", "int8"]
    assert again["rows"][1]["accuracy"] == made.rows["int8"]["accuracy"]


def test_a_run_killed_in_a_part_goes_on_after_it(
    made: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[str] = []

    def counting(name: str, stop: bool = False) -> None:
        real = getattr(measure, name)

        def call(*arguments: Any) -> Any:
            counted.append(name)
            if stop:
                raise KeyboardInterrupt
            return real(*arguments)

        monkeypatch.setattr(measure, name, call)

    counting("accuracy")
    counting("drift", stop=True)
    with pytest.raises(KeyboardInterrupt):
        run(made, tmp_path, ["fp32"])
    assert counted == ["accuracy", "drift"]
    monkeypatch.undo()
    counting("accuracy")
    counting("drift")
    assert not run(made, tmp_path, ["fp32"])["rows"][0]["errors"]
    assert counted == ["accuracy", "drift", "drift"]


def test_one_part_that_fails_leaves_the_others_and_is_tried_again(
    made: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> Any:
        raise LawcatError("The speed could not be taken; try again.")

    with monkeypatch.context() as patch:
        patch.setattr(measure, "bundle_speed", full)
        row = run(made, tmp_path, ["fp32"])["rows"][0]
    assert row["errors"] == {"speed": "The speed could not be taken; try again."}
    assert row["accuracy"]["tokens"] == 190
    assert "speed" in run(made, tmp_path, ["fp32"])["rows"][0]


@pytest.mark.parametrize("error", [KeyError("rows"), AssertionError(), NotImplementedError()])
def test_a_bug_is_no_cell_of_the_table(tmp_path: Path, error: Exception) -> None:
    def broken(*_: Any) -> Any:
        raise error

    row = Row(tmp_path / "row.json", "fp32", "scheme")
    with pytest.raises(type(error)):
        row.measure("accuracy", "key", broken)
    assert row.measure("accuracy", "key", lambda: _raise(RuntimeError("no such kernel\nat 0x1"))) is None
    assert row.errors == {"accuracy": "RuntimeError: no such kernel"}


def _raise(error: Exception) -> Any:
    raise error


def test_a_damaged_bundle_or_row_file_is_made_anew(made: SimpleNamespace, tmp_path: Path) -> None:
    run(made, tmp_path, ["fp32"])
    data = tmp_path / "bundles" / "fp32" / "model.onnx.data"
    whole = data.read_bytes()
    data.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    (tmp_path / "rows" / "fp32.json").write_text("{broken")
    row = run(made, tmp_path, ["fp32"])["rows"][0]
    assert not row["errors"]
    assert data.read_bytes() == whole
    assert row["accuracy"] == made.rows["fp32"]["accuracy"]


def test_another_text_is_measured_anew(made: SimpleNamespace, tmp_path: Path) -> None:
    first = run(made, tmp_path, ["fp32"])["rows"][0]
    made.text.rename(made.folder / "kept.txt")
    try:
        made.text.write_text("Nothing of that is said here. " * 200)
        second = run(made, tmp_path, ["fp32"])["rows"][0]
    finally:
        (made.folder / "kept.txt").rename(made.text)
    assert first["accuracy"]["perplexity"] != second["accuracy"]["perplexity"]
    assert first["export"] == second["export"]
    assert first["speed"] == second["speed"]


def test_every_file_gives_its_share_of_the_sequences(made: SimpleNamespace, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(made.teacher.tokenizer_path)
    for name, letter in (("a", "a"), ("b", "b"), ("c", "c")):
        (tmp_path / f"{name}.txt").write_text(letter * (2000 if name != "c" else 10))
    files = [str(tmp_path / f"{name}.txt") for name in "abc"]
    a, b = tokenizer.encode("ab").ids
    assert spread(files[:2], tokenizer, 50, 3)[:, 25].tolist() == [a, a, b]
    assert spread(files, tokenizer, 50, 4)[:, 25].tolist() == [a, a, b, b]
    with pytest.raises(LawcatError, match="give more text"):
        spread(files[2:], tokenizer, 50, 4)


def test_a_scheme_of_the_users_own(made: SimpleNamespace, tmp_path: Path) -> None:
    from lawcat_edge.export.schemes import SCHEMES

    table = SCHEMES["int8"].to_dict()
    table["products"]["o"] = {"kind": "fp32"}
    (tmp_path / "int8.json").write_text(json.dumps(table))
    report = run(made, tmp_path / "out", ["int8", str(tmp_path / "int8.json")])
    assert [row["name"] for row in report["rows"]] == ["fp32", "int8", "int8-file"]
    assert report["rows"][2]["export"]["bytes"] > report["rows"][1]["export"]["bytes"]


def test_mixed_schemes_are_chosen_exported_and_measured(made: SimpleNamespace, tmp_path: Path) -> None:
    arguments = [*made.arguments, "--out", str(tmp_path), "--schemes", "int8", "--no-peers"]
    assert cli.run([*arguments, "--max-kl", "0.02", "--max-mb", "0.13"]) == 0
    rows = {row["name"]: row for row in read_json(tmp_path / "report.json")["rows"]}
    assert list(rows) == ["fp32", "int8", "auto-kl-0.02", "auto-0.13mb"]
    assert rows["auto-kl-0.02"]["accuracy"]["kl"] < 0.03
    assert rows["auto-kl-0.02"]["export"]["bytes"] < rows["fp32"]["export"]["bytes"]
    # beside the weights the limit counts what the fp32 bundle has: graphs differ by much only of a toy
    chosen, fp32 = (rows[name]["export"] for name in ("auto-0.13mb", "fp32"))
    assert chosen["weight_bytes"] + fp32["bytes"] - fp32["weight_bytes"] <= 0.13e6
    table = read_json(tmp_path / "sensitivity.json")
    assert set(table["kinds"]) == {"qkv", "o", "gate_up", "down", "head"}
    assert len(table["layers"]) == 2
    assert (tmp_path / "sensitivity.png").is_file()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--length", "100000"], "less than one sequence of 100,000; give more text"),
        (["--drift-length", "64K"], "or a smaller --drift-length"),
        (["--drift-length", "4"], "--drift-length must be at least 16"),
        (["--drift-length", "1K,2K"], "--drift-length must be one number"),
        (["--task-lengths", "64"], "--task-lengths 64 is too short for passkey"),
        (["--samples", "0"], "--samples must be at least 1"),
        (["--schemes", ","], "There is no scheme to compare"),
        (["--text", "absent.txt"], "absent.txt"),
    ],
)
def test_mistakes_end_in_one_sentence_before_anything_is_made(
    made: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: list[str], words: str
) -> None:
    arguments = list(made.arguments)
    if change[0] == "--text":
        at = arguments.index("--text")
        del arguments[at : at + 2]
    assert cli.run([*arguments, "--out", str(tmp_path / "out"), *change]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert "Traceback" not in said
    assert not (tmp_path / "out").exists()


def test_the_adapter_of_another_teacher_is_refused(made: SimpleNamespace, tmp_path: Path) -> None:
    other, _, _ = make_student(tmp_path / "other", seed=5)
    adapter = Adapter.load(made.folder / "adapter")
    with pytest.raises(LawcatError, match="belongs to the teacher"):
        comparing.Comparison.of(Student.of(other, adapter), [made.text], tmp_path / "out", settings())


def row(name: str, size: int, kl: float | None, ppl: float = 2.0, kind: str = "scheme") -> dict[str, Any]:
    return {"name": name, "kind": kind, "export": {"bytes": size}, "accuracy": {"kl": kl, "perplexity": ppl}}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("tiny", {}),
        # the widths and heads of SmolLM2-135M
        ("smollm2", {"hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64}),
    ],
)
def test_without_an_adapter_the_bundle_is_torchs_own_conversion(
    tmp_path: Path, made: SimpleNamespace, name: str, changes: dict[str, Any]
) -> None:
    """The fp32 row is verified against the torch student, which must start from the exporter's numbers."""
    folder, out = make_teacher(tmp_path / name, **changes), tmp_path / "out"
    arguments = ["compare", str(folder), "--text", str(made.text), *SMALL, "--calibration", str(made.text)]
    assert cli.run([*arguments, "--out", str(out), "--schemes", "fp32,int8", "--no-peers"]) == 0
    rows = {row["name"]: row for row in read_json(out / "report.json")["rows"]}
    parity = Bundle.open(out / "bundles" / "fp32").manifest.parity
    assert parity is not None
    assert 0 < parity.max_rel_err < 1e-4
    assert 0 < rows["int8"]["accuracy"]["kl"] < 1
    assert not rows["fp32"]["errors"]


def test_pareto_front_keeps_what_no_other_beats() -> None:
    rows = [
        row("fp32", 100, None),
        row("a", 50, 0.1),
        row("b", 50, 0.2),
        row("c", 20, 0.3),
        row("d", 60, 0.1),
    ]
    rows.append(row("peer", 1, 0.0, kind="gguf"))
    assert pareto(rows) == {"fp32", "a", "c"}


def test_change_of_perplexity_is_relative() -> None:
    assert ppl_change(row("a", 1, 0.1, 2.1), row("fp32", 1, None, 2.0)) == pytest.approx(0.05)
    assert np.isnan(ppl_change({}, row("fp32", 1, None, 2.0)) or np.nan)
