"""What benchmarks/runner.py runs in processes of their own: one measurement each, as one line of JSON.

    python benchmarks/measure.py '["bundle", "my-bundle", 512, 2, 48]'

Needs numpy, and lawcat_edge or llama_cpp for the side that is measured.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np


def peak_memory() -> int:
    """Largest resident size of this process, bytes (Linux)."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))


def measure_bundle(path: str, context: int, threads: int, decode: int) -> dict[str, Any]:
    """Load, read `context` random tokens, write `decode`; the warm-up is a text of its own."""
    from lawcat_edge.runtime import Bundle, Engine

    begin = time.perf_counter()
    engine = Engine(Bundle.open(path, check_hashes=False), threads=threads)
    row: dict[str, Any] = {"load_seconds": time.perf_counter() - begin}
    rng = np.random.default_rng(0)
    engine.prefill(rng.integers(100, 40_000, min(context, engine.chunk)), engine.new_state())
    state = engine.new_state()
    ids = rng.integers(100, 40_000, context)
    begin = time.perf_counter()
    token = int(engine.prefill(ids, state)[0].argmax())
    row["first_token_seconds"] = time.perf_counter() - begin
    steps = []
    for _ in range(decode):
        begin = time.perf_counter()
        token = int(engine.forward(np.array([[token]]), state)[0].argmax())
        steps.append(time.perf_counter() - begin)
    return {**row, "steps": steps, "state_bytes": state.nbytes}


def measure_peer(path: str, context: int, threads: int, decode: int) -> dict[str, Any]:
    """The same through llama-cpp-python, whose own choice of the next token is left out."""
    import llama_cpp

    begin = time.perf_counter()
    model = llama_cpp.Llama(
        path, n_ctx=context + decode + 8, n_threads=threads, n_threads_batch=threads, verbose=False
    )
    row: dict[str, Any] = {"load_seconds": time.perf_counter() - begin, "version": llama_cpp.__version__}
    rng = np.random.default_rng(0)
    model.eval(rng.integers(100, 40_000, min(context, 256)).tolist())
    model.reset()
    ids = rng.integers(100, 40_000, context).tolist()
    begin = time.perf_counter()
    model.eval(ids)
    row["first_token_seconds"] = time.perf_counter() - begin
    steps = []
    for token in rng.integers(100, 40_000, decode).tolist():
        begin = time.perf_counter()
        model.eval([token])
        steps.append(time.perf_counter() - begin)
    return {**row, "steps": steps}


def measure_bandwidth(threads: int) -> dict[str, Any]:
    """GB/s of reading (a dot product) and of copying (both ways counted), 256 MB a thread; best of 8."""
    arrays = [np.ones(1 << 26, np.float32) for _ in range(threads)]
    targets = [np.empty_like(array) for array in arrays]
    best = {}
    for name, work, sides in (("read", lambda i: arrays[i].dot(arrays[i]), 1), ("copy", None, 2)):
        work = work or (lambda i: np.copyto(targets[i], arrays[i]))
        seconds = math.inf
        for _ in range(8):
            crew = [threading.Thread(target=work, args=(i,)) for i in range(threads)]
            begin = time.perf_counter()
            for worker in crew:
                worker.start()
            for worker in crew:
                worker.join()
            seconds = min(seconds, time.perf_counter() - begin)
        best[f"{name}_gb_s"] = sides * sum(array.nbytes for array in arrays) / seconds / 1e9
    return best


def profile(path: str, threads: int, steps: int = 100) -> dict[str, Any]:
    """Milliseconds and nodes of one decode step by operator, as onnxruntime's own profiler has it."""
    from lawcat_edge.runtime import Bundle, Engine

    with tempfile.TemporaryDirectory() as folder:
        bundle = Bundle.open(path, check_hashes=False)
        engine = Engine(bundle, threads=threads, profile_prefix=f"{folder}/trace")
        state = engine.new_state()
        for _ in range(steps):
            engine.forward(np.array([[1]]), state)
        events = json.loads(engine.end_profiling().read_text())
    spent: Counter[str] = Counter()
    nodes: Counter[str] = Counter()
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            spent[event["args"]["op_name"]] += event["dur"]
            nodes[event["args"]["op_name"]] += 1
    runs = [e["dur"] for e in events if e.get("name") == "model_run"]
    return {
        "step_ms": float(np.median(runs)) / 1e3,
        "operators": {
            op: {"ms": us / steps / 1e3, "nodes": nodes[op] // steps} for op, us in spent.most_common()
        },
    }


CHILDREN = {
    "bundle": measure_bundle,
    "peer": measure_peer,
    "bandwidth": measure_bandwidth,
    "profile": profile,
}

if __name__ == "__main__":
    kind, *arguments = json.loads(sys.argv[1])
    result = CHILDREN[kind](*arguments)
    print(json.dumps({**result, "peak_memory_bytes": peak_memory()}))
