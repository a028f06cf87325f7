r"""Signed bundles: who made this one? Off by default; needs the package cryptography (extra ``sign``).

``lawcat_bundle.json.sig`` holds the Ed25519 signature (RFC 8032, 64 bytes) of the manifest's bytes. The
manifest holds the sha256 of every other file, so the signature stands for the whole bundle. Keys are PEM:

    openssl genpkey -algorithm ed25519 -out key.pem
    openssl pkey -in key.pem -pubout -out key.pub
    openssl pkeyutl -verify -pubin -inkey key.pub -rawin \
        -in lawcat_bundle.json -sigfile lawcat_bundle.json.sig
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lawcat_edge.runtime import files
from lawcat_edge.runtime.errors import CheckFailed, LawcatError

SIGNATURE = "lawcat_bundle.json.sig"
_MAX_KEY = 64 << 10


def load_private_key(path: Path | str) -> Any:
    """The Ed25519 private key of an unencrypted PEM file; LawcatError for anything else."""
    serialization, ed25519 = _cryptography()
    return _load(path, lambda data: serialization.load_pem_private_key(data, None), ed25519.Ed25519PrivateKey)


def sign(folder: Path, manifest: str, key: Any) -> None:
    """Write the signature of the manifest file in `folder` with a key of ``load_private_key``."""
    signature = key.sign(files.read_bytes(files.member_path(folder, manifest), files.MAX_JSON_BYTES))
    with files.atomic_file(folder / SIGNATURE) as file:
        file.write(signature)


def check(folder: Path, manifest: bytes, public_key: Path | str) -> None:
    """Raise CheckFailed unless `folder` holds a signature of these manifest bytes by that key (PEM file)."""
    serialization, ed25519 = _cryptography()
    from cryptography.exceptions import InvalidSignature

    key = _load(public_key, serialization.load_pem_public_key, ed25519.Ed25519PublicKey)
    if not (folder / SIGNATURE).exists():
        raise CheckFailed(
            f"{folder} is not signed (no {SIGNATURE}); get it from its maker, or do not trust it."
        )
    signature = files.read_bytes(files.member_path(folder, SIGNATURE), 64)
    try:
        key.verify(signature, manifest)
    except InvalidSignature as error:
        raise CheckFailed(
            f"{folder / SIGNATURE} is not the signature of this manifest by {public_key}; do not trust it."
        ) from error


def _load(path: Path | str, parse: Any, kind: type) -> Any:
    try:
        key = parse(files.read_bytes(Path(path), _MAX_KEY))
    except LawcatError:
        raise
    except Exception as error:  # cryptography raises several types for what is no key
        raise LawcatError(f"{path} is no unencrypted PEM key ({_first_line(error)}); give one.") from error
    if not isinstance(key, kind):
        raise LawcatError(
            f"{path} is no Ed25519 key of this sort; see lawcat-edge export --help for how to make one."
        )
    return key


def _cryptography() -> tuple[Any, Any]:
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError as error:
        raise LawcatError("Signatures need cryptography; run pip install 'lawcat-edge[sign]'.") from error
    return serialization, ed25519


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200].rstrip(".")
