"""``lawcat-edge verify``: is the bundle whole, and does it compute what it computed when it was exported?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from lawcat_edge.runtime.errors import CheckFailed


def verify(
    model: Annotated[str, typer.Argument(help="Bundle folder, or owner/name on the hub.")],
    threads: Annotated[int | None, typer.Option(help="Processor threads; default: physical cores.")] = None,
    public_key: Annotated[
        Path | None, typer.Option(help="PEM file: the bundle must be signed with its private key.")
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Check hashes, sizes and shapes of MODEL, load it, and replay its recorded logits.

    Exit code 0: all is well; 1: something is off, with the reason.

    Examples:

      lawcat-edge verify bundle

      lawcat-edge verify bundle --json

      lawcat-edge verify bundle --public-key maker.pub
    """
    from lawcat_edge.runtime.bundle.verify import Check
    from lawcat_edge.runtime.bundle.verify import verify as check_bundle

    passed: list[dict[str, Any]] = []

    def report(check: Check) -> None:
        passed.append({"name": check.name, "detail": check.detail})
        if not json_:
            print(f"ok  {check.name}: {check.detail}")

    try:
        check_bundle(model, threads=threads, report=report, public_key=public_key)
    except CheckFailed as error:
        if json_:
            print(json.dumps({"model": model, "ok": False, "reason": str(error), "checks": passed}))
        raise
    if json_:
        print(json.dumps({"model": model, "ok": True, "reason": None, "checks": passed}))
    else:
        print(f"{model} is whole and computes what it should.")
