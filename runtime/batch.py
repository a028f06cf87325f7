"""Several texts decoded together: the weights are read from memory once a step for all of them."""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from lawcat_edge.runtime.context import Generation, Result
from lawcat_edge.runtime.state import State
from lawcat_edge.runtime.stats import peak_memory

if TYPE_CHECKING:
    from lawcat_edge.runtime.model import Model, Prompt, Request


def run(model: Model, prompts: Sequence[Prompt], requests: Sequence[Request]) -> list[Result]:
    """Read each prompt by itself, then decode all together; results in the order of the prompts."""
    from lawcat_edge.runtime.model import Writer

    writers: list[Writer] = []
    texts: list[list[str]] = []
    for prompt, request in zip(prompts, requests, strict=True):
        context, generation = model.new_context(), Generation(_nothing, request.logprobs is not None)
        begin = time.perf_counter()
        model._append(context, prompt)
        stats = generation.stats
        stats.prompt_tokens, stats.state_bytes = len(context), context.state.nbytes
        writer = Writer(model, request, context, generation)
        stats.seed = writer.sampler.seed
        logits = model._feed(context, len(context) - (request.max_new_tokens == 0))
        stats.prefill_seconds = stats.first_token_seconds = time.perf_counter() - begin
        if request.max_new_tokens == 0:
            writer.done, generation.stop_reason = True, "length"
            texts.append([])
        else:
            assert logits is not None
            texts.append([writer.choose(logits[0])])
        writers.append(writer)
    if rows := [(writer, parts) for writer, parts in zip(writers, texts, strict=True) if not writer.done]:
        _decode(model, rows)
    results = []
    for writer, parts in zip(writers, texts, strict=True):
        generation, stats = writer.generation, writer.generation.stats
        stats.new_tokens, stats.context_tokens = len(generation.tokens), len(writer.context)
        stats.peak_memory_bytes = peak_memory()
        choices = generation.choices if writer.request.logprobs is not None else None
        results.append(Result("".join(parts), generation.tokens, generation.stop_reason, stats, choices))
    return results


def _decode(model: Model, rows: list) -> None:
    state = State.stack([writer.context.state for writer, _ in rows])
    for writer, _ in rows:
        writer.context.state = state  # frees the single ones
    begin = time.perf_counter()
    while rows:
        ids = np.array([[writer.context.tokens[-1]] for writer, _ in rows], np.int64)
        logits = model.engine.forward(ids, state)
        alive = []
        for i, (writer, parts) in enumerate(rows):
            parts.append(writer.choose(logits[i]))
            writer.generation.stats.decode_seconds = time.perf_counter() - begin
            if not writer.done:
                alive.append(i)
        if len(alive) < len(rows):
            rows = [rows[i] for i in alive]
            if rows:
                state = state.rows(alive)


def _nothing(_: Generation) -> Generator[str, None, None]:
    yield from ()
