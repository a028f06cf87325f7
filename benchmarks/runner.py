#!/usr/bin/env python3
"""A bundle against llama.cpp on the same teacher: speed and memory by length of context, as ratios.

    python benchmarks/runner.py BUNDLE [--gguf TEACHER.gguf] [--peer-python PYTHON] [--out DIR]
        [--contexts 128,512,1024,2048,8192,32768] [--peer-max 8192] [--threads 2] [--profile]

--gguf: the teacher, which is requantized to Q8_0 first unless its name says that it is, or --as-is;
without it, or without llama-cpp-python (in the interpreter --peer-python), only the bundle is measured.
--peer-max: longest context for the peer, whose prefill is quadratic. Each context gets a fresh process on
each side, so that peak memory is its own, and the two take turns of 512 tokens read or 8 written, so that
whatever else the machine does meets both alike. Decode is stated by the fastest tenth of the steps, which
on a busy machine is nearer to what an idle one does, and by the median step; the goals use the first for
both sides. Say which machine, and how busy (load_average), with any ratio.
Prints a table; writes runner.png and runner.json to --out; the last line of output is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from lawcat_edge.runtime.bundle.flavours import runnable

# What the project aims at, as (figure, context, least ratio of ours to the peer's); memory: at most.
GOALS = (
    ("decode", 128, 1.1), ("decode", 2048, 1.7), ("decode", 8192, 2.5), ("prefill", 512, 1.5),
    ("prefill", 8192, 4.0), ("memory", 8192, 0.55),
)  # fmt: skip
FLAT, OF_BANDWIDTH = 0.95, 0.60


def weights_per_token(bundle: Path) -> int:
    """Bytes of weights that one token must read: all that some product uses; of a table, one row."""
    import onnx

    manifest = json.loads((bundle / "lawcat_bundle.json").read_text())
    flavour = runnable(manifest["ops"])[0]
    graph = onnx.load(str(bundle / manifest["graphs"][flavour]["last"]), load_external_data=False).graph
    looked_up = {name for node in graph.node if node.op_type.startswith("Gather") for name in node.input}
    used = {name for node in graph.node if not node.op_type.startswith("Gather") for name in node.input}
    total = 0.0
    for tensor in graph.initializer:
        bits = 4 if "INT4" in onnx.TensorProto.DataType.Name(tensor.data_type) else None
        size = bits / 8 if bits else onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        size *= math.prod(tensor.dims)
        if tensor.name in looked_up and tensor.name not in used:
            size /= max(1, tensor.dims[0] if tensor.dims else 1)
        total += size
    return round(total)


def command(python: str, *arguments: Any) -> list[str]:
    return [python, str(Path(__file__).with_name("measure.py")), json.dumps(arguments)]


# numpy's own threads would come on top of ours.
ENVIRONMENT = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}


def in_process(*arguments: Any) -> dict[str, Any]:
    """The result of one of measure.OTHERS, in a process of its own."""
    done = subprocess.run(
        command(sys.executable, *arguments), stdout=subprocess.PIPE, text=True, env=ENVIRONMENT, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


class Side:
    """One of measure.SIDES at one context, in a process of its own, working when it is told to."""

    def __init__(self, python: str, *arguments: Any) -> None:
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command(python, *arguments), stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=ENVIRONMENT
        )
        self.about = self._answer()
        self.read_seconds = 0.0
        self.steps: list[float] = []

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        if line := self.process.stdout.readline():
            return json.loads(line)
        assert self.process.stderr is not None
        raise SystemExit("a side's process ended: " + self.process.stderr.read()[-2000:])

    def _ask(self, what: str, count: int) -> Any:
        assert self.process.stdin is not None
        print(what, count, file=self.process.stdin, flush=True)
        return self._answer()

    def read(self, count: int) -> None:
        self.read_seconds += sum(self._ask("read", count))

    def write(self, count: int) -> None:
        self.steps += self._ask("write", count)

    def finish(self, context: int) -> dict[str, Any]:
        """End the process; its figures. Decode: of the fastest tenth of the steps, and the median one."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        peak = self._answer()["peak_memory_bytes"]
        self.process.wait()
        median, fast = (float(np.percentile(self.steps, p)) for p in (50, 10))
        return {
            "prefill_tok_s": context / self.read_seconds,
            "decode_tok_s": 1 / fast,
            "decode_median_tok_s": 1 / median,
            "first_token_s": self.read_seconds,
            "load_s": self.about["load_seconds"],
            "peak_mb": peak / 1e6,
        }


