"""The command line as a user meets it: help, exit codes, one sentence an error, JSON alone on stdout."""

from __future__ import annotations

import dataclasses
import errno
import importlib.util
import inspect
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import typer
from tiny_teacher import make_teacher, write_corpus

from lawcat_edge import __version__, cli
from lawcat_edge.adapter import Adapter
from lawcat_edge.commands.distill import distill as distill_command
from lawcat_edge.distill.settings import DistillSettings
from lawcat_edge.runtime.errors import CheckFailed, LawcatError

COMMANDS = [name for name in cli.COMMANDS if importlib.util.find_spec(f"lawcat_edge.commands.{name}")]
HEAVY = ("torch", "transformers", "onnxruntime", "onnx", "peft", "accelerate", "numpy", "matplotlib")
SHORT = ("--tokens", "128", "--seq-len", "64")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("cli")
    make_teacher(base / "teacher")
    write_corpus(base / "text.txt")
    return base


def one_sentence(capsys: Any, *said: str) -> str:
    """The last line of stderr, checked to be an error in one sentence with nothing on stdout."""
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    message = captured.err.strip().splitlines()[-1]
    assert message.startswith("Error: ")
    assert message.endswith(".")
    for text in said:
        assert text in message, message
    return message


def test_commands_are_those_of_the_contract() -> None:
    contract = {"distill", "export", "verify", "info", "generate", "chat", "compare", "eval", "bench", "demo"}
    assert contract <= set(cli.COMMANDS)
    assert {"distill", "export", "generate", "chat", "eval"} <= set(COMMANDS)


def test_every_help_lists_examples_and_loads_nothing_heavy() -> None:
    code = f"""
        import sys, contextlib, io
        from lawcat_edge.cli import run
        texts = {{}}
        for words in [["--help"], ["--version"], *([name, "--help"] for name in {COMMANDS})]:
            with contextlib.redirect_stdout(io.StringIO()) as out:
                assert run(words) == 0, words
            texts[words[0]] = " ".join(out.getvalue().split())
        heavy = [m for m in {HEAVY} if m in sys.modules]
        assert not heavy, heavy
        import json
        print(json.dumps(texts))
    """
    done = python(code)
    assert done.returncode == 0, done.stderr
    texts = json.loads(done.stdout)
    assert texts["--version"] == f"lawcat-edge {__version__}"
    for name, summary in cli.COMMANDS.items():
        assert f"{name} {summary}" in texts["--help"]
    assert "Example" in texts["--help"]
    for name in COMMANDS:
        assert texts[name].count(f"lawcat-edge {name}") >= 2, name  # the usage line and an example
        assert "Example" in texts[name], name
        assert "--json" in texts[name] or name in ("chat", "demo"), name


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    lines = [line[8:] for line in code.splitlines()]
    return subprocess.run(
        [sys.executable, "-c", "\n".join(lines)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nonsense"], "nonsense"),
        (["distill"], "argument"),
        (["distill", "x", "--out", "y", "--colour", "3"], "--colour"),
        (["distill", "x", "--out", "y", "--tokens", "many"], "--tokens"),
        (["distill", "x", "--out", "y", "--seed", "-1"], "--seed"),
        (["--colour"], "--colour"),
    ],
)
def test_a_mistake_in_the_arguments_exits_with_2(capsys: Any, arguments: list[str], said: str) -> None:
    assert cli.run(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert said in captured.err
    assert "Traceback" not in captured.err


def test_without_arguments_the_help_is_shown(capsys: Any) -> None:
    assert cli.run([]) == 2
    captured = capsys.readouterr()
    assert "distill" in captured.out + captured.err


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (LawcatError("The sky fell; look up."), 2, "The sky fell; look up."),
        (CheckFailed("The sum is wrong; export again."), 1, "The sum is wrong"),
        (OSError(errno.ENOSPC, "No space left", "/big"), 2, "The disk is full (/big); free some space"),
        (OSError(errno.EDQUOT, "Quota"), 2, "The disk is full; free some space"),
        (PermissionError(errno.EACCES, "no", "/root/x"), 2, "No permission to write or read (/root/x)"),
        (OSError(errno.EROFS, "no"), 2, "No permission"),
        (FileNotFoundError(errno.ENOENT, "no", "gone"), 2, "No such file or directory (gone); check"),
        (IsADirectoryError(errno.EISDIR, "no", "d"), 2, "Is a directory (d)"),
        (OSError("Can't load the model.\nMore lines"), 2, "Can't load the model; check"),
        (MemoryError(), 2, "Memory ran out"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
            2,
            "Memory ran",
        ),
        (RuntimeError("CUDA out of memory. Tried to allocate"), 2, "Memory ran out"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid"), 2, "not UTF-8 text (byte 0)"),
        (ModuleNotFoundError("no", name="torch"), 2, "package torch; run pip install 'lawcat-edge[build]'"),
        (ModuleNotFoundError("no", name="pyarrow.parquet"), 2, "'lawcat-edge[data]'"),
        (KeyboardInterrupt(), 130, ""),
        (typer.Abort(), 130, ""),
    ],
)
def test_every_usual_error_is_one_sentence_and_a_code(
    monkeypatch: Any, capsys: Any, error: BaseException, code: int, said: str
) -> None:
    from lawcat_edge.commands import info

    def fail(*args: Any) -> None:
        raise error

    monkeypatch.setattr(info, "_bundle", fail)
    monkeypatch.setattr(Path, "exists", lambda path: True)
    assert cli.run(["info", "anything", "--json"]) == code
    if code == 130:
        captured = capsys.readouterr()
        assert captured.err == "Interrupted; nothing half-written was left in place.\n"
        assert captured.out == ""
        return
    one_sentence(capsys, said)
    if not isinstance(error, typer.Abort):  # asked for, the whole traceback is there
        with pytest.raises(type(error)):
            cli.run(["info", "anything"], {"LAWCAT_EDGE_DEBUG": "1"})


