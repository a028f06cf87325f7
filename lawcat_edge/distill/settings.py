"""What a distillation run is made of: one frozen dataclass, and the recipes that ship with the package."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from lawcat_edge.distill.full_attention import FullAttention
from lawcat_edge.lora import parse_targets
from lawcat_edge.runtime.bundle.limits import MAX_FEATURES, MAX_SPAN, MAX_TAPS, MAX_WINDOW
from lawcat_edge.runtime.errors import LawcatError
from lawcat_edge.runtime.files import read_json, user_path

RECIPES = Path(__file__).parent / "recipes"
STAGES = ("both", "transfer", "finetune")


# The smallest and the largest value that a run can mean something with.
_WHOLE = {
    "transfer_tokens": (0, 1 << 50),
    "finetune_tokens": (0, 1 << 50),
    "teacher_tokens": (0, 1 << 40),
    "seq_len": (1, 1 << 24),
    "finetune_seq_len": (1, 1 << 24),
    "batch_size": (1, 1 << 16),
    "grad_accumulation": (1, 1 << 16),
    "lora_rank": (1, 4096),
    "feature_dim": (0, MAX_FEATURES),
    "conv_kernel": (2, MAX_TAPS),
    "window": (0, MAX_WINDOW),
    "span": (0, MAX_SPAN),
    "ranking_tokens": (16, 1 << 24),
    "seed": (0, (1 << 63) - 1),
    "checkpoint_every": (1, 1 << 40),
    "checkpoint_seconds": (0, 1 << 31),
}
_REAL = {
    "lr_transfer": (0.0, 1e4),
    "lr_lora": (0.0, 1e4),
    "lr_new": (0.0, 1e4),
    "clip": (0.0, 1e4),
    "kl_weight": (0.0, 1e4),
    "ce_weight": (0.0, 1e4),
    "answer_weight": (0.0, 1e4),
    "warmup": (0.0, 1.0),
    "lora_alpha": (0.0, 1e6),
}


@dataclass(frozen=True)
class DistillSettings:
    """Both stages of LAWCAT distillation (arXiv 2509.18467, section 4). Token counts are of training tokens.

    kl_weight, ce_weight: parts of the fine-tuning loss: KL(teacher || student), and next-token cross-entropy.
    answer_weight: weight of answer tokens of generated tasks, in KL and cross-entropy (other tokens count 1).
    full_attention: layers that keep softmax attention: ``none``, numbers (``14,17,20,23``), ``every:7``, or
        ``auto:4``, the four that help a pure student most (``lawcat_edge.distill.full_attention``).
    window_scaling: as in LawcatConfig; the default was the better of the two (docs/hybrid.md).
    span: tokens that these see; 0: the teacher's range. ranking_tokens: text that ``auto`` reads.
    lora_targets: ``all-linear``, or projections by name, as peft's target_modules.
    teacher_tokens: how much text to sample from the teacher when task_mix names ``teacher``.
    compile: torch.compile the parts around the Triton kernels (a fifth faster on a GPU, after half a minute).
    warmup: share of a stage's steps in which the rate rises. clip: largest norm of a gradient (0: any).
    lora_alpha: low-rank updates count lora_alpha / lora_rank times. checkpoint_seconds: at least so often.
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
    lora_targets: str = "q_proj,k_proj,v_proj,o_proj"
    kl_weight: float = 1.0
    ce_weight: float = 0.0
    answer_weight: float = 1.0
    task_mix: str = "text:1.0"
    teacher_tokens: int = 100_000
    feature_dim: int = 0
    conv_kernel: int = 4
    window: int = 0
    window_scaling: str = "softmax"
    full_attention: str = "none"
    span: int = 0
    ranking_tokens: int = 2048
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
        for name, (low, high) in _WHOLE.items():
            value = getattr(self, name)
            if type(value) is not int or not low <= value <= high:
                raise LawcatError(f"{name} must be a whole number from {low:,} to {high:,}, not {value!r}.")
        for name, (least, most) in _REAL.items():
            value = getattr(self, name)
            # Written so that a NaN fails too.
            if type(value) not in (int, float) or not least <= value <= most:
                raise LawcatError(f"{name} must be a number from {least:g} to {most:g}, not {value!r}.")
        for name in ("rope", "compile"):
            if type(getattr(self, name)) is not bool:
                raise LawcatError(f"{name} must be true or false, not {getattr(self, name)!r}.")
        for name in ("task_mix", "backend", "full_attention", "lora_targets", "window_scaling"):
            if not isinstance(getattr(self, name), str) or len(getattr(self, name)) > 1000:
                raise LawcatError(f"{name} must be a short text, not {str(getattr(self, name))[:40]!r}.")
        parse_targets(self.lora_targets)
        FullAttention.parse(self.full_attention)
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
    path = RECIPES / f"{name}.json" if name in recipe_names() else user_path(name)
    if not path.is_file():
        raise LawcatError(
            f"There is no recipe {name!r}; take one of {', '.join(recipe_names())}, or a JSON file."
        )
    data = read_json(path)
    if not isinstance(data, dict):
        raise LawcatError(f"{path} must hold one JSON object of settings.")
    return DistillSettings().with_changes({k: v for k, v in data.items() if not k.startswith("_")})
