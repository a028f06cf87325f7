"""A bundle is checked before anything of it is used; whatever is wrong is one typed error."""

from __future__ import annotations

import random
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import onnx
import pytest
from tiny_bundle import build_tiny_bundle, rewrite_manifest

from lawcat_edge.runtime.bundle.graph_check import check_model
from lawcat_edge.runtime.bundle.manifest import Bundle, describe_files, expected_state, state_sizes
from lawcat_edge.runtime.bundle.span import Span
from lawcat_edge.runtime.bundle.verify import verify
from lawcat_edge.runtime.engine.session import Engine
from lawcat_edge.runtime.errors import CheckFailed, LawcatError


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_bundle(tmp_path_factory.mktemp("bundles") / "whole")


@pytest.fixture
def bundle(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "bundle"))


def rehash(folder: Path) -> None:
    """Make the manifest agree with the files again, as an attacker would."""
    names = [p.name for p in folder.iterdir() if p.name != "lawcat_bundle.json"]
    rewrite_manifest(folder, lambda data: data.update(files=describe_files(folder, names)))


def test_a_whole_bundle_passes(whole: Path) -> None:
    checks = verify(whole)
    assert [check.name for check in checks] == ["files", "tensors", "text", "parity (ort)"]
    opened = Bundle.open(whole)
    assert opened.manifest.state_bytes() == 2 * 4 * (64 * 3 + 2 * 16 * 17)
    assert opened.path("model.onnx").is_file()
    with pytest.raises(LawcatError, match="no file"):
        opened.path("../secret")


@pytest.mark.parametrize("what", ["missing", "a file", "empty folder"])
def test_what_is_no_bundle(tmp_path: Path, what: str) -> None:
    path = tmp_path / "x"
    if what == "a file":
        path.write_text("x")
    elif what == "empty folder":
        path.mkdir()
    with pytest.raises(LawcatError, match=r"lawcat-edge export"):
        Bundle.open(path)


def _set(*keys: Any, value: Any) -> Any:
    def change(data: Any) -> None:
        for key in keys[:-1]:
            data = data[key]
        data[keys[-1]] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        _set("format", value=1), _set("format", value=True), _set("name", value=3), _set("ops", value=[]),
        _set("ops", value=["cuda"]), _set("ops", value=[[]]), _set("extra", value=1),
        _set("geometry", "head_dim", value=1 << 40),
        _set("geometry", "num_layers", value=2.0), _set("geometry", "num_heads", value=-2),
        _set("geometry", "vocab_size", value=0), _set("geometry", value=[]),
        _set("lawcat", "window", value="2"),
        _set("lawcat", "rope", value=1), _set("lawcat", "feature_dim", value=9), _set("state", value=[]),
        _set("state", 0, "shape", value=["B", 64, 1 << 30]), _set("state", 0, "dtype", value="float16"),
        _set("state", 0, "input", value="input_ids"),
        _set("state", 1, "output", value="present.0.conv_state"),
        _set("graphs", "ort", "last", value="../model.onnx"), _set("graphs", "ort", value={}),
        _set("graphs", value={"portable": {"last": "model.onnx"}}), _set("min_onnxruntime", value="1.25.1"),
        _set("min_onnxruntime", value={"portable": "1.25.1"}), _set("min_onnxruntime", "ort", value="new"),
        _set("min_onnxruntime", "ort", value=1.25), _set("graphs", "ort", "fast", value="model.onnx"),
        _set("files", "../x", value={"size": 1, "sha256": "0" * 64}),
        _set("files", "model.onnx", "size", value=-1), _set("files", "model.onnx", "size", value=1e3),
        _set("files", "model.onnx", "sha256", value="0" * 63),
        _set("files", "gone", value={"size": 1, "sha256": "0" * 64}),
        _set("source", value={}), _set("source", "adapter_sha256", value="x"), _set("tokens", value={}),
        _set("tokens", "eos", value=[260]), _set("tokens", "bos", value=-1), _set("parity", value={}),
        _set("parity", "tokens", value=[1 << 40]), _set("parity", "pieces", value=[1]),
        _set("parity", "positions", value=[99]), _set("parity", "top_ids", value=[]),
        _set("parity", "top_logits", 0, 0, value="x"), _set("parity", "bound", value=-1),
        _set("parity", "top_logits", 0, value=[1.0]),
    ],
)  # fmt: skip
def test_every_field_of_the_manifest_is_checked(bundle: Path, change: Any) -> None:
    rewrite_manifest(bundle, change)
    with pytest.raises(LawcatError):
        Bundle.open(bundle)


