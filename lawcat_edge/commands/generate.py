"""``lawcat-edge generate``: continue a prompt, or answer it, from a bundle."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lawcat_edge.commands.output import dump_json
from lawcat_edge.runtime.errors import LawcatError

if TYPE_CHECKING:
    from lawcat_edge.runtime import Context, Generation, Model

MAX_TEXT_BYTES = 1 << 30
SPECULATE_HELP = "Tokens drafted at most where the text repeats itself, or off; default: 16."


def speculation(text: str | None) -> dict[str, int]:
    """The option of ``Model.generate`` that --speculate asks for; none where it is not given."""
    from lawcat_edge.runtime.generate.draft import MOST_DRAFTED

    if text is None:
        return {}
    if text != "off" and not (text.isdecimal() and len(text) < 3 and 1 <= int(text) <= MOST_DRAFTED):
        raise LawcatError(f"--speculate must be from 1 to {MOST_DRAFTED} tokens, or off, not {text!r}.")
    return {"speculate": 0 if text == "off" else int(text)}


def read_text(path: Path) -> str:
    """A text file in UTF-8. Raises LawcatError for another encoding, a binary or an empty file."""
    from lawcat_edge.runtime.encoding import decode_text
    from lawcat_edge.runtime.files import read_bytes

    return decode_text(read_bytes(path, MAX_TEXT_BYTES), str(path))


def show_stats(stats: Any, stream: Any = None) -> None:
    """One line of figures, on stderr unless told otherwise."""
    parts = [f"{stats.prompt_tokens:,} tokens read"]
    if stats.prefill_tokens_per_second:
        parts[0] += f" at {stats.prefill_tokens_per_second:,.0f}/s"
    if stats.reused_tokens:
        parts.append(f"{stats.reused_tokens:,} from the state")
    parts.append(f"{stats.new_tokens:,} written")
    if stats.decode_tokens_per_second:
        parts[-1] += f" at {stats.decode_tokens_per_second:,.1f}/s"
    if stats.drafted_tokens:
        parts.append(f"{stats.accepted_tokens:,} of {stats.drafted_tokens:,} drafted accepted")
    parts.append(f"state {stats.state_bytes / 1e6:.1f} MB")
    if stats.peak_memory_bytes:
        parts.append(f"peak memory {stats.peak_memory_bytes / 1e6:,.0f} MB")
    print("[" + ", ".join(parts) + "]", file=stream or sys.stderr)


def generate(
    model: Annotated[str, typer.Argument(help="Bundle folder, or owner/name on the hub.")],
    prompt: Annotated[
        str | None, typer.Option(help="Text to continue, or the question with --chat; - reads it from stdin.")
    ] = None,
    file: Annotated[Path | None, typer.Option(help="A long UTF-8 text to read first.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Apply the model's chat template.")] = False,
    system: Annotated[str | None, typer.Option(help="System prompt, with --chat.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Stop after so many tokens.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 always takes the most likely token.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Keep the k most likely tokens (0: all).")] = 0,
    top_p: Annotated[float, typer.Option(help="Keep the fewest tokens of this total probability.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="Drop tokens less likely than this times the best.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1 discourages repeating.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Same seed, same text.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be repeated.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Do not stop at end tokens.")] = False,
    logprobs: Annotated[
        int | None, typer.Option(help="With --json: log-probabilities, and so many alternatives a token.")
    ] = None,
    speculate: Annotated[str | None, typer.Option(help=SPECULATE_HELP)] = None,
    load_snapshot: Annotated[Path | None, typer.Option(help="Go on from this saved state.")] = None,
    save_snapshot: Annotated[Path | None, typer.Option(help="Save the state at the end here.")] = None,
    threads: Annotated[int | None, typer.Option(help="Processor threads; default: physical cores.")] = None,
    json_: Annotated[
        bool, typer.Option("--json", help="Print one JSON document instead of a stream.")
    ] = False,
) -> None:
    """Generate text from MODEL and stream it.

    Examples:

      lawcat-edge generate bundle --prompt "Dear Ada," --max-new-tokens 100

      lawcat-edge generate bundle --chat --prompt "What is a ring buffer?" --temperature 0.7 --seed 1

      lawcat-edge generate bundle --file report.txt --save-snapshot report.state

      lawcat-edge generate bundle --load-snapshot report.state --chat --prompt "Who wrote it?"
    """
    if prompt is None and not (save_snapshot or load_snapshot):
        raise LawcatError(
            "There is nothing to answer; give --prompt TEXT (with --file, also --save-snapshot)."
        )
    if system is not None and not chat:
        raise LawcatError("--system needs --chat.")
    if prompt == "-":
        from lawcat_edge.runtime.encoding import decode_text

        prompt = decode_text(sys.stdin.buffer.read(MAX_TEXT_BYTES), "The standard input")
    document = read_text(file) if file else None

    from lawcat_edge.runtime import Model

    loaded = Model.load(model, threads=threads)
    context = loaded.restore(load_snapshot) if load_snapshot else None
    if chat and document and prompt is not None:
        prompt, document = f"{document}\n\n{prompt}", None
    if document is not None:
        context = loaded.read(document, context)
    options = {
        "max_new_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p,
        "min_p": min_p, "repetition_penalty": repetition_penalty, "seed": seed, "stop": stop or (),
        "ignore_eos": ignore_eos, "logprobs": logprobs, **speculation(speculate),
    }  # fmt: skip
    running = _start(loaded, prompt, chat, system, context, options, reading=document is not None)
    if running is None:
        _report_read(loaded, json_, loaded.snapshot(save_snapshot) if save_snapshot else None)
        return
    if json_:
        result = running.result().to_dict()
        if save_snapshot:
            loaded.snapshot(save_snapshot)
            result["snapshot"] = str(save_snapshot)
        print(dump_json(result))
        return
    for text in running:
        print(text, end="", flush=True)
    print()
    show_stats(running.stats)
    if save_snapshot:
        loaded.snapshot(save_snapshot)
        print(f"State saved to {save_snapshot}.", file=sys.stderr)


def _start(
    model: Model,
    prompt: str | None,
    chat: bool,
    system: str | None,
    context: Context | None,
    options: dict[str, Any],
    reading: bool,
) -> Generation | None:
    if chat and prompt is not None:
        return model.chat(prompt, system=system, context=context, **options)
    if prompt is None and reading:
        return None
    return model.generate(prompt or "", context=context, **options)


def _report_read(model: Model, as_json: bool, snapshot: Any) -> None:
    tokens, size = len(model.context), model.context.state.nbytes
    if as_json:
        print(json.dumps({"text": "", "context_tokens": tokens, "state_bytes": size}))
    else:
        saved = " and saved" if snapshot is not None else ""
        print(f"{tokens:,} tokens read{saved}; the state has {size / 1e6:.1f} MB.", file=sys.stderr)
