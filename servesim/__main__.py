"""The console script: finds the command, runs it, and turns errors into one message and an exit status."""

from __future__ import annotations

import argparse
import gc
import os
import sys
from importlib import import_module
from itertools import pairwise
from typing import TYPE_CHECKING, NoReturn

from servesim._version import __version__
from servesim.errors import MissingFileError, ServingError

if TYPE_CHECKING:
    from collections.abc import Sequence

COMMANDS = {
    "run": ("servesim.cli.run", "simulate a workload on a cluster (what happens without a command)"),
    "compare": ("servesim.cli.compare", "the same workload under several option sets, side by side"),
    "profile": ("servesim.cli.profile", "make a profile bundle: kernel times of a model on a hardware"),
    "profile inspect": ("servesim.cli.profile_inspect", "what a bundle holds, as text and as plots"),
    "profile diff": ("servesim.cli.profile_diff", "how far two bundles are apart, table by table"),
    "support": ("servesim.cli.support", "what can be simulated, how far to trust it, and how to get more"),
    "workload": ("servesim.cli.workload", "make, inspect and convert workload files"),
    "bench": (
        "servesim.cli.bench",
        "compare the simulator with vLLM: its scheduler, recordings, live servers",
    ),
    "explain-step": (
        "servesim.cli.explain_step",
        "what one step costs, layer by layer, and where the numbers come from",
    ),
}
"""Command -> (module with ``add_parser(subparsers)`` and ``run(args)``, one line of help)."""

_COLLECT_AFTER = 200_000  # objects made and not freed
_INTERRUPTED = 130
_BROKEN_PIPE = 141  # 128 + SIGPIPE: what a shell shows for a program ended by a closed pipe


class Parser(argparse.ArgumentParser):
    """Reports a mistake in one line instead of the whole usage text."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; see {self.prog} --help\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command in ``argv`` (the process's own arguments by default) and return its exit status."""
    # NumPy's linear algebra is not used; starting its threads would cost a tenth of a second of CPU.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    # What a run makes lives to its end and is hardly ever circular: looking for garbage as often as Python
    # does by default would cost up to a sixth of the run.
    gc.set_threshold(_COLLECT_AFTER)
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        status = _dispatch(words)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return _INTERRUPTED
    except BrokenPipeError:
        # The reader of our output is gone; the interpreter would complain when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _BROKEN_PIPE
    except Exception as error:
        if _wants_traceback(words):
            raise
        return _report(error)


def _dispatch(words: list[str]) -> int:
    if words[:1] in (["-h"], ["--help"], ["help"]):
        print(_help())
        return 0
    if words[:1] == ["--version"]:
        print(f"servesim {__version__}")
        return 0
    if not words or words[0].startswith("-"):
        words = ["run", *words]
    if " ".join(words[:2]) in COMMANDS:
        words = [" ".join(words[:2]), *words[2:]]
    command = words[0]
    if command not in COMMANDS:
        print(
            f"error: {command!r} is no command of servesim; {_suggestion(command, COMMANDS)}", file=sys.stderr
        )
        return 2
    module = import_module(COMMANDS[command][0])
    parser = Parser(prog="servesim", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command")
    module.add_parser(commands)
    args, unknown = parser.parse_known_args(words)
    if unknown:
        _refuse(unknown, commands.choices[command])
    status: int = module.run(args)
    return status


def _refuse(unknown: list[str], parser: argparse.ArgumentParser) -> NoReturn:
    flags = [flag for action in parser._actions for flag in action.option_strings]
    word = unknown[0].split("=")[0]
    parser.error(
        f"unknown argument {word!r}" + (f"; {_suggestion(word, flags)}" if word.startswith("-") else "")
    )


def _suggestion(word: str, known: Sequence[str] | dict[str, tuple[str, str]]) -> str:
    from difflib import get_close_matches

    near = get_close_matches(word, list(known), n=1)
    if near:
        return f"did you mean {near[0]!r}?"
    return f"known: {', '.join(known)}" if len(known) < 12 else "no known one comes near"


def _wants_traceback(words: list[str]) -> bool:
    return "--log-level=DEBUG" in words or ("--log-level", "DEBUG") in pairwise(words)


def _report(error: Exception) -> int:
    if isinstance(error, MissingFileError):
        print(f"FileNotFoundError: {error}", file=sys.stderr)
        return error.exit_status
    if isinstance(error, ServingError):
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    print(f"error: a fault of servesim, not of your input: {text}", file=sys.stderr)
    print("       --log-level DEBUG shows where; please report it", file=sys.stderr)
    return 1


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [
        "servesim: a simulator of LLM serving",
        "",
        "usage: servesim [COMMAND] [OPTIONS]      (also: python -m serving)",
        "",
        *(f"  {name.ljust(width)}  {text}" for name, (_, text) in COMMANDS.items()),
        "",
        "servesim COMMAND --help lists the options of a command; servesim --version prints the version.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
