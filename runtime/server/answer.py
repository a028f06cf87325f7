"""One request on its way: pieces come from the model's thread and go out whole or as server-sent events."""

from __future__ import annotations

import asyncio
import contextlib
from array import array
from collections.abc import AsyncIterator, Callable, Sequence

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from lawcat_edge.runtime.generate.model import Model
from lawcat_edge.runtime.server.middleware import error_response, until_gone
from lawcat_edge.runtime.server.replies import Reply, error_json, sse
from lawcat_edge.runtime.server.requests import Asked
from lawcat_edge.runtime.server.worker import Job, Piece

HEARTBEAT_SECONDS = 15.0


class Answer:
    """One request on its way: the pieces from the model's thread, as a response."""

    def __init__(
        self,
        model: Model,
        asked: Asked,
        prompts: Sequence[array[int]],
        echo: Sequence[str] | None,
        name: str,
        stall_seconds: float,
    ) -> None:
        self.asked, self.stall_seconds = asked, stall_seconds
        loop = asyncio.get_running_loop()
        self.signal = asyncio.Event()
        self.ended = False
        self.when_over: Callable[[], object] = lambda: None
        self.job = Job(prompts, asked.request, lambda: _call(loop, self.signal.set), echo=echo)
        fingerprint = "lawcat-" + model.bundle.sha256[:12]
        logprobs = asked.request.logprobs is not None
        self.reply = Reply(model.tokenizer, name, fingerprint, asked.chat, logprobs)

    def end(self) -> None:
        """Give out what there is and then the word of the end, without waiting for the model's thread."""
        self.ended = True
        self.signal.set()

    async def pieces(self) -> AsyncIterator[Piece | None]:
        """The pieces up to the last; None now and then while there is nothing."""
        while True:
            try:
                async with asyncio.timeout(HEARTBEAT_SECONDS):
                    await self.signal.wait()
            except TimeoutError:
                yield None
                continue
            self.signal.clear()
            for piece in self.job.take():
                yield piece
                if self.job.is_last(piece):
                    return
            if self.ended:
                yield Piece("", reason="cancelled")
                return

    async def whole(self, request: Request) -> Response:
        watch = asyncio.ensure_future(until_gone(request.receive))
        watch.add_done_callback(lambda _: self.job.cancel())
        try:
            pieces = [piece async for piece in self.pieces() if piece is not None]
        finally:
            watch.cancel()
            self.over()
        last = pieces[-1]
        if last.reason == "error":
            return error_response(last.text, 500)
        if last.reason == "cancelled":
            return error_response("The server is shutting down.", 503, code="shutting_down", retry_after=10)
        return JSONResponse(self.reply.whole(pieces, self.job))

    def over(self) -> None:
        """The answer is written, or nobody is there to read it."""
        self.job.cancel()
        self.when_over()

    def stream(self) -> Response:
        return _EventStream(self)

    async def events(self) -> AsyncIterator[bytes]:
        if (first := self.reply.first()) is not None:
            yield sse(first)
        async for piece in self.pieces():
            if piece is None:
                yield b": waiting\n\n"
            elif piece.reason == "error":
                yield sse(error_json(piece.text, 500))
                return
            elif piece.reason == "cancelled":
                yield sse(error_json("The server ended this answer; ask again.", 503, code="cancelled"))
                return
            else:
                if piece.text or piece.choices:
                    yield sse(self.reply.piece(piece))
                if piece.reason:
                    yield sse(self.reply.last(piece))
        if self.asked.include_usage:
            yield sse(self.reply.usage(self.job))
        yield sse("[DONE]")


class _EventStream(Response):
    """Server-sent events; ends the job when the client goes away or stops reading."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self.headers["content-type"] = "text/event-stream; charset=utf-8"
        del self.headers["content-length"]
        self.answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        write = asyncio.ensure_future(self._write(send))
        gone = asyncio.ensure_future(until_gone(receive))
        try:
            await asyncio.wait([write, gone], return_when=asyncio.FIRST_COMPLETED)
            if write.done():
                with contextlib.suppress(TimeoutError):  # nobody reads: uvicorn closes the connection
                    write.result()
        finally:
            self.answer.over()
            for task in (write, gone):
                task.cancel()

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        stall = self.answer.stall_seconds
        async for event in self.answer.events():
            async with asyncio.timeout(2 * stall):  # `send` waits while the client does not read
                await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _call(loop: asyncio.AbstractEventLoop, function: Callable[[], None]) -> None:
    """Call `function` in the loop's thread; nothing if the loop is gone."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(function)
