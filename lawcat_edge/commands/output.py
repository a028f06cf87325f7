"""What a command writes to its standard streams, in whatever encoding these have."""

from __future__ import annotations

import codecs
import io
import json
import sys
from typing import Any


def write_any_text(*streams: Any) -> None:
    """Let streams write what their encoding lacks as escapes (an emoji as \\U0001f600) and never fail.

    Output that is redirected on Windows, or written under the C locale, is often cp1252 or ASCII.
    """
    for stream in streams:
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="backslashreplace")


def dump_json(document: Any) -> str:
    """One line of JSON for stdout: readable where that is UTF-8, else in ASCII, since it must stay JSON."""
    return json.dumps(document, ensure_ascii=not _is_utf8(sys.stdout))


def _is_utf8(stream: Any) -> bool:
    try:
        return codecs.lookup(stream.encoding or "ascii").name == "utf-8"
    except (AttributeError, LookupError):
        return False
