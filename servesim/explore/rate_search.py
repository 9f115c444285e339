"""The largest request rate, or concurrency, at which a service level still holds."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, field, replace
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any, Literal

from servesim.api import NOISE, check_used, making_bundles, read_cluster, read_workload, with_flags
from servesim.engine.arrivals import TURNED_AWAY
from servesim.errors import InputError, RunError
from servesim.explore.bisection import Range, largest
from servesim.explore.load_point import LoadPoint, load_point
from servesim.explore.notebook import line
from servesim.explore.slo import parse_slo, per_request_slo
from servesim.explore.warm_runs import Target, WarmRuns, least_work_ms
from servesim.results.atomic import atomic_write
from servesim.slotted import dataclass
from servesim.workload.arrivals import change_rate
from servesim.workload.request import Workload

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from os import PathLike

    import pandas as pd

    from servesim.explore.bisection import Edge
    from servesim.results.result import Result
    from servesim.specs.cluster import ClusterSpec
    from servesim.specs.options import RuntimeOptions

LEAST_PATTERNS = 3
"""Arrival patterns that are tried at least, the workload's own among them."""
PATTERNS = 5
"""And at most, unless the caller says otherwise."""
PRECISION = 0.02
_LOWEST = 1 / 1024
"""The lowest rate tried, as a share of the throughput with everything at once."""
_FIRST = 0.8
"""The first rate tried, likewise."""
_WIDE = 2.0
"""Step from a blind guess; from the answer under other conditions it is twice the precision."""

QUICK_MS = 3000.0
"""Processor time that the runs of a quick search are to take, by the estimate of ``WarmRuns.work_ms``."""
_SEARCH_RUNS = 9
"""Runs of a search from a blind guess: where they take more than a quick search may, runs end early."""
_GUESS_SHARE = 0.2
"""Share of the requests that finish in a costly run of everything at once, for a guess of the throughput."""
_COSTLY_MIDDLE = 0.7
"""Where a bracket is cut if a run that passes takes two or three times as long as one that is given up."""

By = Literal["rate", "concurrency"]
Effort = Literal["quick", "full"]


@dataclass(slots=True)
class LoadLimit:
    """The largest load that keeps a target, how sure it is, and the runs that led there."""

    by: By
    target: Target
    load: float | None
    """req/s (sessions/s where the workload has sessions), or requests in the system; the mean over the
    arrival patterns. None: no load keeps the target. inf: even everything at once does."""
    curve: list[LoadPoint] = field(default_factory=list)
    """Every load tried with the workload's own arrival pattern, ascending."""
    loads: list[float] = field(default_factory=list)
    """The largest load that keeps the target with each arrival pattern, the workload's own first."""
    precision: float = PRECISION
    entries: str = "req"
    """What a rate counts: ``req`` or ``sessions``."""
    kernel_error_percent: float | None = None
    """By how much all kernel times may be off, as stated for the bundles used; None: not asked for."""
    kernel_band: tuple[float | None, float | None] | None = None
    """The load with all kernel times longer, and shorter, by that much (own pattern); None: no load does."""
    binding: str = ""
    """What is missed first above the load, and what requests wait for there."""
    notes: list[str] = field(default_factory=list)
    runs: int = 0
    """Runs that the search took."""
    reached: float = 0.0
    """By what share the least load that fails is above the largest that passes (own pattern)."""
    left_out: list[str] = field(default_factory=list)
    """What a quick search did not do, in words."""

    @property
    def band(self) -> tuple[float, float] | None:
        """Lowest and highest load over the arrival patterns."""
        return (min(self.loads), max(self.loads)) if len(self.loads) > 1 else None

    @property
    def standard_error(self) -> float | None:
        """Of the load, as a share of it; None for a single pattern."""
        return _standard_error(self.loads)

    @property
    def stable(self) -> bool:
        """Whether enough patterns were tried for the standard error to be within the precision."""
        error = self.standard_error
        return error is not None and error <= self.precision

    @property
    def wide(self) -> bool:
        """Whether loads are left between those of :attr:`reached` that a longer search would try."""
        next_whole = self.by == "concurrency" and bool(self.loads) and self.reached * self.loads[0] < 1.5
        return self.reached > self.precision and not next_whole

    @property
    def unit(self) -> str:
        """What :attr:`load` counts."""
        return f"{self.entries}/s" if self.by == "rate" else "requests at once"

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON; ``inf`` is a word."""
        error = self.standard_error
        return {
            "by": self.by,
            "unit": self.unit,
            "load": "inf" if self.load == math.inf else _rounded(self.load),
            "slo": [asdict(bound) for bound in self.target.slo.bounds],
            "goodput": self.target.goodput,
            "band": None if self.band is None else [_rounded(end) for end in self.band],
            "loads": [_rounded(load) for load in self.loads],
            "standard_error": _rounded(error),
            "precision": self.precision,
            "reached": _rounded(self.reached),
            "left_out": self.left_out,
            "stable": self.stable,
            "kernel_error_percent": self.kernel_error_percent,
            "kernel_band": self.kernel_band and [_rounded(end) for end in self.kernel_band],
            "binding": self.binding,
            "curve": [point.to_dict() for point in self.curve],
            "notes": self.notes,
            "runs": self.runs,
        }

    def json_text(self) -> str:
        """:meth:`to_dict` as indented JSON."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    def to_pandas(self) -> pd.DataFrame:
        """The curve as a DataFrame, a row for each load that was tried.

        Raises:
            ImportError: pandas is not installed.
        """
        import pandas

        rows = [{**point.to_dict(), "load": point.load} for point in self.curve]
        for row in rows:
            row |= {f"waits_{name}": share for name, share in row.pop("waits").items()}
            titles = [bound.title for bound in self.target.slo.bounds]
            row |= dict(zip(titles, row.pop("bounds_ms"), strict=True))
        return pandas.DataFrame(rows)

    def _repr_html_(self) -> str:
        """In a notebook."""
        from servesim.explore.show_limit import limit_html

        return limit_html(self)

    def save_plot(self, path: str | PathLike[str]) -> None:
        """Draw the curve as PNG or SVG, by the ending of ``path``.

        Raises:
            InputError: matplotlib is not installed.
        """
        from pathlib import Path

        from servesim.explore.show_limit import save_plot

        save_plot(self, Path(path))

    def save_json(self, path: str | PathLike[str]) -> None:
        """Write :meth:`to_dict` as JSON."""
        with atomic_write(str(path), "w") as handle:
            handle.write(self.json_text())


