"""int8-static and calibrated int4 from the command line, and what is refused on the way."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from exported import logits_of, make_bundle, make_student
from tiny_teacher import write_corpus

from lawcat_edge import cli
from lawcat_edge.adapter import Adapter
from lawcat_edge.calibration.calibrate import Calibration
from lawcat_edge.calibration.ranges import Ranges
from lawcat_edge.config import LawcatConfig
from lawcat_edge.evaluate.lm import BundleModel
from lawcat_edge.export.products import input_grid
from lawcat_edge.export.schemes import SCHEMES, Scheme, load_scheme
from lawcat_edge.losses import token_kl
from lawcat_edge.runtime.errors import LawcatError
from lawcat_edge.student import Student

WORDS = "bread and rope lay under the grey light while every boat spoke of rain and the sea took men "
IDS = np.array([[1 + ord(letter) for letter in WORDS * 2]])  # not the calibration text, but like it


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A teacher with an adapter, text, and the ranges of ``calibrate`` by the command line."""
    folder = tmp_path_factory.mktemp("calibrate")
    teacher, model, student = make_student(folder / "teacher", config=LawcatConfig(feature_dim=8, window=4))
    adapter = Adapter(student.config, teacher.geometry, "tiny", teacher.sha256, student.tensors)
    adapter.save(folder / "adapter")
    text = write_corpus(folder / "text.txt")
    ranges = folder / "ranges.json"
    basis = [str(teacher.folder), "--adapter", str(folder / "adapter")]
    calibrate = ["calibrate", *basis, "--text", str(text), "--tokens", "2048", "--threads", "1"]
    assert cli.run([*calibrate, "--out", str(ranges)]) == 0
    return SimpleNamespace(
        folder=folder,
        teacher=teacher,
        model=model,
        student=student,
        adapter=Adapter.load(folder / "adapter"),
        text=str(text),
        ranges=ranges,
        basis=basis,
        calibrate=calibrate,
        reference=logits_of(model, IDS[0]),
    )


def kl(made: SimpleNamespace, folder: Path) -> float:
    seen = np.concatenate([part[0] for part in BundleModel(folder, threads=1).logits(IDS, 64)])
    return float(token_kl(made.reference, seen).mean())


def calibration(made: SimpleNamespace, folder: Path, **options: Any) -> Calibration:
    options = {"files": [made.text], "tokens": 2048, "threads": 1, **options}
    return Calibration(Student.of(made.teacher, made.adapter), folder, **options)


def test_static_from_ranges_is_close_and_has_two_nodes_a_product(
    made: SimpleNamespace, tmp_path: Path
) -> None:
    out = tmp_path / "static"
    arguments = ["export", *made.basis, "--scheme", "int8-static", "--ranges", str(made.ranges)]
    assert cli.run([*arguments, "--out", str(out)]) == 0
    graph = onnx.load(out / "model.onnx", load_external_data=False).graph
    nodes = [node.op_type for node in graph.node]
    assert nodes.count("MatMulIntegerToFloat") == nodes.count("QuantizeLinear") == 3 * 2
    assert not any(node.name.endswith("/top") for node in graph.node)  # the device measures nothing
    make_bundle(made.teacher, made.model, made.student, tmp_path / "rows", scheme="int8-dynamic")
    static, dynamic = kl(made, out), kl(made, tmp_path / "rows")
    assert 0 < static < 8 * dynamic
    # half the range cuts the activations, and the result must say so
    half = {name: (low / 2, high / 2) for name, (low, high) in seen(made.ranges).items()}
    make_bundle(made.teacher, made.model, made.student, tmp_path / "half", scheme="int8-static", ranges=half)
    assert kl(made, tmp_path / "half") > 2 * static


def seen(path: Path) -> dict[str, tuple[float, float]]:
    ranges = Ranges.load(path)
    return {name: ranges.range(name) for name in ranges.tensors}


