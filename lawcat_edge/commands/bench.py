"""``lawcat-edge bench``: tokens a second and memory against the length of the context."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lawcat_edge.commands.generate import speculation
from lawcat_edge.runtime.errors import LawcatError

if TYPE_CHECKING:
    from lawcat_edge.runtime import Context, Model
    from lawcat_edge.runtime.generate.core import Advance

REPEATED = " The ferry leaves at eight and at five, and in winter only when the wind allows it." * 4
"""What a model goes on with by repeating it, so that drafts can show what they gain."""


def bench(
    model: Annotated[str, typer.Argument(help="Bundle folder, or owner/name on the hub.")],
    contexts: Annotated[
        str, typer.Option(help="Tokens of context, such as 128,2K,32K.")
    ] = "128,512,2048,8192",
    decode_tokens: Annotated[int, typer.Option(help="Tokens generated at each context.")] = 64,
    speculate: Annotated[
        str | None,
        typer.Option(
            help="Also write on from a repeated text, so many tokens drafted at most; default: off."
        ),
    ] = None,
    chunk: Annotated[
        int | None, typer.Option(help="Tokens of a prompt read at once; default: what suits the model.")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Processor threads; default: physical cores.")] = None,
    flavour: Annotated[str | None, typer.Option(help="Graph: native, ort, portable or onnx.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the report as JSON here.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Measure prefill and decode speed, time to the first token, memory and state of MODEL.

    One state reads on from context to context, so the longest one costs its length once. The contexts are
    of random tokens, and decode/s is without drafts. With --speculate N the state of each context also
    reads a sentence four times and writes on with drafts: drafts/s, and accepted of drafted tokens. That
    is about the most that drafts gain; where nothing repeats they gain nothing.

    Examples:

      lawcat-edge bench bundle --contexts 128,2K,32K

      lawcat-edge bench bundle --contexts 2K --speculate 8

      lawcat-edge bench bundle --threads 1 --json
    """
    sizes = _sizes(contexts)
    if not 2 <= decode_tokens <= 1 << 20:
        raise LawcatError(f"--decode-tokens must be at least 2, not {decode_tokens}.")
    drafted = speculation(speculate).get("speculate", 0)
    import onnxruntime

    from lawcat_edge.runtime import Model
    from lawcat_edge.runtime.bundle.manifest import describe_state, state_sizes

    begin = time.perf_counter()
    loaded = Model.load(model, threads=threads, flavour=flavour, chunk=chunk)
    engine, manifest = loaded.engine, loaded.bundle.manifest
    sizes_of_state = state_sizes(manifest.state, manifest.spans)
    report: dict[str, Any] = {
        "model": model,
        "scheme": manifest.scheme,
        "flavour": engine.flavour,
        "threads": engine.threads,
        "chunk": engine.chunk,
        "speculate": drafted,
        "onnxruntime": onnxruntime.__version__,
        "bytes": loaded.bundle.bytes_on_disk,
        "state_bytes": sizes_of_state,
        "load_seconds": time.perf_counter() - begin,
        "contexts": [],
    }
    if not json_:
        print(
            f"{manifest.name} {manifest.scheme} ({engine.flavour}), {engine.threads} threads, loaded in "
            f"{report['load_seconds']:.2f} s; state {describe_state(sizes_of_state)}"
        )
        columns = ("context", "prefill/s", "decode/s", "first token s", "state MB", "peak MB")
        line = "{:>9} {:>10} {:>9} {:>14} {:>9} {:>8}".format(*columns)
        print(line + (f" {'drafts/s':>9} {'accepted':>9}" if drafted else ""))
    for row in measure(loaded, sizes, decode_tokens, drafted):
        report["contexts"].append(row)
        line = (
            f"{row['context']:>9,} {row['prefill_tokens_per_second']:>10,.1f} "
            f"{row['decode_tokens_per_second']:>9,.1f} {row['first_token_seconds']:>14.2f} "
            f"{row['state_bytes'] / 1e6:>9,.2f} "
            f"{(row['peak_memory_bytes'] or 0) / 1e6:>8,.0f}"
        )
        if drafted:
            accepted = f"{row['accepted_tokens']}/{row['drafted_tokens']}"
            line += f" {row['repeated_tokens_per_second']:>9,.1f} {accepted:>9}"
        print(line, file=sys.stderr if json_ else sys.stdout, flush=True)
    if out is not None:
        from lawcat_edge.runtime.files import write_json

        write_json(out, report)
    if json_:
        print(json.dumps(report))


