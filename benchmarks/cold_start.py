#!/usr/bin/env python3
"""From the start of a process to the first token of a prompt of 20 tokens, and what of it is what.

    python benchmarks/cold_start.py BUNDLE [--rounds 10] [--threads N] [--json]

Every round starts fresh processes in turn: `lawcat-edge generate`, a script with `Model`, the same while
every file is hashed (as at the first start of all), and one that is timed part by part. The files stay in the
system's cache, as they do on a machine that starts the model twice. Seconds are wall clock, median and
least of the rounds; the least is what an idle machine does. The tokenizer loads while the session is made, so
the parts are more than their sum.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

PROMPT = "A ring buffer is a piece of memory of fixed size that is written over and over again, so it"
WHOLES = ("command", "script", "script_hashed")
LOADING = ("hashing", "other_checks", "session", "tokenizer", "other_loading")
SCRIPT = """
import sys
from lawcat_edge.runtime import Bundle, Engine, Model
path, prompt, threads, hashed = sys.argv[1:]
threads = int(threads) or None
if hashed == "1":
    bundle = Bundle.open(path, rehash=True)
    model = Model(bundle, Engine(bundle, threads=threads))
else:
    model = Model.load(path, threads=threads)
print(next(iter(model.generate(prompt, max_new_tokens=1)), ""), flush=True)
"""
# Parts are timed by wrapping what does them; monotonic clocks of two processes are one on Linux.
PARTS = """
import sys, time
begin, now = float(sys.argv[4]), time.monotonic
spent = {"python": now() - begin}
def mark(name, since):
    spent[name] = now() - since
    return now()
at = now()
import numpy
at = mark("numpy", at)
import onnxruntime
at = mark("onnxruntime", at)
import tokenizers
at = mark("tokenizers", at)
from lawcat_edge.runtime import Bundle, Model
from lawcat_edge.runtime.engine import session
from lawcat_edge.runtime.generate import model as module
at = mark("lawcat_edge", at)
def timed(owner, attribute, name):
    real = getattr(owner, attribute)
    def wrapped(*args, **kwargs):
        since = now()
        try:
            return real(*args, **kwargs)
        finally:
            spent[name] = spent.get(name, 0) + now() - since
    setattr(owner, attribute, wrapped)
timed(Bundle, "_check_hashes", "hashing")
timed(Bundle, "open", "open")
timed(onnxruntime, "InferenceSession", "session")
timed(module, "_tokenizer", "tokenizer")
at = now()
model = Model.load(sys.argv[1], threads=int(sys.argv[3]) or None)
at = mark("loading", at)
tokens = len(model.encode(sys.argv[2]))
at = now()
print(next(iter(model.generate(sys.argv[2], max_new_tokens=1)), ""), file=sys.stderr)
mark("first_token", at)
spent["other_checks"] = spent.pop("open") - spent["hashing"]
rest = spent["hashing"] + spent["other_checks"] + max(spent["session"], spent["tokenizer"])
spent["other_loading"] = spent["loading"] - rest
import json
print(json.dumps({"tokens": tokens, **spent}))
"""


def first_byte(words: list[str]) -> dict[str, float]:
    """Seconds until a process writes, and the processor seconds that it took in all."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    begin = time.monotonic()
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    got = process.stdout.read(1)
    seconds = time.monotonic() - begin
    _, errors = process.communicate()
    if process.returncode or not got:
        raise SystemExit(f"{words[0]} failed: {errors.decode()[-1000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": seconds, "processor": cpu}


def parts(bundle: str, threads: int) -> dict[str, float]:
    words = [sys.executable, "-c", PARTS, bundle, PROMPT, str(threads), str(time.monotonic())]
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True)
    return json.loads(done.stdout)


def summary(values: list[float]) -> dict[str, float]:
    return {"least": min(values), "median": statistics.median(values)}


def measure(bundle: str, rounds: int, threads: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "lawcat_edge", "generate", bundle, "--prompt", PROMPT]
    command += ["--max-new-tokens", "1", *(["--threads", str(threads)] if threads else [])]
    script = [sys.executable, "-c", SCRIPT, bundle, PROMPT, str(threads)]
    words = {"command": command, "script": [*script, "0"], "script_hashed": [*script, "1"]}
    first_byte(words["script"])  # files come into the system's cache, and the bundle is noted as hashed
    wholes: dict[str, list[dict[str, float]]] = {name: [] for name in WHOLES}
    each: list[dict[str, float]] = []
    for _ in range(rounds):
        for name in WHOLES:
            wholes[name].append(first_byte(words[name]))
        each.append(parts(bundle, threads))
    return {
        "bundle": Path(bundle).name,
        "rounds": rounds,
        "threads": threads or None,
        "load_average": os.getloadavg()[0],
        "prompt_tokens": each[0].pop("tokens"),
        "wholes": {
            name: {
                **summary([run["seconds"] for run in runs]),
                "processor": min(run["processor"] for run in runs),
            }
            for name, runs in wholes.items()
        },
        "parts": {name: summary([found[name] for found in each]) for name in each[0]},
    }


def show(found: dict[str, Any]) -> None:
    print(f"{found['bundle']}: {found['prompt_tokens']} tokens, load average {found['load_average']:.1f}\n")
    print("| seconds to the first token | least | median | processor |\n|---|---|---|---|")
    titles = dict(
        zip(WHOLES, ("lawcat-edge generate", "Model.load", "opened with every file hashed"), strict=True)
    )
    for name, row in found["wholes"].items():
        print(f"| {titles[name]} | {row['least']:.2f} | {row['median']:.2f} | {row['processor']:.2f} |")
    print("\n| part, seconds | least | median |\n|---|---|---|")
    order = [
        "python",
        "numpy",
        "onnxruntime",
        "tokenizers",
        "lawcat_edge",
        "loading",
        *LOADING,
        "first_token",
    ]
    for name in order:
        row, title = found["parts"][name], name.replace("_", " ")
        title = f"of it {title}" if name in LOADING else title
        print(f"| {title} | {row['least']:.3f} | {row['median']:.3f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("bundle")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found = measure(options.bundle, options.rounds, options.threads)
    if options.json:
        print(json.dumps(found))
    else:
        show(found)


if __name__ == "__main__":
    main()
