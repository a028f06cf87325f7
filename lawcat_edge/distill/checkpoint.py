"""Checkpoints: everything a run needs to go on exactly where it was, in safetensors and JSON.

    state.safetensors   parameters by name; AdamW's moments as ``exp_avg/<name>``, ``exp_avg_sq/<name>``
    state.json          stage, step, tokens, settings, teacher, sha256 of the tensors, the guard's yardstick

The data position needs no file: sequences are a function of seed and index, and the step gives the index.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
from msgspec import Meta
from torch import Tensor, nn

from lawcat_edge.distill.parallel import shard_like, whole
from lawcat_edge.distill.run_folder import check_facts
from lawcat_edge.runtime import schema
from lawcat_edge.runtime.errors import LawcatError
from lawcat_edge.runtime.files import atomic_folder, read_json, sha256_file, write_json

FORMAT = 1
_Count = Annotated[int, Meta(ge=0, lt=1 << 60)]
_Stage = Annotated[str, Meta(pattern=r"^(transfer|finetune)\Z", description="transfer or finetune")]
_Number = Annotated[float, Meta(ge=0.0)]


@dataclass
class Progress:
    """Where a run stands. best: smallest smoothed loss of the stage so far (the guard's yardstick);
    finished: tokens, seconds and loss of the stages before."""

    stage: _Stage
    step: _Count = 0
    tokens: _Count = 0
    seconds: _Number = 0.0
    smoothed: _Number = 0.0
    best: _Number = float("inf")
    finished: dict[str, Any] = field(default_factory=dict)


def collect(
    parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer | None = None
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Whole tensors on the CPU (parameters, moments) by name, and AdamW's steps; every process calls this."""
    tensors = {name: whole(p).cpu().contiguous() for name, p in parameters.items()}
    steps: dict[str, float] = {}
    for name, parameter in parameters.items():
        state = optimizer.state.get(parameter) if optimizer is not None else None
        if state:
            steps[name] = float(state["step"])
            for moment in ("exp_avg", "exp_avg_sq"):
                tensors[f"{moment}/{name}"] = whole(state[moment]).cpu().contiguous()
    return tensors, steps


def save_checkpoint(
    folder: Path,
    tensors: dict[str, Tensor],
    steps: dict[str, float],
    progress: Progress,
    facts: dict[str, Any],
) -> None:
    """Write what ``collect`` gave, at once: a kill leaves the checkpoint before."""
    from safetensors.torch import save_file

    with atomic_folder(folder, "state.json") as building:
        save_file(tensors, building / "state.safetensors")
        digest = sha256_file(building / "state.safetensors")
        plain = {k: (None if v == float("inf") else v) for k, v in vars(progress).items()}
        write_json(
            building / "state.json",
            {"format": FORMAT, "progress": plain, "optimizer_steps": steps, "sha256": digest, **facts},
        )


def read_progress(folder: Path, facts: dict[str, Any]) -> Progress:
    """Progress of a checkpoint made with the same ``facts`` (settings, teacher); another run's is refused."""
    data = read_json(folder / "state.json")
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise LawcatError(f"{folder} is no checkpoint of this version; remove it and start the run anew.")
    check_facts(data, facts, folder)
    values, refuse = data.get("progress"), partial(_damaged, folder)
    if isinstance(values, dict):
        if "best" not in values:
            raise refuse("best", "is missing")
        values = {**values, "best": float("inf") if values["best"] is None else values["best"]}  # as written
    progress = schema.build(values, Progress, refuse, "progress")
    schema.check_fields(progress, refuse)
    return progress


def _damaged(folder: Path, where: str, problem: str) -> LawcatError:
    return LawcatError(f"{folder}/state.json is damaged ({where} {problem}); remove it and start anew.")


def load_tensors(
    folder: Path, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer | None
) -> None:
    """Copy a checkpoint's parameters (and moments, with an optimizer) in place."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    data = read_json(folder / "state.json")
    file = folder / "state.safetensors"
    if sha256_file(file) != data.get("sha256"):
        raise LawcatError(
            f"{file} is damaged (its sha256 is not the recorded one); remove {folder} and start anew."
        )
    try:
        tensors = load_file(file)
    except SafetensorError as error:
        raise LawcatError(f"{file} is damaged ({error}); remove {folder} and start anew.") from None
    refuse = partial(_damaged, folder)
    steps = schema.convert(data.get("optimizer_steps", {}), dict[str, _Number], refuse, "optimizer_steps")
    with torch.no_grad():
        for name, parameter in parameters.items():
            moments = [f"{kind}/{name}" for kind in ("exp_avg", "exp_avg_sq")] if name in steps else []
            for wanted in (name, *moments):
                if wanted not in tensors or tensors[wanted].shape != parameter.shape:
                    raise LawcatError(
                        f"{file} has no {wanted!r} of the right shape; remove {folder} and start anew."
                    )
            parameter.copy_(shard_like(tensors[name], parameter))
            if optimizer is None or name not in steps:
                continue
            # capturable and fused AdamW keep the step on the device, the plain one on the CPU
            fused = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
            device = parameter.device if fused else torch.device("cpu")
            optimizer.state[parameter] = {
                "step": torch.tensor(steps[name], device=device),
                "exp_avg": shard_like(tensors[f"exp_avg/{name}"], parameter),
                "exp_avg_sq": shard_like(tensors[f"exp_avg_sq/{name}"], parameter),
            }
