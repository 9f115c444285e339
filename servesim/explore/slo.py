"""A service level: upper bounds of latencies, and which share of a run's requests stays within them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import field
from typing import TYPE_CHECKING

import numpy as np

from servesim.errors import InputError
from servesim.results.stated_errors import UNSTATED, StatedError
from servesim.results.units import MS
from servesim.slotted import dataclass

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from numpy.typing import NDArray

    from servesim.explore.ensemble import Spread
    from servesim.results.result import Result

_METRICS = {"ttft": "TTFT", "tpot": "TPOT", "e2el": "latency"}
"""Name in an SLO -> column of the requests' table."""
_STATISTICS = ("mean", "median", "p50", "p90", "p95", "p99")
_SAME = {"latency": "e2el", "e2e": "e2el"}
"""Other names of a metric."""
_FORM = re.compile(r"(?P<metric>[a-z0-9]+)(?::(?P<statistic>[a-z0-9]+)[:<]|[:<])(?P<bound>[^:<]+)")
_ALLOWED = (
    "must be METRIC:MS or METRIC:STATISTIC:MS with a metric of ttft, tpot, e2el, a statistic of "
    f"{', '.join(_STATISTICS)} (p99 unless said) and milliseconds above 0, such as ttft:1000 or "
    "ttft:p95:1000"
)


@dataclass(slots=True, frozen=True)
class Bound:
    """One latency's upper bound."""

    metric: str
    """``ttft``, ``tpot`` or ``e2el``."""
    statistic: str
    limit_ms: float

    @property
    def title(self) -> str:
        """``TTFT P99``, as the rows of a comparison are called."""
        shown = self.statistic.upper() if self.statistic.startswith("p") else self.statistic
        return f"{_METRICS[self.metric]} {shown}"

    def value_ms(self, result: Result) -> float:
        """The run's figure that must not be above the limit."""
        name = "median" if self.statistic == "p50" else self.statistic
        return result.figure(f"{name}_{self.metric}_ms")


@dataclass(slots=True, frozen=True)
class Slo:
    """All bounds hold at once."""

    bounds: tuple[Bound, ...]

    def met(self, result: Result) -> bool:
        """Whether requests finished, none was rejected, and every figure is within its bound."""
        return not self.missed(result) and len(result.requests) > 0 and not result.rejected

    def missed(self, result: Result) -> list[Bound]:
        """The bounds that the run exceeds."""
        return [bound for bound in self.bounds if bound.value_ms(result) > bound.limit_ms]

    def goodput_share(self, result: Result) -> float:
        """Share of all requests, rejected ones included, that finished within every bound themselves."""
        asked = len(result.requests) + len(result.rejected)
        return float(self._within(result).sum()) / asked if asked else 0.0

    def words(self) -> str:
        """``TTFT P99 up to 1,000 ms, TPOT P99 up to 50 ms``."""
        return ", ".join(f"{bound.title} up to {bound.limit_ms:,.10g} ms" for bound in self.bounds)

    def _within(self, result: Result) -> NDArray[np.bool_]:
        rows = result.requests
        within = np.ones(len(rows), dtype=np.bool_)
        for bound in self.bounds:
            within &= rows[_METRICS[bound.metric]] <= bound.limit_ms * MS
        return within


def parse_slo(given: str | Sequence[str] | Mapping[str, float]) -> Slo:
    """An SLO from words such as ``ttft:1000 tpot:p95:50`` or ``ttft:p99<1000``, or from {"ttft": 1000}.

    Raises:
        InputError: a word of another form, a metric given twice with the same statistic, or no word at all.
    """
    bounds: dict[tuple[str, str], Bound] = {}
    for word in _words(given):
        bound = _bound(word)
        if bounds.setdefault((bound.metric, bound.statistic), bound) is not bound:
            raise InputError(f"--slo: {word!r}: there is a bound of {bound.title} already; give one of each")
    if not bounds:
        raise InputError(f"--slo: no bound given; {_ALLOWED}")
    return Slo(tuple(bounds.values()))


def per_request_slo(given: str | Sequence[str] | Mapping[str, float]) -> Slo:
    """The same for bounds that every request is held to by itself, as ``vllm bench serve --goodput`` does.

    Raises:
        InputError: as :func:`parse_slo`; or a bound is of a statistic, which a single request has none of.
    """
    slo = parse_slo(given)
    for word in _words(given):
        if len(re.split("[:<]", word)) > 2:
            raise InputError(
                f"--slo: {word!r}: with --goodput every request is held to the bounds by itself; leave the "
                "statistic out, such as ttft:1000"
            )
    return slo


def _words(given: str | Sequence[str] | Mapping[str, float]) -> list[str]:
    if isinstance(given, Mapping):
        given = [f"{metric}:{limit}" for metric, limit in given.items()]
    if isinstance(given, str):
        given = [given]
    return [word.lower() for part in given for word in str(part).replace(",", " ").split()]


