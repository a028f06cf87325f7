"""What a task asks of a model: read a batch of prompts, go on one token at a time, or give the logits of a
text.

Prompts of a batch have one length: a recurrent model cannot skip padding. ``BundleModel`` runs an exported
bundle through the runner; the torch models are in ``torch_lm``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tokenizers

from lawcat_edge.data.corpus import END_TOKENS, separator_ids
from lawcat_edge.losses import to_numpy
from lawcat_edge.runtime.files import read_bytes
from lawcat_edge.runtime.generate.text import MAX_TOKENIZER
from lawcat_edge.runtime.generate.text import load_tokenizer as parse_tokenizer


class LanguageModel(Protocol):
    """Logits are numpy arrays or torch tensors, whichever the model has at hand."""

    name: str
    kind: str
    tokenizer: tokenizers.Tokenizer

    def max_batch(self, length: int) -> int:
        """How many sequences of this length fit at once."""
        ...

    def prefill(self, ids: np.ndarray) -> tuple[Any, Any]:
        """ids [B,T] -> logits [B,V] after the last token, and the state."""
        ...

    def step(self, ids: np.ndarray, state: Any) -> tuple[Any, Any]:
        """ids [B], the next token of each -> logits [B,V], and the state, which may be the same one
        changed."""
        ...

    def logits(self, ids: np.ndarray, chunk: int) -> Iterator[Any]:
        """ids [B,T] -> logits [B,≤chunk,V], chunk after chunk; each may be overwritten by the next."""
        ...


def load_tokenizer(path: Path) -> tokenizers.Tokenizer:
    return parse_tokenizer(read_bytes(path, MAX_TOKENIZER), str(path))


def end_ids(tokenizer: tokenizers.Tokenizer) -> set[int]:
    return {i for name in END_TOKENS if (i := tokenizer.token_to_id(name)) is not None}


def greedy(
    model: LanguageModel,
    ids: np.ndarray,
    max_new_tokens: int,
    settled: Callable[[int, str], bool] = lambda row, text: False,
) -> list[str]:
    """The greedy continuations of prompts ids [B,T]. A row ends at an end token or where ``settled(row,
    text)``."""
    ends = end_ids(model.tokenizer)
    logits, state = model.prefill(ids)
    rows: list[list[int]] = [[] for _ in ids]
    open_rows = set(range(len(rows)))
    texts = [""] * len(rows)
    for made in range(1, max_new_tokens + 1):
        chosen = np.asarray(logits.argmax(-1).tolist(), np.int64)
        for row in sorted(open_rows):
            if int(chosen[row]) in ends:
                open_rows.discard(row)
                continue
            rows[row].append(int(chosen[row]))
            texts[row] = model.tokenizer.decode(rows[row], skip_special_tokens=True)
            if settled(row, texts[row]):
                open_rows.discard(row)
        if not open_rows or made == max_new_tokens:
            break
        logits, state = model.step(chosen, state)
    return texts


class BundleModel:
    """An exported bundle in onnxruntime."""

    kind = "bundle"

    def __init__(self, folder: str | Path, threads: int | None = None, flavour: str | None = None) -> None:
        from lawcat_edge.runtime.bundle.manifest import Bundle
        from lawcat_edge.runtime.engine.session import Engine

        bundle = Bundle.open(folder)
        self.name = str(folder)
        self.engine = Engine(bundle, threads=threads, flavour=flavour)
        self.tokenizer = load_tokenizer(bundle.path("tokenizer.json"))

    def max_batch(self, length: int) -> int:
        return 8

    def prefill(self, ids: np.ndarray) -> tuple[np.ndarray, Any]:
        state = self.engine.new_state(len(ids))
        return self.engine.prefill(ids, state), state

    def step(self, ids: np.ndarray, state: Any) -> tuple[np.ndarray, Any]:
        return self.engine.forward(np.ascontiguousarray(ids[:, None], np.int64), state), state

    def logits(self, ids: np.ndarray, chunk: int) -> Iterator[np.ndarray]:
        state = self.engine.new_state(len(ids))
        for start in range(0, ids.shape[1], chunk):
            piece = np.ascontiguousarray(ids[:, start : start + chunk], np.int64)
            yield self.engine.forward(piece, state, all_positions=True)


def sample_prose(
    model: LanguageModel, tokens: int, seed: int, temperature: float = 0.8, top_k: int = 50
) -> str:
    """About ``tokens`` tokens of text that the model writes itself, where no prose is at hand."""
    length = 512
    rng = np.random.default_rng([seed, 7])
    rows = max(1, min(-(-tokens // length), model.max_batch(length)))
    texts: list[str] = []
    for _ in range(-(-tokens // (rows * length))):
        start = np.asarray(separator_ids(model.tokenizer), np.int64)
        logits, state = model.prefill(np.tile(start, (rows, 1)))
        written = []
        for _ in range(length):
            table = to_numpy(logits).astype(np.float64) / temperature
            best = np.argpartition(-table, min(top_k, table.shape[1]) - 1, axis=1)[:, :top_k]
            scores = np.take_along_axis(table, best, 1)
            shares = np.exp(scores - scores.max(1, keepdims=True)).cumsum(1)
            draw = rng.random((rows, 1)) * shares[:, -1:]
            chosen = np.take_along_axis(best, (shares < draw).sum(1, keepdims=True), 1)[:, 0]
            written.append(chosen)
            logits, state = model.step(chosen, state)
        texts += [
            model.tokenizer.decode(row.tolist(), skip_special_tokens=True) for row in np.stack(written, 1)
        ]
    return "\n".join(texts)
