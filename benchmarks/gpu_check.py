"""Every Triton kernel on a GPU against float64: outputs, final states and every gradient.

    python benchmarks/gpu_check.py                  # prints the error table; exit code 1 on a failure
    python benchmarks/gpu_check.py --sanitizer      # also a small run under compute-sanitizer's tools

The figure is the root mean square error over the root mean square of the reference, on the same rounded
inputs. Outputs are poisoned with NaN first. Most of the time goes into building kernels, so the cases are
dealt out to several processes. The last line is one JSON document. From a checkout, set PYTHONPATH=. or
install it first.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from typing import Any

import torch
import torch.nn.functional as F

from lawcat_edge.ops import triton_primitives
from lawcat_edge.ops.conv import next_buffer
from lawcat_edge.ops.conv.naive import conv_feature_naive
from lawcat_edge.ops.conv.triton import conv_feature_triton
from lawcat_edge.ops.gla import triton as gla
from lawcat_edge.ops.gla.naive import gla_naive
from lawcat_edge.ops.gla.step import gla_step
from lawcat_edge.ops.window.naive import window_naive
from lawcat_edge.ops.window.triton import window_triton

BOUND = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 3e-2}
SANITIZER_SECONDS = 240
INS = ("q", "k", "v", "g", "S0", "z0")


def poison() -> None:
    empty = torch.empty

    def fill(x: torch.Tensor) -> torch.Tensor:
        return x.fill_(torch.nan if x.is_floating_point() else torch.iinfo(x.dtype).max)

    torch.empty = lambda *a, **k: fill(empty(*a, **k))  # type: ignore[assignment]
    torch.empty_like = lambda x, **k: fill(  # type: ignore[assignment]
        empty(x.shape, **{"dtype": x.dtype, "device": x.device, **k})
    )


def error(ref: torch.Tensor, got: torch.Tensor) -> float:
    assert ref.shape == got.shape
    return ((got.double() - ref.double()).norm() / ref.double().norm().clamp_min(1e-30)).item()


def gla_inputs(B, T, H, G, width, d, gates, dtype, device):
    q, k = (torch.randn(B, T, H, width).softmax(-1) for _ in range(2))
    v = torch.randn(B, T, G, d)
    low, high = {"usual": (-4.0, 4.0), "extreme": (-200.0, 20.0)}[gates]
    g = F.logsigmoid(torch.empty(B, T, G, width).uniform_(low, high)) / 16
    if gates == "extreme":
        g[:, ::3] *= 16  # down to -200 in one token
    g = g if dtype == torch.float16 else g.float()
    args = [q.to(dtype), k.to(dtype), v.to(dtype), g.to(dtype if dtype == torch.float16 else torch.float32)]
    return [x.to(device) for x in (*args, torch.rand(B, H, width, d), torch.rand(B, H, width))]


def check_gla(shape, gates, dtype, eps, device):
    args = gla_inputs(*shape, gates, dtype, device)
    exact = [x.double().requires_grad_() for x in args]
    mine = [x.clone().requires_grad_() for x in args]
    n, den, S, z = gla_naive(*exact)
    if eps is None:
        ref, got, names = (n, den, S, z), gla.gla_triton(*mine), ("n", "den", "S", "z")
    else:
        ref, names = (n / (den[..., None] + eps), S, z), ("y", "S", "z")
        got = gla.gla_triton_normalised(*mine, eps)
    weights = [torch.randn_like(o) for o in ref]
    sum((o * w).sum() for o, w in zip(ref, weights, strict=True)).backward()
    sum((o.double() * w).sum() for o, w in zip(got, weights, strict=True)).backward()
    errors = {name: error(r, o) for name, r, o in zip(names, ref, got, strict=True)}
    return errors | {f"d{name}": error(r.grad, x.grad) for name, r, x in zip(INS, exact, mine, strict=True)}


def check_step(shape, dtype, device):
    args = gla_inputs(shape[0], 1, *shape[2:], "usual", dtype, device)
    ref = gla_step(*(x.double() for x in args))
    return {
        name: error(r, o)
        for name, r, o in zip(("n", "den", "S", "z"), ref, gla.gla_step_triton(*args), strict=True)
    }


def check_conv(shape, dtype, device):
    B, T, H, G, width, d = shape
    f = width // 2
    x, buffer = torch.randn(B, T, G, d), torch.randn(B, H * d, 3)
    args = [x.to(dtype), torch.randn(H * d, 4) / 2, torch.randn(H, d, f) * 2 / d**0.5, buffer.to(dtype)]
    args = [a.to(device) for a in args]
    exact = [a.double().requires_grad_() for a in args]
    mine = [a.clone().requires_grad_() for a in args]
    ref = conv_feature_naive(*exact)
    got = conv_feature_triton(*mine), next_buffer(mine[0], mine[3])
    weights = [torch.randn_like(o) for o in ref]
    sum((o * w).sum() for o, w in zip(ref, weights, strict=True)).backward()
    sum((o.double() * w).sum() for o, w in zip(got, weights, strict=True)).backward()
    errors = {name: error(r, o) for name, r, o in zip(("phi", "buffer"), ref, got, strict=True)}
    names = ("x", "taps", "W", "buffer")
    return errors | {f"d{name}": error(r.grad, a.grad) for name, r, a in zip(names, exact, mine, strict=True)}


def check_window(shape, window, dtype, device):
    B, T, H, G, _, d = shape
    args = [torch.randn(B, T, heads, d).to(dtype).to(device) for heads in (H, G, G)]
    exact = [a.double().requires_grad_() for a in args]
    mine = [a.clone().requires_grad_() for a in args]
    ref, got = window_naive(*exact, window), window_triton(*mine, window)
    weights = [torch.randn_like(o) for o in ref]
    sum((o * w).sum() for o, w in zip(ref, weights, strict=True)).backward()
    sum((o.double() * w).sum() for o, w in zip(got, weights, strict=True)).backward()
    errors = {name: error(r, o) for name, r, o in zip(("N", "Z"), ref, got, strict=True)}
    return errors | {f"d{name}": error(r.grad, a.grad) for name, r, a in zip("qkv", exact, mine, strict=True)}


def check_fla(device):
    """The numerator against fla-core's chunk_gla on the same inputs, or why not."""
    try:
        from fla.ops.gla import chunk_gla
    except ImportError as e:
        return {"skipped": f"fla-core cannot be imported ({e})"}
    q, k, v, g, S0, z0 = gla_inputs(1, 300, 4, 2, 64, 64, "usual", torch.bfloat16, device)
    n, _, S, _ = gla.gla_triton(q, k, v, g, S0, z0)
    wide = [x.repeat_interleave(2, 2) for x in (v, g)]
    o, end = chunk_gla(q, k, *wide, scale=1.0, initial_state=S0, output_final_state=True)
    return {"n": error(n, o), "S": error(S, end)}


