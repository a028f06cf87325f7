"""Time the Triton kernels on a GPU against FlashAttention-2, fla-core and the torch form.

    python benchmarks/kernels.py --out kernels.png              # about four minutes on one GPU
    python benchmarks/kernels.py --tune                         # sweep chunk, warps and stages instead
    TRITON_INTERPRET=1 python benchmarks/kernels.py --tiny      # dry run on a CPU

Prefill: one sequence, bfloat16, causal. ``gla`` is the linear attention alone; ``layer`` adds the
convolution and feature map of q and of k, all that stands in for softmax attention after the projections.
``flash`` is PyTorch's FlashAttention-2 back end on the same heads, grouped heads as they are. ``fla`` is
fla-core's chunk_gla, which is given v and g already repeated to every query head and computes the numerator
alone, with one setting of every kernel instead of its search (``one_setting``). Each is captured in a CUDA
graph, so that launches from Python do not count, and the second-level cache is overwritten between repeats;
the figure is the median. Training is forward and backward as launched. ``profile`` (of ``--parts``) gives the
time of every kernel of ``layer``.
``GB/s`` and ``TFLOP/s`` are of the counted minimum: inputs read and outputs written once; four products of
width F or d and a chunk of 64. A wrong result stops the run before anything is timed. The last line is one
JSON document. From a checkout, set PYTHONPATH=. or install it first (pip install -e .).
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from lawcat_edge.ops.conv.triton import conv_feature_triton
from lawcat_edge.ops.gla import triton as gla
from lawcat_edge.ops.gla.chunk import gla_chunk
from lawcat_edge.ops.gla.naive import gla_naive

SHAPES = {  # H, G, F, d
    "SmolLM2-135M": (9, 3, 64, 64),
    "Llama-3.2-1B": (32, 8, 64, 64),
    "Mistral-7B": (32, 8, 128, 128),
}
LENGTHS = [1024 * 2**i for i in range(8)]
TRAINING = [("SmolLM2-135M", 16, 1024), ("SmolLM2-135M", 8, 4096), ("Llama-3.2-1B", 4, 2048)]  # B, T
EPS = 1e-6


def inputs(
    B: int, T: int, shape: tuple[int, ...], dtype: torch.dtype, device: str
) -> dict[str, torch.Tensor]:
    H, G, width, d = shape
    new = {"device": device, "dtype": dtype}
    gate = torch.randn(B, T, G, width, device=device)
    return {
        "q": torch.randn(B, T, H, width, **new).softmax(-1),
        "k": torch.randn(B, T, H, width, **new).softmax(-1),
        "v": torch.randn(B, T, G, d, **new),
        "g": F.logsigmoid(gate) / 16,
        "xq": torch.randn(B, T, H, d, **new),
        "xk": torch.randn(B, T, G, d, **new),
        "taps": torch.randn(H * d, 4, device=device) / 4,
        "W": torch.randn(H, d, width // 2, device=device) / math.sqrt(d),
    }


def attention(a: dict[str, torch.Tensor]) -> torch.Tensor:
    return gla.gla_triton_normalised(a["q"], a["k"], a["v"], a["g"], None, None, EPS)[0]


def layer(a: dict[str, torch.Tensor]) -> torch.Tensor:
    q = conv_feature_triton(a["xq"], a["taps"], a["W"], None)
    k = conv_feature_triton(a["xk"], a["taps"], a["W"], None)
    return gla.gla_triton_normalised(q, k, a["v"], a["g"], None, None, EPS)[0]


def flash(a: dict[str, torch.Tensor]) -> torch.Tensor:
    q, k, v = (a[name].transpose(1, 2) for name in ("xq", "xk", "v"))
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION) if q.is_cuda else contextlib.nullcontext():
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def torch_form(a: dict[str, torch.Tensor]) -> torch.Tensor:
    B, _, H, width = a["q"].shape
    zero = torch.zeros(B, H, width, a["v"].shape[-1], device=a["q"].device)
    n, den, _, _ = gla_chunk(a["q"], a["k"], a["v"], a["g"], zero, zero[..., 0])
    return n / (den[..., None] + EPS)


def one_setting() -> None:
    """Make kernels that are defined from now on with a search for settings keep one: four warps, the widest
    blocks, the fewest stages.
    """
    from triton.runtime.autotuner import Autotuner

    build = Autotuner.__init__

    def blocks(config: Any) -> int:
        return sum(value for value in config.kwargs.values() if isinstance(value, int))

    def keep_one(self: Any, *args: Any, **kwargs: Any) -> None:
        build(self, *args, **kwargs)
        self.configs = [max(self.configs, key=lambda c: (c.num_warps == 4, blocks(c), -c.num_stages))]

    Autotuner.__init__ = keep_one  # type: ignore[method-assign]


def fla_form() -> Any:
    """fla-core's function on our inputs, or the reason there is none."""
    one_setting()
    try:
        from fla.ops.gla import chunk_gla
    except ImportError as e:
        return f"fla-core cannot be imported ({e})"

    def run(a: dict[str, torch.Tensor]) -> torch.Tensor:
        if "wide_v" not in a:  # before the timing: see above
            repeat = a["q"].shape[2] // a["v"].shape[2]
            a["wide_v"], a["wide_g"] = (a[name].repeat_interleave(repeat, 2) for name in ("v", "g"))
        return chunk_gla(a["q"], a["k"], a["wide_v"], a["wide_g"], scale=1.0)[0]

    return run


