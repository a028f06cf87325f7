"""jinja2's sandbox with a meter in it: the environment that chat templates run in.

The sandbox keeps a template away from Python's internals, but not from time and memory: nested loops, macros
that call themselves, `'a' * 10**9`, lists that hold one list twice, forty times over, `x in y` for two long
lists. So loops, calls, filters, tests, operators, literals and all that is written (to the output or into a
variable) are metered here, what can blow up a value is checked before it runs, and all text made by one
rendering is capped together. Every single step is short, and the clock is read at each.

What a template may call is what transformers gives it, without what is slow or draws at random (pprint,
random, urlize, lipsum).
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

from lawcat_edge.runtime.errors import LawcatError
from lawcat_edge.runtime.template.meter import (
    ESCAPED,
    MAX_WIDTH,
    Meter,
    TooMuchError,
    check_growth,
    check_operands,
    check_printf,
)

_FILTERS = (
    *("abs", "attr", "batch", "capitalize", "center", "count", "d", "default", "dictsort", "e", "escape"),
    *("filesizeformat", "first", "float", "forceescape", "groupby", "indent", "int", "items", "join", "last"),
    *("length", "list", "lower", "map", "max", "min", "reject", "rejectattr", "replace", "reverse", "safe"),
    *("select", "selectattr", "slice", "sort", "string", "striptags", "title", "trim", "truncate", "unique"),
    *("upper", "urlencode", "wordcount", "wordwrap", "xmlattr"),
)
_GROWING = {
    "batch",
    "center",
    "expandtabs",
    "indent",
    "join",
    "ljust",
    "replace",
    "rjust",
    "slice",
    "wordwrap",
}
_GROWING |= {"zfill"}


class RefusedError(Exception):
    """A template called ``raise_exception``: it does not take these messages."""


def make_environment() -> Any:
    """A metered environment; its ``meter`` is to be set before each rendering."""
    try:
        from jinja2 import nodes, pass_context
        from jinja2.ext import Extension
        from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedEscapeFormatter, SandboxedFormatter
        from markupsafe import Markup
    except ImportError as error:
        raise LawcatError("jinja2 is missing; install it with `pip install jinja2`.") from error

    class Generation(Extension):
        """``{% generation %}`` marks what the assistant said, for those who train; it writes its body."""

        tags = {"generation"}  # noqa: RUF012 (the base class declares it so)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_write"), [], [], body).set_lineno(line)

        def _write(self, caller: Any) -> Any:
            return caller()

    class FieldMeter:
        """Of ``str.format``: every field is paid for, and none is very wide."""

        _env: Any

        def convert_field(self, value: Any, conversion: Any) -> Any:
            if conversion is not None:
                self._env.meter.made(ESCAPED * self._env.meter.size_of(value))
            return super().convert_field(value, conversion)  # type: ignore[misc]

        def format_field(self, value: Any, format_spec: str) -> Any:
            meter = self._env.meter
            meter.step()
            if any(int(digits[:9]) > MAX_WIDTH for digits in re.findall(r"\d+", format_spec)):
                raise TooMuchError("a formatted field is too wide")
            meter.made(meter.size_of(value))
            return super().format_field(value, format_spec)  # type: ignore[misc]

    class Plain(FieldMeter, SandboxedFormatter):
        pass

    class Escaping(FieldMeter, SandboxedEscapeFormatter):
        pass

    class Metered(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(["*", "**", "+", "%", "//", "/", "-"])
        meter = Meter()

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            check_operands(self.meter, operator, left, right)
            return self.meter.sized(super().call_binop(context, operator, left, right))

        def wrap_str_format(self, value: Any) -> Any:
            if super().wrap_str_format(value) is None:
                return None
            text, mapped = value.__self__, value.__name__ == "format_map"
            escaping = isinstance(text, Markup)
            formatter = Escaping(self, escape=text.escape) if escaping else Plain(self)

            def format(*args: Any, **kwargs: Any) -> str:  # (it is called so in a template)
                if mapped:
                    (kwargs,), args = args, ()
                made: str = type(text)(formatter.vformat(text, args, kwargs))
                return made

            return format

        def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
            # The odd names are the base class's: keyword arguments of the template must not meet them.
            __self.meter.step()
            name, owner = getattr(__obj, "__name__", ""), getattr(__obj, "__self__", None)
            if isinstance(owner, str):
                if name == "translate":
                    raise TooMuchError(f"the method {name} is not allowed")
                if name == "join" and args:
                    args = (_counted(args[0]), *args[1:])
                if name in _GROWING:
                    check_growth(__self.meter, name, owner, args, kwargs)
            return __self.meter.sized(super().call(__context, __obj, *args, **kwargs))

    environment = Metered(
        trim_blocks=True,
        lstrip_blocks=True,
        optimized=False,
        cache_size=0,
        extensions=["jinja2.ext.loopcontrols", Generation],
    )
    known = environment.filters
    environment.filters = {name: _metered(environment, name, known[name]) for name in _FILTERS}
    environment.filters["tojson"] = _metered(environment, "tojson", _to_json)
    environment.filters["sum"] = _metered(environment, "sum", _sum)
    environment.filters["round"] = _metered(environment, "round", _round)

    def printf(value: Any, *args: Any, **kwargs: Any) -> Any:
        check_printf(environment.meter, str(value), kwargs or args)
        return known["format"](value, *args, **kwargs)

    environment.filters["format"] = _metered(environment, "format", printf)
    # `in` and `==` go through their operands; so do the tests of that name in select and reject.
    environment.tests = {name: _metered_test(environment, test) for name, test in environment.tests.items()}
    environment.filters["_sized"] = lambda value: environment.meter.sized(value)
    environment.filters["_loop"] = lambda items: _loop(environment, items)
    environment.filters["_concat"] = lambda parts: _concat(environment, parts)
    environment.filters["_compared"] = lambda value: environment.meter.compared(value)
    environment.filters["_tick"] = lambda _: environment.meter.step()
    # With a context, or jinja2 would call it once, when it compiles constant text.
    environment.filters["_written"] = pass_context(lambda _, value: _written(environment, value))
    environment.globals = {
        "range": _range,
        **{name: environment.globals[name] for name in ("namespace", "cycler", "joiner")},
        "dict": dict,
        "raise_exception": _refuse,
        "strftime_now": lambda form: datetime.datetime.now().strftime(str(form)[:100]),
    }
    return environment


def parse(environment: Any, source: str) -> Any:
    """Parse, and send what loops go over, what is compared, joined, built or written through the meter."""
    from jinja2 import nodes
    from jinja2.visitor import NodeTransformer

    def through(name: str, node: Any) -> Any:
        return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)

    class Metering(NodeTransformer):
        def visit_For(self, node: Any) -> Any:  # noqa: N802 (jinja2 looks these names up)
            self.generic_visit(node)
            node.iter = through("_loop", node.iter)
            # The items of a list are paid in advance; the clock must be read in each turn all the same.
            node.body.insert(0, nodes.ExprStmt(through("_tick", nodes.Const(0)), lineno=node.lineno))
            return node

        def visit_Output(self, node: Any) -> Any:  # noqa: N802
            self.generic_visit(node)
            plain = [nodes.Const(n.data) if isinstance(n, nodes.TemplateData) else n for n in node.nodes]
            node.nodes = [through("_written", n.set_lineno(node.lineno)) for n in plain]
            return node

        def visit_Compare(self, node: Any) -> Any:  # noqa: N802
            self.generic_visit(node)
            node.expr = through("_compared", node.expr)
            for operand in node.ops:
                operand.expr = through("_compared", operand.expr)
            return node

        def visit_AssignBlock(self, node: Any) -> Any:  # noqa: N802
            self.generic_visit(node)
            # Without an operand a filter takes what the block wrote.
            node.filter = nodes.Filter(node.filter, "_sized", [], [], None, None, lineno=node.lineno)
            return node

        def visit_Concat(self, node: Any) -> Any:  # noqa: N802
            self.generic_visit(node)
            return through("_concat", nodes.List(node.nodes, lineno=node.lineno))

        def visit_List(self, node: Any) -> Any:  # noqa: N802
            self.generic_visit(node)
            return node if getattr(node, "ctx", "load") != "load" else through("_sized", node)

        visit_Tuple = visit_Dict = visit_List  # noqa: N815

    return Metering().visit(environment.parse(source)).set_environment(environment)


def _metered(environment: Any, name: str, function: Any) -> Any:
    passing = getattr(function, "jinja_pass_arg", None)

    def run(*args: Any, **kwargs: Any) -> Any:
        ahead, values = (args[:1], args[1:]) if passing is not None else ((), args)
        if name in _GROWING and values:
            values = (_counted(values[0]), *values[1:]) if name == "join" else values
            check_growth(environment.meter, name, values[0], values[1:], kwargs)
        environment.meter.step(1 + (len(values[0]) // 64 if values and hasattr(values[0], "__len__") else 0))
        return environment.meter.sized(function(*ahead, *values, **kwargs))

    if passing is not None:
        run.jinja_pass_arg = passing  # type: ignore[attr-defined]
    return run


def _counted(items: Any) -> Any:
    """`items` with a length: a generator's is known only when it has run, and then it is used up."""
    return list(items) if isinstance(items, Iterator) else items


