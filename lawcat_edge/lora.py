"""The low-rank updates of an adapter (LoRA, arXiv 2106.09685), in peft's terms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lawcat_edge.families import Geometry
from lawcat_edge.runtime.errors import LawcatError

ATTENTION_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL_LINEAR = (*ATTENTION_TARGETS, "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class LoraSettings:
    """W x + alpha / rank * B A x on every target projection, A [rank, in], B [out, rank]."""

    rank: int
    alpha: float
    targets: tuple[str, ...] = ATTENTION_TARGETS

    def __post_init__(self) -> None:
        if type(self.rank) is not int or not 0 < self.rank <= 4096:
            raise LawcatError(f"The rank of low-rank updates must be from 1 to 4096, not {self.rank!r}.")
        if type(self.alpha) not in (int, float) or not 0 <= self.alpha <= 1e6:
            raise LawcatError(f"alpha of low-rank updates must be from 0 to 1e6, not {self.alpha!r}.")
        known = [name for name in ALL_LINEAR if name in self.targets]
        if not known or sorted(known) != sorted(self.targets):
            raise LawcatError(
                f"Targets of low-rank updates must be all-linear, or some of {', '.join(ALL_LINEAR)}, each "
                f"once, not {', '.join(map(str, self.targets)) or 'none'}."
            )

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def shapes(self, geometry: Geometry) -> dict[str, tuple[int, ...]]:
        """The matrices of one layer by name, ``q_proj.lora_A`` and so on."""
        g = geometry
        D, inner = g.hidden_size, g.intermediate_size
        widths = {
            "q_proj": (D, g.query_width),
            "k_proj": (D, g.kv_width),
            "v_proj": (D, g.kv_width),
            "o_proj": (g.query_width, D),
            "gate_proj": (D, inner),
            "up_proj": (D, inner),
            "down_proj": (inner, D),
        }
        shapes: dict[str, tuple[int, ...]] = {}
        for name in self.targets:
            n_in, n_out = widths[name]
            shapes[f"{name}.lora_A"], shapes[f"{name}.lora_B"] = (self.rank, n_in), (n_out, self.rank)
        return shapes

    def to_dict(self) -> dict[str, Any]:
        return {"rank": self.rank, "alpha": self.alpha, "targets": list(self.targets)}

    @classmethod
    def from_dict(cls, data: Any) -> LoraSettings:
        """From JSON; adapters of before 2026-11-26 name no targets and have those of attention."""
        if not isinstance(data, dict) or not {"rank", "alpha"} <= set(data) <= {"rank", "alpha", "targets"}:
            raise LawcatError("the low-rank updates must hold rank, alpha and targets.")
        targets = data.get("targets", list(ATTENTION_TARGETS))
        if not isinstance(targets, list) or not all(isinstance(name, str) for name in targets):
            raise LawcatError("the targets of low-rank updates must be a list of names.")
        return cls(data["rank"], data["alpha"], tuple(targets))


def parse_targets(text: str) -> tuple[str, ...]:
    """``all-linear``, or projections by name with commas between them; the order does not matter."""
    if text == "all-linear":
        return ALL_LINEAR
    names = tuple(name.strip() for name in text.split(","))
    return LoraSettings(1, 1.0, tuple(sorted(names, key=lambda n: (*ALL_LINEAR, n).index(n)))).targets
