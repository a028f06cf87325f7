"""Coverage-guided fuzzing of the parsers with atheris (its own environment: pip install atheris).

    python tests/tools/fuzz.py --seconds 3600 --lanes 2 --work /tmp/fuzz     every target, one after the other
    python tests/tools/fuzz.py --keep --work /tmp/fuzz                       minimise into tests/fuzz_corpus/

An input that ends in anything but LawcatError is kept in WORK/findings/ (one for each kind and place) and the
run goes on. The last line is JSON: executions, and what was found, by target. Seeds are the kept corpus.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
KEPT = HERE.parent / "fuzz_corpus"
PATHS = [str(HERE), str(HERE.parent / "helpers"), str(HERE.parent.parent)]
NAMES = ["manifest", "onnx_graph", "snapshot", "safetensors", "adapter_config", "ranges"]
NAMES += ["template", "request", "settings"]
_TAG = re.compile(r"(\{\{.*?\}\}|\{%.*?%\})", re.DOTALL)
SLOW_SECONDS = {"template": 60}  # of one execution; a template is rendered eleven times, for 5 s at most
MEMORY_MB = 2000  # atheris itself grows by 20 KB an execution of long JSON; the parsers do not


def fuzz_one(name: str, work: Path, options: list[str]) -> None:
    """In a process of its own: atheris takes it over and never returns."""
    import atheris

    sys.path[:0] = PATHS
    with atheris.instrument_imports(include=["lawcat_edge", "fuzz_targets"]):
        import fuzz_targets
    seen: set[str] = set()

    def test(data: bytes) -> None:
        try:
            fuzz_targets.run(name, data)
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)
            place = f"{type(error).__name__} at {Path(frames[-1].filename).name}:{frames[-1].lineno}"
            if place not in seen:
                seen.add(place)
                key = hashlib.sha256(place.encode()).hexdigest()[:12]
                (work / "findings" / f"{name}-{key}").write_bytes(data)
                (work / "findings" / f"{name}-{key}.txt").write_text(traceback.format_exc())

    mutator = (
        {"custom_mutator": _template_mutator(lambda *given: atheris.Mutate(*given))}
        if name == "template"
        else {}
    )
    atheris.Setup([sys.argv[0], *options], test, **mutator)
    atheris.Fuzz()


def _template_mutator(mutate: Callable[[bytes, int], bytes]) -> Callable[[bytes, int, int], bytes]:
    """Half of the mutations insert, delete or swap whole tags and expressions of known templates.

    Changed bytes alone hardly ever make a template that can be compiled.
    """
    from chat_templates import CONSTRUCTS, TEMPLATES

    known = "".join((*TEMPLATES.values(), *CONSTRUCTS.values()))
    tags = sorted(set(_TAG.findall(known)))
    parts = sorted(
        {part for tag in tags for part in re.findall(r"[|.]?\w+\([^()]*\)|[|.]\w+|\[[^\[\]]*\]|'[^']*'", tag)}
    )

    def change(data: bytes, max_size: int, seed: int) -> bytes:
        draw = random.Random(seed)
        if draw.random() < 0.5:
            return mutate(data, max_size)
        pieces = _TAG.split(data.decode("utf-8", "replace"))
        for _ in range(draw.randint(1, 4)):
            at = draw.randrange(len(pieces))
            kind = draw.randrange(4)
            if kind == 0:
                pieces.insert(at, draw.choice(tags))
            elif kind == 1 and len(pieces) > 1:
                del pieces[at]
            elif kind == 2:
                other = draw.randrange(len(pieces))
                pieces[at], pieces[other] = pieces[other], pieces[at]
            else:
                cut = [match.end() for match in re.finditer(r"\w+", pieces[at])] or [0]
                place = draw.choice(cut)
                pieces[at] = pieces[at][:place] + draw.choice(parts) + pieces[at][place:]
        return "".join(pieces).encode("utf-8", "replace")[:max_size]

    return change


def fuzz_for(name: str, seconds: float, work: Path) -> dict[str, Any]:
    """Fuzz one target; after a crash, a hang or too much memory a new process goes on."""
    corpus = work / "corpus" / name
    corpus.mkdir(parents=True, exist_ok=True)
    seeds = KEPT / name
    if name == "template":
        _add_known_templates(corpus)
    words = HERE / f"{name}.dict"
    end, executions, stops = time.monotonic() + seconds, 0, 0
    while (left := int(end - time.monotonic())) > 5:
        options = [str(corpus), *([str(seeds)] if seeds.is_dir() else []), f"-max_total_time={left}"]
        options += [
            "-print_final_stats=1",
            "-max_len=16384",
            f"-timeout={SLOW_SECONDS.get(name, 10)}",
            "-verbosity=0",
        ]
        options += [f"-dict={words}"] if words.is_file() else []
        options += [f"-rss_limit_mb={MEMORY_MB}", f"-artifact_prefix={work}/findings/{name}-"]
        command = [sys.executable, __file__, "--one", name, "--work", str(work), "--", *options]
        done = subprocess.run(command, capture_output=True, text=True, timeout=left + 120, check=False)
        found = re.search(r"number_of_executed_units:\s*(\d+)", done.stderr)
        executions += int(found[1]) if found else 0
        if done.returncode:
            stops += 1
            (work / "findings" / f"{name}-stop-{stops}.txt").write_text(done.stderr[-20000:])
            if not found:
                break
    bad = sorted(path.name for path in (work / "findings").glob(f"{name}-*") if path.suffix != ".txt")
    return {"seconds": round(seconds), "executions": executions, "stops": stops, "findings": bad}


def _add_known_templates(corpus: Path) -> None:
    """Begin with what well-known models' templates are made of."""
    sys.path[:0] = PATHS
    from chat_templates import CONSTRUCTS, TEMPLATES

    for source in (*TEMPLATES.values(), *CONSTRUCTS.values()):
        data = source.encode()
        (corpus / hashlib.sha256(data).hexdigest()[:16]).write_bytes(data)


