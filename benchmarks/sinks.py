#!/usr/bin/env python3
"""What a hybrid loses past its span, and how much of it the text's first tokens would keep.

    python benchmarks/sinks.py ADAPTER --text FILE [--tokens 1536] [--span 512] [--sinks 0,4]

Reads a text with the full-attention layers' span as trained, then cut to ``--span`` tokens, with the first
``--sinks`` of the text kept beside the newest (attention sinks, StreamingLLM, arXiv 2309.17453; their
positions follow on from each other). An experiment: the library itself keeps no sinks. Prints perplexity
before and past the span; the last line is one JSON object.
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
from lawcat_edge.rotary import Tables, local_tables, rotate_pairs
from lawcat_edge.softmax_attention import KeyValueState, SoftmaxAttention
from lawcat_edge.teacher import resolve

CHUNK = 256


def with_sinks(span: int, sinks: int):
    """``SoftmaxAttention.full_attention`` over the first ``sinks`` and the newest span - sinks tokens."""

    def full_attention(
        self: SoftmaxAttention,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rotary: Tables,
        state: KeyValueState,
        _: int | None = None,
    ) -> tuple[Tensor, KeyValueState]:
        T, n = q.shape[1], state.key.shape[2]
        keys = torch.cat([state.key, k.transpose(1, 2)], 2)
        values = torch.cat([state.value, v.transpose(1, 2)], 2)
        cos, sin = local_tables(self.geometry, n + T, q)
        slots = torch.arange(n + T)
        age = torch.arange(n, n + T)[:, None] - slots
        seen = (age >= 0) & ((age < span - sinks) | (slots < sinks))
        y = F.scaled_dot_product_attention(
            rotate_pairs(q.transpose(1, 2), cos[n:], sin[n:]),
            rotate_pairs(keys, cos, sin),
            values,
            attn_mask=seen,
            enable_gqa=True,
        )
        if n + T > span:
            kept = torch.cat([slots[:sinks], slots[n + T - (span - sinks) :]])
            keys, values = keys[:, :, kept], values[:, :, kept]
        return y.transpose(1, 2), KeyValueState(keys, values, state.seen + T)

    return full_attention


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
    parser.add_argument("adapter")
    parser.add_argument("--teacher", default="smollm2")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--skip", type=int, default=20_000, help="characters to pass over first")
    parser.add_argument("--tokens", type=int, default=1536)
    parser.add_argument("--span", type=int, default=512)
    parser.add_argument("--sinks", default="0,4")
    args = parser.parse_args()
    teacher, adapter = resolve(args.teacher), Adapter.load(args.adapter)
    model = load_student(teacher, adapter)
    text = args.text.read_text(encoding="utf-8")[args.skip :][: args.tokens * 6]
    ids = load_tokenizer(teacher.tokenizer_path).encode(text, add_special_tokens=False).ids[: args.tokens]
    rows = []
    for span, sinks in [
        (adapter.config.attention_span, 0),
        *((args.span, int(s)) for s in args.sinks.split(",")),
    ]:
        SoftmaxAttention.full_attention = with_sinks(span, sinks)  # type: ignore[method-assign, assignment]
        nll = losses(model, torch.tensor([ids]))
        near, far = (float(part.mean().exp()) for part in (nll[: args.span - 1], nll[args.span - 1 :]))
        rows.append({"span": span, "sinks": sinks, "before": round(near, 2), "past": round(far, 2)})
        print(
            f"span {span:6,}, {sinks:2} sinks: perplexity {near:.2f} to {args.span}, {far:.2f} past it",
            flush=True,
        )
    print(json.dumps({"text": args.text.name, "rows": rows}))


if __name__ == "__main__":
    main()
