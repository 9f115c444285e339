"""A class whose methods are made when they are needed is the dataclass that the standard library makes."""

from __future__ import annotations

import dataclasses
import pickle
from copy import deepcopy
from typing import TYPE_CHECKING, Any, ClassVar

import pytest

from servesim.slotted import dataclass

if TYPE_CHECKING:
    from collections.abc import Callable


class Plain:
    """Some fields."""

    many: ClassVar[int] = 3
    x: int
    y: list[int] = dataclasses.field(default_factory=list)
    z: str = "z"
    kept: int = dataclasses.field(default=7, repr=False, compare=False)
    made: int = dataclasses.field(default=9, init=False)

    def double(self) -> int:
        return self.x * 2


class Counted:
    missing: int = 1

    def __post_init__(self) -> None:
        self.missing += 1


@dataclass(slots=True, frozen=True)
class Frozen:
    x: int
    y: str = "y"


@dataclass(slots=True)
class Base:
    a: int
    b: int = 2


@dataclass(slots=True)
class Child(Base):
    b: int = 5
    c: int = 3


@dataclass(slots=True, kw_only=True)
class Named:
    a: int = 1
    b: int


MAKERS: list[Callable[..., Any]] = [dataclass, dataclasses.dataclass]


def copy_of(plain: type) -> type:
    """dataclass changes the class that it is given."""
    return type(
        plain.__name__, (), {k: v for k, v in vars(plain).items() if k not in ("__dict__", "__weakref__")}
    )


@pytest.mark.parametrize("frozen", [False, True])
def test_ours_is_as_the_standard_library_has_it(frozen: bool) -> None:
    seen = []
    for maker in MAKERS:
        made: Any = maker(slots=True, frozen=frozen)(copy_of(Plain))
        one, other = made(1), made(1, [2], "q", kept=8)
        seen.append(
            (
                repr(one),
                repr(other),
                one == made(1, kept=3),
                one == other,
                one.double(),
                made.__slots__,
                made.__match_args__,
                dataclasses.asdict(other),
                repr(dataclasses.replace(dataclasses.replace(other, x=5))) if not frozen else "",
                [(field.name, field.init, field.repr) for field in dataclasses.fields(made)],
                hasattr(one, "__dict__"),
                made.__hash__ is None,
                made.__doc__,
                made.many,
            )
        )
        if not frozen:
            one.x = 4
            assert one.double() == 8
        else:
            with pytest.raises(dataclasses.FrozenInstanceError, match="cannot assign to field 'x'"):
                one.x = 4
        for wrong in ((), (1, [], "", 0, 0)):
            with pytest.raises(TypeError):
                made(*wrong)
    assert seen[0] == seen[1]


def test_what_follows_the_making_is_run() -> None:
    made: Any = dataclass(slots=True)(copy_of(Counted))  # type: ignore[arg-type]
    assert made().missing == 2
    assert made(5).missing == 6


def test_frozen_objects_are_keys_and_travel() -> None:
    one = Frozen(1)
    assert {one: 2}[Frozen(1)] == 2
    assert pickle.loads(pickle.dumps(one)) == deepcopy(one) == one
    assert hash(one) != hash(Frozen(2))


def test_a_subclass_has_the_fields_of_its_base() -> None:
    assert repr(Child(1)) == "Child(a=1, b=5, c=3)"
    assert Child.__slots__ == ("c",)  # type: ignore[attr-defined]
    assert Child(1) != Base(1, 5)
    assert pickle.loads(pickle.dumps(Child(1))) == Child(1)


def test_names_can_be_asked_for() -> None:
    assert Named(b=2) == Named(a=1, b=2)
    with pytest.raises(TypeError):
        Named(1, 2)  # type: ignore[misc]


def test_slots_have_to_be_asked_for() -> None:
    with pytest.raises(TypeError, match="slots=True"):
        dataclass(slots=False)
