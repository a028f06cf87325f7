"""What a distillation run is made of: one frozen dataclass, and the recipes that ship with the package."""

from __future__ import annotations

from dataclasses import Field, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta

from lawcat_edge.runtime import schema
from lawcat_edge.runtime.bundle.limits import MAX_FEATURES, MAX_SINKS, MAX_SPAN, MAX_TAPS, MAX_WINDOW
from lawcat_edge.runtime.errors import LawcatError

RECIPES = Path(__file__).parent / "recipes"
STAGES = ("both", "transfer", "finetune")


def setting(default: Any, text: str, *limits: float) -> Any:
    """A field with its one sentence for ``--help`` and, of a number, the least and the largest value that a
    run can mean something with."""
    return field(default=default, metadata={"help": text, "limits": limits})


@dataclass(frozen=True)
class DistillSettings:
    """Both stages of LAWCAT distillation (arXiv 2509.18467, section 4). Token counts are of training tokens.

    The command line has an option for every field, with its default and this text. ``auto:4`` of
    full_attention are the four layers that help a pure student most (``lawcat_edge.distill.full_attention``).
    window_scaling: as in LawcatConfig; the default was the better of the two (docs/hybrid.md). compile is a
    fifth faster on a GPU, after half a minute.
    """

    stage: str = setting("both", "transfer, finetune or both.")
    transfer_tokens: int = setting(1_000_000, "Tokens of attention transfer.", 0, 1 << 50)
    finetune_tokens: int = setting(1_000_000, "Tokens of low-rank fine-tuning.", 0, 1 << 50)
    seq_len: int = setting(1024, "Tokens of a sequence.", 1, 1 << 24)
    finetune_seq_len: int = setting(1024, "The same for fine-tuning alone.", 1, 1 << 24)
    batch_size: int = setting(1, "Sequences a process takes at once.", 1, 1 << 16)
    grad_accumulation: int = setting(1, "Batches summed before a step.", 1, 1 << 16)
    lr_transfer: float = setting(1e-2, "Learning rate of attention transfer.", 0.0, 1e4)
    lr_lora: float = setting(2e-4, "Learning rate of the low-rank updates.", 0.0, 1e4)
    lr_new: float = setting(5e-4, "Rate of the new parameters while fine-tuning; 0 freezes them.", 0.0, 1e4)
    warmup: float = setting(0.02, "Share of a stage in which the rate rises; then a cosine.", 0.0, 1.0)
    clip: float = setting(1.0, "Largest norm of a gradient; 0: any.", 0.0, 1e4)
    lora_rank: int = setting(8, "Rank of the low-rank updates.", 1, 4096)
    lora_alpha: float = setting(16.0, "Their scale, divided by the rank.", 0.0, 1e6)
    lora_targets: str = setting(
        "q_proj,k_proj,v_proj,o_proj", "Where: all-linear, or projections by name, with commas."
    )
    kl_weight: float = setting(1.0, "Weight of KL to the teacher, in fine-tuning.", 0.0, 1e4)
    ce_weight: float = setting(0.0, "Weight of next-token cross-entropy.", 0.0, 1e4)
    answer_weight: float = setting(
        1.0, "Weight of the answers of generated tasks, in KL and cross-entropy.", 0.0, 1e4
    )
    task_mix: str = setting("text:1.0", 'Shares, as in "text:0.7,passkey:0.3".')
    teacher_tokens: int = setting(
        100_000, "Tokens to sample from the teacher, if the mix has a share of it.", 0, 1 << 40
    )
    feature_dim: int = setting(0, "Feature width f; 0: half the head width.", 0, MAX_FEATURES)
    conv_kernel: int = setting(4, "Taps of the convolution on q and k.", 2, MAX_TAPS)
    window: int = setting(0, "Tokens of softmax attention mixed in; 0: none.", 0, MAX_WINDOW)
    window_scaling: str = setting("softmax", "How the window is mixed in: softmax or max_score.")
    full_attention: str = setting(
        "none", "Layers that keep softmax attention: auto:4, every:7, 14,17,20,23, or none."
    )
    span: int = setting(0, "Tokens that a full-attention layer sees; 0: the teacher's range.", 0, MAX_SPAN)
    sinks: int = setting(
        -1,
        "Of these, first tokens of the text, never forgotten; -1: 4 where the teacher keeps them.",
        -1,
        MAX_SINKS,
    )
    ranking_tokens: int = setting(2048, "Text that auto reads to choose the layers, in tokens.", 16, 1 << 24)
    rope: bool = setting(False, "Rotary embedding in the linear branch.")
    precision: str = setting("auto", "auto, fp32 or bf16.")
    backend: str = setting("auto", "auto, triton or torch.")
    compile: bool = setting(False, "torch.compile what surrounds the Triton kernels (GPU).")
    seed: int = setting(0, "Seed of data order and initial parameters.", 0, (1 << 63) - 1)
    checkpoint_every: int = setting(50, "Steps between two checkpoints.", 1, 1 << 40)
    checkpoint_seconds: int = setting(300, "Longest time between two.", 0, 1 << 31)

    def __post_init__(self) -> None:
        # Imported late here and below: the command line reads the fields without what these bring along.
        from lawcat_edge.distill.full_attention import FullAttention
        from lawcat_edge.lora import parse_targets

        if self.stage not in STAGES:
            raise LawcatError(f"stage must be one of {', '.join(STAGES)}, not {self.stage!r}.")
        if self.precision not in ("auto", "fp32", "bf16"):
            raise LawcatError(f"precision must be auto, fp32 or bf16, not {self.precision!r}.")
        for one in fields(self):
            schema.convert(getattr(self, one.name), _kind(one), _wrong, one.name)
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
        known = {one.name for one in fields(self)}
        unknown = sorted(set(changes) - known)
        if unknown:
            raise LawcatError(f"Unknown setting {unknown[0]!r}; known are {', '.join(sorted(known))}.")
        return replace(self, **changes)


def _kind(one: Field[Any]) -> Any:
    """The type of a setting: that of its default, within its limits."""
    kind = type(one.default)
    if kind is str:
        return Annotated[str, Meta(max_length=1000)]
    low, high = one.metadata["limits"] or (None, None)
    return kind if low is None else Annotated[kind, Meta(ge=low, le=high)]


def _wrong(where: str, problem: str) -> LawcatError:
    return LawcatError(f"{where} {problem}; change this setting.")


def recipe_names() -> list[str]:
    return sorted(path.stem for path in RECIPES.glob("*.json"))


def load_recipe(name: str) -> DistillSettings:
    """Settings of a recipe that ships with the package, or of a JSON file of the user's."""
    from lawcat_edge.runtime.files import read_json, user_path

    path = RECIPES / f"{name}.json" if name in recipe_names() else user_path(name)
    if not path.is_file():
        raise LawcatError(
            f"There is no recipe {name!r}; take one of {', '.join(recipe_names())}, or a JSON file."
        )
    data = read_json(path)
    if not isinstance(data, dict):
        raise LawcatError(f"{path} must hold one JSON object of settings.")
    return DistillSettings().with_changes({k: v for k, v in data.items() if not k.startswith("_")})