def test_every_flavour_of_static_and_of_offsets_computes_the_same(
    made: SimpleNamespace, tmp_path: Path
) -> None:
    for scheme, options in (("int8-static", {"ranges": seen(made.ranges)}), ("int4", {})):
        found = []
        for ops in ("ort", "portable"):
            out = tmp_path / f"{scheme}-{ops}"
            make_bundle(made.teacher, made.model, made.student, out, scheme=scheme, ops=(ops,), **options)
            found.append(np.concatenate([p[0] for p in BundleModel(out, threads=1).logits(IDS[:, :40], 20)]))
        # MatMulNBits rounds its activations, the portable form does not
        bound = 1e-3 if scheme == "int8-static" else 0.05
        assert token_kl(found[0], found[1]).mean() < bound * token_kl(found[0] * 0, found[0]).mean() + 1e-6


def test_calibrated_int4_beats_the_nearest(made: SimpleNamespace, tmp_path: Path) -> None:
    """Over several students: on one small random one, errors of 4 bits may fall either way."""
    table = SCHEMES["int4"].to_dict()
    four = {"kind": "nbits", "bits": 4, "block": 16}
    products = {name: four if spec.get("bits") == 4 else spec for name, spec in table["products"].items()}
    assert sum(spec == four for spec in products.values()) >= 3
    scheme = Scheme.from_dict({**table, "name": "small-blocks", "products": products})
    total = {"nearest": 0.0, "aware": 0.0}
    for start in range(4):
        place = tmp_path / str(start)
        teacher, model, student = make_student(place / "teacher", config=made.adapter.config, start=start)
        Adapter(student.config, teacher.geometry, "tiny", teacher.sha256, student.tensors).save(place / "a")
        one = SimpleNamespace(**{**vars(made), "teacher": teacher, "adapter": Adapter.load(place / "a")})
        one.reference = logits_of(model, IDS[0])
        needed = calibration(one, place / "work").for_export(scheme)
        assert set(needed) == {"rounder_of"}
        for name, options in (("nearest", {}), ("aware", needed)):
            make_bundle(teacher, model, student, place / name, scheme=scheme, **options)
            total[name] += kl(one, place / name)
        sizes = [(place / name / "model.onnx.data").stat().st_size for name in total]
        assert sizes[0] == sizes[1]
    assert total["aware"] < 0.9 * total["nearest"]


