"""What surrounds the numbers of an export: flavours, schemes, files, resuming, refusing."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from exported import logits_of, make_bundle, make_student
from numpy.testing import assert_allclose
from tiny_teacher import make_teacher

from lawcat_edge.adapter import Adapter
from lawcat_edge.cli import run
from lawcat_edge.config import LawcatConfig
from lawcat_edge.export import exporter, layout
from lawcat_edge.export.exporter import ExportOptions, export_bundle
from lawcat_edge.export.rotation import Rotation
from lawcat_edge.export.rounding import nearest
from lawcat_edge.export.schemes import SCHEMES, Linear, Scheme, load_scheme
from lawcat_edge.export.verify import compare, cut, replay
from lawcat_edge.export.writer import DataWriter
from lawcat_edge.families import Geometry
from lawcat_edge.runtime.bundle.flavours import FLAVOURS as KNOWN
from lawcat_edge.runtime.bundle.manifest import Bundle, write_manifest
from lawcat_edge.runtime.bundle.verify import verify
from lawcat_edge.runtime.engine.session import Engine, _version
from lawcat_edge.runtime.errors import CheckFailed, LawcatError
from lawcat_edge.student import Student
from lawcat_edge.teacher import Teacher, resolve
from lawcat_edge.weights import RandomWeights

FLAVOURS = ("ort", "onnx", "portable")


@pytest.mark.parametrize("settings", [{}, {"window": 5, "rope": True}])
@pytest.mark.parametrize("scheme", ["fp32", "int8", "int8-dynamic", "int4"])
def test_flavours_agree(tmp_path: Path, scheme: str, settings: dict[str, Any]) -> None:
    config = LawcatConfig(feature_dim=8, **settings)
    teacher, model, adapter = make_student(tmp_path / "t", config=config, num_key_value_heads=3)
    here = _version(onnxruntime.__version__)
    flavours = tuple(op for op in FLAVOURS if _version(KNOWN[op].min_onnxruntime) <= here)
    report = make_bundle(teacher, model, adapter, tmp_path / "b", scheme=scheme, ops=flavours)
    limit = 3e-5 if scheme == "fp32" else 0.7
    assert all(report["parity"][flavour]["rel_err"] < limit for flavour in flavours), report["parity"]
    for name, opset, ir_version in (("onnx", 27, 13), ("portable", 17, 8)):
        if name not in flavours:
            continue
        graph = onnx.load(tmp_path / "b" / f"model_{name}.onnx", load_external_data=False)
        assert [(item.domain, item.version) for item in graph.opset_import] == [("", opset)]
        assert graph.ir_version <= ir_version
        assert {node.domain for node in graph.graph.node} == {""}
        onnx.checker.check_model(str(tmp_path / "b" / f"model_{name}.onnx"), full_check=True)


def test_flavours_widen_tensors_stored_in_float16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A published adapter is float16, so its larger tensors are stored so; rules read their sizes."""
    monkeypatch.setattr(layout, "_WORTH", 1)
    teacher, model, adapter = make_student(tmp_path / "t", config=LawcatConfig(feature_dim=8, window=5))
    with torch.no_grad():
        for name, parameter in model.adapter_parameters().items():
            parameter.copy_(parameter.half().float())
            adapter.tensors[name] = parameter.numpy().copy()
    here = _version(onnxruntime.__version__)
    known = tuple(op for op in FLAVOURS if _version(KNOWN[op].min_onnxruntime) <= here)
    report = make_bundle(teacher, model, adapter, tmp_path / "b", ops=known)
    assert all(agreement["rel_err"] < 3e-5 for agreement in report["parity"].values()), report["parity"]
    graph = onnx.load(tmp_path / "b" / "model_portable.onnx", load_external_data=False).graph
    assert {t.name: t.data_type for t in graph.initializer}["layers.0.conv_taps"] == onnx.TensorProto.FLOAT16