def slo(
    cluster: ClusterSpec | str | PathLike[str] | dict[str, Any] | None = None,
    workload: Workload | str | PathLike[str] | None = None,
    bounds: str | Sequence[str] | Mapping[str, float] = (),
    options: RuntimeOptions | None = None,
    *,
    goodput: float | None = None,
    by: By = "rate",
    precision: float = PRECISION,
    patterns: int = PATTERNS,
    kernel_error: bool = True,
    effort: Effort = "quick",
    before_run: Callable[[str], None] | None = None,
    **flags: Any,
) -> LoadLimit:
    """Find the largest load that keeps ``bounds``.

    The workload keeps its lengths; its arrivals are stretched to every rate tried. The search is repeated
    with the gaps between arrivals in another order, at least :data:`LEAST_PATTERNS` times in all and until
    the standard error of the mean load is within ``precision``, or ``patterns`` are tried.

    Args:
        cluster: as for :func:`servesim.simulate`.
        workload: as for :func:`servesim.simulate`.
        bounds: upper bounds of latencies, such as ``"ttft:p99<1000 tpot:p95<50"`` (ms).
        options: runtime options of every run.
        goodput: a share in (0, 1]: so many of the requests keep every bound by themselves, in place of the
            statistics of the run.
        by: ``rate``; or ``concurrency``: everything arrives at once (unless a request rate is given) and at
            most so many requests are in the system.
        precision: relative width at which a search ends.
        patterns: most arrival patterns that are tried; 1: the workload's own alone.
        kernel_error: search twice more with all kernel times longer and shorter by their stated error.
        effort: ``quick``: runs of some 3 s of processor time; where a search takes longer, runs that miss end
            early, the range stays wider and the band has fewer parts, which ``left_out`` and ``reached`` say.
            ``full``: all of it, however long that takes.
        before_run: called before each part of the search with a few words about it.
        **flags: single options by name.

    Raises:
        InputError: something given is wrong, or has no effect here.
        RunError: every request is rejected.
    """
    target = _target(bounds, goodput)
    _check_search(by, precision, patterns)
    if effort not in ("quick", "full"):
        raise InputError(f"--effort: {effort!r} is not allowed; must be quick or full")
    chosen = with_flags(options, flags)
    _check_options(chosen, by)
    check_used(chosen, "slo", workload, cluster)
    spec = read_cluster(chosen, cluster)
    loaded = _loaded(chosen, workload, by)
    runs = WarmRuns(spec, loaded, chosen, by_rate=by == "rate", reshuffles=patterns > 1)
    allowed_ms = QUICK_MS if effort == "quick" else math.inf
    search = _Search(runs, target, by, precision, before_run or line() or (lambda _: None), allowed_ms)
    with making_bundles(chosen.auto_profile):
        return search.result(patterns, kernel_error)


