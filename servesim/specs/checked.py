"""Classes whose annotations say what their fields accept, and that check what a user wrote.

The words are pydantic's (``Field``, ``model_fields``, ``model_dump``), and so is what they mean, in its
strict mode. Only what descriptions of clusters, models and options need is here, and nothing of it is worked
out before it is asked for: an annotation is evaluated when a value for its field has to be checked. A run
reads a few dozen of some three hundred fields, and loading a general library takes longer than a short run.
"""

from __future__ import annotations

import math
import re
import sys
import types
import typing
from collections.abc import Callable, Mapping
from functools import cache
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Literal,
    Self,
    TypeVar,
    cast,
    dataclass_transform,
    get_args,
    get_origin,
)

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

Check = Callable[[Any], Any]
"""Gives the value as it is kept; raises :class:`ValidationError` or ValueError."""
Location = tuple[int | str, ...]
MarkT = TypeVar("MarkT")
_MISSING: Any = object()


class Finding:
    """One thing that is wrong."""

    __slots__ = ("input", "kind", "limit", "location")

    def __init__(self, kind: str, value: object, limit: Any = None, location: Location = ()) -> None:
        self.kind = kind
        """A word for it, such as ``missing``."""
        self.input = value
        """What was found there."""
        self.limit = limit
        """The bound that was broken, the words that are allowed, or the text of a check of its own."""
        self.location = location
        """Keys and indices that lead to it."""


class ValidationError(ValueError):
    """Everything that is wrong with one object."""

    def __init__(self, findings: list[Finding]) -> None:
        super().__init__("; ".join(f"{finding.location}: {finding.kind}" for finding in findings))
        self.findings = findings


def _bad(kind: str, value: object, limit: Any = None) -> ValidationError:
    return ValidationError([Finding(kind, value, limit)])


def _found(check: Check, value: object, part: int | str, findings: list[Finding]) -> Any:
    """``value`` as ``check`` has it; what is wrong with it is added to ``findings``, under ``part``."""
    if isinstance(value, str) and not _is_text(value):
        findings.append(Finding("no_text", value, None, (part,)))
        return None
    try:
        return check(value)
    except ValidationError as error:
        findings += [
            Finding(found.kind, found.input, found.limit, (part, *found.location)) for found in error.findings
        ]
    except ValueError as error:
        findings.append(Finding("value_error", value, str(error), (part,)))
    return None


def _is_text(value: str) -> bool:
    """False of half a character, such as of an argument in another encoding: no file can hold it."""
    try:
        return value.isascii() or bool(value.encode())
    except UnicodeEncodeError:
        return False


# ---------------------------------------------------------------------- what annotations are made of


class BeforeValidator:
    """Changes or refuses (ValueError) a value before anything else looks at it."""

    __slots__ = ("func",)

    def __init__(self, func: Callable[[Any], Any]) -> None:
        self.func = func


class AfterValidator(BeforeValidator):
    """Changes or refuses a value that has passed everything to its left."""

    __slots__ = ()


class Discriminator(BeforeValidator):
    """Names the :class:`Tag` of the member of a union that a value is for."""

    __slots__ = ()


class Tag:
    """The name of one member of a union."""

    __slots__ = ("tag",)

    def __init__(self, tag: str) -> None:
        self.tag = tag


class InstanceOf:
    """``Annotated[T, InstanceOf()]``: an object of the class itself, which no file can hold."""

    __slots__ = ()


class Declared:
    """What ``Field(...)`` says; None where it says nothing."""

    __slots__ = (
        "alias",
        "allow_inf_nan",
        "default",
        "default_factory",
        "description",
        "exclude",
        "ge",
        "le",
        "max_length",
        "min_length",
        "pattern",
        "repr",
    )

    default: Any
    default_factory: Callable[[], Any] | None
    ge: float | None
    le: float | None
    min_length: int | None
    max_length: int | None
    pattern: str | None
    description: str | None
    alias: str | None
    allow_inf_nan: bool | None
    exclude: bool
    repr: bool


