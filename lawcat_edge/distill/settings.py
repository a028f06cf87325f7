"""What a distillation run is made of: one frozen dataclass, and the recipes that ship with the package."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from lawcat_edge.runtime.errors import LawcatError

RECIPES = Path(__file__).parent / "recipes"
STAGES = ("both", "transfer", "finetune")


@dataclass(frozen=True)
class DistillSettings:
    """Both stages of LAWCAT distillation (arXiv 2509.18467, section 4). Token counts are of training tokens.

    kl_weight, ce_weight: parts of the fine-tuning loss: KL(teacher || student), and next-token cross-entropy.
    answer_weight: weight of answer tokens in the cross-entropy of generated tasks (other tokens count 1).
    teacher_tokens: how much text to sample from the teacher when task_mix names ``teacher``.
    compile: torch.compile the parts around the Triton kernels (a fifth faster on a GPU, after half a minute).
    lr_new: rate of conv, feature map, gate and omega while fine-tuning (0 freezes them).
    """

    stage: str = "both"
    transfer_tokens: int = 1_000_000
    finetune_tokens: int = 1_000_000
    seq_len: int = 1024
    finetune_seq_len: int = 1024
    batch_size: int = 1
    grad_accumulation: int = 1
    lr_transfer: float = 1e-2
    lr_lora: float = 2e-4
    lr_new: float = 5e-4
    warmup: float = 0.02
    clip: float = 1.0
    lora_rank: int = 8
    lora_alpha: float = 16.0
    kl_weight: float = 1.0
    ce_weight: float = 0.0
    answer_weight: float = 1.0
    task_mix: str = "text:1.0"
    teacher_tokens: int = 100_000
    feature_dim: int = 0
    conv_kernel: int = 4
    window: int = 0
    rope: bool = False
    precision: str = "auto"
    backend: str = "auto"
    compile: bool = False
    seed: int = 0
    checkpoint_every: int = 50
    checkpoint_seconds: int = 300

    def __post_init__(self) -> None:
        if self.stage not in STAGES:
            raise LawcatError(f"stage must be one of {', '.join(STAGES)}, not {self.stage!r}.")
        if self.precision not in ("auto", "fp32", "bf16"):
            raise LawcatError(f"precision must be auto, fp32 or bf16, not {self.precision!r}.")
        for name in (
            "seq_len",
            "finetune_seq_len",
            "batch_size",
            "grad_accumulation",
            "lora_rank",
            "checkpoint_every",
        ):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise LawcatError(
                    f"{name} must be a whole number of at least 1, not {getattr(self, name)!r}."
                )
        for name in ("transfer_tokens", "finetune_tokens", "teacher_tokens"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 0:
                raise LawcatError(
                    f"{name} must be a whole number of at least 0, not {getattr(self, name)!r}."
                )
        for name in ("lr_transfer", "lr_lora", "lr_new", "kl_weight", "ce_weight", "clip"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not 0 <= value < 1e4:
                raise LawcatError(f"{name} must be a number from 0 to 10000, not {value!r}.")
        if self.kl_weight + self.ce_weight <= 0:
            raise LawcatError("Fine-tuning needs a loss: set kl_weight or ce_weight above 0.")
        if self.window > min(self.seq_len, self.finetune_seq_len):
            raise LawcatError(
                f"The window ({self.window}) is larger than a training sequence "
                f"({min(self.seq_len, self.finetune_seq_len)}); lower --window or raise --seq-len."
            )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def with_changes(self, changes: dict[str, Any]) -> DistillSettings:
        known = {field.name for field in fields(self)}
        unknown = sorted(set(changes) - known)
        if unknown:
            raise LawcatError(f"Unknown setting {unknown[0]!r}; known are {', '.join(sorted(known))}.")
        return replace(self, **changes)


def recipe_names() -> list[str]:
    return sorted(path.stem for path in RECIPES.glob("*.json"))


def load_recipe(name: str) -> DistillSettings:
    """Settings of a recipe that ships with the package, or of a JSON file of the user's."""
    path = RECIPES / f"{name}.json" if name in recipe_names() else Path(name)
    if not path.is_file():
        raise LawcatError(
            f"There is no recipe {name!r}; take one of {', '.join(recipe_names())}, or a JSON file."
        )
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise LawcatError(f"{path} is no readable JSON ({error}).") from None
    if not isinstance(data, dict):
        raise LawcatError(f"{path} must hold one JSON object of settings.")
    return DistillSettings().with_changes({k: v for k, v in data.items() if not k.startswith("_")})
