"""What benchmarks/runner.py runs in processes of their own; they talk in lines of JSON.

    python benchmarks/measure.py '["bandwidth", 2]'
    python benchmarks/measure.py '["ours", "my-bundle", 512, 2, 48]'      # then: read 512, write 48

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


class Ours:
    """A bundle, reading and writing random tokens."""

    def __init__(self, path: str, context: int, threads: int, decode: int) -> None:
        from lawcat_edge.runtime import Bundle, Engine

        self.engine = Engine(Bundle.open(path, check_hashes=False), threads=threads)
        self.ids = np.random.default_rng(0).integers(100, 40_000, context)
        self.at, self.token = 0, 0
        self.state = self.engine.new_state()
        self.about = {"state_bytes": self.engine.bundle.manifest.state_bytes(context)}

    def warm(self) -> None:
        self.engine.prefill(self.ids[: self.engine.chunk], self.engine.new_state())

    def read(self, count: int) -> None:
        logits = self.engine.prefill(self.ids[self.at : self.at + count], self.state)
        self.at += count
        self.token = int(logits[0].argmax())

    def write(self) -> None:
        self.token = int(self.engine.forward(np.array([[self.token]]), self.state)[0].argmax())


class Peer:
    """The same through llama-cpp-python, whose choice of the next token is left out."""

    def __init__(self, path: str, context: int, threads: int, decode: int) -> None:
        import llama_cpp

        size = context + decode + 8
        self.model = llama_cpp.Llama(
            path, n_ctx=size, n_threads=threads, n_threads_batch=threads, verbose=False
        )
        self.ids = np.random.default_rng(0).integers(100, 40_000, size).tolist()
        self.at = 0
        self.about = {"version": llama_cpp.__version__}

    def warm(self) -> None:
        self.model.eval(self.ids[:256])
        self.model.reset()

    def read(self, count: int) -> None:
        self.model.eval(self.ids[self.at : self.at + count])
        self.at += count

    def write(self) -> None:
        self.read(1)


def serve(side: type[Ours] | type[Peer], *arguments: Any) -> None:
    """Do what the lines of stdin say, "read N" or "write N"; answer each with its seconds (of each step)."""
    begin = time.perf_counter()
    runner = side(*arguments)
    load = time.perf_counter() - begin
    runner.warm()
    print(json.dumps({"load_seconds": load, **runner.about}), flush=True)
    for line in sys.stdin:
        what, count = line.split()
        times = []
        for _ in range(int(count) if what == "write" else 1):
            begin = time.perf_counter()
            if what == "write":
                runner.write()
            else:
                runner.read(int(count))
            times.append(time.perf_counter() - begin)
        print(json.dumps(times), flush=True)
    print(json.dumps({"peak_memory_bytes": peak_memory()}))


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


SIDES = {"ours": Ours, "peer": Peer}
OTHERS = {"bandwidth": measure_bandwidth, "profile": profile}

if __name__ == "__main__":
    kind, *arguments = json.loads(sys.argv[1])
    if kind in SIDES:
        serve(SIDES[kind], *arguments)
    else:
        print(json.dumps(OTHERS[kind](*arguments)))
