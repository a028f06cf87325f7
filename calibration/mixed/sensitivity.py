"""Which part of the model minds being quantised: KL at the output when only that part is.

Measured on a torch student (see ``simulate``), part by part: each kind of product at each choice of storage,
and each layer as a whole at the smallest. The table that comes out chooses a mixed scheme (``mixed``).
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from lawcat_edge.calibration.comparison.report import small
from lawcat_edge.calibration.comparison.rows import Row, key_of
from lawcat_edge.calibration.mixed.simulate import Simulated
from lawcat_edge.export.schemes import PRODUCTS, Product
from lawcat_edge.losses import token_kl
from lawcat_edge.progress import Progress
from lawcat_edge.runtime.errors import LawcatError

CHOICES = {
    "int8": Product("nbits", 8, 64),
    "int8-dynamic": Product("dynamic", 8),
    "int4": Product("nbits", 4, 32),
}
LAYER_CHOICE = "int4"
_CHUNK = 256


class Text:
    """Sequences ids [n,T] with the final hidden states of the fp32 student on them: [n,T,D], a few MB."""

    def __init__(self, simulated: Simulated, ids: np.ndarray) -> None:
        self.ids = torch.from_numpy(ids.astype(np.int64))
        self.simulated = simulated
        simulated.clear()
        self._head = simulated.model.lm_head.exact
        with torch.inference_mode():
            self.hidden = [simulated.model.hidden(row[None])[0][0] for row in self.ids]

    @torch.inference_mode()
    def kl(self) -> dict[str, float]:
        """Mean and 99th percentile of KL(fp32 ‖ the student as it is set now) over all tokens."""
        model, found = self.simulated.model, []
        for row, known in zip(self.ids, self.hidden, strict=True):
            hidden = model.hidden(row[None])[0][0]
            for at in range(0, len(row), _CHUNK):
                theirs = torch.nn.functional.linear(known[at : at + _CHUNK], self._head, model.lm_head.bias)
                found.append(token_kl(theirs.numpy(), model.lm_head(hidden[at : at + _CHUNK]).numpy()))
        losses = np.concatenate(found)
        return {"kl": float(losses.mean()), "kl_p99": float(np.quantile(losses, 0.99))}


def sensitivity(
    make: Callable[[], Simulated], layers: int, ids: np.ndarray, row: Row, key: str, progress: Progress
) -> dict[str, Any]:
    """{"kinds": {product: {choice: {"kl", "kl_p99"}}}, "layers": [{"kl", …}, …], "layer_choice"}.

    make: the student, built only when something is left to measure. row: where each part is kept, so that a
    killed run goes on. Raises LawcatError when a part failed.
    """
    held: list[Text] = []

    def text() -> Text:
        if not held:
            held.append(Text(make(), ids))
        return held[0]

    def measured(name: str, parts: Sequence[tuple[str, Product, list[int] | None]]) -> dict[str, float]:
        def work() -> dict[str, float]:
            for part in parts:
                text().simulated.set(*part)
            found = text().kl()
            for product, _, where in parts:
                text().simulated.set(product, Product("fp32"), where)
            return found

        found = row.measure(name, key_of(key, ids.tolist(), [(p, c.to_dict(), n) for p, c, n in parts]), work)
        if found is None:
            raise LawcatError(f"The sensitivity of {name} could not be measured: {row.errors[name]}")
        return found

    jobs = [(product, name) for product in PRODUCTS for name in CHOICES]
    jobs = [(product, name) for product, name in jobs if (product, name) != ("head", "int8-dynamic")]
    total, done = len(jobs) + layers, 0
    kinds: dict[str, dict[str, dict[str, float]]] = {product: {} for product in PRODUCTS}
    progress("kinds", 0, total)
    for product, name in jobs:
        kinds[product][name] = measured(f"{product} {name}", [(product, CHOICES[name], None)])
        done += 1
        progress("kinds", done, total)
    by_layer = []
    for i in range(layers):
        body = [(product, CHOICES[LAYER_CHOICE], [i]) for product in PRODUCTS if product != "head"]
        by_layer.append(measured(f"layer {i}", body))
        done += 1
        progress("layers", done, total)
    return {"kinds": kinds, "layers": by_layer, "layer_choice": LAYER_CHOICE}


def markdown(found: dict[str, Any]) -> str:
    lines = ["# Sensitivity", "", "Mean KL to fp32 at the output when only this part is quantised.", ""]
    lines += ["| | " + " | ".join(CHOICES) + " |", "|---" + "|---:" * len(CHOICES) + "|"]
    for product, row in found["kinds"].items():
        lines.append(f"| {product} | " + " | ".join(small(_kl(row, name)) for name in CHOICES) + " |")
    lines += ["", f"One layer, all four of its products in {found['layer_choice']}:", ""]
    lines += ["| layer | KL | KL p99 |", "|---:|---:|---:|"]
    for i, row in enumerate(found["layers"]):
        lines.append(f"| {i} | {small(row['kl'])} | {small(row['kl_p99'])} |")
    return "\n".join(lines) + "\n"


def _kl(row: dict[str, Any], name: str) -> float | None:
    return row[name]["kl"] if name in row else None


def draw(found: dict[str, Any]) -> bytes:
    """PNG: bars by kind and choice, and by layer. Raises LawcatError without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise LawcatError("The picture needs matplotlib; install lawcat-edge[build].") from None
    figure = Figure(figsize=(11, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    width = 0.8 / len(CHOICES)
    for k, name in enumerate(CHOICES):
        kinds = [(i, _kl(row, name)) for i, row in enumerate(found["kinds"].values())]
        shown = [(i + k * width, kl) for i, kl in kinds if kl is not None]
        left.bar([at for at, _ in shown], [kl for _, kl in shown], width, label=name)
    left.set_xticks([i + 0.4 - width / 2 for i in range(len(PRODUCTS))], list(found["kinds"]))
    left.set(yscale="log", ylabel="mean KL to fp32", title="one kind of product quantised")
    left.legend(fontsize=8)
    right.bar(range(len(found["layers"])), [row["kl"] for row in found["layers"]])
    title = f"one layer quantised ({found['layer_choice']})"
    right.set(yscale="log", xlabel="layer", ylabel="mean KL to fp32", title=title)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=120)
    return out.getvalue()
