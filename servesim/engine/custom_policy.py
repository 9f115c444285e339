"""Loads and calls a custom policy, named ``module:callable``; its failures are told as its own."""

from __future__ import annotations

import importlib
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from servesim.errors import InputError, ServingError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


def load_custom_policy(name: str, flag: str, built_in: str, arguments: str) -> Any:
    """The callable called ``name``; a class gives an object of it.

    Modules are looked for as Python does, the working directory included.

    Args:
        name: ``module:callable``, with or without ``CUSTOM:`` before it.
        flag: that it was given to, for messages.
        built_in: names of the policies that come with the simulator, for messages.
        arguments: what it is called with, for messages.

    Raises:
        InputError: the module or the callable does not exist, fails while it is loaded, or cannot be called.
    """
    module_name, _, attribute = name.removeprefix("CUSTOM:").partition(":")
    try:
        with _working_directory_importable():
            policy = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        where = _place(error, module_name)
        raise InputError(
            f"{flag}: {name} cannot be loaded ({where}{error}); must be {built_in} or module:callable of a "
            "module in the working directory or installed"
        ) from error
    except (Exception, SystemExit) as error:
        raise _told(name, flag, "while it was imported", error) from error
    if isinstance(policy, type):
        try:
            policy = policy()
        except TypeError as error:
            raise InputError(
                f"{flag}: {name} is a class that cannot be made ({_place(error, module_name)}{error}); "
                "it must take no arguments"
            ) from error
        except (Exception, SystemExit) as error:
            raise _told(name, flag, "while its object was made", error) from error
    if not callable(policy):
        raise InputError(f"{flag}: {name} is not callable; must be a function of ({arguments})")
    return policy


def call_custom_policy(name: str, flag: str, policy: Callable[..., Any], *arguments: Any) -> Any:
    """What the policy returns.

    Raises:
        InputError: it raises something, ``SystemExit`` included; the message says what and where.
    """
    try:
        return policy(*arguments)
    except ServingError:
        raise
    except (Exception, SystemExit) as error:
        raise _told(name, flag, "when it was asked", error) from error


def _told(name: str, flag: str, when: str, error: BaseException) -> InputError:
    module_name = name.removeprefix("CUSTOM:").partition(":")[0]
    return InputError(
        f"{flag}: {name} failed {when}: {_place(error, module_name)}{_words(error)}; the fault is in that "
        "module, not in servesim"
    )


def _words(error: BaseException) -> str:
    """An exception in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


def _place(error: BaseException, module_name: str) -> str:
    """``file, line N: `` of the last place in the module that an error passed; empty if it passed none."""
    place = ""
    if isinstance(error, SyntaxError) and error.lineno is not None:
        place = f"{error.filename}, line {error.lineno}: "
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_globals.get("__name__") == module_name:
            place = f"{trace.tb_frame.f_code.co_filename}, line {trace.tb_lineno}: "
        trace = trace.tb_next
    return place


@contextmanager
def _working_directory_importable() -> Iterator[None]:
    """As under ``python -m``, also when a console script runs."""
    here = str(Path.cwd())
    if here in sys.path or "" in sys.path:
        yield
        return
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)
