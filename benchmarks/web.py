#!/usr/bin/env python3
"""A bundle in a browser and in the Python runner: the same greedy tokens? How fast?

    python benchmarks/web.py BUNDLE [--flavours portable] [--tokens 48] [--chromium PATH]

Builds runtime/web (npm, with what package-lock.json pins), serves it with Python's plain file server, opens
it in a headless Chromium, has it verify the bundle (its recorded parity vectors) and write --tokens tokens
after a prompt and after a chat message, greedily; onnxruntime-web runs on one thread. The Python runner does
the same with the same graph, and with its own default. Prints a table; the last line of output is one JSON
document. Exit code 1 if the tokens of the same graph differ, which those of "ort" may: its 8-bit products
round activations on x86 and not in wasm. Needs node (20 or newer), npm and Chromium.
"""

from __future__ import annotations

import argparse
import functools
import http.server
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lawcat_edge.runtime import Model

WEB = Path(__file__).parent.parent / "runtime" / "web"
PROMPT, MESSAGE = "The lighthouse stands on", "Why do ships need lighthouses?"


class MissingError(RuntimeError):
    """Something outside Python that the page's test needs is not here."""


def chromium() -> str:
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    if found is None:
        raise MissingError(
            "Chromium is missing; install it (Debian: `apt-get install chromium`) or set CHROMIUM."
        )
    return found


def build(folder: Path) -> Path:
    """The page, built in a copy under `folder`, so that the checkout stays as it is; where it was built."""
    copy = folder / "web"
    shutil.copytree(WEB, copy, ignore=shutil.ignore_patterns("node_modules", "dist"))
    if (WEB / "node_modules").is_dir():
        (copy / "node_modules").symlink_to(WEB / "node_modules")
    else:
        _npm(copy, "ci", "--ignore-scripts", "--no-audit", "--no-fund")
    _npm(copy, "run", "build")
    return copy


def _npm(folder: Path, *arguments: str) -> None:
    npm = shutil.which("npm")
    if npm is None or shutil.which("node") is None:
        raise MissingError("node and npm are missing; install node 20 or newer.")
    done = subprocess.run([npm, *arguments], cwd=folder, capture_output=True, text=True, timeout=600)
    if done.returncode:
        raise MissingError(f"`npm {arguments[0]}` failed: {done.stderr[-400:].strip()}")


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def serve(folder: Path) -> Iterator[str]:
    """A plain static file server of `folder` on this machine; its address."""
    handler = functools.partial(_Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()


def drive(
    built: Path, jobs: list[list[Any]], bundles: dict[str, Path], timeout: float = 1200
) -> dict[str, Any]:
    """Do `jobs` (see runtime/web/test/drive.mjs) in the page, each bundle at its name beside the page."""
    with tempfile.TemporaryDirectory(dir=built.parent) as folder:
        site = Path(folder) / "site"
        shutil.copytree(built / "dist", site)
        for name, path in bundles.items():
            (site / name).symlink_to(path.resolve())
        with serve(site) as address:
            return drive_at(built, address, jobs, timeout)


def drive_at(built: Path, address: str, jobs: list[list[Any]], timeout: float = 1200) -> dict[str, Any]:
    """The same with the page at an address."""
    done = subprocess.run(
        ["node", str(built / "test" / "drive.mjs"), chromium(), address],
        input=json.dumps(jobs), capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"the browser failed: {done.stderr[-2000:]}")
    return {**json.loads(done.stdout.splitlines()[-1]), "log": done.stderr}


def in_browser(built: Path, bundle: Path, flavour: str, tokens: int) -> dict[str, Any]:
    options = json.dumps({"maxNewTokens": tokens})
    prompt, message = json.dumps(PROMPT), json.dumps(MESSAGE)
    jobs = [
        ["eval", f"return lawcat.load({{url: location.href + 'bundle/', flavour: '{flavour}'}})"],
        ["eval", "return lawcat.ask('verify')"],
        ["eval", f"return lawcat.ask('generate', {{prompt: {prompt}, options: {options}}})"],
        ["eval", f"await lawcat.ask('reset'); return lawcat.say({message}, {options})"],
    ]
    found = drive(built, jobs, {"bundle": bundle})
    for result in found["results"]:
        if "error" in result:
            raise SystemExit(f"{flavour}: {result['error']}")
    about, check, text, talk = (result["ok"] for result in found["results"])
    return {
        "browser": found["browser"],
        "load_seconds": about["seconds"],
        "parity_error": check["error"],
        "parity_passed": check["passed"],
        "generate": text["tokens"],
        "chat": talk["tokens"],
        "read_tok_s": talk["stats"]["prefillTokensPerSecond"],
        "write_tok_s": talk["stats"]["decodeTokensPerSecond"],
        "outside_requests": found["outside"],
    }


def in_python(bundle: Path, flavour: str | None, tokens: int) -> dict[str, Any]:
    begin = time.perf_counter()
    model = Model.load(bundle, threads=1, flavour=flavour)
    load = time.perf_counter() - begin
    text = model.generate(PROMPT, max_new_tokens=tokens).result()
    model.reset()
    talk = model.chat(MESSAGE, max_new_tokens=tokens).result()
    return {
        "flavour": model.engine.flavour,
        "load_seconds": load,
        "generate": text.tokens,
        "chat": talk.tokens,
        "read_tok_s": talk.stats.prefill_tokens_per_second,
        "write_tok_s": talk.stats.decode_tokens_per_second,
    }


def agreement(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, int]:
    """How many tokens from the start are the same, of each text."""
    result = {}
    for what in ("generate", "chat"):
        pairs = list(zip(ours[what], theirs[what], strict=False))
        result[what] = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
        result[f"{what}_of"] = max(len(ours[what]), len(theirs[what]))
    return result


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--flavours", default="portable")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--chromium")
    args = parser.parse_args()
    if args.chromium:
        os.environ["CHROMIUM"] = args.chromium
    default = in_python(args.bundle, None, args.tokens)
    report: dict[str, Any] = {
        "bundle": args.bundle.name,
        "load_average": os.getloadavg()[0],
        "tokens": args.tokens,
        "flavours": {},
    }
    same = True
    print(f"{'':22} {'load s':>7} {'read/s':>7} {'write/s':>8}   same tokens: prompt, chat")
    with tempfile.TemporaryDirectory() as folder:
        built = build(Path(folder))
        for flavour in args.flavours.split(","):
            python = in_python(args.bundle, flavour, args.tokens)
            browser = in_browser(built, args.bundle, flavour, args.tokens)
            agree = agreement(browser, python)
            row = {
                "python": python,
                "browser": browser,
                "agreement": agree,
                "agreement_with_default": agreement(browser, default),
            }
            same &= all(agree[what] == agree[f"{what}_of"] for what in ("generate", "chat"))
            same &= browser["parity_passed"] and not browser["outside_requests"]
            report["flavours"][flavour] = row
            for name, side in (("python", python), ("browser", browser)):
                print(
                    f"{flavour + ', ' + name:22} {side['load_seconds']:>7.1f} {side['read_tok_s']:>7.1f} "
                    f"{side['write_tok_s'] or 0:>8.1f}   {agree['generate']}/{agree['generate_of']}, "
                    f"{agree['chat']}/{agree['chat_of']}",
                    flush=True,
                )
    print(json.dumps(report))
    return 0 if same else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except MissingError as error:
        sys.exit(str(error))
