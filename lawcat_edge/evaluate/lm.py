"""What a task asks of a model: read a batch of prompts, go on one token at a time, or give the logits of a
text.

Prompts of a batch have one length: a recurrent model cannot skip padding. ``BundleModel`` runs an exported
bundle through the runner, whose decoding core also writes its answers; the torch models are in ``torch_lm``.
"""

from __future__ import annotations

import functools
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
    rows: list[list[int]] = [[] for _ in ids]
    open_rows = set(range(len(rows)))
    texts = [""] * len(rows)
    write = model.write if isinstance(model, BundleModel) else functools.partial(step_by_step, model)
    for row, token in write(ids, max_new_tokens, open_rows):
        if token in ends:
            open_rows.discard(row)
            continue
        rows[row].append(token)
        texts[row] = model.tokenizer.decode(rows[row], skip_special_tokens=True)
        if settled(row, texts[row]):
            open_rows.discard(row)
    return texts


def step_by_step(
    model: LanguageModel, ids: np.ndarray, count: int, open_rows: set[int]
) -> Iterator[tuple[int, int]]:
    """(row, most likely token), at most `count` for each prompt of ids [B,T] while its row is in
    `open_rows`."""
    logits, state = model.prefill(ids)
    for made in range(1, count + 1):
        chosen = np.asarray(logits.argmax(-1).tolist(), np.int64)
        for row in sorted(open_rows):
            yield row, int(chosen[row])
        if not open_rows or made == count:
            break
        logits, state = model.step(chosen, state)


class BundleModel:
    """An exported bundle in onnxruntime."""

    kind = "bundle"

    def __init__(self, folder: str | Path, threads: int | None = None, flavour: str | None = None) -> None:
        from lawcat_edge.runtime import Model

        self.name = str(folder)
        self.runner = Model.load(folder, threads=threads, flavour=flavour)
        self.engine = self.runner.engine
        self.tokenizer = load_tokenizer(self.runner.bundle.path("tokenizer.json"))

    def max_batch(self, length: int) -> int:
        return 8

    def prefill(self, ids: np.ndarray) -> tuple[np.ndarray, Any]:
        state = self.engine.new_state(len(ids))
        return self.engine.prefill(ids, state), state

    def step(self, ids: np.ndarray, state: Any) -> tuple[np.ndarray, Any]:
        return self.engine.forward(np.ascontiguousarray(ids[:, None], np.int64), state), state

    def write(self, ids: np.ndarray, count: int, open_rows: set[int]) -> Iterator[tuple[int, int]]:
        """``step_by_step`` as users get it: every prompt is read by itself, and a row that is no longer
        open is let go."""
        from lawcat_edge.runtime.generate.core import Core
        from lawcat_edge.runtime.generate.request import Request

        request = Request.of(max_new_tokens=count, ignore_eos=True, speculate=0)
        core, rows = Core(self.engine, capacity=len(ids), keep=False), {}
        for row, prompt in enumerate(ids.tolist()):
            context = self.runner.new_context()
            context.tokens.extend(prompt)
            writer = self.runner.writer(request, context)
            core.insert(writer)
            rows[writer] = row
        while advances := core.read() or core.write():
            for advance in advances:
                if advance.error is not None:
                    raise advance.error
                row, tokens = rows[advance.writer], advance.writer.generation.tokens
                if tokens:  # else a piece of its prompt was read
                    yield row, tokens[-1]
                if row not in open_rows:
                    core.remove(advance.writer)

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
