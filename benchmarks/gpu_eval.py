"""Measure a teacher and its adapters within a time budget: retrieval by length, perplexity and KL by
position.

    python benchmarks/gpu_eval.py smollm2 --adapter adapters/passkey --adapter adapters/general \
        --text held_out.txt --out eval.json --seconds 540

The result file is rewritten after every cell (one task, one length, one model), and cells that it already
holds are not measured again: run the command as often as the machine's time allows. ``--tiny`` is a dry run
with small sizes for a laptop. The last line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from lawcat_edge.adapter import Adapter
from lawcat_edge.commands.eval import parse_lengths, read_prose
from lawcat_edge.evaluate.perplexity import perplexity
from lawcat_edge.evaluate.run import run_task
from lawcat_edge.evaluate.torch_lm import StudentModel, TeacherModel, choose_device
from lawcat_edge.runtime.errors import LawcatError
from lawcat_edge.runtime.files import write_json
from lawcat_edge.teacher import resolve

# Most telling first, so that a budget that runs out has measured them on every model.
PLAN = {
    "passkey": "256,512,1K,2K,4K,8K,16K,22K,32K",
    "perplexity": "8K,32K",
    "niah-1": "1K,2K,4K,8K",
    "niah-2": "1K,2K,4K,8K",
    "niah-3": "1K,2K,4K,8K",
    "babilong-qa2": "0,1K,2K,4K,8K,16K",
    "babilong-qa3": "0,1K,2K,4K,8K,16K",
}
TINY = {
    "passkey": "256,512",
    "perplexity": "512",
    "niah-1": "512",
    "niah-2": "512",
    "niah-3": "640",
    "babilong-qa2": "0,512",
    "babilong-qa3": "0,512",
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("teacher", help="folder, GGUF, hub id or smollm2")
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        help="adapter folder, or FOLDER@TOKENS/SINKS with another span; may be given several times",
    )
    parser.add_argument("--text", action="append", default=[], help="held-out text files or globs")
    parser.add_argument("--out", type=Path, required=True, help="result file, JSON")
    parser.add_argument(
        "--seconds", type=float, default=3600.0, help="begin no further batch after this long"
    )
    parser.add_argument("--samples", type=int, default=100, help="questions a cell")
    parser.add_argument("--sequences", type=int, default=8, help="sequences of a perplexity")
    parser.add_argument(
        "--tasks", default=None, help="comma list; default: all, perplexity and prose tasks need --text"
    )
    parser.add_argument("--teacher-limit", type=int, default=8192, help="longest text for the teacher")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--exact", action="store_true", help="float32 products in full, not TF32")
    parser.add_argument("--tiny", action="store_true", help="a dry run: small sizes, 2 samples")
    return parser.parse_args()


def cells(
    plan: dict[str, str], tasks: list[str], models: list[str], teacher_limit: int
) -> Iterator[tuple[str, int, str]]:
    """(task, length, model) in the order of measuring; the teacher's name is the first of models."""
    for task in tasks:
        for length in parse_lengths(plan[task]):
            for model in models:
                if model != models[0] or length <= teacher_limit:
                    yield task, length, model


def measure(
    task: str, length: int, name: str, models: dict[str, Any], args: argparse.Namespace, deadline: float
) -> Any:
    model, teacher = models[name], next(iter(models.values()))
    if task == "perplexity":
        # Past the teacher's own range its logits are no reference.
        reference = teacher if model is not teacher and length <= args.teacher_limit else None
        chunk = 2048 if model.device.type == "cuda" else 256
        report = perplexity(model, args.text, length, args.sequences, reference, chunk, deadline)
        return report.to_dict()
    found = run_task(model, task, [length], args.samples, seed=args.seed, prose=args.prose, deadline=deadline)
    if not found.complete:
        return None
    return found.to_dict()


def main() -> int:
    args = arguments()
    deadline = time.monotonic() + args.seconds
    plan = TINY if args.tiny else PLAN
    if args.tiny:
        args.samples, args.sequences = 2, 1
    tasks = args.tasks.split(",") if args.tasks else list(plan)
    args.prose = read_prose(args.text) if args.text else None
    if not args.text:
        tasks = [task for task in tasks if task in ("passkey", "niah-1")]
    unknown = [task for task in tasks if task not in plan]
    if unknown:
        raise LawcatError(f"Unknown task {unknown[0]!r}; choose from {', '.join(plan)}.")
    device = choose_device(args.device)
    if not args.exact:
        torch.set_float32_matmul_precision("high")
    resolved = resolve(args.teacher)
    models: dict[str, Any] = {args.teacher: TeacherModel.load(resolved, device=device)}
    for folder in args.adapter:
        path, _, other = folder.partition("@")
        span, sinks = map(int, other.split("/")) if other else (None, None)
        adapter = Adapter.load(path).with_span(span, sinks)
        models[folder] = StudentModel.load(resolved, adapter, name=folder, device=device)
    settings = {
        "teacher_sha256": resolved.sha256,
        "samples": args.samples,
        "sequences": args.sequences,
        "seed": args.seed,
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "products": "float32" if args.exact or device == "cpu" else "tf32",
        "torch": torch.__version__,
    }
    results: dict[str, Any] = {"format": 1, "settings": settings, "cells": {}}
    if args.out.exists():
        before = json.loads(args.out.read_text(encoding="utf-8"))
        if before.get("settings") != settings:
            raise LawcatError(f"{args.out} was measured with other settings; give a new --out.")
        results = before
    left = 0
    for task, length, name in cells(plan, tasks, list(models), args.teacher_limit):
        key = f"{task} {length} {name}"
        if key in results["cells"]:
            continue
        if time.monotonic() > deadline:
            left += 1
            continue
        report = measure(task, length, name, models, args, deadline)
        if report is None:
            left += 1
            continue
        results["cells"][key] = report
        write_json(args.out, results)
        print(f"{key:60} {headline(report)}  {report['seconds']:.1f} s", file=sys.stderr, flush=True)
    print(json.dumps({"out": str(args.out), "cells": len(results["cells"]), "left": left}))
    return 0


def headline(report: dict[str, Any]) -> str:
    if report["task"] != "perplexity":
        cell = report["by_length"][0]
        return f"{cell['correct']} of {cell['n']} [{cell['low'] * 100:.0f}–{cell['high'] * 100:.0f} %]"
    parts = []
    for bucket in report["buckets"]:
        end, kl = bucket["end"], bucket["kl"]
        where = f"{end // 1024}K" if end % 1024 == 0 else str(end)
        parts.append(f"{where}: {bucket['perplexity']:.2f}" + ("" if kl is None else f" (KL {kl:.3f})"))
    return ", ".join(parts)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except LawcatError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