def Field(  # noqa: N802 - a word that everybody knows
    default: Any = _MISSING,
    *,
    default_factory: Callable[[], Any] | None = None,
    ge: float | None = None,
    le: float | None = None,
    min_length: int | None = None,
    max_length: int | None = None,
    pattern: str | None = None,
    description: str | None = None,
    alias: str | None = None,
    allow_inf_nan: bool | None = None,
    exclude: bool = False,
    repr: bool = True,
) -> Any:
    """Bounds of a number, a text or a list, in ``Annotated``; or, as a default, facts about the field.

    Args:
        default: of the field; none: it is required.
        default_factory: makes the default.
        ge, le: lowest and highest number.
        min_length, max_length: of a text or a list.
        pattern: regular expression of a text.
        description: for the JSON Schema.
        alias: the key in files, where that is no name of Python's. Only as a default.
        allow_inf_nan: infinity is a number here.
        exclude: left out of :meth:`Checked.model_dump`. Only as a default.
        repr: whether the field is part of ``repr``. Only as a default.
    """
    said = Declared()
    said.default, said.default_factory, said.description, said.alias = (
        default,
        default_factory,
        description,
        alias,
    )
    said.ge, said.le, said.min_length, said.max_length, said.pattern = ge, le, min_length, max_length, pattern
    said.allow_inf_nan, said.exclude, said.repr = allow_inf_nan, exclude, repr
    return said


class FieldInfo:
    """One field of a class."""

    __slots__ = ("_check", "_metadata", "_owner", "_text", "_type", "name", "said")

    def __init__(self, name: str, owner: type[Checked], text: str, default: Any) -> None:
        self.name = name
        self._owner, self._text = owner, text
        self._type: Any = _MISSING
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
        return self.said.default is _MISSING and self.said.default_factory is None

    @property
    def default(self) -> Any:
        """The default value; None of a field that is required."""
        if self.said.default_factory is not None:
            return self.said.default_factory()
        return None if self.said.default is _MISSING else self.said.default

    @property
    def annotation(self) -> Any:
        """The field's type without what ``Annotated`` says about it."""
        if self._type is _MISSING:
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
                    check = _after(change, check)
            self._check = check
        return self._check


def split(annotation: Any) -> tuple[Any, tuple[Any, ...]]:
    """A type and what ``Annotated`` says about it."""
    if get_origin(annotation) is Annotated:
        return annotation.__origin__, annotation.__metadata__
    return annotation, ()


# ---------------------------------------------------------------------- checks, made from annotations


def compiled(annotation: Any, metadata: tuple[Any, ...] = ()) -> Check:
    """What checks a value of a type. First the validators that come before it, from right to left, then the
    type, then bounds and the other validators from left to right."""
    inner, more = split(annotation)
    metadata = (*more, *metadata)
    check = _of_type(inner, metadata)
    for entry in metadata:
        if isinstance(entry, Declared):
            for bound in _bounds(entry):
                check = _after(check, bound)
        elif isinstance(entry, AfterValidator):
            check = _after(check, entry.func)
    if inner is float:
        check = _after(check, float)
    for entry in metadata:
        if type(entry) is BeforeValidator:
            check = _after(entry.func, check)
    return check


def _after(first: Check, then: Check) -> Check:
    return lambda value: then(first(value))


def _of_type(annotation: Any, metadata: tuple[Any, ...]) -> Check:
    origin = get_origin(annotation)
    if any(isinstance(entry, InstanceOf) for entry in metadata):
        return _instance_of(annotation)
    if isinstance(annotation, type) and issubclass(annotation, Checked):
        return annotation.model_validate
    if annotation in _PLAIN:
        if annotation is float and any(isinstance(e, Declared) and e.allow_inf_nan for e in metadata):
            return _number
        return _PLAIN[annotation]
    if origin is Literal:
        return _literal(get_args(annotation))
    if origin in (typing.Union, types.UnionType):
        chooses = [entry.func for entry in metadata if isinstance(entry, Discriminator)]
        return _tagged(get_args(annotation), chooses[0]) if chooses else _union(get_args(annotation))
    if origin is tuple:
        return _tuple(get_args(annotation))
    if origin is dict:
        return _dict(*get_args(annotation))
    raise TypeError(f"{annotation!r} is no type that a field can have")


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise _bad("string_type", value)
    return value


def _whole(value: Any) -> int:
    if type(value) is not int:
        raise _bad("int_type", value)
    return value


def _number(value: Any) -> float:
    if type(value) is not float and type(value) is not int:
        raise _bad("float_type", value)
    return cast("float", value)  # made a float after all bounds: messages show what the user wrote


def _finite(value: Any) -> float:
    number = _number(value)
    try:
        finite = math.isfinite(number)
    except OverflowError:  # an integer of hundreds of digits
        finite = False
    if not finite:
        raise _bad("finite_number", value)
    return number


def _truth(value: Any) -> bool:
    if type(value) is not bool:
        raise _bad("bool_type", value)
    return value


def _nothing(value: Any) -> None:
    if value is not None:
        raise _bad("none_required", value)


_PLAIN: dict[Any, Check] = {
    str: _text,
    int: _whole,
    float: _finite,
    bool: _truth,
    type(None): _nothing,
    Any: lambda value: value,
}


