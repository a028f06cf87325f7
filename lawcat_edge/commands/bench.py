"""``lawcat-edge bench``: tokens a second and memory against the length of the context."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from lawcat_edge.runtime.errors import LawcatError


def bench(
    model: Annotated[str, typer.Argument(help="Bundle folder, or owner/name on the hub.")],
    contexts: Annotated[
        str, typer.Option(help="Tokens of context, such as 128,2K,32K.")
    ] = "128,512,2048,8192",
    decode_tokens: Annotated[int, typer.Option(help="Tokens generated at each context.")] = 64,
    chunk: Annotated[
        int | None, typer.Option(help="Tokens of a prompt read at once; default: what suits the model.")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Processor threads; default: physical cores.")] = None,
    flavour: Annotated[str | None, typer.Option(help="Graph: ort, onnx or portable.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the report as JSON here.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Measure prefill and decode speed, time to the first token, memory and state of MODEL.

    One state reads on from context to context, so the longest one costs its length once.

    Examples:

      lawcat-edge bench bundle --contexts 128,2K,32K

      lawcat-edge bench bundle --threads 1 --json
    """
    sizes = _sizes(contexts)
    if not 2 <= decode_tokens <= 1 << 20:
        raise LawcatError(f"--decode-tokens must be at least 2, not {decode_tokens}.")
    import onnxruntime

    from lawcat_edge.runtime import Bundle, Engine
    from lawcat_edge.runtime.bundle.manifest import describe_state, state_sizes

    begin = time.perf_counter()
    engine = Engine(Bundle.open(model), threads=threads, flavour=flavour, chunk=chunk)
    manifest = engine.bundle.manifest
    sizes_of_state = state_sizes(manifest.state, manifest.spans)
    report: dict[str, Any] = {
        "model": model,
        "scheme": manifest.scheme,
        "flavour": engine.flavour,
        "threads": engine.threads,
        "chunk": engine.chunk,
        "onnxruntime": onnxruntime.__version__,
        "bytes": engine.bundle.bytes_on_disk,
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
        print("{:>9} {:>10} {:>9} {:>14} {:>9} {:>8}".format(*columns))
    for row in measure(engine, sizes, decode_tokens):
        report["contexts"].append(row)
        line = (
            f"{row['context']:>9,} {row['prefill_tokens_per_second']:>10,.1f} "
            f"{row['decode_tokens_per_second']:>9,.1f} {row['first_token_seconds']:>14.2f} "
            f"{row['state_bytes'] / 1e6:>9,.2f} "
            f"{(row['peak_memory_bytes'] or 0) / 1e6:>8,.0f}"
        )
        print(line, file=sys.stderr if json_ else sys.stdout, flush=True)
    if out is not None:
        from lawcat_edge.runtime.files import write_json

        write_json(out, report)
    if json_:
        print(json.dumps(report))


def measure(engine: Any, sizes: list[int], decode_tokens: int) -> Any:
    """Yield a row for each context length, shortest first; random tokens (seed 0), which cost the same."""
    import numpy as np

    from lawcat_edge.runtime.generate.stats import peak_memory

    rng = np.random.default_rng(0)
    state = engine.new_state()
    engine.prefill(rng.integers(0, engine.vocab_size, engine.chunk), engine.new_state())  # warm
    engine.prefill([1], engine.new_state())
    seconds = 0.0
    for size in sorted(set(sizes)):
        ids = rng.integers(0, engine.vocab_size, size - state.position)
        begin = time.perf_counter()
        logits = engine.prefill(ids, state)
        token = int(logits[0].argmax())
        seconds += time.perf_counter() - begin
        branch = state.copy()
        times = []
        for _ in range(decode_tokens):
            begin = time.perf_counter()
            token = int(engine.forward(np.array([[token]], np.int64), branch)[0].argmax())
            times.append(time.perf_counter() - begin)
        yield {
            "context": size,
            "prefill_tokens_per_second": size / seconds,
            "decode_tokens_per_second": len(times) / sum(times),
            # The median is what the machine does when nobody else uses it.
            "decode_median_ms": float(np.median(times)) * 1e3,
            "first_token_seconds": seconds,
            "peak_memory_bytes": peak_memory(),
            "state_bytes": state.nbytes,
        }


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