class Clock:
    """Median time of a function in ms; one call by the wall clock where there is no GPU."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        self.scrub = torch.empty(2**28 if self.cuda else 1, dtype=torch.uint8, device=device)

    def __call__(self, run: Any, graph: bool = True) -> float:
        if not self.cuda:
            start = time.perf_counter()
            run()
            return 1e3 * (time.perf_counter() - start)
        for _ in range(2):
            run()
        torch.cuda.synchronize()
        if graph:
            captured = torch.cuda.CUDAGraph()
            with torch.cuda.graph(captured):
                run()
            run = captured.replay
        times: list[float] = []
        begun = time.perf_counter()
        while len(times) < 3 or (len(times) < 30 and time.perf_counter() - begun < 0.25):
            self.scrub.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        return statistics.median(times)

    def peak(self, run: Any) -> float:
        """GiB that a call takes beyond what is held."""
        if not self.cuda:
            return 0.0
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return (torch.cuda.max_memory_allocated() - held) / 2**30


def floor(B: int, T: int, shape: tuple[int, ...], element: int = 2) -> tuple[float, float]:
    """Bytes and operations that gla cannot do without: see the module's docstring."""
    H, G, width, d = shape
    moved = B * T * (2 * H * width + G * d + H * d) * element + B * T * G * width * 4
    return moved, B * T * H * 2 * (2 * width * d + 32 * (width + d))  # half a chunk of pairs a token


def check(device: str) -> dict[str, float]:
    """Worst error of output and gradients against float64, RMS over RMS; stops on a wrong one."""
    worst = {}
    for name, shape in SHAPES.items():
        for gates in (1.0, 400.0):  # mild decay, and decay that no chunk can hold in one exponent
            a = inputs(1, 150, shape, torch.bfloat16, device)
            exact = {key: a[key].double().requires_grad_() for key in "qkv"}
            mine = {key: a[key].clone().requires_grad_() for key in "qkv"}
            g = a["g"].clone()
            g[:, ::3] *= gates
            zero = torch.zeros(1, shape[0], shape[2], shape[3], dtype=torch.float64, device=device)
            n, den, _, _ = gla_naive(exact["q"], exact["k"], exact["v"], g.double(), zero, zero[..., 0])
            ref = n / (den[..., None] + EPS)
            got = attention({**mine, "g": g})
            weight = torch.randn_like(ref)
            (ref * weight).sum().backward()
            (got.double() * weight).sum().backward()
            pairs = {"y": (ref, got)} | {f"d{key}": (exact[key].grad, mine[key].grad) for key in "qkv"}
            for key, (r, o) in pairs.items():
                error = ((o.double() - r).norm() / r.norm()).item()
                worst[key] = max(worst.get(key, 0.0), error)
                if not error < 3e-2:
                    sys.exit(f"{name} with gates x {gates}: {key} is off by {error:.2e}; nothing was timed.")
    return worst


