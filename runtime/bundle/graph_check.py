"""A small reader of the ONNX wire format that checks where a model's tensors lie, without the onnx package.

onnxruntime trusts a model: external data may name any path (or a raw memory address), run past the end of its
file, or claim 2**40 elements. So before a session is made every tensor, in subgraphs and functions too,
is checked here.
Only the fields that matter are read; all others are skipped by their wire type.

A bundle's graph is a straight line of operators. What could run for ever or call other code (control flow,
functions, operators of unknown makers) is noted in the summary, for the caller to refuse.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from lawcat_edge.runtime import native
from lawcat_edge.runtime.errors import LawcatError

MAX_MODEL_BYTES = 128 << 20
MAX_TENSORS = 200_000
MAX_NODES = 200_000
MAX_FIELDS = 1_500_000  # two seconds of reading; 30 layers have 30,000
MAX_RANK = 16
MAX_ELEMENTS = 1 << 36
MAX_NESTING = 16
DOMAINS = ("", "ai.onnx", "com.microsoft")
OWN = {(native.DOMAIN, op) for op in native.OPERATORS}

# Bits an element, by TensorProto.DataType (8, string, cannot be external; 14 and 15 are complex).
_BITS = {1: 32, 2: 8, 3: 8, 4: 16, 5: 16, 6: 32, 7: 64, 9: 8, 10: 16, 11: 64, 12: 32, 13: 64, 14: 64, 15: 128}
_BITS |= {16: 16, 17: 8, 18: 8, 19: 8, 20: 8, 21: 4, 22: 4, 23: 4, 24: 8, 25: 2, 26: 2}

SizeOf = Callable[[str], int | None]


@dataclass
class Node:
    """op_type with its domain and the names of its inputs and outputs."""

    op: str = ""
    domain: str = ""
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)


@dataclass
class ModelSummary:
    """What was found: the top graph's nodes, inline bytes, and each external (location, offset, length)."""

    nodes: list[Node] = field(default_factory=list)
    opsets: dict[str, int] = field(default_factory=dict)
    inline_bytes: int = 0
    external: list[tuple[str, int, int]] = field(default_factory=list)
    tensors: int = 0
    fields: int = 0
    suspicious: str | None = None

    def suspect(self, what: str) -> None:
        self.suspicious = self.suspicious or what

    @cached_property
    def readers(self) -> dict[str, list[Node]]:
        """The nodes that read each tensor."""
        found: dict[str, list[Node]] = {}
        for node in self.nodes:
            for name in set(node.inputs):
                found.setdefault(name, []).append(node)
        return found


class _MalformedError(Exception):
    pass


def check_model(data: bytes, what: str, size_of: SizeOf) -> ModelSummary:
    """Check every tensor of the ModelProto `data`; `size_of(location)` is a size, or None if not allowed.

    Raises LawcatError naming `what` and the tensor.
    """
    summary = ModelSummary()
    try:
        view = memoryview(data)
        for number, wire, value in _fields(view, summary):
            if number == 7 and wire == 2:
                _graph(value, summary, size_of, depth=0, top=True)
            elif number == 25 and wire == 2:  # a function: its nodes
                summary.suspect("a function of its own")
                for inner, inner_wire, node in _fields(value, summary):
                    if inner == 7 and inner_wire == 2:
                        _node(node, summary, size_of, depth=1)
            elif number == 8 and wire == 2:
                domain, version = "", 0
                for inner, inner_wire, item in _fields(value, summary):
                    if inner == 1 and inner_wire == 2:
                        domain = _text(item)
                    elif inner == 2 and inner_wire == 0:
                        version = item
                summary.opsets[domain] = version
    except _MalformedError as error:
        raise LawcatError(
            f"{what} is not a valid ONNX model: {error}; export or copy the bundle again."
        ) from error
    if not summary.nodes:
        raise LawcatError(
            f"{what} is not a valid ONNX model: it has no nodes; export or copy the bundle again."
        )
    return summary


def _fields(view: memoryview, summary: ModelSummary) -> Iterator[tuple[int, int, Any]]:
    """(field number, wire type, value); value is an int for varints and a view of the bytes otherwise."""
    at, end = 0, len(view)
    while at < end:
        summary.fields += 1
        if summary.fields > MAX_FIELDS:
            raise _MalformedError(f"it has more than {MAX_FIELDS:,} fields")
        # Most keys and sizes are numbers of one byte, and a call for each would take most of the time.
        key = view[at]
        if key < 0x80:
            at += 1
        else:
            key, at = _varint(view, at)
        number, wire = key >> 3, key & 7
        if number == 0:
            raise _MalformedError("field number 0")
        if wire == 2 and at < end and (size := view[at]) < 0x80:
            at += 1
        elif wire == 2:
            size, at = _varint(view, at)
        elif wire == 0:
            value, at = _varint(view, at)
            yield number, wire, value
            continue
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise _MalformedError(f"wire type {wire}")
        if size > end - at:
            raise _MalformedError("truncated")
        yield number, wire, view[at : at + size]
        at += size


def _varint(view: memoryview, at: int) -> tuple[int, int]:
    result = 0
    for shift in range(0, 70, 7):
        if at >= len(view):
            raise _MalformedError("truncated")
        byte = view[at]
        at += 1
        result |= (byte & 0x7F) << shift
        if byte < 0x80:
            if result >= 1 << 64:
                raise _MalformedError("a number has more than 64 bits")
            return result, at
    raise _MalformedError("a number has more than 64 bits")