def test_a_full_disk_reported_by_safetensors() -> None:
    SafetensorError = type("SafetensorError", (Exception,), {})
    message, code = cli.explain(SafetensorError("I/O error: No space left on device (os error 28)"))
    assert code == 2
    assert message is not None
    assert message.startswith("The disk is full")


def test_a_bug_keeps_its_traceback(monkeypatch: Any) -> None:
    from lawcat_edge.commands import info

    monkeypatch.setattr(info, "_adapter", lambda folder: 1 / 0)
    monkeypatch.setattr(Path, "exists", lambda path: path.name == "lawcat_config.json")
    with pytest.raises(ZeroDivisionError):
        cli.run(["info", "anything"])


def test_debug_shows_the_traceback_and_its_absence_does_not(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lawcat_edge", "info", str(tmp_path)]
    for debug in ("", "1"):
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "LAWCAT_EDGE_DEBUG": debug},
        )
        assert ("Traceback" in done.stderr) == bool(debug)
        assert "neither a bundle nor an adapter" in done.stderr.splitlines()[-1]
        assert done.stdout == ""
        assert done.returncode == (1 if debug else 2)


def test_distill_writes_one_json_document_and_an_adapter_that_info_reads(base: Path, capfd: Any) -> None:
    out = base / "deep" / "adapter"  # a parent that is not there yet
    command = ["distill", str(base / "teacher"), "--data", str(base / "text.txt"), "--out", str(out), *SHORT]
    assert cli.run([*command, "--set", "checkpoint_every=1", "--set", "rope=true", "--json"]) == 0
    captured = capfd.readouterr()
    document = json.loads(captured.out)
    assert document["settings"]["rope"] is True
    assert document["settings"]["finetune_tokens"] == 128
    assert "transfer 2/2" in captured.err
    assert cli.run(["info", str(out), "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["sha256"] == document["sha256"]
    assert cli.run([*command, "--seq-len", "32"]) == 2
    assert "holds a finished adapter; replace it with --overwrite" in capfd.readouterr().err
    assert Adapter.load(out).sha256 == document["sha256"]
    assert cli.run([*command, "--seq-len", "32", "--overwrite"]) == 0
    text = capfd.readouterr().out
    assert "finetune: 128 tokens" in text
    assert f"Next: lawcat-edge export {base / 'teacher'} --adapter {out}" in text


def test_an_option_replaces_the_recipe_s_value_and_a_default_does_not(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    seen: list[DistillSettings] = []

    def stop(*arguments: Any, **_: Any) -> Any:
        seen.append(arguments[3])
        raise LawcatError("Far enough.")

    monkeypatch.setattr("lawcat_edge.distill.run.distill", stop)
    command = ["distill", str(base / "teacher"), "--recipe", "passkey", "--out", str(tmp_path / "a")]
    assert cli.run(command) == 2
    assert cli.run([*command, "--lora-rank", "8", "--seq-len", "64", "--rope"]) == 2
    recipe, changed = seen
    assert (recipe.lora_rank, recipe.batch_size, recipe.seq_len, recipe.rope) == (32, 16, 1024, False)
    # 8 is the default, but it was asked for
    assert (changed.lora_rank, changed.batch_size, changed.rope) == (8, 16, True)
    assert changed.seq_len == changed.finetune_seq_len == 64
    capsys.readouterr()
    assert cli.run(["distill", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(DistillSettings):
        flag = f"--{field.name.replace('_', '-')}"
        shown = f"no-{field.name}" if field.default is False else str(field.default)
        mark = f"{flag} / " if field.default is False else f"{flag} <"
        option = text[text.index(mark) :].split("[default: ")[1]
        assert option.replace(" ", "").startswith(shown.replace(" ", "")), field.name


def test_distill_goes_on_from_an_adapter_with_another_window(base: Path, tmp_path: Path, capsys: Any) -> None:
    command = ["distill", str(base / "teacher"), "--data", str(base / "text.txt"), *SHORT]
    first, second = tmp_path / "first", tmp_path / "second"
    assert cli.run([*command, "--window", "4", "--out", str(first)]) == 0
    command += ["--stage", "finetune", "--start-from", str(first), "--out", str(second)]
    assert cli.run([*command, "--feature-dim", "5"]) == 2
    assert "has feature_dim" in capsys.readouterr().err
    assert cli.run([*command, "--set", "conv_kernel=5"]) == 2
    assert "has conv_kernel" in capsys.readouterr().err
    assert cli.run([*command, "--set", "window=7", "--json"]) == 0
    assert Adapter.load(second).config.window == 7
    assert cli.run([*command, "--window", "9", "--json", "--overwrite"]) == 0
    adapter = Adapter.load(second)
    assert adapter.config.window == 9
    assert adapter.training["settings"]["window"] == 9


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "text"),
        (b" \n\n", "text"),
        (b"a\0b" * 50, "binary"),
        (b"caf\xe9 " * 50, "UTF-8"),
        (None, "No data"),
    ],
)
def test_distill_refuses_bad_data_and_leaves_nothing(
    base: Path, tmp_path: Path, capsys: Any, content: bytes | None, said: str
) -> None:
    data, out = tmp_path / "data.txt", tmp_path / "out" / "adapter"
    if content is not None:
        data.write_bytes(content)
    assert cli.run(["distill", str(base / "teacher"), "--data", str(data), "--out", str(out), *SHORT]) == 2
    one_sentence(capsys, said)
    assert not list(tmp_path.glob("out/*"))
    assert not list(tmp_path.glob("out/.*"))


def test_bad_data_do_not_cost_an_earlier_run_its_checkpoint(base: Path, tmp_path: Path, capsys: Any) -> None:
    checkpoint = tmp_path / "a.run" / "checkpoint"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text("{}")
    (tmp_path / "empty.txt").write_bytes(b"")
    out = str(tmp_path / "a")
    words = ["distill", str(base / "teacher"), "--data", str(tmp_path / "empty.txt"), "--out", out]
    assert cli.run([*words, "--fresh"]) == 2
    one_sentence(capsys, "no usable text")
    assert (checkpoint / "state.json").is_file()


def test_every_setting_of_a_distillation_is_an_option() -> None:
    options = inspect.signature(distill_command).parameters
    missing = {field.name for field in dataclasses.fields(DistillSettings)} - set(options)
    assert not missing


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--set", "colour=3"], "known setting"),
        (["--set", "lr_lora"], "NAME=VALUE"),
        (["--set", "rope=perhaps"], "type bool"),
        (["--set", "batch_size=two"], "type int"),
        (["--window", "99999"], "window"),
        (["--recipe", "nonsense"], "no recipe 'nonsense'"),
        (["--stage", "third"], "stage"),
        (["--stage", "finetune"], "--start-from"),
        (["--task-mix", "poetry:1"], "poetry"),
        (["--task-mix", "text:0.7,passkey:0.2"], "add up to 0.9"),
        (["--backend", "cuda"], "backend"),
        (["--resume"], "no checkpoint"),
        (["--start-from", "nowhere"], "nowhere is no adapter"),
    ],
)
def test_distill_refuses_bad_settings_and_leaves_nothing(
    base: Path, tmp_path: Path, capsys: Any, options: list[str], said: str
) -> None:
    command = [
        "distill",
        str(base / "teacher"),
        "--data",
        str(base / "text.txt"),
        "--out",
        str(tmp_path / "a"),
    ]
    assert cli.run([*command, *SHORT, *options]) == 2
    one_sentence(capsys, said)
    assert not list(tmp_path.iterdir())


