"""Bundles that a command makes when its run asks for ones that are not there."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@contextmanager
def bundles_on_demand(wanted: bool) -> Iterator[None]:
    """Inside the block, missing bundles are made where that is possible, each with a line on stderr."""
    from serving.latency.missing import missing_bundles_from

    def make(hardware: str, model: str, variant: str, tp: int) -> Path | None:
        from serving.profiler.on_demand import maker  # most runs find their bundle and need nothing of it

        maker_of_these = maker(lambda line: print(line, file=sys.stderr), wanted=wanted)
        return maker_of_these(hardware, model, variant, tp) if maker_of_these else None

    with missing_bundles_from(make):
        yield