def _target(bounds: str | Sequence[str] | Mapping[str, float], goodput: float | None) -> Target:
    if goodput is None:
        return Target(parse_slo(bounds))
    if not 0 < goodput <= 1:
        raise InputError(
            f"--goodput: {goodput:g} is not allowed; must be a share of the requests above 0, up to 1, such "
            "as 0.95"
        )
    return Target(per_request_slo(bounds), goodput)


def _check_search(by: str, precision: float, patterns: int) -> None:
    if by not in ("rate", "concurrency"):
        raise InputError(f"--by: {by!r} is not allowed; must be rate or concurrency")
    if not 1e-4 <= precision <= 0.5:
        raise InputError(f"--precision: {precision:g} is not allowed; must be from 0.0001 to 0.5")
    if not 1 <= patterns <= 1000:
        raise InputError(f"--patterns: {patterns} is not allowed; must be from 1 to 1000")


def _check_options(options: RuntimeOptions, by: str) -> None:
    given = options.model_fields_set
    searched = "request_rate" if by == "rate" else "max_concurrency"
    if searched in given and getattr(options, searched):
        flag = "--" + searched.replace("_", "-")
        raise InputError(f"{flag}: is what slo searches for with --by {by}; leave it out")
    for name in NOISE:
        if name in given:
            raise InputError(
                f"--{name.replace('_', '-')}: has no effect on slo, whose band is that of arrival patterns "
                "and of the stated error of the kernel times; leave it out"
            )


def _loaded(options: RuntimeOptions, workload: Workload | str | PathLike[str] | None, by: By) -> Workload:
    loaded = workload if isinstance(workload, Workload) else read_workload(options, workload)
    if by == "concurrency" and options.request_rate is None:
        loaded = replace(loaded, requests=[replace(request) for request in loaded.requests])
        change_rate(loaded, math.inf, options.seed)
    return loaded


