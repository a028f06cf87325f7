"""Data against declared types: what is taken as it is, and the sentence for what is not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pytest
from msgspec import Meta, Struct

from lawcat_edge.runtime import schema
from lawcat_edge.runtime.errors import LawcatError

Size = Annotated[int, Meta(ge=1, le=9)]


class Part(Struct, forbid_unknown_fields=True):
    size: Size
    kind: Literal["a", "b"] = "a"
    unit: Literal["byte"] = "byte"


class Whole(Struct):
    name: Annotated[str, Meta(max_length=5)]
    parts: Annotated[list[Part], Meta(min_length=1, max_length=3)]
    share: Annotated[float, Meta(ge=0.0, lt=1.0)] | None = None
    on: bool = False
    sizes: dict[Annotated[str, Meta(pattern=r"^[a-z.]+\Z")], Size] = {}
    shape: Annotated[list[int | str], Meta(description="a shape")] = []
    least: Annotated[list[Any], Meta(min_length=2)] | None = None


def refuse(where: str, problem: str) -> LawcatError:
    return LawcatError(f"{where} {problem}.")


GOOD = {"name": "x", "parts": [{"size": 1}]}


def test_what_fits_comes_back_typed() -> None:
    found = schema.convert({**GOOD, "share": 0, "another": 1}, Whole, refuse)
    assert (found.parts[0].size, found.share, found.on) == (1, 0.0, False)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"name": 3}, "name must be a text of 0 to 5 characters, not 3."),
        ({"name": "123456"}, "name must be a text of 0 to 5 characters, not '123456'."),
        ({"name": "9" * 99}, f"name must be a text of 0 to 5 characters, not '{'9' * 40}'."),
        ({"parts": [{"size": 1, "unit": "m"}]}, "parts[0].unit must be byte, not 'm'."),
        ({"parts": []}, "parts must be a list of 1 to 3 entries."),
        ({"parts": {}}, "parts must be a list of 1 to 3 entries."),
        ({"parts": [{"size": 1}, 7]}, "parts[1] must be an object, not 7."),
        ({"parts": [{"size": 1}, {}]}, "parts[1].size is missing."),
        ({"parts": [{"size": 1, "x": 2}]}, "parts[0].x is not known to this version."),
        ({"parts": [{"size": 10}]}, "parts[0].size must be a whole number from 1 to 9, not 10."),
        ({"parts": [{"size": 4.0}]}, "parts[0].size must be a whole number from 1 to 9, not 4.0."),
        ({"parts": [{"size": True}]}, "parts[0].size must be a whole number from 1 to 9, not True."),
        ({"parts": [{"size": "4"}]}, "parts[0].size must be a whole number from 1 to 9, not '4'."),
        ({"parts": [{"size": 1 << 70}]}, f"parts[0].size must be a whole number from 1 to 9, not {1 << 70}."),
        ({"parts": [{"size": 1, "kind": "c"}]}, "parts[0].kind must be one of a, b, not 'c'."),
        ({"share": 1}, "share must be a number from 0 to 1, not 1."),
        ({"share": float("nan")}, "share must be a number from 0 to 1, not nan."),
        ({"on": 1}, "on must be true or false, not 1."),
        ({"sizes": {"model.x": 0}}, "sizes.model.x must be a whole number from 1 to 9, not 0."),
        ({"sizes": {"X": 1}}, "sizes must be a text, not 'X'."),
        ({"parts": [{"size": 1, "\x1b[2J": 2}]}, r"parts[0].'\x1b[2J' is not known to this version."),
        ({"shape": [1, 2.5]}, "shape must be a shape."),
        ({"least": [1]}, "least must be a list of at least 2 entries."),
        ({"name": "\ud800" * 6}, "name must be a text of 0 to 5 characters"),
        ({"parts": [{"size": 1, "\ud800": 1}]}, "is not known to this version"),
        ({"parts": [{"size": 1, "kind": "\ud800"}]}, "parts[0].kind must be one of a, b"),
    ],
)
def test_the_first_wrong_part_is_named(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(LawcatError) as caught:
        schema.convert({**GOOD, **change}, Whole, refuse)
    assert sentence in str(caught.value)


def test_what_is_no_object_at_all() -> None:
    with pytest.raises(LawcatError, match=r"^the content must be an object\.$"):
        schema.convert([], Whole, refuse)
    with pytest.raises(LawcatError, match=r"^all must be a list\.$"):
        schema.convert({}, schema.listed(schema.whole(1, 2)), refuse, "all")
    with pytest.raises(LawcatError, match=r"^all\[1\] must be a whole number from 1 to 2, not 3\.$"):
        schema.convert([1, 3], schema.listed(schema.whole(1, 2)), refuse, "all")


@dataclass(frozen=True)
class Settings:
    size: Size
    names: tuple[Literal["a", "b"], ...] = ()

    def __post_init__(self) -> None:
        schema.check_fields(self, refuse)


def test_a_dataclass_checks_its_fields() -> None:
    made = schema.build({"size": 3, "names": ("a",)}, Settings, refuse, "The settings")
    assert made == Settings(3, ("a",))
    for data, sentence in (
        ([], "The settings must be a JSON object."),
        ({"size": 3, "colour": 1}, "'colour' is unknown; known are names, size."),
        ({}, "size is missing."),
        ({"size": 0}, "size must be a whole number from 1 to 9, not 0."),
        ({"size": 3, "names": ("a", "c")}, "names[1] must be one of a, b, not 'c'."),
    ):
        with pytest.raises(LawcatError) as caught:
            schema.build(data, Settings, refuse, "The settings")
        assert str(caught.value) == sentence
