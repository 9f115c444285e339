"""Classes whose annotations say what their fields accept, and that check what a user wrote.

The words are pydantic's (``model_fields``, ``model_dump``), and so is what they mean, in its strict mode.
Nothing is worked out before it is asked for: an annotation (:mod:`servesim.specs.annotated`) is evaluated
when a value for its field has to be checked. A run reads a few dozen of some three hundred fields.
"""

from __future__ import annotations

import sys
import types
import typing
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar, cast, dataclass_transform

from servesim.specs.annotated import (
    MISSING,
    Check,
    Declared,
    Field,
    Finding,
    ValidationError,
    after,
    bad,
    compiled,
    found_by,
    part_of,
    split,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping

MarkT = TypeVar("MarkT")


class FieldInfo:
    """One field of a class."""

    __slots__ = ("_check", "_metadata", "_owner", "_text", "_type", "name", "said")

    def __init__(self, name: str, owner: type[Checked], text: str, default: Any) -> None:
        self.name = name
        self._owner, self._text = owner, text
        self._type: Any = MISSING
        self._metadata: tuple[Any, ...] = ()
        self._check: Check | None = None
        self.said: Declared = default if isinstance(default, Declared) else Field(default)
        """What the default of the field says."""

    @property
    def key(self) -> str:
        """What files call it."""
        return self.said.alias or self.name

    @property
    def is_required(self) -> bool:
        return self.said.default is MISSING and self.said.default_factory is None

    @property
    def default(self) -> Any:
        """The default value; None of a field that is required."""
        if self.said.default_factory is not None:
            return self.said.default_factory()
        return None if self.said.default is MISSING else self.said.default

    @property
    def annotation(self) -> Any:
        """The field's type without what ``Annotated`` says about it."""
        if self._type is MISSING:
            found = eval(self._text, vars(sys.modules[self._owner.__module__]))
            self._type, self._metadata = split(found)
        return self._type

    @property
    def metadata(self) -> tuple[Any, ...]:
        """What ``Annotated`` says about the type."""
        _ = self.annotation
        return self._metadata

    @property
    def check(self) -> Check:
        """Checks a value."""
        if self._check is None:
            check = compiled(self.annotation, self.metadata)
            for names, change in self._owner._field_validators():
                if self.name in names or "*" in names:
                    check = after(change, check)
            self._check = check
        return self._check


_MODEL_CHECKS: dict[Any, str] = {}
"""Function of a method marked with :func:`model_validator` -> when it checks."""
_FIELD_CHECKS: dict[Any, tuple[str, ...]] = {}
"""Function of a method marked with :func:`field_validator` -> the fields."""
_FIELDS: dict[type, dict[str, FieldInfo]] = {}


def model_validator(*, mode: Literal["before", "after"]) -> Callable[[Any], Any]:
    """A method that checks the whole object: ``before``, a class method that gets what the user wrote and
    returns what the fields are to be checked for; ``after``, a method of the object."""

    def mark(method: Any) -> Any:
        _MODEL_CHECKS[_function(method)] = mode
        return method

    return mark


def field_validator(*names: str, mode: Literal["before"]) -> Callable[[Any], Any]:
    """A class method that changes or refuses the values of the fields ``names`` (``*``: all) before their
    types look at them."""
    assert mode == "before"

    def mark(method: Any) -> Any:
        _FIELD_CHECKS[_function(method)] = names
        return method

    return mark


class _Fields:
    """``model_fields`` of a class, put together when it is first asked for."""

    def __get__(self, _: object, owner: type[Checked]) -> dict[str, FieldInfo]:
        found = _FIELDS.get(owner)
        if found is None:
            found = _FIELDS[owner] = {}
            for base in reversed(owner.__mro__):
                own = base.__dict__.get("__annotations__", {})  # noqa: RUF063 - inspect is slow to load
                for name, text in own.items():
                    if base is not Checked and not name.startswith("_"):
                        found[name] = FieldInfo(name, base, text, base.__dict__.get(name, MISSING))
        return found


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(Field,))
class Checked:
    """Base of classes of checked, frozen fields. Keys that are no fields are refused."""

    if not TYPE_CHECKING:
        model_fields = _Fields()
        """Name -> field, those of base classes first."""

        def __init__(self, **values: Any) -> None:
            """Raises ValidationError where a value is not allowed."""
            self._fill(values)

        def __setattr__(self, name: str, value: Any) -> None:
            raise AttributeError(f"{type(self).__name__} is frozen: {name} cannot be set")

        def __delattr__(self, name: str) -> None:
            raise AttributeError(f"{type(self).__name__} is frozen: {name} cannot be deleted")

    else:
        model_fields: typing.ClassVar[dict[str, FieldInfo]]
    model_fields_set: typing.ClassVar[set[str]]
    """Names of the fields that were given. (One of each object, though type checkers are told otherwise.)"""

    @classmethod
    def model_validate(cls, data: Any) -> Self:
        """``data``, a dict as a file has it, as an object of this class.

        Raises:
            ValidationError: with everything that is wrong.
        """
        if isinstance(data, cls):
            return data
        made = cls.__new__(cls)
        made._fill(data)
        return made

    def _fill(self, data: Any) -> None:
        cls = type(self)
        for check in cls._validators("before"):
            data = _whole_object(check, data)
        if not isinstance(data, dict):
            raise bad("model_type", data)
        findings: list[Finding] = []
        values = self.__dict__
        given = set()
        for name, field in cls.model_fields.items():
            value = data.get(field.key, MISSING)
            if value is not MISSING:
                values[name] = found_by(field.check, value, field.key, findings)
                given.add(name)
            elif field.is_required:
                findings.append(Finding("missing", data, None, (field.key,)))
            else:
                values[name] = field.default
        if len(given) < len(data):
            known = {field.key for field in cls.model_fields.values()}
            for key in data:
                if not isinstance(key, str):
                    findings.append(Finding("invalid_key", key, None, (part_of(key),)))
                elif key not in known:
                    findings.append(Finding("extra_forbidden", data[key], None, (key,)))
        if findings:
            raise ValidationError(findings)
        values["model_fields_set"] = given
        for check in cls._validators("after"):
            _whole_object(check, self)

    @classmethod
    def _validators(cls, mode: str) -> Iterator[Check]:
        for name in _model_checks(cast("Any", cls), mode):
            yield getattr(cls, name)

    @classmethod
    def _field_validators(cls) -> Iterator[tuple[tuple[str, ...], Check]]:
        for name, fields in _field_checks(cast("Any", cls)):
            yield fields, getattr(cls, name)

    def model_copy(self, *, update: Mapping[str, Any] | None = None) -> Self:
        """A copy with some fields changed, which are not checked."""
        changes = dict(update or {})
        made = type(self).__new__(type(self))
        kept = {name: value for name, value in self.__dict__.items() if name != "_hash"}
        made.__dict__.update({**kept, **changes})
        made.__dict__["model_fields_set"] = {*self.model_fields_set, *changes}
        return made

    def model_dump(
        self,
        *,
        mode: Literal["python", "json"] = "python",
        include: Collection[str] | None = None,
        exclude: Collection[str] = (),
        by_alias: bool = False,
        exclude_unset: bool = False,
        exclude_defaults: bool = False,
        exclude_none: bool = False,
    ) -> dict[str, Any]:
        """The fields as a dict, those of fields within likewise.

        ``mode="json"``: with lists in place of tuples. ``include`` and ``exclude`` name fields of this
        object.
        """

        def dumped(value: Any) -> Any:
            if isinstance(value, Checked):
                return value.model_dump(
                    mode=mode,
                    by_alias=by_alias,
                    exclude_unset=exclude_unset,
                    exclude_defaults=exclude_defaults,
                    exclude_none=exclude_none,
                )
            if isinstance(value, tuple | list):
                kept = [dumped(part) for part in value]
                return kept if mode == "json" or isinstance(value, list) else tuple(kept)
            if isinstance(value, dict):
                return {
                    key: dumped(part) for key, part in value.items() if not (exclude_none and part is None)
                }
            return value

        result = {}
        for name, field in type(self).model_fields.items():
            value = self.__dict__[name]
            if (
                field.said.exclude
                or name in exclude
                or (include is not None and name not in include)
                or (exclude_unset and name not in self.model_fields_set)
                or (exclude_none and value is None)
                or (exclude_defaults and not field.is_required and value == field.default)
            ):
                continue
            result[field.key if by_alias else name] = dumped(value)
        return result

    def model_dump_json(self, *, exclude: Collection[str] = (), by_alias: bool = False) -> str:
        """:meth:`model_dump` as JSON without a space."""
        import json

        dumped = self.model_dump(mode="json", exclude=exclude, by_alias=by_alias)
        return json.dumps(dumped, separators=(",", ":"), ensure_ascii=False)

    def __eq__(self, other: object) -> bool:
        if type(self) is not type(other):
            return NotImplemented
        mine, others = self.__dict__, other.__dict__
        return all(mine[name] == others[name] for name in type(self).model_fields)

    def __hash__(self) -> int:
        kept: int | None = self.__dict__.get("_hash")
        if kept is None:
            kept = hash(tuple(self.__dict__[name] for name in type(self).model_fields))
            self.__dict__["_hash"] = kept
        return kept

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_hash"}

    def __repr__(self) -> str:
        fields = type(self).model_fields.values()
        shown = [f"{field.name}={self.__dict__[field.name]!r}" for field in fields if field.said.repr]
        return f"{type(self).__name__}({', '.join(shown)})"


def _function(method: Any) -> Any:
    return getattr(method, "__func__", method)


def _marked(cls: type, marks: Mapping[Any, MarkT]) -> list[tuple[str, MarkT]]:
    """Names of the methods of a class, its bases' first, that are in ``marks``, with their entry there."""
    found: dict[str, MarkT] = {}
    for base in reversed(cls.__mro__):
        for name, method in vars(base).items() if base is not Checked else ():
            function = _function(method)
            if isinstance(function, types.FunctionType) and function in marks:
                found[name] = marks[function]
    return list(found.items())


@cache
def _field_checks(cls: type) -> list[tuple[str, tuple[str, ...]]]:
    return _marked(cls, _FIELD_CHECKS)


@cache
def _model_checks(cls: type, mode: str) -> list[str]:
    return [name for name, when in _marked(cls, _MODEL_CHECKS) if when == mode]


def _whole_object(check: Check, data: Any) -> Any:
    try:
        return check(data)
    except ValidationError:
        raise
    except ValueError as error:
        raise bad("value_error", data, str(error)) from None
