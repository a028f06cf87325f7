"""The wheel, not the checkout: it is whole, every module of the four rooms imports, and the command runs."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from tiny_teacher import make_teacher

from lawcat_edge import __version__
from lawcat_edge.runtime import Bundle
from lawcat_edge.runtime.bundle.flavours import DEFAULT_OPS
from lawcat_edge.teacher import EMBEDDED

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("lawcat_edge", "export", "runtime", "calibration")
ADAPTER = "adapters/smollm2-135m-general"
OPERATORS = "lawcat_edge/runtime/native/_operators.abi3.so"
COMPILER = (os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc").split()[0]


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "LAWCAT"))}
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd, env=clean | environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def setuptools_version() -> int:
    try:
        return int(metadata.version("setuptools").split(".")[0])
    except metadata.PackageNotFoundError:
        return 0


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy, so that a build leaves nothing in the checkout, and finds nothing that was built there."""
    source = tmp_path_factory.mktemp("build") / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for room in ROOMS:
        ignored = shutil.ignore_patterns("__pycache__", "*.so")
        shutil.copytree(ROOT / room, source / room, symlinks=True, ignore=ignored)
    shutil.copytree(ROOT / ADAPTER, source / ADAPTER)
    return source


def build_wheel(source: Path, into: Path, **environment: str) -> Path:
    # the setuptools that is here if it is new enough, so that the test needs no network
    offline = ("--no-build-isolation", "--no-index") if setuptools_version() >= 77 else ()
    options = ("--no-deps", *offline, "--wheel-dir", into, source)
    run(sys.executable, "-m", "pip", "wheel", *options, cwd=into, **environment)
    (built,) = into.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(source, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a clean environment that holds the wheel, and sees this one's other packages."""
    place = tmp_path_factory.mktemp("installed") / "venv"
    venv.create(place, with_pip=False, symlinks=os.name != "nt")
    scripts = place / ("Scripts" if os.name == "nt" else "bin")
    options = ("--no-deps", "--no-index", wheel)
    run(sys.executable, "-m", "pip", "--python", scripts / "python", "install", *options, cwd=place)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(place), "platbase": str(place)}))
    assert (site / "lawcat_edge").is_dir()
    # behind the wheel on the path, and without running the .pth files (an editable install) that lie there
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return scripts / "python"


def held_in(wheel: Path) -> set[str]:
    """The files beside those that describe the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def stated(wheel: Path, name: str) -> str:
    """A file of those that describe the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        (found,) = (each for each in archive.namelist() if each.endswith(f".dist-info/{name}"))
        return archive.read(found).decode()


def test_the_wheel_holds_every_source_file_and_nothing_else(wheel: Path) -> None:
    """And the operators, but not what they are compiled from."""
    wanted = {OPERATORS} if shutil.which(COMPILER) else set()
    for room in ROOMS:
        prefix = Path("lawcat_edge") if room == "lawcat_edge" else Path("lawcat_edge") / room
        for folder, folders, files in os.walk(ROOT / room):  # does not follow the links to the other rooms
            if "web" in folders:  # the page, which npm builds
                folders.remove("web")
            inside = prefix / Path(folder).relative_to(ROOT / room)
            if inside.name == "optimum_cli":  # a file for a namespace of optimum's
                inside = Path("optimum/commands/register")
            wanted |= {
                (inside / name).as_posix() for name in files if name.endswith((".py", ".json", ".typed"))
            }
    for name in (
        "README.md",
        "adapter.safetensors",
        "full_attention.json",
        "generation_config.json",
        "lawcat_config.json",
    ):
        wanted.add(f"lawcat_edge/{ADAPTER}/{name}")  # and no pictures, no log
    page = ROOT / "runtime" / "web" / "src"
    wanted |= {f"lawcat_edge/runtime/web/src/{path.name}" for path in page.iterdir()}
    assert held_in(wheel) == wanted


def test_the_wheel_says_its_licences(wheel: Path) -> None:
    """The operators are compiled with a header of onnxruntime's, which brings a licence of its own."""
    assert "\nLicense-Expression: Apache-2.0 AND MIT\n" in stated(wheel, "METADATA")
    assert "Apache License" in stated(wheel, "licenses/LICENSE")
    header = "runtime/native/third_party"
    mit = stated(wheel, f"licenses/{header}/LICENSE")
    assert "Permission is hereby granted, free of charge" in mit
    assert "Microsoft" in mit
    named = {path.name for path in (ROOT / header).iterdir()}
    assert named == {"LICENSE", "onnxruntime_c_api.h"}, "the licence is that of this header alone"