def _text(value: memoryview) -> str:
    if len(value) > 4096:
        raise _MalformedError("a name is longer than 4096 bytes")
    try:
        return bytes(value).decode("utf-8")
    except UnicodeDecodeError as error:
        raise _MalformedError("a name is not UTF-8") from error


def _graph(view: memoryview, summary: ModelSummary, size_of: SizeOf, depth: int, top: bool = False) -> None:
    if depth > MAX_NESTING:
        raise _MalformedError("graphs are nested too deeply")
    for number, wire, value in _fields(view, summary):
        if wire != 2:
            continue
        if number == 1:
            node = _node(value, summary, size_of, depth)
            if node.domain not in DOMAINS and (node.domain, node.op) not in OWN:
                summary.suspect(f"an operator of the domain {node.domain[:60]!r}")
            if top:
                summary.nodes.append(node)
                if len(summary.nodes) > MAX_NODES:
                    raise _MalformedError("too many nodes")
        elif number == 5:
            _tensor(value, summary, size_of)
        elif number == 15:
            _sparse(value, summary, size_of)


def _node(view: memoryview, summary: ModelSummary, size_of: SizeOf, depth: int) -> Node:
    node = Node()
    for number, wire, value in _fields(view, summary):
        if wire != 2:
            continue
        if number == 1:
            node.inputs.append(_text(value))
        elif number == 2:
            node.outputs.append(_text(value))
        elif number == 4:
            node.op = _text(value)
        elif number == 7:
            node.domain = _text(value)
        elif number == 5:
            for inner, inner_wire, item in _fields(value, summary):
                if inner_wire != 2:
                    continue
                if inner in (5, 10):
                    _tensor(item, summary, size_of)
                elif inner in (6, 11):
                    summary.suspect("a graph within a node (a loop or a branch)")
                    _graph(item, summary, size_of, depth + 1)
                elif inner in (22, 23):
                    _sparse(item, summary, size_of)
    return node


def _sparse(view: memoryview, summary: ModelSummary, size_of: SizeOf) -> None:
    for number, wire, value in _fields(view, summary):
        if wire == 2 and number in (1, 2):
            _tensor(value, summary, size_of)


def _tensor(view: memoryview, summary: ModelSummary, size_of: SizeOf) -> None:
    summary.tensors += 1
    if summary.tensors > MAX_TENSORS:
        raise _MalformedError("too many tensors")
    dims: list[int] = []
    data_type = location_kind = 0
    name, raw = "", None
    entries: dict[str, str] = {}
    for number, wire, value in _fields(view, summary):
        if number == 1 and wire == 0:
            dims.append(value)
        elif number == 1 and wire == 2:  # packed
            at = 0
            while at < len(value):
                dim, at = _varint(value, at)
                dims.append(dim)
                if len(dims) > MAX_RANK:
                    break
        elif number == 2 and wire == 0:
            data_type = value
        elif number == 8 and wire == 2:
            name = _text(value)
        elif number == 9 and wire == 2:
            raw = value
        elif number == 13 and wire == 2:
            key = text = ""
            for inner, inner_wire, item in _fields(value, summary):
                if inner == 1 and inner_wire == 2:
                    key = _text(item)
                elif inner == 2 and inner_wire == 2:
                    text = _text(item)
            if key in entries:
                raise _MalformedError(f"tensor {name!r} gives its {key!r} twice")
            entries[key] = text
        elif number == 14 and wire == 0:
            location_kind = value
        if len(dims) > MAX_RANK:
            raise _MalformedError(f"tensor {name!r} has more than {MAX_RANK} dimensions")
    elements = 1
    for dim in dims:
        if dim > MAX_ELEMENTS:  # negative dims arrive as 2**64 - n
            raise _MalformedError(f"tensor {name!r} has dimension {dim}")
        elements *= dim
        if elements > MAX_ELEMENTS:
            raise _MalformedError(f"tensor {name!r} has more than {MAX_ELEMENTS} elements")
    external = bool(entries) or location_kind != 0
    if not external:
        if raw is not None:
            if data_type not in _BITS or len(raw) != (elements * _BITS[data_type] + 7) // 8:
                raise _MalformedError(f"tensor {name!r} has {len(raw)} bytes for shape {dims}")
            summary.inline_bytes += len(raw)
        elif elements * 8 > 64 * len(view):
            # Typed fields spend at least a byte on eight elements: a tiny tensor cannot claim a huge shape.
            raise _MalformedError(f"tensor {name!r} has {len(view)} bytes for shape {dims}")
        return
    if location_kind != 1 or raw is not None or data_type not in _BITS:
        raise _MalformedError(f"tensor {name!r} mixes inline and external data")
    size = (elements * _BITS[data_type] + 7) // 8
    location = entries.get("location", "")
    available = size_of(location)
    if available is None:
        raise _MalformedError(
            f"tensor {name!r} lies in {location[:100]!r}, which the manifest does not list as data"
        )
    offset, length = _number(entries, "offset", name, 0), _number(entries, "length", name, size)
    if length != size:
        raise _MalformedError(f"tensor {name!r} has {length} bytes for shape {dims}, which needs {size}")
    if offset > available or length > available - offset:
        raise _MalformedError(f"tensor {name!r} runs past the end of {location}")
    summary.external.append((location, offset, length))


def _number(entries: dict[str, str], key: str, name: str, default: int) -> int:
    text = entries.get(key)
    if text is None:
        return default
    if not (text.isascii() and text.isdigit() and len(text) <= 18):
        raise _MalformedError(f"tensor {name!r} has the {key} {text[:40]!r}")
    return int(text)