def _loop(environment: Any, items: Iterable[Any]) -> Any:
    meter = environment.meter
    if isinstance(items, (list, tuple, dict, str, range)):
        # Paid in advance, so that the loop keeps its length, `loop.last` and the rest.
        meter.step(len(items))
        return items

    def each() -> Iterator[Any]:
        for item in items:
            meter.step()
            yield item

    return each()


def _concat(environment: Any, parts: list[Any]) -> str:
    texts = [part if isinstance(part, str) else str(part) for part in parts]
    environment.meter.made(sum(map(len, texts)))
    environment.meter.step()
    return "".join(texts)


def _written(environment: Any, value: Any) -> str:
    text = value if isinstance(value, str) else str(value)
    environment.meter.made(len(text))
    environment.meter.step()
    return text


def _sum(items: Iterable[Any], start: float = 0) -> Any:
    """Of numbers only: a sum of lists copies all of them at every step."""
    total = start
    for item in items:
        if not isinstance(item, (int, float)) or not isinstance(total, (int, float)):
            raise TooMuchError("a sum holds what is no number")
        total += item
    return total


def _round(value: Any, precision: int = 0, method: str = "common") -> Any:
    if not isinstance(precision, int) or not -32 <= precision <= 32:
        raise TooMuchError("a number is rounded to too many places")
    from jinja2.filters import do_round

    return do_round(value, precision, method)  # type: ignore[arg-type]


def _metered_test(environment: Any, function: Any) -> Any:
    passing = getattr(function, "jinja_pass_arg", None)

    def run(*args: Any) -> Any:
        for value in args if passing is None else args[1:]:
            environment.meter.compared(value)
        environment.meter.step()
        return function(*args)

    if passing is not None:
        run.jinja_pass_arg = passing  # type: ignore[attr-defined]
    return run


def _range(*args: int) -> range:
    result = range(*args)
    if len(result) > 100_000:
        raise TooMuchError("a range is too long")
    return result


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As transformers has it: jinja2's own would escape what HTML does."""
    for text in (indent, *(separators or ())):
        if (len(text) if isinstance(text, str) else text or 0) > 16:
            raise TooMuchError("an indentation or separator is too wide")
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _refuse(message: str) -> None:
    raise RefusedError(message)
