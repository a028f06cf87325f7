"""Who may ask: the checks on every request before any of it is read, and the reading itself."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
from collections.abc import Sequence
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from lawcat_edge.runtime.server.page import PATHS
from lawcat_edge.runtime.server.replies import error_json
from lawcat_edge.runtime.server.requests import BadRequest

BODY_SECONDS = 60.0  # to send the whole of a request


def error_response(
    message: str,
    status: int,
    param: str | None = None,
    code: str | None = None,
    retry_after: int | None = None,
) -> JSONResponse:
    headers = None if retry_after is None else {"Retry-After": str(retry_after)}
    return JSONResponse(error_json(message, status, param, code), status, headers)


def is_local(host: str) -> bool:
    """Whether an address to bind to can be reached from this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Gate:
    """Middleware that refuses foreign host names and wrong keys.

    check_host: a web page elsewhere can point its own name at 127.0.0.1 and so talk to a server there as if
    it were its own; a server for this machine only therefore answers to `localhost` (which browsers take to
    be this machine, with all names below it) and to bare addresses.
    allowed_hosts: further names, of a proxy in front; `*.example.com` stands for all names below it.
    """

    def __init__(
        self, app: ASGIApp, api_key: str | None, check_host: bool, allowed_hosts: Sequence[str] = ()
    ) -> None:
        self.app = app
        self.api_key = api_key
        self.check_host = check_host
        self.allowed_hosts = allowed_hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._refusal(Request(scope)) if scope["type"] == "http" else None
        await (refusal or self.app)(scope, receive, send)

    def _refusal(self, request: Request) -> JSONResponse | None:
        if self.check_host and not _is_own_name(request.headers.get("host", ""), self.allowed_hosts):
            message = "This server does not answer to this host name; start it with --allowed-host NAME."
            return error_response(message, 403, code="invalid_host")
        if self.api_key is not None and request.url.path not in {"/health", *PATHS}:
            scheme, _, key = request.headers.get("authorization", "").partition(" ")
            given = key.strip() if scheme.lower() == "bearer" else ""
            # HTTP's headers are bytes, which starlette reads as latin-1.
            if not hmac.compare_digest(given.encode("latin-1"), self.api_key.encode()):
                message = "The API key is missing or wrong; send it as `Authorization: Bearer KEY`."
                return error_response(message, 401, code="invalid_api_key")
        return None


def _is_own_name(host: str, allowed: Sequence[str]) -> bool:
    if host.startswith("["):
        name, end, _ = host[1:].partition("]")
        if not end:
            return False
    else:
        name = host.partition(":")[0]
    name = name.lower().removesuffix(".")
    for own in ("localhost", "*.localhost", *allowed):
        if name == own or (own.startswith("*.") and name.endswith(own[1:]) and len(name) > len(own) - 1):
            return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


async def read_request(request: Request, limit: int, seconds: float = BODY_SECONDS) -> bytes:
    """The body of a JSON request of at most `limit` bytes; BadRequest otherwise."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        # Also what keeps web pages out: a browser sends JSON to another site only after asking it.
        raise BadRequest("Send the request with `Content-Type: application/json`.", status=415)
    declared = request.headers.get("content-length", "0")
    too_large = BadRequest(
        f"The request has more than {limit:,} bytes; shorten it, or start the server with a larger "
        "--max-request-mb.",
        code="request_too_large",
        status=413,
    )
    size, parts = 0, []
    try:
        async with asyncio.timeout(seconds):
            # A client that is still sending does not read: take what it sends, within reason, to be heard.
            if declared.isdecimal() and int(declared) > 8 * limit:
                raise too_large
            async for part in request.stream():
                size += len(part)
                if size > 8 * limit:
                    raise too_large
                if size <= limit:
                    parts.append(part)
                else:
                    parts.clear()
    except TimeoutError as error:
        raise BadRequest(f"The request did not arrive within {seconds:g} s.", status=408) from error
    except ClientDisconnect as error:
        raise BadRequest("The client went away.", status=499) from error
    if size > limit:
        raise too_large
    return b"".join(parts)


async def until_gone(receive: Any) -> None:
    """Return when the client has closed its connection."""
    while (await receive())["type"] != "http.disconnect":
        pass
