"""The base of every description a user writes, and findings about one as one message in servesim's form.

``configs/cluster/x.json: nodes[0].instances[1].npu_mem.mem_size: -3 is not allowed; must be > 0 GB``
"""

from __future__ import annotations

import json
import reprlib
import types
import typing
from difflib import get_close_matches
from itertools import takewhile
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_args, get_origin

from servesim.errors import InputError
from servesim.slotted import dataclass
from servesim.specs.annotated import Field, ValidationError
from servesim.specs.checked import Checked

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from servesim.specs.annotated import Finding

    Location = Sequence[int | str]

SpecT = TypeVar("SpecT", bound=Checked)

_SHOWN_CHARACTERS = 60
_NEAR = 0.68
"""Share of like letters from which on a word is taken for a slip of another: ``phi3`` is no ``phimoe``."""
_SHOWN = 8  # problems listed before "and N more"
_EXPECTED_TYPES = {
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "a text",
    "finite_number": "a finite number",
    "model_type": "an object {...}",
    "dict_type": "an object {...}",
    "tuple_type": "a list [...]",
}
_BOUNDS = {"greater_than_equal": ">=", "less_than_equal": "<="}


def validated(
    model: type[SpecT], data: object, source: str, path: Callable[[Location], str] | None = None
) -> SpecT:
    """``data`` as a ``model``; ``path`` spells a location (default: ``nodes[0].instances[1].tp_size``).

    Raises:
        InputError: one message that lists every problem, the most telling first.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise InputError(joined(source, problems(error, model, path or field_path))) from None


def joined(source: str, found: Sequence[str]) -> str:
    """One message for several problems: the first on the first line, the others below it."""
    prefix = f"{source}: " if source else ""
    lines = [prefix + found[0], *(f"  also {problem}" for problem in found[1:_SHOWN])]
    if len(found) > _SHOWN:
        lines.append(f"  and {len(found) - _SHOWN} more")
    return "\n".join(lines)


def problems(error: ValidationError, model: type[Checked], path: Callable[[Location], str]) -> list[str]:
    """Every finding as ``path: what was found; what is allowed``, unknown keys first.

    A missing key is left out when an unknown key beside it is evidently its misspelling.
    """
    unknown: list[str] = []
    others: list[tuple[tuple[int | str, ...], str]] = []
    misspelt: set[tuple[int | str, ...]] = set()
    for finding in error.findings:
        location = finding.location
        if finding.kind == "extra_forbidden":
            key, parent = str(location[-1]), location[:-1]
            owner = _model_at(model, parent)
            known = list(owner.model_fields) if owner else []
            near = nearest(key, known)
            if near:
                misspelt.add((*parent, near))
            unknown.append(f"{path(location)}: unknown key; {hint(key, known)}")
        else:
            text = _problem(finding, model, location)
            # A check over a whole file names its field itself.
            others.append((location, f"{path(location)}: {text}" if location else text))
    return unknown + [text for location, text in others if location not in misspelt]


def field_path(location: Location) -> str:
    """``("nodes", 0, "tp_size")`` -> ``nodes[0].tp_size``."""
    text = ""
    for part in location:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            key = part if part.isprintable() and part.strip() else json.dumps(part)
            text += f".{key}" if text else key
    return text or "(top level)"


def nearest(key: str, known: Iterable[str]) -> str | None:
    """The known word most like ``key``, upper and lower case alike; None when nothing comes near.

    Near is a slip of the pen or a part of the word: a wrong hint is worse than none.
    """
    by_lower = {word.lower(): word for word in known}
    close = get_close_matches(key.lower(), by_lower, n=1, cutoff=_NEAR)
    close = close or [word for word in by_lower if len(key) > 2 and key.lower() in word]
    return by_lower[close[0]] if close else None


def one_slip(word: str, other: str) -> bool:
    """Whether one letter wrong, missing, added or exchanged with its neighbour makes ``other`` of ``word``.

    Upper and lower case are alike, and so are hyphens and underscores.
    """
    word, other = (text.lower().replace("-", "_") for text in (word, other))
    if abs(len(word) - len(other)) > 1:
        return False
    alike = takewhile(lambda pair: pair[0] == pair[1], zip(word, other, strict=False))
    start = sum(1 for _ in alike)
    word, other = word[start:], other[start:]
    if word[:2] == other[1::-1] and len(word) == len(other) > 1:  # exchanged
        return word[2:] == other[2:]
    return word[len(word) >= len(other) :] == other[len(other) >= len(word) :]


def hint(key: str, known: Sequence[str]) -> str:
    """``did you mean 'tp_size'?``, or the known words when none is near."""
    near = nearest(key, known)
    return f"did you mean {near!r}?" if near else f"known: {', '.join(known)}"


def shown(value: object) -> str:
    """A value as the user wrote it, cut to a readable length."""
    text = ""
    try:
        # Piece by piece: a few lines of YAML can name a value whose text would fill the memory.
        for piece in json.JSONEncoder(ensure_ascii=False).iterencode(value):
            text += piece
            if len(text) > _SHOWN_CHARACTERS:
                break
    except (TypeError, ValueError, RecursionError):  # not JSON, or an integer of thousands of digits
        text = reprlib.repr(value) if not isinstance(value, int) else "an integer of thousands of digits"
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 3] + "..."


def _problem(finding: Finding, model: type[Checked], location: tuple[int | str, ...]) -> str:
    kind, limit = finding.kind, finding.limit
    if kind == "missing":
        return "is missing; it is required"
    if kind == "value_error":
        return str(limit)
    if kind == "no_text":
        return f"{ascii(finding.input)[:60]} is not allowed; must be text in UTF-8"
    value = shown(finding.input)
    if kind in _BOUNDS:
        unit = _unit_at(model, location)
        return f"{value} is not allowed; must be {_BOUNDS[kind]} {limit:g}{f' {unit}' if unit else ''}"
    if kind == "literal_error":
        choices = [str(choice) for choice in limit]
        near = nearest(str(finding.input), choices)
        ask = f"; did you mean {near!r}?" if near else ""
        return f"{value} is not allowed; must be one of {', '.join(choices)}{ask}"
    if kind in _EXPECTED_TYPES:
        return f"{value} is not allowed; must be {_EXPECTED_TYPES[kind]}"
    if kind == "too_short" and isinstance(finding.input, str):
        return f"{value} is not allowed; must be a text that is not empty"
    if kind == "too_short":
        return f"needs at least {limit} of them, not {_length(finding.input)}"
    if kind == "too_long" and isinstance(finding.input, str):
        return f"{value} is not allowed; must be at most {limit} characters"
    if kind == "too_long":
        return f"may have at most {limit} of them, not {_length(finding.input)}"
    if kind == "string_pattern_mismatch":
        return f"{value} is not allowed; letters, digits and . _ + - only"
    if kind == "invalid_key":
        return f"{value} is not allowed; a key must be a text"
    return f"{value} is not allowed; must be {'nothing' if limit is None else f'a {limit}'}"


def _length(value: Any) -> int:
    return len(value)


def _model_at(model: type[Checked], location: tuple[int | str, ...]) -> type[Checked] | None:
    """The model whose object stands at ``location``."""
    current: type[Checked] | None = model
    for part in location:
        if isinstance(part, int) or current is None:
            continue
        field = current.model_fields.get(part)
        # A key of a dict field (such as a layer name) is no field: the dict's value model stays current.
        if field is not None:
            current = next(_models_in(field.annotation), None)
    return current


def _models_in(annotation: Any) -> Iterator[type[Checked]]:
    if isinstance(annotation, type) and issubclass(annotation, Checked):
        yield annotation
    for argument in get_args(annotation):
        yield from _models_in(argument)


def _unit_at(model: type[Checked], location: tuple[int | str, ...]) -> str | None:
    names = [index for index, part in enumerate(location) if isinstance(part, str)]
    if not names:
        return None
    owner = _model_at(model, location[: names[-1]])
    field = owner.model_fields.get(str(location[names[-1]])) if owner else None
    if field is None:
        return None
    return next(
        (
            entry.name
            for entry in [*field.metadata, *_metadata_in(field.annotation)]
            if isinstance(entry, Unit)
        ),
        None,
    )


def _metadata_in(annotation: Any) -> Iterator[Any]:
    """Metadata of ``Annotated`` types inside unions and lists, such as ``SizeGb | None``."""
    if get_origin(annotation) is typing.Annotated:
        yield from annotation.__metadata__
        yield from _metadata_in(get_args(annotation)[0])
    elif get_origin(annotation) in (typing.Union, types.UnionType, tuple, list):
        for argument in get_args(annotation):
            yield from _metadata_in(argument)


class Spec(Checked):
    """Frozen and strict: ``"8"`` is no integer, ``true`` no number, NaN and inf no measurements."""


@dataclass(frozen=True, slots=True)
class Unit:
    """The unit of a number, for error messages and the JSON Schema."""

    name: str


def list_as_tuple(value: object) -> object:
    """JSON's and YAML's lists, for fields that are tuples."""
    return tuple(value) if isinstance(value, list) else value


# Every number has bounds that no real thing reaches, and within which no time or size that is worked out
# from it leaves the 64 bits it is kept in.
SizeGb = Annotated[float, Field(ge=1e-6, le=1e6), Unit("GB")]
"""Memory size; 1 GB here is 2**30 bytes."""
BandwidthGbs = Annotated[float, Field(ge=1e-6, le=1e6), Unit("GB/s")]
"""Bandwidth; 1 GB/s is 1e9 bytes per second."""
LatencyNs = Annotated[float, Field(ge=0, le=1e12), Unit("ns")]
PowerW = Annotated[float, Field(ge=0, le=1e6), Unit("W")]
Count = Annotated[int, Field(ge=1, le=1_000_000)]
Degree = Annotated[int, Field(ge=1, le=65536)]
"""Of parallelism: so many NPUs, or stages."""
UNLIMITED = 2**31 - 1
"""What a 0 that means "no limit" is resolved to."""
Limit = Annotated[int, Field(ge=0, le=UNLIMITED)]
"""How many of something there are."""
