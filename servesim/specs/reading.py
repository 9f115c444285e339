"""Reading JSON and YAML files so that whatever is wrong with one is told with its file and line."""

from __future__ import annotations

import json
import os
import re
from typing import TYPE_CHECKING, Any

from servesim.errors import InputError, MissingFileError
from servesim.specs.kept import keep_value, kept_value, key_of

if TYPE_CHECKING:
    from pathlib import Path

    import yaml


LIMIT_VARIABLE = "SERVESIM_MAX_INPUT_MIB"
"""Environment variable: MiB that one input file may have, unpacked, and the memory its requests may take."""
_DEFAULT_LIMIT_MIB = 4096
_SURROGATE = re.compile(
    r"\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])"
    r"|(?<!\\u[dD][89abAB][0-9a-fA-F]{2})\\u[dD][c-fC-F][0-9a-fA-F]{2}"
)
"""Half of a character outside the first 65,536 as JSON writes it; behind a backslash it may be none."""
_ALIAS = re.compile(r"^[^#\n]*(?:^|[\s\[{,:])\*\S", re.MULTILINE)
"""What may be the second mention of a part of a YAML file."""
_CONFIG_BYTES = 64 << 20  # a configuration that a person writes; the longest published ones have 100 kB


def input_limit_bytes() -> int:
    """Bytes that one input may have: :data:`LIMIT_VARIABLE`, 4 GiB without it.

    Raises:
        InputError: the variable holds no whole number of MiB from 1 on.
    """
    text = os.environ.get(LIMIT_VARIABLE, "").strip()
    if not text:
        return _DEFAULT_LIMIT_MIB << 20
    if not (text.isascii() and text.isdigit() and len(text) <= 9 and int(text)):
        raise InputError(
            f"{LIMIT_VARIABLE}: {text[:40]!r} is not allowed; must be a whole number of MiB >= 1"
        )
    return int(text) << 20


def too_large(source: object, limit_bytes: int) -> InputError:
    """The refusal of an input of more than ``limit_bytes``, which :func:`input_limit_bytes` gave."""
    return InputError(
        f"{source}: has more than {limit_bytes >> 20:,} MiB; give a smaller file, or raise the limit with "
        f"the environment variable {LIMIT_VARIABLE}"
    )


def read_text(path: Path) -> str:
    """The whole file as text, of at most :func:`input_limit_bytes`.

    Raises:
        InputError: a folder, not UTF-8, too large, or unreadable; MissingFileError when it is not there.
    """
    return decoded(path, read_bytes(path))


def read_bytes(path: Path) -> bytes:
    """The whole file of text as it is, of at most :func:`input_limit_bytes`.

    Raises:
        InputError: a folder, too large, or unreadable; MissingFileError when it is not there.
    """
    limit = input_limit_bytes()
    return _read_bytes(path, limit, too_large(path, limit))


def _read_config(path: Path) -> str:
    """As :func:`read_text`, for a file that a person writes."""
    refusal = InputError(f"{path}: has more than {_CONFIG_BYTES >> 20} MiB, which no configuration has")
    return decoded(path, _read_bytes(path, _CONFIG_BYTES, refusal))


def _read_bytes(path: Path, limit: int, refusal: InputError) -> bytes:
    try:
        with path.open("rb") as handle:
            # A device such as /dev/zero never ends: no more is read than is allowed.
            raw = handle.read(min(limit, _CONFIG_BYTES) + 1)
            if len(raw) > _CONFIG_BYTES and b"\0" not in raw[:4096] and limit > _CONFIG_BYTES:
                raw += handle.read(limit - _CONFIG_BYTES)
    except FileNotFoundError:
        raise MissingFileError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise InputError(f"{path}: this is a folder; a file is expected") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: cannot be read ({reason})") from None
    if b"\0" in raw[:4096]:
        raise InputError(f"{path}: line 1: holds zero bytes; a text file in UTF-8 is expected")
    if len(raw) > limit:
        raise refusal
    return raw


def decoded(path: Path, raw: bytes) -> str:
    """The text of a file's bytes.

    Raises:
        InputError: they are not UTF-8.
    """
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"{path}: line {line}: byte 0x{raw[error.start]:02x} is not UTF-8; save the file as UTF-8 text"
        ) from None


def read_json_object(path: Path, *, finite: bool = True) -> dict[str, Any]:
    """The JSON object in ``path``. Repeated keys are errors, and so are NaN and Infinity where ``finite``."""
    return parse_json_object(_read_config(path), str(path), finite=finite)


