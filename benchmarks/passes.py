#!/usr/bin/env python3
"""What a pass over the model costs by the number of tokens and of sequences, for bundles and their flavours.

    python benchmarks/passes.py BUNDLE... [--flavours native,ort] [--threads 2] [--rounds 25]

In times of a pass of one token of one sequence, all with a window that is full: `tokens` (of one sequence),
`trial` (the same tokens read on trial, as drafts are, with the logits of all) and `sequences` (a token of
each). All sizes of all bundles and flavours take turns, and the fastest quarter of the passes counts, so that
whatever else the machine does meets all alike. What drafts cost in `runtime/generate/draft.py` is from here.
The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from lawcat_edge.runtime import Bundle, Engine

TOKENS, SEQUENCES = (1, 2, 3, 4, 6, 8, 12, 16), (1, 2, 4, 8)


def passes(engine: Engine, window: int) -> dict[tuple[str, int], Callable[[], object]]:
    """A function for every kind and size of pass."""
    ids = np.random.default_rng(0).integers(0, engine.vocab_size, (max(SEQUENCES), window + 64))
    alone, trial = engine.new_state(), engine.new_state()
    for state in (alone, trial):
        engine.prefill(ids[:1], state)
    made: dict[tuple[str, int], Callable[[], object]] = {}
    for count in TOKENS:
        made["tokens", count] = lambda count=count: engine.forward(ids[:1, :count], alone)
        made["trial", count] = lambda count=count: engine.try_tokens(ids[:1, :count], trial)
    for count in SEQUENCES:
        state = engine.new_state(count)
        engine.prefill(ids[:count], state)
        made["sequences", count] = lambda count=count, state=state: engine.forward(ids[:count, :1], state)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("bundles", nargs="+", type=Path)
    parser.add_argument("--flavours", default="native,ort")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=25)
    options = parser.parse_args()
    made = {}
    for path in options.bundles:
        bundle = Bundle.open(path)
        for flavour in options.flavours.split(","):
            engine = Engine(bundle, options.threads, flavour)
            made[f"{path.name} {flavour}"] = passes(engine, bundle.manifest.window)
    seconds: dict[str, dict[tuple[str, int], list[float]]] = {
        name: {key: [] for key in own} for name, own in made.items()
    }
    for _ in range(options.rounds):
        for name, own in made.items():
            time.sleep(0.1)  # until the threads of the engine before have stopped waiting for work
            for key, run in own.items():
                run()  # what the pass before left in the caches is not of this one
                begin = time.perf_counter()
                run()
                seconds[name][key].append(time.perf_counter() - begin)
    report: dict[str, dict[str, float]] = {}
    for name, own in seconds.items():
        fast = {key: float(np.percentile(values, 25)) for key, values in own.items()}
        one = fast["tokens", 1]
        report[name] = {f"{kind} {count}": round(value / one, 3) for (kind, count), value in fast.items()}
        report[name]["ms"] = round(one * 1e3, 3)
        print(f"{name}: {one * 1e3:.2f} ms for one token")
        for kind in ("tokens", "trial", "sequences"):
            sizes = (f"{count}: {fast[kind, count] / one:.2f}" for of, count in fast if of == kind)
            print(f"  {kind:10}", "  ".join(sizes))
    print(json.dumps(report))


if __name__ == "__main__":
    main()
