"""Charts of one run or of several: how latencies are distributed, load over time, requests as dots."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from servesim.report.page import Chart, Series
from servesim.results.energy import power_series, series_interval_ns
from servesim.results.stats import weighted_percentiles
from servesim.results.units import MS, SECOND

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

    from servesim.report.page import Block
    from servesim.results.records import InstanceLog
    from servesim.results.result import Result

_POINTS = 400
"""Points of a curve at most."""
_DOTS = 3000
"""Requests of a scatter plot at most."""
_BINS = 120
"""Intervals of a chart over time."""


def cumulative(name: str, values_ms: NDArray[np.float64]) -> Series:
    """The share of a sample that is at most so large, in %, as a curve of at most :data:`_POINTS` points."""
    ordered = np.sort(values_ms)
    if not len(ordered):
        return Series(name, [], [])
    at = np.unique(np.linspace(0, len(ordered) - 1, min(len(ordered), _POINTS)).round().astype(np.int64))
    return Series(name, ordered[at].tolist(), ((at + 1) / len(ordered) * 100).tolist())


def distribution_charts(results: Mapping[str, Result]) -> list[Block]:
    """Cumulative distributions of TTFT, TPOT, ITL and latency, a curve for each of the results."""
    samples: dict[str, Callable[[Result], NDArray[np.float64]]] = {
        "TTFT": lambda result: result.requests["TTFT"] / MS,
        "TPOT": lambda result: result.requests["TPOT"][result.requests["output"] > 1] / MS,
        "ITL": _gaps_ms,
        "latency": lambda result: result.requests["latency"] / MS,
    }
    return [
        Chart(
            f"Distribution of {name}",
            "line",
            f"{name} (ms)",
            "at most so long (%)",
            [cumulative(label, sample(result)) for label, result in results.items()],
            x_log=name != "TPOT",
        )
        for name, sample in samples.items()
    ]


def _gaps_ms(result: Result) -> NDArray[np.float64]:
    """Inter-token latencies in ms: all of them, or as many ranks of them as a curve has points."""
    values, counts = result.token_gaps.histogram()
    order = np.argsort(values, kind="stable")
    values, last = values[order], np.cumsum(counts[order])
    if not len(last) or not last[-1]:
        return np.empty(0)
    ranks = np.linspace(0, int(last[-1]) - 1, min(int(last[-1]), _POINTS)).astype(np.int64)
    found: NDArray[np.float64] = values[np.searchsorted(last, ranks, side="right")] / MS
    return found[found > 0]


class _Time:
    """Equal intervals of a run."""

    def __init__(self, result: Result) -> None:
        self.end_ns = max(result.log.end_ns, 1)
        self.edges = np.linspace(0, self.end_ns, _BINS + 1)
        self.seconds = ((self.edges[:-1] + self.edges[1:]) / 2 / SECOND).tolist()
        self.width_s = self.end_ns / _BINS / SECOND

    def sums(self, times_ns: NDArray[np.int64], amounts: NDArray[Any] | None = None) -> NDArray[np.float64]:
        """What falls into each interval."""
        found: NDArray[np.float64] = np.histogram(times_ns, self.edges, weights=amounts)[0].astype(np.float64)
        return found

    def means(
        self, starts: NDArray[np.int64], ends: NDArray[np.int64], values: NDArray[np.int64]
    ) -> NDArray[np.float64]:
        """Mean over each interval of a value that holds from ``starts`` to ``ends`` and is 0 otherwise."""
        weighted = np.concatenate(([0.0], np.cumsum((ends - starts) * values.astype(np.float64))))
        times = np.concatenate((starts[:1], ends)) if len(ends) else np.zeros(1)
        # the integral up to a time grows along a step and stays between two
        knots = np.stack((starts, ends), axis=1).ravel() if len(ends) else times
        heights = np.stack((weighted[:-1], weighted[1:]), axis=1).ravel() if len(ends) else np.zeros(1)
        integral = np.interp(self.edges, knots, heights)
        found: NDArray[np.float64] = np.diff(integral) / np.diff(self.edges)
        return found


def over_time(result: Result) -> list[Block]:
    """Latencies, throughput, batch, queue, memory, preemptions, hits and power over the run."""
    time, rows = _Time(result), result.requests
    charts: list[Block] = [
        Chart(
            "TTFT by arrival",
            "scatter",
            "arrival (s)",
            "TTFT (ms)",
            [dots("", rows, rows["arrival"] / SECOND, rows["TTFT"] / MS)],
            note=note_of_dots(rows),
        ),
        Chart(
            "TPOT by arrival",
            "scatter",
            "arrival (s)",
            "TPOT (ms)",
            [dots("", rows, rows["arrival"] / SECOND, rows["TPOT"] / MS)],
        ),
        Chart("ITL over time", "line", "time (s)", "ITL (ms)", _gaps(result, time), y_log=True),
        Chart("Tokens per second", "line", "time (s)", "tok/s", _throughput(result, time)),
        *_of_instances(result, time),
        Chart("Prefix cache hits", "line", "time (s)", "% of prompt tokens", _hits(result, time)),
        Chart("Preemptions", "step", "time (s)", "requests", _preemptions(result, time)),
        Chart("Power", "step", "time (s)", "W", _power(result)),
    ]
    return [
        chart
        for chart in charts
        if not isinstance(chart, Chart) or any(any(series.y) for series in chart.series)
    ]


def _of_instances(result: Result, time: _Time) -> list[Block]:
    """Running and waiting requests, and KV blocks in use, a curve for each instance."""
    columns: dict[str, list[Series]] = {"running": [], "waiting": [], "kv_blocks_used": []}
    for name, instance in zip(names_of(result), result.instances, strict=True):
        for column, found in columns.items():
            found.append(Series(name, time.seconds, _mean_of(instance, column, time).tolist()))
    return _busy(columns)


def busy_charts(results: Mapping[str, Result]) -> list[Block]:
    """The same for several runs: requests of all instances together, and the mean share of KV blocks."""
    columns: dict[str, list[Series]] = {"running": [], "waiting": [], "kv_blocks_used": []}
    for name, result in results.items():
        time = _Time(result)
        for column, found in columns.items():
            total = sum(_mean_of(instance, column, time) for instance in result.instances)
            values = np.asarray(total, dtype=np.float64)
            if column == "kv_blocks_used":
                values = values / len(result.instances)
            found.append(Series(name, time.seconds, values.tolist()))
    return _busy(columns)


def _mean_of(instance: InstanceLog, column: str, time: _Time) -> NDArray[np.float64]:
    """A column of an instance's steps, its mean in every interval; KV blocks in % of all."""
    steps = instance.steps
    starts, ends = steps.column("start_ns"), steps.column("end_ns")
    starts = np.maximum(starts, np.concatenate((starts[:1], ends[:-1])))  # stages of a pipeline overlap
    values = time.means(starts, np.maximum(ends, starts), steps.column(column))
    return values / max(instance.capacity.num_blocks, 1) * 100 if column == "kv_blocks_used" else values


