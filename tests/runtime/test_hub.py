"""Bundles and adapters by name, against a hub on this machine that the real huggingface_hub talks to."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from stand_in_hub import Hub, stand_in_hub
from tiny_adapter import make_adapter
from tiny_bundle import build_tiny_bundle
from tiny_teacher import make_teacher

from lawcat_edge.adapter import Adapter, adapter_folder
from lawcat_edge.cli import run
from lawcat_edge.runtime import Model
from lawcat_edge.runtime.bundle.hub import fetch, located
from lawcat_edge.runtime.bundle.manifest import Bundle
from lawcat_edge.runtime.errors import CheckFailed, LawcatError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with stand_in_hub() as hub:
        monkeypatch.setenv("LAWCAT_EDGE_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
        monkeypatch.setenv("HF_TOKEN", "secret")
        monkeypatch.chdir(tmp_path)
        yield hub


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_bundle(tmp_path_factory.mktemp("bundle") / "tiny", seed=3)


def test_a_bundle_by_its_name_is_fetched_once_and_checked(hub: Hub, bundle: Path) -> None:
    hub.add("someone/tiny", bundle)
    model = Model.load("someone/tiny", threads=1)
    expected = Model.load(bundle, threads=1).generate("abc", max_new_tokens=8).text
    assert model.generate("abc", max_new_tokens=8).text == expected
    assert sorted(path.name for path in model.bundle.folder.iterdir()) == sorted(
        path.name for path in bundle.iterdir()
    )
    hub.asked.clear()
    assert Bundle.open("hub:someone/tiny").folder == model.bundle.folder
    assert hub.asked == ["api/models/someone/tiny/revision/main"]


def test_a_new_commit_is_taken_and_an_old_one_can_be_named(hub: Hub, bundle: Path, tmp_path: Path) -> None:
    hub.add("someone/tiny", bundle)
    first = fetch("someone/tiny")
    other = build_tiny_bundle(tmp_path / "other", seed=4)
    hub.add("someone/tiny", other)
    assert Bundle.open("someone/tiny").sha256 == Bundle.open(other).sha256
    assert located(f"someone/tiny@{hub.commit('someone/tiny', 0)}") == first
    with pytest.raises(LawcatError, match="has no revision 'v9'"):
        located("someone/tiny@v9")


def test_an_altered_file_is_refused_and_not_kept(hub: Hub, bundle: Path, tmp_path: Path) -> None:
    data = bytearray((bundle / "model.onnx.data").read_bytes())
    data[1000] ^= 1
    hub.add("someone/tiny", bundle, model_onnx_data=bytes(data))
    with pytest.raises(CheckFailed, match=r"model\.onnx\.data of someone/tiny is not the file"):
        Bundle.open("someone/tiny")
    hub.add("someone/tiny", bundle, model_onnx_data=bytes(data[:-1]))
    hub.asked.clear()
    with pytest.raises(CheckFailed, match=r"model\.onnx\.data of someone/tiny has .* bytes"):
        Bundle.open("someone/tiny")
    assert not any("resolve" in path and "data" in path for path in hub.asked)  # not even fetched
    hub.add("someone/tiny", bundle)
    assert Bundle.open("someone/tiny").sha256 == Bundle.open(bundle).sha256


def test_an_adapter_by_its_name(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = make_adapter()
    more = {"train_log.jsonl": b"{}", "generation_config.json": b'{"min_p": 0.1}'}
    adapter.save(tmp_path / "mine", extra=more)
    hub.add("someone/adapter", tmp_path / "mine")
    got = Adapter.load("someone/adapter")
    assert got.sha256 == Adapter.load(tmp_path / "mine").sha256
    assert got.generation == {"min_p": 0.1}
    assert run(["info", "someone/adapter"]) == 0
    assert "adapter " in capsys.readouterr().out
    hub.add("someone/adapter", tmp_path / "mine", adapter_safetensors=b"12345678")
    with pytest.raises(CheckFailed, match=r"adapter\.safetensors of someone/adapter is not the file"):
        Adapter.load("someone/adapter")


def test_without_a_connection_the_last_one_fetched(
    hub: Hub, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("someone/tiny", bundle)
    kept = fetch("someone/tiny")
    with socket.create_server(("127.0.0.1", 0)) as closed:
        nobody = f"http://127.0.0.1:{closed.getsockname()[1]}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", nobody)
    assert located("someone/tiny") == kept
    with pytest.raises(LawcatError, match=r"hub cannot be reached to look for it \(offline\?\)"):
        Model.load("someone/other")


def test_slips_in_paths_are_none_of_the_hubs_business(hub: Hub, bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "bundles").mkdir()
    for slip in ("bundles/tinny", "./someone/tiny", "nowhere", "a/b/c", "../x/y", str(tmp_path / "none")):
        with pytest.raises(LawcatError, match="There is no bundle folder"):
            Model.load(slip)
    assert hub.asked == []
    with pytest.raises(LawcatError, match=r"no name on the hub; write hub:owner/name"):
        Model.load("hub:bundles/a/b")
    with pytest.raises(LawcatError, match="no model of this name"):
        Model.load("someone/nothing")
    hub.add("someone/folder", tmp_path / "bundles")
    with pytest.raises(LawcatError, match="neither a bundle nor an adapter"):
        Model.load("someone/folder")


def test_the_command_line_answers_from_the_hub(hub: Hub, bundle: Path, tmp_path: Path) -> None:
    """In a process of its own, as a user runs it."""
    hub.add("someone/tiny", bundle)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_ENDPOINT": hub.address}
    command = [sys.executable, "-m", "lawcat_edge", "chat", "someone/tiny", "--max-new-tokens", "4"]
    done = subprocess.run(
        command, env=environment, cwd=tmp_path, input="Hello\n", capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    expected = Model.load(bundle, threads=1).chat("Hello", max_new_tokens=4).text
    assert done.stdout.strip() == expected.strip()


def test_export_pushes_a_bundle_with_its_card(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = make_teacher(tmp_path / "teacher")
    export = ["export", str(teacher), "--scheme", "fp32", "--overwrite", "--out", str(tmp_path / "b")]
    push = ["--push", "someone/new", "--private"]
    assert run([*export, "--ops", "ort,portable", *push]) == 0
    assert f"{hub.address}/someone/new/commit/" in capsys.readouterr().out
    assert hub.private == {"someone/new"}
    assert Bundle.open("someone/new").sha256 == Bundle.open(tmp_path / "b").sha256
    contents = hub.commits["someone/new"][-1]
    card = contents["README.md"].decode()
    assert "lawcat-edge chat someone/new" in card
    assert "library_name: lawcat-edge" in card
    assert "model_portable.onnx" in contents
    # The next bundle takes the former one's place, and leaves the rest alone.
    hub.commits["someone/new"][-1]["LICENCE.txt"] = b"mine"
    assert run([*export, *push]) == 0
    contents = hub.commits["someone/new"][-1]
    assert "model_portable.onnx" not in contents
    assert contents["LICENCE.txt"] == b"mine"
    assert Bundle.open("someone/new").sha256 == Bundle.open(tmp_path / "b").sha256


def test_a_refused_push_leaves_the_bundle(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = make_teacher(tmp_path / "teacher")
    export = ["export", str(teacher), "--scheme", "fp32", "--out", str(tmp_path / "b"), "--push"]
    assert run([*export, "no-owner"]) == 2
    assert "that would be owner/name" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()
    hub.writers.clear()
    assert run([*export, "someone/new"]) == 2
    assert "refused someone/new" in (error := capsys.readouterr().err)
    assert "hf auth login" in error
    Bundle.open(tmp_path / "b")


def test_the_published_adapter_comes_with_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its name, anywhere; also where an installer linked its files from a cache of its own."""
    monkeypatch.chdir(tmp_path)
    folder = adapter_folder("smollm2-135m-general")
    assert (folder / "adapter.safetensors").is_file()
    installed = tmp_path / "installed" / "smollm2-135m-general"
    installed.mkdir(parents=True)
    for name in ("lawcat_config.json", "adapter.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
        os.link(tmp_path / name, installed / name)
    monkeypatch.setattr("lawcat_edge.adapter.INSTALLED", installed.parent)
    assert Adapter.load("smollm2-135m-general").sha256 == Adapter.load(folder).sha256
    with pytest.raises(LawcatError, match="is no adapter"):
        Adapter.load("smollm2-135m-other")
