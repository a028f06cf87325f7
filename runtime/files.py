"""Reading and writing files that may be wrong, hostile or half written.

Writing is always: temporary name beside the target, fsync, rename. Reading is always: capped size, regular
file, inside its folder. Nothing here executes anything from a file.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import json
import math
import os
import secrets
import shutil
import stat
import sys
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np

from lawcat_edge.runtime.errors import LawcatError

MAX_JSON_BYTES = 32 << 20
MAX_JSON_DEPTH = 64
MAX_DIGITS = 38
MAX_JSON_VALUES = 2_000_000  # an empty list takes two bytes of a file and sixty of memory
_WINDOWS_DEVICES = {
    *("con", "prn", "aux", "nul", "conin$", "conout$", "clock$"),
    *(f"{d}{n}" for d in ("com", "lpt") for n in range(10)),
}


def user_path(text: str | Path) -> Path:
    """A path as the user wrote it, with ``~`` and ``~name`` as the shell reads them."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        who = Path(text).parts[0]
        raise LawcatError(f"There is no home folder for {who!r} ({text}); write the whole path.") from None


def check_member_name(name: object) -> str:
    """Return `name` if it is a plain file name (no folder, no `..`, no Windows form), else raise."""
    bad = (
        not isinstance(name, str)
        or not 0 < len(name) <= 200
        or name in (".", "..")
        # Beyond ASCII two names can look alike, or be one name on one system and two on another.
        or not (name.isascii() and name.isprintable())
        or any(c in name for c in '/\\:<>|"?*')
        or name != name.strip(" ").rstrip(".")
        or name.split(".")[0].rstrip(" ").lower() in _WINDOWS_DEVICES
        or len(PurePosixPath(str(name)).parts) != 1
    )
    if bad:
        shown = repr(name if len(repr(name)) < 80 else repr(name)[:80])
        raise LawcatError(f"The file name {shown} is not allowed in a bundle; export the bundle again.")
    assert isinstance(name, str)
    return name


def member_path(folder: Path, name: str, installed: bool = False) -> Path:
    """The path of member `name` of `folder`, checked to be a regular file that lies there.

    A symbolic link is followed only if it ends inside the folder; one that leaves it could point anywhere.
    A second hard link would let another name change the file under us.
    installed: the file came with this package, and some installers link files from a cache of theirs.
    """
    path = folder / check_member_name(name)
    try:
        info = os.lstat(path)
        if stat.S_ISLNK(info.st_mode):
            real = path.resolve(strict=True)
            if not real.is_relative_to(folder.resolve(strict=True)):
                raise LawcatError(f"{path} is a link that leaves its folder; copy the file into the folder.")
            info = os.lstat(real)
    except (OSError, RuntimeError) as error:
        raise LawcatError(f"Cannot read {path} ({_reason(error)}); is the folder complete?") from error
    if not stat.S_ISREG(info.st_mode):
        raise LawcatError(f"{path} is not a regular file; copy the bundle again.")
    if info.st_nlink > 1 and not installed:
        raise LawcatError(f"{path} has a second hard link, so it could change unnoticed; copy the folder.")
    return path


def read_bytes(path: Path, limit: int) -> bytes:
    """The whole file, at most `limit` bytes; a file that changes meanwhile is refused."""
    with open_regular(path) as file:
        try:
            # The buffer is made before anything is read, so no larger than the file needs.
            size = os.fstat(file.fileno()).st_size
            data = file.read(min(size, limit) + 1)
        except OSError as error:
            raise LawcatError(f"Cannot read {path} ({_reason(error)}); copy it again.") from error
    if len(data) > limit:
        raise LawcatError(f"{path} is larger than {limit:,} bytes, more than such a file has; copy it again.")
    if len(data) != size:
        raise LawcatError(f"{path} changed while it was read; try again when nothing writes to it.")
    return data


def open_regular(path: Path) -> BufferedReader:
    """Open a regular file for reading; anything else is refused instead of waited for (a pipe, a device)."""
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        file = os.fdopen(descriptor, "rb")
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            file.close()
            raise LawcatError(f"{path} is not a regular file; give a copy of it that is one.")
        return file
    except OSError as error:
        raise LawcatError(f"Cannot read {path} ({_reason(error)}); check the path.") from error


