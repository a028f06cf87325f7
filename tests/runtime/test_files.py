"""Files: written whole or not at all, read with every check, one writer at a time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from lawcat_edge.runtime import files
from lawcat_edge.runtime.errors import LawcatError


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "../x",
        "a/b",
        "/etc/passwd",
        "a\\b",
        "C:x",
        "x\0",
        "con",
        "NUL.txt",
        "x.",
        "x ",
        "a\n",
        7,
        "x" * 201,
    ],
)
def test_names_that_leave_the_folder_are_refused(name: object) -> None:
    with pytest.raises(LawcatError, match="not allowed"):
        files.check_member_name(name)


def test_members_must_be_regular_files_inside(tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    folder.mkdir()
    (tmp_path / "secret").write_text("s")
    (folder / "plain").write_text("p")
    (folder / "inside").symlink_to("plain")
    (folder / "outside").symlink_to("../secret")
    (folder / "loop").symlink_to("loop")
    os.mkfifo(folder / "pipe")
    assert files.member_path(folder, "plain").read_text() == "p"
    assert files.member_path(folder, "inside").read_text() == "p"
    for name in ("outside", "loop", "pipe", "missing"):
        with pytest.raises(LawcatError):
            files.member_path(folder, name)
    os.link(tmp_path / "secret", folder / "hard")
    with pytest.raises(LawcatError, match="hard link"):
        files.member_path(folder, "hard")


@pytest.mark.parametrize(
    "data",
    [
        b"", b"{", b'{"a":1,"a":2}', b"NaN", b"[Infinity]", b"\xff", b"1" * 39,
        b"[" * 65 + b"]" * 65, b"[" * 1_000_000, b'{"a":' * 70 + b"1" + b"}" * 70,
    ],
)  # fmt: skip
def test_bad_json_is_one_error(data: bytes) -> None:
    with pytest.raises(LawcatError, match="thing"):
        files.parse_json(data, "thing")


def test_the_length_that_transformers_writes_for_no_limit_is_read() -> None:
    unlimited = 1000000000000000019884624838656  # transformers.tokenization_utils_base.VERY_LARGE_INTEGER
    assert files.parse_json(b'{"model_max_length": %d}' % unlimited, "thing")["model_max_length"] == unlimited


def test_brackets_inside_strings_do_not_count_as_depth() -> None:
    assert files.parse_json(b'["' + b"[" * 100 + b'\\"[", 1]', "thing") == ["[" * 100 + '"[', 1]


def test_a_large_file_is_refused_without_reading_it_all(tmp_path: Path) -> None:
    (tmp_path / "big").write_bytes(b"x" * 101)
    assert len(files.read_bytes(tmp_path / "big", 101)) == 101
    with pytest.raises(LawcatError, match="larger than 100"):
        files.read_bytes(tmp_path / "big", 100)


def test_a_small_file_takes_no_buffer_of_its_cap(tmp_path: Path) -> None:
    (tmp_path / "small").write_bytes(b"x" * 101)
    tracemalloc.start()
    files.read_bytes(tmp_path / "small", 64 << 20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_a_file_that_grows_while_it_is_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "log").write_bytes(b"x" * 10)

    def grown(path: Path) -> Any:
        file = open_regular(path)
        size = os.fstat(file.fileno())
        with path.open("ab") as other:
            other.write(b"y" * 10)
        monkeypatch.setattr("os.fstat", lambda _: size)
        return file

    open_regular = files.open_regular
    monkeypatch.setattr(files, "open_regular", grown)
    with pytest.raises(LawcatError, match="changed while it was read"):
        files.read_bytes(tmp_path / "log", 100)


def test_a_failed_write_leaves_the_old_file_and_nothing_beside(tmp_path: Path) -> None:
    target = tmp_path / "f"
    files.write_text(target, "old")
    with pytest.raises(RuntimeError), files.atomic_file(target) as file:  # noqa: PT012
        file.write(b"half")
        raise RuntimeError
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("f", "old")]


def test_a_full_disk_is_one_sentence(tmp_path: Path) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")

    def write() -> None:
        with files.atomic_file(tmp_path / "f") as file:
            os.dup2(os.open("/dev/full", os.O_WRONLY), file.fileno())
            file.write(b"x" * 10_000_000)

    with pytest.raises(LawcatError, match="No space left"):
        write()
    assert not list(tmp_path.iterdir())


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    target = tmp_path / "b"
    for text in ("one", "two"):
        with files.atomic_folder(target, "marker") as building:
            (building / "marker").write_text(text)
            (building / text).write_text(text)
    assert sorted(p.name for p in target.iterdir()) == ["marker", "two"]
    with pytest.raises(RuntimeError), files.atomic_folder(target, "marker"):
        raise RuntimeError
    assert (target / "marker").read_text() == "two"
    assert [p.name for p in tmp_path.iterdir()] == ["b"]


def test_without_an_exchange_in_one_step_two_renames_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_exchange", lambda a, b: False)
    test_a_folder_is_replaced_whole(tmp_path)
    # A kill between the two renames: the next writer puts the old one back before it begins.
    os.rename(tmp_path / "b", tmp_path / ".b.old-1-ab")
    with pytest.raises(RuntimeError), files.atomic_folder(tmp_path / "b", "marker"):
        raise RuntimeError
    assert (tmp_path / "b" / "marker").read_text() == "two"


def test_a_folder_of_other_things_is_not_replaced(tmp_path: Path) -> None:
    target = tmp_path / "photos"
    target.mkdir()
    (target / "cat.jpg").write_text("cat")
    with pytest.raises(LawcatError, match="holds other files"), files.atomic_folder(target, "marker"):
        pass
    assert (target / "cat.jpg").read_text() == "cat"
    (tmp_path / "file").write_text("x")
    with pytest.raises(LawcatError, match="not a folder"), files.atomic_folder(tmp_path / "file", "marker"):
        pass


def test_two_writers_of_one_target(tmp_path: Path) -> None:
    with files.FileLock(tmp_path / "x"):
        with (
            pytest.raises(LawcatError, match="Another process is writing"),
            files.atomic_file(tmp_path / "x"),
        ):
            pass
        files.write_text(tmp_path / "y", "another target is free")
    files.write_text(tmp_path / "x", "free again")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x", "y"]


def test_a_killed_writer_leaves_the_old_folder_and_no_lock(tmp_path: Path) -> None:
    target = tmp_path / "b"
    with files.atomic_folder(target, "marker") as building:
        (building / "marker").write_text("old")
    code = (
        "import sys, time\nfrom lawcat_edge.runtime.files import atomic_folder\n"
        f"with atomic_folder({str(target)!r}, 'marker') as f:\n"
        "    (f / 'marker').write_text('half'); print('go', flush=True); time.sleep(60)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stdout.readline() == b"go\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    assert (target / "marker").read_text() == "old"
    with files.atomic_folder(target, "marker") as building:
        (building / "marker").write_text("new")
    assert (target / "marker").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["b"]  # the killed one's folder is gone too


def test_the_fingerprint_sees_a_change(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_text("a")
    before = files.fingerprint(path)
    time.sleep(0.01)
    path.write_text("b")
    assert files.fingerprint(path) != before
