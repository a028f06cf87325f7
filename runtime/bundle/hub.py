"""Bundles and adapters by their name on the hub, ``owner/name``: fetched once, checked, kept in the cache.

A name may end in ``@revision`` (a branch, tag or commit; default main), and ``hub:owner/name`` says that no
folder here is meant. What lies in the cache is a whole folder of real files of one commit, each of the size
and sha256 that its manifest records. Needs huggingface_hub, which comes with tokenizers.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lawcat_edge.runtime import files
from lawcat_edge.runtime.errors import CheckFailed, LawcatError

PREFIX = "hub:"
ADAPTER_CONFIG, ADAPTER_TENSORS = "lawcat_config.json", "adapter.safetensors"
BUNDLE_MANIFEST = "lawcat_bundle.json"
MAX_ADAPTER_BYTES = 8 << 30
_NAME = re.compile(
    r"(?P<id>[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})(@(?P<revision>[\w][\w./-]{0,200}))?"
)


def cache_folder() -> Path:
    """Where what was fetched or converted is kept: LAWCAT_EDGE_CACHE, else ~/.cache/lawcat-edge."""
    given = os.environ.get("LAWCAT_EDGE_CACHE")
    if given:
        return files.user_path(given)
    try:
        return Path.home() / ".cache" / "lawcat-edge"
    except RuntimeError:
        raise LawcatError(
            "There is no home folder to keep fetched and converted models in; set LAWCAT_EDGE_CACHE to a "
            "folder."
        ) from None


def located(name: Path | str) -> Path:
    """The folder that the user calls `name`: a path, or a bundle or adapter of the hub, fetched if need be.

    A path that does not exist is given back as it is when it cannot be a name of the hub, or when its first
    part is a folder here: that is a slip in a path, and none of the hub's business.
    """
    path = Path(name)
    text = path.as_posix() if isinstance(name, Path) else name  # a Path has lost its "./"
    explicit = text.startswith(PREFIX)
    if not explicit and (path.exists() or Path(text.split("/")[0]).exists()):
        return path
    found = _NAME.fullmatch(text.removeprefix(PREFIX))
    if found is None:
        if explicit:
            raise LawcatError(f"{text!r} is no name on the hub; write hub:owner/name or hub:owner/name@tag.")
        return path
    return fetch(found["id"], found["revision"])


def check_name(repo: str, revision: str | None = None) -> None:
    """Raise LawcatError for what cannot be a model's name on the hub."""
    named = _NAME.fullmatch(f"{repo}@{revision}" if revision else repo)
    if named is None or named["id"] != repo:
        raise LawcatError(f"{repo!r} is no folder, and no name on the hub; that would be owner/name.")


def fetch(
    repo: str, revision: str | None = None, token: str | bool | None = None, cache: Path | None = None
) -> Path:
    """The bundle or adapter `repo` ("owner/name") of the hub, as a folder of checked files.

    revision: a branch, tag or commit. token: of the hub's account; default: the one that was logged in.
    Without a connection, what was fetched last of this revision. Raises LawcatError when there is none.
    """
    check_name(repo, revision)
    place = (cache or cache_folder() / "hub") / repo.replace("/", "--")
    revision = revision or "main"
    info = _info(repo, revision, token)
    if info is None:
        kept = _kept(place, revision)
        if kept is None:
            raise LawcatError(
                f"There is no folder {repo}, and the hub cannot be reached to look for it (offline?); "
                "connect, or give a folder."
            )
        return kept
    commit, sizes = info
    target = place / commit
    if not target.is_dir():
        _download(repo, commit, sizes, token, target)
    _remember(place, revision, commit)
    return target


