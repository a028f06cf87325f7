"""OUT.run, the folder of a distillation under way: what is in it, and whether it may be gone on from.

    run.json            what the run is made of (settings, teacher, start), before there is a checkpoint
    teacher_samples.npy text sampled from the teacher; while it is sampled, a .partial beside it
    checkpoint/         where the training stands
    train_log.jsonl
    finished.json       the sha256 of the adapter that came of it

This module needs no torch: the command line asks it how an interrupted command goes on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lawcat_edge.runtime.errors import LawcatError
from lawcat_edge.runtime.files import read_json, write_json

SAMPLES = "teacher_samples.npy"
PARTIAL = ".partial"  # after the name of the samples
_BEGUN, _FINISHED = "run.json", "finished.json"


def run_folder(out: Path) -> Path:
    return out.with_name(out.name + ".run")


def kept(folder: Path) -> str | None:
    """What of a run would be lost with its folder, in words; None where there is nothing."""
    if (folder / "checkpoint" / "state.json").is_file():
        return "a checkpoint"
    if any((folder / f"{SAMPLES}{end}").is_file() for end in ("", PARTIAL)):
        return "text sampled from the teacher"
    return None


def unfinished(folder: Path) -> str | None:
    """``kept`` of a run whose adapter was not written yet."""
    return None if (folder / _FINISHED).is_file() else kept(folder)


def check_start(folder: Path, resume: bool, fresh: bool) -> None:
    """Refuse to go on from nothing, and to lose an unfinished run unasked."""
    if resume and fresh:
        raise LawcatError("--resume goes on and --fresh starts anew; give one of them.")
    if resume and kept(folder) is None:
        raise LawcatError(f"There is no checkpoint to resume in {folder}; leave --resume away to start.")
    what = unfinished(folder)
    if what and not resume and not fresh:
        raise LawcatError(
            f"{folder} holds an unfinished run ({what}); go on with --resume, or start anew without it with "
            f"--fresh."
        )


def begin(folder: Path, facts: dict[str, Any]) -> None:
    write_json(folder / _BEGUN, facts)


def finish(folder: Path, adapter_sha256: str) -> None:
    write_json(folder / _FINISHED, {"adapter_sha256": adapter_sha256})


def check_begun(folder: Path, facts: dict[str, Any]) -> None:
    """Refuse to go on with a run of other ``facts`` that has no checkpoint yet, which would say so itself."""
    data = read_json(folder / _BEGUN) if (folder / _BEGUN).is_file() else None
    if not isinstance(data, dict):
        raise LawcatError(f"{folder} does not say what its run was made of; start anew with --fresh.")
    check_facts(data, facts, folder)


def check_facts(data: dict[str, Any], facts: dict[str, Any], folder: Path) -> None:
    """Raise LawcatError that names the first of ``facts`` in which the run in ``folder`` differs."""
    for name, value in facts.items():
        if data.get(name) == value:
            continue
        if name == "global_batch":
            raise LawcatError(
                f"The checkpoint in {folder} took {data.get(name)} sequences a step, this run would take "
                f"{value}; set --batch-size and --grad-accumulation so that their product times the "
                f"number of processes is {data.get(name)}."
            )
        differing = name
        if isinstance(value, dict) and isinstance(data.get(name), dict):
            differing = next((k for k in value if data[name].get(k) != value[k]), name)
        raise LawcatError(
            f"The run in {folder} was made with another {differing!r}; resume with the same settings, or "
            f"start anew with --fresh."
        )
