#!/usr/bin/env python3
"""What a hybrid loses past its span, and how much of it attention sinks keep.

    python benchmarks/sinks.py ADAPTER --text FILE [--tokens 1536] [--spans 512/0,512/4]

Reads a text with the full-attention layers' span as the adapter has it, then with others, written
TOKENS/SINKS (``lawcat_edge.runtime.bundle.span``). Prints perplexity before and past the shortest of them;
the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from lawcat_edge.adapter import Adapter
from lawcat_edge.evaluate.lm import load_tokenizer
from lawcat_edge.model import load_student
from lawcat_edge.teacher import resolve

CHUNK = 256


@torch.inference_mode()
def losses(model, ids: Tensor) -> Tensor:
    state, found = model.empty_state(1), []
    for start in range(0, ids.shape[1] - 1, CHUNK):
        logits, state = model(ids[:, start : start + CHUNK], state)
        targets = ids[0, start + 1 : start + 1 + CHUNK]
        found.append(F.cross_entropy(logits[0, : len(targets)], targets, reduction="none"))
    return torch.cat(found)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("adapter", help="a hybrid adapter's folder")
    parser.add_argument("--teacher", default="smollm2")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--skip", type=int, default=20_000, help="characters to pass over first")
    parser.add_argument("--tokens", type=int, default=1536)
    parser.add_argument("--spans", default="512/0,512/4")
    args = parser.parse_args()
    teacher, adapter = resolve(args.teacher), Adapter.load(args.adapter)
    text = args.text.read_text(encoding="utf-8")[args.skip :][: args.tokens * 6]
    ids = load_tokenizer(teacher.tokenizer_path).encode(text, add_special_tokens=False).ids[: args.tokens]
    asked = [tuple(map(int, item.split("/"))) for item in args.spans.split(",")]
    edge = min(span for span, _ in asked)
    rows = []
    for span, sinks in [(adapter.config.attention_span, adapter.config.attention_sinks), *asked]:
        model = load_student(teacher, adapter.with_span(span, sinks))
        nll = losses(model, torch.tensor([ids]))
        near, far = (float(part.mean().exp()) for part in (nll[: edge - 1], nll[edge - 1 :]))
        rows.append({"span": span, "sinks": sinks, "before": round(near, 2), "past": round(far, 2)})
        print(
            f"span {span:6,}, {sinks:2} sinks: perplexity {near:.2f} to {edge}, {far:.2f} past it", flush=True
        )
    print(json.dumps({"text": args.text.name, "rows": rows}))


if __name__ == "__main__":
    main()
