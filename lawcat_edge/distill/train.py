"""The training loop of one stage: batches in, parameters moved, checkpoints and a log out.

One loop serves both stages and any number of processes (accelerate). Sequences are numbered; step s of a run
takes numbers s * B .. (s+1) * B - 1 with B the batch over all processes, so a run can be resumed at any step,
on another number of processes as well, and gives what it would have given.
"""

from __future__ import annotations

import json
import math
import queue
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lawcat_edge.data.mix import Sequence
from lawcat_edge.distill.checkpoint import (
    Progress,
    collect,
    load_tensors,
    read_progress,
    save_checkpoint,
)
from lawcat_edge.distill.parallel import held_gradients, local, whole, wrap
from lawcat_edge.distill.settings import DistillSettings
from lawcat_edge.distill.steps import target_weights
from lawcat_edge.runtime.errors import LawcatError

SMOOTHING = 0.95
EXPLODED = 10.0  # a smoothed loss this many times its best stops the run
# Nats a token below which a loss counts as this much: where one task is learned to 0.005 and another rests at
# 4, a batch that holds more of the other is no explosion.
LEAST_BEST = {"transfer": 0.0, "finetune": 1.0}


class Diverged(LawcatError):  # noqa: N818 (it reads as what happened)
    """The loss is NaN or has exploded; the last good checkpoint is kept."""

    exit_code = 1


class StageRun:
    """One stage of a run: ``module(ids, weight, norm) -> (loss, parts)``.

    groups: named parameters and their rate. saved: all parameters of the adapter. Both are asked for once the
    module is wrapped, because sharding replaces the parameters.
    """

    def __init__(
        self,
        stage: str,
        module: nn.Module,
        groups: Callable[[], list[tuple[dict[str, nn.Parameter], float]]],
        saved: Callable[[], dict[str, nn.Parameter]],
        settings: DistillSettings,
        accelerator: Any,
        folder: Path,
        facts: dict[str, Any],
    ) -> None:
        self.stage, self.settings, self.accelerator, self.folder = stage, settings, accelerator, folder
        self.seq_len = settings.seq_len if stage == "transfer" else settings.finetune_seq_len
        self.per_process = settings.batch_size * settings.grad_accumulation
        self.global_batch = self.per_process * accelerator.num_processes
        tokens = settings.transfer_tokens if stage == "transfer" else settings.finetune_tokens
        self.steps = math.ceil(tokens / (self.global_batch * self.seq_len))
        self.facts = {**facts, "global_batch": self.global_batch}
        self.module = wrap(module, accelerator)
        self.saved, named_groups = saved(), groups()
        self.parameters = {name: p for named, _ in named_groups for name, p in named.items()}
        self.rates = [rate for _, rate in named_groups]
        self.optimizer = torch.optim.AdamW(
            [{"params": list(named.values()), "lr": rate} for named, rate in named_groups],
            betas=(0.9, 0.95),
            weight_decay=0.0,
            fused=accelerator.device.type == "cuda",
        )
        self.progress = Progress(stage)

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint"

    def resume(self) -> None:
        """Continue from the checkpoint if it is of this stage."""
        progress = read_progress(self.checkpoint, self.facts)
        if progress.stage == self.stage:
            load_tensors(self.checkpoint, self.saved, self.optimizer)
            self.progress = progress

    def save(self) -> None:
        tensors, steps = collect(self.saved, self.optimizer)
        if self.accelerator.is_main_process:
            save_checkpoint(self.checkpoint, tensors, steps, self.progress, self.facts)
        self.accelerator.wait_for_everyone()

    def rate(self, step: int) -> float:
        """Share of the full learning rate: linear warm-up, then a cosine to one hundredth."""
        warm = max(1, round(self.settings.warmup * self.steps))
        if step < warm:
            return (step + 1) / warm
        return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, self.steps - warm)))

    def run(
        self, sequences: Callable[[int], Iterator[Sequence]], report: Callable[[dict[str, Any]], None]
    ) -> None:
        """Train to the end. ``sequences(start)`` yields this process's share from number start on."""
        device, settings, progress = self.accelerator.device, self.settings, self.progress
        every = 1 if device.type == "cpu" else 10  # reading the loss makes a GPU wait
        feed = prefetch(sequences(progress.step * self.global_batch))
        started, saved = time.monotonic() - progress.seconds, time.monotonic()
        pending: list[tuple[Tensor, dict[str, Tensor]]] = []
        self.module.train()
        try:
            while progress.step < self.steps:
                for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
                    group["lr"] = rate * self.rate(progress.step)
                pending.append(self._step(feed))
                progress.step += 1
                progress.tokens += self.global_batch * self.seq_len
                progress.seconds = time.monotonic() - started
                last = progress.step == self.steps
                due = progress.step % settings.checkpoint_every == 0
                if last or due or progress.step % every == 0:
                    late = self._check(pending, time.monotonic() - saved, report)
                    pending = []
                    if last or due or late:
                        self.save()
                        saved = time.monotonic()
        finally:
            self.module.eval()

    def _step(self, feed: Iterator[Sequence]) -> tuple[Tensor, dict[str, Tensor]]:
        micro, parts, total = self.settings.grad_accumulation, [], []
        batches = [
            collate([next(feed) for _ in range(self.settings.batch_size)], self.accelerator.device)
            for _ in range(micro)
        ]
        norm = self._norm(batches)
        self.optimizer.zero_grad(set_to_none=True)
        for i, (ids, weight) in enumerate(batches):
            with held_gradients(self.module, self.accelerator, hold=i < micro - 1):
                with self.accelerator.autocast():
                    loss, part = self.module(ids, weight, norm)
                (loss / micro).backward()
            total.append(loss.detach())
            parts.append(part)
        if self.settings.clip:
            norm_of_all = nn.utils.clip_grad_norm_(list(self.parameters.values()), self.settings.clip)
            parts[-1] = {**parts[-1], "grad_norm": whole(norm_of_all)}
        self.optimizer.step()
        mean = {k: torch.stack([p[k] for p in parts if k in p]).mean(0) for k in parts[-1]}
        return torch.stack(total).mean(), mean

    def _norm(self, batches: list[tuple[Tensor, Tensor | None]]) -> Tensor | None:
        """The loss weight of this step's average batch, over all processes; None where there is but one."""
        alone = len(batches) == 1 and self.accelerator.num_processes == 1
        if alone or self.stage != "finetune":
            return None
        sums = [target_weights(ids, weight).sum() for ids, weight in batches]
        return self.accelerator.reduce(torch.stack(sums).mean(), "mean")

    def _check(
        self,
        pending: list[tuple[Tensor, dict[str, Tensor]]],
        since_saved: float,
        report: Callable[[dict[str, Any]], None],
    ) -> bool:
        """Log the pending steps; stop on NaN or explosion, naming the layer, before anything is saved.

        What is logged is the mean over processes, so all of them stop at the same step. True if the main
        process finds that a checkpoint is overdue.
        """
        progress = self.progress
        first = progress.step - len(pending)
        overdue = since_saved > self.settings.checkpoint_seconds and self.accelerator.is_main_process
        rows = [torch.cat([loss.view(1), *(p.flatten() for p in parts.values())]) for loss, parts in pending]
        late = rows[0].new_full((1,), float(overdue))
        flat = self.accelerator.reduce(torch.cat([late, *(row.float() for row in rows)]), "mean").tolist()
        for i, (row, (_, parts)) in enumerate(zip(_split(flat[1:], len(rows)), pending, strict=True)):
            loss, values = row[0], iter(row[1:])
            means = {name: [next(values) for _ in range(part.numel())] for name, part in parts.items()}
            layers = means.pop("layers", None)
            if not math.isfinite(loss):
                raise Diverged(self._message("the loss is no longer a number", layers))
            progress.smoothed = (
                loss if progress.smoothed == 0 else SMOOTHING * progress.smoothed + (1 - SMOOTHING) * loss
            )
            progress.best = min(progress.best, progress.smoothed)
            if progress.smoothed > EXPLODED * max(progress.best, LEAST_BEST[self.stage]):
                raise Diverged(
                    self._message(f"the loss rose to {EXPLODED:g} times its best ({loss:.3g})", layers)
                )
            record: dict[str, Any] = {
                "stage": self.stage,
                "step": first + i + 1,
                "steps": self.steps,
                "loss": loss,
            }
            record |= {name: value for name, (value,) in means.items()}
            if layers is not None:
                record["layers"] = [float(f"{value:.6g}") for value in layers]
            record |= {
                "tokens": (first + i + 1) * self.global_batch * self.seq_len,
                "seconds": round(progress.seconds, 3),
            }
            report(record)
        return flat[0] > 0

    def _message(self, what: str, layers: list[float] | None) -> str:
        if layers is None:
            bad = next((n for n, p in self.parameters.items() if not _finite(p)), None)
            bad = bad or next(
                (n for n, p in self.parameters.items() if p.grad is not None and not _finite(p.grad)),
                "none of the trained parameters (the hidden states themselves)",
            )
            where = f"first seen in {bad}"
        else:
            broken = [i for i, value in enumerate(layers) if not math.isfinite(value)]
            where = f"in layer {broken[0] if broken else int(np.argmax(layers))}"
        return (
            f"Stage {self.stage}, step {self.progress.step}: {what}, {where}; the last good checkpoint is "
            f"kept in {self.checkpoint}; lower the learning rate and start anew."
        )


