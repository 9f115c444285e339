"""The documented door: ``python -m serving`` is ``servesim``. The package itself is :mod:`servesim`."""

from __future__ import annotations

import servesim

TYPE_CHECKING = False  # as in servesim itself
if TYPE_CHECKING:
    from typing import Any


def __getattr__(name: str) -> Any:  # ``serving.simulate`` of older scripts
    if name.startswith("__"):
        raise AttributeError(f"module 'serving' has no attribute {name!r}")
    return getattr(servesim, name)