def test_without_text_the_teacher_writes_it(
    made: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["calibrate", *made.basis, "--tokens", "1024", "--threads", "1", "--json"]
    assert cli.run([*arguments, "--out", str(tmp_path / "r.json")]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["text"] == "sampled from the teacher"
    assert report["tokens"] == 1024
    assert Ranges.load(tmp_path / "r.json").measured_on["scheme"] == "fp32-rotated"


def test_another_student_or_basis_is_refused(made: SimpleNamespace, tmp_path: Path) -> None:
    ranges = Ranges.load(made.ranges)
    ranges.check_export(made.teacher.sha256, made.adapter.sha256, True)
    with pytest.raises(LawcatError, match="another basis"):
        ranges.check_export(made.teacher.sha256, made.adapter.sha256, False)
    with pytest.raises(LawcatError, match="another teacher or adapter"):
        ranges.check_export(made.teacher.sha256, None, True)
    with pytest.raises(LawcatError, match="another teacher or adapter"):
        ranges.check_export("0" * 64, made.adapter.sha256, True)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--scheme", "int8", "--ranges", "RANGES"], "uses no ranges; drop --ranges"),
        (["--scheme", "int8-static", "--ranges", "/no/such.json"], "such.json"),
        (["--scheme", "int4", "--rounding", "up"], "--rounding must be one of nearest, gptq"),
        (["--scheme", "int8-static", "--calibration", "SHORT"], "calibration text is too short"),
    ],
)
def test_bad_input_is_one_sentence(
    made: SimpleNamespace,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    said: str,
) -> None:
    (tmp_path / "short.txt").write_text("Too short to say anything.")
    named = {"RANGES": str(made.ranges), "SHORT": str(tmp_path / "short.txt")}
    arguments = [named.get(word, word) for word in arguments]
    assert cli.run(["export", *made.basis, "--out", str(tmp_path / "b"), *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error
    assert not (tmp_path / "b").exists()


def test_ranges_of_another_adapter_are_refused_by_the_command(
    made: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["export", str(made.teacher.folder), "--scheme", "int8-static", "--ranges", str(made.ranges)]
    assert cli.run([*arguments, "--out", str(tmp_path / "b")]) == 2
    assert "measured on another teacher or adapter" in capsys.readouterr().err


def test_calibrating_for_a_scheme_without_static_products_or_merging_twice(
    made: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path / "r.json")]
    assert cli.run([*made.calibrate, *out, "--scheme", "int8"]) == 2
    assert "needs no ranges" in capsys.readouterr().err
    assert cli.run([*made.calibrate, *out, "--merge", str(made.ranges)]) == 2
    assert "saw the same text" in capsys.readouterr().err
    assert not (tmp_path / "r.json").exists()


def test_an_export_without_ranges_says_what_to_run(made: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(LawcatError, match="run lawcat-edge calibrate"):
        make_bundle(made.teacher, made.model, made.student, tmp_path / "b", scheme="int8-static")


def test_the_input_grid_holds_zero_exactly() -> None:
    for low, high in ((-1.0, 3.0), (0.5, 2.0), (-4.0, -1.0), (0.0, 0.0)):
        scale, zero = input_grid(low, high)
        assert scale > 0
        assert 0 <= zero <= 255
        assert (255 - float(zero)) * scale >= high * 0.99
        assert float(zero) * scale >= -low * 0.99


def test_single_layers_may_differ(made: SimpleNamespace, tmp_path: Path) -> None:
    table = {**SCHEMES["fp32"].to_dict(), "name": "mixed", "max_rel_err": 10.0, "max_kl": 3.0}
    table["layers"] = {"1": {"down": {"kind": "nbits", "bits": 4, "block": 16}}}
    scheme = Scheme.from_dict(json.loads(json.dumps(table)))
    assert Scheme.from_dict(scheme.to_dict()) == scheme
    make_bundle(made.teacher, made.model, made.student, tmp_path / "mixed", scheme=scheme)
    graph = onnx.load(tmp_path / "mixed" / "model.onnx", load_external_data=False).graph
    assert [node.name for node in graph.node if node.op_type == "MatMulNBits"] == ["layers.1/down"]
    table["layers"] = {"2": table["layers"]["1"]}
    with pytest.raises(LawcatError, match="names layer 2, but the model has 2"):
        make_bundle(made.teacher, made.model, made.student, tmp_path / "no", scheme=Scheme.from_dict(table))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"layers": {"x": {}}}, "layers are an object"),
        ({"layers": {"0": {"head": {"kind": "fp32"}}}}, "layers are an object"),
        ({"rounding": "up"}, "rounding must be one of"),
        ({"embedding": {"kind": "static"}}, "embedding can be fp32 or nbits"),
        ({"products": {"head": {"kind": "static"}}}, "The head can be"),
        ({"products": {"down": {"kind": "nbits", "bits": 8, "offsets": True}}}, "offsets of a product"),
        ({"products": {"down": {"kind": "static", "bits": 7, "method": "guess"}}}, "method of a product"),
    ],
)
def test_a_wrong_table_is_one_sentence(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    table = SCHEMES["int8-static"].to_dict()
    for key, value in change.items():
        table[key] = {**table[key], **value} if key == "products" else value
    (tmp_path / "scheme.json").write_text(json.dumps(table))
    with pytest.raises(LawcatError, match=said):
        load_scheme(str(tmp_path / "scheme.json"))
