"""Loads a policy of the user's own, named ``module:callable``."""

from __future__ import annotations

import importlib
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from servesim.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator


def load_own_policy(name: str, flag: str, built_in: str, arguments: str) -> Any:
    """The callable called ``name``; a class gives an object of it.

    Modules are looked for as Python does, the working directory included.

    Args:
        name: ``module:callable``, with or without ``CUSTOM:`` before it.
        flag: that it was given to, for messages.
        built_in: names of the policies that come with the simulator, for messages.
        arguments: what it is called with, for messages.

    Raises:
        InputError: the module or the callable does not exist, cannot be called, or raises something.
    """
    module_name, _, attribute = name.removeprefix("CUSTOM:").partition(":")
    try:
        with _working_directory_importable():
            policy = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise InputError(
            f"{flag}: {name} cannot be loaded ({error}); must be {built_in} or module:callable of a module "
            "in the working directory or installed"
        ) from error
    except (Exception, SystemExit) as error:
        raise InputError(
            f"{flag}: {name} cannot be loaded: its module raises {_words(error)}; mend the module"
        ) from error
    if isinstance(policy, type):
        try:
            policy = policy()
        except TypeError as error:
            raise InputError(
                f"{flag}: {name} is a class that cannot be made ({error}); it must take no arguments"
            ) from error
    if not callable(policy):
        raise InputError(f"{flag}: {name} is not callable; must be a function of ({arguments})")
    return _told_as_its_own(policy, f"{flag}: {name} raises", f"it is called with ({arguments})")


def _told_as_its_own(policy: Any, what: str, way_out: str) -> Any:
    """The policy, whose errors are told as its own; one that leaves the program is an error too."""

    def call(*arguments: Any) -> Any:
        try:
            return policy(*arguments)
        except (Exception, SystemExit) as error:
            raise InputError(f"{what} {_words(error)}; {way_out}") from error

    return call


def _words(error: BaseException) -> str:
    """An exception in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


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
