"""Data from outside against a declared type: msgspec checks, and a mistake becomes one of our sentences.

A type is a ``msgspec.Struct`` or any annotation of typing, with its limits in ``Annotated[..., Meta(...)]``.
Nothing is converted kindly: true is no number, 4.0 no whole number, "4" neither.

Of a value that does not fit, the first wrong part is named as in ``state[3].shape``, with what it must be.
``Meta(description=...)`` says that in words of one's own, for the value and all that is in it.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator
from dataclasses import MISSING, fields
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta

from lawcat_edge.runtime.errors import LawcatError

T = TypeVar("T")
_MISFITS = (msgspec.ValidationError, UnicodeEncodeError)  # the second: half a surrogate pair in a name
Refuse = Callable[[str, str], LawcatError]
"""Makes the error of (where, problem), as in ("geometry.num_heads", "must be a whole number from 1 to 9")."""


def convert(data: Any, kind: type[T], refuse: Refuse, where: str = "") -> T:
    """The data as that type; ``refuse`` makes the error. where: of the data, in its file."""
    try:
        return msgspec.convert(data, kind)
    except _MISFITS:
        raise refuse(*_mistake(data, kind, where)) from None


def check_fields(of: Any, refuse: Refuse) -> None:
    """Compare every field of a dataclass with its annotation: for ``__post_init__``."""
    made: Any = type(of)
    for name, kind in _hints(made).items():
        convert(getattr(of, name), kind, refuse, name)


def build(data: Any, kind: type[T], refuse: Refuse, what: str) -> T:
    """A dataclass from a JSON object with its fields, which it then checks itself. what: for the errors."""
    if not isinstance(data, dict):
        raise refuse(what, "must be a JSON object")
    known = {field.name: field for field in fields(kind)}  # type: ignore[arg-type]
    unknown = sorted(set(data) - set(known))
    if unknown:
        raise refuse(repr(unknown[0][:60]), f"is unknown; known are {', '.join(sorted(known))}")
    for name, field in known.items():
        if name not in data and field.default is MISSING and field.default_factory is MISSING:
            raise refuse(name, "is missing")
    return kind(**data)


def whole(low: int, high: int) -> Any:
    """The type of whole numbers within limits that are known only at run time."""
    return Annotated[int, Meta(ge=low, le=high)]


def listed(kind: Any) -> Any:
    """The type of lists of such."""
    return list[kind]


def _fits(data: Any, kind: Any) -> bool:
    try:
        msgspec.convert(data, kind)
    except _MISFITS:
        return False
    return True


def _mistake(data: Any, kind: Any, where: str) -> tuple[str, str]:
    """(where, problem) of the first part of the data that does not fit."""
    plain, description = _plain(kind), _description(kind)
    if description is None and isinstance(data, dict) and _is_struct(plain):
        known = {field.encode_name: field for field in msgspec.structs.fields(plain)}
        unknown = sorted(set(data) - set(known))
        if unknown and plain.__struct_config__.forbid_unknown_fields:
            return _join(where, unknown[0][:60]), "is not known to this version"
        missing = next((name for name, field in known.items() if field.required and name not in data), None)
        if missing is not None:
            return _join(where, missing), "is missing"
    if description is None:
        for name, value, inner in _parts(data, plain):
            if not _fits(value, inner):
                return _mistake(value, inner, _join(where, name))
    shown = "" if isinstance(data, (dict, list, tuple)) else f", not {_short(data)!r}"
    return where or "the content", f"must be {description or _expected(kind)}{shown}"


def _parts(data: Any, plain: Any) -> Iterator[tuple[str, Any, Any]]:
    """(name, value, type) of what is in an object or a list."""
    inner = get_args(plain)
    if isinstance(data, dict) and _is_struct(plain):
        for field in msgspec.structs.fields(plain):
            if field.encode_name in data:
                yield field.encode_name, data[field.encode_name], field.type
    elif isinstance(data, dict) and get_origin(plain) is dict:
        for key, value in data.items():
            yield "", key, inner[0]
            yield str(key)[:60], value, inner[1]
    elif isinstance(data, (list, tuple)) and get_origin(plain) in (list, tuple):
        for i, value in enumerate(data):
            yield f"[{i}]", value, inner[0]


def _join(where: str, name: str) -> str:
    name = name if name.isprintable() else ascii(name)  # it is shown on a terminal
    between = "." if where and name and not name.startswith("[") else ""
    return where + between + name


def _expected(kind: Any) -> str:
    """What a value of this type is, in words."""
    kind = _optional(kind)
    metas = [meta for meta in get_args(kind)[1:] if isinstance(meta, Meta)] if _is_annotated(kind) else []
    plain = _plain(kind)
    limits = {
        name: getattr(meta, name)
        for meta in metas
        for name in ("ge", "gt", "le", "lt", "min_length", "max_length")
        if getattr(meta, name) is not None
    }
    low, high = limits.get("ge", limits.get("gt")), limits.get("le", limits.get("lt"))
    origin = get_origin(plain)
    if plain is bool:
        return "true or false"
    if plain in (int, float):
        between = "" if low is None else f" of at least {_number(low)}"
        between = between if high is None else f" from {_number(low)} to {_number(high)}"
        return ("a whole number" if plain is int else "a number") + between
    if origin is Literal:
        values = get_args(plain)
        return ("one of " if len(values) > 1 else "") + ", ".join(map(str, values))
    if plain is str:
        return "a text" + _length(limits, "characters")
    if origin in (list, tuple):
        return "a list" + _length(limits, "entries")
    if origin in (Union, types.UnionType):
        return " or ".join(_expected(one) for one in get_args(plain))
    return "an object" + _length(limits, "entries")


def _length(limits: dict[str, Any], what: str) -> str:
    least, most = limits.get("min_length", 0), limits.get("max_length")
    if most is None:
        return f" of at least {least} {what}" if least else ""
    return f" of {least} to {most} {what}"


def _short(data: Any) -> Any:
    return data[:40] if isinstance(data, str) else data


def _number(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _description(kind: Any) -> str | None:
    found = [
        meta.description for meta in getattr(_optional(kind), "__metadata__", ()) if isinstance(meta, Meta)
    ]
    return next((text for text in found if text is not None), None)


def _plain(kind: Any) -> Any:
    """Without limits and without None."""
    kind = _optional(kind)
    return _plain(get_args(kind)[0]) if _is_annotated(kind) else kind


def _optional(kind: Any) -> Any:
    """X of ``X | None``."""
    if get_origin(kind) in (Union, types.UnionType):
        rest = [one for one in get_args(kind) if one is not type(None)]
        return rest[0] if len(rest) == 1 else kind
    return kind


def _is_annotated(kind: Any) -> bool:
    return get_origin(kind) is Annotated


def _is_struct(plain: Any) -> bool:
    return isinstance(plain, type) and issubclass(plain, msgspec.Struct)


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)
