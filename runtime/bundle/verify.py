"""Is this bundle what was exported, and does it compute here what it computed there?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lawcat_edge.runtime.bundle.flavours import can_run
from lawcat_edge.runtime.bundle.manifest import CHAT_TEMPLATE, TOKENIZER, Bundle, Parity
from lawcat_edge.runtime.engine.session import Engine
from lawcat_edge.runtime.engine.state import State
from lawcat_edge.runtime.errors import CheckFailed, LawcatError
from lawcat_edge.runtime.generate.text import Tokenizer
from lawcat_edge.runtime.template.chat import ChatTemplate


@dataclass(frozen=True)
class Check:
    """One thing that was checked, and what was seen."""

    name: str
    detail: str


def verify(
    path: Path | str,
    threads: int | None = None,
    report: Callable[[Check], None] | None = None,
    public_key: Path | str | None = None,
) -> list[Check]:
    """Check hashes, sizes, tensors, tokenizer and template; load every graph; replay the parity vectors.

    Returns what was checked; each is also given to `report` as it passes. Raises CheckFailed with the first
    reason (LawcatError when `path` is no bundle at all). public_key: the bundle must be signed with it.
    """
    done: list[Check] = []

    def passed(name: str, detail: str) -> None:
        done.append(Check(name, detail))
        if report is not None:
            report(done[-1])

    if not Path(path).is_dir():
        raise LawcatError(f"There is no bundle folder {path}; make one with `lawcat-edge export`.")
    try:
        bundle = Bundle.open(path, public_key=public_key, rehash=True)
        manifest = bundle.manifest
        if public_key is not None:
            passed("signature", f"the manifest is signed with {public_key}")
        passed("files", f"{len(manifest.files)} files, {bundle.bytes_on_disk:,} bytes, sha256 as recorded")
        tensors = sum(graph.tensors for graph in bundle.graphs.values())
        passed("tensors", f"{tensors} tensors of {len(bundle.graphs)} graphs lie within their files")
        Tokenizer(bundle.read(TOKENIZER), manifest.vocab_size)
        if bundle.has(CHAT_TEMPLATE):
            ChatTemplate(_text(bundle))
        passed("text", "tokenizer" + (" and chat template load" if bundle.has(CHAT_TEMPLATE) else " loads"))
        if manifest.parity is None:
            raise CheckFailed(f"{path} records no parity vectors to replay; export it again.")
        for flavour in manifest.ops:
            if not can_run(flavour):
                passed(f"parity ({flavour})", "not run: this installation lacks its operators")
                continue
            engine = Engine(bundle, threads=threads, flavour=flavour)
            worst = replay(engine, manifest.parity)
            passed(
                f"parity ({flavour})",
                f"{len(manifest.parity.tokens)} tokens in {len(manifest.parity.pieces)} pieces, graphs "
                f"{', '.join(engine.kinds)}: largest relative error {worst:.2e}, "
                f"allowed {manifest.parity.bound:.2e}",
            )
    except CheckFailed:
        raise
    except LawcatError as error:
        raise CheckFailed(str(error)) from error
    return done


def _text(bundle: Bundle) -> str:
    try:
        return bundle.read(CHAT_TEMPLATE, 1 << 20).decode("utf-8")
    except UnicodeDecodeError as error:
        raise LawcatError(
            f"{bundle.folder / CHAT_TEMPLATE} is not UTF-8 text; export the bundle again."
        ) from error


def replay(engine: Engine, parity: Parity) -> float:
    """Feed the recorded tokens in their pieces to each graph; the largest relative error seen.

    A graph that gives the last position only is compared where a recorded position ends a piece, one of fixed
    length is fed pieces of that length. Beyond the bound: CheckFailed.
    """
    worst = 0.0
    expected = {
        position: (np.asarray(ids), np.asarray(logits))
        for position, ids, logits in zip(parity.positions, parity.top_ids, parity.top_logits, strict=True)
    }
    for kind in engine.kinds:
        state, at = engine.new_state(kind=kind), 0
        for piece in pieces_for(engine, kind, parity.pieces):
            ids = np.asarray(parity.tokens[at : at + piece], np.int64)[None]
            rows = engine.run(kind, ids, state)[0]  # [T,V] of this piece, or [1,V] of its last position
            at += piece
            first = at - len(rows)
            for position in range(first, at):
                if position in expected:
                    worst = max(
                        worst, _compare(rows[position - first], *expected[position], parity, position)
                    )
        _check_state(state)
        engine.release(kind)
    return worst


def pieces_for(engine: Engine, kind: str, pieces: Sequence[int]) -> Sequence[int]:
    """``pieces`` for a graph of any T; as many of its own length as fit for one of fixed T."""
    fixed = engine.fixed_tokens(kind)
    return pieces if fixed is None else [fixed] * (sum(pieces) // fixed)


def _compare(got: np.ndarray, ids: np.ndarray, want: np.ndarray, parity: Parity, position: int) -> float:
    scale = max(float(np.abs(want).max()), 1e-9)
    error = float(np.abs(got[ids].astype(np.float64) - want).max()) / scale
    # Written so that a NaN fails too.
    if not error <= parity.bound:
        raise CheckFailed(
            f"The logits at position {position} differ from the recorded ones by {error:.2e} "
            f"(allowed {parity.bound:.2e}); export the bundle again on this kind of machine."
        )
    others = np.delete(got, ids)
    if others.size and float(others.max()) > float(want.max()) + 2 * parity.bound * scale:
        raise CheckFailed(
            f"At position {position} another token is the most likely; export the bundle again."
        )
    return error


def _check_state(state: State) -> None:
    for tensor, values in zip(state.tensors, state.arrays, strict=True):
        if not np.isfinite(values).all():
            raise CheckFailed(
                f"The state {tensor.output} is not finite after the replay; export the bundle again."
            )