def prefill(
    clock: Clock, device: str, lengths: list[int], names: list[str], deadline: float
) -> list[dict[str, Any]]:
    # fla-core tries many launches of every kernel before its first row: leave it out when time is short
    known = {"gla": attention, "layer": layer, "flash": flash, "fla": fla_form, "torch": torch_form}
    forms: dict[str, Any] = {n: known[n]() if n == "fla" else known[n] for n in names}
    rows: list[dict[str, Any]] = []
    print(
        f"{'prefill':14s} {'T':>7s} "
        + " ".join(f"{f:>9s}" for f in forms)
        + "   gla: GB/s TFLOP/s GiB  flash/layer"
    )
    for T, (name, shape) in itertools.product(lengths, SHAPES.items()):
        if time.monotonic() > deadline:
            rows.append({"shape": name, "T": T, "left_out": "no time left"})
            continue
        a = inputs(1, T, shape, torch.bfloat16, device)
        row: dict[str, Any] = {"shape": name, "T": T}
        with torch.no_grad():
            for form, run in forms.items():
                if isinstance(run, str) or (form == "torch" and T > 16384):
                    continue
                try:
                    row[form] = clock(lambda run=run, a=a: run(a), graph=form != "torch")
                except Exception as e:
                    row[f"{form}_error"] = f"{type(e).__name__}: {e}"[:200]
            row["peak_gib"] = clock.peak(lambda a=a: attention(a))
        moved, operations = floor(1, T, shape)
        if "gla" in row:
            row["gb_s"], row["tflop_s"] = moved / row["gla"] / 1e6, operations / row["gla"] / 1e9
        rows.append(row)
        shown = " ".join(f"{row[f]:9.3f}" if f in row else f"{'-':>9s}" for f in forms)
        against = row["flash"] / row["layer"] if "flash" in row and "layer" in row else math.nan
        print(
            f"{name:14s} {T:7d} {shown}        {row.get('gb_s', 0):5.0f} {row.get('tflop_s', 0):7.1f} "
            f"{row['peak_gib']:.2f} {against:8.2f}x",
            flush=True,
        )
    return rows


