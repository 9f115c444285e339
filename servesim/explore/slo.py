"""A service level: upper bounds of latencies, and which share of a run's requests stays within them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from servesim.errors import InputError
from servesim.results.units import MS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

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
