"""How a simulated run compares with the recorded one: figures of both, their errors, and plots."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from servesim.results.figures import new_figure, require_matplotlib, save_figures
from servesim.results.stats import describe
from servesim.results.units import MS, SECOND
from servesim.slotted import dataclass

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from servesim.bench.recording import Recording
    from servesim.results.result import Result
    from servesim.results.stats import Distribution

METRICS = ("TTFT", "TPOT", "latency")
STATISTICS = ("mean", "median", "p90", "p95", "p99")
ANCHORS = ("queued", "arrival")


@dataclass(slots=True, frozen=True)
class RunTimes:
    """Stamps of one run's requests in ns, each of shape (requests,), in the order of the workload."""

    anchor_ns: NDArray[np.int64]
    """From which TTFT and latency count."""
    queued_ns: NDArray[np.int64] | None
    scheduled_ns: NDArray[np.int64] | None
    first_token_ns: NDArray[np.int64]
    last_token_ns: NDArray[np.int64]
    output_tokens: NDArray[np.int64]

    def metric(self, name: str) -> NDArray[np.int64]:
        """TTFT, TPOT or latency of every request in ns; TPOT only of requests of more than one token."""
        if name == "TTFT":
            return self.first_token_ns - self.anchor_ns
        if name == "latency":
            return self.last_token_ns - self.anchor_ns
        several = self.output_tokens > 1
        spread = (self.last_token_ns - self.first_token_ns)[several]
        result: NDArray[np.int64] = np.rint(spread / (self.output_tokens[several] - 1)).astype(np.int64)
        return result

    @property
    def duration_ns(self) -> int:
        """From the first anchor to the last token."""
        return int(self.last_token_ns.max() - self.anchor_ns.min())

    def running_at(self, times_ns: NDArray[np.int64]) -> NDArray[np.int64] | None:
        """Requests between their first step and their last token, at each time."""
        if self.scheduled_ns is None:
            return None
        return _between(self.scheduled_ns, self.last_token_ns, times_ns)

    def waiting_at(self, times_ns: NDArray[np.int64]) -> NDArray[np.int64] | None:
        """Requests taken in that no step has worked on yet, at each time."""
        if self.scheduled_ns is None or self.queued_ns is None:
            return None
        return _between(self.queued_ns, self.scheduled_ns, times_ns)


@dataclass(slots=True, frozen=True)
class LoadCurves:
    """Something over time, recorded and simulated; every array of shape (times,)."""

    times_s: NDArray[np.float64]
    recorded: NDArray[np.float64]
    simulated: NDArray[np.float64]

    def report(self) -> dict[str, float]:
        """Mean of what was recorded and mean absolute difference."""
        return {
            "recorded_mean": float(self.recorded.mean()),
            "mean_absolute_error": float(np.abs(self.simulated - self.recorded).mean()),
        }