def test_every_graph_is_listed_and_replayed(tmp_path: Path) -> None:
    """The manifest names each graph and what each flavour needs; a wrong graph of fixed length is found."""
    teacher, model, adapter = make_student(tmp_path / "t", config=LawcatConfig(feature_dim=8, window=5))
    make_bundle(teacher, model, adapter, tmp_path / "b", ops=("ort", "portable"))
    manifest = Bundle.open(tmp_path / "b").manifest
    assert manifest.min_onnxruntime == {"ort": "1.25.1", "portable": "1.17.0"}
    assert set(manifest.graphs["ort"]) == {"last", "all", "genai"}
    assert set(manifest.graphs["portable"]) == {"last", "all", "step", "chunk"}
    listed = {name for graphs in manifest.graphs.values() for name in graphs.values()}
    assert listed == {path.name for path in (tmp_path / "b").glob("*.onnx")}
    assert "last, all, step, chunk" in verify(tmp_path / "b")[-1].detail

    for kind in ("step", "chunk"):
        name = manifest.graphs["portable"][kind]
        whole = (tmp_path / "b" / name).read_bytes()
        graph = onnx.load(tmp_path / "b" / name, load_external_data=False)
        for tensor in graph.graph.initializer:
            if not tensor.dims and tensor.data_type == onnx.TensorProto.FLOAT:
                value = onnx.numpy_helper.to_array(tensor)
                tensor.CopyFrom(onnx.numpy_helper.from_array(value * np.float32(1.5), tensor.name))
        (tmp_path / "b" / name).write_bytes(graph.SerializeToString())
        write_manifest(tmp_path / "b", manifest)
        with pytest.raises(CheckFailed, match="differ from the recorded ones"):
            verify(tmp_path / "b")
        (tmp_path / "b" / name).write_bytes(whole)
        write_manifest(tmp_path / "b", manifest)
    verify(tmp_path / "b")


@pytest.mark.parametrize(("name", "tokens"), [("step", 1), ("chunk", 32)])
def test_portable_graphs_of_fixed_length(tmp_path: Path, name: str, tokens: int) -> None:
    import onnxruntime

    teacher, model, adapter = make_student(tmp_path / "t")
    make_bundle(teacher, model, adapter, tmp_path / "b", ops=("portable",), verify=False)
    session = onnxruntime.InferenceSession(str(tmp_path / "b" / f"model_portable_{name}.onnx"))
    assert all(isinstance(dim, int) for item in session.get_inputs() for dim in item.shape)
    text = np.random.default_rng(0).integers(0, 257, 96)
    state = {i.name: np.zeros(i.shape, np.float32) for i in session.get_inputs() if i.name.startswith("past")}
    names = [item.name for item in session.get_outputs()]
    got = []
    for start in range(0, 96, tokens):
        out = dict(zip(names, session.run(names, {"input_ids": text[None, start : start + tokens], **state})))  # noqa: B905
        got.append(out["logits"][0, -1])
        state = {key: out[key.replace("past_key_values", "present")] for key in state}
    assert compare(logits_of(model, text)[tokens - 1 :: tokens], np.stack(got)).rel_err < 3e-5


def test_lean_graph_and_shared_table(tmp_path: Path) -> None:
    """One table serves embedding and head, both graphs point into one file, and a layer stays small."""
    teacher, model, adapter = make_student(tmp_path / "t", hidden_size=96)
    report = make_bundle(teacher, model, adapter, tmp_path / "b", scheme="int8")
    assert report["nodes_per_layer"]["ort"] <= 33
    graph = onnx.load(tmp_path / "b" / "model.onnx", load_external_data=False).graph
    place = {t.name: {e.key: e.value for e in t.external_data} for t in graph.initializer if t.external_data}
    tables = [where for name, where in place.items() if name.startswith("embedding.q8")]
    assert len(tables) == 2
    assert tables[0] == tables[1]
    everything = onnx.load(tmp_path / "b" / "model_all.onnx", load_external_data=False).graph
    assert {t.name for t in everything.initializer} >= set(place)
    assert {"location": "model.onnx.data"}.items() <= tables[0].items()
    assert (tmp_path / "b" / "model.onnx").stat().st_size < 200_000


