"""What can go wrong around a program: kills, full disks, clocks, two writers, files that change."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tiny_adapter import make_adapter
from tiny_bundle import build_tiny_bundle

from lawcat_edge.adapter import Adapter
from lawcat_edge.calibration.comparison.compare import Comparison, compare
from lawcat_edge.runtime import Model, files
from lawcat_edge.runtime.bundle.manifest import Bundle
from lawcat_edge.runtime.engine.session import Engine
from lawcat_edge.runtime.errors import CheckFailed, LawcatError

TOOLS = Path(__file__).parents[1] / "tools"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_bundle(tmp_path_factory.mktemp("faults") / "bundle")


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_kills_at_random_moments_lose_nothing() -> None:
    """A handful; the hundred is `python tests/tools/kills.py`."""
    command = [sys.executable, TOOLS / "kills.py", "--kills", "snapshot=3,distill=1,export=2", "--seed", "7"]
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, timeout=500, check=False,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["kills"] == 6
    assert not result["failures"]


# -- the disk ------------------------------------------------------------------------------------------------


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """A disk that has room for files of `size` bytes: writing beyond fails as on a full one."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)


def snapshot_writer(bundle: Path, target: Path) -> Callable[[int], object]:
    model = Model.load(bundle, threads=1)

    def write(words: int) -> object:
        model.reset()
        model.read("word " * words)
        return model.snapshot(target)

    return write


def test_a_disk_that_fills_up_keeps_the_old_snapshot(bundle: Path, tmp_path: Path) -> None:
    write = snapshot_writer(bundle, tmp_path / "s")
    write(1)
    before = (tmp_path / "s").read_bytes()
    with largest_file(1000):
        with pytest.raises(LawcatError, match="nothing was changed; free some space"):
            write(2)
    assert (tmp_path / "s").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["s"]
    write(2)
    assert (tmp_path / "s").read_bytes() != before


def test_a_disk_that_fills_up_keeps_the_old_adapter(tmp_path: Path) -> None:
    make_adapter(seed=1).save(tmp_path / "a")
    before = Adapter.load(tmp_path / "a").sha256
    with largest_file(500):
        with pytest.raises(LawcatError, match="free some space and run the command again"):
            make_adapter(seed=2).save(tmp_path / "a")
    assert Adapter.load(tmp_path / "a").sha256 == before
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize(
    ("number", "step"),
    [
        (errno.ENOSPC, "free some space"), (errno.EDQUOT, "free some space"), (errno.EROFS, "permissions"),
        (errno.EACCES, "permissions"), (errno.EIO, "check the path"),
    ],
)  # fmt: skip
def test_every_failure_to_write_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, step: str
) -> None:
    """Read-only places and lost permissions too: tests often run as root, whom no permission stops."""
    files.write_text(tmp_path / "f", "old")

    def fail(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(LawcatError, match=f"Cannot write .*{os.strerror(number)}.*{step}"):
        files.write_text(tmp_path / "f", "new")
    monkeypatch.undo()
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("f", "old")]


def test_a_folder_that_may_not_be_written_says_so(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        place = Path("/proc/self")  # where not even root may make a file
        if not place.is_dir():
            pytest.skip("root may write anywhere here")
    else:
        place = tmp_path
        place.chmod(0o500)
    with pytest.raises(LawcatError, match=r"Cannot write .*(choose another place|check the path)"):
        files.write_text(place / "f", "x")
    with pytest.raises(LawcatError, match=r"Cannot write .*(choose another place|check the path)"):
        with files.atomic_folder(place / "d", "marker"):
            pass
    tmp_path.chmod(0o700)


# -- clocks --------------------------------------------------------------------------------------------------


def test_a_clock_that_jumps_back_changes_nothing(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wall time is only shown, never compared: a day back between any two looks at it."""
    want = Model.load(bundle, threads=1).generate("a", max_new_tokens=4, ignore_eos=True).text
    now = [time.time()]

    def back() -> float:
        now[0] -= 86_400
        return now[0]

    monkeypatch.setattr(time, "time", back)
    monkeypatch.setattr(time, "time_ns", lambda: int(back() * 1e9))
    model = Model.load(bundle, threads=1)
    assert model.generate("a", max_new_tokens=4, ignore_eos=True).text == want
    model.snapshot(tmp_path / "s")
    os.utime(tmp_path / "s", (0, 0))  # older than its bundle
    model.snapshot(tmp_path / "s")
    assert len(model.restore(tmp_path / "s")) == len(model.context)
    make_adapter().save(tmp_path / "a")
    os.utime(tmp_path / "a", (0, 0))
    make_adapter(seed=1).save(tmp_path / "a")
    assert Adapter.load(tmp_path / "a")


# -- two at once ---------------------------------------------------------------------------------------------

HOLD = """
import sys, time
from lawcat_edge.runtime.files import FileLock
with FileLock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(100)
"""


@contextmanager
def another_process(target: Path) -> Iterator[subprocess.Popen[str]]:
    child = subprocess.Popen([sys.executable, "-c", HOLD, str(target)], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "held\n"
        yield child
    finally:
        child.kill()
        child.wait()
        if child.stdout is not None:
            child.stdout.close()


def test_two_processes_that_write_one_target(bundle: Path, tmp_path: Path) -> None:
    write = snapshot_writer(bundle, tmp_path / "s")
    write(1)
    before = (tmp_path / "s").read_bytes()
    with another_process(tmp_path / "s") as child:
        with pytest.raises(
            LawcatError, match=r"Another process is writing .*s; wait for it or choose another"
        ):
            write(2)
        assert (tmp_path / "s").read_bytes() == before
        child.send_signal(signal.SIGKILL)  # its lock goes with it
        child.wait()
        write(2)
    assert (tmp_path / "s").read_bytes() != before


def test_two_comparisons_in_one_folder(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with another_process(out):
        comparison: Any = Comparison.__new__(Comparison)
        object.__setattr__(comparison, "out", out)  # it is frozen, and nothing else of it is asked for
        with pytest.raises(LawcatError, match=r"Another process is writing .*out"):
            compare(comparison, ["fp32"])


# -- files that change ---------------------------------------------------------------------------------------


def test_a_snapshot_that_is_rewritten_while_it_is_read(bundle: Path, tmp_path: Path) -> None:
    """Readers see the old file or the new one: a thousand writes beside a reader."""
    write = snapshot_writer(bundle, tmp_path / "s")
    write(1)
    writer = os.fork()
    if writer == 0:
        first, second = (tmp_path / "s").read_bytes(), b""
        try:
            while True:
                with files.atomic_file(tmp_path / "s") as file:
                    file.write(second or first)
        finally:
            os._exit(0)
    try:
        model = Model.load(bundle, threads=1)
        lengths = {len(model.restore(tmp_path / "s")) for _ in range(100)}
    finally:
        os.kill(writer, signal.SIGKILL)
        os.waitpid(writer, 0)
    assert len(lengths) == 1


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data", "tokenizer.json"])
def test_a_bundle_that_changes_between_its_check_and_its_use(
    bundle: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(bundle, tmp_path / "b"))
    opened = Bundle.open(folder)
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(CheckFailed, match=f"{name} (changed while|is not the file)"):
        opened.read(name) if name == "tokenizer.json" else Engine(opened, threads=1)
