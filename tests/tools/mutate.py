"""Damage whole artefacts in a thousand ways and see that each ends well.

    python tests/tools/mutate.py --out mutations.json                    the full run (needs the extra build)
    python tests/tools/mutate.py --kinds bundle,snapshot --counts 40     some of each

A mutation is a kind of artefact and a number, and the same every time. It ends well when reading the artefact
raises LawcatError whose message names the file that was changed, or when what was read is usable: a bundle
that `verify` passes, a snapshot that goes on with finite numbers, an adapter or a teacher whose every tensor
is finite. More than half of those of a bundle, an adapter and a snapshot are made by one who also corrects
the hashes. The undamaged artefact is tried first: it must be usable.
Workers are processes: a crash, ten seconds of work or a gigabyte of memory is the mutation's failure.
The last line is JSON: counts by kind and outcome, and every failure.
"""

from __future__ import annotations

import argparse
import collections
import json
import random
import re
import resource
import select
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "helpers")]

from mutations import KINDS, Whole  # noqa: E402

FULL = {
    "exported": 600,
    "bundle": 600,
    "adapter": 450,
    "snapshot": 350,
    "safetensors": 250,
    "gguf": 200,
    "ranges": 200,
}
SECONDS = 10.0  # of processor time
MEGABYTES = 1000
_PATH = re.compile(r"/tmp/[^ ':;,]*")


def attempt(whole: Whole, kind: str, number: int, place: Path) -> dict[str, Any]:
    """Make mutation `number` of `kind` in the empty folder `place`, use it, and say how it ended."""
    from lawcat_edge.runtime.errors import LawcatError

    rng = random.Random(f"{kind} {number}")
    mutation = KINDS[kind]
    began = time.process_time()
    result: dict[str, Any] = {"kind": kind, "number": number}
    changed: list[str] = []
    try:
        if number < 0:  # the control: what is whole must be usable
            shutil.copytree(whole.folder / kind, place)
            what = "harmless"
        else:
            changed, what = mutation.make(whole, rng, place)
        result["what"] = what
        try:
            mutation.use(whole, place)
        except LawcatError as error:
            message = str(error)
            result["outcome"] = "refused"
            # Whoever reads the message must find the file, or the field of the one that was changed.
            if number < 0 or not (any(name in message for name in changed) or mutation.names(message)):
                result |= {"outcome": "FAILED", "why": f"names no file: {message[:300]}"}
            result["message"] = _PATH.sub("…", message)[:120]
        else:
            result["outcome"] = "usable" if mutation.may_pass(what) else "FAILED"
            if result["outcome"] == "FAILED":
                result["why"] = "damaged bytes with their old hash were taken"
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}"
        result |= {"outcome": "FAILED", "why": f"{type(error).__name__} at {where}: {str(error)[:200]}"}
    spent = time.process_time() - began
    if spent > SECONDS:
        result |= {"outcome": "FAILED", "why": f"took {spent:.1f} s"}
    return result


def work(folder: Path) -> None:
    """A worker: kinds and numbers come on stdin, results go out as lines of JSON."""
    whole = Whole(folder)
    before = 0
    for line in sys.stdin:
        kind, number = line.split()
        with tempfile.TemporaryDirectory(prefix="mutation") as place:
            result = attempt(whole, kind, int(number), Path(place) / "x")
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        if before and peak - before > MEGABYTES:
            result |= {"outcome": "FAILED", "why": f"took {peak - before} MB"}
        before = peak
        print(json.dumps(result), flush=True)


class Worker:
    def __init__(self, folder: Path) -> None:
        command = [sys.executable, __file__, "--worker", str(folder)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, kind: str, number: int) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{kind} {number}\n")
        self.process.stdin.flush()
        # Of the wall, which a busy machine stretches; the worker itself counts processor time.
        ready, _, _ = select.select([self.process.stdout], [], [], 12 * SECONDS)
        line = self.process.stdout.readline() if ready else ""
        if line:
            return json.loads(line)
        self.process.kill()
        code = self.process.wait()
        why = f"the process died ({code})" if ready else "it hangs"
        return {"kind": kind, "number": number, "outcome": "FAILED", "why": why}


def run(folder: Path, counts: dict[str, int], report: Callable[[str], None]) -> dict[str, Any]:
    worker = Worker(folder)
    totals: dict[str, collections.Counter[str]] = {kind: collections.Counter() for kind in counts}
    whats: collections.Counter[str] = collections.Counter()
    failures = []
    began = time.monotonic()
    for kind, count in counts.items():
        for number in range(-1, count):
            result = worker.ask(kind, number)
            if number >= 0:
                totals[kind][result["outcome"]] += 1
            whats[str(result.get("what", "?")).split(" ")[0]] += 1
            if result["outcome"] == "FAILED":
                failures.append(result)
                report(json.dumps(result))
            if worker.process.poll() is not None:
                worker = Worker(folder)
        report(f"{kind}: {dict(totals[kind])} after {time.monotonic() - began:.0f} s")
    assert worker.process.stdin is not None
    worker.process.stdin.close()
    worker.process.wait(60)
    return {
        "mutations": sum(counts.values()),
        "seconds": round(time.monotonic() - began),
        "outcomes": {kind: dict(total) for kind, total in totals.items()},
        "changes": dict(whats.most_common()),
        "failures": failures,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--worker", type=Path)
    parser.add_argument("--kinds", default=",".join(FULL))
    parser.add_argument("--counts", type=int, help="of each kind; default: the full run's")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    if given.worker:
        work(given.worker)
        return
    counts = {kind: given.counts or FULL[kind] for kind in given.kinds.split(",")}
    with tempfile.TemporaryDirectory(prefix="whole") as place:
        folder = Path(place)
        from whole import build

        build(folder, [*counts])
        result = run(folder, counts, lambda text: print(text, file=sys.stderr, flush=True))
        shutil.rmtree(folder, ignore_errors=True)
    text = json.dumps(result)
    if given.out:
        given.out.write_text(text + "\n")
    print(text)
    sys.exit(1 if result["failures"] else 0)


if __name__ == "__main__":
    main()
