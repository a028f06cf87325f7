"""Replay a finished bundle in onnxruntime against torch, and note what the device can replay later."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lawcat_edge.export import genai
from lawcat_edge.losses import token_kl
from lawcat_edge.runtime.bundle.manifest import Bundle, Parity
from lawcat_edge.runtime.bundle.verify import pieces_for
from lawcat_edge.runtime.engine.session import Engine
from lawcat_edge.runtime.errors import CheckFailed

Reference = Callable[[np.ndarray], np.ndarray]
PIECES = (1, 7, 1, 64, 3, 20, 1, 31)
_TOP = 8
_POSITIONS = 16


@dataclass(frozen=True)
class Agreement:
    """Bundle against reference.

    rel_err: max |difference| over the largest |logit| of a position, the worst position.
    kl: mean over positions of KL(reference || bundle), nats.
    top1: share of positions with the same best token.
    """

    rel_err: float
    kl: float
    top1: float


def cut(length: int, pieces: Sequence[int] = PIECES) -> list[int]:
    """Uneven pieces, in turn, that add up to length."""
    result: list[int] = []
    while (left := length - sum(result)) > 0:
        result.append(min(left, pieces[len(result) % len(pieces)]))
    return result


def replay(engine: Engine, tokens: np.ndarray, pieces: Sequence[int]) -> np.ndarray:
    """Logits [T,V] of tokens [T] fed in pieces."""
    state, out, at = engine.new_state(), [], 0
    for piece in pieces:
        out.append(engine.forward(tokens[None, at : at + piece], state, all_positions=True)[0].copy())
        at += piece
    return np.concatenate(out)


def compare(reference: np.ndarray, got: np.ndarray) -> Agreement:
    """Both [T,V]."""
    scale = np.abs(reference).max(-1)
    rel_err = float((np.abs(reference - got).max(-1) / scale).max())
    kl = float(token_kl(reference, got).mean())
    top1 = float((reference.argmax(-1) == got.argmax(-1)).mean())
    return Agreement(rel_err, kl, top1)


def verify_folder(
    folder: Path,
    tokens: Sequence[int],
    reference: Reference | None,
    max_rel_err: float,
    max_kl: float,
    flavour: str | None = None,
) -> tuple[Parity, Agreement | None]:
    """Run the bundle in ``folder`` over the tokens; CheckFailed when it is too far from the reference.

    The vectors in the returned Parity are the bundle's own logits, so that a device can be held to a tight
    bound whatever the scheme costs; ``max_rel_err`` and ``kl`` in it are those against the reference.
    """
    ids = np.asarray(tokens, np.int64)
    pieces = cut(len(ids))
    engine = Engine(Bundle.open(folder, check_hashes=False), flavour=flavour)
    got = replay(engine, ids, pieces)
    if not np.isfinite(got).all():
        raise CheckFailed(
            "The exported model gives NaN or infinity; check the teacher's weights and the adapter."
        )
    # processors differ in how they round int8 activations, hardly in float32
    bound = 1e-3 if max_rel_err <= 1e-3 else 0.1
    # Every other graph must be the same function as the one for all positions. With other pieces the sums
    # differ in the last bit, which can turn the rounding of an int8 activation.
    engine.release("all")
    for kind in engine.kinds:
        limit = 1e-4 if kind == "last" else bound
        state, at = engine.new_state(kind=kind), 0
        for piece in pieces_for(engine, kind, pieces) if kind != "all" else ():
            if engine.fixed_tokens(kind) and piece > state.room:
                break  # its callers read the tokens before rows are forgotten one by one
            at += piece
            last = engine.run(kind, ids[None, at - piece : at], state)[0, -1]
            # written so that a NaN fails too
            if not np.abs(last - got[at - 1]).max() <= limit * np.abs(got[at - 1]).max():
                raise CheckFailed(
                    f"The {engine.flavour} graphs {kind!r} and 'all' disagree at position {at - 1}; "
                    "this is a bug, please report it."
                )
        engine.release(kind)
    if "genai" in engine.bundle.manifest.graphs[engine.flavour]:
        # Past the span of layers with sinks it is another function: it keeps every token, and sees them all.
        reach = min((s.tokens for s in engine.bundle.manifest.spans.values() if s.sinks), default=len(ids))
        within = cut(min(reach, len(ids)))
        ends = np.cumsum(within) - 1
        rows = genai.replay(folder / engine.bundle.manifest.graphs[engine.flavour]["genai"], ids, within)
        # Its cosines and sines are float32 ones, which differ in the last bit from the runner's: see above.
        limit = bound if engine.bundle.manifest.rotary else 1e-4
        if not np.abs(rows - got[ends]).max() <= limit * np.abs(got[ends]).max():
            raise CheckFailed("The graph for onnxruntime-genai disagrees; this is a bug, please report it.")
    agreement = None
    if reference is not None:
        agreement = compare(reference(ids), got)
        if agreement.rel_err > max_rel_err or agreement.kl > max_kl:
            raise CheckFailed(
                f"The exported model is too far from torch: relative error {agreement.rel_err:.2e} (bound "
                f"{max_rel_err:g}), KL {agreement.kl:.2e} (bound {max_kl:g}); take a finer scheme."
            )
    positions = sorted({int(p) for p in np.linspace(0, len(ids) - 1, _POSITIONS)})
    top = np.argsort(-got[positions], axis=1)[:, :_TOP]
    parity = Parity(
        tokens=[int(t) for t in ids],
        pieces=pieces,
        positions=positions,
        top_ids=top.tolist(),
        top_logits=np.take_along_axis(got[positions], top, 1).astype(float).tolist(),
        max_rel_err=agreement.rel_err if agreement else 0.0,
        kl=agreement.kl if agreement else 0.0,
        bound=bound,
    )
    return parity, agreement