def test_one_wheel_serves_every_python_of_its_platform(wheel: Path) -> None:
    tag = next(line for line in stated(wheel, "WHEEL").splitlines() if line.startswith("Tag: "))
    assert tag.startswith("Tag: cp311-abi3-")
    assert not tag.endswith("-any")
    assert "Root-Is-Purelib: false" in stated(wheel, "WHEEL")


def test_without_a_compiler_the_wheel_lacks_the_operators_alone(
    source: Path, wheel: Path, tmp_path: Path
) -> None:
    clean = tmp_path / "source"
    shutil.copytree(source, clean, symlinks=True, ignore=shutil.ignore_patterns("build", "*.so"))
    without = build_wheel(clean, tmp_path, CC="/nonexistent/cc")
    assert held_in(without) == held_in(wheel) - {OPERATORS}


def test_the_operators_can_be_compiled_from_the_source_distribution(source: Path, tmp_path: Path) -> None:
    code = f"from setuptools.build_meta import build_sdist; build_sdist({str(tmp_path)!r})"
    run(sys.executable, "-c", code, cwd=source)
    (packed,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(packed) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    native = {path.relative_to(ROOT).as_posix() for path in (ROOT / "runtime/native").rglob("*")}
    wanted = {name for name in native if name.endswith((".c", ".h", ".py", "/LICENSE"))}
    assert len(wanted) > 5
    assert wanted <= held, wanted - held


def test_no_extra_compiles_llama_cpp(wheel: Path) -> None:
    """The wheel of the demo's teacher requires it, so that one is fetched alone, the same everywhere."""
    lines = stated(wheel, "METADATA").splitlines()
    required = [line for line in lines if line.startswith("Requires-Dist:")]
    assert len(required) > 20
    assert not [line for line in required if "llm" in line.lower() or "llama" in line.lower()]
    for file in ("README.md", "Makefile"):
        assert f"--no-deps {EMBEDDED}" in (ROOT / file).read_text()


def test_every_module_imports_from_the_installed_wheel(python: Path, tmp_path: Path) -> None:
    code = """
import importlib, pkgutil, sys
import lawcat_edge
names = [m.name for m in pkgutil.walk_packages(lawcat_edge.__path__, "lawcat_edge.", onerror=lambda n: None)]
for name in names:
    if "triton" in name and not TRITON or name.endswith("__main__"):
        continue
    if name == "lawcat_edge.runtime.native._operators":  # onnxruntime's to load: nothing of Python is in it
        continue
    module = importlib.import_module(name)
    assert module.__file__.startswith(sys.prefix), module.__file__
rooms = {name.split(".")[1] for name in names}
assert {"export", "runtime", "calibration", "distill", "evaluate", "ops", "commands"} <= rooms, rooms
assert not {"export", "runtime", "calibration"} & set(sys.modules), "a room under its bare name"
print(len(names))
"""
    triton = importlib.util.find_spec("triton") is not None
    count = int(run(python, "-c", code.replace("TRITON", str(triton)), cwd=tmp_path))
    assert count > 60


def test_optimum_finds_the_export_command(python: Path, tmp_path: Path) -> None:
    """Its command line, with the installed wheel, writes a bundle."""
    teacher = make_teacher(tmp_path / "teacher")
    optimum = (python, "-m", "optimum.commands.optimum_cli", "export", "lawcat")
    run(*optimum, "--model", teacher, "--scheme", "fp32", tmp_path / "bundle", cwd=tmp_path)
    manifest = Bundle.open(tmp_path / "bundle").manifest
    assert manifest.scheme == "fp32"
    assert tuple(manifest.ops) == DEFAULT_OPS
    if shutil.which(COMPILER):
        checked = run(python, "-m", "lawcat_edge", "verify", tmp_path / "bundle", cwd=tmp_path)
        assert "parity (native)" in checked
        assert "not run" not in checked


def test_the_installed_command_runs(python: Path, tmp_path: Path) -> None:
    command = python.with_name("lawcat-edge")
    assert run(command, "--version", cwd=tmp_path) == f"lawcat-edge {__version__}\n"
    assert run(python, "-m", "lawcat_edge", "--version", cwd=tmp_path) == f"lawcat-edge {__version__}\n"
    assert "lawcat-edge distill smollm2" in run(command, "distill", "--help", cwd=tmp_path)
    recipes = "from lawcat_edge.distill.settings import recipe_names; print(*recipe_names())"
    assert "passkey" in run(python, "-c", recipes, cwd=tmp_path)


def test_the_installed_wheel_has_the_adapter_of_the_demo(python: Path, tmp_path: Path) -> None:
    found = run(python, "-m", "lawcat_edge", "info", "smollm2-135m-general", cwd=tmp_path)
    assert found.startswith("adapter smollm2-135m-general\n")
    assert "teacher   smollm2" in found
