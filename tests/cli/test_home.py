"""Paths as people write them (``~``), homes that are not there, and what a shell asks of the command line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_adapter import make_adapter
from tiny_bundle import build_tiny_bundle
from tiny_teacher import make_teacher

from lawcat_edge import cli
from lawcat_edge.runtime.errors import LawcatError
from lawcat_edge.runtime.files import user_path
from lawcat_edge.teacher import cache_folder, resolve

ROOT = Path(__file__).resolve().parents[2]
# Without HOME, Python asks the passwd database; a container's user is often not in it.
NO_PASSWD = """
import pwd, sys
def nobody(uid):
    raise KeyError(uid)
pwd.getpwuid = nobody
from lawcat_edge.cli import main
main(sys.argv[1:])
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    place = tmp_path / "home"
    build_tiny_bundle(place / "bundle")
    monkeypatch.setenv("HOME", str(place))
    monkeypatch.chdir(tmp_path)
    return place


def homeless(folder: Path, *arguments: str | Path, **more: str) -> subprocess.CompletedProcess[str]:
    """One command without a home folder, run in ``folder``."""
    environment = {name: value for name, value in os.environ.items() if name not in ("HOME", "HF_HOME")}
    return subprocess.run(
        [sys.executable, "-c", NO_PASSWD, *map(str, arguments)], cwd=folder, capture_output=True, text=True,
        env={**environment, "PYTHONPATH": str(ROOT), **more}, timeout=120, check=False,
    )  # fmt: skip


def test_home_in_every_path_of_a_command(home: Path, capsys: Any) -> None:
    (home / "text.txt").write_text("the sea")
    make_adapter().save(home / "adapter")
    make_teacher(home / "teacher")
    read = ("generate", "~/bundle", "--file=~/text.txt", "--prompt", "~/x", "--max-new-tokens", "2")
    assert cli.run([*read, "--save-snapshot=~/read.state"]) == 0
    assert (home / "read.state").is_file()
    assert cli.run(["generate", "~/bundle", "--load-snapshot=~/read.state", "--prompt", "a"]) == 0
    assert cli.run(["info", "~/adapter"]) == 0
    assert cli.run(["verify", "~/bundle"]) == 0
    out = ("--contexts", "64", "--decode-tokens", "2", "--out=~/bench.json")
    assert cli.run(["bench", "~/bundle", *out]) == 0
    assert (home / "bench.json").is_file()
    assert cli.run(["export", "~/teacher", "--out=~/new", "--scheme", "fp32", "--no-verify"]) == 0
    assert (home / "new" / "lawcat_bundle.json").is_file()
    assert cli.run(["eval", "~/new", "--task", "perplexity", "--text", "~/*.md"]) == 2
    assert "No file matches '~/*.md'" in capsys.readouterr().err
    assert not Path("~").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["info", "~nobody-of-this-name/b"],
        ["generate", "~/bundle", "--file", "~nobody-of-this-name/t", "--prompt", "x"],
        ["export", "~nobody-of-this-name/t", "--out", "b"],
        ["export", "~/bundle", "--out", "~nobody-of-this-name/b"],
        ["export", "~/bundle", "--out", "b", "--scheme", "~nobody-of-this-name/s.json"],
        ["distill", "~/bundle", "--out", "b", "--recipe", "~nobody-of-this-name/r.json"],
        ["eval", "~/bundle", "--task", "perplexity", "--text", "~nobody-of-this-name/*.txt"],
    ],
)
def test_the_home_of_nobody_is_one_sentence(home: Path, capsys: Any, arguments: list[str]) -> None:
    assert cli.run(arguments) == 2
    message = capsys.readouterr().err
    assert "There is no home folder for '~nobody-of-this-name'" in message
    assert len([line for line in message.splitlines() if line.startswith("Error")]) == 1
    assert not Path("~nobody-of-this-name").exists()


def test_without_a_home_what_needs_none_works(tmp_path: Path) -> None:
    bundle, teacher = build_tiny_bundle(tmp_path / "bundle"), make_teacher(tmp_path / "teacher")
    work = tmp_path / "work"
    work.mkdir()
    done = homeless(work, "generate", bundle, "--prompt", "Hello", "--max-new-tokens", "2")
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr
    done = homeless(work, "export", teacher, "--out", work / "b", "--scheme", "fp32", "--no-verify")
    assert done.returncode == 0, done.stderr
    assert [path.name for path in work.iterdir()] == ["b"]  # and no folder named ~
    done = homeless(work, "info", "~/bundle")
    assert done.returncode == 2
    assert done.stderr == "Error: There is no home folder for '~' (~/bundle); write the whole path.\n"


def test_without_a_home_a_conversion_asks_for_a_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nobody() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nobody)
    monkeypatch.delenv("LAWCAT_EDGE_CACHE", raising=False)
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(LawcatError, match="set LAWCAT_EDGE_CACHE to a folder"):
        resolve(tmp_path / "m.gguf")
    monkeypatch.setenv("LAWCAT_EDGE_CACHE", str(tmp_path / "c"))
    assert cache_folder() == tmp_path / "c"


def test_a_cache_in_the_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAWCAT_EDGE_CACHE", "~/c")
    assert cache_folder() == home / "c"
    assert user_path("a~/b") == Path("a~/b")


def test_an_offline_hub_is_one_line(tmp_path: Path) -> None:
    """The endpoint is a port of this machine on which nobody listens."""
    place = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "hf")}
    done = homeless(tmp_path, "export", "owner/name", "--out", "b", **place)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("Error: The teacher 'owner/name' is no local path, and the hub cannot be reached")


@pytest.mark.parametrize("command", [[], ["generate"], ["distill"]])
def test_short_help(capsys: Any, command: list[str]) -> None:
    assert cli.run([*command, "--help"]) == 0
    long = capsys.readouterr().out
    assert cli.run([*command, "-h"]) == 0
    assert capsys.readouterr().out == long
    assert "-h, --help" in long


def complete(*words: str) -> list[str]:
    asked = {"_LAWCAT_EDGE_COMPLETE": "complete_bash", "COMP_WORDS": " ".join(["lawcat-edge", *words])}
    done = subprocess.run(
        [sys.executable, "-m", "lawcat_edge"], capture_output=True, text=True, check=False, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COMP_CWORD": str(len(words)), **asked},
    )  # fmt: skip
    assert done.stderr == ""
    return done.stdout.split()


def test_a_shell_completes_commands_and_options() -> None:
    assert complete("ge") == ["generate"]
    assert set(complete("")) == set(cli.COMMANDS)
    assert complete("export", "--sche") == ["--scheme"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_for_a_shell(shell: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lawcat_edge", "--show-completion", shell], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"},
        check=False, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "_LAWCAT_EDGE_COMPLETE" in done.stdout