KINDS = ["linear_attention", "full_attention"]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (_set("lawcat", "attention_span", value=1 << 40), "attention_span must be a whole number from 1 to"),
        (_set("lawcat", "attention_span", value=0), "attention_span must be a whole number from 1 to"),
        (_set("lawcat", "attention_span", value=True), "attention_span must be a whole number from 1 to"),
        (_set("lawcat", "attention_sinks", value=7), "attention_sinks does not fit the span"),
        (
            _set("lawcat", "attention_sinks", value=1 << 40),
            "attention_sinks must be a whole number from 0 to 64",
        ),
        (_set("lawcat", "attention_sinks", value=-1), "attention_sinks must be a whole number from 0 to 64"),
        (_set("lawcat", "layer_types", value=[]), "attention_span must be a whole number from 0 to 0"),
        (_set("lawcat", "layer_types", value=KINDS[:1]), "must name the 2 layers or none"),
        (_set("lawcat", "layer_types", value=[*KINDS, KINDS[0]]), "must name the 2 layers or none"),
        (_set("lawcat", "layer_types", value=[KINDS[0], 1]), "linear_attention or full_attention each"),
        (_set("lawcat", "layer_types", value=KINDS[::-1]), "does not have past_key_values.0.key"),
        (_set("lawcat", "layer_types", value=KINDS[:1] * 2), "from 0 to 0"),
        (_set("lawcat", "window_scaling", value="none"), "window_scaling must be one of"),
        (_set("geometry", "sliding_window", value=0), "sliding_window must be a whole number"),
        (_set("state", -1, "buffer", value="window"), "does not have past_key_values.1.value"),
        (_set("state", -1, "buffer", value=3), "must be a text"),
        (_set("state", -1, "shape", value=["B", 1, "more", 16]), "must be a whole number"),
        (_set("state", -1, "shape", value=["B", 1, 1 << 24, 16]), "does not have past_key_values.1.value"),
        (_set("geometry", "head_dim", value=4096), "does not have"),
    ],
)
def test_a_forged_hybrid_takes_no_memory(tmp_path: Path, change: Any, sentence: str) -> None:
    """Refused in one sentence, before anything of the size that it claims exists."""
    folder = build_tiny_bundle(tmp_path / "b", window=3, span=9)
    rewrite_manifest(folder, change)
    tracemalloc.start()
    with pytest.raises(LawcatError, match=sentence) as refused:
        Bundle.open(folder)
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()
    assert "\n" not in str(refused.value)


def test_a_span_that_would_take_too_much_is_refused(tmp_path: Path) -> None:
    """Every number within its limit, and all of them together too large."""
    geometry = {"num_heads": 64, "num_kv_heads": 64, "head_dim": 128, "num_layers": 2}
    lawcat = {"conv_kernel": 4, "feature_dim": 8, "layer_types": KINDS, "attention_span": 1 << 24}
    folder = build_tiny_bundle(tmp_path / "b", span=9)
    state = [tensor.to_dict() for tensor in expected_state(geometry, lawcat)]

    def change(data: Any) -> None:
        data["geometry"] |= geometry
        data["lawcat"] |= lawcat
        data["state"] = state

    rewrite_manifest(folder, change)
    with pytest.raises(LawcatError, match="would take up to 1,099,5"):
        Bundle.open(folder)


def test_a_bundle_of_an_older_format_says_to_export_again(bundle: Path) -> None:
    rewrite_manifest(bundle, _set("format", value=2))
    with pytest.raises(
        LawcatError, match=r"format '2' and this runner reads 3 to 4.*export the bundle again"
    ):
        Bundle.open(bundle)


