"""A server in a thread of the test, and what to ask it with."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lawcat_edge.runtime import Model
from lawcat_edge.runtime.server.app import Options, build_server, listen


def load(folder: Path) -> Model:
    return Model.load(folder, threads=1, chunk=16)


class Running:
    """A server in a thread."""

    def __init__(self, port: int, server: Any) -> None:
        self.port, self.server = port, server

    def client(self, **options: Any) -> Any:
        options = {"api_key": "none", "max_retries": 0, "timeout": 60, **options}
        import openai

        return openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", **options)

    def raw(
        self, method: str, path: str, body: bytes | None = None, **headers: str
    ) -> tuple[int, dict[str, str], Any]:
        """(status, headers, JSON) of a request made by hand."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, body, {"Content-Type": "application/json", **names})
        response = connection.getresponse()
        data = response.read()
        connection.close()
        return response.status, {k.lower(): v for k, v in response.getheaders()}, json.loads(data)

    def preflight(self, headers: dict[str, str]) -> tuple[int, dict[str, str]]:
        """(status, headers) of what a browser asks before a web page's request."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        connection.request("OPTIONS", "/v1/chat/completions", None, headers)
        response = connection.getresponse()
        response.read()
        connection.close()
        return response.status, {k.lower(): v for k, v in response.getheaders()}

    def health(self) -> dict[str, Any]:
        return self.raw("GET", "/health")[2]


@contextmanager
def running(folder: Path, **options: Any) -> Iterator[Running]:
    listener = listen("127.0.0.1", 0)
    server = build_server(load(folder), Options(**options), grace_seconds=0.2)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        until(lambda: server.started)
        yield Running(listener.getsockname()[1], server)
    finally:
        server.should_exit = True
        thread.join(20)
        listener.close()
        assert not thread.is_alive()


def until(condition: Callable[[], Any], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)