def parse_json_object(text: str, source: str, *, finite: bool = True) -> dict[str, Any]:
    """The JSON object in ``text``; ``source`` names it in messages.

    ``finite=False``: NaN and Infinity are taken as Python writes them; whoever reads the fields checks them.

    Raises:
        InputError: empty, not JSON (with line and column), NaN, a repeated key, or not an object.
    """
    if not text.strip():
        raise InputError(f"{source}: line 1: the file is empty; a JSON object {{...}} is expected")
    try:
        constant = _no_constant if finite else None
        value = json.loads(text, object_pairs_hook=_unique_keys, parse_constant=constant)
    except json.JSONDecodeError as error:
        ends_early = error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated")
        cut = " (is the file cut short?)" if ends_early else ""
        raise InputError(
            f"{source}: line {error.lineno} column {error.colno}: not valid JSON: {error.msg}{cut}"
        ) from None
    except _RepeatedKeyError as error:
        raise InputError(
            f"{source}: line {_line_of_repeat(text, error.key)}: key {_quoted(error.key)} stands twice in "
            "one object; keep one"
        ) from None
    except _NotANumberError as error:
        line = _line_of(text, error.name)
        raise InputError(
            f"{source}: line {line}: {error.name} is not allowed; must be a finite number"
        ) from None
    except RecursionError:
        raise InputError(f"{source}: line 1: nested too deeply to be a configuration") from None
    except ValueError as error:  # an integer of thousands of digits
        raise InputError(f"{source}: line 1: {str(error).split(';')[0]}") from None
    half = _SURROGATE.search(text)
    if half is not None:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            line = text.count("\n", 0, half.start()) + 1
            raise InputError(f"{source}: line {line}: {half[0]} is half a character; write text") from None
    return _object(value, source, "JSON object {...}")


def read_yaml_object(path: Path) -> dict[str, Any]:
    """The YAML mapping in ``path``. Repeated keys are errors."""
    text = _read_config(path)
    if not text.strip():
        raise InputError(f"{path}: line 1: the file is empty; a mapping `key: value` is expected")
    key = key_of("yaml", text, by=[__name__])
    kept = kept_value(key)
    if kept is not None:
        return _object(kept, str(path), "")
    value = _object(_parse_yaml(path, text), str(path), "mapping `key: value`")
    if not _ALIAS.search(text):  # may name a part again and again: a few lines can stand for terabytes
        keep_value(key, value)
    return value


def _parse_yaml(path: Path, text: str) -> object:
    import yaml

    try:
        value: object = yaml.load(text, Loader=_yaml_loader())
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1} column {mark.column + 1}" if mark else "line 1"
        reason = getattr(error, "problem", None) or getattr(error, "reason", "cannot be parsed")
        raise InputError(f"{path}: {where}: not valid YAML: {reason}") from None
    except (RecursionError, ValueError) as error:
        raise InputError(f"{path}: line 1: not valid YAML: {error}") from None
    return value


def _object(value: object, source: str, expected: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        found = {list: "a list", str: "a text", type(None): "nothing"}.get(type(value), "a single value")
        raise InputError(f"{source}: line 1: {found} is not allowed here; must be a {expected}")
    return value


class _RepeatedKeyError(Exception):
    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key


class _NotANumberError(Exception):
    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _RepeatedKeyError(key)
            seen.add(key)
    return result


def _no_constant(name: str) -> None:
    raise _NotANumberError(name)


def _quoted(key: str) -> str:
    return json.dumps(key, ensure_ascii=False)


def _line_of(text: str, needle: str) -> int:
    return text.count("\n", 0, max(text.find(needle), 0)) + 1


def _line_of_repeat(text: str, key: str) -> int:
    """The line of the second place where the key is written; exact unless other objects carry it too."""
    first = text.find(_quoted(key))
    second = text.find(_quoted(key), first + 1)
    return text.count("\n", 0, max(second, 0)) + 1


def _yaml_loader() -> type[yaml.SafeLoader]:
    """A safe loader (C when there) that refuses repeated keys."""
    import yaml

    base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

    class UniqueKeyLoader(base):  # type: ignore[misc]
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            seen: set[Any] = set()
            for key_node, _ in node.value:
                if key_node.tag == "tag:yaml.org,2002:merge":  # a few lines of merges can stand for terabytes
                    raise yaml.constructor.ConstructorError(
                        None, None, "merge keys (<<) are not allowed; write the keys out", key_node.start_mark
                    )
                key = self.construct_object(key_node, deep=True)
                if not isinstance(key, str | int | float | bool):
                    raise yaml.constructor.ConstructorError(
                        None, None, "a key must be a word", key_node.start_mark
                    )
                if key in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"key {key!r} stands twice in one mapping", key_node.start_mark
                    )
                seen.add(key)
            mapping: dict[Any, Any] = super().construct_mapping(node, deep)
            return mapping

    return UniqueKeyLoader
