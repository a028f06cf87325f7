"""Signed bundles: the right key passes, and nothing else does."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from tiny_bundle import build_tiny_bundle, rewrite_manifest

cryptography = pytest.importorskip("cryptography", reason="signatures need the extra `sign`")
from cryptography.hazmat.primitives import serialization  # noqa: E402
from cryptography.hazmat.primitives.asymmetric import ec, ed25519  # noqa: E402

from lawcat_edge import cli  # noqa: E402
from lawcat_edge.runtime.bundle import signature  # noqa: E402
from lawcat_edge.runtime.bundle.manifest import MANIFEST, Bundle  # noqa: E402
from lawcat_edge.runtime.bundle.verify import verify  # noqa: E402
from lawcat_edge.runtime.errors import CheckFailed, LawcatError  # noqa: E402
from lawcat_edge.runtime.generate.model import Model  # noqa: E402


def write_keys(folder: Path, name: str, key: object | None = None) -> tuple[Path, Path]:
    made = key or ed25519.Ed25519PrivateKey.generate()
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    plain = serialization.NoEncryption()
    pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    private.write_bytes(made.private_bytes(pem, pkcs8, plain))  # type: ignore[attr-defined]
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    public.write_bytes(made.public_key().public_bytes(pem, form))  # type: ignore[attr-defined]
    return private, public


@pytest.fixture
def signed(tmp_path: Path) -> tuple[Path, Path, Path]:
    """(bundle, private key, public key)"""
    bundle = build_tiny_bundle(tmp_path / "bundle")
    private, public = write_keys(tmp_path, "maker")
    signature.sign(bundle, MANIFEST, signature.load_private_key(private))
    return bundle, private, public


def test_a_signed_bundle_passes_with_its_makers_key_and_without_asking(
    signed: tuple[Path, Path, Path],
) -> None:
    bundle, _, public = signed
    assert next(check.name for check in verify(bundle, public_key=public)) == "signature"
    assert next(check.name for check in verify(bundle)) == "files"
    assert Model.load(bundle, threads=1, public_key=public).generate("a", max_new_tokens=1).result()


def test_every_other_key_signature_and_manifest_fails(
    signed: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    bundle, _, public = signed
    _, stranger = write_keys(tmp_path, "stranger")
    with pytest.raises(CheckFailed, match="do not trust it"):
        verify(bundle, public_key=stranger)
    file = bundle / signature.SIGNATURE
    good = file.read_bytes()
    assert len(good) == 64
    for bad in (b"", good[:-1], good[:-1] + bytes([good[-1] ^ 1]), bytes(64), good + b"x"):
        file.write_bytes(bad)
        with pytest.raises(LawcatError, match=r"signature|larger than 64"):
            Bundle.open(bundle, public_key=public)
    file.write_bytes(good)
    Bundle.open(bundle, public_key=public)
    # Whoever changes a file and corrects its hash has changed the manifest.
    rewrite_manifest(bundle, lambda data: data.update(name="other"))
    assert Bundle.open(bundle)
    with pytest.raises(CheckFailed, match="not the signature"):
        Bundle.open(bundle, public_key=public)
    file.unlink()
    with pytest.raises(CheckFailed, match="is not signed"):
        verify(bundle, public_key=public)


def test_a_signed_bundle_with_a_changed_file_fails(signed: tuple[Path, Path, Path]) -> None:
    bundle, _, public = signed
    with open(bundle / "tokenizer.json", "ab") as file:
        file.write(b" ")
    with pytest.raises(CheckFailed, match=r"tokenizer\.json"):
        verify(bundle, public_key=public)


def test_what_is_no_key_says_so(signed: tuple[Path, Path, Path], tmp_path: Path) -> None:
    bundle, private, public = signed
    (tmp_path / "text").write_text("not a key")
    other_private, other_public = write_keys(tmp_path, "ec", ec.generate_private_key(ec.SECP256R1()))
    for key in (tmp_path / "text", private, other_public, tmp_path / "nowhere"):
        with pytest.raises(LawcatError, match=str(key)):
            verify(bundle, public_key=key)
    for key in (tmp_path / "text", public, other_private, tmp_path / "nowhere"):
        with pytest.raises(LawcatError, match=str(key)):
            signature.load_private_key(key)


def test_the_command_line_checks_a_signature(
    signed: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle, _, public = signed
    assert cli.run(["verify", str(bundle), "--public-key", str(public)]) == 0
    assert "ok  signature" in capsys.readouterr().out
    _, stranger = write_keys(tmp_path, "stranger")
    assert cli.run(["verify", str(bundle), "--public-key", str(stranger)]) == 1
    assert cli.run(["verify", str(bundle), "--public-key", str(tmp_path / "none")]) == 1


def test_openssl_agrees(signed: tuple[Path, Path, Path]) -> None:
    bundle, _, public = signed
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("no openssl here")
    command = [openssl, "pkeyutl", "-verify", "-pubin", "-inkey", public, "-rawin"]
    command += ["-in", bundle / MANIFEST, "-sigfile", bundle / signature.SIGNATURE]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    if "unknown option" in done.stderr.lower():
        pytest.skip("an openssl before 3.0")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_an_export_is_signed_and_stays_whole(tmp_path: Path) -> None:
    from exported import make_bundle, make_student

    teacher, model, adapter = make_student(tmp_path / "teacher")
    private, public = write_keys(tmp_path, "maker")
    key = signature.load_private_key(private)
    for _ in range(2):  # the second replaces the first
        make_bundle(teacher, model, adapter, tmp_path / "b", sign_with=key)
        assert next(check.name for check in verify(tmp_path / "b", public_key=public)) == "signature"
    assert signature.SIGNATURE not in Bundle.open(tmp_path / "b").manifest.files
    make_bundle(teacher, model, adapter, tmp_path / "b")
    with pytest.raises(CheckFailed, match="is not signed"):
        verify(tmp_path / "b", public_key=public)
