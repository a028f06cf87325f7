"""A note that a bundle's files were hashed, so that they are not read twice at every start.

It lies in the cache folder (see ``hub.cache_folder``), not in the bundle, so that no bundle brings its own.
It holds the manifest's sha256 and each file's fingerprint as it was while the file was hashed, and counts
only for its owner and for files that have not changed since. Without a note, or with one that does not fit,
files are hashed; what cannot be written or read is no error. ``verify`` neither reads nor writes notes.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from collections.abc import Mapping
from pathlib import Path

from lawcat_edge.runtime import files
from lawcat_edge.runtime.bundle import hub
from lawcat_edge.runtime.errors import LawcatError

Fingerprints = Mapping[str, tuple[int, ...]]

LEAST_BYTES = 16 << 20  # of a bundle: a smaller one is hashed sooner than anybody notices
_MAX_BYTES = 1 << 20
# File systems count time in steps, of two seconds at most (FAT). A file that was written less than that
# before it was read could be written again and look the same.
_SETTLED_NS = 3_000_000_000


def stands(folder: Path, manifest_sha256: str, seen: Fingerprints) -> bool:
    """Whether the files of the bundle in `folder` were hashed before, with these fingerprints."""
    with contextlib.suppress(OSError, LawcatError):
        path = _path(folder)
        info = os.lstat(path)
        if not stat.S_ISREG(info.st_mode) or (hasattr(os, "getuid") and info.st_uid != os.getuid()):
            return False
        return bool(files.read_json(path, _MAX_BYTES) == _content(manifest_sha256, seen))
    return False


def put(folder: Path, manifest_sha256: str, seen: Fingerprints, hashed_from_ns: int) -> None:
    """Note that all files were found as the manifest says, hashed from ``time.time_ns()`` on.

    seen: their fingerprints, taken before and unchanged after. Files too young to be told apart from a later
    writing are not noted.
    """
    newest = max(time for fingerprint in seen.values() for time in fingerprint[-2:])
    if newest > hashed_from_ns - _SETTLED_NS:
        return
    with contextlib.suppress(OSError, LawcatError):
        path = _path(folder)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        files.write_json(path, _content(manifest_sha256, seen))


def _path(folder: Path) -> Path:
    """One note a folder: a new bundle in its place takes the old one's."""
    where = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()
    return hub.cache_folder() / "hashed" / f"{where[:32]}.json"


def _content(manifest_sha256: str, seen: Fingerprints) -> dict[str, object]:
    # as JSON gives them back
    return {"manifest": manifest_sha256, "files": {name: list(seen[name]) for name in sorted(seen)}}
