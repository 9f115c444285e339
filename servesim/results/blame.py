"""Where the time of a request went: a blame in parts that sum to its latency.

Every part is a stretch of the request's life, taken from the step log; no model is fitted. Steps that compute
for several requests at once are charged to each of them in full, as each of them waits for the whole step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from servesim.results.columns import Column
    from servesim.results.records import InstanceLog, RequestRecord
    from servesim.results.result import Result

PARTS = ("queue", "prefill", "preemption", "recall", "transfer", "decode", "beside_prefill")
TITLES = {
    "queue": "queue",
    "prefill": "prefill chunks",
    "preemption": "preemption",
    "recall": "recall",
    "transfer": "KV transfer",
    "decode": "decode",
    "beside_prefill": "decode beside prefill",
}
"""What each part is called where it is shown."""
MEANINGS = {
    "queue": "from its arrival to the first step that works on it, at a decode instance again; and steps "
    "that had no token budget left for it while it ran",
    "prefill": "steps that compute its prompt, and what ran between them",
    "preemption": "without KV blocks, and computing again what was lost, until its next token",
    "recall": "steps that waited for KV from a lower tier of the prefix cache, its own or another's",
    "transfer": "its KV on the way from the prefill to the decode instance",
    "decode": "steps that only generate tokens",
    "beside_prefill": "steps that generate its tokens beside prompt chunks of other requests",
}
BLAME_DTYPE = np.dtype([("request_id", np.int64), *((name, np.int64) for name in PARTS)])


def blame(result: Result) -> NDArray[np.void]:
    """One row per finished request, ordered by request id: ns of each of :data:`PARTS`, whose sum is its
    latency; shape (requests,)."""
    lookups = [_Steps(instance) for instance in result.instances]
    tracks = result.token_gaps.tracks
    rows = np.zeros(len(result.records), dtype=BLAME_DTYPE)
    for row, record in zip(rows, result.records, strict=True):
        row["request_id"] = record.request
        for name, value in _of_request(record, lookups, tracks).items():
            row[name] = value
    return rows


class _Steps:
    """Sums over the steps of one instance."""

    def __init__(self, instance: InstanceLog) -> None:
        steps = instance.steps
        self.starts, self.ends = steps.column("start_ns"), steps.column("end_ns")
        gated = np.zeros(len(steps), dtype=np.int64)
        np.add.at(gated, np.array(instance.gates.step, dtype=np.int64), np.array(instance.gates.ns, np.int64))
        lasted = np.diff(self.ends, prepend=self.starts[:1])  # of tokens that follow each other
        lasted = np.minimum(lasted, self.ends - self.starts)
        busy = np.maximum(lasted - gated, 0)
        mixed = np.where(steps.column("prefill_tokens") > 0, busy, 0)
        self._gated = np.concatenate(([0], np.cumsum(np.minimum(gated, lasted))))
        self._mixed = np.concatenate(([0], np.cumsum(mixed)))

    def gated_ns(self, first: int, last: int) -> int:
        """Time for which steps first..last waited for KV."""
        return int(self._gated[last + 1] - self._gated[first]) if last >= first else 0

    def mixed_ns(self, first: int, last: int) -> int:
        """Time of those of steps first..last that compute prompt chunks, without such waiting."""
        return int(self._mixed[last + 1] - self._mixed[first]) if last >= first else 0

    def begun_in(self, since_ns: int, until_ns: int) -> tuple[int, int]:
        """First and last step that starts in an interval; last < first if none does."""
        first = int(np.searchsorted(self.starts, since_ns, side="left"))
        return first, int(np.searchsorted(self.starts, until_ns, side="left")) - 1


def _of_request(record: RequestRecord, lookups: list[_Steps], tracks: list[Column]) -> dict[str, int]:
    parts = dict.fromkeys(PARTS, 0)
    parts["queue"] = record.scheduled_ns - record.arrival_ns
    front = lookups[record.instance]
    if record.prefill_step is None:
        computed_ns = record.first_token_ns
    else:
        track, entry = record.prefill_step
        computed_ns = tracks[track][entry]
        parts["transfer"] = record.handed_over_ns - computed_ns
        track, entry, _ = record.token_steps[0]
        begun_ns = record.handed_over_ns
        if track < len(lookups):
            begun_ns = min(max(int(lookups[track].starts[entry]), begun_ns), record.first_token_ns)
        parts["queue"] += begun_ns - record.handed_over_ns
        parts["decode"] = record.first_token_ns - begun_ns
    if record.load_ended_ns >= 0:  # a part of its time in the queue
        loaded_ns = record.load_ended_ns - record.load_began_ns
        parts["queue"] -= loaded_ns
        parts["recall" if record.prefill_step is None else "transfer"] += loaded_ns
    _add_prefill(parts, record, front, computed_ns, lookups)
    _add_decode(parts, record, lookups, tracks)
    return parts


def _add_prefill(
    parts: dict[str, int], record: RequestRecord, front: _Steps, computed_ns: int, lookups: list[_Steps]
) -> None:
    """What happened from the first step that worked on the request to the end of its prompt."""
    left = computed_ns - record.scheduled_ns
    for where, step, back_ns in record.away or ():
        starts = lookups[where].starts
        lost_ns = int(starts[step]) if step < len(starts) else record.end_ns
        if record.scheduled_ns <= lost_ns < computed_ns:
            until_ns = computed_ns if back_ns < 0 else min(back_ns, computed_ns)
            taken = min(max(until_ns - lost_ns, 0), left)
            parts["preemption"] += taken
            left -= taken
    recalled = min(front.gated_ns(*front.begun_in(record.scheduled_ns, computed_ns)), left)
    parts["recall"] += recalled
    parts["prefill"] += left - recalled


def _add_decode(
    parts: dict[str, int], record: RequestRecord, lookups: list[_Steps], tracks: list[Column]
) -> None:
    """What happened between first token and last: runs of a token a step, and what interrupts them."""
    before_ns, before = record.first_token_ns, record.token_steps[0][1]
    stalled = mixed = gated = 0
    for number, (track, first, last) in enumerate(record.token_steps):
        times = tracks[track]
        start = first + 1
        if number:
            own_ns = times[first] - times[first - 1] if first else 0
            stalled += max(times[first] - own_ns - before_ns, 0)
            start = first
        else:
            start = before + 1
        if track < len(lookups):
            mixed += lookups[track].mixed_ns(start, last)
            gated += lookups[track].gated_ns(start, last)
        before_ns = times[last]
    span = record.end_ns - record.first_token_ns
    parts["preemption" if record.preemptions else "queue"] += stalled
    gated = min(gated, span - stalled)
    mixed = min(mixed, span - stalled - gated)
    parts["recall"] += gated
    parts["beside_prefill"] += mixed
    parts["decode"] += span - stalled - gated - mixed
