"""The same run many times with seeded noise: how far every figure of the summary may be trusted."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from dataclasses import asdict, replace
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

import numpy as np

from servesim.api import check_used, read_cluster, read_workload, simulate_loaded, single, with_flags
from servesim.errors import InputError, RunError
from servesim.results.units import digits
from servesim.slotted import dataclass
from servesim.terminal import screen_width, wrapped
from servesim.workload.request import Workload

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from os import PathLike

    from servesim.results.result import Result
    from servesim.results.table import Table
    from servesim.specs.cluster import ClusterSpec
    from servesim.specs.options import RuntimeOptions

FRAGILE = 0.05
"""Relative spread from which on a figure counts as fragile."""
_NOT_FIGURES = frozenset(
    {"completed", "failed", "total_input_tokens", "total_output_tokens", "skipped_lines"}
)
"""Numbers of the summary that noise cannot move."""
_STEPS, _ARRIVALS, _RUN = 0, 1, 2  # what a random stream is for, the third word of its seed


@dataclass(slots=True, frozen=True)
class Spread:
    """One figure of the summary over the noisy runs, in the summary's unit."""

    nominal: float
    """Without noise."""
    mean: float
    std: float
    """Sample standard deviation."""
    min: float
    p5: float
    p95: float
    max: float

    @property
    def relative(self) -> float:
        """(P95 - P5) / mean."""
        return (self.p95 - self.p5) / abs(self.mean) if self.mean else 0.0

    @property
    def fragile(self) -> bool:
        """Whether the noise moves the figure by more than 5 %."""
        return self.relative > FRAGILE


@dataclass(slots=True)
class Ensemble:
    """A run without noise and the spread of its figures over ``runs`` runs with noise."""

    nominal: Result
    runs: int
    step_noise: float
    run_noise: float
    arrival_jitter_s: float
    spreads: dict[str, Spread]
    """Key of the summary (``kv_cache_peak`` for the nested one) -> its spread."""

    @property
    def fragile(self) -> list[str]:
        """Keys of the fragile figures, the worst first."""
        found = [key for key, spread in self.spreads.items() if spread.fragile]
        return sorted(found, key=lambda key: -self.spreads[key].relative)

    def to_dict(self) -> dict[str, Any]:
        """The ``ensemble`` entry of the summary, ready for JSON."""
        assert self.nominal.options is not None
        return {
            "runs": self.runs,
            "seed": self.nominal.options.seed,
            "step_noise": self.step_noise,
            "run_noise": self.run_noise,
            "arrival_jitter_s": self.arrival_jitter_s,
            "near_saturation": self.nominal.summary["saturation"]["near"],
            "fragile": self.fragile,
            "figures": {
                key: {
                    **{name: round(value, 6) for name, value in asdict(spread).items()},
                    "relative_spread": round(spread.relative, 6),
                }
                for key, spread in self.spreads.items()
            },
        }


def ensemble(
    cluster: ClusterSpec | str | PathLike[str] | dict[str, Any] | None = None,
    workload: Workload | str | PathLike[str] | None = None,
    options: RuntimeOptions | None = None,
    *,
    nominal: Result | None = None,
    before_run: Callable[[int], None] | None = None,
    **flags: Any,
) -> Ensemble:
    """Simulate once without noise and ``options.ensemble`` times with, and collect every figure's spread.

    Run k is a function of the seed and k alone. Its steps are scaled by log-normal factors of mean 1: one of
    relative deviation ``step_noise`` for each step, and one of ``run_noise`` for the run as a whole. The
    former averages out over the steps, as jitter does; the latter does not, as a systematic error of the
    kernel times would not. Every arrival (not the releases within a session) is moved by up to
    ``arrival_jitter`` seconds either way, evenly distributed.

    Args:
        cluster: as for :func:`servesim.simulate`.
        workload: as for :func:`servesim.simulate`.
        options: runtime options with ``ensemble`` >= 2.
        nominal: the run without noise, if it is there already; ``cluster`` and ``workload`` are then its.
        before_run: called with the number of each noisy run before it starts.
        **flags: single options by name, such as ``ensemble=20``.

    Raises:
        InputError: fewer than two runs, or something given is wrong.
        RunError: a run could not be finished.
    """
    chosen = with_flags(options, flags)
    if not chosen.ensemble:
        raise InputError("ensemble: 0 is no ensemble; give the number of runs, such as ensemble=20")
    if nominal is None:
        check_used(chosen, "ensemble", workload, cluster)
        requests = workload if isinstance(workload, Workload) else read_workload(chosen, workload)
        nominal = simulate_loaded(read_cluster(chosen, cluster), requests, single(chosen))
    if nominal.nothing_ran:
        raise RunError(f"every request was rejected: {nominal.rejected[0].reason}")
    figures = noisy_figures(nominal, chosen, before_run=before_run)
    spreads = {
        key: spread_of(value, [each[key] for each in figures]) for key, value in figures_of(nominal).items()
    }
    return Ensemble(
        nominal, chosen.ensemble, chosen.step_noise, chosen.run_noise, chosen.arrival_jitter, spreads
    )


