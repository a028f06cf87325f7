"""What one rendering of a chat template may cost: steps, seconds, and characters that it makes."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from typing import Any

MAX_TEXT = 32 << 20  # characters that one rendering may make in all, beside its share of the input
TEXT_SHARE = 16  # how often a template may copy the conversation
MAX_SECONDS = 5.0
MAX_STEPS = 2_000_000
MAX_BITS = 256  # of a whole number
MAX_WIDTH = 10_000  # of a formatted field
ESCAPED = 10  # characters that one can become when it is quoted
_PRINTF = re.compile(r"%(?:\([^)]*\))?[-#0 +]*(\*|\d+)?(?:\.(\*|\d+))?[hlL]?.", re.DOTALL)


class TooMuchError(Exception):
    """A template goes beyond its means."""


class Meter:
    def __init__(self, characters: int = MAX_TEXT) -> None:
        self.steps = 0
        self.limit = self.characters = characters  # in all; that may still be made
        self.deadline = time.monotonic() + MAX_SECONDS

    def step(self, steps: int = 1) -> None:
        self.steps += steps
        if self.steps > MAX_STEPS or time.monotonic() > self.deadline:
            raise TooMuchError("it runs too long")

    def made(self, characters: int) -> None:
        """Pay for text before it is made where its size is known, else at once after."""
        self.characters -= characters
        if self.characters < 0:
            raise TooMuchError("it makes too much text")

    def sized(self, value: Any) -> Any:
        self.step()
        if isinstance(value, (str, bytes)):
            self.made(len(value))
        elif isinstance(value, (list, tuple, dict)):
            self._weigh(value)
        return value

    def compared(self, value: Any) -> Any:
        """Pay for going through `value`, which a comparison or a search may do."""
        if isinstance(value, (str, bytes, list, tuple, dict)):
            self.step(1 + len(value) // 64)
        return value

    def size_of(self, value: Any) -> int:
        """Characters of `value` when printed, its parts' escapes included; TooMuchError beyond the limit."""
        if isinstance(value, str):
            return len(value)
        if isinstance(value, int) and value.bit_length() > MAX_BITS:
            raise TooMuchError("a number grows too large")
        return ESCAPED * self._weigh(value)

    def _weigh(self, value: Any) -> int:
        """Walk a container as a printer would: shared parts count every time, so sharing hides nothing."""
        total, open_values = 0, [value]
        while open_values:
            item = open_values.pop()
            self.step()
            if isinstance(item, dict):
                open_values.extend((*item.keys(), *item.values()))
            elif isinstance(item, (list, tuple)):
                open_values.extend(item)
            elif isinstance(item, (str, bytes)):
                total += len(item)
            total += 16  # what stands around it
            if total > self.limit:
                raise TooMuchError("a value grows too large")
        return total


def check_growth(meter: Meter, name: str, value: Any, args: tuple[Any, ...], named: dict[str, Any]) -> None:
    """Refuse a call of the filter or method `name` of `value` whose result would be too large."""
    given = (*args, *named.values())
    widest = max((item for item in given if isinstance(item, int)), default=0)
    longest = max((len(item) for item in given if isinstance(item, str)), default=0)
    size = 0
    if name == "replace" and isinstance(value, str):
        old = str(named.get("old", args[0] if args else ""))
        size = (len(value) // max(1, len(old)) + 1) * len(
            str(named.get("new", args[1] if len(args) > 1 else ""))
        )
    elif name == "join":  # the filter: items.join(separator); the method: separator.join(items)
        size = len(value) * (longest if not isinstance(value, str) or not args else _length(args[0]))
    elif name in ("center", "ljust", "rjust", "zfill", "batch", "slice"):
        size = widest
    elif name == "expandtabs" and isinstance(value, str):
        size = len(value) * max(8, widest)
    elif name == "indent" and isinstance(value, str):
        size = (len(value.splitlines()) + 1) * max(4, widest, longest)
    elif name == "wordwrap" and isinstance(value, str):
        size = (len(value) + 1) * max(1, longest)
    if size > meter.limit:
        raise TooMuchError("a value grows too large")


def _length(value: Any) -> int:
    return len(value) if hasattr(value, "__len__") else 0


def check_printf(meter: Meter, form: str, args: Any) -> None:
    """Refuse ``form % args`` where its widths or its repeated arguments would make too much text."""
    values: Iterable[Any] = (
        args.values() if isinstance(args, dict) else args if isinstance(args, tuple) else (args,)
    )
    largest = max((meter.size_of(value) for value in values), default=0)
    size, quoted = len(form), 1
    for match in _PRINTF.finditer(form):
        for width in match.groups():
            if width == "*" or (width and int(width[:9]) > MAX_WIDTH):
                raise TooMuchError("a formatted field is too wide")
            size += int(width or 0)
        quoted = ESCAPED if match[0][-1] in "ra" else 1
        size += quoted * largest
        meter.step()
    if size > meter.limit:
        raise TooMuchError("a value grows too large")


def check_operands(meter: Meter, operator: str, left: Any, right: Any) -> None:
    """Refuse an operation whose result would be too large, before it runs."""
    sequence = (str, bytes, list, tuple)
    if operator == "%" and isinstance(left, bytes):
        raise TooMuchError("formatting bytes is not allowed")
    if operator == "%" and isinstance(left, str):
        check_printf(meter, left, right)
    if operator == "*":
        for value, times in ((left, right), (right, left)):
            if isinstance(value, sequence) and isinstance(times, int) and len(value) * times > 1 << 20:
                raise TooMuchError("a value grows too large")
    both = all(isinstance(value, sequence) for value in (left, right))
    if operator == "+" and both and len(left) + len(right) > meter.limit:
        raise TooMuchError("a value grows too large")
    for value in (left, right):
        if isinstance(value, int) and value.bit_length() > MAX_BITS:
            raise TooMuchError("a number grows too large")
    if operator == "**" and isinstance(left, int) and isinstance(right, int) and abs(right) > MAX_BITS:
        raise TooMuchError("a number grows too large")
