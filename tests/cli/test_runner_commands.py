"""The runner's commands: what they print where, and how they end."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from tiny_bundle import build_tiny_bundle
from typer.testing import CliRunner

from lawcat_edge.commands.bench import REPEATED, bench, measure
from lawcat_edge.commands.chat import chat
from lawcat_edge.commands.generate import SPECULATE_HELP, generate
from lawcat_edge.commands.info import info
from lawcat_edge.commands.verify import verify
from lawcat_edge.runtime import Engine, Model
from lawcat_edge.runtime.errors import CheckFailed, LawcatError
from lawcat_edge.runtime.generate.draft import LONGEST_DRAFT
from lawcat_edge.runtime.generate.writer import Writer


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(build_tiny_bundle(tmp_path_factory.mktemp("commands") / "bundle"))


def run(*arguments: str, stdin: str | bytes | None = None) -> Any:
    """The result of one command; an error of ours is raised as it is."""
    app = typer.Typer()
    for command in (generate, chat, info, verify, bench):
        app.command()(command)
    result = CliRunner().invoke(app, list(arguments), input=stdin)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_generate_streams_text_to_stdout_and_figures_to_stderr(bundle: str) -> None:
    result = run("generate", bundle, "--prompt", "Hello", "--max-new-tokens", "5", "--ignore-eos")
    assert "tokens read" not in result.stdout
    assert "5 tokens read" in result.stderr
    assert "5 written" in result.stderr
    document = json.loads(
        run(
            *("generate", bundle, "--prompt", "Hello", "--max-new-tokens", "5", "--ignore-eos"),
            *("--json", "--logprobs", "1", "--temperature", "0.5", "--top-k", "9", "--seed", "1"),
        ).stdout
    )
    assert len(document["tokens"]) == len(document["logprobs"]) == 5
    assert document["stats"]["seed"] == 1


def test_speculation_is_set_and_shown(bundle: str) -> None:
    command = ("generate", bundle, "--prompt", "abcabcabcabcabc", "--max-new-tokens", "60", "--ignore-eos")
    on, off = (run(*command, "--speculate", value) for value in ("4", "off"))
    assert on.stdout == off.stdout
    assert "drafted accepted" in on.stderr
    assert "drafted" not in off.stderr
    stats = json.loads(run(*command, "--json").stdout)["stats"]
    assert 0 < stats["accepted_tokens"] <= stats["drafted_tokens"]
    talk = run("chat", bundle, "--speculate", "8", stdin="abcabcabcabcabc\n/stats\n")
    assert "written" in talk.stderr
    for wrong in ("0", "33", "on", "-1", "1.5"):
        with pytest.raises(LawcatError, match="--speculate must be from 1 to 32"):
            run(*command, "--speculate", wrong)
    assert f"default: {LONGEST_DRAFT}." in SPECULATE_HELP


def test_generate_reads_a_file_saves_and_goes_on(bundle: str, tmp_path: Path) -> None:
    (tmp_path / "doc.txt").write_text("A long text. " * 30)
    state = str(tmp_path / "doc.state")
    saved = run("generate", bundle, "--file", str(tmp_path / "doc.txt"), "--save-snapshot", state)
    assert "390 tokens read and saved" in saved.stderr
    result = run("generate", bundle, "--load-snapshot", state, "--chat", "--prompt", "Why?", "--json")
    assert json.loads(result.stdout)["stats"]["reused_tokens"] == 389
    both = run(
        "generate", bundle, "--file", str(tmp_path / "doc.txt"), "--prompt", "So", "--max-new-tokens", "2"
    )
    assert "from the state" in both.stderr
    piped = run("generate", bundle, "--prompt", "-", "--max-new-tokens", "2", stdin="from a pipe")
    assert "11 tokens read" in piped.stderr


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"caf\xe9", "not valid UTF-8"), (b"a\0b", "binary"), (b" \n", "empty"), (None, "Cannot read")],
)
def test_generate_refuses_bad_files_in_one_sentence(
    bundle: str, tmp_path: Path, content: bytes | None, message: str
) -> None:
    path = tmp_path / "f"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(LawcatError, match=message) as caught:
        run("generate", bundle, "--file", str(path), "--prompt", "x")
    assert "\n" not in str(caught.value)
    if content is not None:
        with pytest.raises(LawcatError, match="standard input"):
            run("generate", bundle, "--prompt", "-", stdin=content)


def test_generate_needs_something_to_do(bundle: str) -> None:
    with pytest.raises(LawcatError, match="give --prompt"):
        run("generate", bundle)
    with pytest.raises(LawcatError, match="--system needs --chat"):
        run("generate", bundle, "--prompt", "x", "--system", "y")
    with pytest.raises(LawcatError, match="There is no bundle folder"):
        run("generate", "nowhere", "--prompt", "x")


def test_chat_commands(bundle: str, tmp_path: Path) -> None:
    state = tmp_path / "talk.state"
    lines = [
        "/stats",
        "Hello",
        "/stats",
        f"/save {state}",
        "More",
        f"/load {state}",
        "/reset",
        "/save",
        "/nope",
    ]
    result = run("chat", bundle, "--max-new-tokens", "4", stdin="\n".join(lines) + "\n")
    assert result.exit_code == 0
    assert state.is_file()
    for text in ("Nothing was said", "written", "Saved to", "2 messages", "A new", "/save needs", "no /nope"):
        assert text in result.stderr
    again = run("chat", bundle, "--load-snapshot", str(state), stdin="/stats\n/exit\nnot read\n")
    assert again.exit_code == 0


def test_a_line_that_begins_with_a_slash_can_be_said(bundle: str, tmp_path: Path) -> None:
    state = tmp_path / "talk.state"
    spoken = f"\ufeff//etc is a folder\n/save {state}\n"  # and a mark before a piped text is no part of it
    assert run("chat", bundle, "--max-new-tokens", "2", stdin=spoken).exit_code == 0
    context = Model.load(bundle).restore(state)
    assert context.messages[0] == {"role": "user", "content": "/etc is a folder"}
    assert "write //" in run("chat", bundle, stdin="/etc is a folder\n").stderr


def test_verify_passes_and_fails(bundle: str, tmp_path: Path) -> None:
    assert "is whole" in run("verify", bundle).stdout
    assert json.loads(run("verify", bundle, "--json").stdout)["ok"] is True
    broken = Path(shutil.copytree(bundle, tmp_path / "broken"))
    (broken / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckFailed, match=r"tokenizer\.json") as caught:
        run("verify", str(broken))
    assert caught.value.exit_code == 1


def test_info_tells_what_a_bundle_is(bundle: str, tmp_path: Path) -> None:
    text = run("info", bundle).stdout
    assert "bundle tiny" in text
    assert "fp32" in text
    document = json.loads(run("info", bundle, "--json").stdout)
    constant = 2 * 4 * (64 * 3 + 2 * 16 * 17)
    assert document["state_bytes"] == {"empty": constant, "8192": constant, "most": constant}
    assert document["files"]["model.onnx.data"] > 0
    with pytest.raises(LawcatError, match="neither a bundle nor an adapter"):
        run("info", str(tmp_path))


def test_bench_measures_every_context(bundle: str, tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    result = run("bench", bundle, "--contexts", "64,1K", "--decode-tokens", "3", "--json", "--out", str(out))
    document = json.loads(result.stdout)
    assert document == json.loads(out.read_text())
    assert [row["context"] for row in document["contexts"]] == [64, 1024]
    assert all(
        row["decode_tokens_per_second"] > 0 < row["prefill_tokens_per_second"] for row in document["contexts"]
    )
    assert document["speculate"] == 0
    assert "drafted_tokens" not in document["contexts"][0]
    with pytest.raises(LawcatError, match="--contexts has 'x'"):
        run("bench", bundle, "--contexts", "x")


def test_bench_shows_what_drafts_gain(bundle: str) -> None:
    options = ("bench", bundle, "--contexts", "8,64", "--decode-tokens", "40")
    document = json.loads(run(*options, "--speculate", "4", "--json").stdout)
    assert document["speculate"] == 4
    for row in document["contexts"]:
        assert 0 < row["accepted_tokens"] <= row["drafted_tokens"]
        assert row["repeated_tokens_per_second"] > 0
    shown, off = (run(*options, "--speculate", value).stdout for value in ("4", "off"))
    row = document["contexts"][-1]
    assert f"{row['accepted_tokens']}/{row['drafted_tokens']}" in shown.splitlines()[-1]
    assert "drafts/s" in shown
    assert "drafts/s" not in off
    with pytest.raises(LawcatError, match="--speculate must be from 1 to 32"):
        run(*options, "--speculate", "0")


def test_bench_reads_and_writes_as_a_user_does(bundle: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model.load(bundle, threads=1)
    seen: list[tuple[int, int]] = []
    choose, draft = Writer.choose, Writer.draft

    def chosen(self: Writer, logits: np.ndarray) -> str:
        seen.append((self.context.fed, len(self.context)))
        return choose(self, logits)

    monkeypatch.setattr(Writer, "choose", chosen)
    monkeypatch.setattr(Writer, "draft", lambda self, longest: pytest.fail("nothing was to be drafted"))
    rows = list(measure(model, [70, 9], 3))
    assert [row["context"] for row in rows] == [9, 70]
    # Nothing that a row writes is in the next one's context.
    assert seen[2:] == [(at + i, at + i) for at in (9, 70) for i in range(4)]
    assert all(row["decode_median_ms"] > 0 for row in rows)
    assert rows[0]["first_token_seconds"] < rows[1]["first_token_seconds"]
    seen.clear()
    monkeypatch.setattr(Writer, "draft", draft)
    list(measure(model, [9], 3, drafted=2))
    assert (9 + len(model.encode(REPEATED, first=False)),) * 2 in seen


@pytest.mark.parametrize("passes", [2, 3, 4])
def test_a_pass_that_fails_ends_bench(bundle: str, monkeypatch: pytest.MonkeyPatch, passes: int) -> None:
    model = Model.load(bundle, threads=1)
    forward, calls = Engine.forward, []

    def failing(self: Engine, *arguments: Any, **options: Any) -> np.ndarray:
        calls.append(arguments)
        if len(calls) > passes:
            raise LawcatError("out of luck")
        return forward(self, *arguments, **options)

    monkeypatch.setattr(Engine, "forward", failing)
    with pytest.raises(LawcatError, match="out of luck"):
        list(measure(model, [8], 3))


@pytest.mark.parametrize("command", ["generate", "chat", "info", "verify", "bench"])
def test_every_help_has_examples(command: str) -> None:
    assert f"lawcat-edge {command} bundle" in " ".join(run(command, "--help").stdout.split())


def test_chat_takes_the_bundles_sampling_values_where_no_option_says_one(tmp_path: Path) -> None:
    from lawcat_edge.runtime import Model

    settings = {"temperature": 0.8, "top_k": 5, "repetition_penalty": 1.2, "do_sample": True}
    folder = build_tiny_bundle(tmp_path / "bundle", generation=settings, eos=[])
    values: Any = {"temperature": 0.8, "top_k": 5, "repetition_penalty": 1.2, "seed": 4, "max_new_tokens": 12}
    for options, changed in (
        ((), {}),
        (("--temperature", "0"), {"temperature": 0.0}),
        (("--top-k", "0"), {"top_k": 0}),
    ):
        expected = Model.load(folder, threads=1).chat("Hi", **{**values, **changed}).text
        result = run("chat", str(folder), "--seed", "4", "--max-new-tokens", "12", *options, stdin="Hi\n")
        assert result.stdout == expected + "\n"
