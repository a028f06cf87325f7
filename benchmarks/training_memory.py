#!/usr/bin/env python3
"""What memory distillation takes, part by part, computed for any number of processes without having them.

    python benchmarks/training_memory.py [mistral-7b | llama-1b | smollm2 | FOLDER] [--tokens 1024]
        [--batch-size 1] [--window 0] [--rank 32] [--processes 8] [--precision bf16]

Sizes of weights, gradients and moments follow from the shapes. Activations are counted, not guessed: one
layer of the real widths runs on the CPU with random weights at two lengths, and every tensor that autograd
keeps for the backward pass is summed up; the rest is a straight line in tokens and layers. That is the torch
form of the operators; the Triton kernels keep less. Allocator waste, the CUDA context and buffers of the
collectives are not in it. Prints a table, and one JSON line last.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lawcat_edge.config import LawcatConfig
from lawcat_edge.distill.head import LOSS_ROWS
from lawcat_edge.families import Geometry
from lawcat_edge.model import LawcatModel
from lawcat_edge.runtime.files import read_json

SHAPES = {
    "mistral-7b": dict(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
                       intermediate_size=14336, vocab_size=32000, tie_word_embeddings=False),
    "llama-1b": dict(hidden_size=2048, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8,
                     intermediate_size=8192, vocab_size=128256, tie_word_embeddings=True),
    "smollm2": dict(hidden_size=576, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
                    intermediate_size=1536, vocab_size=49152, tie_word_embeddings=True),
}  # fmt: skip
LENGTHS = (64, 128)
GIB = 2**30


def kept(run: Callable[[], Any], model: torch.nn.Module) -> int:
    """Bytes that autograd keeps for the backward pass of ``run()``, the model's own parameters aside."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            seen[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    del result
    return sum(tensor.untyped_storage().nbytes() for tensor in seen.values())


def layer_activations(model: LawcatModel, stage: str, bf16: bool) -> tuple[float, float]:
    """Bytes kept by one layer: (whatever the length, for each token)."""
    layer, found = model.layers[0], []
    for length in LENGTHS:
        x = torch.randn(1, length, model.geometry.hidden_size, requires_grad=stage == "finetune")
        rotary = model.rotary(0, length)

        def run(x: torch.Tensor = x, rotary: Any = rotary) -> Any:
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                return layer.transfer(x, rotary) if stage == "transfer" else layer.student(x, rotary, None)

        found.append(kept(run, model))
    slope = (found[1] - found[0]) / (LENGTHS[1] - LENGTHS[0])
    return max(0.0, found[0] - slope * LENGTHS[0]), slope


def parts(
    model: LawcatModel, layers: int, vocab: int, tied: bool, args: argparse.Namespace
) -> dict[str, Any]:
    trained = {id(p) for p in model.adapter_parameters().values()}
    frozen_layer = sum(p.numel() for p in model.layers[0].parameters() if id(p) not in trained)
    trained_all = layers * sum(p.numel() for p in model.adapter_parameters().values())
    root = vocab * model.geometry.hidden_size * (1 if tied else 2)
    weights, copies = layers * frozen_layer + root, {}
    tokens, n = args.tokens * args.batch_size, args.processes
    for stage in ("transfer", "finetune"):
        fixed, slope = layer_activations(model, stage, args.precision == "bf16")
        # logits of a slice of tokens, their log-softmax, both softmaxes and the gradient, of both models
        head = 7 * min(tokens, LOSS_ROWS) * vocab * 4 if stage == "finetune" else 0
        copies[stage] = {
            "kept for the backward pass, all layers": layers * slope * tokens,
            "weights cast to bfloat16, kept likewise": layers * fixed,
            "logits and their losses": head,
        }
    table: dict[str, Any] = {}
    for how in ("copies", "shards"):
        share = n if how == "shards" else 1
        common = {
            "teacher's weights, float32": 4 * weights / share,
            "gathered whole for use: two layers, embeddings": 4 * (2 * frozen_layer + root) * (share > 1),
            "trained parameters, gradients, AdamW's moments": 16 * trained_all / share,
            "buckets of the gradients": 4 * trained_all * (n > 1 and how == "copies"),
        }
        for stage, extra in copies.items():
            column = {name: size / GIB for name, size in {**common, **extra}.items()}
            table[f"{how}, {stage}"] = {**column, "sum": sum(column.values())}
    return {
        "shape": args.shape,
        "processes": n,
        "tokens_a_process": tokens,
        "window": args.window,
        "parameters_of_the_teacher": weights,
        "trained_parameters": trained_all,
        "gib": table,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shape", nargs="?", default="mistral-7b", help="a name above, or a model folder")
    parser.add_argument("--tokens", type=int, default=1024, help="of a sequence")
    parser.add_argument("--batch-size", type=int, default=1, help="sequences a process takes at once")
    parser.add_argument("--window", type=int, default=0)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    args = parser.parse_args()
    if args.shape in SHAPES:
        config = LlamaConfig(**SHAPES[args.shape])
        whole = Geometry.from_hf(config)
    else:
        whole = Geometry.from_hf(read_json(Path(args.shape) / "config.json"))
        config = LlamaConfig(
            hidden_size=whole.hidden_size, num_attention_heads=whole.num_heads, head_dim=whole.head_dim,
            num_key_value_heads=whole.num_kv_heads, intermediate_size=whole.intermediate_size,
            tie_word_embeddings=whole.tie_embeddings,
        )  # fmt: skip
    config.num_hidden_layers, config.vocab_size = 1, 8
    one = dataclasses.replace(Geometry.from_hf(config), sliding_window=None)
    model = LawcatModel(
        LlamaForCausalLM(config),
        one,
        LawcatConfig.for_geometry(one, window=args.window),
        "torch",
    )
    model.add_lora(args.rank, 2.0 * args.rank)
    for parameter in model.adapter_parameters().values():
        parameter.requires_grad_(True)
    found = parts(model, whole.num_layers, whole.vocab_size, whole.tie_embeddings, args)
    print(
        f"{args.shape}: {found['parameters_of_the_teacher'] / 1e9:.2f} G parameters, "
        f"{found['trained_parameters'] / 1e6:.1f} M trained; {found['tokens_a_process']:,} tokens a process, "
        f"{args.processes} processes; GiB in each, computed"
    )
    table = found["gib"]
    print(f"{'':48}" + "".join(f"{name:>20}" for name in table))
    for row in next(iter(table.values())):
        print(f"{row:48}" + "".join(f"{column[row]:>20.2f}" for column in table.values()))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
