"""``lawcat-edge distill``: train an adapter that makes a teacher's attention linear."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lawcat_edge.commands.generated import chosen, options_from
from lawcat_edge.distill.settings import DistillSettings, load_recipe

if TYPE_CHECKING:
    from lawcat_edge.adapter import Adapter


@options_from(DistillSettings, after="tokens")
def distill(
    context: typer.Context,
    teacher: Annotated[str, typer.Argument(help="Folder, GGUF file, hub id, or smollm2.")],
    out: Annotated[Path, typer.Option(help="Adapter folder to write.")],
    data: Annotated[
        list[str] | None,
        typer.Option(help="Text, JSON, CSV, Parquet, globs, tokenised .bin, hub:NAME; repeatable."),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="hybrid, general, general-window, passkey, or a JSON file; its values replace the "
            "defaults below, and options given here replace both."
        ),
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens of each stage.")] = None,
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
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
    **options: Any,
) -> None:
    """Distil TEACHER into a LAWCAT adapter: attention transfer, then low-rank fine-tuning.

    The log and the checkpoints of a running distillation lie in OUT.run; after a kill, the same command with
    --resume goes on to the same result, and with --fresh it starts anew. Under `accelerate launch` it runs on
    many processes.

    Examples:

      lawcat-edge distill smollm2 --data "texts/*.txt" --tokens 500000 --window 64 --out adapter

      lawcat-edge distill smollm2 --recipe passkey --out adapter-passkey
    """
    from lawcat_edge.adapter import Adapter
    from lawcat_edge.commands.progress import TrainingProgress, reporter
    from lawcat_edge.data.mix import parse_mix
    from lawcat_edge.distill.parallel import is_main_process
    from lawcat_edge.distill.run import distill as run
    from lawcat_edge.runtime.errors import LawcatError
    from lawcat_edge.teacher import resolve

    if (out / "lawcat_config.json").is_file() and not (resume or overwrite):
        raise LawcatError(
            f"{out} holds a finished adapter; replace it with --overwrite, or give another --out."
        )
    settings = load_recipe(recipe) if recipe else DistillSettings()
    changes = chosen(context, options)
    if tokens is not None:
        changes = {"transfer_tokens": tokens, "finetune_tokens": tokens, **changes}
    if "seq_len" in changes:
        changes = {"finetune_seq_len": changes["seq_len"], **changes}
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
    with reporter() as show:  # the other processes report nothing
        adapter = run(
            source, data or [], out, settings, start_from=base, resume=resume, fresh=fresh,
            report=TrainingProgress(show), half=half,
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
