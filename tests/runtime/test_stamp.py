"""Files that did not change are hashed once; no note, forged or wrong, makes `verify` say less."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_bundle import build_tiny_bundle

from lawcat_edge.runtime import files
from lawcat_edge.runtime.bundle import stamp
from lawcat_edge.runtime.bundle.manifest import Bundle
from lawcat_edge.runtime.bundle.verify import verify
from lawcat_edge.runtime.errors import CheckFailed

WEIGHTS = "model.onnx.data"


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundle that counts as large, whose files count as old."""
    folder = build_tiny_bundle(tmp_path / "bundle")
    monkeypatch.setenv("LAWCAT_EDGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(stamp, "LEAST_BYTES", 0)
    monkeypatch.setattr(stamp, "_SETTLED_NS", -(1 << 62))
    return folder


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> Callable[[], set[str]]:
    """The names of the files that were hashed since the last call."""
    names: set[str] = set()
    real = files.sha256_file

    def sha256_file(path: Path) -> str:
        names.add(path.name)
        return real(path)

    def since() -> set[str]:
        found = set(names)
        names.clear()
        return found

    monkeypatch.setattr(files, "sha256_file", sha256_file)
    return since


def note(cache: Path) -> Path:
    (found,) = (cache / "hashed").iterdir()
    return found


def flip(path: Path) -> None:
    """Change a byte, and give the file its old time of writing back."""
    before = os.stat(path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def forge(bundle: Path, cache: Path) -> None:
    """Have the note say that the files as they are now were hashed."""
    content = json.loads(note(cache).read_text())
    content["files"] = {name: list(files.fingerprint(bundle / name)) for name in content["files"]}
    note(cache).write_text(json.dumps(content))


def test_what_was_hashed_is_not_hashed_again_until_it_changes(
    bundle: Path, hashed: Callable[[], set[str]]
) -> None:
    everything = set(Bundle.open(bundle).manifest.files)
    assert hashed() == everything
    Bundle.open(bundle)
    assert hashed() == set()
    os.utime(bundle / WEIGHTS)
    Bundle.open(bundle)
    assert hashed() == everything
    Bundle.open(bundle)
    assert hashed() == set()


def test_a_change_that_keeps_size_and_time_of_writing_is_seen(bundle: Path) -> None:
    Bundle.open(bundle)
    flip(bundle / WEIGHTS)
    with pytest.raises(CheckFailed, match=f"{WEIGHTS} is not the file"):
        Bundle.open(bundle)


def test_another_manifest_and_a_copy_are_hashed(
    bundle: Path, tmp_path: Path, hashed: Callable[[], set[str]]
) -> None:
    Bundle.open(bundle)
    manifest = bundle / "lawcat_bundle.json"
    manifest.write_text(manifest.read_text() + "\n")
    hashed()
    Bundle.open(bundle)
    assert WEIGHTS in hashed()
    os.rename(bundle, tmp_path / "moved")
    Bundle.open(tmp_path / "moved")
    assert WEIGHTS in hashed()


def test_a_forged_note_makes_verify_and_signatures_say_no_less(
    bundle: Path, tmp_path: Path, hashed: Callable[[], set[str]]
) -> None:
    Bundle.open(bundle)
    flip(bundle / WEIGHTS)
    forge(bundle, tmp_path / "cache")
    Bundle.open(bundle)  # what a note is worth (SECURITY.md): as much as the cache folder
    with pytest.raises(CheckFailed, match=f"{WEIGHTS} is not the file"):
        verify(bundle)
    with pytest.raises(CheckFailed, match=f"{WEIGHTS} is not the file"):
        Bundle.open(bundle, rehash=True)


def test_verify_leaves_no_note(bundle: Path, tmp_path: Path) -> None:
    verify(bundle)
    assert not (tmp_path / "cache").exists()


def test_a_signed_bundle_is_always_hashed(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, hashed: Callable[[], set[str]]
) -> None:
    Bundle.open(bundle)
    hashed()
    monkeypatch.setattr("lawcat_edge.runtime.bundle.signature.check", lambda *_: None)
    Bundle.open(bundle, public_key="maker.pub")
    assert WEIGHTS in hashed()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"manifest": 1}', b"[" * 10_000, bytes(2 << 20)])
def test_a_note_of_nonsense_is_no_note(
    bundle: Path, tmp_path: Path, content: bytes, hashed: Callable[[], set[str]]
) -> None:
    Bundle.open(bundle)
    note(tmp_path / "cache").write_bytes(content)
    hashed()
    Bundle.open(bundle)
    assert WEIGHTS in hashed()


def test_a_link_in_the_place_of_a_note_is_not_followed(
    bundle: Path, tmp_path: Path, hashed: Callable[[], set[str]]
) -> None:
    Bundle.open(bundle)
    written = note(tmp_path / "cache")
    written.rename(tmp_path / "elsewhere.json")
    written.symlink_to(tmp_path / "elsewhere.json")
    hashed()
    Bundle.open(bundle)
    assert WEIGHTS in hashed()


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="only root gives files away")
def test_anothers_note_does_not_count(bundle: Path, tmp_path: Path, hashed: Callable[[], set[str]]) -> None:
    Bundle.open(bundle)
    os.chown(note(tmp_path / "cache"), 12345, -1)
    hashed()
    Bundle.open(bundle)
    assert WEIGHTS in hashed()


def test_a_cache_that_cannot_be_written_is_no_error(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hashed: Callable[[], set[str]]
) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    Bundle.open(bundle)
    monkeypatch.delenv("LAWCAT_EDGE_CACHE")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    hashed()
    Bundle.open(bundle)
    assert WEIGHTS in hashed()


def test_young_and_small_bundles_are_not_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAWCAT_EDGE_CACHE", str(tmp_path / "cache"))
    bundle = build_tiny_bundle(tmp_path / "bundle")
    monkeypatch.setattr(stamp, "_SETTLED_NS", -(1 << 62))
    Bundle.open(bundle)  # small
    monkeypatch.setattr(stamp, "LEAST_BYTES", 0)
    monkeypatch.setattr(stamp, "_SETTLED_NS", 1 << 62)
    Bundle.open(bundle)  # young
    assert not (tmp_path / "cache").exists()