def _bound(word: str) -> Bound:
    form = _FORM.fullmatch(word)
    wrong = InputError(f"--slo: {word!r} is not allowed; {_ALLOWED}")
    metric = "" if form is None else _SAME.get(form["metric"], form["metric"])
    if form is None or metric not in _METRICS:
        raise wrong
    statistic = form["statistic"] or "p99"
    try:
        limit = float(form["bound"].removesuffix("ms"))
    except ValueError:
        raise wrong from None
    if statistic not in _STATISTICS or not 0 < limit < float("inf"):
        raise wrong
    return Bound(metric, statistic, limit)


PAYS = "pays"
COSTS = "does not pay"
TRADES = "is a trade-off"
ALIKE = "makes no measurable difference"
NEARER = "comes nearer to the SLO, but misses it too"
FURTHER = "misses the SLO by more"
FAILS = "cannot serve this workload"

FIGURES = (
    ("output_throughput", "output throughput", 1),
    ("mean_ttft_ms", "TTFT", -1),
    ("mean_tpot_ms", "TPOT", -1),
    ("mean_e2el_ms", "latency", -1),
)
"""Key, name and whether more is better (1) or worse (-1) of what decides."""


@dataclass(slots=True, frozen=True)
class Judgement:
    """What a change did, in one of the words above, and the figures that say so."""

    conclusion: str
    threshold: float
    """%: smaller differences count for nothing."""
    better: list[str] = field(default_factory=list)
    worse: list[str] = field(default_factory=list)


def change(base: Result, other: Result, key: str) -> float:
    """Difference of a figure in %, 0 where the baseline has none."""
    before, after = _figure(base, key), _figure(other, key)
    return (after / before - 1) * 100 if before else 0.0


def num_gpus(result: Result) -> int:
    """NPUs of all instances."""
    return sum(log.spec.num_npus for log in result.instances)


def per_gpu(result: Result, key: str = "output_throughput") -> float:
    """A rate of the summary divided by the NPUs."""
    return round(result.figure(key) / max(num_gpus(result), 1), 6)


def worst_error(results: Iterable[Result]) -> StatedError:
    """The greatest stated error of any instance's kernel times."""
    stated = [log.stated_error for result in results for log in result.instances if log.stated_error]
    assumed = StatedError(UNSTATED, "assumed")
    return max(stated, key=lambda each: each.percent, default=assumed)


def ttft_error(results: Iterable[Result]) -> float:
    """The greatest stated error of TTFT in %."""
    stated = [log.stated_error for result in results for log in result.instances if log.stated_error]
    return max((each.ttft_percent for each in stated), default=UNSTATED)


def judge(
    base: Result, other: Result, slo: Slo | None = None, noise: Mapping[str, Spread] | None = None
) -> Judgement:
    """What ``other`` did compared with ``base``.

    Args:
        base: the run that is compared with.
        other: the run in question.
        slo: decides, if given: a set that meets it pays against one that does not; where both meet it,
            throughput decides (per GPU, if their number differs), for a faster answer is worth nothing then.
        noise: spread of the differences over noisy runs, in %: one that may be 0 or less counts for nothing.
    """
    error = worst_error((base, other)).percent
    if other.nothing_ran:
        return Judgement(FAILS, error)
    better, worse = _moved(base, other, error, noise or {})
    if slo is not None:
        return _by_slo(base, other, slo, error, (better, worse))
    conclusion = {(True, False): PAYS, (False, True): COSTS, (True, True): TRADES, (False, False): ALIKE}
    return Judgement(conclusion[bool(better), bool(worse)], error, better, worse)


def _by_slo(
    base: Result, other: Result, slo: Slo, error: float, moved: tuple[list[str], list[str]]
) -> Judgement:
    met = slo.met(base), slo.met(other)
    if met == (False, True):
        return Judgement(PAYS, error, *moved)
    if met == (True, False):
        return Judgement(COSTS, error, *moved)
    if met == (True, True):
        better, worse = ([name for name in names if name.startswith("output")] for names in moved)
        return Judgement(PAYS if better else COSTS if worse else ALIKE, error, better, worse)
    points = (slo.goodput_share(other) - slo.goodput_share(base)) * 100
    conclusion = ALIKE if abs(points) <= error else NEARER if points > 0 else FURTHER
    return Judgement(conclusion, error, *moved)


def _moved(
    base: Result, other: Result, error: float, noise: Mapping[str, Spread]
) -> tuple[list[str], list[str]]:
    """Names of the figures that got better and worse by more than the error and the noise."""
    better: list[str] = []
    worse: list[str] = []
    several = num_gpus(base) != num_gpus(other)
    for key, name, sign in FIGURES:
        if key == "output_throughput" and several:
            key, name = "output_throughput_per_gpu", "output throughput per GPU"
        moved = change(base, other, key) * sign
        threshold = ttft_error((base, other)) if key == "mean_ttft_ms" else error
        if abs(moved) > threshold and survives(noise.get(key)):
            (better if moved > 0 else worse).append(name)
    return better, worse


def survives(spread: Spread | None) -> bool:
    """Whether a difference has the same sign in almost all noisy runs; without any, it is taken as it is."""
    return spread is None or spread.p5 > 0 or spread.p95 < 0


def _figure(result: Result, key: str) -> float:
    if key.endswith("_per_gpu"):
        return per_gpu(result, key.removesuffix("_per_gpu"))
    return result.figure(key)
