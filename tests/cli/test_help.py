"""Every help says what an option does, what it takes, and what holds without it."""

from __future__ import annotations

import argparse
import re
from importlib import import_module
from typing import TYPE_CHECKING

import pytest

from servesim.__main__ import COMMANDS, Parser
from servesim.cli.bench import ACTIONS

if TYPE_CHECKING:
    from collections.abc import Iterator


def parsers() -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Each command and action with its parser."""
    for name, (module, _) in COMMANDS.items():
        commands = Parser(prog="servesim").add_subparsers()
        import_module(module).add_parser(commands)
        parser = commands.choices[name]
        yield name, parser
        if name == "workload":
            actions = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
            yield from ((f"workload {action}", made) for action, made in actions.choices.items())
    for name, (module, _) in ACTIONS.items():
        parser = Parser(prog=f"servesim bench {name}")
        import_module(module).add_arguments(parser)
        yield f"bench {name}", parser


def shown(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """Options of a help, after it was printed."""
    assert parser.format_help()
    return [a for a in parser._actions if a.option_strings and a.help != argparse.SUPPRESS]


PARSERS = dict(parsers())


@pytest.mark.parametrize("name", PARSERS)
def test_every_option_says_its_default(name: str) -> None:
    silent = [
        action.option_strings[0]
        for action in shown(PARSERS[name])
        if not (action.required or action.const is False or "-h" in action.option_strings)
        and "(default" not in str(action.help)
    ]
    assert silent == []


@pytest.mark.parametrize("name", PARSERS)
def test_every_value_has_a_word_of_its_own(name: str) -> None:
    """``--port N``, and not ``--port PORT``."""
    nameless = [
        action.option_strings[0]
        for action in shown(PARSERS[name])
        if action.nargs != 0 and not action.choices and action.metavar is None
    ]
    assert nameless == []


def test_a_default_is_stated_once() -> None:
    parser = Parser(prog="servesim")
    parser.add_argument("--a", type=int, default=3, metavar="N", help="a")
    parser.add_argument("--b", metavar="PATH", help="b (default: as a)")
    parser.add_argument("--c", action="store_true", help="c")
    parser.add_argument("--d", action="append", default=[], metavar="D", help="d")
    for _ in range(2):
        text = parser.format_help()
    assert re.findall(r"--[abcd].*", text.partition("options:")[2]) == [
        "--a N       a (default: 3)",
        "--b PATH    b (default: as a)",
        "--c         c (default: off)",
        "--d D       d (default: none)",
    ]
