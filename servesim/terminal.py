"""What the place that text goes to can show: its characters, its width, its colours.

Commands print whatever characters they like: :func:`prepare_streams` makes both streams write what their
encoding has, and plain characters for the rest, so that no command fails after its work.
"""

from __future__ import annotations

import codecs
import os
import sys

WIDTH = 100
"""Columns of a line where nobody says how wide the screen is: in a pipe or a file."""
NARROWEST = 40
"""Lines are not made shorter than this, however narrow the screen is."""
_PLAIN = {
    "─": "-", "━": "-", "│": "|", "–": "-", "—": "-", "·": "|", "…": "...", "×": "x", "±": "+-", "µ": "u",
    "μ": "u", "α": "alpha", "≤": "<=", "≥": ">=", "≈": "~", "→": "->", "−": "-", "²": "2", "⁹": "9",
    "“": '"', "”": '"', "‘": "'", "’": "'", " ": " ",
}  # fmt: skip
_COLOURS = {"good": "32", "bad": "31", "warning": "33"}
_HANDLER = "servesim-plain"


def prepare_streams() -> None:
    """Let stdout and stderr replace characters that their encoding lacks (cp1252 and ASCII lack rules)."""
    codecs.register_error(_HANDLER, _plain)
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors=_HANDLER)


def screen_width() -> int | None:
    """Columns of the screen, or what COLUMNS says; None where text goes to a pipe or a file."""
    if not os.environ.get("COLUMNS", "").isdecimal() and not _is_terminal():
        return None
    import shutil

    return max(shutil.get_terminal_size((WIDTH, 24)).columns, NARROWEST)


def wrapped(text: str, width: int | None = None, indent: str = "") -> str:
    """``text`` in lines that fit the screen (``WIDTH`` columns where there is none), broken between words.

    Args:
        text: one paragraph.
        width: columns; None: those of the screen.
        indent: before every line but the first.
    """
    import textwrap

    columns = width or screen_width() or WIDTH
    joined = text.replace(" %", "\u00a0%").replace(" ms", "\u00a0ms")  # numbers keep their unit
    lines = textwrap.wrap(
        joined, columns, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
    return "\n".join(lines).replace("\u00a0", " ")


def painted(text: str, meaning: str, error_stream: bool = False) -> str:
    """``text`` in the colour of ``good``, ``bad`` or ``warning`` where the stream shows colours."""
    return f"\033[{_COLOURS[meaning]}m{text}\033[0m" if meaning and shows_colours(error_stream) else text


def shows_colours(error_stream: bool = False) -> bool:
    """Whether a stream is to be coloured: a terminal's is, unless NO_COLOR is set; any is with FORCE_COLOR.

    NO_COLOR (https://no-color.org) counts when it is not empty, and more than FORCE_COLOR.
    """
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR"):
        return True
    if os.environ.get("TERM") == "dumb" or not _is_terminal(error_stream):
        return False
    # older Windows consoles print the codes themselves; these variables are set by those that do not
    return sys.platform != "win32" or bool(os.environ.get("WT_SESSION") or os.environ.get("TERM"))


def _is_terminal(error_stream: bool = False) -> bool:
    stream = sys.stderr if error_stream else sys.stdout
    return stream is not None and not stream.closed and stream.isatty()


def _plain(error: UnicodeError) -> tuple[str | bytes, int]:
    """Error handler of a codec: the characters in question in ASCII, ``\\u1234`` for those without a name."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    bad = error.object[error.start : error.end]
    shown = "".join(
        _PLAIN.get(each) or each.encode("ascii", "backslashreplace").decode("ascii") for each in bad
    )
    return shown, error.end
