"""Pictures of a training run: loss by stage, and the transfer error of every layer."""

from __future__ import annotations

import io
from typing import Any


def plot_run(records: list[dict[str, Any]]) -> bytes:
    """PNG of a ``train_log.jsonl``: losses against tokens, and the first and last per-layer errors."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    stages = [s for s in ("transfer", "finetune") if any(r["stage"] == s for r in records)]
    layered = [r for r in records if "layers" in r]
    columns = len(stages) + bool(layered)
    figure, axes = plt.subplots(1, columns, figsize=(5 * columns, 3.6), squeeze=False)
    for axis, stage in zip(axes[0], stages, strict=False):
        rows = [r for r in records if r["stage"] == stage]
        axis.plot([r["tokens"] for r in rows], [r["loss"] for r in rows], lw=0.8, label="loss")
        for part in ("kl", "ce"):
            if part in rows[0]:
                axis.plot([r["tokens"] for r in rows], [r[part] for r in rows], lw=0.6, label=part)
        axis.set(title=f"stage {stage}", xlabel="tokens", yscale="log")
        axis.legend()
    if layered:
        axis = axes[0][-1]
        for name, record in (("first step", layered[0]), ("last step", layered[-1])):
            axis.plot(range(len(record["layers"])), record["layers"], marker=".", label=name)
        axis.set(title="transfer error by layer", xlabel="layer", ylabel="mean squared error", yscale="log")
        axis.legend()
    return png(figure)


def png(figure: Any) -> bytes:
    """The figure as a PNG; it is closed."""
    import matplotlib.pyplot as plt

    figure.tight_layout()
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110)
    plt.close(figure)
    return out.getvalue()