def cases(quick: bool):
    """name, bound, function of the device."""
    shapes = {  # B, T, H, G, F, d
        "SmolLM2-135M": (1, 200, 9, 3, 64, 64),
        "Llama-3.2-1B": (1, 130, 32, 8, 64, 64),
        "Mistral-7B": (1, 300, 8, 2, 128, 128),
        "odd": (2, 77, 5, 1, 40, 24),
    }
    if quick:
        shapes = {"small": (1, 70, 2, 1, 32, 32), "small and wide": (1, 140, 2, 1, 128, 128)}
    for name, shape in shapes.items():
        for dtype in BOUND:
            if dtype == torch.float16 and name != "odd":
                continue
            label = f"{name} {str(dtype).removeprefix('torch.')}"
            bound = BOUND[dtype]
            for gates in ("usual", "extreme"):
                # sums of g near -1000 have a rounding of 3e-5 in float32, whoever adds them
                wide = max(bound, 3e-4) if gates == "extreme" else bound
                yield (
                    f"gla {gates} {label}",
                    wide,
                    lambda dev, s=shape, g=gates, t=dtype: check_gla(s, g, t, None, dev),
                )
                yield (
                    f"gla normalised, {gates} {label}",
                    wide,
                    lambda dev, s=shape, g=gates, t=dtype: check_gla(s, g, t, 1e-6, dev),
                )
            for window in (16, 128):
                yield (
                    f"window {window} {label}",
                    bound,
                    lambda dev, s=shape, w=window, t=dtype: check_window(s, w, t, dev),
                )
            yield f"step {label}", bound, lambda dev, s=shape, t=dtype: check_step(s, t, dev)
            yield f"conv {label}", bound, lambda dev, s=shape, t=dtype: check_conv(s, t, dev)
    for T in () if quick else (1, 15, 16, 17, 63, 64, 65):
        shape = (1, T, 3, 1, 16, 16)
        yield f"gla T={T}", 1e-4, lambda dev, s=shape: check_gla(s, "usual", torch.float32, None, dev)
        yield f"conv T={T}", 1e-4, lambda dev, s=shape: check_conv(s, torch.float32, dev)
    if not quick:
        yield "gla against fla-core bfloat16", 2e-2, check_fla