def noisy_figures(
    nominal: Result,
    options: RuntimeOptions,
    *,
    stream: int = 0,
    before_run: Callable[[int], None] | None = None,
) -> list[dict[str, float]]:
    """The figures of ``options.ensemble`` noisy runs of what ``nominal`` ran.

    Runs of the same number, seed and ``stream`` have the same noise, whatever they run; arrivals are moved
    alike in every stream.
    """
    figures = []
    for member in range(options.ensemble):
        if before_run is not None:
            before_run(member)
        figures.append(figures_of(_noisy_run(nominal, options, member, stream)))
    return figures


def figures_of(result: Result) -> dict[str, float]:
    """Every number of the summary that noise can move."""
    summary = result.summary
    figures = {
        key: float(value)
        for key, value in summary.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and key not in _NOT_FIGURES
    }
    figures["kv_cache_peak"] = summary["kv_cache"]["peak"]
    figures["prefix_cache_hit_rate"] = summary["prefix_cache"]["hit_rate"]
    return figures


def jittered(workload: Workload, jitter_s: float, seed: tuple[int, ...]) -> Workload:
    """The workload with every arrival moved by up to ``jitter_s``, evenly distributed, in whole microseconds.

    A time that would fall before 0 is mirrored at 0. Requests that a predecessor releases follow it.
    """
    reach_us = round(jitter_s * 1e6)
    if not reach_us:
        return workload
    moves = np.random.default_rng(seed).integers(-reach_us, reach_us, len(workload), endpoint=True)
    moved = [
        replace(request, arrival_ns=abs(request.arrival_ns + move * 1000))
        for request, move in zip(workload, moves.tolist(), strict=True)
    ]
    return replace(workload, requests=moved)


def _noisy_run(nominal: Result, options: RuntimeOptions, member: int, stream: int) -> Result:
    from servesim.engine.build import build_simulation
    from servesim.engine.noise import StepNoise, log_normal
    from servesim.results.result import Result

    cluster = nominal.cluster
    assert cluster is not None
    seed = (options.seed, member)
    workload = jittered(nominal.workload, options.arrival_jitter, (*seed, _ARRIVALS))
    own = (stream,) if stream else ()
    draw = np.random.default_rng((*seed, _RUN, *own)).standard_normal(1)
    common = float(log_normal(options.run_noise, draw)[0])

    def noise(index: int) -> StepNoise:
        return StepNoise(options.step_noise, (*seed, _STEPS, index, *own), common)

    with silence():  # the run without noise has said what there is to say
        simulation = build_simulation(cluster, workload, single(options), noise=noise)
    return Result(simulation.run(), workload, nominal.options, cluster)


@contextmanager
def silence() -> Iterator[None]:
    """No log records of servesim inside the block."""
    logger = logging.getLogger("servesim")
    before = logger.disabled
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = before


def spread_of(nominal: float, values: list[float]) -> Spread:
    """The spread of at least two values of a figure."""
    low, high = np.percentile(values, [5, 95]).tolist()
    return Spread(
        nominal=nominal,
        mean=fmean(values),
        std=stdev(values),  # exact: of equal values it is 0
        min=min(values),
        p5=low,
        p95=high,
        max=max(values),
    )


def ensemble_text(spread: Ensemble) -> str:
    """What is printed below the figures of the run itself: bands, saturation, and what is fragile."""
    jitter = f", arrivals ±{spread.arrival_jitter_s:g} s" if spread.arrival_jitter_s else ""
    width = screen_width() or 10_000
    lines = [
        f"spread (P5–P95) over {spread.runs} runs, each step ±{spread.step_noise * 100:.3g} %, "
        f"all steps of a run ±{spread.run_noise * 100:.3g} %{jitter}; ! = wider than {FRAGILE * 100:.0f} %",
        "",
        _latency_bands(spread).plain(width=screen_width()),
        "",
        "throughput     "
        + ", ".join(
            f"{_band(spread.spreads[key])} {unit}"
            for key, unit in (("request_throughput", "req/s"), ("output_throughput", "output tok/s"))
        ),
        wrapped(_fragility(spread), width, indent=" " * 15),
    ]
    lines[0] = wrapped(lines[0], width)
    return "\n".join(lines)


def _latency_bands(spread: Ensemble) -> Table:
    from servesim.results.closing import LATENCY_ROWS, STATISTICS
    from servesim.results.table import Table

    table = Table(["ms", *(title for title, _ in STATISTICS)])
    for title, name in LATENCY_ROWS:
        cells = [_band(spread.spreads[f"{statistic}_{name}_ms"]) for _, statistic in STATISTICS]
        table.rows.append([title, *cells])
    return table


def _band(spread: Spread) -> str:
    low, high = digits(spread.p5), digits(spread.p95)
    return (low if low == high else f"{low}–{high}") + ("!" if spread.fragile else "")


def _fragility(spread: Ensemble) -> str:
    near = spread.nominal.summary["saturation"]["near"]
    if not spread.fragile:
        calm = "near saturation, but stable" if near else "nothing"
        return f"fragile        {calm}: every figure varies by less than {FRAGILE * 100:.0f} %"
    worst = [f"{key} {spread.spreads[key].relative:.0%}" for key in spread.fragile[:6]]
    more = f" and {len(spread.fragile) - 6} more" if len(spread.fragile) > 6 else ""
    cause = " (the run is near saturation)" if near else ""
    return f"fragile        {', '.join(worst)}{more}{cause}; quote these as bands, not as numbers"