def _info(repo: str, revision: str, token: str | bool | None) -> tuple[str, dict[str, int]] | None:
    """(commit, size by file) of a revision; None when the hub cannot be reached."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        found = HfApi(token=token).model_info(repo, revision=revision, files_metadata=True, timeout=20)
    except RepositoryNotFoundError as error:
        raise LawcatError(
            f"There is no folder {repo}, and the hub has no model of this name (a private one needs "
            "`hf auth login`); check the name."
        ) from error
    except RevisionNotFoundError as error:
        raise LawcatError(f"{repo} has no revision {revision!r} on the hub; check what follows @.") from error
    except HfHubHTTPError as error:
        raise LawcatError(f"The hub did not give {repo}: {_first_line(error)}; try again later.") from error
    except Exception:  # no route, no name, offline mode: each version of the client has its own types
        return None
    if not isinstance(found.sha, str) or not re.fullmatch(r"[0-9a-f]{4,64}", found.sha):
        raise LawcatError(f"The hub names no commit of {repo}; try again later.")
    return found.sha, {entry.rfilename: entry.size or 0 for entry in found.siblings or []}


def _download(repo: str, commit: str, sizes: Mapping[str, int], token: Any, target: Path) -> None:
    """Fetch the files of a bundle or an adapter and check them; the folder gets its name when it is whole."""
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    # Stays after a broken download, for the next one to go on with.
    building = target.with_name(f".{target.name}.fetch")
    target.parent.mkdir(parents=True, exist_ok=True)

    def get(name: str) -> Path:
        try:
            # In a folder of ours: the hub's own cache is one of links, which a bundle may not hold.
            api.hf_hub_download(repo, name, revision=commit, local_dir=building)
        except OSError as error:
            if error.errno is not None:
                raise  # disk full, no permission: the command line says so
            raise _broken(repo, name, error) from error
        except Exception as error:  # the connection's: each version of the client has its own types
            raise _broken(repo, name, error) from error
        return building / name

    with files.FileLock(target):
        if target.is_dir():
            return  # by another process, meanwhile
        first = next((name for name in (BUNDLE_MANIFEST, ADAPTER_CONFIG) if name in sizes), None)
        if first is None:
            raise LawcatError(
                f"{repo} on the hub is neither a bundle nor an adapter: it has no {BUNDLE_MANIFEST} and no "
                f"{ADAPTER_CONFIG}."
            )
        if sizes[first] > files.MAX_JSON_BYTES:
            raise LawcatError(f"{first} of {repo} is larger than such a file can be.")
        members = _members(get(first), sizes)
        for name, (size, _) in members.items():
            if name not in sizes:
                raise LawcatError(f"{repo} on the hub has no {name}, which its {first} lists; ask its owner.")
            if size is not None and sizes[name] != size:
                raise CheckFailed(f"{name} of {repo} has {sizes[name]:,} bytes, {first} records {size:,}.")
        for name, (size, sha256) in members.items():
            path = get(name)
            good = size is None or path.stat().st_size == size
            if not good or (sha256 is not None and files.sha256_file(path) != sha256):
                path.unlink()
                raise CheckFailed(
                    f"{name} of {repo} is not the file that {first} records (sha256 differs); try again."
                )
        for extra in list(building.iterdir()):
            if extra.name not in (first, *members):
                shutil.rmtree(extra) if extra.is_dir() else extra.unlink()
        building.rename(target)


def _members(path: Path, sizes: Mapping[str, int]) -> dict[str, tuple[int | None, str | None]]:
    """{file: (size, sha256)} that a manifest or an adapter's config lists; None: recorded nowhere."""
    data = files.read_json(path)
    if path.name == BUNDLE_MANIFEST:
        from lawcat_edge.runtime.bundle.manifest import Manifest
        from lawcat_edge.runtime.bundle.signature import SIGNATURE

        listed = Manifest.from_dict(data).files
        signed = {SIGNATURE: (None, None)} if sizes.get(SIGNATURE, 1 << 20) < 1 << 16 else {}
        return {name: (entry["size"], entry["sha256"]) for name, entry in listed.items()} | signed
    digest = data.get("tensors_sha256") if isinstance(data, dict) else None
    if not isinstance(digest, str):
        raise LawcatError(f"{path.name} records no sha256 of its tensors; ask the adapter's owner.")
    size = sizes.get(ADAPTER_TENSORS, 0)
    if size > MAX_ADAPTER_BYTES:
        raise LawcatError(f"{ADAPTER_TENSORS} has {size:,} bytes, more than an adapter has.")
    beside = [name for name in ("generation_config.json",) if sizes.get(name, 1 << 20) < 1 << 16]
    return {ADAPTER_TENSORS: (None, digest), **{name: (None, None) for name in beside}}


def _remember(place: Path, revision: str, commit: str) -> None:
    """Note which commit a branch or tag was last, for when the hub cannot be reached."""
    noted = _noted(place)
    if noted.get(revision) != commit:
        files.write_json(place / "revisions.json", {**noted, revision: commit})


def _kept(place: Path, revision: str) -> Path | None:
    folder = place / _noted(place).get(revision, revision)
    return folder if folder.parent == place and folder.is_dir() else None


def _noted(place: Path) -> dict[str, str]:
    path = place / "revisions.json"
    data = files.read_json(path) if path.is_file() else {}
    pairs = data.items() if isinstance(data, dict) else ()
    return {key: value for key, value in pairs if isinstance(value, str) and re.fullmatch("[0-9a-f]+", value)}


def _broken(repo: str, name: str, error: Exception) -> LawcatError:
    return LawcatError(
        f"Fetching {name} of {repo} broke off ({_first_line(error)}); run the command again to go on."
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200].rstrip(".")
