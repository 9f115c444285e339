"""Time of a launch whose thread blocks go to the SMs in launch order, each to the first SM that is free."""

from __future__ import annotations

import heapq
import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


LEVEL_ROUNDS = 12
"""Blocks an SM runs one after the other until the order of earlier ones no longer shows in the end."""


def repeated_makespan_us(durations_us: Sequence[float], repeats: int, sm_count: int) -> float:
    """Time until the last block ends when ``durations_us`` are launched ``repeats`` times (once a head).

    When blocks come to many more than the SMs, only the last repeats are scheduled one by one: the ones
    before keep all SMs busy alike.
    """
    scheduled = min(repeats, math.ceil(LEVEL_ROUNDS * sm_count / len(durations_us)))
    level_us = (repeats - scheduled) * sum(durations_us) / sm_count
    free_at = [level_us] * sm_count
    push = heapq.heapreplace
    for _ in range(scheduled):
        for duration in durations_us:
            push(free_at, free_at[0] + duration)
    return max(free_at)


def shared_stream_us(
    work_bytes: Sequence[float], sm_count: int, block_rate: float, total_rate: float
) -> float:
    """Time of blocks that read ``work_bytes`` each and share the memory's bandwidth equally while they run.

    ``block_rate`` (bytes/us) is what one block reads at most, ``total_rate`` what the memory gives to all of
    them. Every running block has read the same amount since any instant that saw both, so the amount read per
    block is a clock on which a block's end is known when it starts.
    """
    waiting = iter(work_bytes[sm_count:])
    running = list(work_bytes[:sm_count])
    heapq.heapify(running)
    read = elapsed_us = 0.0
    while running:
        end = running[0]
        elapsed_us += (end - read) / min(block_rate, total_rate / len(running))
        read = end
        following = next(waiting, None)
        if following is None:
            heapq.heappop(running)
        else:
            heapq.heapreplace(running, read + following)
    return elapsed_us
