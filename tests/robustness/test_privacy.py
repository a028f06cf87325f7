"""No report to anybody: what a command looks up on the network, and what it leaves in an empty home."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from importlib import metadata
from pathlib import Path

import pytest
from tiny_bundle import build_tiny_bundle

ROOT = Path(__file__).resolve().parents[2]
REPORTS_AFTER = 12.0  # seconds; onnxruntime looks its host up within 10 of its import
# Put before libc's own, in Python's calls and in onnxruntime's alike.
RECORDER = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <netdb.h>
#include <stdio.h>
#include <stdlib.h>
typedef int (*resolver)(const char *, const char *, const struct addrinfo *, struct addrinfo **);
int getaddrinfo(const char *name, const char *service, const struct addrinfo *hints,
                struct addrinfo **found) {
    FILE *file = fopen(getenv("LOOKUPS"), "a");
    if (file) { fprintf(file, "%s\n", name ? name : ""); fclose(file); }
    return ((resolver) dlsym(RTLD_NEXT, "getaddrinfo"))(name, service, hints, found);
}
"""


class Sandbox:
    """A process's environment: empty home and temporary folder, and its name look-ups written down."""

    def __init__(self, folder: Path) -> None:
        self.home, self.temporary, self.work = (folder / name for name in ("home", "tmp", "work"))
        for place in (self.home, self.temporary, self.work):
            place.mkdir()
        self.lookups = folder / "lookups"
        (folder / "recorder.c").write_text(RECORDER)
        library = folder / "recorder.so"
        compiler = shutil.which("cc")
        if not sys.platform.startswith("linux") or compiler is None:
            pytest.skip("look-ups are recorded through a C compiler on Linux")
        subprocess.run(
            [compiler, "-shared", "-fPIC", folder / "recorder.c", "-o", library, "-ldl"], check=True
        )
        self.environment = {
            "PATH": os.environ["PATH"], "HOME": str(self.home), "TMPDIR": str(self.temporary),
            "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "LD_PRELOAD": str(library),
            "LOOKUPS": str(self.lookups),
        }  # fmt: skip

    def start(self, *words: str, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, *words], cwd=self.work, env={**self.environment, **environment}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def written(self) -> list[str]:
        places = (self.home, self.temporary, self.work)
        return sorted(path.name for place in places for path in place.rglob("*"))

    def asked(self) -> set[str]:
        return set(self.lookups.read_text().split()) if self.lookups.exists() else set()


@pytest.fixture
def sandbox(tmp_path: Path) -> Sandbox:
    return Sandbox(tmp_path)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_bundle(tmp_path_factory.mktemp("private") / "bundle")


def finish(process: subprocess.Popen[str]) -> str:
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return out


def test_the_recorder_sees_lookups_and_files(sandbox: Sandbox) -> None:
    script = "import socket, pathlib; socket.getaddrinfo('127.0.0.1', 1); (pathlib.Path.home() / 'x').touch()"
    finish(sandbox.start("-c", script))
    assert sandbox.asked() == {"127.0.0.1"}
    assert sandbox.written() == ["x"]


@pytest.mark.skipif(
    tuple(map(int, metadata.version("onnxruntime").split(".")[:2])) < (1, 29), reason="it has no telemetry"
)
def test_the_users_own_setting_stays(sandbox: Sandbox) -> None:
    """Also the proof that the next tests could fail: with telemetry on, onnxruntime writes at its import."""
    finish(sandbox.start("-c", "import lawcat_edge, onnxruntime", ORT_DISABLE_TELEMETRY="0"))
    assert "onnxruntime.db" in sandbox.written()


def test_generate_asks_nobody_and_leaves_nothing(sandbox: Sandbox, bundle: Path) -> None:
    words = ("-m", "lawcat_edge", "generate", str(bundle), "--prompt", "Hello", "--max-new-tokens", "4")
    assert finish(sandbox.start(*words))
    assert sandbox.asked() == set()
    assert sandbox.written() == []


@pytest.mark.slow
def test_serve_asks_nobody_and_leaves_nothing(sandbox: Sandbox, bundle: Path) -> None:
    process = sandbox.start("-m", "lawcat_edge", "serve", str(bundle), "--port", "0", "--json")
    try:
        assert process.stdout is not None
        url = json.loads(process.stdout.readline())["url"]
        body = json.dumps({"prompt": "Hello", "max_tokens": 4}).encode()
        request = urllib.request.Request(
            f"{url.removesuffix('/v1')}/v1/completions", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as reply:
            assert json.load(reply)["usage"]["completion_tokens"] == 4
        time.sleep(REPORTS_AFTER)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
    assert sandbox.asked() <= {"127.0.0.1"}  # the address it listens on, which no name server is asked for
    assert sandbox.written() == []


@pytest.mark.parametrize(
    "module",
    [
        "lawcat_edge.runtime.engine.session",
        "lawcat_edge.calibration.comparison.compare",
        "lawcat_edge.integrations.modeling",
    ],
)
def test_any_module_turns_telemetry_off_before_onnxruntime(sandbox: Sandbox, module: str) -> None:
    finish(sandbox.start("-c", f"import {module}, onnxruntime"))
    assert sandbox.asked() == set()
    assert [name for name in sandbox.written() if "onnxruntime" in name or name == "deviceid"] == []