def measure(model: Model, sizes: list[int], decode_tokens: int, drafted: int = 0) -> Iterator[dict[str, Any]]:
    """Yield a row for each context length, shortest first; random tokens (seed 0), which cost the same.

    drafted: tokens drafted at most where ``REPEATED`` is gone on with; 0: it is not read.
    Raises LawcatError where a pass fails.
    """
    import numpy as np

    from lawcat_edge.runtime.generate.core import Core
    from lawcat_edge.runtime.generate.request import Request
    from lawcat_edge.runtime.generate.stats import peak_memory

    rng = np.random.default_rng(0)
    vocab_size = model.engine.vocab_size
    plain: dict[str, Any] = {"ignore_eos": True, "speculate": 0}
    request = Request.of(max_new_tokens=decode_tokens + 1, **plain)
    warm = rng.integers(0, vocab_size, model.engine.chunk).tolist()
    model.generate(warm, max_new_tokens=2, **plain).result()
    if drafted:
        _repeat(model, model.context, decode_tokens, drafted)
    model.reset()  # its state takes no part in the peak
    context, seconds = model.new_context(), 0.0
    for size in sorted(set(sizes)):
        context.tokens.extend(rng.integers(0, vocab_size, size - context.fed).tolist())
        core, writer = Core(model.engine), model.writer(request, context)
        stats = writer.generation.stats
        core.insert(writer)
        while not writer.generation.tokens:
            _raise_errors(core.read())
        seconds += stats.prefill_seconds
        context, state_bytes = context.fork(), context.state.nbytes
        del context.tokens[size:]  # the first token that was written: the next context is random too
        passes = []
        while not writer.done:
            before = stats.decode_seconds
            _raise_errors(core.write())
            passes.append(stats.decode_seconds - before)
        row = {
            "context": size,
            "prefill_tokens_per_second": size / seconds,
            "decode_tokens_per_second": len(passes) / sum(passes),
            # The median is what the machine does when nobody else uses it.
            "decode_median_ms": float(np.median(passes)) * 1e3,
            "first_token_seconds": seconds,
            "state_bytes": state_bytes,
        }
        if drafted:
            row |= _repeat(model, context.fork(), decode_tokens, drafted)
        yield row | {"peak_memory_bytes": peak_memory()}


def _repeat(model: Model, context: Context, tokens: int, drafted: int) -> dict[str, Any]:
    """Read ``REPEATED`` behind `context` and go on with it; what became of the drafts."""
    options: dict[str, Any] = {"max_new_tokens": tokens + 1, "ignore_eos": True, "speculate": drafted}
    stats = model.generate(REPEATED, context=context, **options).result().stats
    return {
        "repeated_tokens_per_second": stats.decode_tokens_per_second,
        "drafted_tokens": stats.drafted_tokens,
        "accepted_tokens": stats.accepted_tokens,
    }


def _raise_errors(advances: list[Advance]) -> None:
    for advance in advances:
        if advance.error is not None:
            raise advance.error


def _sizes(text: str) -> list[int]:
    sizes = []
    for item in text.split(","):
        number = item.strip().lower()
        factor = 1024 if number.endswith("k") else 1
        number = number.removesuffix("k")
        if not number.isdecimal() or len(number) > 8 or not 1 <= int(number) * factor <= 1 << 30:
            raise LawcatError(f"--contexts has {item.strip()!r}; write numbers of tokens such as 128,2K,32K.")
        sizes.append(int(number) * factor)
    return sizes
