"""Bytes from outside: what a reader must refuse at once, in one sentence, in little time and memory."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from safetensors.numpy import save_file
from tiny_adapter import make_adapter
from tiny_bundle import build_tiny_bundle, rewrite_manifest

from lawcat_edge.adapter import Adapter
from lawcat_edge.config import LawcatConfig
from lawcat_edge.distill.settings import DistillSettings
from lawcat_edge.runtime import files
from lawcat_edge.runtime.bundle.graph_check import MAX_FIELDS, check_model
from lawcat_edge.runtime.bundle.manifest import Bundle, describe_files
from lawcat_edge.runtime.engine.rotary import inverse_frequencies
from lawcat_edge.runtime.errors import LawcatError
from lawcat_edge.runtime.template.chat import ChatTemplate
from lawcat_edge.weights import SafetensorsWeights

HELLO = [{"role": "user", "content": "x" * 1000}]


@pytest.mark.parametrize(
    "name",
    [
        "conin$",
        "CLOCK$.x",
        "com0",
        "lpt1.txt",
        "con .txt",
        " a",
        "a\x7f",
        "é",
        "a\u202eb",
        "ａ",
        "x. ",
        "nul ",
    ],
)
def test_names_that_mean_something_else_elsewhere(name: str) -> None:
    with pytest.raises(LawcatError, match="not allowed"):
        files.check_member_name(name)


@pytest.mark.parametrize("data", [b"[" + b"[]," * 1_000_000 + b"[]]", b"[1e999]", b"-1e400"])
def test_json_that_would_fill_the_memory_or_is_infinite(data: bytes) -> None:
    with pytest.raises(LawcatError, match="thing"):
        files.parse_json(data, "thing")


@pytest.mark.parametrize("text", ["a" * (4 << 20), "\\n" * (2 << 20), '\\"[{' * (1 << 20)])
def test_long_strings_cost_a_few_bytes_each(text: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    data = b'["' + text.encode() + b'"]'
    assert files.parse_json(data, "thing") == [json.loads(f'"{text}"')]
    if sys.platform == "linux":
        # A regular expression for strings took 120 bytes a character here.
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 40 * len(data) / 1024


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_a_pipe_or_a_device_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")
    for read in (lambda p: files.read_bytes(p, 10), files.sha256_file, files.read_json):
        for path in (tmp_path / "pipe.safetensors", Path("/dev/zero"), tmp_path):
            with pytest.raises(LawcatError, match=r"not a regular file|Is a directory"):
                read(path)
    with pytest.raises(LawcatError, match="not a regular file"):
        SafetensorsWeights(tmp_path)


def test_a_terabyte_of_holes_is_not_hashed(tmp_path: Path) -> None:
    with open(tmp_path / "model.gguf", "wb") as file:
        file.truncate(1 << 40)
    if not hasattr(os.stat(tmp_path), "st_blocks") or os.stat(tmp_path / "model.gguf").st_blocks > 1 << 20:
        pytest.skip("this file system keeps no holes")
    with pytest.raises(LawcatError, match=r"model\.gguf is mostly holes"):
        files.sha256_file(tmp_path / "model.gguf")


@pytest.mark.parametrize("name", ["adapter.safetensors", "lawcat_config.json"])
def test_an_adapter_is_read_from_its_own_folder_only(tmp_path: Path, name: str) -> None:
    make_adapter().save(tmp_path / "a")
    (tmp_path / "a" / name).rename(tmp_path / "elsewhere")
    (tmp_path / "a" / name).symlink_to("../elsewhere")
    with pytest.raises(LawcatError, match=f"{name} is a link that leaves"):
        Adapter.load(tmp_path / "a")
    (tmp_path / "a" / name).unlink()
    os.link(tmp_path / "elsewhere", tmp_path / "a" / name)
    with pytest.raises(LawcatError, match=f"{name} has a second hard link"):
        Adapter.load(tmp_path / "a")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("lora", {"rank": 2, "alpha": True}), ("lora", {"rank": 2, "alpha": 1e300}),
        ("lora", {"rank": 2, "alpha": 1.0, "more": 1}), ("teacher", "a\x1b]0;b\x07"),
        ("lawcat", {"gate_divisor": True}), ("lawcat", {"eps": 1e-40}), ("lawcat", {"gate_divisor": 1e-9}),
    ],
)  # fmt: skip
def test_a_hostile_field_of_an_adapter_is_named(tmp_path: Path, field: str, value: Any) -> None:
    make_adapter().save(tmp_path / "a")
    path = tmp_path / "a" / "lawcat_config.json"
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, field: value}))
    with pytest.raises(LawcatError, match=f"lawcat_config.json.*{field}"):
        Adapter.load(tmp_path / "a")


def test_an_adapter_that_claims_to_be_huge_is_not_read(tmp_path: Path) -> None:
    make_adapter().save(tmp_path / "a")
    path = tmp_path / "a" / "lawcat_config.json"
    data = json.loads(path.read_text())
    data["geometry"] |= {"num_layers": 1024, "hidden_size": 1 << 17}
    data["lora"] = {"rank": 4096, "alpha": 1.0}
    path.write_text(json.dumps(data))
    with pytest.raises(LawcatError, match="more than an adapter has"):
        Adapter.load(tmp_path / "a")


def _safetensors(header: Any, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "content",
    [
        _safetensors({"a": ENTRY, "b": ENTRY}, bytes(8)),  # overlap
        _safetensors({"a": {**ENTRY, "data_offsets": [8, 16]}}, bytes(16)),  # a gap
        _safetensors({"a": {**ENTRY, "shape": [1 << 40, 1 << 40]}}, bytes(8)),
        _safetensors({"a": {**ENTRY, "shape": [-2]}}, bytes(8)),
        _safetensors({"a": {**ENTRY, "shape": [True, 2]}}, bytes(8)),
        _safetensors({"a": {**ENTRY, "dtype": ["F32"]}}, bytes(8)),
        _safetensors({"a": {**ENTRY, "shape": [1] * 20 + [2]}}, bytes(8)),
        _safetensors(b'{"a":%s,"a":%s}' % ((json.dumps(ENTRY).encode(),) * 2), bytes(8)),
        _safetensors(b"[" * 100_000, b""),
        _safetensors([], b""),
        (1 << 63).to_bytes(8, "little") + b"{}",
    ],
)  # fmt: skip
def test_a_header_of_safetensors_that_lies(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(LawcatError, match=r"x.safetensors is damaged"):
        SafetensorsWeights(tmp_path)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_of_a_teacher_that_are_no_numbers_are_named(tmp_path: Path, value: float) -> None:
    save_file({"w": np.array([1, value], np.float32)}, tmp_path / "x.safetensors")
    with pytest.raises(LawcatError, match=r"x.safetensors: w holds NaN or infinity"):
        SafetensorsWeights(tmp_path).get("w")


@pytest.mark.parametrize("theta", [1e-300, 0.5, True, "1e4", 1e300])
def test_rotary_angles_stay_finite(theta: Any) -> None:
    with pytest.raises(LawcatError, match="rope_theta"):
        inverse_frequencies({"head_dim": 64, "rope_theta": theta})
    for factor in ("nan", "inf", 1e-300, 0):
        scaling = {"rope_type": "linear", "factor": factor}
        geometry = {"head_dim": 64, "rope_theta": 1e4, "rope_scaling": scaling}
        if factor == "inf":  # all angles zero: finite, and the maker's business
            assert np.isfinite(inverse_frequencies(geometry)).all()
            continue
        with pytest.raises(LawcatError, match="rope_scaling"):
            inverse_frequencies(geometry)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seed", -1), ("seed", 1 << 64), ("seed", True), ("warmup", 1.5), ("warmup", -0.1),
        ("warmup", float("nan")),
        ("lora_alpha", -1.0), ("lora_alpha", float("inf")), ("checkpoint_seconds", -1), ("window", -4),
        ("conv_kernel", 1), ("feature_dim", 5000), ("answer_weight", float("nan")), ("lr_lora", True),
        ("rope", 1), ("task_mix", 3), ("lora_rank", 1 << 20), ("transfer_tokens", 1 << 60),
        ("batch_size", 1 << 40),
    ],
)  # fmt: skip
def test_every_setting_of_a_distillation_has_a_range(name: str, value: Any) -> None:
    with pytest.raises(LawcatError, match=f"{name} must be"):
        DistillSettings().with_changes({name: value})


def test_a_config_that_is_no_object_is_named() -> None:
    nothing: Any = []
    with pytest.raises(LawcatError, match="JSON object"):
        LawcatConfig.from_dict(nothing)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_bundle(tmp_path_factory.mktemp("outside") / "b")


def _branch(model: Any) -> None:
    inner = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["x0"], ["z"])], "g", [], [])
    model.graph.node.append(onnx.helper.make_node("If", ["c"], ["z"], then_branch=inner, else_branch=inner))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_branch, "a loop or a branch"),
        (lambda m: setattr(m.graph.node[0], "domain", "my.own.kernels"), "'my.own.kernels'"),
        (
            lambda m: m.functions.append(
                onnx.helper.make_function("d", "f", [], [], [], [onnx.helper.make_opsetid("", 21)])
            ),
            "a function of its own",
        ),
    ],
)
def test_a_graph_that_no_export_writes_is_refused(
    bundle: Path, tmp_path: Path, change: Any, said: str
) -> None:
    folder = Path(shutil.copytree(bundle, tmp_path / "b"))
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    change(model)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    names = [p.name for p in folder.iterdir() if p.name != "lawcat_bundle.json"]
    rewrite_manifest(folder, lambda data: data.update(files=describe_files(folder, names)))
    with pytest.raises(LawcatError, match=f"model.onnx has .*{said}"):
        Bundle.open(folder)


def test_a_graph_of_empty_fields_is_read_in_seconds() -> None:
    node = b"\x0a\x00" * (MAX_FIELDS // 2)  # inputs without a name
    graph = b"\x0a" + _varint(len(node)) + node
    began = time.monotonic()
    with pytest.raises(LawcatError, match="fields"):
        check_model((b"\x3a" + _varint(len(graph)) + graph) * 3, "model", lambda name: None)
    assert time.monotonic() - began < 60  # a minute of a busy machine; three seconds of a quiet one


def _varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


@pytest.mark.parametrize("where", ["name", "created_by", "scheme"])
def test_a_manifest_cannot_write_to_the_terminal(bundle: Path, tmp_path: Path, where: str) -> None:
    folder = Path(shutil.copytree(bundle, tmp_path / "b"))
    rewrite_manifest(folder, lambda data: data.update({where: "\x1b[2Jnice"}))
    with pytest.raises(LawcatError, match=f"{where} must be a text"):
        Bundle.open(folder)


@pytest.mark.parametrize(
    "source",
    [
        "{{ 1|round(999999999, 'ceil') }}", "{{ 5|round(-1000000000) }}",
        "{% set a = [[1]] * 600000 %}{{ a|sum(start=[])|length }}",
        "{% set a = range(100000)|list %}{{ a|select('in', a)|list|length }}",
        "{% set a = range(100000)|list %}{% for x in a %}{% if x in a %}{% endif %}{% endfor %}",
        "{% set a = 'x' * 1000 %}" + "{% set a %}{{ a }}{{ a }}{% endset %}" * 30,
        "{% set a = 'x' * 1000000 %}{% macro m() %}{% for i in range(100000) %}{{ a }}{% endfor %}"
        "{% endmacro %}{{ m()|length }}",
        "{% filter upper %}{% for i in range(100000) %}" + "y" * 200_000 + "{% endfor %}{% endfilter %}",
        "{% set a = 'x' * 1000000 %}{% for i in range(100000) %}{% if a ~ i == a %}{% endif %}{% endfor %}",
        "{% set a = range(90000)|list %}{% for i in range(100000) %}{% set b = a[1:] %}{% endfor %}",
    ],
)  # fmt: skip
def test_a_template_that_would_run_for_ever_or_fill_the_memory(source: str) -> None:
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(LawcatError, match=r"too|no number"):
        ChatTemplate(source).render(HELLO)
    assert time.monotonic() - began < 30
    if sys.platform == "linux":
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000


def test_a_long_conversation_fits_a_template() -> None:
    source = "{% for m in messages %}{{ '<' + m.role + '>' + (m.content | trim) ~ '\n' }}{% endfor %}"
    text = ChatTemplate(source).render([{"role": "user", "content": "long " * 2_000_000}, *HELLO * 500])
    assert len(text) > 10_000_000


def test_a_teachers_folder_with_a_peft_adapter_is_refused(tmp_path: Path) -> None:
    from lawcat_edge import teacher

    (tmp_path / "adapter_config.json").write_text("{}")
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_text("{}")
    geometry: Any = SimpleNamespace()
    original, teacher._geometry = teacher._geometry, lambda path: geometry
    try:
        with pytest.raises(LawcatError, match="peft adapter"):
            teacher.resolve(tmp_path)
    finally:
        teacher._geometry = original


def test_what_was_hashed_is_what_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file of an adapter changes right after its hash was taken: the old tensors are read, or none."""
    make_adapter(seed=1).save(tmp_path / "a")
    make_adapter(seed=2).save(tmp_path / "b")
    want = Adapter.load(tmp_path / "a").tensors
    real = hashlib.sha256

    def swapping(*args: Any) -> Any:
        other = (tmp_path / "b" / "adapter.safetensors").read_bytes()
        (tmp_path / "a" / "adapter.safetensors").write_bytes(other)
        return real(*args)

    monkeypatch.setattr("lawcat_edge.adapter.hashlib.sha256", swapping)
    got = Adapter.load(tmp_path / "a").tensors
    assert all(np.array_equal(got[name], want[name]) for name in want)
