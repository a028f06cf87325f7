"""Which part of the model minds being quantised: KL at the output when only that part is.

Measured on the graphs that a device runs (see ``bench``), part by part: each kind of product at each choice
of storage, and each layer as a whole at the smallest. The table that comes out chooses a mixed scheme
(``search``).
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from lawcat_edge.calibration.comparison.report import small
from lawcat_edge.calibration.comparison.rows import Row, key_of
from lawcat_edge.export.schemes import LINEARS, Linear, Scheme
from lawcat_edge.progress import Progress
from lawcat_edge.runtime.errors import LawcatError

CHOICES = {
    "int8": Linear("nbits", 8, 64),
    "int8-dynamic": Linear("dynamic", 8),
    "int4": Linear("nbits", 4, 32),
}
LAYER_CHOICE = "int4"


def sensitivity(
    kl_of: Callable[[Scheme], dict[str, float]],
    base: Scheme,
    layers: int,
    row: Row,
    key: str,
    progress: Progress,
) -> dict[str, Any]:
    """{"kinds": {product: {choice: {"kl", "kl_p99"}}}, "layers": [{"kl", …}, …], "layer_choice"}.

    kl_of: what a scheme costs. base: the scheme of which one part at a time is quantised. row: where each
    part is kept under ``key``, so that a killed run goes on. Raises LawcatError when a part failed.
    """
    jobs = [(product, name) for product in LINEARS for name in CHOICES]
    jobs = [(product, name) for product, name in jobs if (product, name) != ("head", "int8-dynamic")]
    total = len(jobs) + layers
    kinds: dict[str, dict[str, dict[str, float]]] = {product: {} for product in LINEARS}
    progress("kinds", 0, total)
    for done, (product, name) in enumerate(jobs):
        scheme = only(base, product, CHOICES[name])
        kinds[product][name] = _measured(row, f"{product} {name}", key, kl_of, scheme)
        progress("kinds", done + 1, total)
    by_layer = []
    for i in range(layers):
        scheme = base
        for product in LINEARS:
            if product != "head":
                scheme = only(scheme, product, CHOICES[LAYER_CHOICE], (i,))
        by_layer.append(_measured(row, f"layer {i}", key, kl_of, scheme))
        progress("layers", len(jobs) + i + 1, total)
    return {"kinds": kinds, "layers": by_layer, "layer_choice": LAYER_CHOICE}


def _measured(
    row: Row, name: str, key: str, kl_of: Callable[[Scheme], dict[str, float]], scheme: Scheme
) -> dict[str, float]:
    found: dict[str, float] | None = row.measure(
        name, key_of(key, scheme.to_dict()), functools.partial(kl_of, scheme)
    )
    if found is None:
        raise LawcatError(f"The sensitivity of {name} could not be measured: {row.errors[name]}")
    return found


def only(base: Scheme, product: str, spec: Linear, layers: tuple[int, ...] | None = None) -> Scheme:
    """The scheme with one kind of product changed, in all layers or in some; a head takes the embedding
    along."""
    if layers is None:
        embedding = spec if product == "head" else base.embedding
        return replace(base, linears={**base.linears, product: spec}, embedding=embedding)
    own = {i: {**base.layers.get(i, {}), product: spec} for i in layers}
    return replace(base, layers={**base.layers, **own})


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
    left.set_xticks([i + 0.4 - width / 2 for i in range(len(LINEARS))], list(found["kinds"]))
    left.set(yscale="log", ylabel="mean KL to fp32", title="one kind of product quantised")
    left.legend(fontsize=8)
    right.bar(range(len(found["layers"])), [row["kl"] for row in found["layers"]])
    title = f"one layer quantised ({found['layer_choice']})"
    right.set(yscale="log", xlabel="layer", ylabel="mean KL to fp32", title=title)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=120)
    return out.getvalue()
