"""Bundles run in two of their flavours, in a process of its own (see ``native_layers``).

``python native_bundles.py THREADS OTHER FOLDER...`` prints a JSON line: for each bundle the largest error of
the flavour ``native`` against the flavour OTHER, by what was compared.
"""

from __future__ import annotations

import itertools
import json
import sys

import numpy as np
from native_layers import BATCHES, TOKENS

from lawcat_edge.runtime import Bundle, Engine
from lawcat_edge.runtime.engine.state import State


def _far(got: np.ndarray, want: np.ndarray) -> float:
    """The largest difference over the largest number; infinity where it is no number."""
    if not want.size:  # a window of one token keeps no rows
        return 0.0
    error = np.abs(got - want).max() / max(np.abs(want).max(), 1e-6)
    return float(error) if np.isfinite(error) else float("inf")


def _states(mine: State, other: State) -> float:
    pairs = list(zip(mine.tensors_of(), other.tensors_of(), strict=True))
    assert all(a.shape == b.shape for a, b in pairs)
    return max(_far(a, b) for a, b in pairs)


def errors(folder: str, other: str, threads: int) -> dict[str, float]:
    bundle = Bundle.open(folder)
    mine, theirs = (Engine(bundle, threads=threads, flavour=name) for name in ("native", other))
    worst = dict.fromkeys(("logits", "states", "trial", "accepted"), 0.0)
    generator = np.random.default_rng(0)

    def note(what: str, error: float) -> None:
        worst[what] = max(worst[what], error)

    for T, B in itertools.product(TOKENS, BATCHES):
        states = [engine.new_state(B) for engine in (mine, theirs)]
        for length in (5, T, 1, T):
            ids = generator.integers(0, mine.vocab_size, (B, length))
            got, want = (
                engine.forward(ids, state, all_positions=length > 1).copy()
                for engine, state in zip((mine, theirs), states, strict=True)
            )
            note("logits", _far(got, want))
        note("states", _states(*states))
        if B > 1 or min(e.trial_room(s) for e, s in zip((mine, theirs), states, strict=True)) < T:
            continue
        before = [array.copy() for array in states[0].tensors_of()]
        got, want = (e.try_tokens(ids, s).copy() for e, s in zip((mine, theirs), states, strict=True))
        note("trial", _far(got, want))
        kept = states[0].tensors_of()
        assert all((a == b).all() for a, b in zip(before, kept, strict=True)), "a trial was kept"
        for state in states:
            state.accept(T)
        note("accepted", _states(*states))
    return worst


if __name__ == "__main__":
    threads, other, *folders = sys.argv[1:]
    print(json.dumps({folder: errors(folder, other, int(threads)) for folder in folders}))