def _split(values: list[float], count: int) -> list[list[float]]:
    size = len(values) // count
    return [values[i * size : (i + 1) * size] for i in range(count)]


def _finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(local(tensor)).all())


def collate(batch: list[Sequence], device: torch.device) -> tuple[Tensor, Tensor | None]:
    ids = torch.from_numpy(np.stack([row.ids for row in batch]).astype(np.int64))
    weight = None
    if any(row.weight is not None for row in batch):
        ones = np.ones(len(batch[0].ids), np.float32)
        weight = torch.from_numpy(np.stack([ones if row.weight is None else row.weight for row in batch]))
    return ids.to(device), None if weight is None else weight.to(device)


def prefetch(rows: Iterator[Sequence], depth: int = 64) -> Iterator[Sequence]:
    """The same rows, read ahead in a thread; an error arrives where the row would have."""
    ready: queue.Queue[Sequence | BaseException | None] = queue.Queue(depth)

    def read() -> None:
        try:
            for row in rows:
                ready.put(row)
            ready.put(None)
        except BaseException as error:
            ready.put(error)

    threading.Thread(target=read, daemon=True).start()
    while (row := ready.get()) is not None:
        if isinstance(row, BaseException):
            raise row
        yield row
    raise LawcatError(
        "The data ended before the tokens asked for were read; give more text or fewer --tokens."
    )


class TrainLog:
    """``train_log.jsonl``: one line a step; a resumed run drops the lines after its checkpoint."""

    def __init__(self, path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
        self.path = path
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        kept = []
        for line in lines:
            try:
                record = json.loads(line)
                if keep(record):
                    kept.append(line)
            except (ValueError, KeyError, TypeError):
                break  # a line cut by a kill
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        self.file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (open for the run's whole life)

    def write(self, record: dict[str, Any]) -> None:
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()