def test_a_bundle_of_format_3_has_no_sinks_and_runs(bundle: Path) -> None:
    def older(data: Any) -> None:
        data["format"] = 3
        del data["lawcat"]["attention_sinks"]

    before = Bundle.open(bundle).manifest.spans
    rewrite_manifest(bundle, older)
    assert Bundle.open(bundle).manifest.spans == before


def test_state_sizes_of_a_hybrid(tmp_path: Path) -> None:
    manifest = Bundle.open(build_tiny_bundle(tmp_path / "b", window=3, span=10_000)).manifest
    row, constant = 2 * 4 * 16, 4 * (64 * 3 + 2 * 16 * 17)  # a key and a value of a layer; the linear layer
    assert manifest.spans == {"window": Span(3), "full": Span(10_000)}
    assert state_sizes(manifest.state, manifest.spans) == {
        "empty": constant,
        "8192": constant + row * (2 + 8192),
        "most": constant + row * (2 + 9999),
    }


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data", "tokenizer.json", "chat_template.jinja"])
def test_a_changed_file_is_named(bundle: Path, name: str) -> None:
    data = bytearray((bundle / name).read_bytes())
    data[len(data) // 2] ^= 1
    (bundle / name).write_bytes(data)
    with pytest.raises(CheckFailed, match=f"{name} is not the file"):
        Bundle.open(bundle)
    (bundle / name).write_bytes(data[:-1])
    with pytest.raises(CheckFailed, match=f"{name} has"):
        Bundle.open(bundle, check_hashes=False)
    (bundle / name).unlink()
    with pytest.raises(LawcatError, match=name):
        Bundle.open(bundle)


def _edit(bundle: Path, change: Any) -> None:
    model = onnx.load(bundle / "model.onnx", load_external_data=False)
    change(model)
    (bundle / "model.onnx").write_bytes(model.SerializeToString())
    rehash(bundle)


def _entry(tensor: Any, key: str, value: str) -> None:
    for entry in tensor.external_data:
        if entry.key == key:
            entry.value = value


def _external(model: Any) -> Any:
    return next(t for t in model.graph.initializer if t.external_data)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: _entry(_external(m), "location", "/etc/passwd"),
        lambda m: _entry(_external(m), "location", "../model.onnx.data"),
        lambda m: _entry(_external(m), "location", "*/_ORT_MEM_ADDR_/*"),
        lambda m: _entry(_external(m), "location", "model.onnx"),
        lambda m: _entry(_external(m), "location", ""),
        lambda m: _entry(_external(m), "offset", "99999999"),
        lambda m: _entry(_external(m), "offset", "-4"),
        lambda m: _entry(_external(m), "offset", "1e3"),
        lambda m: _entry(_external(m), "offset", str(1 << 63)),
        lambda m: _entry(_external(m), "length", "4"),
        lambda m: _external(m).external_data.add(key="offset", value="0"),
        lambda m: _external(m).dims.append(2),
        lambda m: _external(m).dims.append(1 << 40),
        lambda m: _external(m).dims.append(-1),
        lambda m: _external(m).dims.extend([1] * 20),
        lambda m: _external(m).ClearField("dims"),
        lambda m: setattr(_external(m), "data_type", 11),
        lambda m: setattr(_external(m), "data_type", 8),
        lambda m: setattr(_external(m), "data_location", 0),
        lambda m: setattr(_external(m), "raw_data", b"1234"),
        lambda m: m.graph.initializer[0].dims.append(1 << 30),
        lambda m: m.graph.ClearField("node"),
        lambda m: m.graph.ClearField("initializer"),
        lambda m: m.graph.ClearField("input"),
        lambda m: m.graph.output.pop(),
        lambda m: setattr(m.graph.input[0].type.tensor_type, "elem_type", 1),
        lambda m: setattr(m.graph.node[0], "op_type", "NoSuchOperator"),
        lambda m: setattr(m.opset_import[0], "version", 999),
    ],
)  # fmt: skip
def test_a_graph_that_lies_never_runs(bundle: Path, change: Any) -> None:
    _edit(bundle, change)
    with pytest.raises(LawcatError):
        Engine(Bundle.open(bundle), threads=1)
    with pytest.raises(CheckFailed):
        verify(bundle)


