"""The adapter on disk: what was saved comes back, and what is wrong with it is named in one sentence."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny_adapter
from safetensors.numpy import load_file, save_file
from tiny_adapter import CONFIG, make_adapter

from lawcat_edge import adapter as adapter_module
from lawcat_edge.adapter import Adapter
from lawcat_edge.config import LawcatConfig
from lawcat_edge.lora import ALL_LINEAR, LoraSettings
from lawcat_edge.runtime.errors import LawcatError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_adapter(lora=LoraSettings(2, 4.0)).save(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("lora", [None, LoraSettings(2, 4.0), LoraSettings(2, 4.0, ALL_LINEAR)])
@pytest.mark.parametrize("config", [CONFIG, LawcatConfig(feature_dim=3, conv_kernel=2, rope=True)])
def test_round_trip(tmp_path: Path, config: LawcatConfig, lora: LoraSettings | None, half: bool) -> None:
    saved = make_adapter(config, lora)
    saved.save(tmp_path / "a", half=half, extra={"train_log.jsonl": b"{}\n"})
    loaded = Adapter.load(str(tmp_path / "a"))
    facts = ("config", "geometry", "teacher", "teacher_sha256", "lora", "training")
    assert all(getattr(loaded, name) == getattr(saved, name) for name in facts)
    assert loaded.tensors.keys() == saved.tensors.keys()
    assert any(name.endswith("omega") for name in loaded.tensors) == (config.window > 0)
    for name, value in loaded.tensors.items():
        want = saved.tensors[name]
        assert value.dtype == np.float32
        assert np.array_equal(value, want.astype(np.float16).astype(np.float32) if half else want), name
    file = tmp_path / "a" / "adapter.safetensors"
    assert loaded.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    assert {v.dtype for v in load_file(file).values()} == {np.dtype(np.float16 if half else np.float32)}
    assert (tmp_path / "a" / "train_log.jsonl").read_bytes() == b"{}\n"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]  # no temporary name, no lock


def test_the_names_are_those_of_the_design() -> None:
    shapes = make_adapter(lora=LoraSettings(2, 4.0)).expected_shapes()
    layer = {name.removeprefix("layers.1."): s for name, s in shapes.items() if name.startswith("layers.1.")}
    assert layer == {
        "conv_q": (24, 4), "conv_k": (24, 4), "feature": (4, 6, 4), "gate_a": (12, 2), "gate_b": (2, 16),
        "gate_bias": (16,), "omega": (4,),
        "q_proj.lora_A": (2, 12), "q_proj.lora_B": (24, 2),
        "k_proj.lora_A": (2, 12), "k_proj.lora_B": (12, 2),
        "v_proj.lora_A": (2, 12), "v_proj.lora_B": (12, 2),
        "o_proj.lora_A": (2, 24), "o_proj.lora_B": (12, 2),
    }  # fmt: skip
    assert len(shapes) == 2 * len(layer)


def test_another_teacher_is_refused() -> None:
    teacher: Any = SimpleNamespace(name="other", sha256="cd" * 32)
    with pytest.raises(
        LawcatError, match=r"belongs to the teacher 'toy' .* not to 'other'.*give the teacher"
    ):
        make_adapter().check_teacher(teacher)
    teacher.sha256 = "ab" * 32
    make_adapter().check_teacher(teacher)


def refuse(folder: Path, *said: str) -> None:
    with pytest.raises(LawcatError) as caught:
        Adapter.load(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert caught.value.exit_code == 2
    for text in (str(folder), *said):
        assert text in message, message


def set_tensors(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Other tensors in a folder that is whole otherwise, its hash too."""
    file = folder / "adapter.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    set_config(folder, tensors_sha256=hashlib.sha256(file.read_bytes()).hexdigest())


def set_config(folder: Path, **changes: Any) -> None:
    file = folder / "lawcat_config.json"
    data = json.loads(file.read_text())
    for name, value in changes.items():
        data.pop(name) if value is None else data.update({name: value})
    file.write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop("layers.1.gate_b"), "None"),
        (lambda t: t.update({"layers.1.gate_b": np.zeros((2, 15), np.float32)}), "(2, 15)"),
        (lambda t: t.update({"layers.1.gate_b": np.zeros((16, 2), np.float32)}), "(2, 16)"),
        (lambda t: t["layers.1.gate_b"].__setitem__((0, 3), np.nan), "NaN or infinity"),
        (lambda t: t["layers.1.gate_b"].__setitem__((0, 3), -np.inf), "NaN or infinity"),
        (lambda t: t.update({"layers.1.gate_b": np.zeros((2, 16), np.int32)}), "must be F16 or F32"),
        (lambda t: t.update({"layers.1.gate_b": np.zeros((2, 16), np.float64)}), "must be F16 or F32"),
    ],
)
def test_a_wrong_tensor_is_named(folder: Path, change: Any, said: str) -> None:
    set_tensors(folder, change)
    refuse(folder, "adapter.safetensors", "'layers.1.gate_b'", said)


def test_an_extra_tensor_is_named(folder: Path) -> None:
    set_tensors(folder, lambda t: t.update({"layers.2.omega": np.zeros(4, np.float32)}))
    refuse(folder, "'layers.2.omega'")


@pytest.mark.parametrize("position", [0, 9, 400, -1])
def test_a_flipped_byte_is_noticed(folder: Path, position: int) -> None:
    file = folder / "adapter.safetensors"
    data = bytearray(file.read_bytes())
    data[position] ^= 1
    file.write_bytes(data)
    refuse(folder, "adapter.safetensors", "sha256")