def _busy(columns: Mapping[str, list[Series]]) -> list[Block]:
    return [
        Chart("Running requests", "line", "time (s)", "requests", columns["running"]),
        Chart("Waiting requests", "line", "time (s)", "requests", columns["waiting"]),
        Chart("KV cache in use", "line", "time (s)", "% of blocks", columns["kv_blocks_used"]),
    ]


def names_of(result: Result) -> list[str]:
    if len(result.instances) == 1:
        return [""]
    return [
        f"instance {instance.index}" + (f" ({instance.spec.pd_type})" if instance.spec.pd_type else "")
        for instance in result.instances
    ]


def _throughput(result: Result, time: _Time) -> list[Series]:
    """Tokens per second: generated, and computed of prompts."""
    generated = sum(
        time.sums(times.array(), counts)
        for times, counts in zip(result.token_gaps.tracks, _generated(result), strict=True)
    )
    prompts = _step_sums(result, time, "prefill_tokens")
    return [
        Series("output", time.seconds, (np.asarray(generated) / time.width_s).tolist()),
        Series("prompt", time.seconds, (prompts / time.width_s).tolist()),
    ]


def _step_sums(result: Result, time: _Time, name: str) -> NDArray[np.float64]:
    """What a column of the step log comes to in each interval, by the ends of the steps."""
    ends, amounts = (
        np.concatenate([instance.steps.column(each) for instance in result.instances])
        for each in ("end_ns", name)
    )
    return time.sums(ends, amounts)


