"""The settings of a LAWCAT layer: one frozen dataclass, stored as JSON beside every artefact."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from lawcat_edge.runtime.errors import LawcatError


@dataclass(frozen=True)
class LawcatConfig:
    """How softmax attention is replaced (LAWCAT, arXiv 2509.18467).

    conv_kernel: taps K of the causal convolution on q and k.
    feature_dim: f; the feature map has width F = 2 f.
    gate_rank: inner width of the low-rank gate projection.
    gate_divisor: the log-decay is logsigmoid(...) divided by this.
    window: tokens of softmax attention mixed in (0: none).
    rope: rotary embedding on q and k of the linear branch.
    eps: added to the normaliser.
    """

    conv_kernel: int = 4
    feature_dim: int = 32
    gate_rank: int = 16
    gate_divisor: float = 16.0
    window: int = 0
    rope: bool = False
    eps: float = 1e-6

    def __post_init__(self) -> None:
        limits = {
            "conv_kernel": (2, 16),
            "feature_dim": (1, 1024),
            "gate_rank": (1, 1024),
            "window": (0, 8192),
        }
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if type(value) is not int or not low <= value <= high:
                raise LawcatError(f"{name} must be a whole number from {low} to {high}, not {value!r}.")
        if type(self.rope) is not bool:
            raise LawcatError(f"rope must be true or false, not {self.rope!r}.")
        # Far below 1e-30 float32 has no eps left, and a normaliser of zero would divide.
        for name, least in (("gate_divisor", 1e-3), ("eps", 1e-30)):
            value = getattr(self, name)
            if type(value) not in (int, float) or not least <= value < 1e6:
                raise LawcatError(f"{name} must be a number from {least:g} to 1e6, not {value!r}.")

    @property
    def key_dim(self) -> int:
        """F, the key width of the state."""
        return 2 * self.feature_dim

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> LawcatConfig:
        if not isinstance(data, dict):
            raise LawcatError("The LAWCAT config must be a JSON object; the file is damaged.")
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(data) - known)
        if unknown:
            raise LawcatError(
                f"Unknown setting {unknown[0]!r} in the LAWCAT config; known are {sorted(known)}."
            )
        return cls(**data)
