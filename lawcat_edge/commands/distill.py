"""``lawcat-edge distill``: train an adapter that makes a teacher's attention linear."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from lawcat_edge.adapter import Adapter


def distill(
    teacher: Annotated[str, typer.Argument(help="Folder, GGUF file, hub id, or smollm2.")],
    out: Annotated[Path, typer.Option(help="Adapter folder to write.")],
    data: Annotated[
        list[str] | None,
        typer.Option(help="Text, JSON, CSV, Parquet, globs, tokenised .bin, hub:NAME; repeatable."),
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(help="hybrid, general, general-window, passkey, or a JSON file.")
    ] = None,
    stage: Annotated[str | None, typer.Option(help="transfer, finetune or both.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens of each stage.")] = None,
    transfer_tokens: Annotated[int | None, typer.Option(help="Tokens of attention transfer.")] = None,
    finetune_tokens: Annotated[int | None, typer.Option(help="Tokens of low-rank fine-tuning.")] = None,
    seq_len: Annotated[int | None, typer.Option(help="Tokens of a sequence.")] = None,
    finetune_seq_len: Annotated[int | None, typer.Option(help="The same for fine-tuning alone.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Sequences a process takes at once.")] = None,
    grad_accumulation: Annotated[int | None, typer.Option(help="Batches summed before a step.")] = None,
    window: Annotated[int | None, typer.Option(help="Tokens of softmax attention mixed in; 0: none.")] = None,
    window_scaling: Annotated[
        str | None, typer.Option(help="How the window is mixed in: softmax or max_score.")
    ] = None,
    full_attention: Annotated[
        str | None,
        typer.Option(help="Layers that keep softmax attention: auto:4, every:7, 14,17,20,23, or none."),
    ] = None,
    span: Annotated[
        int | None, typer.Option(help="Tokens that a full-attention layer sees; 0: the teacher's range.")
    ] = None,
    sinks: Annotated[
        int | None, typer.Option(help="Of these, first tokens of the text, never forgotten; default: 4.")
    ] = None,
    ranking_tokens: Annotated[
        int | None, typer.Option(help="Text that auto reads to choose the layers, in tokens.")
    ] = None,
    rope: Annotated[
        bool | None, typer.Option("--rope/--no-rope", help="Rotary in the linear branch.")
    ] = None,
    feature_dim: Annotated[int | None, typer.Option(help="Feature width f; 0: half the head width.")] = None,
    conv_kernel: Annotated[int | None, typer.Option(help="Taps of the convolution on q and k.")] = None,
    task_mix: Annotated[str | None, typer.Option(help='Shares, as in "text:0.7,passkey:0.3".')] = None,
    teacher_tokens: Annotated[
        int | None, typer.Option(help="Tokens to sample from the teacher, if the mix has a share of it.")
    ] = None,
    answer_weight: Annotated[
        float | None, typer.Option(help="Weight of the answers of generated tasks, in KL and cross-entropy.")
    ] = None,
    lr_transfer: Annotated[float | None, typer.Option(help="Learning rate of attention transfer.")] = None,
    lr_lora: Annotated[float | None, typer.Option(help="Learning rate of the low-rank updates.")] = None,
    lr_new: Annotated[
        float | None, typer.Option(help="Rate of the new parameters while fine-tuning.")
    ] = None,
    warmup: Annotated[
        float | None, typer.Option(help="Share of a stage in which the rate rises; then a cosine.")
    ] = None,
    clip: Annotated[float | None, typer.Option(help="Largest norm of a gradient; 0: any.")] = None,
    lora_rank: Annotated[int | None, typer.Option(help="Rank of the low-rank updates.")] = None,
    lora_targets: Annotated[
        str | None,
        typer.Option(help="Where: all-linear, or names with commas, as q_proj,k_proj,v_proj,o_proj."),
    ] = None,
    lora_alpha: Annotated[float | None, typer.Option(help="Their scale, divided by the rank.")] = None,
    kl_weight: Annotated[float | None, typer.Option(help="Weight of KL to the teacher.")] = None,
    ce_weight: Annotated[float | None, typer.Option(help="Weight of next-token cross-entropy.")] = None,
    precision: Annotated[str | None, typer.Option(help="auto, fp32 or bf16.")] = None,
    backend: Annotated[str | None, typer.Option(help="auto, triton or torch.")] = None,
    compile: Annotated[
        bool | None, typer.Option("--compile/--no-compile", help="torch.compile what it can (GPU).")
    ] = None,
    checkpoint_every: Annotated[int | None, typer.Option(help="Steps between two checkpoints.")] = None,
    checkpoint_seconds: Annotated[int | None, typer.Option(help="Longest time between two.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Any setting by name, NAME=VALUE; repeatable.")
    ] = None,
    start_from: Annotated[Path | None, typer.Option(help="Adapter to go on from.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")] = False,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Start anew and lose the unfinished run in OUT.run.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a finished adapter in OUT.")
    ] = False,
    half: Annotated[bool, typer.Option("--half", help="Store float16 (for publishing).")] = False,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Seed of data order and initial parameters.")
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Distil TEACHER into a LAWCAT adapter: attention transfer, then low-rank fine-tuning.

    The log and the checkpoints of a running distillation lie in OUT.run; after a kill, the same command with
    --resume goes on to the same result, and with --fresh it starts anew. Under `accelerate launch` it runs on
    many processes.

    Examples:

      lawcat-edge distill smollm2 --data "texts/*.txt" --tokens 500000 --window 64 --out adapter

      lawcat-edge distill smollm2 --recipe passkey --out adapter-passkey
    """
    given = dict(locals())
    from lawcat_edge.adapter import Adapter
    from lawcat_edge.commands.progress import training_progress
    from lawcat_edge.data.mix import parse_mix
    from lawcat_edge.distill.parallel import is_main_process
    from lawcat_edge.distill.run import distill as run
    from lawcat_edge.distill.settings import DistillSettings, load_recipe
    from lawcat_edge.runtime.errors import LawcatError
    from lawcat_edge.teacher import resolve

    if (out / "lawcat_config.json").is_file() and not (resume or overwrite):
        raise LawcatError(
            f"{out} holds a finished adapter; replace it with --overwrite, or give another --out."
        )
    settings = load_recipe(recipe) if recipe else DistillSettings()
    names = set(settings.to_dict())
    changes = {name: value for name, value in given.items() if name in names and value is not None}
    if tokens is not None:
        changes = {"transfer_tokens": tokens, "finetune_tokens": tokens, **changes}
    if seq_len is not None:
        changes = {"finetune_seq_len": seq_len, **changes}
    changes |= _parsed(set_ or [], settings.to_dict())
    settings = settings.with_changes(changes)
    parse_mix(settings.task_mix)  # before the teacher is loaded
    base = _begun(Adapter.load(start_from), changes) if start_from else None
    if not data and "text" in settings.task_mix:
        raise LawcatError("There is nothing to train on; give --data FILES, or a --task-mix without text.")
    source = resolve(teacher)
    if base is not None:
        base.check_teacher(source)
    if is_main_process():
        print(plan(settings, base, source.sha256), file=sys.stderr)
    with training_progress(shown=is_main_process()) as progress:
        adapter = run(
            source, data or [], out, settings, start_from=base, resume=resume, fresh=fresh, report=progress,
            half=half,
        )  # fmt: skip
    if not is_main_process():
        return
    if json_:
        print(json.dumps({"adapter": str(out), "sha256": adapter.sha256, **adapter.training}))
    else:
        for name, facts in adapter.training["stages"].items():
            print(
                f"{name}: {facts['tokens']:,} tokens in {facts['seconds']:,.0f} s, loss {facts['loss']:.4g}"
            )
        print(f"The adapter is in {out}. Next: lawcat-edge export {teacher} --adapter {out} --out bundle")


