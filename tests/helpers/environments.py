"""Environments of their own, for tests with another version of onnxruntime or with what is no dependency.

Built with pip at first use and kept in pytest's cache folder. A version that cannot be had on this machine
(no wheel for this interpreter, no network) skips the test with pip's reason.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lawcat_edge.runtime.errors import LawcatError
from lawcat_edge.runtime.files import FileLock

ROOT = Path(__file__).resolve().parents[2]
# All that the runner needs beside onnxruntime and numpy; pip adds nothing of its own to it.
RUNNER = ("tokenizers", "jinja2", "markupsafe", "msgspec")


def environment(config: pytest.Config, *packages: str) -> Path:
    """The interpreter of a virtual environment that holds exactly these packages."""
    assert config.cache is not None
    wanted = json.dumps([sys.version, *packages])
    name = "env-" + hashlib.sha256(wanted.encode()).hexdigest()[:16]
    place = Path(str(config.cache.mkdir("environments"))) / name
    python = place / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    with its_turn(place):
        if not (place / "complete").exists():
            _build(place, python, packages)
    return python


@contextlib.contextmanager
def its_turn(place: Path, seconds: float = 500.0) -> Iterator[None]:
    """Of several processes that run tests, one at a time; the others wait."""
    end = time.monotonic() + seconds
    with contextlib.ExitStack() as stack:
        while True:
            try:
                stack.enter_context(FileLock(place))
                break
            except LawcatError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.2)
        yield


def _build(place: Path, python: Path, packages: tuple[str, ...]) -> None:
    shutil.rmtree(place, ignore_errors=True)
    venv.create(place, with_pip=False, symlinks=os.name != "nt")
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps"]
    command += ["--only-binary", ":all:", "--retries", "1", "--disable-pip-version-check", *packages]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    if done.returncode:
        shutil.rmtree(place, ignore_errors=True)
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["pip failed"]
        pytest.skip(f"cannot install {' '.join(packages)}: {lines[-1]}")
    (place / "complete").touch()


def run(python: Path, script: str, *arguments: Path | str) -> Any:
    """Run a script in that environment, with this repository's runner on the path; its JSON from stdout."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "LAWCAT"))}
    done = subprocess.run(
        [str(python), "-c", script, *map(str, arguments)],
        env={**clean, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def run_demo(out: Path) -> tuple[dict[str, Any], str]:
    """(what ``lawcat-edge demo`` prints, what it says meanwhile), run in the folder above `out`."""
    command = [sys.executable, "-m", "lawcat_edge", "demo", "--out", str(out), "--json"]
    done = subprocess.run(
        command, cwd=out.parent, env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout), done.stderr