class _Search:
    """One search, with what its parts have in common."""

    def __init__(
        self,
        runs: WarmRuns,
        target: Target,
        by: By,
        precision: float,
        tell: Callable[[str], None],
        allowed_ms: float,
    ) -> None:
        self._runs = runs
        self._allowed_ms = allowed_ms
        self._costly = _SEARCH_RUNS * least_work_ms(runs.workload) > allowed_ms
        self._target = target
        self._tell = tell
        has_sessions = runs.num_entries < len(runs.workload)
        self._limit = LoadLimit(by, target, None, precision=precision)
        self._limit.entries = "sessions" if has_sessions else "req"
        self._points: dict[float, LoadPoint] = {}
        self._error_percent = 0.0

    def result(self, patterns: int, kernel_error: bool) -> LoadLimit:
        """See :func:`slo`."""
        limit = self._limit
        self._tell("everything at once")
        freely = self._own_run(math.inf)
        where, first = self._range(freely)
        if self._points[math.inf].meets:
            limit.load = math.inf
        else:
            self._tell("arrivals as in the workload")
            middle = _COSTLY_MIDDLE if self._costly else 0.5
            edge = largest(self._score, where, first, _WIDE, middle=middle, spent=self._spent)
            limit.load, limit.reached = edge.passes, edge.width
            if edge.passes is not None:
                limit.loads = [edge.passes]
                limit.binding = self._binding(edge)
                self._more_patterns(where, patterns)
                if kernel_error:
                    self._shifted(where)
        limit.curve = [self._points[load] for load in sorted(self._points)]
        limit.runs = self._runs.runs
        return limit

    def _spent(self) -> bool:
        """Whether a quick search has had its time."""
        return self._runs.work_ms >= self._allowed_ms

    def _may(self, what: str) -> bool:
        """Whether there is time for one more search near the answer; notes what is left out."""
        expected_ms = _NEAR_RUNS * least_work_ms(self._runs.workload)
        if self._runs.work_ms + expected_ms <= self._allowed_ms:
            return True
        self._limit.left_out.append(what)
        return False

    def _own_run(self, load: float) -> Result:
        """A run with the workload's own pattern, which becomes a point of the curve."""
        share = _GUESS_SHARE if math.isinf(load) else 0.0
        outcome = self._runs.run(load, target=self._target if self._costly else None, least_share=share)
        result = outcome.result
        if result.nothing_ran:
            raise RunError(f"every request was rejected: {result.rejected[0].reason}")
        self._points[load] = load_point(load, outcome, self._target)
        if math.isinf(load):
            self._limit.notes = [*result.log.notes, *_about_rejected(result, self._target)]
            self._error_percent = max(
                (log.stated_error.percent for log in result.instances if log.stated_error), default=0.0
            )
        return result

    def _range(self, freely: Result) -> tuple[Range, float]:
        """Where to search, and where to begin."""
        precision = self._limit.precision
        if self._limit.by == "concurrency":
            most = max(len(self._runs.workload), 2)
            peak = max(freely.summary["peak_batch"], 1)
            return Range(1, most, precision, whole=True), max(peak / 2, 1)
        per_entry = len(self._runs.workload) / self._runs.num_entries
        served = freely.summary["request_throughput"] / per_entry
        return Range(served * _LOWEST, served * 1e6, precision), served * _FIRST

    def _score(self, load: float) -> float:
        self._own_run(load)
        return self._points[load].score

    def _edge(self, where: Range, first: float, pattern: int, slower: float) -> Edge:
        """The search again under other conditions, near an answer; runs that miss end early."""

        def score(load: float) -> float:
            return self._runs.run(load, pattern, slower=slower, target=self._target).score(self._target)

        return largest(score, where, first, 1 + 2 * self._limit.precision, spent=self._spent)

    def _more_patterns(self, where: Range, patterns: int) -> None:
        limit = self._limit
        for pattern in range(1, patterns):
            if len(limit.loads) >= LEAST_PATTERNS and limit.stable:
                break
            if not self._may("other arrival patterns" if pattern == 1 else "more arrival patterns"):
                break
            self._tell(f"arrival pattern {pattern + 1}")
            edge = self._edge(where, _mean(limit.loads), pattern, 1.0)
            limit.loads.append(where.lowest if edge.passes is None else edge.passes)
        limit.load = _mean(limit.loads)
        if where.whole:
            limit.load = float(math.floor(limit.load + 1e-9))

    def _shifted(self, where: Range) -> None:
        percent = self._error_percent
        if not percent or percent >= 100:
            return
        if not self._may("the kernel times' stated error"):
            return
        ends = []
        for factor in (1 + percent / 100, 1 - percent / 100):
            self._tell(f"kernel times x {factor:.3f}")
            ends.append(self._edge(where, self._limit.loads[0] / factor, 0, factor).passes)
        self._limit.kernel_error_percent = percent
        self._limit.kernel_band = (ends[0], ends[1])

    def _binding(self, edge: Edge) -> str:
        """What gives way just above the largest load."""
        beyond = self._points[math.inf if edge.fails is None else edge.fails]
        return f"{beyond.missed_words(self._target, self._limit.unit)}; {beyond.held_back}"


_NEAR_RUNS = 4
"""Runs of a search that begins near its end."""


def _about_rejected(result: Result, target: Target) -> list[str]:
    """What never runs; whom a full server turns away at one load may be let in at another."""
    never = [each for each in result.rejected if not each.reason.startswith(TURNED_AWAY)]
    if not never:
        return []
    what = "count as bad" if target.goodput is not None else "miss every SLO"
    if len(never) == 1:
        what = what.replace("count", "counts").replace("miss", "misses")
    are = "request is" if len(never) == 1 else "requests are"
    return [f"{len(never)} {are} rejected at any load, and {what}: {never[0].reason}"]


def _mean(loads: Sequence[float]) -> float:
    """Geometric: loads are searched on a logarithmic scale."""
    return math.exp(fmean(map(math.log, loads)))


def _standard_error(loads: Sequence[float]) -> float | None:
    if len(loads) < 2:
        return None
    return stdev(map(math.log, loads)) / math.sqrt(len(loads))


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)