def plan(settings: Any, base: Adapter | None, teacher_sha256: str) -> str:
    """What will be trained, and whether it is too little; said before anything is.

    The time it takes comes with the progress, from the speed of the first steps.
    """
    from lawcat_edge.adapter import GENERAL, LITTLE_TOKENS, adapter_folder
    from lawcat_edge.runtime.files import read_json

    stages = {"transfer": settings.transfer_tokens, "finetune": settings.finetune_tokens}
    if settings.stage != "both":
        stages = {name: count for name, count in stages.items() if name == settings.stage}
    total = sum(stages.values())
    said = ", ".join(f"{name} {count:,}" for name, count in stages.items())
    lines = [f"Training on {total:,} tokens ({said}); the time it takes follows after the first steps."]
    if base is None and total < LITTLE_TOKENS:
        lines.append(
            f"That is too little for a model that writes well: below {LITTLE_TOKENS:,} tokens it proves that "
            "the parts work, no more. Give more text and a larger --tokens."
        )
    config = adapter_folder(GENERAL) / "lawcat_config.json"
    if base is None and config.is_file() and read_json(config).get("teacher_sha256") == teacher_sha256:
        lines.append(f"A trained adapter of this teacher comes with the package: --start-from {GENERAL}")
    return "\n".join(lines)


def _begun(adapter: Adapter, changes: dict[str, Any]) -> Adapter:
    """The adapter to go on from. changes: the settings that were asked for, by a flag or by --set; the window
    may be another one than the adapter's, the rest of its layer may not."""
    from lawcat_edge.runtime.errors import LawcatError

    for name in ("feature_dim", "conv_kernel", "rope"):
        has = getattr(adapter.config, name)
        if changes.get(name, has) != has:
            raise LawcatError(
                f"The adapter to go on from has {name} {has}, not {changes[name]}; leave that setting out."
            )
    return adapter.with_window(changes.get("window"))


def _parsed(pairs: list[str], known: dict[str, Any]) -> dict[str, Any]:
    """NAME=VALUE settings, with the type that the setting has."""
    from lawcat_edge.runtime.errors import LawcatError

    values: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or name not in known:
            raise LawcatError(
                f"--set takes NAME=VALUE with a known setting, not {pair!r}; known: {', '.join(known)}."
            )
        kind = type(known[name])
        try:
            values[name] = {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
        except (KeyError, ValueError):
            raise LawcatError(f"--set {name} needs a value of type {kind.__name__}, not {text!r}.") from None
    return values
