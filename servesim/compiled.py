"""What the core says to mypyc, which compiles it for some wheels (``hatch_build.py``)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from mypy_extensions import mypyc_attr as mypyc_attr
else:

    def mypyc_attr(**settings: Any) -> Callable[[type], type]:
        """Say how a class is to be compiled; where it is not, this says nothing.

        A compiled class can be derived from in plain Python only if it allows that:
        ``allow_interpreted_subclasses=True``.
        """
        del settings
        return lambda plain: plain
