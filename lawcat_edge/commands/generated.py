"""Options of a command that are made from a dataclass: one for each field, with its help and its default."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import Field, fields
from typing import Annotated, Any, get_type_hints

import typer


def options_from(settings: type, after: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a command that ends in ``**settings`` an option for each field of the dataclass ``settings``.

    A field's metadata holds "help" and, for numbers, "limits". after: the parameter behind which they stand
    in ``--help``. See ``chosen`` for which of them the user gave.
    """

    def with_options(command: Callable[..., Any]) -> Callable[..., Any]:
        own = [
            parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            for parameter in inspect.signature(command, eval_str=True).parameters.values()
            if parameter.kind is not inspect.Parameter.VAR_KEYWORD
        ]
        hints = get_type_hints(settings)
        made = [_option(field, hints[field.name]) for field in fields(settings)]
        at = 1 + next(i for i, parameter in enumerate(own) if parameter.name == after)
        parameters = [*own[:at], *made, *own[at:]]
        target: Any = command
        target.__signature__ = inspect.Signature(parameters)
        target.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return command

    return with_options


def chosen(context: typer.Context, settings: dict[str, Any]) -> dict[str, Any]:
    """Those of the settings that stand on the command line; the others only hold their defaults."""
    sources = {name: context.get_parameter_source(name) for name in settings}
    return {
        name: value
        for name, value in settings.items()
        if (source := sources[name]) is not None and source.name != "DEFAULT"
    }


def _option(field: Field[Any], kind: Any) -> inspect.Parameter:
    limits = field.metadata.get("limits") or (None,)
    option = typer.Option(help=field.metadata["help"], min=limits[0])
    return inspect.Parameter(
        field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=Annotated[kind, option]
    )
