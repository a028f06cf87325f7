"""Which layers keep full attention: the user's choice, and the greedy ranking behind ``auto:K``.

Given back one at a time to a trained pure student, without training in between, a few layers win most of
what the student has lost at long range. A round of the ranking tries every layer that is still linear and
keeps the one that leaves the least KL to the teacher at positions past the window.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from lawcat_edge.losses import kl_of_logs
from lawcat_edge.runtime.bundle.span import Span
from lawcat_edge.runtime.errors import LawcatError

if TYPE_CHECKING:
    from torch import Tensor

    from lawcat_edge.model import LawcatModel

TABLE, PICTURE = "full_attention.json", "full_attention.png"
POSITIONS = 512  # of a sequence at which KL is taken: its noise is far below the differences between layers


@dataclass(frozen=True)
class FullAttention:
    """A choice of layers. kind: ``none``, ``layers``, ``every`` or ``auto``; numbers: what it counts."""

    kind: str
    numbers: tuple[int, ...] = ()

    @classmethod
    def parse(cls, text: str) -> FullAttention:
        """``none``, ``14,17,20,23``, ``every:7`` or ``auto:4``; raises LawcatError for anything else."""
        kind, colon, rest = text.strip().partition(":")
        try:
            if text.strip() == "none":
                return cls("none")
            if colon and kind in ("auto", "every"):
                if int(rest) < 1:
                    raise ValueError
                return cls(kind, (int(rest),))
            return cls("layers", tuple(int(part) for part in text.split(",")))
        except ValueError:
            raise LawcatError(
                f"Full-attention layers are none, 14,17,20,23 (numbers), every:7, or auto:4, not {text!r}."
            ) from None

    def fixed(self, num_layers: int) -> tuple[int, ...]:
        """The layers that are named outright; for ``every:n`` the last of each n, as Qwen3-Next has them."""
        if self.kind == "every":
            n = self.numbers[0]
            if n > num_layers:
                raise LawcatError(f"every:{n} names no layer of a teacher that has {num_layers}; take less.")
            return tuple(range(n - 1, num_layers, n))
        return self.numbers if self.kind == "layers" else ()

    def wanted(self, num_layers: int) -> int:
        """How many layers ``auto`` is to find; 0 for every other choice."""
        if self.kind != "auto":
            return 0
        if self.numbers[0] >= num_layers:
            raise LawcatError(
                f"auto:{self.numbers[0]} would keep all {num_layers} layers, the teacher itself; name fewer."
            )
        return self.numbers[0]


@dataclass
class Ranking:
    """What a ranking measured. start: KL of the pure student; rounds: for each, KL by layer given back."""

    span: int
    tokens: int
    start: float = 0.0
    rounds: list[dict[int, float]] = field(default_factory=list)
    layers: list[int] = field(default_factory=list)
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        return {"format": 1, **asdict(self)}


def rank_layers(
    model: LawcatModel,
    sequences: list[Tensor],
    count: int,
    span: Span,
    report: Callable[[dict[str, Any]], None] = lambda record: None,
) -> Ranking:
    """Choose ``count`` layers of a pure student greedily. sequences: ids [1,T] each, on the model's device.

    A round runs the student once and keeps the input of every layer, so that a candidate costs only the
    layers from itself on.
    """
    import time

    import torch

    began = time.monotonic()
    layers = len(model.layers)
    steps = sum(layers - r for r in range(count)) * len(sequences)
    ranking = Ranking(span.tokens, sum(ids.numel() for ids in sequences))
    done = 0
    with torch.inference_mode():
        texts = [_Text(model, ids) for ids in sequences]
        for _ in range(count):
            totals = {i: 0.0 for i in range(layers) if i not in ranking.layers}
            ranking.start = ranking.start or sum(t.kl(ranking.layers, span) for t in texts) / len(texts)
            for text in texts:
                for layer, kl in text.candidates(ranking.layers, span):
                    totals[layer] += kl / len(texts)
                    done += 1
                    report({"stage": "ranking", "step": done, "steps": steps})
            ranking.rounds.append(totals)
            ranking.layers.append(min(totals, key=totals.__getitem__))
    ranking.seconds = round(time.monotonic() - began, 1)
    return ranking


class _Text:
    """One sequence, with the teacher's distribution at some positions past the window."""

    def __init__(self, model: LawcatModel, ids: Tensor) -> None:
        import torch

        self.model, self.ids, T = model, ids, ids.shape[1]
        first = min(max(model.config.window, 64), T // 2)
        self.at = torch.linspace(first, T - 1, min(POSITIONS, T - first), device=ids.device).long()
        self.rotary = model.rotary(0, T)
        self.taught = self._log_probabilities(model.teacher_hidden(ids))

    def _log_probabilities(self, hidden: Tensor) -> Tensor:
        return self.model.lm_head(hidden[0, self.at]).float().log_softmax(-1)

    def _layer(self, i: int, x: Tensor, full: bool, span: Span) -> Tensor:
        layer: Any = self.model.layers[i]
        if not full:
            return layer.student(x, self.rotary, None)[0]
        _, q, k, v = layer.read(x)
        return layer.write(x, layer.self_attn.full_attention(q, k, v, self.rotary, None, span)[0])

    def _kl(self, x: Tensor) -> float:
        student = self._log_probabilities(self.model.norm(x))
        return float(kl_of_logs(self.taught, student).mean())

    def kl(self, chosen: list[int], span: Span) -> float:
        """Mean KL(teacher || student) in nats, with full attention in the chosen layers."""
        x = self.model.embed_tokens(self.ids)
        for i in range(len(self.model.layers)):
            x = self._layer(i, x, i in chosen, span)
        return self._kl(x)

    def candidates(self, chosen: list[int], span: Span) -> Iterator[tuple[int, float]]:
        """(layer, KL with full attention in it as well), for every layer that is not chosen."""
        count = len(self.model.layers)
        base = self.model.embed_tokens(self.ids)
        for layer in range(count):
            if layer not in chosen:
                x = self._layer(layer, base, True, span)
                for i in range(layer + 1, count):
                    x = self._layer(i, x, i in chosen, span)
                yield layer, self._kl(x)
            base = self._layer(layer, base, layer in chosen, span)


def plot_ranking(ranking: dict[str, Any]) -> bytes:
    """PNG of a ranking: KL left by each layer, a line a round, the chosen ones marked."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from lawcat_edge.distill.plots import png

    figure, axis = plt.subplots(figsize=(7, 4))
    axis.axhline(ranking["start"], color="grey", lw=0.8, ls="--", label="no full-attention layer")
    for n, (row, layer) in enumerate(zip(ranking["rounds"], ranking["layers"], strict=True)):
        numbers = sorted(int(i) for i in row)
        values = {int(i): kl for i, kl in row.items()}
        (line,) = axis.plot(numbers, [values[i] for i in numbers], marker=".", lw=0.8)
        axis.plot(layer, values[layer], marker="o", color=line.get_color(), label=f"{n + 1}: layer {layer}")
    axis.set(
        xlabel="layer given back its softmax attention", ylabel="KL to the teacher past the window, nats"
    )
    axis.legend()
    return png(figure)
