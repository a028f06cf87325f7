"""The page that the server shows at its address: files of the folder ``web/src``, as they are.

The same page runs a bundle in the browser (docs/web.md); here it is told to ask this server.
"""

from __future__ import annotations

from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

FOLDER = Path(__file__).parent.parent / "web" / "src"
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
# Not those of the model's thread in the browser, which need packages that npm fetches.
FILES = ("index.html", "style.css", "page.js", "markdown.js", "store.js", "local.js", "remote.js")
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self'; img-src data:; object-src 'none'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
PATHS = frozenset({"/", *(f"/{name}" for name in FILES[1:])})
"""What needs no key: nothing of the model or of anybody's text is in these files."""


def page_routes() -> list[Route]:
    """A route for each file, read once; none where the files are not there."""
    if not all((FOLDER / name).is_file() for name in FILES):
        return []
    return [_route(name, (FOLDER / name).read_bytes()) for name in FILES]


def _route(name: str, data: bytes) -> Route:
    path, kind = f"/{name}", TYPES[Path(name).suffix] + "; charset=utf-8"
    if name == "index.html":
        path = "/"
        data = data.replace(
            b'name="lawcat-answers" content="page"', b'name="lawcat-answers" content="server"'
        )

    async def give(request: Request) -> Response:
        return Response(data, headers={"Content-Type": kind, **HEADERS})

    return Route(path, give)
