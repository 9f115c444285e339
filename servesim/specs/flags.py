"""Command-line flags generated from a class's fields: a flag, its help and its check are written once."""

from __future__ import annotations

import argparse
import types
import typing
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar, get_args, get_origin

from servesim.slotted import dataclass
from servesim.specs.checked import Checked
from servesim.specs.dtypes import word_unless
from servesim.specs.validation import validated

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from servesim.specs.checked import FieldInfo
    from servesim.specs.validation import Location

OptionsT = TypeVar("OptionsT", bound=Checked)


@dataclass(frozen=True, slots=True)
class Flag:
    """What a field needs to be a flag; stands in the field's ``Annotated`` metadata."""

    help: str
    group: str
    metavar: str | None = None
    choices: tuple[str, ...] = ()
    """Values shown and accepted; empty: those of the field's ``Literal``, or any."""
    default_text: str | None = None
    """The default in words, where its value alone says little."""
    negative: bool | None = None
    """Whether ``--no-<name>`` exists; None: when the field is on by default."""
    aliases: tuple[str, ...] = ()
    """Other spellings of the flag, such as those of vLLM; without dashes they are keys of a config too."""
    opposites: tuple[str, ...] = ()
    """Spellings that switch a flag off: ``--enforce-eager`` of ``--cudagraph``."""
    writes: tuple[str, ...] = ()
    """Endings of the file that the option names for the run to write; empty: it names none."""
    hidden: bool = False
    """Left out of the help: there for the scripts of another tool."""
    beside: Callable[[Any], str] | None = None
    """Why the option cannot act beside the other options, or an empty text; see servesim.specs.conditions."""
    acts: Callable[[Any], str] | None = None
    """Why the option cannot act in a run, or an empty text; None: it always does."""
    except_for: Callable[[Any], str] | None = None
    """What the option leaves out of what its name promises."""
    noted: bool = False
    """Whether an option that cannot act is noted even where it asks for something, instead of refused."""
    refusal: Callable[[str], str] | None = None
    """Why a word that other programs take is none of ``choices``, or an empty text."""
    text: bool = False
    """Whether a value is more than a number, so that only the field's own check can read it."""
    bare: float | None = None
    """The value of a flag that stands there without one; None: it needs one."""
    several: bool = False
    """Whether several words may follow the flag, as in vLLM; the field's own check puts them together."""


def flag_of(field: FieldInfo) -> Flag | None:
    """The flag a field carries, if any."""
    return next((entry for entry in field.metadata if isinstance(entry, Flag)), None)


def flag_name(field_name: str) -> str:
    """``max_num_seqs`` -> ``--max-num-seqs``."""
    return "--" + field_name.replace("_", "-")


def renamed(fields: Mapping[str, FieldInfo], data: Mapping[str, Any]) -> dict[str, Any]:
    """``data`` with keys that are other spellings of a field of ``fields`` under the field's own name.

    Raises:
        ValueError: a field stands there under two of its names.
    """
    own: dict[str, tuple[str, bool]] = {}
    for name, field in fields.items():
        flag = flag_of(field)
        if flag is None:
            continue
        own |= {_key(alias): (name, False) for alias in flag.aliases if alias.startswith("--")}
        own |= {_key(opposite): (name, True) for opposite in flag.opposites}
    result: dict[str, Any] = {}
    for key, value in data.items():
        name, opposite = own.get(key, (key, False))
        if name in result or (name != key and name in data):
            raise ValueError(f"{key}: is the same as {name}, which stands there too; keep one")
        result[name] = not value if opposite and isinstance(value, bool) else value
    return result


def _key(flag: str) -> str:
    """``--max-num-seqs`` -> ``max_num_seqs``."""
    return flag.removeprefix("--").replace("-", "_")


def add_flags(
    parser: argparse.ArgumentParser,
    model: type[Checked],
    *,
    only: Collection[str] | None = None,
    exclude: Collection[str] = (),
    title: str | None = None,
) -> None:
    """Add the flags of ``model``'s fields, in their groups or all in one called ``title``.

    A flag that the user leaves out is absent from the namespace: defaults belong to the model.
    """
    groups: dict[str, argparse._ArgumentGroup] = {}
    for name, field in model.model_fields.items():
        flag = flag_of(field)
        if flag is None or name in exclude or (only is not None and name not in only):
            continue
        group = title or flag.group
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        groups[group].add_argument(flag_name(name), *flag.aliases, dest=name, **_argument(field, flag))


