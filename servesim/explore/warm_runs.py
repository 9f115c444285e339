"""Many runs of one workload on one cluster at different loads; whatever they share is read once."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from servesim.engine.build import Kept, build_simulation
from servesim.engine.noise import StepNoise
from servesim.explore.ensemble import silence
from servesim.results.result import Result
from servesim.results.units import MS, SECOND
from servesim.slotted import dataclass
from servesim.workload.arrivals import change_rate, reshuffle

if TYPE_CHECKING:
    from collections.abc import Callable

    from servesim.engine.noise import StepShift
    from servesim.explore.slo import Bound, Slo
    from servesim.results.records import RequestRecord, RunLog
    from servesim.specs.cluster import ClusterSpec
    from servesim.specs.options import RuntimeOptions
    from servesim.workload.request import Workload

_LOOKS = 50
"""How often a run that may be given up is looked at."""
_UNKNOWN_NS = 100 * SECOND
"""Length of a run that is taken for this where none has been run to its end."""
_USUAL_BATCH = 8
"""Sequences of a step, for a guess of the number of steps."""
_STEP_MS, _REQUEST_MS, _BLOCK_MS = 0.016, 0.1, 0.0012
"""Processor time of a step in which requests come, go or are prefilled, of a request, and of a block of its
prompt: as measured on one core of 2.1 GHz with the pure Python engine; within a factor of two on the shipped
workloads."""


@dataclass(slots=True, frozen=True)
class Target:
    """What a load must keep: an SLO, or a share of requests that keep it one by one."""

    slo: Slo
    goodput: float | None = None
    """Share of all requests, in (0, 1]; None: the SLO holds for the statistics of the run."""

    def score(self, result: Result) -> float:
        """At most 1 where the run keeps it: the worst figure as a share of its bound, or the goodput asked
        for as a share of that reached. inf: nothing finished, or requests were rejected that must not be."""
        if not len(result.requests):
            return math.inf
        if self.goodput is not None:
            reached = self.slo.goodput_share(result)
            return self.goodput / reached if reached else math.inf
        if result.rejected:
            return math.inf
        return max(bound.value_ms(result) / bound.limit_ms for bound in self.slo.bounds)

    def words(self) -> str:
        """``TTFT P99 up to 1,000 ms``."""
        if self.goodput is None:
            return self.slo.words()
        bounds = ", ".join(
            f"{bound.title.rpartition(' ')[0]} up to {bound.limit_ms:,.10g} ms" for bound in self.slo.bounds
        )
        return f"{self.goodput * 100:g} % of the requests with {bounds}"


@dataclass(slots=True, frozen=True)
class Outcome:
    """What a run at one load came to."""

    result: Result
    """Of a run that was given up: what had happened until then."""
    complete: bool = True
    """False: given up, as its target was certain to be missed."""

    def score(self, target: Target) -> float:
        """At most 1 where the run keeps ``target``. Of one that was given up, a number above 1 that is the
        smaller the later it was given up: all requests as a multiple of those that had finished."""
        if self.complete:
            return target.score(self.result)
        finished = len(self.result.log.requests)
        return max(len(self.result.workload) / finished, 1 + 1e-9) if finished else math.inf


class _GivenUp(Exception):  # noqa: N818 - no error: the run has shown what it was to show
    """The requests that finished have settled that the run misses its target."""


class Watch:
    """An observer that ends a run as soon as its target is certain to be missed.

    A percentile is missed once more requests are above the bound than it leaves out, whatever comes; a mean
    once the sum so far is above what all requests together may have.
    """

    def __init__(self, target: Target, num_requests: int, interval_ns: int, least_share: float = 0.0) -> None:
        """
        Args:
            target: what must be kept.
            num_requests: of the workload.
            interval_ns: simulated time between two looks.
            least_share: share of the requests that finish in any case.
        """
        self._target = target
        self._least = least_share * num_requests
        self._total = num_requests
        self._interval_ns = max(interval_ns, 1)
        self.next_ns = self._interval_ns
        self._seen = 0
        self._sums_ns = [0] * len(target.slo.bounds)
        self._above = [0] * len(target.slo.bounds)
        self._bad = 0

    def advance(self, now_ns: int, log: RunLog) -> None:
        """Look at the requests that have finished since the last call."""
        self.next_ns = now_ns + self._interval_ns
        for record in log.requests[self._seen :]:
            self._count(record, self._tokens(record))
        self._seen = len(log.requests)
        if self._seen >= self._least and self._certain(len(log.rejected)):
            raise _GivenUp

    @staticmethod
    def _tokens(record: RequestRecord) -> int:
        return sum(last - first + 1 for _, first, last in record.token_steps) + record.extra_tokens

    def _count(self, record: RequestRecord, tokens: int) -> None:
        good = True
        for place, bound in enumerate(self._target.slo.bounds):
            value_ns = _value_ns(bound, record, tokens)
            self._sums_ns[place] += value_ns
            if value_ns > bound.limit_ms * MS:
                self._above[place] += 1
                good = False
        self._bad += not good

    def _certain(self, rejected: int) -> bool:
        if self._target.goodput is not None:
            return self._bad + rejected > (1 - self._target.goodput) * self._total + 1e-9
        return rejected > 0 or any(
            self._sums_ns[place] > bound.limit_ms * MS * self._total
            if bound.statistic == "mean"
            else self._above[place] > _left_out(bound.statistic, self._total)
            for place, bound in enumerate(self._target.slo.bounds)
        )


def _value_ns(bound: Bound, record: RequestRecord, tokens: int) -> int:
    """One request's figure, as the per-request table has it."""
    match bound.metric:
        case "ttft":
            return record.first_token_ns - record.arrival_ns
        case "e2el":
            return record.end_ns - record.arrival_ns
    return (record.end_ns - record.first_token_ns) // (tokens - 1) if tokens > 1 else 0