def parse_json(data: bytes, what: str, max_depth: int = MAX_JSON_DEPTH) -> Any:
    """JSON with caps on its depth and on the number of its values (checked before parsing), unique keys,
    and no number that is not finite."""
    # Before parsing: the standard parser recurses, and its RecursionError comes late and differs by version.
    deepest, values = _json_extent(data)
    if deepest > max_depth:
        raise LawcatError(f"{what} is nested {deepest} levels deep; at most {max_depth} are allowed.")
    if values > MAX_JSON_VALUES:
        raise LawcatError(f"{what} holds {values:,} values; at most {MAX_JSON_VALUES:,} are allowed.")
    try:
        return json.loads(
            data.decode("utf-8-sig"),  # editors on Windows put a mark before it
            object_pairs_hook=_unique_keys,
            parse_constant=_no_constant,
            parse_int=_short_int,
            parse_float=_finite,
        )
    except (ValueError, RecursionError) as error:
        raise LawcatError(f"{what} is not valid JSON: {str(error)[:200]}.") from error


def read_json(path: Path, limit: int = MAX_JSON_BYTES) -> Any:
    return parse_json(read_bytes(path, limit), str(path))


def _json_extent(data: bytes) -> tuple[int, int]:
    """(levels of nesting, at least the number of values) of JSON text, at a few bytes of memory a byte.

    What is no JSON may give anything: the parser, which stops at the first mistake, refuses that.
    """
    text = np.frombuffer(data, np.uint8)
    if not text.size:
        return 0, 0
    quotes = np.flatnonzero(text == ord('"'))
    # A quote behind an odd number of backslashes is a character of its string.
    last_other = np.where(text != ord("\\"), np.arange(text.size, dtype=np.int32), np.int32(-1))
    np.maximum.accumulate(last_other, out=last_other)
    before = np.where(quotes > 0, last_other[quotes - 1], -1)
    quotes = quotes[(quotes - 1 - before) % 2 == 0]
    inside = np.zeros(text.size, np.bool_)
    inside[quotes] = True
    inside = np.logical_xor.accumulate(inside)
    text = np.where(inside, np.uint8(0), text)
    opening = (text == ord("[")) | (text == ord("{"))
    closing = (text == ord("]")) | (text == ord("}"))
    depth = np.cumsum(opening.astype(np.int8) - closing.astype(np.int8), dtype=np.int32)
    return int(depth.max()), 1 + int(opening.sum()) + int((text == ord(",")).sum())


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key occurs twice in one object")
    return result


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number")


