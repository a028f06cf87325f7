"""The comparison as a table: in the terminal, and in Markdown with its picture."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Cells = list[tuple[str, Callable[[dict[str, Any], dict[str, Any]], str]]]
"""Heading, and the cell's text from (row, fp32 row)."""
_NONE = "–"


def get(row: dict[str, Any], *keys: str) -> Any:
    """row[keys[0]][keys[1]]… or None where one is missing."""
    value: Any = row
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def number(value: float | None, form: str, scale: float = 1.0, unit: str = "") -> str:
    return _NONE if value is None else f"{value * scale:{form}}{unit}"


def small(value: float | None) -> str:
    """A KL: two significant figures, whatever its size."""
    if value is None:
        return _NONE
    return f"{value:.4f}" if value >= 0.001 else f"{value:.1e}" if value else "0"


def own_reference(row: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What a row's loss is counted from: the fp32 bundle, for a GGUF file the teacher in fp32."""
    name = "fp32" if row["kind"] == "scheme" else "teacher-fp32"
    return next((other for other in rows if other["name"] == name), {})


def ppl_change(row: dict[str, Any], reference: dict[str, Any]) -> float | None:
    """Perplexity relative to the reference's, less one."""
    mine, theirs = get(row, "accuracy", "perplexity"), get(reference, "accuracy", "perplexity")
    return mine / theirs - 1 if mine and theirs else None


def size_ratio(row: dict[str, Any], reference: dict[str, Any]) -> float | None:
    mine, theirs = get(row, "export", "bytes"), get(reference, "export", "bytes")
    return mine / theirs if mine and theirs else None


def pareto(rows: list[dict[str, Any]]) -> set[str]:
    """Names of the schemes of which no other is both no larger and no worse in KL (and better in one)."""
    points = {}
    for row in rows:
        size, kl = get(row, "export", "bytes"), get(row, "accuracy", "kl")
        if row["kind"] == "scheme" and size is not None and get(row, "accuracy") is not None:
            points[row["name"]] = (size, 0.0 if row["name"] == "fp32" else kl)

    def beaten(name: str) -> bool:
        a = points[name]
        return any(b[0] <= a[0] and b[1] <= a[1] and b != a for b in points.values())

    return {name for name in points if not beaten(name)}


def _task(name: str) -> Callable[[dict[str, Any], dict[str, Any]], str]:
    def cell(row: dict[str, Any], _: dict[str, Any]) -> str:
        task = get(row, "tasks", name)
        if task is None:
            return _NONE
        return f"{task['accuracy'] * 100:.0f} % ({task['low'] * 100:.0f}–{task['high'] * 100:.0f})"

    return cell


QUALITY: Cells = [
    ("MB", lambda row, ref: number(get(row, "export", "bytes"), ".1f", 1e-6)),
    ("weights MB", lambda row, ref: number(get(row, "export", "weight_bytes"), ".1f", 1e-6)),
    ("× fp32", lambda row, ref: number(size_ratio(row, ref), ".3f")),
    ("perplexity", lambda row, ref: number(get(row, "accuracy", "perplexity"), ".3f")),
    ("Δ ppl", lambda row, ref: _NONE if row is ref else number(ppl_change(row, ref), "+.2f", 100, " %")),
    ("KL", lambda row, ref: small(get(row, "accuracy", "kl"))),
    ("KL p99", lambda row, ref: small(get(row, "accuracy", "kl_p99"))),
    ("same top", lambda row, ref: number(get(row, "accuracy", "top1"), ".1f", 100, " %")),
    ("drift", lambda row, ref: number(get(row, "drift", "ratio"), ".2f", 1, " ×")),
]
COST: Cells = [
    ("passkey", _task("passkey")),
    ("niah-1", _task("niah-1")),
    ("prefill/s", lambda row, ref: number(get(row, "speed", "prefill_tokens_per_second"), ".0f")),
    ("decode/s", lambda row, ref: number(get(row, "speed", "decode_tokens_per_second"), ".1f")),
    ("peak MB", lambda row, ref: number(get(row, "speed", "peak_memory_bytes"), ".0f", 1e-6)),
    ("measured in s", lambda row, ref: number(seconds(row), ".0f")),
]


def seconds(row: dict[str, Any]) -> float | None:
    """What the row took to export and measure; an export that was used again counts as it was."""
    times = dict(row["seconds"])
    times["export"] = max(times.get("export", 0.0), get(row, "export", "export_seconds") or 0.0)
    return sum(times.values()) if len(row["seconds"]) > 1 else None


def table(report: dict[str, Any], cells: Cells) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of text. Schemes on the Pareto front carry a star."""
    front = pareto(report["rows"])
    lines = []
    absent = [row["name"] for row in report["rows"] if is_absent_peer(row)]
    for row in report["rows"]:
        if is_absent_peer(row):
            continue
        ref = own_reference(row, report["rows"])
        name = f"{row['name']} *" if row["name"] in front else row["name"]
        lines.append([name, *(cell(row, ref) for _, cell in cells)])
    if absent:
        lines.append([", ".join(absent), *(_NONE for _ in cells)])
    return ["", *(heading for heading, _ in cells)], lines


def is_absent_peer(row: dict[str, Any]) -> bool:
    """Whether nothing could be measured of a GGUF row: llama.cpp or the file is not there."""
    return row["kind"] == "gguf" and "export" in row["errors"]


def errors(report: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(rows, part, sentence) of all that failed; rows of which the same is to be said come together."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in report["rows"]:
        for part, said in row["errors"].items():
            found.setdefault((part, said), []).append(row["name"])
    return [(", ".join(names), part, said) for (part, said), names in found.items()]


def apart(report: dict[str, Any]) -> str:
    """How far the student is from its teacher."""
    found = report["student_from_teacher"]
    if found is None:
        return ""
    return (
        f"The fp32 student is at KL {found['kl']:.3f} from its teacher and likes the same token best in "
        f"{found['top1'] * 100:.1f} % of the text: that is distillation, not quantisation."
    )


def notes(report: dict[str, Any]) -> list[str]:
    s = report["settings"]
    words = [
        f"Perplexity, KL and same top (most likely token): {s['samples']} sequences of {s['length']:,} "
        f"tokens of {', '.join(report['text'])}. KL of a scheme is against the fp32 bundle, of a GGUF file "
        "against the teacher in fp32.",
        f"Drift: mean KL of the last eighth of {s['drift_length']:,} tokens over that of the first eighth, "
        f"in {s['drift_samples']} texts.",
        f"Retrieval: {s['task_samples']} questions at each of {', '.join(map(str, s['task_lengths']))} "
        "tokens, with the 95 % interval.",
        f"Speed: prefill of {s['context']} tokens, decode of {s['decode_tokens']}, in a process of its own, "
        f"with {threads(report)} threads on {report['machine']}.",
        "A star marks the Pareto front of the schemes: no other is both smaller and closer to fp32.",
    ]
    return [said for said in (apart(report), *words) if said]


def threads(report: dict[str, Any]) -> str:
    used = sorted({n for row in report["rows"] if (n := get(row, "speed", "threads")) is not None})
    return "/".join(map(str, used)) or "?"


def markdown(report: dict[str, Any], picture: str | None) -> str:
    lines = [f"# Accuracy against size: {report['teacher']}", ""]
    if picture is not None:
        lines += [f"![Accuracy against size, and drift along the text]({picture})", ""]
    for cells in (QUALITY, COST):
        heading, rows = table(report, cells)
        lines += [_line(heading), "|---" + "|---:" * (len(heading) - 1) + "|"]
        lines += [_line([cell.replace("*", "\\*") for cell in row]) for row in rows] + [""]
    lines += ["KL by position (drift):", ""]
    found = [(row, get(row, "drift", "buckets")) for row in report["rows"]]
    found = [(row, buckets) for row, buckets in found if buckets and buckets[0]["kl"] is not None]
    if found:
        edges = [f"–{bucket['end'] - 1:,}" for bucket in found[0][1]]
        lines += [_line(["", *edges]), "|---" + "|---:" * len(edges) + "|"]
        lines += [
            _line([row["name"], *(small(bucket["kl"]) for bucket in buckets)]) for row, buckets in found
        ]
    failed = errors(report)
    if failed:
        lines += ["", "What failed:", "", *(f"- {name}, {part}: {said}" for name, part, said in failed)]
    made = f"Made by {report['created_by']} with onnxruntime {report['onnxruntime']}."
    lines += ["", *(f"{said}  " for said in notes(report)), "", made]
    return "\n".join(lines) + "\n"


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def print_table(report: dict[str, Any], console: Any) -> None:
    """The two tables, what failed and the notes on a rich console."""
    from rich.table import Table

    for cells in (QUALITY, COST):
        heading, rows = table(report, cells)
        shown = Table(header_style="bold", box=None, pad_edge=False)
        for k, name in enumerate(heading):
            shown.add_column(name, justify="right" if k else "left", no_wrap=True)
        for row in rows:
            shown.add_row(*row)
        console.print(shown)
        console.print()
    for name, part, said in errors(report):
        console.print(f"{name}, {part}: {said}", style="red", markup=False, highlight=False)
    if apart(report):
        console.print(apart(report), markup=False, highlight=False)
