"""Distillation from a teacher to an adapter: both stages, resumable, on any number of processes."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Rows
from pathlib import Path
from typing import Any

import torch

from lawcat_edge.adapter import Adapter
from lawcat_edge.config import LawcatConfig
from lawcat_edge.data.mix import Sequence, parse_mix, sequences
from lawcat_edge.data.readers import ChatForm
from lawcat_edge.distill.checkpoint import collect, read_progress
from lawcat_edge.distill.full_attention import PICTURE, TABLE, FullAttention, plot_ranking, rank_layers
from lawcat_edge.distill.parallel import one_fate, open_accelerator, sharded
from lawcat_edge.distill.run_folder import (
    SAMPLES,
    begin,
    check_begun,
    check_start,
    finish,
    kept,
    run_folder,
)
from lawcat_edge.distill.sample import ensure_samples, teacher_text
from lawcat_edge.distill.settings import DistillSettings
from lawcat_edge.distill.steps import FinetuneStep, TransferStep
from lawcat_edge.distill.train import StageRun, TrainLog
from lawcat_edge.lora import parse_targets
from lawcat_edge.model import LawcatModel, load_student
from lawcat_edge.ops.backend import choose
from lawcat_edge.runtime.bundle.span import Span
from lawcat_edge.runtime.errors import LawcatError
from lawcat_edge.runtime.files import FileLock, read_bytes, read_json, write_json
from lawcat_edge.runtime.generate.text import MAX_TOKENIZER, load_tokenizer
from lawcat_edge.teacher import Teacher

Report = Callable[[dict[str, Any]], None]


def distill(
    teacher: Teacher,
    data: Rows[str | Path],
    out: Path,
    settings: DistillSettings,
    *,
    start_from: Adapter | None = None,
    resume: bool = False,
    fresh: bool = False,
    report: Report = lambda record: None,
    half: bool = False,
) -> Adapter:
    """Run the stages that ``settings`` name and write the adapter to ``out``.

    data: files, globs or hub data sets. start_from: an adapter to go on from (stage ``finetune`` needs it).
    While running, log and checkpoint live in ``OUT.run`` beside the target; ``resume`` goes on from there,
    ``fresh`` starts anew where an unfinished run is, which is refused without either.
    report: called with every log record. Raises LawcatError for the user's mistakes, Diverged for a bad loss.
    """
    if settings.stage == "finetune" and start_from is None:
        raise LawcatError(
            "Stage finetune alone needs an adapter to start from; give --start-from, or --stage both."
        )
    accelerator = open_accelerator(_bf16(settings))
    folder = run_folder(out)
    _check_target(out)
    if accelerator.is_main_process:
        out.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder) if accelerator.is_main_process else contextlib.nullcontext():
        try:
            with one_fate(accelerator, folder):
                check_start(folder, resume, fresh)
                return _run(
                    teacher, data, out, settings, start_from, resume, report, half, accelerator, folder
                )
        except BaseException:
            if accelerator.is_main_process and kept(folder) is None:
                shutil.rmtree(folder, ignore_errors=True)  # nothing in it can be resumed
            raise


def _check_target(out: Path) -> None:
    """Refuse a place that the adapter could not be written to, before the hours of training."""
    if out.exists() and not out.is_dir():
        raise LawcatError(f"{out} exists and is no folder; choose another place for the adapter.")
    if out.is_dir() and any(out.iterdir()) and not (out / "lawcat_config.json").is_file():
        raise LawcatError(f"{out} holds other files than an adapter; choose another folder.")


def _run(
    teacher: Teacher,
    data: Rows[str | Path],
    out: Path,
    settings: DistillSettings,
    start_from: Adapter | None,
    resume: bool,
    report: Report,
    half: bool,
    accelerator: Any,
    folder: Path,
) -> Adapter:
    checkpoint = folder / "checkpoint"
    facts = {
        "settings": {k: v for k, v in settings.to_dict().items() if k not in _FREE},
        "teacher_sha256": teacher.sha256,
        "start_from": start_from.sha256 if start_from else None,
    }
    done = None
    if resume and (checkpoint / "state.json").is_file():
        done = read_progress(checkpoint, facts)
    elif resume:  # sampling was interrupted, or what came right after it
        check_begun(folder, facts)
    choice, span = _full_attention(settings, teacher, start_from)
    sinks = None if settings.sinks < 0 else settings.sinks
    layers = choice.fixed(teacher.geometry.num_layers)
    wanted = choice.wanted(teacher.geometry.num_layers)
    if wanted and done is not None and done.stage == "finetune":
        layers, wanted = tuple(read_json(folder / TABLE)["layers"]), 0
    config = _config(settings, teacher).with_full_attention(layers, span, teacher.geometry, sinks)
    if start_from is not None and layers:
        start_from = start_from.with_full_attention(layers, span, sinks)
    model = load_student(teacher, start_from, config, settings.backend, settings.seed)
    if not sharded(accelerator):  # shards go to the device one by one: all of a large teacher may not fit
        model.to(accelerator.device)
    tokenizer = load_tokenizer(read_bytes(teacher.tokenizer_path, MAX_TOKENIZER), str(teacher.tokenizer_path))
    written = teacher.chat_template()
    template = ChatForm(*written) if written else None
    linear = next(layer.self_attn for layer in model.layers if not layer.full)
    backend = choose(settings.backend, linear.feature)  # what the operators will choose
    if data:  # a bad file is found now, before an earlier run's folder gives way to this one
        next(sequences(data, tokenizer, settings.seq_len, settings.seed, chat_template=template), None)
    if not resume and accelerator.is_main_process:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        begin(folder, facts)
    accelerator.wait_for_everyone()
    log = None
    if accelerator.is_main_process:
        order = ("transfer", "finetune")
        log = TrainLog(
            folder / "train_log.jsonl",
            lambda r: (
                done is not None
                and (order.index(r["stage"]), r["step"]) <= (order.index(done.stage), done.step)
            ),
        )
    own_text = None
    if "teacher" in parse_mix(settings.task_mix):
        samples = folder / SAMPLES
        if accelerator.is_main_process:
            home = model.embed_tokens.weight.device
            model.to(accelerator.device)
            ensure_samples(model, tokenizer, samples, settings.teacher_tokens, settings.seed, report)
            model.to(home)
        accelerator.wait_for_everyone()
        own_text = teacher_text(samples)

    def record(values: dict[str, Any]) -> None:
        if log is not None:
            log.write(values)
            report(values)

    def rows(
        length: int, start: int, rank: int | None = None, world: int | None = None
    ) -> Iterator[Sequence]:
        return sequences(
            data,
            tokenizer,
            length,
            settings.seed,
            accelerator.process_index if rank is None else rank,
            accelerator.num_processes if world is None else world,
            settings.task_mix,
            start=start,
            answer_weight=settings.answer_weight,
            teacher=own_text,
            chat_template=template,
        )

    def with_ranked_layers(pure: LawcatModel) -> LawcatModel:
        """The student with full attention in the layers that a ranking of this pure one finds."""
        table = folder / TABLE
        if accelerator.is_main_process and not table.is_file():
            length = min(settings.ranking_tokens, teacher.geometry.max_positions, span)
            first = itertools.islice(rows(length, 0, 0, 1), settings.ranking_tokens // length)
            ids = [torch.from_numpy(row.ids.astype("int64")[None]).to(accelerator.device) for row in first]
            pure.eval().to(accelerator.device)
            with torch.compiler.set_stance("force_eager"):
                ranking = rank_layers(pure, ids, wanted, Span(span), report)
            write_json(table, ranking.to_dict())
        accelerator.wait_for_everyone()
        chosen = read_json(table)["layers"]
        ranked = _adapter(pure, teacher, {}).with_full_attention(chosen, span, sinks)
        hybrid = _plain(ranked, teacher, settings)
        return hybrid if sharded(accelerator) else hybrid.to(accelerator.device)

    summary: dict[str, Any] = {}
    stages = ("transfer", "finetune") if settings.stage == "both" else (settings.stage,)
    if settings.compile:
        model.compile_parts()
    for stage in stages:
        if done is not None and stages.index(stage) < stages.index(done.stage):
            continue  # finished before the checkpoint, whose tensors hold its result
        if summary and sharded(accelerator):
            model = _plain(_adapter(model, teacher, {}), teacher, settings)
        if stage == "finetune" and wanted:
            model, wanted = with_ranked_layers(model), 0
        _switch_on(model, stage, settings)
        module = (
            TransferStep(model)
            if stage == "transfer"
            else FinetuneStep(model, settings.kl_weight, settings.ce_weight)
        )
        stage_run = StageRun(
            stage,
            module,
            functools.partial(_groups, model, stage, settings),
            model.adapter_parameters,
            settings,
            accelerator,
            folder,
            facts,
        )
        if done is not None:
            stage_run.resume()
            summary |= done.finished
            done = None
        stage_run.progress.finished = dict(summary)

        if stage_run.progress.step < stage_run.steps:
            stage_run.run(functools.partial(rows, stage_run.seq_len), record)
        p = stage_run.progress
        summary[stage] = {"tokens": p.tokens, "seconds": round(p.seconds, 1), "loss": round(p.smoothed, 6)}
        del module, stage_run  # with the wrapper, before the next stage wraps the same parameters
        accelerator.free_memory()
    if wanted:
        model = with_ranked_layers(model)

    if log is not None:
        log.close()
    adapter = _adapter(
        model,
        teacher,
        {
            "settings": settings.to_dict(),
            "stages": summary,
            "backend": backend,
            "device": str(accelerator.device),
        },
    )
    if accelerator.is_main_process:
        extra = {"train_log.jsonl": (folder / "train_log.jsonl").read_bytes()}
        extra |= _pictures(folder)
        adapter.save(out, half=half, extra=extra)
    accelerator.wait_for_everyone()
    saved = Adapter.load(out)
    if accelerator.is_main_process:
        finish(folder, saved.sha256)
    accelerator.end_training()
    return saved


def _adapter(model: LawcatModel, teacher: Teacher, training: dict[str, Any]) -> Adapter:
    """What the model has learned; every process calls this, since shards are gathered."""
    tensors = {name: p.float().numpy() for name, p in collect(model.adapter_parameters())[0].items()}
    return Adapter(
        model.config, teacher.geometry, teacher.name, teacher.sha256, tensors, model.lora, training
    )


def _config(settings: DistillSettings, teacher: Teacher) -> LawcatConfig:
    """The pure student that a run without an adapter to go on from begins with."""
    names = ("conv_kernel", "window", "rope", "window_scaling")
    chosen = {name: getattr(settings, name) for name in names}
    if settings.feature_dim:
        chosen["feature_dim"] = settings.feature_dim
    return LawcatConfig.for_geometry(teacher.geometry, **chosen)


def _full_attention(
    settings: DistillSettings, teacher: Teacher, start_from: Adapter | None
) -> tuple[FullAttention, int]:
    """The choice of full-attention layers, checked against what there is to go on from, and their span."""
    choice = FullAttention.parse(settings.full_attention)
    span = settings.span or teacher.geometry.max_positions
    if start_from is not None and start_from.config.layer_types and choice.kind != "none":
        raise LawcatError(
            f"The adapter to go on from has full attention in layers "
            f"{', '.join(map(str, start_from.config.full_attention_layers))}; leave --full-attention out."
        )
    return choice, span


def _plain(adapter: Adapter, teacher: Teacher, settings: DistillSettings) -> LawcatModel:
    """A fresh model with these parameters: a sharded one takes in no LoRA and no new wrapping."""
    fresh = load_student(teacher, adapter, backend=settings.backend)
    if settings.compile:
        fresh.compile_parts()
    return fresh


# Settings that change the speed of a run and not its result, so a resumed run may differ in them.
_FREE = ("compile", "batch_size", "grad_accumulation", "checkpoint_every", "checkpoint_seconds")


def _switch_on(model: LawcatModel, stage: str, settings: DistillSettings) -> None:
    """Let the parameters train that the stage trains, and no others: DDP waits for the gradient of each."""
    if stage == "finetune" and model.lora is None:
        with torch.random.fork_rng():
            torch.manual_seed(settings.seed)
            model.add_lora(settings.lora_rank, settings.lora_alpha, parse_targets(settings.lora_targets))
    model.requires_grad_(False)
    for named, _ in _groups(model, stage, settings):
        for parameter in named.values():
            parameter.requires_grad_(True)


def _groups(
    model: LawcatModel, stage: str, settings: DistillSettings
) -> list[tuple[dict[str, torch.nn.Parameter], float]]:
    """What a stage trains: groups of (named parameters, learning rate)."""
    if stage == "transfer":
        return [(model.new_parameters(), settings.lr_transfer)]
    groups = [(model.lora_parameters(), settings.lr_lora)]
    if settings.lr_new:
        groups.append((model.new_parameters(), settings.lr_new))
    return groups


def _pictures(folder: Path) -> dict[str, bytes]:
    """The training log as a picture, and the ranking of layers, where there was one, as table and picture."""
    table = folder / TABLE
    extra = {TABLE: table.read_bytes()} if table.is_file() else {}
    try:
        from lawcat_edge.distill.plots import plot_run
    except ImportError:  # matplotlib is not installed: log and table hold the same figures
        return extra
    lines = (folder / "train_log.jsonl").read_text(encoding="utf-8").splitlines()
    if lines:
        extra["train_log.png"] = plot_run([json.loads(line) for line in lines])
    if table.is_file():
        extra[PICTURE] = plot_ranking(read_json(table))
    return extra


def _bf16(settings: DistillSettings) -> bool:
    if settings.precision == "auto":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    return settings.precision == "bf16"