def from_flags(model: type[OptionsT], namespace: argparse.Namespace, **overrides: Any) -> OptionsT:
    """The options of a parsed command line; other attributes of the namespace are passed over.

    Raises:
        InputError: a value is out of bounds; the message names the flag.
    """
    given = {name: value for name, value in vars(namespace).items() if name in model.model_fields}
    return validated(model, {**given, **overrides}, "", _flag_path)


def _flag_path(location: Location) -> str:
    return flag_name(str(location[0])) if location else "options"


def _argument(field: FieldInfo, flag: Flag) -> dict[str, Any]:
    """Keyword arguments of ``add_argument`` for one field."""
    argument: dict[str, Any] = {"default": argparse.SUPPRESS, "help": _help(field, flag)}
    if flag.hidden:
        argument["help"] = argparse.SUPPRESS
    base = base_type(field.annotation)
    if base is bool:
        negative = flag.negative if flag.negative is not None else field.default is True
        if not negative:
            return {**argument, "action": "store_true"}
        return {**argument, "action": _OnOff, "opposites": flag.opposites}
    choices = choices_of(field, flag)
    if choices:
        argument["choices"] = choices
    if base in (int, float) and not flag.text:
        argument["type"] = _whole_number if base is int else _number
    if flag.refusal is not None:
        argument["type"] = word_unless(flag.refusal)
    if flag.bare is not None:
        argument |= {"nargs": "?", "const": flag.bare}
    if flag.several:
        argument["nargs"] = "+"
    if flag.metavar or not choices:
        argument["metavar"] = flag.metavar or {int: "N", float: "X"}.get(base, "TEXT")
    return argument


def choices_of(field: FieldInfo, flag: Flag) -> tuple[str, ...]:
    """The words a field accepts; empty when it is not a matter of choice."""
    if flag.choices or flag.text:
        return flag.choices
    annotation = field.annotation
    members = get_args(annotation) if _is_union(annotation) else (annotation,)
    return tuple(
        str(word) for member in members if get_origin(member) is typing.Literal for word in get_args(member)
    )


def base_type(annotation: Any) -> type:
    """The plain type under ``Annotated`` and ``| None``: int, float, bool or str."""
    if get_origin(annotation) is typing.Annotated:
        return base_type(get_args(annotation)[0])
    if _is_union(annotation):
        return base_type(next(part for part in get_args(annotation) if part is not type(None)))
    return annotation if isinstance(annotation, type) else str


def _is_union(annotation: Any) -> bool:
    return get_origin(annotation) in (typing.Union, types.UnionType)


def _help(field: FieldInfo, flag: Flag) -> str:
    if flag.default_text is not None:
        default = flag.default_text
    elif isinstance(field.default, bool):
        default = "on" if field.default else "off"
    else:
        default = "none" if field.default is None else str(field.default)
    return f"{flag.help} (default: {default})".replace("%", "%%")


class _OnOff(argparse.Action):
    """``--x`` and ``--no-x`` in one line of help, with ``opposites`` that mean ``--no-x``."""

    def __init__(
        self,
        option_strings: list[str],
        dest: str,
        default: Any = None,
        help: str | None = None,
        opposites: Collection[str] = (),
    ) -> None:
        self._off = {*("--no-" + name.removeprefix("--") for name in option_strings), *opposites}
        names = [*option_strings, *("--no-" + name.removeprefix("--") for name in option_strings), *opposites]
        super().__init__(names, dest, nargs=0, default=default, help=help)

    def __call__(self, _parser: Any, namespace: Any, _values: Any, option: str | None = None) -> None:
        setattr(namespace, self.dest, option not in self._off)

    def format_usage(self) -> str:
        return " | ".join(self.option_strings)


def _converter(convert: Callable[[str], Any], expected: str) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            return convert(text)
        except (ValueError, OverflowError):
            raise argparse.ArgumentTypeError(f"{text!r} is not allowed; must be {expected}") from None

    return parse


_whole_number = _converter(int, "a whole number")
_number = _converter(float, "a number")
