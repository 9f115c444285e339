"""Whether a change pays: which figures moved by more than the error of what they were computed from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from servesim.results.stated_errors import UNSTATED, StatedError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from servesim.explore.ensemble import Spread
    from servesim.explore.slo import Slo
    from servesim.results.result import Result

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