def _left_out(statistic: str, total: int) -> int:
    """Most of ``total`` values that may lie above a percentile: those above the lower of its two ranks."""
    percent = 50 if statistic in ("median", "p50") else int(statistic[1:])
    return total - 1 - math.floor((total - 1) * percent / 100)


def one_run(
    cluster: ClusterSpec,
    workload: Workload,
    options: RuntimeOptions,
    kept: Kept,
    watch: Watch | None = None,
    slower: float = 1.0,
    shift: Callable[[int], StepShift] | None = None,
) -> Outcome:
    """One run, which ``watch`` may end early, with the time of every step times ``slower``.

    ``shift``: of the steps of every instance, by its position, in place of ``slower``.

    Raises:
        InputError: the cluster cannot be built as described.
        RunError: the run could not be finished.
    """
    noise: Callable[[int], StepNoise | StepShift] | None = shift
    if shift is None and slower != 1.0:
        noise = lambda _: StepNoise(0.0, (0,), slower)  # noqa: E731
    with silence():
        simulation = build_simulation(cluster, workload, options, kept, noise)
    complete = True
    try:
        log = simulation.run(watch)
    except _GivenUp:
        complete, log = False, simulation.log
        log.close()
    return Outcome(Result(log, workload, options, cluster), complete)


def work_ms(log: RunLog, workload: Workload) -> float:
    """What a run took of the processor, estimated from its counts: see :data:`_STEP_MS`."""
    steps = 0
    for instance in log.instances:
        if _answers_are_shared(workload):
            steps += len(instance.steps)
            continue
        running = instance.steps.column("running")
        prefill = instance.steps.column("prefill_tokens") > 0
        steps += int(np.count_nonzero(prefill[1:] | (np.diff(running) != 0))) if len(running) else 0
    tokens = sum(workload.requests[record.request].input_tokens for record in log.requests)
    return steps * _STEP_MS + len(log.requests) * _REQUEST_MS + tokens / 16 * _BLOCK_MS


