"""The console script: finds the command, runs it, and turns errors into one message and an exit status."""

from __future__ import annotations

import sys

if __name__ == "__main__":  # before anything is loaded: the door listens to Ctrl-C from the start
    from servesim.door import main as door

    sys.exit(door())

import argparse
import errno
import gc
import os
import signal
from contextlib import suppress
from importlib import import_module
from itertools import pairwise
from typing import TYPE_CHECKING, NoReturn, TypeGuard

from servesim._version import __version__
from servesim.errors import MissingFileError, ServingError
from servesim.terminal import prepare_streams

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

COMMANDS = {
    "run": ("servesim.cli.run", "simulate a workload on a cluster (what happens without a command)"),
    "compare": ("servesim.cli.compare", "the same workload under several option sets, side by side"),
    "slo": ("servesim.cli.slo", "the largest request rate, or concurrency, that keeps latency bounds"),
    "kv": ("servesim.cli.kv", "what each KV cache format buys: bytes, tokens that fit, decode step"),
    "sweep": ("servesim.cli.sweep", "many configurations of a run, one row of figures each"),
    "plan": ("servesim.cli.plan", "the cheapest fleet that keeps latency bounds for a workload"),
    "serve": ("servesim.cli.serve", "an emulated vLLM server: OpenAI's interface with simulated timing"),
    "twin": ("servesim.cli.twin", "follow a running vLLM by its metrics, and try changes on its traffic"),
    "profile": ("servesim.cli.profile", "make a profile bundle: kernel times of a model on a hardware"),
    "profile inspect": ("servesim.cli.profile_inspect", "what a bundle holds, as text and as plots"),
    "profile import": (
        "servesim.cli.profile_import",
        "correct a bundle with whole steps that vllm bench forward measured",
    ),
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
_OUTPUT_ERRORS = frozenset(
    {errno.ENOSPC, errno.EIO, errno.EBADF, errno.EFBIG, errno.EINVAL, errno.ENXIO, errno.EDQUOT}
)
"""What writing to a stream ends with when nothing can take the text."""


class Parser(argparse.ArgumentParser):
    """Reports a mistake in one line instead of the whole usage text; its help states every default."""

    def format_help(self) -> str:
        """The help, with ``(default: …)`` where no option's own text says it."""
        for action in self._actions:
            state_default(action)
        return super().format_help()

    def error(self, message: str) -> NoReturn:
        message = message.replace("ignored explicit argument", "takes no value, found")
        self.exit(2, f"error: {message}; see {self.prog} --help\n")


def state_default(action: argparse.Action) -> None:
    """Add to the help of an option what it is when it is left out, unless the text says so already."""
    told = action.help
    if not told or told == argparse.SUPPRESS or not action.option_strings or action.required:
        return
    if "(default" in told or "-h" in action.option_strings or action.const is False:
        return
    if action.nargs == 0:
        default = "off"
    else:
        default = "none" if action.default in (None, "", [], argparse.SUPPRESS) else "%(default)s"
    action.help = f"{told} (default: {default})"


def main(argv: Sequence[str] | None = None, at_work: Callable[[], None] | None = None) -> int:
    """Run the command in ``argv`` (the process's own arguments by default) and return its exit status.

    ``at_work`` is called when the command starts, from which on Ctrl-C has something to clean up.
    """
    # NumPy's linear algebra is not used; starting its threads would cost a tenth of a second of CPU.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    # What a run makes lives to its end and is hardly ever circular: looking for garbage as often as Python
    # does by default would cost up to a sixth of the run.
    gc.set_threshold(_COLLECT_AFTER)
    words = list(sys.argv[1:] if argv is None else argv)
    if sys.stdout is None:  # the interpreter found it closed
        print("error: standard output is closed; give it a file, or /dev/null", file=sys.stderr)
        return 1
    prepare_streams()
    try:
        status = _dispatch(words, at_work)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        if at_work is not None:  # the process is ours: a second Ctrl-C adds nothing but a traceback
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        print("interrupted", file=sys.stderr)
        return _INTERRUPTED
    except BrokenPipeError:
        _give_up_stdout()
        return _BROKEN_PIPE
    except Exception as error:
        if _is_output_error(error):
            _give_up_stdout()
            print(f"error: standard output cannot be written: {error.strerror}", file=sys.stderr)
            return 1
        if _wants_traceback(words):
            raise
        return _report(error)


def _dispatch(words: list[str], at_work: Callable[[], None] | None) -> int:
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
    if at_work is not None:
        at_work()
    status: int = module.run(args)
    return status


def _refuse(unknown: list[str], parser: argparse.ArgumentParser) -> NoReturn:
    from servesim.cli.foreign import advice

    flags = [flag for action in parser._actions for flag in action.option_strings]
    word = unknown[0].split("=")[0]
    told = advice(word, flags) if word.startswith("-") else ""
    parser.error(f"unknown argument {word!r}" + (f"; {told}" if told else ""))


def _suggestion(word: str, known: Sequence[str] | dict[str, tuple[str, str]]) -> str:
    from difflib import get_close_matches

    near = get_close_matches(word, list(known), n=1)
    if near:
        return f"did you mean {near[0]!r}?"
    return f"known: {', '.join(known)}" if len(known) < 12 else "no known one comes near; see servesim --help"


def _is_output_error(error: Exception) -> TypeGuard[OSError]:
    """Whether stdout failed: files are opened by name, and those that fail while they are written are told
    by the code that writes them."""
    ours = isinstance(error, ServingError)
    return (
        isinstance(error, OSError) and not ours and error.filename is None and error.errno in _OUTPUT_ERRORS
    )


def _give_up_stdout() -> None:
    """Nothing more can be written; the interpreter would complain when it flushes stdout at exit."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


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
        "usage: servesim [COMMAND] [OPTIONS]      (also: python -m servesim)",
        "",
        *(f"  {name.ljust(width)}  {text}" for name, (_, text) in COMMANDS.items()),
        "",
        "servesim COMMAND --help lists the options of a command; servesim --version prints the version.",
    ]
    return "\n".join(lines)