def training(
    clock: Clock, device: str, cases: list[tuple[str, int, int]], deadline: float
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    forms = {"gla": attention, "layer": layer, "flash": flash, "torch": torch_form}
    print(f"{'training':14s} {'B':>3s} {'T':>6s} {'dtype':>9s} " + " ".join(f"{f:>9s}" for f in forms))
    for (name, B, T), dtype in itertools.product(cases, (torch.bfloat16, torch.float32)):
        label = str(dtype).removeprefix("torch.")
        row: dict[str, Any] = {"shape": name, "B": B, "T": T, "dtype": label}
        a = {key: x.requires_grad_() for key, x in inputs(B, T, SHAPES[name], dtype, device).items()}
        for form, run in forms.items():
            if (form == "flash" and dtype == torch.float32) or time.monotonic() > deadline:
                continue

            def step(run: Any = run, a: dict[str, torch.Tensor] = a) -> None:
                run(a).sum().backward()
                for x in a.values():
                    x.grad = None

            try:
                row[form] = clock(step, graph=False)
            except Exception as e:
                row[f"{form}_error"] = f"{type(e).__name__}: {e}"[:200]
        rows.append(row)
        shown = " ".join(f"{row[f]:9.3f}" if f in row else f"{'-':>9s}" for f in forms)
        print(f"{name:14s} {B:3d} {T:6d} {label:>9s} {shown}", flush=True)
    return rows


def profile(lengths: list[int]) -> list[dict[str, Any]]:
    """Time of every kernel of ``layer``, with the cache overwritten before each of ten calls."""
    rows: list[dict[str, Any]] = []
    scrub = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    for T, (name, shape) in itertools.product(lengths, SHAPES.items()):
        a = inputs(1, T, shape, torch.bfloat16, "cuda")
        activities = [torch.profiler.ProfilerActivity.CUDA]
        with torch.no_grad(), torch.profiler.profile(activities=activities) as profiler:
            for _ in range(10):
                scrub.zero_()
                layer(a)
            torch.cuda.synchronize()
        times = {
            event.key: event.device_time_total / 10
            for event in profiler.key_averages()
            if "kernel" in event.key and "at::" not in event.key
        }
        rows.append({"shape": name, "T": T, "us": times})
        print(f"{name:14s} {T:7d} " + "  ".join(f"{k} {t:.1f}" for k, t in times.items()), flush=True)
    return rows


def decoding(clock: Clock, device: str, sequences: int) -> list[dict[str, Any]]:
    rows = []
    for name, shape in SHAPES.items():
        H, _, width, d = shape
        a = inputs(sequences, 1, shape, torch.bfloat16, device)
        S = torch.rand(sequences, H, width, d, device=device)
        z = torch.rand(sequences, H, width, device=device)
        ms = clock(
            lambda a=a, S=S, z=z: gla.gla_step_triton(a["q"], a["k"], a["v"], a["g"], S, z, EPS, inplace=True)
        )
        moved = 2 * S.numel() * 4
        rows.append({"shape": name, "sequences": sequences, "ms": ms, "gb_s": moved / ms / 1e6})
        print(f"decoding {name:14s} {sequences} sequences: {ms:.3f} ms a token, {moved / ms / 1e6:.0f} GB/s")
    return rows


def tune(clock: Clock, device: str) -> list[dict[str, Any]]:
    """Every launch of the table at width 64, forward at 32K tokens and backward in training, best first."""
    rows: list[dict[str, Any]] = []
    small = device == "cpu"
    shape = SHAPES["Llama-3.2-1B"]
    a = inputs(1, 64 if small else 32768, shape, torch.bfloat16, device)
    b = {k: x.requires_grad_() for k, x in inputs(*((1, 64) if small else (16, 1024)), SHAPES["SmolLM2-135M"],
                                                  torch.bfloat16, device).items()}  # fmt: skip
    table = gla.LAUNCHES[(64, "bf16")]
    kept = dict(table)

    def forward() -> None:
        with torch.no_grad():
            attention(a)

    def both() -> None:
        attention(b).sum().backward()

    for kind, run, names in (("forward", forward, ("states", "output")), ("training", both, ("dq", "dkv"))):
        grid = itertools.product((32, 64), (4, 8), (4, 8), (2, 3))
        for chunk, first, second, stages in list(grid)[: 2 if small else None]:
            table.update(
                {
                    n: gla.Launch(chunk, w, stages, 64, chunk, 32)
                    for n, w in zip(names, (first, second), strict=True)
                }
            )
            try:
                row = {"kind": kind, "ms": clock(run, graph=False), **{n: list(table[n]) for n in names}}
                rows.append(row)
                print(row, flush=True)
            except Exception as e:  # too much shared memory, say
                print(kind, chunk, first, second, stages, f"{type(e).__name__}: {e}"[:150], flush=True)
            table.update(kept)
    return sorted(rows, key=lambda row: (row["kind"], row["ms"]))


def picture(rows: list[dict[str, Any]], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(SHAPES), figsize=(5 * len(SHAPES), 4), sharey=True, squeeze=False)
    axes = axes[0]
    for axis, name in zip(axes, SHAPES, strict=True):
        mine = [row for row in rows if row["shape"] == name]
        for form in ("layer", "gla", "flash", "fla", "torch"):
            points = [(row["T"], row[form]) for row in mine if form in row]
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=form)
        faster = [
            row["T"] for row in mine if "layer" in row and "flash" in row and row["layer"] < row["flash"]
        ]
        if faster:
            axis.axvline(min(faster), color="grey", linestyle=":", label=f"ahead of flash from {min(faster)}")
        axis.set(title=name, xscale="log", yscale="log", xlabel="tokens")
        if mine:
            axis.legend(fontsize=7)
    axes[0].set_ylabel("prefill of one layer, ms")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", help="where to draw the picture (PNG)")
    parser.add_argument(
        "--seconds", type=float, default=220, help="start no new row after this (%(default)s)"
    )
    parser.add_argument("--tiny", action="store_true", help="dry run in the interpreter, on a CPU")
    parser.add_argument("--shapes", default=",".join(SHAPES), help="which of them (%(default)s)")
    parser.add_argument("--lengths", default="", help="prefill lengths (default: 1K to 128K, doubling)")
    parser.add_argument("--forms", default="gla,layer,flash,fla,torch", help="of prefill (%(default)s)")
    parser.add_argument(
        "--parts", default="training,decoding,prefill", help="what to time, also: profile (%(default)s)"
    )
    parser.add_argument("--tune", action="store_true", help="sweep chunk, warps and stages instead")
    parser.add_argument("--warm", help=argparse.SUPPRESS)  # build one shape's kernels and leave
    args = parser.parse_args()
    deadline = time.monotonic() + args.seconds
    if args.tiny and os.environ.get("TRITON_INTERPRET") != "1":
        parser.error("set TRITON_INTERPRET=1 in the environment for --tiny")
    if not args.tiny and not torch.cuda.is_available():
        parser.error("no CUDA device; TRITON_INTERPRET=1 with --tiny is a dry run")
    device, lengths, cases, sequences = "cuda", LENGTHS, TRAINING, 256
    if args.tiny:
        device, lengths, sequences = "cpu", [48, 80], 2
        cases = [("Llama-3.2-1B", 1, 33)]
        SHAPES.update(
            {"SmolLM2-135M": (3, 1, 16, 16), "Llama-3.2-1B": (4, 2, 16, 16), "Mistral-7B": (2, 2, 32, 32)}
        )
    for name in set(SHAPES) - set(args.shapes.split(",")):
        del SHAPES[name]
    cases = [case for case in cases if case[0] in SHAPES]
    if args.lengths:
        lengths = [int(length) for length in args.lengths.split(",")]
    parts = args.parts.split(",")
    torch.manual_seed(0)
    clock = Clock(device)
    if args.warm:
        a = inputs(1, 2048, SHAPES[args.warm], torch.bfloat16, device)
        with torch.no_grad():
            layer(a)
        for _, B, T in [case for case in cases if case[0] == args.warm and "training" in parts]:
            for dtype in (torch.bfloat16, torch.float32):
                b = {k: x.requires_grad_() for k, x in inputs(B, T, SHAPES[args.warm], dtype, device).items()}
                layer(b).sum().backward()
        return 0
    if args.tune:
        rows = tune(clock, device)
        print(json.dumps({"tune": rows}))
        return 0
    if not args.tiny:  # building kernels is work for the CPU: all shapes at once
        warm = [
            subprocess.Popen([sys.executable, __file__, "--warm", name, "--parts", args.parts])
            for name in SHAPES
        ]
        for worker in warm:
            worker.wait()
    errors = check(device)
    print("worst errors: " + "  ".join(f"{k} {e:.1e}" for k, e in errors.items()), flush=True)
    trained = training(clock, device, cases, deadline - 100) if "training" in parts else []
    decoded = decoding(clock, device, sequences) if "decoding" in parts else []
    profiled = profile(lengths) if "profile" in parts else []
    timed = prefill(clock, device, lengths, args.forms.split(","), deadline) if "prefill" in parts else []
    fla = fla_form()
    result = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "interpreter",
        "torch": torch.__version__,
        "triton": gla.triton.__version__,
        "fla": fla if isinstance(fla, str) else "fla-core",
        "errors": errors,
        "prefill": timed,
        "profile": profiled,
        "training": trained,
        "decoding": decoded,
    }
    if args.out:
        picture(timed, args.out)
    print(json.dumps(result, default=str))
    return 0


if __name__ == "__main__":
    sys.exit(main())
