"""The low-rank updates of an adapter (LoRA, arXiv 2106.09685), in peft's terms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from msgspec import Meta

from lawcat_edge.families import Geometry
from lawcat_edge.runtime import schema
from lawcat_edge.runtime.errors import LawcatError

ATTENTION_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL_LINEAR = (*ATTENTION_TARGETS, "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class LoraSettings:
    """W x + alpha / rank * B A x on every target projection, A [rank, in], B [out, rank]."""

    rank: Annotated[int, Meta(ge=1, le=4096)]
    alpha: Annotated[float, Meta(ge=0.0, le=1e6)]
    targets: tuple[str, ...] = ATTENTION_TARGETS

    def __post_init__(self) -> None:
        schema.check_fields(self, _wrong)
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
        if isinstance(data, dict) and isinstance(data.get("targets"), list):  # JSON has no tuples
            data = {**data, "targets": tuple(data["targets"])}
        return schema.build(data, cls, _wrong, "The low-rank updates")


def _wrong(where: str, problem: str) -> LawcatError:
    return LawcatError(f"{where} of the low-rank updates {problem}; change it or copy the file anew.")


def parse_targets(text: str) -> tuple[str, ...]:
    """``all-linear``, or projections by name with commas between them; the order does not matter."""
    if text == "all-linear":
        return ALL_LINEAR
    names = tuple(name.strip() for name in text.split(","))
    return LoraSettings(1, 1.0, tuple(sorted(names, key=lambda n: (*ALL_LINEAR, n).index(n)))).targets
