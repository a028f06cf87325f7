"""The wheel, not the checkout: it is whole, every module of the four rooms imports, and the command runs."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from tiny_teacher import make_teacher

from lawcat_edge import __version__
from lawcat_edge.runtime import Bundle
from lawcat_edge.teacher import EMBEDDED

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("lawcat_edge", "export", "runtime", "calibration")
ADAPTER = "adapters/smollm2-135m-general"


def run(*command: str | Path, cwd: Path) -> str:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "LAWCAT"))}
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd, env=clean, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def setuptools_version() -> int:
    try:
        return int(metadata.version("setuptools").split(".")[0])
    except metadata.PackageNotFoundError:
        return 0


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that the build leaves nothing in the checkout."""
    base = tmp_path_factory.mktemp("build")
    source = base / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for room in ROOMS:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / room, source / room, symlinks=True, ignore=ignored)
    shutil.copytree(ROOT / ADAPTER, source / ADAPTER)
    # the setuptools that is here if it is new enough, so that the test needs no network
    offline = ("--no-build-isolation", "--no-index") if setuptools_version() >= 77 else ()
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", *offline, "--wheel-dir", base, source, cwd=base)
    (built,) = base.glob("*.whl")
    return built


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


def test_the_wheel_holds_every_source_file_and_nothing_else(wheel: Path) -> None:
    wanted = set()
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
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
        (licence,) = (name for name in archive.namelist() if name.endswith("/LICENSE"))
        assert b"Apache License" in archive.read(licence)
    assert held == wanted


def test_no_extra_compiles_llama_cpp(wheel: Path) -> None:
    """The wheel of the demo's teacher requires it, so that one is fetched alone, the same everywhere."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        stated = archive.read(name).decode()
    required = [line for line in stated.splitlines() if line.startswith("Requires-Dist:")]
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
    assert Bundle.open(tmp_path / "bundle").manifest.scheme == "fp32"


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
