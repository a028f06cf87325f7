"""A local server that speaks OpenAI's API: chat completions, completions, models, with streaming.

    clients --asyncio--> parse, tokenize --bounded queue--> one model thread --bounded outboxes--> clients

A request waits for the model in its ``Answer`` alone, and the model's thread waits for no client
(``worker``). Only this module, ``answer`` and ``middleware`` import starlette or uvicorn.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import signal
import socket
import sys
import time
from array import array
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from lawcat_edge.runtime.bundle.manifest import CHAT_TEMPLATE
from lawcat_edge.runtime.errors import BundleFault, LawcatError
from lawcat_edge.runtime.generate.draft import LONGEST_DRAFT
from lawcat_edge.runtime.generate.model import Model
from lawcat_edge.runtime.server.answer import Answer
from lawcat_edge.runtime.server.middleware import Gate, error_response, is_local, read_request
from lawcat_edge.runtime.server.page import page_routes
from lawcat_edge.runtime.server.replies import model_json
from lawcat_edge.runtime.server.requests import (
    PLAIN,
    Asked,
    BadRequest,
    check_model,
    parse_chat,
    parse_completion,
    read_body,
)
from lawcat_edge.runtime.server.worker import Closing, QueueFull, Worker

LAST_WORD_SECONDS = 5  # after the grace, for readers to take what was written and the word of the end
SEND_BUFFER = 64 << 10


@dataclass(frozen=True)
class Options:
    """How to serve. names: under which the model answers (default: the bundle's). See docs/server.md."""

    names: tuple[str, ...] = ()
    parallel: int = 8
    queue: int = 16
    states: int = 8
    max_tokens: int = 32768
    max_request_bytes: int = 8 << 20
    stall_seconds: float = 60.0
    api_key: str | None = None
    check_host: bool = True
    allowed_hosts: tuple[str, ...] = ()
    cors: tuple[str, ...] = ()
    deterministic: bool = False
    speculate: int = LONGEST_DRAFT

    def __post_init__(self) -> None:
        if self.parallel < 1 or self.queue < 0 or self.states < 0:
            raise LawcatError("--parallel must be at least 1, --queue and --states at least 0.")
        if self.max_tokens < 1 or self.max_request_bytes < 1:
            raise LawcatError("--max-tokens and --max-request-mb must be larger than 0.")
        if self.api_key is not None and not self.api_key.strip():
            raise LawcatError("The API key is empty; give one, or leave --api-key out.")
        for name in self.allowed_hosts:
            if not re.fullmatch(r"(\*\.)?[a-z0-9_-]+(\.[a-z0-9_-]+)*", name):
                raise LawcatError(f"--allowed-host must be a name such as llm.example.com, not {name!r}.")
        for origin in self.cors:
            if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/?#\s]+", origin):
                raise LawcatError(f"--cors must be an origin such as https://my.example, not {origin!r}.")


def create_app(model: Model, options: Options = Options()) -> Starlette:
    """The ASGI application. It owns `model` from its start to its shutdown: use the model nowhere else."""
    service = _Service(model, options)
    gate = Middleware(
        Gate, options.api_key, check_host=options.check_host, allowed_hosts=options.allowed_hosts
    )
    middleware = [gate]
    if options.cors:
        # Any header: OpenAI's client sends a dozen of its own, and who may ask is for the origin and the key.
        cors = Middleware(
            CORSMiddleware, allow_origins=list(options.cors), allow_methods=["*"], allow_headers=["*"]
        )
        middleware.insert(0, cors)
    app = Starlette(
        routes=[
            Route("/v1/chat/completions", service.chat, methods=["POST"]),
            Route("/v1/completions", service.complete, methods=["POST"]),
            Route("/v1/models", service.models),
            Route("/v1/models/{name:path}", service.one_model),
            Route("/health", service.health),
            *page_routes(),
        ],
        middleware=middleware,
        exception_handlers={HTTPException: _http_error, Exception: _bug},
        lifespan=service.lifespan,
    )
    app.state.service = service
    return app


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. LawcatError when it cannot be had."""
    if not 0 <= port <= 65535:
        raise LawcatError(f"--port must be from 0 to 65535, not {port}.")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=128)
    except OSError as error:
        raise LawcatError(
            f"Cannot listen on {host} port {port} ({error.strerror or error}); choose another with --port."
        ) from error
    # Connections inherit it. The system would let megabytes wait for a slow reader, who then could not be
    # reached with the word of the end before the server's time is over.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
    return listener


class _Server(uvicorn.Server):
    """Ends the answers under way itself, with a word to their readers, before uvicorn breaks them off.

    uvicorn cuts whatever is left at its own deadline without a word, so nothing here may wait for the model:
    its thread can be in the middle of a long turn.
    """

    def __init__(self, config: uvicorn.Config, service: _Service, grace_seconds: float) -> None:
        super().__init__(config)
        self.service, self.grace_seconds = service, grace_seconds

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().call_later(self.grace_seconds, self.service.end)
        await super().shutdown(sockets)


def build_server(model: Model, options: Options, grace_seconds: float = 3.0) -> uvicorn.Server:
    """A uvicorn server for ``create_app``; run it with ``server.run(sockets=[listen(...)])``.

    grace_seconds: what answers under way get to end after SIGTERM.
    """
    app = create_app(model, options)
    config = uvicorn.Config(
        app,
        http="h11",
        ws="none",
        loop="asyncio",
        lifespan="on",
        log_level="warning",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        # Requests beyond the queue get a proper 429; this is for connections by the hundred.
        limit_concurrency=options.parallel + options.queue + 128,
        # For readers that do not even take the word of the end.
        timeout_graceful_shutdown=int(grace_seconds) + LAST_WORD_SECONDS,
    )
    return _Server(config, app.state.service, grace_seconds)


def serve(
    model: Model, options: Options, host: str = "127.0.0.1", port: int = 8080,
    ready: Callable[[str], None] | None = None,
) -> None:  # fmt: skip
    """Serve until SIGTERM or Ctrl-C; answers under way get a few seconds to end. ready: told the URL."""
    listener = listen(host, port)
    name = f"[{host}]" if ":" in host else host
    if not is_local(host) and options.api_key is None:
        print(f"Warning: anyone who reaches {host} can use this server; set --api-key.", file=sys.stderr)
    server = build_server(model, options)

    def end(*_: object) -> None:
        # Before uvicorn listens to signals this ends the server at its start. uvicorn raises the signal again
        # when it is done: ending on SIGTERM is success.
        server.should_exit = True

    before = signal.signal(signal.SIGTERM, end)
    try:
        if ready is not None:
            ready(f"http://{name}:{listener.getsockname()[1]}/v1")
        server.run(sockets=[listener])
    finally:
        signal.signal(signal.SIGTERM, before)
        listener.close()


class _Service:
    """The endpoints."""

    def __init__(self, model: Model, options: Options) -> None:
        self.model, self.options = model, options
        self.defaults = model.sampling_defaults(temperature=PLAIN.temperature)
        if model.bundle.has(CHAT_TEMPLATE):
            assert model.template  # that it cannot be compiled is said now, not to every client
        self.names = options.names or (model.bundle.manifest.name,)
        self.created = int(time.time())
        # One thread: a template's meter is not shared, and tokenizing must not take the model's cores.
        self.prepare = ThreadPoolExecutor(1, thread_name_prefix="lawcat-text")
        self.worker: Worker | None = None
        # What the end of the server has to be told to: answers under way, and requests being read.
        self.answers: set[Answer] = set()
        self.reading: set[asyncio.Timeout] = set()
        self.ended = False

    def end(self) -> None:
        """Take no more requests and end all answers now, whatever the model's thread is doing."""
        self.ended = True
        if self.worker is not None:
            self.worker.stop()
        for timeout in self.reading:
            timeout.reschedule(asyncio.get_running_loop().time())
        for answer in self.answers:
            answer.end()

    @contextlib.asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        options = self.options
        self.worker = Worker(
            self.model,
            options.parallel,
            options.queue,
            options.states,
            options.stall_seconds,
            options.deterministic,
            options.speculate,
        )
        try:
            yield
        finally:
            await asyncio.to_thread(self.worker.close)
            self.prepare.shutdown(wait=False, cancel_futures=True)

    async def models(self, request: Request) -> Response:
        return JSONResponse(
            {"object": "list", "data": [model_json(name, self.created) for name in self.names]}
        )

    async def one_model(self, request: Request) -> Response:
        try:
            check_model({"model": request.path_params["name"]}, self.names)
        except BadRequest as error:
            return error_response(str(error), error.status, error.param, error.code)
        return JSONResponse(model_json(request.path_params["name"], self.created))

    async def health(self, request: Request) -> Response:
        assert self.worker is not None
        return JSONResponse({"status": "ok", **asdict(self.worker.load)})

    async def chat(self, request: Request) -> Response:
        return await self._answer(request, parse_chat)

    async def complete(self, request: Request) -> Response:
        return await self._answer(request, parse_completion)

    async def _answer(self, request: Request, parse: Callable[..., Asked]) -> Response:
        assert self.worker is not None
        try:
            async with self._until_end():
                data = await read_request(request, self.options.max_request_bytes)
                # Before the work of parsing; submit checks again.
                self.worker.check_room()
                loop = asyncio.get_running_loop()
                read = await loop.run_in_executor(self.prepare, self._read, data, parse)
            answer = Answer(self.model, *read, self.options.stall_seconds)
            self.worker.submit(answer.job)
        except BadRequest as error:
            return error_response(str(error), error.status, error.param, error.code)
        except QueueFull as error:
            return error_response(str(error), 429, code="queue_full", retry_after=error.retry_after)
        except Closing as error:
            return error_response(str(error), 503, code="shutting_down", retry_after=10)
        except BundleFault as error:
            return error_response(str(error), 500, code="bundle_fault")
        except LawcatError as error:
            # Of the tokenizer or the template: about what the client sent.
            return error_response(str(error), 400)
        self.answers.add(answer)
        answer.when_over = lambda: self.answers.discard(answer)
        return answer.stream() if answer.asked.stream else await answer.whole(request)

    @contextlib.asynccontextmanager
    async def _until_end(self) -> AsyncIterator[None]:
        """Raises Closing within, when the server ends."""
        timeout = asyncio.timeout(0 if self.ended else None)
        self.reading.add(timeout)
        try:
            async with timeout:
                yield
        except TimeoutError as error:
            raise Closing("The server is shutting down.") from error
        finally:
            self.reading.discard(timeout)

    def _read(
        self, data: bytes, parse: Callable[..., Asked]
    ) -> tuple[Asked, list[array[int]], list[str] | None, str]:
        """(what is asked, token ids of each prompt, their texts if to be given out, the name)."""
        body = read_body(data)
        check_model(body, self.names)
        asked = parse(body, self.options.max_tokens, self.defaults)
        tokenizer = self.model.tokenizer
        if asked.chat:
            template = self.model.template
            called = next((i for i, told in enumerate(asked.messages) if told.get("tool_calls")), None)
            if called is not None and not template.knows_tool_calls:
                raise BadRequest(
                    "This model's chat template has no tool calls; leave them and their results out.",
                    f"messages[{called}].tool_calls",
                    "unsupported_parameter",
                )
            text = template.render(asked.messages, **asked.template)
            prompts = [tokenizer.encode(text, special=False)]
        else:
            prompts = [self.model.encode(prompt) for prompt in asked.prompts]
        if not all(prompts):
            raise BadRequest("The prompt has no tokens; give some text to go on from.")
        echo = None
        if asked.echo:
            echo = [text if isinstance(text, str) else tokenizer.decode(text) for text in asked.prompts]
        return asked, [array("I", ids) for ids in prompts], echo, body.get("model") or self.names[0]


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = {
        404: "There is nothing at this address; see /v1/models.",
        405: "The method is not allowed here.",
    }
    return error_response(message.get(error.status_code, error.detail), error.status_code)


async def _bug(request: Request, error: Exception) -> Response:
    return error_response("The server failed on this request; see its log.", 500)
