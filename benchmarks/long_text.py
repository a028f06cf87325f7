#!/usr/bin/env python3
"""One text of 200,000 tokens through a bundle: does memory stay flat, speed constant and the state finite?

    python benchmarks/long_text.py BUNDLE [--marks 1K,32K,100K,200K] [--decode 1000] [--threads 1]
        [--text FILES...] [--flavour ort|onnx|portable]

The text (default: this project's own sources and documents, again from the start where they end) is read by
the runner in its usual chunks. At every mark the state is compared with the one kept at the first mark: both
read and write the same number of tokens in turns, so that whatever else the machine does meets both alike.
Speeds are those of the median turn; a ratio is of one turn to the other beside it. After the last mark
--decode tokens are written greedily. Memory is the largest resident size since the process began, which
includes loading the bundle; "resident" is the size at the mark. (Pages that Python and malloc take for
themselves move it by some KB; a key-value cache of SmolLM2-135M would take 23 KB a token.)
Prints a table; the last line of output is one JSON document. Exit code 1 if a goal is missed. Needs Linux.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from lawcat_edge.runtime import Bundle, Engine
from lawcat_edge.runtime.bundle.manifest import TOKENIZER
from lawcat_edge.runtime.engine.session import State
from lawcat_edge.runtime.generate.stats import peak_memory, resident_memory
from lawcat_edge.runtime.generate.text import Tokenizer

FLAT = 0.95  # least speed at a mark, as a part of that at the first
ROOT = Path(__file__).parent.parent


def own_text() -> list[Path]:
    folders = ("docs", "runtime", "export", "lawcat_edge", "calibration", "tests", "benchmarks")
    found = chain.from_iterable((ROOT / name).glob("**/*.*") for name in folders)
    kept = (path for path in found if path.suffix in (".py", ".md"))
    return [*sorted(ROOT.glob("*.md")), ROOT / "LICENSE", *sorted(kept)]


def count(text: str) -> int:
    """A number of tokens such as 1K (1,024)."""
    return int(text[:-1]) * 1024 if text[-1:] in "Kk" else int(text)


def seconds(work: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def write(engine: Engine, state: State, token: int, steps: int) -> int:
    """Write `steps` tokens greedily, from `token` on; the last one."""
    for _ in range(steps):
        token = int(engine.forward(np.array([[token]]), state)[0].argmax())
    return token


def in_turns(engine: Engine, states: list[State], ids: np.ndarray, turns: int) -> np.ndarray:
    """Tokens a second of [state][turn][read, write]: a chunk read and eight tokens written a turn."""
    speeds = np.zeros((len(states), turns, 2))
    for turn in range(turns):
        # Who begins alternates too.
        for i in (range(len(states)), reversed(range(len(states))))[turn % 2]:
            state = states[i]
            speeds[i, turn, 0] = engine.chunk / seconds(lambda state=state: engine.prefill(ids, state))
            speeds[i, turn, 1] = 8 / seconds(lambda state=state: write(engine, state, int(ids[-1]), 8))
    return speeds


def put(source: State, target: State) -> State:
    """`target`, now a copy of `source`, in the arrays that it has where these are long enough."""
    target.load(source.tensors_of(), source.position)
    return target


def about(state: State) -> dict[str, Any]:
    """Whether all of the state is finite, and its largest magnitude by kind of tensor."""
    largest: dict[str, float] = {}
    kept = state.tensors_of()
    for tensor, values in zip(state.tensors, kept, strict=True):
        kind = tensor.input.rpartition(".")[2]
        largest[kind] = max(largest.get(kind, 0.0), float(np.abs(values).max(initial=0.0)))
    return {"finite": all(np.isfinite(values).all() for values in kept), "largest": largest}


def look(
    engine: Engine, first: State, state: State, pair: list[State], ids: np.ndarray, turns: int
) -> dict[str, Any]:
    """The figures of one mark: of `state` beside `first`, worked on in the copies `pair`."""
    copies = [put(first, pair[0]), put(state, pair[1])]
    speeds = in_turns(engine, copies, ids[: engine.chunk], turns)
    read, wrote = (float(value) for value in np.median(speeds[1], axis=0))
    ratio = [float(value) for value in np.median(speeds[1] / speeds[0], axis=0)]
    return {
        "tokens": state.position,
        "read_tok_s": read,
        "read_ratio": ratio[0],
        "write_tok_s": wrote,
        "write_ratio": ratio[1],
        **about(state),
        "peak_bytes": peak_memory(),
        "resident_bytes": resident_memory(),
    }


def show(row: dict[str, Any]) -> None:
    print(
        f"{row['tokens']:>8,} {row['read_tok_s']:>8.1f} {row['read_ratio']:>6.3f} "
        f"{row['write_tok_s']:>8.1f} {row['write_ratio']:>6.3f} "
        f"{row['peak_bytes'] / 1e6:>9.2f} {row['resident_bytes'] / 1e6:>9.2f}",
        flush=True,
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--marks", default="1K,32K,100K,200K")
    parser.add_argument("--decode", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--turns", type=int, default=12)
    parser.add_argument("--text", type=Path, nargs="+", default=None)
    parser.add_argument("--flavour")
    args = parser.parse_args()
    marks = sorted({count(item) for item in args.marks.split(",")})
    bundle = Bundle.open(args.bundle)
    tokenizer = Tokenizer(bundle.read(TOKENIZER), bundle.manifest.vocab_size)
    texts = [path.read_text(encoding="utf-8") for path in args.text or own_text()]
    own = np.concatenate([tokenizer.encode(text, special=False) for text in texts])
    ids = np.resize(own, marks[-1])
    del tokenizer, texts
    engine = Engine(bundle, threads=args.threads, flavour=args.flavour)
    state = engine.new_state()
    first, *pair = (engine.new_state() for _ in range(3))
    rows = []
    print(
        f"{'tokens':>8} {'read/s':>8} {'ratio':>6} {'write/s':>8} {'ratio':>6} {'peak MB':>9} {'resident':>9}"
    )
    begin = time.perf_counter()
    for mark in marks:
        for at in range(state.position, mark, 10 * engine.chunk):
            engine.prefill(ids[at : min(mark, at + 10 * engine.chunk)], state)
        if not rows:
            put(state, first)
            look(engine, first, state, pair, ids, args.turns)  # whatever is allocated once is allocated here
        rows.append(look(engine, first, state, pair, ids, args.turns))
        show(rows[-1])
    decode_seconds = seconds(lambda: write(engine, state, int(ids[-1]), args.decode))
    report = {
        "bundle": args.bundle.name,
        "flavour": engine.flavour,
        "threads": engine.threads,
        "load_average": os.getloadavg()[0],
        "text_tokens": int(own.size),
        "seconds": time.perf_counter() - begin,
        "state_bytes": state.nbytes,
        "growth_bytes": max([peak_memory() or 0, *(row["peak_bytes"] for row in rows)])
        - rows[0]["peak_bytes"],
        "marks": rows,
        "decode": {
            "tokens": args.decode,
            "after": marks[-1],
            "tok_s": args.decode / decode_seconds if args.decode else None,
            "peak_bytes": peak_memory(),
            **about(state),
        },
    }
    longest = next(row for row in reversed(rows) if row["tokens"] <= 32 * 1024)
    report["goals"] = {
        "peak memory flat: less than a byte more a token": report["growth_bytes"] < marks[-1] - marks[0],
        f"reads at {longest['tokens']:,} as fast as at the first mark": longest["read_ratio"] >= FLAT,
        f"writes at {longest['tokens']:,} as fast as at the first mark": longest["write_ratio"] >= FLAT,
        "state finite": all(row["finite"] for row in rows) and report["decode"]["finite"],
    }
    for goal, met in report["goals"].items():
        print(f"{goal}: {'met' if met else 'MISSED'}")
    print(json.dumps(report))
    return 0 if all(report["goals"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
