#!/usr/bin/env python3
"""Tokens per second of both distillation stages, on random weights of a real teacher's shape.

    python benchmarks/training.py [--shapes 16x1024,8x4096] [--backends triton,torch] [--window 0,64]
        [--compile]

Prints a table, and one JSON line last. Runs on a GPU when there is one, else on the CPU.
"""

from __future__ import annotations

import argparse
import json
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lawcat_edge.config import LawcatConfig
from lawcat_edge.distill.steps import FinetuneStep, TransferStep
from lawcat_edge.families import Geometry
from lawcat_edge.model import LawcatModel

SMOLLM2 = LlamaConfig(
    hidden_size=576,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    intermediate_size=1536,
    vocab_size=49152,
    tie_word_embeddings=True,
)


def measure(module: torch.nn.Module, ids: torch.Tensor, parameters: list, repeats: int) -> dict:
    device = ids.device
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=device.type == "cuda")
    losses: list[torch.Tensor] = []

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            loss, _ = module(ids)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    start = time.perf_counter()
    step()
    wait()
    first = time.perf_counter() - start
    step()
    wait()
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    wait()
    seconds = (time.perf_counter() - start) / repeats
    memory = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
    return {
        "first_s": round(first, 2),
        "step_s": round(seconds, 4),
        "tokens_s": round(ids.numel() / seconds),
        "gib": round(memory, 1),
        "first_losses": [float(f"{loss:.6g}") for loss in losses[:2]],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", default="1x256")
    parser.add_argument("--backends", default="auto")
    parser.add_argument("--window", default="0")
    parser.add_argument(
        "--compile", action="store_true", help="also with torch.compile on the feed-forward part"
    )
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    SMOLLM2.num_hidden_layers = args.layers
    rows = []
    for backend in args.backends.split(","):
        for window in map(int, args.window.split(",")):
            for compiled in (False, True) if args.compile else (False,):
                torch.manual_seed(0)
                model = LawcatModel(
                    LlamaForCausalLM(SMOLLM2), Geometry.from_hf(SMOLLM2), LawcatConfig(window=window), backend
                )
                model.to(device)
                if compiled:
                    model.compile_parts()
                new = list(model.new_parameters().values())
                for parameter in new:
                    parameter.requires_grad_(True)
                for stage in ("transfer", "finetune"):
                    if stage == "finetune":
                        model.add_lora(32, 64.0)
                        new = [p.requires_grad_(True) for p in model.adapter_parameters().values()]
                    for shape in args.shapes.split(","):
                        batch, length = map(int, shape.split("x"))
                        ids = torch.randint(0, SMOLLM2.vocab_size, (batch, length), device=device)
                        module = TransferStep(model) if stage == "transfer" else FinetuneStep(model, 1.0, 0.0)
                        row = {
                            "stage": stage,
                            "backend": backend,
                            "window": window,
                            "compiled": compiled,
                            "shape": shape,
                        }
                        try:
                            if device == "cuda":
                                torch.cuda.reset_peak_memory_stats()
                            row |= measure(module, ids, new, args.repeats)
                        except Exception as error:  # one shape that does not fit must not lose the others
                            row["error"] = f"{type(error).__name__}: {str(error)[-300:]}"
                        rows.append(row)
                        print(row, flush=True)
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