def test_distill_refuses_a_place_it_could_not_write_to_before_it_trains(
    base: Path, tmp_path: Path, capsys: Any
) -> None:
    command = ["distill", str(base / "teacher"), "--data", str(base / "text.txt"), *SHORT, "--out"]
    (tmp_path / "file").write_text("mine")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("mine")
    assert cli.run([*command, str(tmp_path / "file")]) == 2
    one_sentence(capsys, "is no folder")
    assert cli.run([*command, str(tmp_path / "photos")]) == 2
    one_sentence(capsys, "holds other files")
    assert cli.run([*command, str(tmp_path / "file" / "adapter")]) == 2
    one_sentence(capsys, str(tmp_path / "file"), "check the path")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["cat.jpg", "file", "photos"]


def test_a_disk_that_fills_up_while_training(
    base: Path, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    def full(*args: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "state.safetensors")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    command = [
        "distill",
        str(base / "teacher"),
        "--data",
        str(base / "text.txt"),
        "--out",
        str(tmp_path / "a"),
    ]
    assert cli.run([*command, *SHORT]) == 2
    one_sentence(capsys, "No space left on device")
    assert not list(tmp_path.iterdir())


def hear_ctrl_c() -> None:
    """A shell's background job ignores SIGINT, and its children would inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.skipif(os.name == "nt", reason="no SIGINT to a child there")
def test_ctrl_c_while_training_keeps_the_checkpoint_alone(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "adapter"
    command = ["distill", str(base / "teacher"), "--data", str(base / "text.txt"), "--out", str(out)]
    settings = ["--tokens", "9000000", "--seq-len", "64", "--set", "checkpoint_every=3"]
    log = tmp_path / "adapter.run" / "checkpoint" / "state.json"
    with subprocess.Popen(
        [sys.executable, "-m", "lawcat_edge", *command, *settings],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=hear_ctrl_c,
    ) as child:  # fmt: skip
        end = time.monotonic() + 90
        while not log.is_file() and child.poll() is None and time.monotonic() < end:
            time.sleep(0.05)
        child.send_signal(signal.SIGINT)
        stdout, stderr = child.communicate(timeout=60)
    assert child.returncode == 130, stderr
    assert stdout == ""
    goes_on = shlex.join(["lawcat-edge", *command, *settings, "--resume"])
    said = f"Interrupted; nothing half-written was left in place. To go on: {goes_on}"
    assert stderr.splitlines()[-1] == said
    assert "Traceback" not in stderr
    assert [path.name for path in tmp_path.iterdir()] == ["adapter.run"]
    assert json.loads(log.read_text())["progress"]["step"] % 3 == 0


@pytest.mark.skipif(os.name == "nt", reason="no SIGINT to a child there")
def test_ctrl_c_while_waiting_for_input(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lawcat_edge", "generate", str(tmp_path), "--prompt", "-"]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=hear_ctrl_c,
    ) as child:
        time.sleep(2)
        child.send_signal(signal.SIGINT)
        stdout, stderr = child.communicate(timeout=30)
    assert child.returncode == 130
    assert stdout == b""
    assert stderr == b"Interrupted; nothing half-written was left in place.\n"