def sanitize() -> dict[str, str]:
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not os.path.exists(tool):
        return {"compute-sanitizer": "not found"}
    # the kernels are built first, so that the tools see no compiler
    subprocess.run([sys.executable, __file__, "--quick"], check=False, capture_output=True)
    env = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        runs = {}
        for name in ("memcheck", "racecheck", "synccheck"):
            command = [tool, "--tool", name, "--error-exitcode", "9", sys.executable, __file__, "--quick"]
            with open(os.path.join(folder, name), "w") as log:
                runs[name] = subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + SANITIZER_SECONDS
        for name, run in runs.items():
            try:
                run.wait(max(0.0, deadline - time.monotonic()))
                end = f"exit code {run.returncode}"
            except subprocess.TimeoutExpired:
                run.kill()
                end = f"not finished in {SANITIZER_SECONDS} s"
            with open(os.path.join(folder, name)) as log:
                lines = log.read().splitlines()
            said = [line for line in lines if line.startswith("=========")] or lines or [""]
            found[name] = f"{end}, {sum(line.startswith('ok') for line in lines)} cases ok: {said[-1]}"
            print(f"compute-sanitizer {name}: {found[name]}", flush=True)
    return found


def deal(jobs: int, options: list[str], sanitizer: bool) -> int:
    """Run every case, each process its share, then the sanitizer."""
    command = [sys.executable, __file__, "--jobs", str(jobs), *options, "--share"]
    workers = [subprocess.Popen([*command, str(i)], stdout=subprocess.PIPE, text=True) for i in range(jobs)]
    merged: dict[str, Any] = {"failed": [], "sanitizer": {}, "errors": {}}
    for worker in workers:
        *lines, last = worker.communicate()[0].splitlines() or [""]
        print("\n".join(lines), flush=True)
        try:
            part = json.loads(last)
        except json.JSONDecodeError:
            print(last)
            part = {"failed": [f"a process ended with exit code {worker.returncode}"], "errors": {}}
        merged["failed"] += part["failed"]
        merged["errors"] |= part["errors"]
    if sanitizer:
        merged["sanitizer"] = sanitize()
    print(json.dumps(merged))
    return 1 if merged["failed"] else 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one small shape (what the sanitizer runs)")
    parser.add_argument("--sanitizer", action="store_true", help="then run --quick under compute-sanitizer")
    parser.add_argument("--jobs", type=int, default=8, help="processes (%(default)s)")
    parser.add_argument("--share", type=int, help=argparse.SUPPRESS)  # which of the jobs this process is
    parser.add_argument("--cpu", action="store_true", help="Triton's interpreter instead of a GPU (dry run)")
    args = parser.parse_args()
    if args.cpu and os.environ.get("TRITON_INTERPRET") != "1":
        parser.error("set TRITON_INTERPRET=1 in the environment for --cpu")
    if not args.cpu and not torch.cuda.is_available():
        parser.error("no CUDA device; TRITON_INTERPRET=1 with --cpu is a dry run")
    if args.share is None and not args.quick:
        return deal(args.jobs, ["--cpu"] if args.cpu else [], args.sanitizer)
    triton_primitives.ROUND_SPLIT = args.cpu
    torch.manual_seed(0)
    poison()
    table, failed = {}, []
    for i, (name, bound, check) in enumerate(cases(args.quick)):
        if args.share is not None and i % args.jobs != args.share:
            continue
        try:
            errors = check("cpu" if args.cpu else "cuda")
            bad = {k: e for k, e in errors.items() if isinstance(e, float) and not e < bound}
        except Exception as e:  # one kernel that does not build must not hide how the others do
            errors, bad = {}, {"raised": f"{type(e).__name__}: {e}"[:300]}
        table[name] = {
            k: float(f"{e:.2g}") if isinstance(e, float) else e for k, e in (errors or bad).items()
        }
        shown = "  ".join(
            f"{k} {e:.1e}" if isinstance(e, float) else f"{k}: {e}" for k, e in table[name].items()
        )
        print(f"{'FAIL' if bad else 'ok  '} {name:52s} {shown}", flush=True)
        if bad:
            failed.append(name)
    found = sanitize() if args.sanitizer else {}
    print(json.dumps({"failed": failed, "sanitizer": found, "errors": table}))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
