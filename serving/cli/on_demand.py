"""Bundles that a command makes when its run asks for ones that are not there, or finds them old."""

from __future__ import annotations

import logging
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def bundles_on_demand(wanted: bool) -> Iterator[None]:
    """Inside the block, missing and outdated bundles are made where that is possible, each with a line on
    stderr."""
    from serving.latency.missing import missing_bundles_from
    from serving.profiler.on_demand import maker, refresher

    def tell(line: str) -> None:
        print(line, file=sys.stderr)

    warn = logging.getLogger("serving").warning
    with missing_bundles_from(maker(tell, wanted=wanted), refresher(tell, warn, wanted=wanted)):
        yield