def _short_int(text: str) -> int:
    # transformers writes 1000000000000000019884624838656 for "no limit" into ordinary tokenizer_config.json;
    # whatever has 38 digits still fits a float32.
    if len(text) > MAX_DIGITS:
        raise ValueError(f"a whole number has more than {MAX_DIGITS} digits")
    return int(text)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is too large a number")
    return value


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file, read in pieces (hashlib releases the interpreter lock)."""
    with open_regular(path) as file:
        info = os.fstat(file.fileno())
        # A terabyte that is not on the disk (a download that was broken off) takes an hour to read.
        if info.st_size > 1 << 30 and getattr(info, "st_blocks", info.st_size) * 512 < info.st_size // 8:
            raise LawcatError(
                f"{path} is mostly holes, as a download that broke off leaves it; get it again."
            )
        try:
            return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise LawcatError(f"Cannot read {path} ({_reason(error)}); copy it again.") from error


def fingerprint(path: Path) -> tuple[int, ...]:
    """What changes when a file is replaced or written to while we work with it."""
    info = os.stat(path)
    return info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns


@contextlib.contextmanager
def atomic_file(target: Path | str) -> Iterator[IO[bytes]]:
    """Open a file for writing that appears under `target` only when whole (fsync, then rename)."""
    target = Path(target)
    temporary = target.with_name(f".{target.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        with FileLock(target):
            _remove_leftovers(target)
            with open(temporary, "xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
            _sync_folder(target.parent)
    except OSError as error:
        raise _not_written(target, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_text(target: Path | str, text: str) -> None:
    with atomic_file(target) as file:
        file.write(text.encode("utf-8"))


def write_json(target: Path | str, value: Any) -> None:
    write_text(target, json.dumps(value, ensure_ascii=False, indent=1, allow_nan=False) + "\n")


@contextlib.contextmanager
def atomic_folder(target: Path | str, marker: str) -> Iterator[Path]:
    """Yield an empty folder beside `target` that takes its place, whole, at the end of the block.

    marker: name of the file that tells a folder of this kind. An existing non-empty target without it is
    refused, because it holds something else of the user's.
    """
    target = Path(os.path.abspath(target))
    stamp = f"{os.getpid()}-{secrets.token_hex(4)}"
    temporary = target.with_name(f".{target.name}.tmp-{stamp}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target):
            _restore_interrupted(target)
            _remove_leftovers(target)
            _check_replaceable(target, marker)
            temporary.mkdir()
            yield temporary
            for member in sorted(temporary.rglob("*")):
                if member.is_file() and not member.is_symlink():
                    with open(member, "rb+") as file:
                        os.fsync(file.fileno())
            _sync_folder(temporary)
            _check_replaceable(target, marker)
            _swap_in(temporary, target, stamp)
    except OSError as error:
        raise _not_written(target, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _check_replaceable(target: Path, marker: str) -> None:
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise LawcatError(f"{target} exists and is not a folder; choose another place.")
    if target.is_dir() and any(target.iterdir()) and not (target / marker).is_file():
        raise LawcatError(f"{target} holds other files (there is no {marker} in it); choose another folder.")


def _swap_in(temporary: Path, target: Path, stamp: str) -> None:
    if not target.exists():
        os.rename(temporary, target)
    elif _exchange(temporary, target):
        pass  # the old folder now has the temporary name and is removed by the caller
    else:
        # Two renames: a kill between them leaves the old folder under a name _restore_interrupted knows.
        old = target.with_name(f".{target.name}.old-{stamp}")
        os.rename(target, old)
        os.rename(temporary, target)
        shutil.rmtree(old, ignore_errors=True)
    _sync_folder(target.parent)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two names in one step where the system can (Linux), so that no moment is without a target."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    at_cwd, exchange_flag = -100, 2
    return bool(rename(at_cwd, os.fsencode(a), at_cwd, os.fsencode(b), exchange_flag) == 0)


def _restore_interrupted(target: Path) -> None:
    if target.exists():
        return
    for old in sorted(target.parent.glob(f".{_glob_escape(target.name)}.old-*")):
        os.rename(old, target)
        return


def _remove_leftovers(target: Path) -> None:
    """Remove what killed writers left; safe because the caller holds the target's lock."""
    for pattern in ("tmp-*", "old-*"):
        for path in target.parent.glob(f".{_glob_escape(target.name)}.{pattern}"):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):
                    path.unlink()


def _glob_escape(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _not_written(target: Path, error: OSError) -> LawcatError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        step = "free some space and run the command again"
    elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        step = "choose another place or change its permissions"
    else:
        step = "check the path and run the command again"
    return LawcatError(f"Cannot write {target}: {_reason(error)}; nothing was changed; {step}.")


def _reason(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


class FileLock:
    """One writer per target: a lock on `.<name>.lock` beside it, released by the system on a kill."""

    def __init__(self, target: Path | str) -> None:
        target = Path(os.path.abspath(target))
        self.target = target
        self.path = target.with_name(f".{target.name}.lock")
        self._fd: int | None = None

    def __enter__(self) -> FileLock:
        for _ in range(100):
            try:
                fd = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
            except OSError as error:
                raise _not_written(self.target, error) from error
            try:
                _lock(fd)
                # The holder before us removes the name on release: a lock on a removed file protects nothing.
                if os.path.exists(self.path) and os.path.samestat(os.fstat(fd), os.stat(self.path)):
                    self._fd = fd
                    return self
            except OSError as error:
                os.close(fd)
                raise LawcatError(
                    f"Another process is writing {self.target}; wait for it or choose another place."
                ) from error
            os.close(fd)
        raise LawcatError(f"Cannot lock {self.target}; try again.")

    def __exit__(self, *_: object) -> None:
        if self._fd is not None:
            with contextlib.suppress(OSError):
                if os.name != "nt":
                    os.unlink(self.path)
            os.close(self._fd)
            self._fd = None


if os.name == "nt":  # pragma: no cover
    import msvcrt

    def _lock(fd: int) -> None:
        msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
else:
    import fcntl

    def _lock(fd: int) -> None:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
