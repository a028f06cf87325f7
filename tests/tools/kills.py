"""kill -9 at random moments of distill, export, compare and writing snapshots; then see what is there.

    python tests/tools/kills.py --kills snapshot=40,distill=30,export=30,compare=15

After every kill the target holds the old artefact or the new one, whole (hashes and all), or is not there
yet; and the same command (for distill with --resume where there is a checkpoint) ends in the very artefact of
an uninterrupted run. Commands run in forks of this process: importing torch takes seconds.
The last line is JSON: kills, how many hit a running command, what was found afterwards, and every failure.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "helpers")]

# Imported before the forks; nothing is computed here, since threads do not survive a fork.
import torch  # noqa: E402
from exported import make_bundle, make_student  # noqa: E402
from tiny_bundle import build_tiny_bundle  # noqa: E402
from tiny_teacher import write_corpus  # noqa: E402

import lawcat_edge.calibration.comparison.compare as comparing  # noqa: E402
from lawcat_edge.adapter import Adapter  # noqa: E402
from lawcat_edge.calibration.comparison.settings import Settings  # noqa: E402
from lawcat_edge.distill.run import distill  # noqa: E402
from lawcat_edge.distill.settings import DistillSettings  # noqa: E402
from lawcat_edge.export.exporter import ExportOptions, export_bundle  # noqa: E402
from lawcat_edge.runtime import Model  # noqa: E402
from lawcat_edge.runtime.bundle.manifest import Bundle  # noqa: E402
from lawcat_edge.runtime.bundle.verify import verify  # noqa: E402
from lawcat_edge.runtime.files import read_json, write_json  # noqa: E402
from lawcat_edge.student import Student  # noqa: E402
from lawcat_edge.teacher import resolve  # noqa: E402

SMALL = {"transfer_tokens": 256, "finetune_tokens": 256, "seq_len": 64, "finetune_seq_len": 64, "window": 4}


def fork(work: Callable[[], Any], log: Path, kill_after: float | None = None) -> tuple[str, Any, float]:
    """Run `work` in a child: ('done', its JSON, seconds), ('killed', None, …) or ('failed', log's end, …)."""
    answer = log.with_suffix(".json")
    answer.unlink(missing_ok=True)
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            with open(log, "w") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
                torch.set_num_threads(1)
                result = work()
                answer.write_text(json.dumps(result))
                code = 0
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(code)
    status = _wait(child, None if kill_after is None else began + kill_after)
    spent = time.monotonic() - began
    if os.WIFSIGNALED(status):
        return "killed", None, spent
    if os.WEXITSTATUS(status):
        return "failed", log.read_text()[-1500:], spent
    return "done", json.loads(answer.read_text()), spent


def _wait(child: int, deadline: float | None) -> int:
    """The status of a child that is killed at the deadline if it has not ended by then."""
    while deadline is not None:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status
        if time.monotonic() >= deadline:
            os.kill(child, signal.SIGKILL)
            break
        time.sleep(min(0.01, max(deadline - time.monotonic(), 0)))
    return os.waitpid(child, 0)[1]


class Task:
    """run: the command. look: what is at the target ('none' or an artefact's hash), raising if half."""

    def __init__(self, base: Path, place: Path) -> None:
        self.base, self.place = base, place

    def prepare(self) -> None:
        """What is there before: an old artefact, for half of the tries."""

    def run(self) -> Any:
        raise NotImplementedError

    def look(self) -> str:
        raise NotImplementedError


class SnapshotTask(Task):
    def prepare(self) -> None:
        self._write(0)

    def _write(self, which: int) -> None:
        model = Model.load(self.base / "bundle", threads=1)
        model.read("The keeper lit the lamp. " * (1 + which))
        model.snapshot(self.place / "talk.snapshot")

    def run(self) -> str:
        for i in range(6):
            self._write(1 + i % 2)
        return self.look()

    def look(self) -> str:
        model = Model.load(self.base / "bundle", threads=1)
        return str(len(model.restore(self.place / "talk.snapshot")))


class DistillTask(Task):
    def run(self) -> str:
        resume = (self.place / "adapter.run" / "checkpoint" / "state.json").is_file()
        settings = DistillSettings().with_changes({**SMALL, "checkpoint_every": 1})
        teacher = resolve(self.base / "teacher")
        distill(teacher, [self.base / "text.txt"], self.place / "adapter", settings, resume=resume)
        return self.look()

    def look(self) -> str:
        out = self.place / "adapter"
        return Adapter.load(out).sha256 if out.exists() else "none"


class ExportTask(Task):
    def prepare(self) -> None:
        shutil.copytree(self.base / "old-bundle", self.place / "bundle")

    def run(self) -> str:
        teacher = resolve(self.base / "teacher")
        adapter = Adapter.load(self.base / "adapter")
        export_bundle(Student.of(teacher, adapter), self.place / "bundle", ExportOptions())
        return self.look()

    def look(self) -> str:
        out = self.place / "bundle"
        if not out.exists():
            return "none"
        verify(out, threads=1)
        return Bundle.open(out).sha256


class CompareTask(Task):
    def run(self) -> str:
        settings = Settings(96, 1, 256, 1, (600,), 1, 32, 4, 1)
        teacher, adapter = resolve(self.base / "teacher"), Adapter.load(self.base / "adapter")
        out = self.place / "out"
        job = comparing.Comparison.of(Student.of(teacher, adapter), [self.base / "text.txt"], out, settings)
        write_json(out / "report.json", comparing.compare(job, ["fp32", "int8"], with_peers=False))
        return self.look()

    def look(self) -> str:
        """The accuracy of every row; every bundle that is there must verify, every file of a row be whole."""
        out = self.place / "out"
        if not out.exists():
            return "none"
        for folder in out.glob("bundles/[!.]*"):
            if folder.is_dir():
                verify(folder, threads=1)
        for path in [*out.glob("rows/[!.]*.json"), *out.glob("bundles/[!.]*.json")]:
            read_json(path)
        if not (out / "report.json").exists():
            return "none"
        report = read_json(out / "report.json")
        assert not any(row["errors"] for row in report["rows"]), report["rows"]
        return json.dumps([[row["name"], row["accuracy"]["perplexity"]] for row in report["rows"]])


SNAPSHOTS = {"50": "new", "75": "new"}  # tokens read: one sentence of 25 bytes is the old one, two or three
TASKS = {"snapshot": SnapshotTask, "distill": DistillTask, "export": ExportTask, "compare": CompareTask}


def build(base: Path) -> None:
    teacher, model, student = make_student(base / "teacher")
    Adapter(student.config, teacher.geometry, "toy", teacher.sha256, student.tensors).save(base / "adapter")
    make_bundle(teacher, model, student, base / "old-bundle", scheme="fp32")
    write_corpus(base / "text.txt")
    build_tiny_bundle(base / "bundle")


def run(counts: dict[str, int], base: Path, seed: int, report: Callable[[str], None]) -> dict[str, Any]:
    outcome, said, _ = fork(lambda: build(base), base / "build.log")
    assert outcome == "done", said
    rng = random.Random(seed)
    found: dict[str, Any] = {}
    failures: list[str] = []
    for name, count in counts.items():
        seen: collections.Counter[str] = collections.Counter()
        task = TASKS[name](base, base / "first")
        task.place.mkdir()
        outcome, whole, seconds = fork(task.run, base / "run.log")
        assert outcome == "done", whole
        shutil.rmtree(task.place)
        i = -1
        while seen["killed"] < count and i < 3 * count:
            i += 1
            task.place = base / f"{name}-{i}"
            task.place.mkdir()
            if i % 2 or name == "snapshot":
                outcome, said, _ = fork(task.prepare, base / "run.log")
            _, old, _ = fork(task.look, base / "run.log") if i % 2 or name == "snapshot" else ("", "none", 0)
            outcome, _, spent = fork(task.run, base / "run.log", kill_after=rng.uniform(0, seconds))
            if outcome == "done":  # the machine was busier when the first run was timed
                seconds = min(seconds, spent)
            seen["killed" if outcome == "killed" else "too late"] += 1
            outcome, at, _ = fork(task.look, base / "run.log")
            if outcome != "done":
                failures.append(f"{name} {i}: half an artefact: {at}")
                continue
            allowed = {old: "old", whole: "new"} | SNAPSHOTS
            seen[allowed.get(at, "unknown")] += 1
            if at not in allowed:
                failures.append(f"{name} {i}: neither the old artefact nor the new: {at}")
            outcome, at, _ = fork(task.run, base / "run.log")
            if outcome != "done" or at != whole:
                failures.append(f"{name} {i}: going on ended in {outcome} {str(at)[-600:]}")
            left = [path.name for path in task.place.iterdir() if path.name.startswith(".")]
            if left:
                failures.append(f"{name} {i}: left behind {left}")
            shutil.rmtree(task.place)
        found[name] = {"seconds_of_a_run": round(seconds, 2), **seen}
        report(f"{name}: {found[name]}, failures so far {len(failures)}")
    kills = sum(seen["killed"] for seen in found.values())
    return {"kills": kills, "seed": seed, "found": found, "failures": failures}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", default="snapshot=40,distill=30,export=30,compare=15")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    counts = {name: int(n) for name, _, n in (part.partition("=") for part in given.kills.split(","))}
    with tempfile.TemporaryDirectory(prefix="kills") as place:
        result = run(counts, Path(place), given.seed, lambda text: print(text, file=sys.stderr, flush=True))
    print(json.dumps(result))
    sys.exit(1 if result["failures"] else 0)


if __name__ == "__main__":
    main()
