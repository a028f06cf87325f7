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

from lawcat_edge.distill.checkpoint import Progress, load_tensors, read_progress, save_checkpoint
from lawcat_edge.distill.data import Sequence
from lawcat_edge.distill.settings import DistillSettings
from lawcat_edge.runtime.errors import LawcatError

SMOOTHING = 0.95
EXPLODED = 10.0  # a smoothed loss this many times its best stops the run


class Diverged(LawcatError):  # noqa: N818 (it reads as what happened)
    """The loss is NaN or has exploded; the last good checkpoint is kept."""

    exit_code = 1


class StageRun:
    """One stage of a run: ``module(ids, weight) -> (loss, parts)`` over ``groups`` (named parameters, rate).

    saved: all parameters of the adapter, those that this stage leaves alone too.
    """

    def __init__(
        self,
        stage: str,
        module: nn.Module,
        groups: list[tuple[dict[str, nn.Parameter], float]],
        saved: dict[str, nn.Parameter],
        settings: DistillSettings,
        accelerator: Any,
        folder: Path,
        facts: dict[str, Any],
    ) -> None:
        self.stage, self.settings, self.accelerator, self.folder = stage, settings, accelerator, folder
        self.saved = saved
        self.parameters = {name: p for named, _ in groups for name, p in named.items()}
        self.seq_len = settings.seq_len if stage == "transfer" else settings.finetune_seq_len
        self.per_process = settings.batch_size * settings.grad_accumulation
        self.global_batch = self.per_process * accelerator.num_processes
        tokens = settings.transfer_tokens if stage == "transfer" else settings.finetune_tokens
        self.steps = math.ceil(tokens / (self.global_batch * self.seq_len))
        self.facts = {**facts, "global_batch": self.global_batch}
        self.rates = [rate for _, rate in groups]
        fused = accelerator.device.type == "cuda"
        optimizer = torch.optim.AdamW(
            [{"params": list(named.values()), "lr": rate} for named, rate in groups],
            betas=(0.9, 0.95),
            weight_decay=0.0,
            fused=fused,
        )
        self.module, self.optimizer = accelerator.prepare(module, optimizer)
        self.progress = Progress(stage)

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint"

    def resume(self) -> None:
        """Continue from the checkpoint if it is of this stage."""
        progress = read_progress(self.checkpoint, self.facts)
        if progress.stage == self.stage:
            load_tensors(self.checkpoint, self.saved, self.optimizer.optimizer)
            self.progress = progress

    def save(self) -> None:
        if self.accelerator.is_main_process:
            save_checkpoint(self.checkpoint, self.saved, self.optimizer.optimizer, self.progress, self.facts)
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
                late = (
                    time.monotonic() - saved > settings.checkpoint_seconds
                    and self.accelerator.num_processes == 1
                )
                if last or due or late or progress.step % every == 0:
                    self._check(pending, report)
                    pending = []
                if last or due or late:
                    self.save()
                    saved = time.monotonic()
        finally:
            self.module.eval()

    def _step(self, feed: Iterator[Sequence]) -> tuple[Tensor, dict[str, Tensor]]:
        micro, parts, total = self.settings.grad_accumulation, [], []
        self.optimizer.zero_grad(set_to_none=True)
        for i in range(micro):
            ids, weight = collate(
                [next(feed) for _ in range(self.settings.batch_size)], self.accelerator.device
            )
            syncing = i == micro - 1
            if syncing:
                loss, part = self.module(ids, weight)
                self.accelerator.backward(loss / micro)
            else:
                with self.accelerator.no_sync(self.module):
                    loss, part = self.module(ids, weight)
                    self.accelerator.backward(loss / micro)
            total.append(loss.detach())
            parts.append(part)
        if self.settings.clip:
            norm = self.accelerator.clip_grad_norm_(list(self.parameters.values()), self.settings.clip)
            parts[-1] = {**parts[-1], "grad_norm": norm.detach()}
        self.optimizer.step()
        mean = {k: torch.stack([p[k] for p in parts if k in p]).mean(0) for k in parts[-1]}
        return torch.stack(total).mean(), mean

    def _check(
        self, pending: list[tuple[Tensor, dict[str, Tensor]]], report: Callable[[dict[str, Any]], None]
    ) -> None:
        """Log the pending steps; stop on NaN or explosion, naming the layer, before anything is saved."""
        progress = self.progress
        first = progress.step - len(pending)
        for i, (loss_tensor, parts) in enumerate(pending):
            loss = float(self.accelerator.reduce(loss_tensor, "mean"))
            layers = parts["layers"].tolist() if "layers" in parts else None
            if not math.isfinite(loss):
                raise Diverged(self._message("the loss is no longer a number", layers))
            progress.smoothed = (
                loss if progress.smoothed == 0 else SMOOTHING * progress.smoothed + (1 - SMOOTHING) * loss
            )
            progress.best = min(progress.best, progress.smoothed)
            if progress.smoothed > EXPLODED * progress.best:
                raise Diverged(
                    self._message(f"the loss rose to {EXPLODED:g} times its best ({loss:.3g})", layers)
                )
            record: dict[str, Any] = {
                "stage": self.stage,
                "step": first + i + 1,
                "steps": self.steps,
                "loss": loss,
            }
            record |= {k: float(v) for k, v in parts.items() if v.ndim == 0}
            if layers is not None:
                record["layers"] = [float(f"{value:.6g}") for value in layers]
            record |= {
                "tokens": (first + i + 1) * self.global_batch * self.seq_len,
                "seconds": round(progress.seconds, 3),
            }
            report(record)

    def _message(self, what: str, layers: list[float] | None) -> str:
        if layers is None:
            bad = next((n for n, p in self.parameters.items() if not bool(torch.isfinite(p).all())), None)
            bad = bad or next(
                (
                    n
                    for n, p in self.parameters.items()
                    if p.grad is not None and not bool(torch.isfinite(p.grad).all())
                ),
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
