"""What parsers of several commands have in common: how they open, and flags that mean the same in each."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse

MODEL = "<org>/<name>, or a folder or file with a Hugging Face config.json"
"""Help of a model's name."""
PRINTED = "-"
"""``--json`` without a path: print it."""


def add_command(
    subparsers: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    about: str,
    epilog: str,
    usage: str | None = None,
) -> argparse.ArgumentParser:
    """The parser of a command whose help ends with examples, laid out as in ``epilog``."""
    from argparse import RawDescriptionHelpFormatter

    return subparsers.add_parser(
        name,
        help=about,
        description=about,
        usage=usage,
        epilog=epilog,
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    """``--json [PATH]``."""
    parser.add_argument(
        "--json",
        nargs="?",
        const=PRINTED,
        metavar="PATH",
        help="write everything as JSON; no PATH: print it",
    )


def add_formats(
    parser: argparse.ArgumentParser, kv_cache_dtype: str | None = "auto", *, skip_layers: bool = True
) -> None:
    """``--dtype``, ``--kv-cache-dtype`` (by default ``kv_cache_dtype``) and, unless told otherwise,
    ``--kv-cache-dtype-skip-layers`` of a bundle."""
    from servesim.specs.dtypes import KV_CACHE_DTYPES, WEIGHT_DTYPES, kv_refusal, word_unless

    add = parser.add_argument
    add("--dtype", choices=WEIGHT_DTYPES, help="weight dtype (default: what the model is published in)")
    add(
        "--kv-cache-dtype",
        choices=KV_CACHE_DTYPES,
        type=word_unless(kv_refusal),
        default=kv_cache_dtype,
        help="KV cache dtype (default: auto)",
    )
    if skip_layers:
        add(
            "--kv-cache-dtype-skip-layers",
            nargs="+",
            metavar="LAYER",
            help="layers whose KV cache stays in 16 bit: numbers from 0, and sliding_window for all with a "
            "window",
        )


def check_file(path: str | None, suffixes: tuple[str, ...], flag: str) -> None:
    """Find out before the work that a file can be written; nothing to do for None and what is printed.

    Raises:
        InputError: it cannot, or has another ending.
    """
    from servesim.results.atomic import check_suffix, check_writable

    if path is not None and path != PRINTED:
        check_suffix(path, suffixes, flag)
        check_writable(path, flag)


def check_apart(inputs: dict[str, str | None], outputs: dict[str, str | None]) -> None:
    """Find out before the work that no output takes the place of another, or of what is read.

    Args:
        inputs: flag -> path of a file that is read, or None.
        outputs: flag -> path of a file that is written, None or :data:`PRINTED`.

    Raises:
        InputError: a path is there twice.
    """
    import os

    from servesim.errors import InputError

    taken = {os.path.realpath(path): flag for flag, path in inputs.items() if path}
    for flag, path in outputs.items():
        if path in (None, "", PRINTED):
            continue
        whole = os.path.realpath(str(path))
        other = taken.setdefault(whole, flag)
        if other != flag and (os.path.isfile(whole) or not os.path.exists(whole)):  # noqa: PTH110, PTH113
            raise InputError(f"{flag} {path}: is the file of {other} too; give another path")


def check_plot(path: str | None) -> None:
    """The same of ``--plot``.

    Raises:
        InputError: it cannot be written, or matplotlib is missing.
    """
    from servesim.results.figures import require_matplotlib

    if path:
        require_matplotlib("--plot")
        check_file(path, (".png", ".svg"), "--plot")


def give_json(path: str, text: str) -> None:
    """Print the text, or write it to its file."""
    if path == PRINTED:
        from servesim.cli.screen import say

        say(text)
        return
    from servesim.results.atomic import atomic_write

    with atomic_write(path) as file:
        file.write(f"{text}\n".encode())
