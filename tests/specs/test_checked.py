"""Fields that check what they are given, as their annotations say."""

from __future__ import annotations

import math
import pickle
from copy import deepcopy
from typing import Annotated, Any, Literal

import pytest

from servesim.errors import InputError
from servesim.specs.annotated import (
    AfterValidator,
    BeforeValidator,
    Discriminator,
    Field,
    Tag,
    ValidationError,
)
from servesim.specs.checked import Checked, model_validator
from servesim.specs.validation import Spec, Unit, list_as_tuple, validated


def _even(value: int) -> int:
    if value % 2:
        raise ValueError(f"{value} is odd")
    return value


class Wheel(Spec):
    size: Annotated[float, Field(ge=1, le=30), Unit("inch")]
    spokes: Annotated[int, Field(ge=0, le=100), AfterValidator(_even)] = 32


class Bike(Wheel):
    name: Annotated[str, Field(min_length=1, max_length=5, pattern="^[a-z]+$")]
    colour: Literal["red", "blue"] | None = None
    spokes: int = 0
    front: Wheel | None = None
    gears: Annotated[tuple[int, ...], BeforeValidator(list_as_tuple), Field(max_length=2)] = ()
    kind: str = Field(default="road", alias="class")
    load: Annotated[
        Annotated[float, Tag("number")] | Annotated[tuple[float, float], Tag("pair")],
        Discriminator(lambda value: "pair" if isinstance(value, tuple) else "number"),
    ] = 1
    parts: dict[str, Wheel] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check(self) -> Bike:
        if self.name == "no":
            raise ValueError("name: no is no name")
        return self


def told(**data: Any) -> str:
    with pytest.raises(InputError) as error:
        validated(Bike, {"size": 20, "name": "a", **data}, "f")
    return str(error.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"size": 0}, "f: size: 0 is not allowed; must be >= 1 inch"),
        ({"size": "20"}, 'f: size: "20" is not allowed; must be a number'),
        ({"size": True}, "f: size: true is not allowed; must be a number"),
        ({"size": math.nan}, "f: size: NaN is not allowed; must be a finite number"),
        ({"size": 10**400}, "f: size: 1000"),
        ({"spokes": 2.0}, "f: spokes: 2.0 is not allowed; must be a whole number"),
        ({"front": {"size": 20, "spokes": 3}}, "f: front.spokes: 3 is odd"),
        ({"front": {}}, "f: front.size: is missing; it is required"),
        ({"front": 3}, "f: front: 3 is not allowed; must be an object {...}"),
        ({"parts": {"x": {"size": 99}}}, "f: parts.x.size: 99 is not allowed; must be <= 30 inch"),
        ({"name": ""}, 'f: name: "" is not allowed; must be a text that is not empty'),
        ({"name": "toolong"}, 'f: name: "toolong" is not allowed; must be at most 5 characters'),
        ({"name": "a\n"}, "f: name: "),
        ({"name": "\udce9"}, "f: name: '\\udce9' is not allowed; must be text in UTF-8"),
        ({"name": "no"}, "f: name: no is no name"),
        (
            {"colour": "redd"},
            "f: colour: \"redd\" is not allowed; must be one of red, blue; did you mean 'red'?",
        ),
        ({"gears": [1, "x"]}, 'f: gears[1]: "x" is not allowed; must be a whole number'),
        ({"gears": [1, 2, 3]}, "f: gears: may have at most 2 of them, not 3"),
        ({"load": "x"}, 'f: load: "x" is not allowed; must be a number'),
        ({"load": (1.0,)}, "f: load[1]: is missing"),
        ({"sise": 3}, "f: sise: unknown key; did you mean 'size'?"),
        ({1: 2}, "f: [1]: 1 is not allowed; a key must be a text"),
    ],
)
def test_bad_values_are_told_with_their_place(data: dict[Any, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        validated(Bike, {"size": 20, "name": "a"} | data, "f")
    assert str(error.value).startswith(message)


def test_everything_that_is_wrong_is_told_at_once() -> None:
    assert told(size=0, spokes="x", colour=1).count("is not allowed") == 3


def test_fields_of_a_base_come_first() -> None:
    assert list(Bike.model_fields)[:3] == ["size", "spokes", "name"]
    assert Bike.model_fields["spokes"].default == 0
    assert Bike.model_fields["size"].annotation is float


def test_values_are_kept_as_their_types_say() -> None:
    bike = validated(Bike, {"size": 20, "name": "a", "class": "city", "gears": [1]}, "f")
    assert (bike.size, type(bike.size)) == (20.0, float)
    assert (bike.kind, bike.gears, bike.parts) == ("city", (1,), {})
    assert bike.model_fields_set == {"size", "name", "kind", "gears"}
    assert validated(Bike, bike, "f") is bike


def test_a_dump_leaves_out_what_it_is_told() -> None:
    bike = Bike(size=20, name="a", front=Wheel(size=3), gears=(1,))
    assert bike.model_dump(mode="json", exclude_unset=True) == {
        "size": 20.0,
        "name": "a",
        "front": {"size": 3.0},
        "gears": [1],
    }
    assert bike.model_dump(include={"kind"}, by_alias=True) == {"class": "road"}
    assert "front" not in Bike(size=20, name="a").model_dump(exclude_none=True)
    assert Wheel(size=3, spokes=32).model_dump_json() == '{"size":3.0,"spokes":32}'
    assert Wheel(size=3, spokes=32).model_dump(exclude_defaults=True) == {"size": 3.0}


def test_copies_are_equal_until_changed() -> None:
    wheel = Wheel(size=3)
    for copy in (deepcopy(wheel), pickle.loads(pickle.dumps(wheel)), wheel.model_copy()):
        assert copy == wheel
        assert hash(copy) == hash(wheel)
        assert copy.model_fields_set == {"size"}
    other = wheel.model_copy(update={"spokes": 2})
    assert other != wheel
    assert hash(other) != hash(wheel)
    assert other.model_fields_set == {"size", "spokes"}
    assert repr(other) == "Wheel(size=3.0, spokes=2)"


def test_nothing_can_be_set() -> None:
    with pytest.raises(AttributeError, match="frozen"):
        Wheel(size=3).size = 4  # type: ignore[misc]


def test_a_type_that_nobody_checks_is_refused() -> None:
    class Odd(Checked):
        field: set[int]

    with pytest.raises(TypeError, match="is no type that a field can have"):
        Odd(field={1})


def test_the_error_itself_names_places() -> None:
    with pytest.raises(ValidationError, match=r"\('size',\): missing"):
        Wheel()  # type: ignore[call-arg]