class Agreement:
    """A recording and its simulation, aligned at the first arrival."""

    def __init__(self, recording: Recording, result: Result, anchor: str) -> None:
        self.recording = recording
        self.result = result
        self.anchor = anchor
        self.recorded = RunTimes(
            recording.anchor_ns(anchor),
            recording.queued_ns,
            recording.scheduled_ns,
            recording.first_token_ns,
            recording.last_token_ns,
            recording.output_tokens,
        )
        table = result.requests
        shift = int(recording.arrival_ns[0] - table["arrival"][0])
        self.simulated = RunTimes(
            table[anchor] + shift,
            table["queued"] + shift,
            np.array([record.scheduled_ns for record in result.records], dtype=np.int64) + shift,
            table["arrival"] + table["TTFT"] + shift,
            table["end_time"] + shift,
            table["output"],
        )
        self._shift_ns = shift

    @cached_property
    def distributions(self) -> dict[str, tuple[Distribution, Distribution]]:
        """Metric -> (recorded, simulated), in ns."""
        return {
            name: (describe(self.recorded.metric(name)), describe(self.simulated.metric(name)))
            for name in METRICS
        }

    def error(self, metric: str, statistic: str = "mean") -> float:
        """Relative error of a figure: 0.01 where the simulation is 1 % high."""
        recorded, simulated = (getattr(side, statistic) for side in self.distributions[metric])
        return simulated / recorded - 1 if recorded else 0.0

    def request_errors(self, metric: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Per request: relative error (of those whose recorded value is not 0) and difference in ms."""
        recorded, simulated = self.recorded.metric(metric), self.simulated.metric(metric)
        there = recorded > 0
        return simulated[there] / recorded[there] - 1, (simulated - recorded) / MS

    @cached_property
    def curves(self) -> dict[str, LoadCurves]:
        """Running and waiting requests and generated tokens per second over time, as far as recorded."""
        ticks, found = self.recording.ticks, {}
        end_s = max(self.recorded.last_token_ns.max(), self.simulated.last_token_ns.max()) / SECOND
        times_s = np.arange(1.0, np.ceil(end_s)) if ticks is None else ticks.end_s
        if not len(times_s):
            return {}
        times_ns = np.rint(times_s * SECOND).astype(np.int64)
        for name in ("running", "waiting"):
            simulated = getattr(self.simulated, f"{name}_at")(times_ns)
            recorded = getattr(self.recorded, f"{name}_at")(times_ns)
            if recorded is None and ticks is not None:
                recorded = getattr(ticks, name)
            if recorded is not None:
                found[name] = LoadCurves(times_s, recorded.astype(np.float64), simulated.astype(np.float64))
        if ticks is not None:
            found["generated tokens/s"] = LoadCurves(
                times_s, ticks.gen_throughput, self._generated_per_second(times_s)
            )
        return found

    def report(self) -> dict[str, Any]:
        """Every figure, ready for JSON."""
        return {
            "metrics": {name: self._metric_report(name) for name in METRICS},
            "throughput": self._throughput_report(),
            "over_time": {name: curves.report() for name, curves in self.curves.items()},
        }

    def _metric_report(self, name: str) -> dict[str, Any]:
        recorded, simulated = self.distributions[name]
        figures = {}
        for statistic in STATISTICS:
            there, ours = getattr(recorded, statistic) / MS, getattr(simulated, statistic) / MS
            figures[statistic] = {
                "recorded_ms": there,
                "simulated_ms": ours,
                "error_ms": ours - there,
                "error_percent": 100 * self.error(name, statistic),
            }
        relative, ms = self.request_errors(name)
        return {
            **figures,
            "per_request": {
                "median_absolute_error_percent": 100 * float(np.median(np.abs(relative)))
                if len(relative)
                else 0.0,
                "median_absolute_error_ms": float(np.median(np.abs(ms))) if len(ms) else 0.0,
            },
        }

    def _throughput_report(self) -> dict[str, Any]:
        tokens = int(self.recording.output_tokens.sum())
        prompt = int(self.recording.input_tokens.sum())
        spans = self.recorded.duration_ns / SECOND, self.simulated.duration_ns / SECOND
        counts = {
            "requests_per_second": len(self.recording),
            "output_tokens_per_second": tokens,
            "total_tokens_per_second": prompt + tokens,
        }
        rows: dict[str, Any] = {}
        for name, count in counts.items():
            there, ours = (count / span for span in spans)
            rows[name] = {"recorded": there, "simulated": ours, "error_percent": 100 * (ours / there - 1)}
        rows["duration_seconds"] = {
            "recorded": spans[0],
            "simulated": spans[1],
            "error_percent": 100 * (spans[1] / spans[0] - 1),
        }
        return rows

    def _generated_per_second(self, ends_s: NDArray[np.float64]) -> NDArray[np.float64]:
        """Tokens per second of the simulation in each interval that ends at ``ends_s``."""
        edges = np.concatenate([[min(0.0, ends_s[0])], ends_s])
        counts = np.zeros(len(ends_s))
        for index, instance in enumerate(self.result.instances):
            made = np.zeros(len(instance.steps) + 1, dtype=np.int64)
            for record in self.result.records:
                for number, first, last in record.token_steps:
                    if number == index:
                        made[first] += 1
                        made[last + 1] -= 1
            step_ends_s = (instance.steps.column("end_ns") + self._shift_ns) / SECOND
            counts += np.histogram(step_ends_s, edges, weights=np.cumsum(made[:-1]))[0]
        result: NDArray[np.float64] = counts / np.diff(edges)
        return result


def _between(
    starts: NDArray[np.int64], ends: NDArray[np.int64], times: NDArray[np.int64]
) -> NDArray[np.int64]:
    """How many intervals [start, end) hold each time."""
    result: NDArray[np.int64] = np.searchsorted(np.sort(starts), times, side="right") - np.searchsorted(
        np.sort(ends), times, side="right"
    )
    return result


_RECORDED = {"color": "black", "label": "recorded"}
_SIMULATED = {"color": "tab:orange", "label": "simulated", "linestyle": "--"}
_GENERATED = "generated tokens/s"


def save_plots(agreement: Agreement, folder: str | Path) -> list[Path]:
    """Draw what the recording allows into ``folder``; returns the files written."""
    require_matplotlib()
    figures = {"cdf.png": _distributions(agreement)}
    if "running" in agreement.curves:
        figures["load.png"] = _load(agreement)
    if _GENERATED in agreement.curves:
        figures["throughput.png"] = _throughput(agreement)
    return save_figures(figures, folder)


def _distributions(agreement: Agreement) -> Any:
    figure = new_figure(12, 4)
    for axes, metric in zip(figure.subplots(1, len(METRICS)), METRICS, strict=True):
        unit, scale = ("ms", MS) if metric == "TPOT" else ("s", SECOND)
        for times, style in ((agreement.recorded, _RECORDED), (agreement.simulated, _SIMULATED)):
            values = np.sort(times.metric(metric)) / scale
            axes.step(values, np.arange(1, len(values) + 1) / max(len(values), 1), where="post", **style)
        axes.set_xlabel(f"{metric} ({unit}), mean {100 * agreement.error(metric):+.1f} %")
        axes.set_ylabel("share of requests")
        axes.legend()
    return figure


def _load(agreement: Agreement) -> Any:
    names = [name for name in ("running", "waiting") if name in agreement.curves]
    figure = new_figure(10, 3 * len(names))
    for axes, name in zip(figure.subplots(len(names), 1, squeeze=False)[:, 0], names, strict=True):
        _over_time(axes, agreement, name)
        axes.set_ylabel(f"{name} requests")
    return figure


def _throughput(agreement: Agreement) -> Any:
    figure = new_figure(10, 3)
    axes = figure.subplots()
    _over_time(axes, agreement, _GENERATED)
    axes.set_ylabel(_GENERATED)
    return figure


def _over_time(axes: Any, agreement: Agreement, name: str) -> None:
    curves = agreement.curves[name]
    axes.plot(curves.times_s, curves.recorded, **_RECORDED)
    axes.plot(curves.times_s, curves.simulated, **_SIMULATED)
    axes.set_xlabel("time (s)")
    axes.legend()
