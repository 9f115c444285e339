"""Whether a simulated run and its recording are alike, and what would have to move where they are not.

Two questions of two samples: do their distributions differ (Kolmogorov and Smirnov), and do their means agree
within a stated margin (two one-sided tests on the differences of single requests). A third of the model: by
how much would one term have to move to make up for a missed mean (:func:`moves`).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from servesim.bench.agreement import METRICS, Agreement
from servesim.slotted import dataclass

if TYPE_CHECKING:
    from numpy.typing import NDArray

_Z_90 = 1.6448536269514722  # 95 % quantile of the normal: two one-sided tests at 5 %
_SHIFT = 0.02
"""Share by which steps are moved to see what that does to a mean."""


def kolmogorov_smirnov(one: NDArray[np.int64], two: NDArray[np.int64]) -> tuple[float, float]:
    """Greatest distance of two empirical distributions, and how likely it is if both are one.

    The probability is the asymptotic one, with Stephens' correction for samples of finite size.
    """
    if not len(one) or not len(two):
        return 0.0, 1.0
    values = np.sort(np.concatenate([one, two]))
    below = [np.searchsorted(np.sort(each), values, side="right") / len(each) for each in (one, two)]
    distance = float(np.abs(below[0] - below[1]).max())
    size = math.sqrt(len(one) * len(two) / (len(one) + len(two)))
    scaled = (size + 0.12 + 0.11 / size) * distance
    if scaled < 0.2:  # the series does not converge there, and the probability is 1
        return distance, 1.0
    terms = (2 * (-1) ** (k - 1) * math.exp(-2 * (k * scaled) ** 2) for k in range(1, 101))
    return distance, min(max(math.fsum(terms), 0.0), 1.0)


@dataclass(slots=True, frozen=True)
class MeanTest:
    """The difference of two means with its 90 % interval, in percent of the recorded mean."""

    difference: float
    low: float
    high: float
    margin: float

    @property
    def equal(self) -> bool:
        """Whether the whole interval lies within the margin: equal, at a level of 5 %."""
        return -self.margin <= self.low and self.high <= self.margin


def compare_means(recorded: NDArray[np.int64], simulated: NDArray[np.int64], margin: float) -> MeanTest:
    """Two one-sided tests on the differences of single requests, which are the same in both runs."""
    mean = float(recorded.mean()) if len(recorded) else 0.0
    if not mean:
        return MeanTest(0.0, 0.0, 0.0, margin)
    differences = (simulated - recorded).astype(np.float64)
    half = _Z_90 * float(differences.std()) / math.sqrt(len(differences))
    middle = float(differences.mean())
    low, centre, high = (100 * value / mean for value in (middle - half, middle, middle + half))
    return MeanTest(centre, low, high, margin)


def fit_tests(agreement: Agreement, margin: float) -> dict[str, dict[str, Any]]:
    """Both tests of every metric, ready for JSON."""
    found = {}
    for name in METRICS:
        recorded, simulated = agreement.recorded.metric(name), agreement.simulated.metric(name)
        distance, probability = kolmogorov_smirnov(recorded, simulated)
        means = compare_means(recorded, simulated, margin)
        found[name] = {
            "ks_statistic": round(distance, 6),
            "ks_p_value": round(probability, 6),
            "mean_difference_percent": round(means.difference, 6),
            "mean_interval_percent": [round(means.low, 6), round(means.high, 6)],
            "margin_percent": margin,
            "means_equal": means.equal,
        }
    return found


def moves(agreement: Agreement) -> dict[str, dict[str, float | None]]:
    """Metric -> term -> by how much it would have to move, alone, to explain the missed mean.

    Steps with a prefill chunk, steps that decode, and all steps, in percent. Each is moved by 2 % once, and
    what that does to a mean is taken as linear. None: the mean hardly depends on it.
    """
    shifts = {"steps with prefill": (1, 0), "decode steps": (0, 1), "all steps": (1, 1)}
    found: dict[str, dict[str, float | None]] = {name: {} for name in METRICS}
    for term, (prefill, decode) in shifts.items():
        moved = _shifted(agreement, 1 + prefill * _SHIFT, 1 + decode * _SHIFT)
        for name in METRICS:
            before, after = (each.distributions[name][1].mean for each in (agreement, moved))
            recorded = agreement.distributions[name][0].mean
            slope = (after - before) / (100 * _SHIFT)
            small = abs(slope) < 1e-4 * max(recorded, 1.0)
            found[name][term] = None if small else round((recorded - before) / slope, 3)
    return found


def _shifted(agreement: Agreement, prefill: float, decode: float) -> Agreement:
    from servesim.engine.build import build_simulation
    from servesim.engine.noise import StepShift
    from servesim.explore.ensemble import silence
    from servesim.results.result import Result

    result = agreement.result
    assert result.cluster is not None
    assert result.options is not None
    with silence():  # the run itself has said what there is to say
        simulation = build_simulation(
            result.cluster, result.workload, result.options, noise=lambda _: StepShift(prefill, decode)
        )
    moved = Result(simulation.run(), result.workload, result.options, result.cluster)
    return Agreement(agreement.recording, moved, agreement.anchor)


def fit_text(tests: dict[str, dict[str, Any]], moved: dict[str, dict[str, float | None]]) -> str:
    """Both as lines: a metric each, then what would explain its miss."""
    lines = []
    for name, found in tests.items():
        low, high = found["mean_interval_percent"]
        verdict = "equal" if found["means_equal"] else "not shown to be equal"
        lines.append(
            f"{name}: means {verdict} within {found['margin_percent']:g} % (90 % interval of the difference "
            f"{low:+.2f} to {high:+.2f} %), distributions differ by at most {found['ks_statistic']:.3f} "
            f"(Kolmogorov-Smirnov, p = {found['ks_p_value']:.2g})"
        )
        terms = [f"{term} {value:+.1f} %" for term, value in moved[name].items() if value is not None]
        if terms:
            lines.append(
                f"  its missed mean of {found['mean_difference_percent']:+.2f} % would go with one of: "
                f"{', '.join(terms)}"
            )
    return "\n".join(lines)
