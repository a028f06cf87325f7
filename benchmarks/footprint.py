#!/usr/bin/env python3
"""What the runner takes on a device: bytes of it and of everything it depends on, and seconds to import it.

    python benchmarks/footprint.py [--runs 9] [--extras serve]

Installs this checkout with its base dependencies (and --extras) into a temporary folder, with pip, and lists
the installed bytes of every distribution, compiled files left out. Then imports the package and its parts in
fresh interpreters that take all from that folder; the figure is the fastest of --runs, since whatever else
the machine does only adds (the median is in the JSON). Prints a table; the last line of output is one JSON
document. Exit code 1 if importing lawcat_edge.runtime takes 0.3 s or more.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
LIMIT = 0.3  # seconds
STATEMENTS = (
    "pass",
    "import lawcat_edge.runtime",
    "from lawcat_edge.runtime import Model",
    "from lawcat_edge.runtime import Model; import onnxruntime, tokenizers, jinja2",
)


def install(folder: Path, extras: str) -> None:
    what = str(ROOT) + (f"[{extras}]" if extras else "")
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-compile",
        "--target",
        str(folder),
        what,
    ]
    subprocess.run(command, check=True)


def sizes(folder: Path) -> dict[str, int]:
    """Installed bytes by distribution, the largest first."""
    found = {}
    for distribution in distributions(path=[str(folder)]):
        paths = {Path(str(distribution.locate_file(file))) for file in distribution.files or ()}
        kept = (path for path in paths if path.is_file() and path.suffix != ".pyc")
        found[f"{distribution.metadata['Name']} {distribution.version}"] = sum(
            path.stat().st_size for path in kept
        )
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def import_seconds(folder: Path, statement: str, runs: int) -> list[float]:
    """Seconds of `statement` within fresh interpreters, after one that compiles the files."""
    code = f"import time; b = time.perf_counter(); {statement}; print(time.perf_counter() - b)"
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    results = []
    for _ in range(runs + 1):
        command = [sys.executable, "-c", code]
        done = subprocess.run(
            command, stdout=subprocess.PIPE, text=True, check=True, env=environment, cwd=folder
        )
        results.append(float(done.stdout))
    return results[1:]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--extras", default="")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        begin = time.perf_counter()
        install(folder, args.extras)
        report: dict[str, Any] = {
            "python": sys.version.split()[0],
            "load_average": os.getloadavg()[0],
            "install_seconds": time.perf_counter() - begin,
            "bytes": sizes(folder),
        }
        report["total_bytes"] = sum(report["bytes"].values())
        for name, size in report["bytes"].items():
            print(f"{name:32} {size / 1e6:8.2f} MB")
        print(f"{'together':32} {report['total_bytes'] / 1e6:8.2f} MB\n")
        report["imports"] = {}
        for statement in STATEMENTS:
            results = import_seconds(folder, statement, args.runs)
            report["imports"][statement] = {"best": min(results), "median": statistics.median(results)}
            print(f"{min(results):7.3f} s   {statement}", flush=True)
    print(json.dumps(report))
    return 0 if report["imports"]["import lawcat_edge.runtime"]["best"] < LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
