"""What an annotation says a field accepts, and the check that is made of it.

The words are pydantic's (``Field``, ``BeforeValidator``), and so is what they mean, in its strict mode. Only
what descriptions of clusters, models and options need is here: loading a general library takes longer than a
short run. Classes of such fields are :mod:`servesim.specs.checked`.
"""

from __future__ import annotations

import math
import re
import types
import typing
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast, get_args, get_origin

if TYPE_CHECKING:
    from collections.abc import Iterator

Check = Callable[[Any], Any]
"""Gives the value as it is kept; raises :class:`ValidationError` or ValueError."""
Location = tuple[int | str, ...]
MISSING: Any = object()
"""In the place of a value or a default that is not there."""


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


def bad(kind: str, value: object, limit: Any = None) -> ValidationError:
    """An error of one finding, at the value itself."""
    return ValidationError([Finding(kind, value, limit)])


def found_by(check: Check, value: object, part: int | str, findings: list[Finding]) -> Any:
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
    default: Any = MISSING,
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


def split(annotation: Any) -> tuple[Any, tuple[Any, ...]]:
    """A type and what ``Annotated`` says about it."""
    if get_origin(annotation) is Annotated:
        return annotation.__origin__, annotation.__metadata__
    return annotation, ()


def compiled(annotation: Any, metadata: tuple[Any, ...] = ()) -> Check:
    """What checks a value of a type. First the validators that come before it, from right to left, then the
    type, then bounds and the other validators from left to right."""
    inner, more = split(annotation)
    metadata = (*more, *metadata)
    check = _of_type(inner, metadata)
    for entry in metadata:
        if isinstance(entry, Declared):
            for bound in _bounds(entry):
                check = after(check, bound)
        elif isinstance(entry, AfterValidator):
            check = after(check, entry.func)
    if inner is float:
        check = after(check, float)
    for entry in metadata:
        if type(entry) is BeforeValidator:
            check = after(entry.func, check)
    return check


def after(first: Check, then: Check) -> Check:
    """One check of two, the second on what the first gives."""
    return lambda value: then(first(value))


def _of_type(annotation: Any, metadata: tuple[Any, ...]) -> Check:
    origin = get_origin(annotation)
    if any(isinstance(entry, InstanceOf) for entry in metadata):
        return _instance_of(annotation)
    if hasattr(annotation, "model_validate"):  # a class of fields of its own
        return cast("Check", annotation.model_validate)
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
        raise bad("string_type", value)
    return value


def _whole(value: Any) -> int:
    if type(value) is not int:
        raise bad("int_type", value)
    return value


def _number(value: Any) -> float:
    if type(value) is not float and type(value) is not int:
        raise bad("float_type", value)
    return cast("float", value)  # made a float after all bounds: messages show what the user wrote


def _finite(value: Any) -> float:
    number = _number(value)
    try:
        finite = math.isfinite(number)
    except OverflowError:  # an integer of hundreds of digits
        finite = False
    if not finite:
        raise bad("finite_number", value)
    return number


def _truth(value: Any) -> bool:
    if type(value) is not bool:
        raise bad("bool_type", value)
    return value


def _nothing(value: Any) -> None:
    if value is not None:
        raise bad("none_required", value)


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
            raise bad("is_instance_of", value, wanted.__name__)
        return value

    return check


def _literal(words: tuple[Any, ...]) -> Check:
    def check(value: Any) -> Any:
        for word in words:
            if type(word) is type(value) and word == value:
                return word
        raise bad("literal_error", value, words)

    return check


def _union(members: tuple[Any, ...]) -> Check:
    """The first member that takes a value; if none does, what the first of them says about it."""
    optional = type(None) in members
    checks = [compiled(member) for member in members if member is not type(None)]

    def check(value: Any) -> Any:
        if value is None and optional:
            return None
        error: ValueError = bad("none_required", value)
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
            raise bad("tuple_type", value)
        findings: list[Finding] = []
        each = checks * len(value) if many else checks
        kept = [
            found_by(one, part, index, findings)
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
            raise bad("dict_type", value)
        findings: list[Finding] = []
        kept = {}
        for key, part in value.items():
            where = part_of(key)
            kept_key = found_by(check_key, key, where, findings)
            kept[kept_key] = found_by(check_value, part, where, findings)
        if findings:
            raise ValidationError(findings)
        return kept

    return check


def part_of(key: object) -> int | str:
    """A key as a part of a location."""
    return key if type(key) is int or isinstance(key, str) else str(key)


def _bounds(said: Declared) -> Iterator[Check]:
    if said.ge is not None or said.le is not None:
        low, high = said.ge, said.le

        def in_range(value: Any) -> Any:
            if low is not None and not value >= low:
                raise bad("greater_than_equal", value, low)
            if high is not None and not value <= high:
                raise bad("less_than_equal", value, high)
            return value

        yield in_range
    if said.min_length is not None or said.max_length is not None:
        least, most = said.min_length or 0, said.max_length

        def long_enough(value: Any) -> Any:
            if len(value) < least:
                raise bad("too_short", value, least)
            if most is not None and len(value) > most:
                raise bad("too_long", value, most)
            return value

        yield long_enough
    if said.pattern is not None:
        pattern = re.compile(re.sub(r"\$$", r"\\Z", said.pattern))  # `$` would let a line end pass

        def matches(value: Any) -> Any:
            if not pattern.search(value):
                raise bad("string_pattern_mismatch", value)
            return value

        yield matches
