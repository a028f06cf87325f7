"""``lawcat-edge serve``: OpenAI's API on this machine, from a bundle."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from lawcat_edge.commands.generate import SPECULATE_HELP, speculation
from lawcat_edge.runtime.errors import LawcatError


def serve(
    model: Annotated[str, typer.Argument(help="Bundle folder, or owner/name on the hub.")],
    host: Annotated[
        str, typer.Option(help="Address to listen on; the default is this machine only.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.")] = 8080,
    name: Annotated[
        list[str] | None,
        typer.Option(help="Name the model answers to; may be repeated. Default: the bundle's."),
    ] = None,
    parallel: Annotated[int, typer.Option(help="Answers written at the same time.")] = 8,
    queue: Annotated[int, typer.Option(help="Requests that may wait; further ones get status 429.")] = 16,
    states: Annotated[int, typer.Option(help="States of texts kept for prompts that begin like them.")] = 8,
    max_tokens: Annotated[int, typer.Option(help="Longest answer a request may ask for.")] = 32768,
    max_request_mb: Annotated[float, typer.Option(help="Largest request.")] = 8.0,
    api_key: Annotated[
        str | None, typer.Option(envvar="LAWCAT_EDGE_API_KEY", help="Clients must send this key.")
    ] = None,
    cors: Annotated[
        list[str] | None,
        typer.Option(help="Web origin that may use the server from a browser; may be repeated."),
    ] = None,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(
            help="Host name that may be asked for beside localhost, as by a proxy; may be repeated."
        ),
    ] = None,
    speculate: Annotated[str | None, typer.Option(help=SPECULATE_HELP)] = None,
    deterministic: Annotated[
        bool,
        typer.Option(
            "--deterministic", help="One answer at a time, from its beginning: the same to the last bit."
        ),
    ] = False,
    threads: Annotated[int | None, typer.Option(help="Processor threads; default: physical cores.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Say where it listens as one JSON document.")] = False,
) -> None:
    """Serve MODEL: a page to talk with it, and OpenAI's API below /v1.

    Ends on Ctrl-C or SIGTERM, giving answers under way a few seconds.

    Examples:

      lawcat-edge serve bundle

      lawcat-edge serve bundle --port 0 --json

      curl http://127.0.0.1:8080/v1/chat/completions -H 'Content-Type: application/json'
      -d '{"messages": [{"role": "user", "content": "What is a lighthouse for?"}]}'
    """
    if not 0 < max_request_mb <= 1024:  # also refuses NaN
        raise LawcatError("--max-request-mb must be from 0 to 1024.")
    from lawcat_edge.runtime import Model
    from lawcat_edge.runtime.server.app import Options
    from lawcat_edge.runtime.server.app import serve as run
    from lawcat_edge.runtime.server.middleware import is_local

    host = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    options = Options(
        names=tuple(name or ()),
        parallel=parallel,
        queue=queue,
        states=states,
        max_tokens=max_tokens,
        max_request_bytes=int(max_request_mb * (1 << 20)),
        api_key=api_key,
        deterministic=deterministic,
        **speculation(speculate),
        check_host=is_local(host) or bool(allowed_host),
        allowed_hosts=tuple(name.lower().removesuffix(".") for name in allowed_host or ()),
        cors=tuple(origin.strip().removesuffix("/") for origin in cors or ()),
    )
    loaded = Model.load(model, threads=threads)
    names = list(options.names or (loaded.bundle.manifest.name,))

    def ready(url: str) -> None:
        if json_:
            print(json.dumps({"url": url, "models": names}), flush=True)
        else:
            page = url.removesuffix("/v1")
            print(
                f"Serving {', '.join(names)} on {url}\nA page to talk with it: {page}/ (Ctrl-C ends it)",
                file=sys.stderr,
                flush=True,
            )

    run(loaded, options, host, port, ready)
