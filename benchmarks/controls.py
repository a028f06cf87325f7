"""Train one variant of a hybrid student and measure it: is every part of it worth what it costs?

    python benchmarks/controls.py chosen --data corpus.bin --text handbook.txt --out runs/chosen

Variants differ in one thing from ``chosen`` (full attention in layers 14, 17, 20 and 23, window of 128, LoRA
on all linear layers): ``two`` keeps layers 17 and 20 alone, ``uniform`` takes 5, 12, 19 and 26,
``softmax`` mixes the window without the scaling by its largest score, ``window-only`` has no linear branch
at all: sliding-window attention, trained by low-rank updates alone. Prints perplexity and KL by
position for each text, and retrieval; the last line is one JSON object, also written to OUT/measured.json.
``--tiny`` is a dry run for a laptop.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lawcat_edge.adapter import Adapter
from lawcat_edge.attention import LawcatAttention, LayerState
from lawcat_edge.distill.run import distill
from lawcat_edge.distill.settings import DistillSettings, load_recipe
from lawcat_edge.evaluate.perplexity import perplexity
from lawcat_edge.evaluate.run import run_task
from lawcat_edge.evaluate.torch_lm import StudentModel, TeacherModel
from lawcat_edge.rotary import Tables
from lawcat_edge.runtime.files import write_json
from lawcat_edge.teacher import Teacher, resolve

VARIANTS: dict[str, dict[str, Any]] = {
    "chosen": {},
    "two": {"full_attention": "17,20"},
    "uniform": {"full_attention": "5,12,19,26"},
    "softmax": {"window_scaling": "softmax"},
    "window-only": {"transfer_tokens": 0, "lr_new": 0.0},
}


def window_only(
    self: LawcatAttention,
    x: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rotary: Tables,
    state: LayerState | None,
) -> tuple[Tensor, LayerState | None]:
    """Sliding-window attention in place of the whole layer; the linear branch's state stays as it is."""
    N, Z = self.window(q, k, v, rotary, state)
    y = (N / Z).to(v.dtype)
    if state is None:
        return y, None
    T = x.shape[1]
    assert state.window_key is not None
    assert state.window_value is not None
    keys = torch.cat([state.window_key, k.transpose(1, 2)], 2)[:, :, T:]
    values = torch.cat([state.window_value, v.transpose(1, 2)], 2)[:, :, T:]
    return y, replace(state, window_key=keys, window_value=values, seen=state.seen + T)


def settings_of(variant: str, args: argparse.Namespace) -> DistillSettings:
    common: dict[str, Any] = {
        "full_attention": "14,17,20,23",
        "window_scaling": "max_score",
        "lr_lora": 2e-4,
        "lr_new": 5e-4,
        "batch_size": 8,
        "grad_accumulation": 1,
        "transfer_tokens": args.transfer_tokens,
        "finetune_tokens": args.finetune_tokens,
        "task_mix": args.task_mix,
        "compile": not args.tiny,
        "precision": "fp32" if args.tiny else "bf16",
    }
    if args.tiny:
        common |= {"batch_size": 1, "seq_len": 256, "finetune_seq_len": 512, "span": 512}
    return load_recipe("hybrid").with_changes(common | VARIANTS[variant])


def measure(teacher: Teacher, adapter: Adapter, args: argparse.Namespace) -> dict[str, Any]:
    """Perplexity and KL of every text by position, and retrieval at 1K and 4K."""
    reference = TeacherModel.load(teacher)
    student = StudentModel.load(teacher, adapter)
    length, chunk = (512, 256) if args.tiny else (8192, 2048)
    found: dict[str, Any] = {"texts": {}, "tasks": {}}
    for text in args.text:
        report = perplexity(student, [text], length, args.sequences, reference, chunk)
        base = perplexity(reference, [text], length, args.sequences, None, chunk)
        rows = [
            {"end": mine.end, "perplexity": mine.perplexity, "teacher": theirs.perplexity, "kl": mine.kl}
            for mine, theirs in zip(report.buckets, base.buckets, strict=True)
        ]
        found["texts"][Path(text).stem] = rows
    prose = "\n".join(Path(text).read_text(encoding="utf-8") for text in args.text)
    for task in ("passkey", "niah-1", "niah-2"):
        lengths = [400] if args.tiny else [1024, 4096]
        report = run_task(student, task, lengths, args.samples, prose=prose)
        found["tasks"][task] = {cell.length: [cell.correct, cell.n] for cell in report.by_length()}
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("variant", choices=VARIANTS)
    parser.add_argument("--teacher", default="smollm2")
    parser.add_argument("--data", action="append", required=True)
    parser.add_argument("--text", action="append", required=True, help="held-out text files")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--transfer-tokens", type=int, default=2_000_000)
    parser.add_argument("--finetune-tokens", type=int, default=12_000_000)
    parser.add_argument("--task-mix", default="text:0.84,passkey:0.06,niah-1:0.05,niah-2:0.05")
    parser.add_argument("--sequences", type=int, default=5)
    parser.add_argument("--samples", type=int, default=24)
    parser.add_argument("--tiny", action="store_true", help="a dry run: small sizes")
    args = parser.parse_args()
    if args.variant == "window-only":
        LawcatAttention.attend = window_only  # type: ignore[method-assign]
    teacher = resolve(args.teacher)
    began, last = time.monotonic(), [0.0]

    def report(record: dict[str, Any]) -> None:
        if time.monotonic() - last[0] > 15:
            last[0] = time.monotonic()
            shown = {k: record[k] for k in ("stage", "step", "steps", "loss", "kl", "seconds") if k in record}
            print(args.variant, shown, file=sys.stderr, flush=True)

    adapter = distill(teacher, args.data, args.out, settings_of(args.variant, args), report=report, half=True)
    trained = time.monotonic() - began
    torch.set_float32_matmul_precision("high")
    found = measure(teacher, adapter, args)
    found |= {
        "variant": args.variant,
        "stages": adapter.training["stages"],
        "train_s": round(trained, 1),
        "measure_s": round(time.monotonic() - began - trained, 1),
    }
    write_json(args.out / "measured.json", found)
    for name, rows in found["texts"].items():
        cells = [f"{r['end']}: {r['perplexity']:.2f} / {r['teacher']:.2f} (KL {r['kl']:.3f})" for r in rows]
        print(f"{args.variant:12} {name:12} " + ", ".join(cells))
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
