"""A stdout that is not UTF-8: text gets escapes, JSON stays JSON, and nothing ends in a traceback."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_bundle import build_tiny_bundle

from lawcat_edge.commands.output import write_any_text
from lawcat_edge.runtime import Model

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = ["--max-new-tokens", "30", "--temperature", "1", "--seed", "3", "--ignore-eos"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_bundle(tmp_path_factory.mktemp("output") / "bundle")


def run(encoding: str, *arguments: str, stdin: str = "") -> tuple[str, str]:
    """(stdout, stderr) of a command whose standard streams have `encoding`."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "lawcat_edge", *arguments],
        input=stdin.encode(), capture_output=True, env=environment, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.decode(encoding), done.stderr.decode(encoding)


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_an_emoji_is_written_as_an_escape_and_json_stays_json(bundle: Path, encoding: str) -> None:
    expected = Model.load(bundle, threads=1).generate(
        "Owl", max_new_tokens=30, temperature=1.0, seed=3, ignore_eos=True
    ).text  # fmt: skip
    assert not expected.isascii()
    assert "\ufffd" in expected  # which neither encoding has
    asked = ["generate", str(bundle), "--prompt", "Owl", *OPTIONS]
    out, _ = run(encoding, *asked)
    assert out.rstrip("\n") == expected.encode(encoding, "backslashreplace").decode(encoding)
    out, _ = run(encoding, *asked, "--json")
    assert out.isascii()
    assert json.loads(out)["text"] == expected
    out, _ = run("utf-8", *asked, "--json")
    assert "\ufffd" in out


def test_a_conversation_goes_on(bundle: Path) -> None:
    options = [*OPTIONS[:-1], "--repetition-penalty", "1.1"]
    out, err = run("ascii", "chat", str(bundle), *options, stdin="Hello\nAnd then?\n/stats\n")
    assert "\\ufffd" in out
    assert "Traceback" not in err
    assert "tokens read" in err


def test_any_text_goes_to_any_stream_and_one_with_rules_of_its_own_keeps_them() -> None:
    data = io.BytesIO()
    stream = io.TextIOWrapper(data, encoding="cp1252")
    write_any_text(stream, io.StringIO(), None)
    print("café 🦉 ─┼─ \udc80", file=stream, flush=True)
    assert data.getvalue().decode("cp1252").rstrip() == r"café \U0001f989 \u2500\u253c\u2500 \udc80"
    own = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="replace")
    write_any_text(own)
    assert own.errors == "replace"
