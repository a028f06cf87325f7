"""Chat templates: a jinja2 template from a file, run where it can do nothing and cannot run for long.

jinja2's sandbox keeps a template away from Python's internals, but not from time and memory: nested loops,
macros that call themselves, `'a' * 10**9`, lists that hold one list twice, forty times over, `x in y` for two
long lists. So loops, calls, filters, tests, operators, literals and all that is written (to the output or
into a variable) are metered here, what can blow up a value or the time is left out, and all text made by one
rendering is capped together. Every single step is short, and the clock is read at each.
"""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from lawcat_edge.runtime.errors import LawcatError

MAX_SOURCE = 256 << 10
MAX_TEXT = 32 << 20  # characters that one rendering may make in all, beside its share of the input
TEXT_SHARE = 16  # how often a template may copy the conversation
MAX_SECONDS = 5.0
MAX_STEPS = 2_000_000
Message = dict[str, Any]

_FILTERS = (
    *("abs", "attr", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first", "float"),
    *("groupby", "int", "items", "join", "last", "length", "list", "lower", "map", "max", "min", "reject"),
    *("rejectattr", "replace", "reverse", "round", "safe", "select", "selectattr", "sort", "string", "sum"),
    *("title", "trim", "unique", "upper"),
)
# String methods whose result can be far larger than what went in.
_METHODS = {"center", "ljust", "rjust", "zfill", "expandtabs", "format", "format_map", "translate"}


class _TooMuchError(Exception):
    pass


class ChatTemplate:
    """A compiled chat template. ``render`` gives the text that the model is to continue."""

    def __init__(self, source: str, bos: str = "", eos: str = "") -> None:
        if len(source) > MAX_SOURCE:
            raise LawcatError(f"The chat template has more than {MAX_SOURCE:,} characters; export it again.")
        try:
            self._environment = _environment()
            self._template = self._environment.from_string(_tree(self._environment, source))
        except LawcatError:
            raise
        except Exception as error:
            raise LawcatError(
                f"The chat template is not valid: {_short(error)}; export the bundle again."
            ) from error
        self._tokens = {"bos_token": bos, "eos_token": eos}

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """The text of `messages`; add_generation_prompt: ending where the assistant's answer begins."""
        check_messages(messages)
        parts = []
        try:
            # Copies: a template sees plain lists and dicts, and the caller's cannot change under it.
            copied = json.dumps(messages)
            meter = self._environment.meter = _Meter(MAX_TEXT + TEXT_SHARE * len(copied))
            context = {"messages": json.loads(copied), **self._tokens}
            for part in self._template.generate(**context, add_generation_prompt=add_generation_prompt):
                meter.step()
                parts.append(part)
        except _Refused as error:
            raise LawcatError(f"The chat template refuses these messages: {_short(error)}.") from error
        except Exception as error:
            raise LawcatError(
                f"The chat template failed: {_short(error)}; export the bundle again."
            ) from error
        return "".join(parts)


def check_messages(messages: Sequence[Message]) -> None:
    """Raise LawcatError unless messages are [{"role": text, "content": text}, ...], at least one."""
    if isinstance(messages, (str, bytes)) or not messages:
        raise LawcatError('Messages must be a list such as [{"role": "user", "content": "Hello"}].')
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise LawcatError('Every message must be a dict with "role" and "content".')
        if not isinstance(message.get("content"), str):
            raise LawcatError('The "content" of every message must be text.')


class _Refused(Exception):  # noqa: N818 (raised by the template, not a failure of ours)
    pass


class _Meter:
    def __init__(self, characters: int = MAX_TEXT) -> None:
        self.steps = 0
        self.limit = self.characters = characters  # in all; that may still be made
        self.deadline = time.monotonic() + MAX_SECONDS

    def step(self, steps: int = 1) -> None:
        self.steps += steps
        if self.steps > MAX_STEPS or time.monotonic() > self.deadline:
            raise _TooMuchError("it runs too long")

    def made(self, characters: int) -> None:
        """Pay for text before it is made where its size is known, else at once after."""
        self.characters -= characters
        if self.characters < 0:
            raise _TooMuchError("it makes too much text")

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

    def _weigh(self, value: Any) -> None:
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
            if total > self.limit:
                raise _TooMuchError("a value grows too large")


def _environment() -> Any:
    try:
        from jinja2 import pass_context
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise LawcatError("jinja2 is missing; install it with `pip install jinja2`.") from error

    class Metered(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(["*", "**", "+", "%", "//", "/", "-"])
        meter = _Meter()

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            _check_operands(operator, left, right, self.meter.limit)
            return self.meter.sized(super().call_binop(context, operator, left, right))

        def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
            # The odd names are the base class's: keyword arguments of the template must not meet them.
            __self.meter.step()
            if getattr(__obj, "__name__", "") in _METHODS:
                raise _TooMuchError(f"the method {__obj.__name__} is not allowed")
            owner = getattr(__obj, "__self__", None)
            if isinstance(owner, str) and getattr(__obj, "__name__", "") in ("replace", "join"):
                _check_growth(__obj.__name__, owner, args, __self.meter.limit)
            return __self.meter.sized(super().call(__context, __obj, *args, **kwargs))

    environment = Metered(
        trim_blocks=True,
        lstrip_blocks=True,
        optimized=False,
        cache_size=0,
        extensions=["jinja2.ext.loopcontrols"],
    )
    environment.filters = {name: _metered(environment, name, environment.filters[name]) for name in _FILTERS}
    environment.filters["tojson"] = _metered(environment, "tojson", _to_json)
    environment.filters["sum"] = _metered(environment, "sum", _sum)
    environment.filters["round"] = _metered(environment, "round", _round)
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
        "namespace": environment.globals["namespace"],
        "dict": dict,
        "raise_exception": _refuse,
        "strftime_now": lambda form: datetime.datetime.now().strftime(str(form)[:100]),
    }
    return environment


def _tree(environment: Any, source: str) -> Any:
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
        values = args if passing is None else args[1:]
        if name in ("replace", "join") and values:
            _check_growth(name, values[0], values[1:] or tuple(kwargs.values()), environment.meter.limit)
        environment.meter.step(1 + (len(values[0]) // 64 if values and hasattr(values[0], "__len__") else 0))
        return environment.meter.sized(function(*args, **kwargs))

    if passing is not None:
        run.jinja_pass_arg = passing  # type: ignore[attr-defined]
    return run


def _check_growth(name: str, value: Any, args: tuple[Any, ...], limit: int) -> None:
    if name == "replace" and isinstance(value, str) and len(args) >= 2:
        size = (len(value) // max(1, len(str(args[0]))) + 1) * len(str(args[1]))
    elif name == "join" and args and isinstance(value, str) and not isinstance(args[0], str):
        size = len(value) * len(list(args[0]))  # the method: separator.join(items)
    elif name == "join" and hasattr(value, "__len__"):
        size = len(value) * len(str(args[0] if args else ""))
    else:
        return
    if size > limit:
        raise _TooMuchError("a value grows too large")


def _check_operands(operator: str, left: Any, right: Any, limit: int) -> None:
    sequence = (str, bytes, list, tuple)
    if operator == "%" and isinstance(left, (str, bytes)):
        raise _TooMuchError("formatting with % is not allowed")
    if operator == "*":
        for value, times in ((left, right), (right, left)):
            if isinstance(value, sequence) and isinstance(times, int) and len(value) * times > 1 << 20:
                raise _TooMuchError("a value grows too large")
    both = all(isinstance(value, sequence) for value in (left, right))
    if operator == "+" and both and len(left) + len(right) > limit:
        raise _TooMuchError("a value grows too large")
    for value in (left, right):
        if isinstance(value, int) and value.bit_length() > 256:
            raise _TooMuchError("a number grows too large")
    if operator == "**" and isinstance(left, int) and isinstance(right, int) and abs(right) > 256:
        raise _TooMuchError("a number grows too large")


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
            raise _TooMuchError("a sum holds what is no number")
        total += item
    return total


def _round(value: Any, precision: int = 0, method: str = "common") -> Any:
    if not isinstance(precision, int) or not -32 <= precision <= 32:
        raise _TooMuchError("a number is rounded to too many places")
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
        raise _TooMuchError("a range is too long")
    return result


def _to_json(value: Any, indent: int | None = None, **_: Any) -> str:
    if indent is not None and not 0 <= indent <= 16:
        raise _TooMuchError("an indentation is too wide")
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str) -> None:
    raise _Refused(message)


def _short(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200].rstrip(".")