@pytest.mark.parametrize(
    ("settings", "changes", "linear"),
    [
        ({}, {}, 29),
        ({"window": 8}, {}, 37),
        ({"window": 8, "window_scaling": "softmax"}, {}, 34),
        ({}, {"num_key_value_heads": 1}, 30),
        ({"window": 8}, {"num_key_value_heads": 1}, 38),
    ],
)
def test_nodes_of_a_layer_that_run(
    tmp_path: Path, settings: dict[str, Any], changes: dict[str, Any], linear: int
) -> None:
    """After onnxruntime's own optimisation, which may add nodes as well as take some away."""
    import onnxruntime

    kinds = {"layer_types": ("linear_attention", "full_attention"), "attention_span": 9}
    config = LawcatConfig(feature_dim=8, **settings, **kinds)  # type: ignore[arg-type]
    sizes = {"num_attention_heads": 6, "num_key_value_heads": 2, **changes}
    teacher, model, adapter = make_student(tmp_path / "t", config=config, **sizes)
    make_bundle(teacher, model, adapter, tmp_path / "b", scheme="int8", verify=False)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    onnxruntime.InferenceSession(str(tmp_path / "b" / "model.onnx"), options)
    nodes = onnx.load(tmp_path / "optimised.onnx", load_external_data=False).graph.node
    counts = [sum(node.name.startswith(f"layers.{i}/") for node in nodes) for i in range(2)]
    assert counts[0] <= linear
    assert counts[1] <= 10
    assert len(nodes) <= sum(counts) + 10  # embedding, head, and what layers share


def test_heads_of_an_odd_width_need_the_portable_operators(tmp_path: Path) -> None:
    config = LawcatConfig(feature_dim=8, window=4)
    teacher, model, adapter = make_student(tmp_path / "t", config=config, head_dim=12)
    with pytest.raises(LawcatError, match="multiple of 16, not 12; export with --ops portable"):
        make_bundle(teacher, model, adapter, tmp_path / "b")
    report = make_bundle(teacher, model, adapter, tmp_path / "b", ops=("portable",))
    assert report["parity"]["portable"]["rel_err"] < 3e-5
    # the project's own window takes any width, and full attention is onnxruntime's there too
    hybrid: Any = {"layer_types": ("full_attention", "linear_attention"), "attention_span": 9}
    teacher, model, adapter = make_student(tmp_path / "h", config=replace(config, **hybrid), head_dim=12)
    with pytest.raises(LawcatError, match="multiple of 16, not 12"):
        make_bundle(teacher, model, adapter, tmp_path / "h-b", ops=("portable", "native"))


def test_rotation_changes_nothing_in_float32(tmp_path: Path) -> None:
    for tied, family in ((True, "llama"), (False, "llama"), (False, "qwen3")):
        teacher, model, adapter = make_student(
            tmp_path / f"{family}{tied}", family, lora=2, tie_word_embeddings=tied, attention_bias=True
        )
        fp32 = SCHEMES["fp32"]
        rotated = Scheme("turned", fp32.linears, fp32.embedding, 1e-4, 1e-6, rotate=True)
        plain = make_bundle(teacher, model, adapter, tmp_path / "a", scheme="fp32")
        rotated_x = make_bundle(teacher, model, adapter, tmp_path / "b", scheme=rotated)
        assert rotated_x["parity"]["ort"]["rel_err"] < 5e-5
        first = (tmp_path / "a" / "model.onnx.data").read_bytes()
        assert first != (tmp_path / "b" / "model.onnx.data").read_bytes()
        assert plain["parity"]["ort"]["rel_err"] > 0