def _instance_of(wanted: type) -> Check:
    def check(value: Any) -> Any:
        if not isinstance(value, wanted):
            raise _bad("is_instance_of", value, wanted.__name__)
        return value

    return check


def _literal(words: tuple[Any, ...]) -> Check:
    def check(value: Any) -> Any:
        for word in words:
            if type(word) is type(value) and word == value:
                return word
        raise _bad("literal_error", value, words)

    return check


def _union(members: tuple[Any, ...]) -> Check:
    """The first member that takes a value; if none does, what the first of them says about it."""
    optional = type(None) in members
    checks = [compiled(member) for member in members if member is not type(None)]

    def check(value: Any) -> Any:
        if value is None and optional:
            return None
        error: ValueError = _bad("none_required", value)
        for number, member in enumerate(checks):
            try:
                return member(value)
            except ValueError as problem:
                if number == 0:
                    error = problem
        raise error

    return checks[0] if len(checks) == 1 and not optional else check


def _tagged(members: tuple[Any, ...], choose: Callable[[Any], Any]) -> Check:
    checks = {
        entry.tag: compiled(member)
        for member in members
        for entry in split(member)[1]
        if isinstance(entry, Tag)
    }

    def check(value: Any) -> Any:
        return checks[choose(value)](value)

    return check


def _tuple(members: tuple[Any, ...]) -> Check:
    many = members[-1:] == (...,)
    checks = [compiled(member) for member in members if member is not ...]

    def check(value: Any) -> Any:
        if not isinstance(value, tuple):
            raise _bad("tuple_type", value)
        findings: list[Finding] = []
        each = checks * len(value) if many else checks
        kept = [
            _found(one, part, index, findings)
            for index, (one, part) in enumerate(zip(each, value, strict=False))
        ]
        if len(value) > len(each):
            findings.append(Finding("too_long", value, len(each)))
        findings += [Finding("missing", value, None, (index,)) for index in range(len(value), len(each))]
        if findings:
            raise ValidationError(findings)
        return tuple(kept)

    return check


def _dict(key_type: Any, value_type: Any) -> Check:
    check_key, check_value = compiled(key_type), compiled(value_type)

    def check(value: Any) -> Any:
        if not isinstance(value, dict):
            raise _bad("dict_type", value)
        findings: list[Finding] = []
        kept = {}
        for key, part in value.items():
            where = _part(key)
            kept_key = _found(check_key, key, where, findings)
            kept[kept_key] = _found(check_value, part, where, findings)
        if findings:
            raise ValidationError(findings)
        return kept

    return check


def _part(key: object) -> int | str:
    return key if type(key) is int or isinstance(key, str) else str(key)


def _bounds(said: Declared) -> Iterator[Check]:
    if said.ge is not None or said.le is not None:
        low, high = said.ge, said.le

        def in_range(value: Any) -> Any:
            if low is not None and not value >= low:
                raise _bad("greater_than_equal", value, low)
            if high is not None and not value <= high:
                raise _bad("less_than_equal", value, high)
            return value

        yield in_range
    if said.min_length is not None or said.max_length is not None:
        least, most = said.min_length or 0, said.max_length

        def long_enough(value: Any) -> Any:
            if len(value) < least:
                raise _bad("too_short", value, least)
            if most is not None and len(value) > most:
                raise _bad("too_long", value, most)
            return value

        yield long_enough
    if said.pattern is not None:
        pattern = re.compile(re.sub(r"\$$", r"\\Z", said.pattern))  # `$` would let a line end pass

        def matches(value: Any) -> Any:
            if not pattern.search(value):
                raise _bad("string_pattern_mismatch", value)
            return value

        yield matches


# ---------------------------------------------------------------------- classes of fields

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
                        found[name] = FieldInfo(name, base, text, base.__dict__.get(name, _MISSING))
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
            raise _bad("model_type", data)
        findings: list[Finding] = []
        values = self.__dict__
        given = set()
        for name, field in cls.model_fields.items():
            value = data.get(field.key, _MISSING)
            if value is not _MISSING:
                values[name] = _found(field.check, value, field.key, findings)
                given.add(name)
            elif field.is_required:
                findings.append(Finding("missing", data, None, (field.key,)))
            else:
                values[name] = field.default
        if len(given) < len(data):
            known = {field.key for field in cls.model_fields.values()}
            for key in data:
                if not isinstance(key, str):
                    findings.append(Finding("invalid_key", key, None, (_part(key),)))
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
        raise _bad("value_error", data, str(error)) from None