def test_tensors_hidden_in_attributes_are_checked_too() -> None:
    tensor = onnx.helper.make_tensor("t", 1, [1], [0.0])
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/passwd")
    inner = onnx.helper.make_graph([onnx.helper.make_node("Constant", [], ["y"], value=tensor)], "g", [], [])
    nested = onnx.helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=inner)
    function = onnx.helper.make_function(
        "d", "f", [], ["y"], [inner.node[0]], [onnx.helper.make_opsetid("", 21)]
    )
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["x"], ["y"])], "g", [], [])
    for model in (
        onnx.helper.make_model(onnx.helper.make_graph([nested], "g", [], [])),
        onnx.helper.make_model(graph, functions=[function]),
    ):
        with pytest.raises(LawcatError, match="/etc/passwd"):
            check_model(model.SerializeToString(), "model", lambda name: None)


def test_no_bytes_crash_the_reader_of_graphs(whole: Path) -> None:
    data = (whole / "model.onnx").read_bytes()
    rng = random.Random(0)
    refused = 0
    for i in range(600):
        broken = bytearray(data)
        if i % 3 == 0:
            broken = broken[: rng.randrange(len(broken))]
        for _ in range(rng.randrange(1, 4)):
            if broken:
                broken[rng.randrange(len(broken))] = rng.randrange(256)
        try:
            check_model(bytes(broken), "model", lambda name: 10_000)
        except LawcatError:
            refused += 1
    assert refused > 200


def test_wrong_weights_or_vectors_fail_the_replay(bundle: Path) -> None:
    data = bytearray((bundle / "model.onnx.data").read_bytes())
    half = slice(3, len(data) // 2, 4)
    data[half] = bytes(b ^ 0x80 for b in data[half])  # signs of the first half (of all: the same function!)
    (bundle / "model.onnx.data").write_bytes(data)
    rehash(bundle)
    with pytest.raises(CheckFailed, match="differ from the recorded"):
        verify(bundle)


def test_weights_that_are_not_finite_fail_the_replay(bundle: Path) -> None:
    data = bytearray((bundle / "model.onnx.data").read_bytes())
    data[0 : 260 * 32 * 4] = b"\x00\x00\xc0\x7f" * (260 * 32)
    (bundle / "model.onnx.data").write_bytes(data)
    rehash(bundle)
    with pytest.raises(CheckFailed):
        verify(bundle)


def test_no_vectors_is_not_a_pass(bundle: Path) -> None:
    rewrite_manifest(bundle, lambda data: data.update(parity=None))
    assert Bundle.open(bundle).manifest.parity is None
    with pytest.raises(CheckFailed, match="no parity vectors"):
        verify(bundle)


def test_a_newer_onnxruntime_and_a_missing_flavour_are_named(bundle: Path) -> None:
    with pytest.raises(LawcatError, match="--ops portable"):
        Engine(Bundle.open(bundle), flavour="portable")
    rewrite_manifest(bundle, lambda data: data.update(min_onnxruntime={"ort": "99.0"}))
    with pytest.raises(LawcatError, match=r"needs onnxruntime 99\.0 or newer"):
        Engine(Bundle.open(bundle))


def test_the_flavour_is_one_that_this_onnxruntime_can_run(bundle: Path) -> None:
    def both(data: dict[str, Any]) -> None:
        data["ops"].append("portable")
        data["graphs"]["portable"] = data["graphs"]["ort"]
        data["min_onnxruntime"] = {"ort": "99.0", "portable": "1.17.0"}

    rewrite_manifest(bundle, both)
    assert Engine(Bundle.open(bundle)).flavour == "portable"
    rewrite_manifest(bundle, lambda data: data["min_onnxruntime"].update(ort="1.25.1"))
    assert Engine(Bundle.open(bundle)).flavour == "ort"


def test_a_file_that_changes_while_it_is_loaded_is_noticed(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    data = (bundle / "model.onnx.data").read_bytes()
    (bundle / "model.onnx.data").write_bytes(data)
    with pytest.raises(CheckFailed, match="changed while"):
        Engine(opened)