@pytest.mark.parametrize("width", [48, 576, 2048, 15, 4096])
def test_rotation_is_orthogonal(width: int) -> None:
    rotation, x = Rotation(width), np.random.default_rng(0).standard_normal((5, width)).astype(np.float32)
    rotated_x = rotation.rows(x)
    assert_allclose(rotated_x @ rotated_x.T, x @ x.T, atol=width * 3e-6)
    assert np.abs(rotated_x - x).max() > 0.1
    spike = np.zeros((1, width), np.float32)
    spike[0, width // 2] = 100.0
    assert np.abs(rotation.rows(spike)).max() < 95 if width == 15 else np.abs(rotation.rows(spike)).max() < 80
    if width < 1000:
        assert_allclose(rotation.columns(x.T), rotation.matrix.T @ x.T, atol=1e-4)


def test_rounding_is_to_the_nearest_step() -> None:
    values = np.random.default_rng(0).standard_normal((7, 3, 32)).astype(np.float32)
    values[0, 0] = 0
    eight = nearest(values, Linear("nbits", 8, 32))
    back = eight.values().reshape(values.shape)
    # half a step, and what the largest value loses to its scale being a float16
    assert (np.abs(back - values) <= eight.scales[..., None] * 0.5001 + np.abs(values) * 5e-4).all()
    four = nearest(values, Linear("nbits", 4, 32))
    back = four.values().reshape(values.shape)
    assert np.square(back - values).mean() < 0.0095
    assert (back[0, 0] == 0).all()
    assert four.quantised.min() == -8
    for found in (eight, four):
        assert (found.scales.astype(np.float16) == found.scales).all()


def test_offsets_give_back_weights_that_came_from_4_bits() -> None:
    """A GGUF in Q4_1 holds blocks of 32 values d * q + m; a symmetric grid loses much of that."""
    generator = np.random.default_rng(0)
    d, m = generator.random((50, 4, 1)) * 0.01 + 0.01, generator.random((50, 4, 1)) * -0.1 - 0.02
    quantised = generator.integers(0, 16, (50, 4, 32))
    quantised[..., 0], quantised[..., 1] = 0, 15
    values = (quantised * d.astype(np.float16) + m.astype(np.float16)).astype(np.float32)
    values = values[((values.min(-1) < 0) & (values.max(-1) > 0)).all(-1)]
    assert len(values) > 30
    lost = {}
    for offsets in (True, False):
        found = nearest(values, Linear("nbits", 4, 32, offsets=offsets))
        lost[offsets] = np.square(found.values().reshape(values.shape) - values).mean()
    assert lost[True] < lost[False] / 100


def test_integer_product_of_seven_bits_cannot_saturate(tmp_path: Path) -> None:
    """Two u8 x s8 products fit 16 bits for the stored weights, whatever the activations: no VNNI needed, and
    no setting of the runtime's."""
    teacher, model, adapter = make_student(tmp_path / "t")
    seven = dict.fromkeys(("qkv", "o", "gate_up", "down"), Linear("dynamic", 7))
    scheme = replace(SCHEMES["int8-dynamic"], linears=SCHEMES["int8-dynamic"].linears | seven)
    make_bundle(teacher, model, adapter, tmp_path / "b", scheme=scheme)
    graph = onnx.load(tmp_path / "b" / "model.onnx").graph
    signed = [onnx.numpy_helper.to_array(t) for t in graph.initializer if t.name.endswith(".s8")]
    assert len(signed) == 8
    for weight in signed:
        pairs = np.abs(weight[::2].astype(np.int64)) + np.abs(weight[1::2].astype(np.int64))
        assert 255 * pairs.max() < 1 << 15
        assert np.abs(weight).max() == 63


def test_scheme_from_a_file(tmp_path: Path) -> None:
    mine = SCHEMES["int4"].to_dict() | {"name": "mine"}
    (tmp_path / "mine.json").write_text(json.dumps(mine))
    assert load_scheme(str(tmp_path / "mine.json")).to_dict() == mine
    for change, word in (
        ({"products": {}}, "products"),
        ({"rotate": 1}, "rotate"),
        ({"max_kl": -1}, "max_kl"),
        ({"embedding": {"kind": "dynamic"}}, "embedding"),
        ({"embedding": {"kind": "nbits", "bits": 3}}, "bits"),
        ({"embedding": {"kind": "mp3"}}, "mp3"),
        ({"extra": 1}, "keys"),
    ):
        (tmp_path / "bad.json").write_text(json.dumps(mine | change))
        with pytest.raises(LawcatError, match=word):
            load_scheme(str(tmp_path / "bad.json"))
    with pytest.raises(LawcatError, match="int8-dynamic"):
        load_scheme("int9")


def test_failed_bound_leaves_the_old_bundle(tmp_path: Path) -> None:
    teacher, model, adapter = make_student(tmp_path / "t")
    make_bundle(teacher, model, adapter, tmp_path / "b")
    before = (tmp_path / "b" / "lawcat_bundle.json").read_bytes()
    with pytest.raises(CheckFailed, match="too far from torch"):
        make_bundle(
            teacher, model, adapter, tmp_path / "b", reference=lambda ids: logits_of(model, ids) * 1.01
        )
    assert (tmp_path / "b" / "lawcat_bundle.json").read_bytes() == before
    make_bundle(teacher, model, adapter, tmp_path / "b", scheme="int8")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b", "t"]


def test_killed_export_is_taken_up_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, model, adapter = make_student(tmp_path / "t", num_hidden_layers=4)
    make_bundle(teacher, model, adapter, tmp_path / "whole", name="b")
    stored: list[str] = []
    original = DataWriter.write

    def write(self: DataWriter, name: str, *rest: Any) -> None:
        stored.append(name)
        if len(stored) == 40:
            raise KeyboardInterrupt
        original(self, name, *rest)

    monkeypatch.setattr(DataWriter, "write", write)
    with pytest.raises(KeyboardInterrupt):
        make_bundle(teacher, model, adapter, tmp_path / "b", name="b")
    assert not (tmp_path / "b").exists()
    first, stored[:] = set(stored), ["again"] * 40
    make_bundle(teacher, model, adapter, tmp_path / "b", name="b")
    again = set(stored) - {"again"}
    assert "embedding.weight" in first - again
    assert any(name.startswith("layers.3") for name in again - first)
    for file in ("model.onnx.data", "model.onnx", "lawcat_bundle.json"):
        assert (tmp_path / "b" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def test_an_export_killed_while_it_is_verified_stores_nothing_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, model, adapter = make_student(tmp_path / "t")
    make_bundle(teacher, model, adapter, tmp_path / "whole", name="b")

    def killed(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(exporter, "verify_folder", killed)
        with pytest.raises(KeyboardInterrupt):
            make_bundle(teacher, model, adapter, tmp_path / "b", name="b")
    monkeypatch.setattr(DataWriter, "write", killed)
    make_bundle(teacher, model, adapter, tmp_path / "b", name="b")
    for file in ("model.onnx.data", "model.onnx", "lawcat_bundle.json"):
        assert (tmp_path / "b" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "t", "whole"]


def test_bad_weights_and_adapters_are_refused(tmp_path: Path) -> None:
    teacher, model, adapter = make_student(tmp_path / "t")
    good = adapter.tensors["layers.1.feature"]
    adapter.tensors["layers.1.feature"] = good[:1]
    with pytest.raises(LawcatError, match=r"layers\.1\.feature"):
        make_bundle(teacher, model, adapter, tmp_path / "b")
    adapter.tensors["layers.1.feature"] = good * np.nan
    with pytest.raises(LawcatError, match="NaN"):
        make_bundle(teacher, model, adapter, tmp_path / "b")
    with pytest.raises(LawcatError, match="operators"):
        make_bundle(teacher, model, adapter, tmp_path / "b", ops=("tflite",))
    assert not (tmp_path / "b").exists()


def test_another_window_is_exported_and_verified(tmp_path: Path, capsys: Any) -> None:
    config = LawcatConfig(feature_dim=8, window=3)
    teacher, _, made = make_student(tmp_path / "t", config=config)
    belongs = str(teacher.folder), teacher.sha256
    Adapter(config, teacher.geometry, *belongs, made.tensors, made.lora).save(tmp_path / "a")
    words = ["export", str(teacher.folder), "--scheme", "fp32", "--window", "7", "--json"]
    assert run([*words, "--adapter", str(tmp_path / "a"), "--out", str(tmp_path / "b")]) == 0
    report = json.loads(capsys.readouterr().out)  # against torch with the same window
    assert 0 < report["parity"]["ort"]["rel_err"] < 1e-4
    assert Bundle.open(tmp_path / "b").manifest.window == 7
    assert run([*words, "--out", str(tmp_path / "c")]) == 2
    assert "give one with --adapter" in capsys.readouterr().err


def test_large_model_needs_little_memory(tmp_path: Path) -> None:
    """A model of random weights that exist one block at a time."""
    import tracemalloc

    geometry = Geometry("mistral", 512, 6, 8, 2, 64, 2048, 4096, False, 1e-5, 1e4)
    teacher, _, _ = make_student(tmp_path / "t")

    @dataclass(frozen=True)
    class Random(Teacher):
        seed: int = 0

        def weights(self) -> RandomWeights:
            return RandomWeights(self.geometry, self.seed)

    def student(seed: int) -> Student:
        return Student.of(Random("random", teacher.folder, "0" * 64, geometry, seed), config=LawcatConfig())

    # trace outside of what is measured
    export_bundle(student(0), tmp_path / "b", ExportOptions())
    tracemalloc.start()
    report = export_bundle(student(1), tmp_path / "c", ExportOptions(verify=False))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert report["bytes"] > 26_000_000
    assert peak < 60_000_000  # 108 MB of float32 weights went through


def test_cut_and_compare() -> None:
    assert sum(cut(100)) == 100
    assert cut(3, [1, 5]) == [1, 2]
    logits = np.random.default_rng(0).standard_normal((4, 9)).astype(np.float32)
    assert compare(logits, logits).rel_err == 0
    assert compare(logits, logits + np.float32(1)).kl < 1e-9  # a shift is the same distribution
    assert compare(logits, -logits).kl > 0.1


def test_untrained_bundle_runs_and_rejects_nothing(tmp_path: Path) -> None:
    teacher, _, _ = make_student(tmp_path / "t")
    config = LawcatConfig(feature_dim=8)
    export_bundle(Student.of(teacher, config=config), tmp_path / "b", ExportOptions())
    engine = Engine(Bundle.open(tmp_path / "b"))
    tokens = np.arange(50)
    assert np.isfinite(replay(engine, tokens, [20, 30])).all()
    genai = json.loads((tmp_path / "b" / "genai_config.json").read_text())
    assert genai["model"]["vocab_size"] == 257
    assert Linear("fp32").to_dict() == {"kind": "fp32"}


@pytest.mark.parametrize("template", [None, "{% for m in messages %}{{ m['content'] }}{% endfor %}"])
def test_a_hub_folder_without_a_limit_of_length_is_exported(tmp_path: Path, template: str | None) -> None:
    """As Llama 2 and TinyLlama lie on the hub: no template file, and no limit in 31 digits."""
    from transformers.tokenization_utils_base import VERY_LARGE_INTEGER

    folder = make_teacher(tmp_path / "t")
    settings = {"model_max_length": VERY_LARGE_INTEGER, "eos_token": "<|endoftext|>"}
    if template:
        settings["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert resolve(folder).chat_template() == ((template, "<|endoftext|>") if template else None)
    assert run(["export", str(folder), "--out", str(tmp_path / "b"), "--no-verify"]) == 0
    written = tmp_path / "b" / "chat_template.jinja"
    assert (written.read_text() if written.exists() else None) == template