def _answers_are_shared(workload: Workload) -> bool:
    """Whether later prompts may hold the answers, so that steps that only decode are simulated one by one."""
    return any(each.output_ids is not None or each.hashed_tokens > each.input_tokens for each in workload)


def least_work_ms(workload: Workload) -> float:
    """What a whole run of ``workload`` takes of the processor, estimated before any: see :data:`_STEP_MS`."""
    tokens = sum(request.input_tokens for request in workload)
    steps = 2 * len(workload)
    if _answers_are_shared(workload):
        steps = max(steps, sum(request.output_tokens for request in workload) // _USUAL_BATCH)
    return len(workload) * _REQUEST_MS + steps * _STEP_MS + tokens / 16 * _BLOCK_MS


class WarmRuns:
    """Runs one workload at any rate or concurrency, with its own arrival pattern or a reshuffled one."""

    def __init__(
        self,
        cluster: ClusterSpec,
        workload: Workload,
        options: RuntimeOptions,
        *,
        by_rate: bool,
        reshuffles: bool = True,
    ) -> None:
        """
        Args:
            cluster: as :func:`servesim.api.read_cluster` gives it.
            workload: is left as it is.
            options: of every run.
            by_rate: whether the load is a rate (entries per second), else most requests in the system.
            reshuffles: whether any run is to have another pattern than the workload's own.
        """
        self.workload = replace(workload, requests=[replace(each) for each in workload.requests])
        self.num_entries = sum(request.predecessor < 0 for request in workload.requests)
        self.runs = 0
        """Runs begun so far."""
        self.work_ms = 0.0
        """What they took of the processor: an estimate from counts, the same on every machine."""
        self._cluster = cluster
        self._options = options
        self._by_rate = by_rate
        self._kept = Kept()
        self._patterns: dict[int, list[int]] = {0: [request.arrival_ns for request in workload.requests]}
        self._length_ns = 0
        no_pattern = len(set(self._patterns[0])) < 2
        self._drawn = workload.drawn_arrivals or reshuffles or (by_rate and no_pattern)
        """Whether the seed acts: it draws the order of the gaps, and arrivals where the workload has none."""

    def run(
        self,
        load: float,
        pattern: int = 0,
        *,
        slower: float = 1.0,
        target: Target | None = None,
        least_share: float = 0.0,
    ) -> Outcome:
        """One run.

        Args:
            load: entries per second, or most requests in the system; inf: everything at once, no cap.
            pattern: 0: the workload's own arrivals, rescaled; others: its gaps in another order.
            slower: factor on the time of every step.
            target: give up as soon as it is certain to be missed; None: run to the end.
            least_share: of the requests that finish before a run is given up.
        """
        self.runs += 1
        self._arrange(load, pattern)
        options = self._options
        if not self._by_rate and math.isfinite(load):
            options = options.replace(max_concurrency=int(load))
        watch = None
        if target is not None:
            interval_ns = (self._length_ns or _UNKNOWN_NS) // _LOOKS
            watch = Watch(target, len(self.workload), interval_ns, least_share)
        outcome = one_run(self._cluster, self.workload, options, self._kept, watch, slower)
        if outcome.complete:
            self._length_ns = self._length_ns or outcome.result.log.end_ns
        self.work_ms += work_ms(outcome.result.log, self.workload)
        return outcome

    def _arrange(self, load: float, pattern: int) -> None:
        """Set the arrivals of this run."""
        if pattern not in self._patterns:
            self._restore(0)
            reshuffle(self.workload, (self._options.seed, pattern))
            self._patterns[pattern] = [request.arrival_ns for request in self.workload.requests]
        self._restore(pattern)
        if self._by_rate:
            change_rate(self.workload, load, self._options.seed + pattern)
        self.workload.drawn_arrivals = self._drawn

    def _restore(self, pattern: int) -> None:
        for request, arrival_ns in zip(self.workload.requests, self._patterns[pattern], strict=True):
            request.arrival_ns = arrival_ns