def measure(context: int, decode: int, sides: dict[str, Side]) -> dict[str, Any]:
    """All sides at one context, in turns of 512 tokens read, then of 8 written."""
    for at in range(0, context, 512):
        for side in sides.values():
            side.read(min(512, context - at))
    for at in range(0, decode, 8):
        for side in sides.values():
            side.write(min(8, decode - at))
    return {"context": context, "peer": None, **{name: side.finish(context) for name, side in sides.items()}}


def has_peer(python: str) -> bool:
    return subprocess.run([python, "-c", "import llama_cpp"], capture_output=True).returncode == 0


def requantize(python: str, source: Path, target: Path) -> None:
    """Write the teacher as Q8_0, from whatever it is."""
    code = (
        "import ctypes, sys, llama_cpp as l; p = l.llama_model_quantize_default_params(); p.ftype = 7; "
        "p.allow_requantize = True; "
        "sys.exit(l.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), ctypes.byref(p)))"
    )
    if subprocess.run([python, "-c", code, source, target], capture_output=True).returncode:
        raise SystemExit(f"{source} cannot be requantized; give a Q8_0 file of the teacher with --gguf.")


def compare(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The goals that these rows can tell about."""
    by_context = {row["context"]: row for row in rows}
    names = {"decode": "decode_tok_s", "prefill": "prefill_tok_s", "memory": "peak_mb"}
    results = []
    for figure, context, goal in GOALS:
        row = by_context.get(context)
        if row and row.get("peer"):
            ours, peer = row["ours"][names[figure]], row["peer"][names[figure]]
            met = ours / peer <= goal if figure == "memory" else ours / peer >= goal
            what = f"{figure} at {context:,}"
            results.append(
                {"what": what, "ours": ours, "peer": peer, "ratio": ours / peer, "goal": goal, "met": met}
            )
    longest, base = max(by_context), min(by_context, key=lambda c: abs(c - 1024))
    if longest > base:
        for figure in ("decode", "prefill"):
            ours, first = (by_context[c]["ours"][names[figure]] for c in (longest, base))
            what = f"{figure} at {longest:,} of that at {base:,}"
            ratio = ours / first
            results.append(
                {
                    "what": what,
                    "ours": ours,
                    "peer": first,
                    "ratio": ratio,
                    "goal": FLAT,
                    "met": ratio >= FLAT,
                }
            )
    return results


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = (
        ("decode_tok_s", "decode, tokens/s"),
        ("prefill_tok_s", "prefill, tokens/s"),
        ("peak_mb", "peak memory, MB"),
    )
    figure, axes = pyplot.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for axis, (key, title) in zip(axes, panels, strict=True):
        for side, label, style in (("ours", "lawcat-edge", "o-"), ("peer", "llama.cpp Q8_0", "s--")):
            points = [(row["context"], row[side][key]) for row in rows if row.get(side)]
            if points:
                axis.plot(*zip(*points, strict=True), style, label=label)
        axis.set(xscale="log", title=title, xlabel="context, tokens", ylim=(0, None))
        axis.set_xticks(
            [row["context"] for row in rows], [f"{row['context']:,}" for row in rows], rotation=45
        )
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--as-is", action="store_true", help="take --gguf as it is quantised")
    parser.add_argument("--peer-python", default=sys.executable)
    parser.add_argument("--contexts", default="128,512,1024,2048,8192,32768")
    parser.add_argument("--peer-max", type=int, default=8192)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--decode-tokens", type=int, default=48)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("."))
    args = parser.parse_args()
    contexts = sorted({int(item) for item in args.contexts.split(",")})
    args.out.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {
        "bundle": args.bundle.name, "threads": args.threads, "load_average": os.getloadavg()[0], "rows": [],
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        gguf = args.gguf
        if gguf is not None and not args.as_is and "q8_0" not in gguf.name.lower():
            gguf = Path(folder) / "teacher-q8_0.gguf"
            requantize(args.peer_python, args.gguf, gguf)
        print(
            f"{'context':>8} {'':11} {'prefill/s':>10} {'decode/s':>9} {'(median)':>9} "
            f"{'first token s':>14} {'peak MB':>8}"
        )
        peer = gguf is not None and has_peer(args.peer_python)
        for context in contexts:
            common = (context, args.threads, args.decode_tokens)
            sides = {"ours": Side(sys.executable, "ours", str(args.bundle), *common)}
            report["state_bytes"] = sides["ours"].about["state_bytes"]
            if peer and context <= args.peer_max:
                sides["peer"] = Side(args.peer_python, "peer", str(gguf), *common)
                report["peer_version"] = sides["peer"].about["version"]
            row = measure(context, args.decode_tokens, sides)
            report["rows"].append(row)
            show(row)
    bandwidth = in_process("bandwidth", args.threads)
    report["bandwidth_gb_s"] = {"read": bandwidth["read_gb_s"], "copy": bandwidth["copy_gb_s"]}
    report["weights_per_token_bytes"] = weights_per_token(args.bundle)
    report["goals"] = compare(report["rows"])
    limit = bandwidth["read_gb_s"] * 1e9 / report["weights_per_token_bytes"]
    share = report["rows"][0]["ours"]["decode_tok_s"] / limit
    report["decode_limit_tok_s"] = limit
    what = f"decode at {contexts[0]} of bandwidth / weights"
    report["goals"].append(
        {
            "what": what,
            "ours": share * limit,
            "peer": limit,
            "ratio": share,
            "goal": OF_BANDWIDTH,
            "met": share >= OF_BANDWIDTH,
        }
    )
    print(
        f"\nmemory read {bandwidth['read_gb_s']:.1f} GB/s, copy {bandwidth['copy_gb_s']:.1f} GB/s; weights "
        f"{report['weights_per_token_bytes'] / 1e6:.1f} MB a token: at most {limit:.0f} tokens/s\n"
    )
    for goal in report["goals"]:
        print(
            f"{goal['what']:42} {goal['ours']:9.1f} / {goal['peer']:9.1f} = {goal['ratio']:6.2f}   "
            f"goal {goal['goal']:4}  {'met' if goal['met'] else 'MISSED'}"
        )
    if args.profile:
        report["profile"] = in_process("profile", str(args.bundle), args.threads)
        show_profile(report["profile"])
    draw(report["rows"], args.out / "runner.png")
    (args.out / "runner.json").write_text(json.dumps(report, indent=1))
    print(json.dumps(rounded(report)))


def show(row: dict[str, Any]) -> None:
    for side in ("ours", "peer"):
        if row.get(side):
            r = row[side]
            print(
                f"{row['context']:>8,} {side:11} {r['prefill_tok_s']:>10,.1f} "
                f"{r['decode_tok_s']:>9,.1f} {r['decode_median_tok_s']:>9,.1f} "
                f"{r['first_token_s']:>14.3f} {r['peak_mb']:>8,.0f}"
            )
    if row.get("peer"):
        keys = ("prefill_tok_s", "decode_tok_s", "decode_median_tok_s", "first_token_s", "peak_mb")
        p, d, n, f, m = (row["ours"][key] / row["peer"][key] for key in keys)
        print(f"{'':8} {'ratio':11} {p:>10.2f} {d:>9.2f} {n:>9.2f} {f:>14.3f} {m:>8.2f}")
    sys.stdout.flush()


def show_profile(found: dict[str, Any]) -> None:
    print(f"\none decode step: {found['step_ms']:.2f} ms")
    for op, item in found["operators"].items():
        print(f"  {op:34} {item['ms']:7.3f} ms in {item['nodes']:4} nodes")


def rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list) else value


if __name__ == "__main__":
    main()
