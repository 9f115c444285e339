"""Whether a run was near saturation: where a little more load, or slightly slower steps, change a lot."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from servesim.results.stats import exact_sum
from servesim.results.units import digits
from servesim.slotted import dataclass

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from servesim.results.records import InstanceLog
    from servesim.results.result import Result
    from servesim.results.step_log import StepLog

FULL_SHARE = 0.10
"""Share of the busy time at ``max_num_seqs`` from which on an instance counts as saturated."""
KV_PEAK = 0.95
"""Share of the KV cache in use from which on it counts as full."""
GROWTH = 2.0
"""The queue grows if it is this many times longer while the second half of the requests arrives…"""
GROWN_QUEUE = 1.0
"""… and then at least this many requests long on average."""


@dataclass(slots=True, frozen=True)
class Saturation:
    """How close one instance came to its limits."""

    instance: int
    full_share: float
    """Share of the busy time during which ``max_num_seqs`` requests ran."""
    queue_early: float
    """Mean number of waiting requests during the first half of the time over which requests arrived."""
    queue_late: float
    """The same during the second half."""
    kv_peak: float
    """Most KV blocks in use, as a share of the usable ones."""
    preemptions: int

    @property
    def growing(self) -> bool:
        """Whether requests came faster than they were served."""
        return self.queue_late >= max(GROWTH * self.queue_early, GROWN_QUEUE)

    def reasons(self) -> list[str]:
        """What says that the instance was near saturation, in words; empty when nothing does."""
        found = []
        if self.full_share >= FULL_SHARE:
            found.append(f"max_num_seqs requests ran for {self.full_share * 100:.0f} % of the busy time")
        if self.growing:
            early, late = digits(self.queue_early), digits(self.queue_late)
            found.append(f"the queue grew while requests arrived (mean {early}, then {late} waiting)")
        if self.kv_peak >= KV_PEAK:
            found.append(f"the KV cache was {self.kv_peak * 100:.1f} % full at its peak")
        if self.preemptions:
            found.append(f"{self.preemptions:,} preemption{'' if self.preemptions == 1 else 's'}")
        return found


def saturation(result: Result) -> list[Saturation]:
    """How close every instance came to its limits."""
    records = result.records
    arrival_ns, handed_over_ns = records.column("arrival_ns"), records.column("handed_over_ns")
    first, second = records.column("instance"), records.column("decode_instance")
    found = []
    for at, instance in enumerate(result.instances):
        handed = handed_over_ns[(handed_over_ns >= 0) & (second == at)]
        found.append(_of_instance(instance, np.concatenate([arrival_ns[first == at], handed])))
    return found


def saturation_entry(result: Result) -> dict[str, Any]:
    """:func:`saturation` for the summary: ``near`` for the whole run, and the figures of every instance."""
    instances = saturation(result)
    return {
        "near": any(each.reasons() for each in instances),
        "instances": [
            {
                name: round(value, 6) if isinstance(value, float) else value
                for name, value in {**asdict(each), "reasons": each.reasons()}.items()
            }
            for each in instances
        ],
    }


def saturation_line(entry: dict[str, Any]) -> str | None:
    """One line for people from :func:`saturation_entry`; None for a run with room to spare."""
    if not entry["near"]:
        return None
    several = len(entry["instances"]) > 1
    found = [
        (f"instance {each['instance']}: " if several else "") + ", ".join(each["reasons"])
        for each in entry["instances"]
        if each["reasons"]
    ]
    return f"near saturation: {'; '.join(found)}"


def _of_instance(instance: InstanceLog, arrivals: NDArray[np.int64]) -> Saturation:
    steps = instance.steps
    early = late = 0.0
    if len(arrivals) and arrivals.max() > arrivals.min():
        first, last = int(arrivals.min()), int(arrivals.max())
        middle = (first + last) // 2
        # starts rise, so that a time is a slice
        a, b, c = (bisect_left(steps.start_ns, at) for at in (first, middle, last + 1))
        early, late = _mean_waiting(steps, a, b), _mean_waiting(steps, b, c)
    busy = full = 0
    for first, last in steps.parts():
        durations = steps.durations(first, last)
        busy += exact_sum(durations)
        full += exact_sum(durations[steps.column("running", first, last) >= instance.options.max_num_seqs])
    return Saturation(
        instance=instance.index,
        full_share=full / busy if busy else 0.0,
        queue_early=early,
        queue_late=late,
        kv_peak=steps.most("kv_blocks_used") / instance.capacity.usable_blocks,
        preemptions=steps.preempted.total(),
    )


def _mean_waiting(steps: StepLog, start: int, stop: int) -> float:
    """Mean number of waiting requests over the time of steps ``start`` to ``stop - 1``."""
    waited = total = 0
    for first, last in steps.parts(start, stop):
        durations = steps.durations(first, last)
        waited += exact_sum(steps.column("waiting", first, last), durations)
        total += exact_sum(durations)
    return waited / total if total else 0.0
