"""Spoiling inputs: JSON trees by their structure, files by their lines and bytes."""

from __future__ import annotations

import copy
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from random import Random

NUMBERS: tuple[Any, ...] = (
    *(0, 1, -1, 2, 3, 7, 10**4, 10**6, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 10**30, -(2**63)),
    *(0.0, -0.0, 0.5, 1.5, 1e-308, 1e-300, 1e-9, 1e-6, 1e-3, 1e6, 1e9, 1e12, 1e18, 1e308, -1e-6, 5e-324),
    *(float("nan"), float("inf"), float("-inf")),
)
WORDS: tuple[str, ...] = (
    *(
        "",
        " ",
        "x",
        "0",
        "-1",
        "1e9",
        "nan",
        "true",
        "null",
        "None",
        "auto",
        "npu",
        "cpu",
        "cxl:0",
        "cxl:99999",
    ),
    *("../..", "/dev/null", "a/b/c/d", "A" * 3000),
    *("\0", "\n", "\x1b[31m", "\u202e\u0663", "\U0001f4a5", "\ufb01", "\ud83d"),
    *("bfloat16", "fp8", "int8", "float32", "H100", "Toy", "org/toy", "prefill", "decode", "ring", "switch"),
    *("0-3", "9-1", "0-99999", "full_attention", "sliding_attention", "8,9,10"),
)
OTHERS: tuple[Any, ...] = (None, True, False, [], {}, [[]], {"": {}}, [None], {"a": 1}, [1, 2, 3], [0.5, "x"])


def junk(rng: Random) -> Any:
    """Any value at all."""
    return copy.deepcopy(rng.choice(rng.choice((NUMBERS, NUMBERS, WORDS, OTHERS))))


def places(value: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of everything inside a JSON value."""
    found = [here] if here else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found += places(inner, (*here, key))
    return found


def mutated(value: Any, rng: Random, most: int = 3) -> Any:
    """A copy of a JSON tree with one to ``most`` things changed.

    More often than not only numbers and switches take other values that may be legal, so that what lies
    behind the checks is reached too.
    """
    changed = copy.deepcopy(value)
    gentle = rng.random() < 0.6
    for _ in range(rng.choice((1, 1, 1, *range(1, most + 1)))):
        found = places(changed)
        if gentle:
            found = [path for path in found if isinstance(_at(changed, path), (int, float))]
        if not found:
            return changed if gentle else junk(rng)
        *path, key = rng.choice(found)
        inner = changed
        for step in path:
            inner = inner[step]
        if gentle:
            inner[key] = _another(inner[key], rng)
        else:
            _change(inner, key, rng, lambda: _at(value, rng.choice(places(value))))
    return changed


def _another(old: float, rng: Random) -> Any:
    """Another number of the same kind, or the other position of a switch."""
    if isinstance(old, bool):
        return not old
    scaled = old * rng.choice((0, 0.001, 0.1, 0.5, 2, 3, 10, 1000, 10**6)) + rng.choice((0, 0, 1, -1))
    if isinstance(old, int):
        return rng.choice((0, 1, 2, 3, 5, 8, 64, int(scaled), int(scaled)))
    return rng.choice((0.0, 1e-6, 1e-3, 0.5, 1.0, 1e3, 1e6, scaled, scaled))


def _at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return copy.deepcopy(value)


def _change(inner: Any, key: Any, rng: Random, elsewhere: Any) -> None:
    """Do something to ``inner[key]``."""
    old = inner[key]
    numeric = isinstance(old, (int, float)) and not isinstance(old, bool)
    ways = ("junk", "drop", "twice", "swap", "rename", "nest")
    match rng.choice(("number", "number", "scale", "scale", "scale", *ways) if numeric else ways):
        case "number" if numeric:
            inner[key] = rng.choice(NUMBERS)
        case "scale" if numeric:
            factor = rng.choice((0.001, 0.1, 0.5, 2, 10, 1000, 10**6, -1))
            scaled = old * factor if abs(old) < 1e290 else old
            whole = isinstance(old, int) and abs(scaled) < 1e290
            inner[key] = int(scaled) if whole else scaled
        case "drop":
            del inner[key]
        case "twice" if isinstance(inner, list):
            inner[key:key] = [copy.deepcopy(old) for _ in range(rng.choice((1, 2, 30)))]
        case "swap":
            inner[key] = elsewhere()
        case "rename" if isinstance(inner, dict):
            name = rng.choice((*WORDS, key + "s", key[:-1], key.upper(), key + "_2"))
            inner[name] = inner.pop(key)
        case "nest":
            for _ in range(rng.choice((1, 2, 200))):
                old = [old] if rng.random() < 0.5 else {"a": old}
            inner[key] = old
        case _:
            inner[key] = junk(rng)


def spoilt_bytes(content: bytes, rng: Random) -> bytes:
    """A file with some bytes, lines or its end gone wrong."""
    if not content:
        return rng.randbytes(rng.randint(0, 40))
    at, to = sorted((rng.randrange(len(content)), rng.randrange(len(content))))
    lines = content.splitlines(keepends=True)
    line = rng.randrange(len(lines))
    ways = ("flip", "flip", "cut", "insert", "remove", "line", "gone", "field", "field", "bom", "wide")
    match rng.choice(ways):
        case "flip":
            return content[:at] + bytes([content[at] ^ (1 << rng.randrange(8))]) + content[at + 1 :]
        case "cut":
            return content[:at]
        case "insert":
            odd = rng.choice((b"\0", b"\xff", b"\r", b"\n", b",", b'"', b"{", b"\xe2\x80\xa8"))
            return content[:at] + odd + content[at:]
        case "remove":
            return content[:at] + content[min(to, at + 50) :]
        case "line":
            lines[line:line] = [lines[line]] * rng.choice((1, 1, 50))
        case "gone":
            del lines[line]
        case "field":
            fields = lines[line].rstrip(b"\r\n").split(b",")
            fields[rng.randrange(len(fields))] = str(junk(rng)).encode("utf-8", "replace")
            lines[line] = b",".join(fields) + b"\n"
        case "bom":
            return b"\xef\xbb\xbf" + content
        case "wide":
            return content.decode("latin-1").encode("utf-16")
    return b"".join(lines)


def json_text(value: Any, rng: Random) -> bytes:
    """A JSON document, sometimes with its text spoilt too."""
    text = json.dumps(value, indent=rng.choice((None, 1))).encode("utf-8", "replace")
    return spoilt_bytes(text, rng) if rng.random() < 0.1 else text