@pytest.mark.parametrize("size", [0, 7, 100, -1])
@pytest.mark.parametrize("hashed", [False, True])
def test_a_truncated_file_is_refused_even_with_its_own_hash(folder: Path, size: int, hashed: bool) -> None:
    file = folder / "adapter.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    if hashed:
        set_config(folder, tensors_sha256=hashlib.sha256(file.read_bytes()).hexdigest())
    refuse(folder, "adapter.safetensors", "damaged or truncated" if hashed else "sha256")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "\x00", '{"format": NaN}', '{"a": 1, "a": 2}', "[" * 9999]
)
def test_bad_json_is_refused(folder: Path, text: str) -> None:
    (folder / "lawcat_config.json").write_text(text)
    refuse(folder, "lawcat_config.json")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("format", None), ("format", True), ("format", 2), ("lawcat", None), ("lawcat", []),
        ("geometry", "x"), ("lawcat", {"conv_kernel": 99}), ("lawcat", {"colour": 3}),
        ("lawcat", {"eps": "small"}),
        ("geometry", {}), ("geometry", {"family": "llama"}), ("teacher", None), ("teacher_sha256", 7),
        ("training", None), ("tensors_sha256", None), ("lora", 5), ("lora", {"rank": 0, "alpha": 1}),
        ("lora", {"rank": 2}), ("lora", {"rank": 1 << 40, "alpha": 1.0}), ("lora", {"rank": 2, "alpha": "x"}),
    ],
)  # fmt: skip
def test_a_wrong_field_is_named(folder: Path, field: str, value: Any) -> None:
    set_config(folder, **{field: value})
    refuse(folder, "lawcat_config.json", field)


def test_what_is_no_adapter_says_so(tmp_path: Path, folder: Path) -> None:
    refuse(tmp_path, "no lawcat_config.json", "lawcat-edge distill")
    refuse(tmp_path / "nowhere", "no lawcat_config.json")
    (folder / "adapter.safetensors").unlink()
    refuse(folder, "no adapter.safetensors")


@pytest.mark.parametrize(
    ("value", "half", "said"), [(np.nan, False, "lower rate"), (1e6, True, "leave --half away")]
)
def test_numbers_that_cannot_be_stored_leave_the_old_adapter(
    folder: Path, value: float, half: bool, said: str
) -> None:
    before = Adapter.load(folder).sha256
    bad = make_adapter(seed=1)
    bad.tensors["layers.0.omega"][1] = value
    with pytest.raises(LawcatError, match=rf"'layers\.0\.omega'.*{said}"):
        bad.save(folder, half=half)
    assert Adapter.load(folder).sha256 == before


def test_a_failure_in_the_middle_of_saving_leaves_the_old_one(folder: Path, monkeypatch: Any) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(adapter_module, "write_json", full)
    with pytest.raises(LawcatError, match="No space left"):
        make_adapter(seed=1).save(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [p.name for p in folder.parent.iterdir()] == ["adapter"]


def test_a_kill_in_the_middle_of_saving_leaves_the_old_one(folder: Path) -> None:
    before = Adapter.load(folder).sha256
    code = f"""
        import os, signal, sys
        sys.path.insert(0, {str(Path(tiny_adapter.__file__).parent)!r})
        from pathlib import Path
        from lawcat_edge import adapter as adapter_module
        from tiny_adapter import make_adapter
        adapter_module.write_json = lambda *a: os.kill(os.getpid(), signal.SIGKILL)
        make_adapter(seed=1).save(Path({str(folder)!r}))
    """
    lines = "\n".join(line.strip() for line in code.splitlines())
    done = subprocess.run([sys.executable, "-c", lines], env=os.environ, check=False, timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert Adapter.load(folder).sha256 == before
    make_adapter(seed=2).save(folder)  # the next writer is not held up, and sweeps away what was left
    assert Adapter.load(folder).sha256 != before
    assert [p.name for p in folder.parent.iterdir()] == ["adapter"]


def test_a_folder_of_something_else_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"meow")
    with pytest.raises(LawcatError, match="photos holds other files"):
        make_adapter().save(tmp_path / "photos")
    assert (tmp_path / "photos" / "cat.jpg").read_bytes() == b"meow"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"conv_kernel": 1}, "conv_kernel"), ({"window": -1}, "window"), ({"rope": 1}, "rope"),
        ({"feature_dim": 2.0}, "feature_dim"), ({"gate_divisor": 0}, "gate_divisor"), ({"eps": -1e-9}, "eps"),
    ],
)  # fmt: skip
def test_settings_out_of_range_are_named(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(LawcatError, match=said):
        LawcatConfig(**settings)


def test_another_window_keeps_every_tensor(folder: Path) -> None:
    loaded = Adapter.load(folder)
    assert CONFIG.window > 0
    assert loaded.with_window(None) is loaded
    assert loaded.with_window(CONFIG.window) is loaded
    wider = loaded.with_window(CONFIG.window + 5)
    assert wider.config.window == CONFIG.window + 5
    assert wider.tensors is loaded.tensors
    assert set(wider.expected_shapes()) == set(wider.tensors)
    with pytest.raises(LawcatError, match="at least 1"):
        loaded.with_window(0)
    with pytest.raises(LawcatError, match="from 0 to 8192"):
        loaded.with_window(10_000)
    with pytest.raises(LawcatError, match="without a window"):
        make_adapter(LawcatConfig(feature_dim=3)).with_window(64)