def _generated(result: Result, first: int = 0) -> list[NDArray[np.int64]]:
    """Tokens generated at each entry of each track, without the ``first`` ones of every run of entries."""
    changes = [np.zeros(len(times) + 1, dtype=np.int64) for times in result.token_gaps.tracks]
    for record in result.records:
        for track, begin, last in record.token_steps:
            changes[track][begin + first] += 1
            changes[track][last + 1] -= 1
    return [np.cumsum(each)[:-1] for each in changes]


def _gaps(result: Result, time: _Time) -> list[Series]:
    """Median and P99 of the inter-token latencies that end in each interval."""
    values, counts, ends = [], [], []
    for track, made in zip(result.token_gaps.tracks, _generated(result, first=1), strict=True):
        times = track.array()
        values.append(np.diff(times, prepend=times[:1]))
        counts.append(made)
        ends.append(times)
    gaps, weights, at = (
        np.concatenate(each) if each else np.zeros(0, np.int64) for each in (values, counts, ends)
    )
    bins = np.minimum(np.searchsorted(time.edges, at, side="right") - 1, _BINS - 1)
    series = {50: Series("P50", [], []), 99: Series("P99", [], [])}
    for number in np.unique(bins[weights > 0]).tolist():
        here = (bins == number) & (weights > 0)
        found = weighted_percentiles(gaps[here], weights[here], tuple(series))
        for each, value in zip(series.values(), found, strict=True):
            each.x.append(time.seconds[number])
            each.y.append(value / MS)
    return list(series.values())


def _hits(result: Result, time: _Time) -> list[Series]:
    """Share of the prompt tokens looked up that were found, on the NPU and in the lower tier."""
    names = ("lookup_tokens", "recalled_tokens", "hit_tokens")
    asked, recalled, found = (_step_sums(result, time, name) for name in names)
    found = found - recalled
    with np.errstate(invalid="ignore", divide="ignore"):
        shares = [np.where(asked > 0, part / asked * 100, 0.0) for part in (found, recalled)]
    series = [
        Series("NPU", time.seconds, shares[0].tolist()),
        Series("lower tier", time.seconds, shares[1].tolist()),
    ]
    return series if recalled.any() else series[:1]


def _preemptions(result: Result, time: _Time) -> list[Series]:
    return [Series("", time.seconds, _step_sums(result, time, "preempted").tolist())]


def _power(result: Result) -> list[Series]:
    if result.summary["energy"] is None:
        return []
    interval_ns = max(series_interval_ns(result), result.log.end_ns // _POINTS + 1)
    rows = power_series(result, interval_ns)
    return [
        Series(
            f"node {node}",
            (rows["start_ns"][rows["node"] == node] / SECOND).tolist(),
            rows["power_w"][rows["node"] == node].tolist(),
        )
        for node in np.unique(rows["node"]).tolist()
    ]


def _shown(rows: NDArray[np.void]) -> NDArray[np.int64]:
    """Which requests are shown as dots: all, or some of every length of life and the slowest."""
    if len(rows) <= _DOTS:
        return np.arange(len(rows))
    order = np.argsort(rows["latency"], kind="stable")
    slowest, others = order[-_DOTS // 10 :], order[: -_DOTS // 10]
    some = others[np.linspace(0, len(others) - 1, _DOTS - len(slowest)).astype(np.int64)]
    return np.sort(np.concatenate((some, slowest)))


def dots(name: str, rows: NDArray[np.void], x: NDArray[np.float64], y: NDArray[np.float64]) -> Series:
    at = _shown(rows)
    labels = [f"request {index}" for index in rows["request_id"][at].tolist()]
    return Series(name, x[at].tolist(), y[at].tolist(), labels)


def note_of_dots(rows: NDArray[np.void]) -> str:
    return f"{_DOTS:,} of {len(rows):,} requests, the slowest among them" if len(rows) > _DOTS else ""