def keep(work: Path, names: list[str], largest: int = 4096) -> dict[str, int]:
    """Add to tests/fuzz_corpus/ what reaches lines that nothing kept before reaches, the shortest first."""
    sys.path[:0] = PATHS
    import fuzz_targets

    kept = {}
    for name in names:
        reached: set[tuple[str, int, int]] = set()
        for path in sorted((KEPT / name).iterdir()):
            reached |= lines_of(fuzz_targets.TARGETS[name], path.read_bytes())
        found = sorted((work / "corpus" / name).iterdir(), key=lambda path: (path.stat().st_size, path.name))
        for path in found:
            data = path.read_bytes()
            if len(data) <= largest:
                lines = lines_of(fuzz_targets.TARGETS[name], data)
                if not lines <= reached:
                    reached |= lines
                    (KEPT / name / hashlib.sha256(data).hexdigest()[:16]).write_bytes(data)
        kept[name] = len(list((KEPT / name).iterdir()))
    return kept


def lines_of(function: Callable[[bytes], Any], data: bytes) -> set[tuple[str, int, int]]:
    """(file, line before, line) of this project's code that `function` goes through with `data`."""
    seen: set[tuple[str, int, int]] = set()
    before: dict[str, int] = {}

    def trace(frame: Any, event: str, argument: Any) -> Any:
        name = frame.f_code.co_filename
        if "lawcat_edge" not in name and "/runtime/" not in name and "/calibration/" not in name:
            return None
        seen.add((name, before.get(name, 0), frame.f_lineno))
        before[name] = frame.f_lineno
        return trace

    sys.settrace(trace)
    try:
        function(data)
    except Exception:  # a finding: its own file says so
        pass
    finally:
        sys.settrace(None)
    return seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60, help="of all targets together")
    parser.add_argument("--lanes", type=int, default=1, help="targets at once")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--targets", default=",".join(NAMES))
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--one")
    parser.add_argument("options", nargs="*")
    given = parser.parse_args()
    (given.work / "findings").mkdir(parents=True, exist_ok=True)
    if given.one:
        fuzz_one(given.one, given.work, given.options)
        return
    names = given.targets.split(",")
    if given.keep:
        print(json.dumps({"kept": keep(given.work, names)}))
        return
    share = given.seconds / len(names)
    with ThreadPoolExecutor(given.lanes) as pool:
        results = list(pool.map(lambda name: fuzz_for(name, share, given.work), names))
    report = dict(zip(names, results, strict=True))
    total = sum(result["executions"] for result in results)
    print(json.dumps({"seconds": given.seconds, "executions": total, "targets": report}))


if __name__ == "__main__":
    main()
