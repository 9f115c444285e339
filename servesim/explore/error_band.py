"""80 % intervals of a run's figures: the run again with all kernel times too short, and too long.

Errors of kernel times are shared by all steps of a kind, so a few runs at the ends of their interval say more
than many with noise that averages out: :func:`error_bands` makes two, with steps that prefill and steps that
decode moved together, and takes the least and the greatest of three values of every figure. Queueing, batches
and preemptions are those of each run, so a figure near saturation gets the wide band that it should have.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from servesim.explore.ensemble import figures_of, silence
from servesim.explore.slo import FIGURES, num_gpus
from servesim.results.table import Table
from servesim.results.units import digits
from servesim.slotted import dataclass
from servesim.terminal import screen_width, wrapped

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from servesim.engine.build import Kept
    from servesim.engine.noise import StepShift
    from servesim.results.result import Result
    from servesim.results.stated_errors import Uncertainty

SHARE = 80
"""% of measured figures that such intervals are made to hold."""
_FRACTION_BEYOND = 0.05
"""From this share of the requests on, contexts beyond the measured range widen the band."""
_NEARLY_EQUAL = 0.03
"""Relative deviation of the lengths below which a closed loop marches in lock step."""
_LOCK_STEP = 0.25
"""Share of TTFT that 30 measured closed loops of equal lengths are off by beyond their band."""
_WITH_FRONT_END = ("ttft", "e2el")


@dataclass(slots=True, frozen=True)
class ErrorBands:
    """A run, and its figures with kernel times at both ends of their interval."""

    nominal: dict[str, float]
    fast: dict[str, float]
    """Figures with all steps shorter; keys of the summary."""
    slow: dict[str, float]
    front_end_ms: tuple[float, float]
    """What TTFT and latency may hold less and more of."""
    lock_step: float
    """Share by which TTFT may be less or more since requests go in lock step."""
    reasons: tuple[str, ...]
    """What the interval of the kernel times goes by, each once."""
    tables: tuple[str, ...]
    """Where the kernel times are from: runs with the same ones err together."""

    def of(self, key: str) -> tuple[float, float]:
        """(low, high) of a figure, in the summary's unit."""
        values = (self.nominal[key], self.fast[key], self.slow[key])
        low, high = min(values), max(values)
        statistic, _, rest = key.partition("_")
        if any(rest == f"{name}_ms" for name in _WITH_FRONT_END) and statistic != "std":
            less, more = self.front_end_ms
            low, high = max(low - less, 0.0), high + more
        if rest == "ttft_ms":
            low, high = low * (1 - self.lock_step), high * (1 + self.lock_step)
        return low, high

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "share_percent": SHARE,
            "reasons": list(self.reasons),
            "figures": {key: [round(end, 6) for end in self.of(key)] for key in self.nominal},
        }


def error_bands(
    result: Result, kept: Kept | None = None, stated: Uncertainty | None = None
) -> ErrorBands | None:
    """The 80 % intervals of all figures of a run; None where nothing ran, or nothing is known of its errors.

    Args:
        result: the run.
        kept: what the run left, so that tables are not read again.
        stated: what the step times of every instance may be off by, where that is better known than by kind
            of table, GPU and version; the interval is then of the share that it is of.
    """
    found = error_runs(result, kept, stated)
    return None if found is None else found.bands


class ErrorRuns(NamedTuple):
    """The bands of a run, and the runs that they are made from."""

    bands: ErrorBands
    runs: tuple[Result, Result]
    """With shorter and with longer kernel times."""


def error_runs(
    result: Result, kept: Kept | None = None, stated: Uncertainty | None = None
) -> ErrorRuns | None:
    """:func:`error_bands` with its runs."""
    known = uncertainties(result, stated)
    if known is None or result.cluster is None:
        return None
    runs = (_shifted(result, known, -1, kept), _shifted(result, known, 1, kept))
    ends = [each.front_end_ms for each in known]
    bands = ErrorBands(
        nominal=figures_of(result),
        fast=figures_of(runs[0]),
        slow=figures_of(runs[1]),
        front_end_ms=(max(less for less, _ in ends), max(more for _, more in ends)),
        lock_step=_LOCK_STEP if _marches(result) else 0.0,
        reasons=tuple(dict.fromkeys(each.reason for each in known)),
        tables=tuple(sorted({log.bundle_source for log in result.instances})),
    )
    return ErrorRuns(bands, runs)


def _marches(result: Result) -> bool:
    """Whether a closed loop of nearly equal lengths keeps requests together, which nobody measured well."""
    if result.options is None or result.options.max_concurrency < 2 or len(result.table) < 2:
        return False
    return all(
        float(result.table[name].std()) < _NEARLY_EQUAL * float(result.table[name].mean())
        for name in ("input", "output")
    )


def uncertainties(result: Result, stated: Uncertainty | None = None) -> list[Uncertainty] | None:
    """What the step times of every instance may be off by; None where nothing ran, or nothing is known.

    ``stated``: in place of what is known by kind of table, GPU and version.
    """
    found = [_uncertainty(result, index, stated) for index in range(len(result.instances))]
    known = [each for each in found if each is not None]
    return None if result.nothing_ran or len(known) < len(found) else known


def shifted(known: Sequence[Uncertainty], sign: int) -> Callable[[int], StepShift]:
    """Of every instance, by its position, its steps at one end of their interval: -1 shorter, 1 longer."""
    from servesim.engine.noise import StepShift

    def shift(index: int) -> StepShift:
        return StepShift(1 + sign * known[index].prefill, 1 + sign * known[index].decode)

    return shift


def _uncertainty(result: Result, index: int, stated: Uncertainty | None) -> Uncertainty | None:
    log, rows = result.instances[index], result.table
    found = stated or log.uncertainty
    reach = log.reach.context_tokens if log.reach is not None else None
    if found is None or not reach or not len(rows):
        return found
    beyond = float((rows["input"] + rows["output"] > reach).mean())
    return found.beyond_range() if beyond >= _FRACTION_BEYOND else found


def _shifted(result: Result, known: Sequence[Uncertainty], sign: int, kept: Kept | None) -> Result:
    """The run with the step times of every instance at one end of their interval."""
    from servesim.api import single
    from servesim.engine.build import build_simulation
    from servesim.results.result import Result

    assert result.cluster is not None
    assert result.options is not None
    shift = shifted(known, sign)
    with silence():  # the run itself has said what there is to say
        simulation = build_simulation(result.cluster, result.workload, single(result.options), kept, shift)
    return Result(simulation.run(), result.workload, result.options, result.cluster)


def changes(base: ErrorBands, other: ErrorBands, key: str, gpus: tuple[int, int] = (1, 1)) -> list[float]:
    """Differences of a figure in %, with the errors that both may have.

    Runs with the same tables err together; others each on their own.
    """
    shares = gpus[0] / gpus[1] if key == "output_throughput" else 1.0
    befores = (base.nominal, base.fast, base.slow)
    afters = (other.nominal, other.fast, other.slow)
    together = base.tables == other.tables
    pairs = zip(befores, afters, strict=True) if together else ((b, a) for b in befores for a in afters)
    return [(after[key] * shares / before[key] - 1) * 100 for before, after in pairs if before[key]]


def survival(base: ErrorBands, other: ErrorBands, gpus: tuple[int, int]) -> str:
    """What of the differences holds inside the band, as a sentence."""
    parts = []
    for key, name, _ in FIGURES:
        found = changes(base, other, key, gpus)
        if not found:
            continue
        low, high = min(found), max(found)
        if low == high == 0.0:
            continue
        sure = "" if low > 0 or high < 0 else " (may be none)"
        parts.append(f"{name} {low:+.1f} to {high:+.1f} %{sure}")
    together = "shared by both" if base.tables == other.tables else "each on their own"
    return f"Inside the {SHARE} % band of the kernel times ({together}): {', '.join(parts)}." if parts else ""


def survivals(names: Sequence[str], results: Sequence[Result], bands: Mapping[str, ErrorBands]) -> list[str]:
    """:func:`survival` of every set but the first against it; empty where a band is missing."""
    first = bands.get(names[0])
    found = []
    for name, result in zip(names[1:], results[1:], strict=True):
        other = bands.get(name)
        gpus = num_gpus(results[0]), num_gpus(result)
        found.append(survival(first, other, gpus) if first is not None and other is not None else "")
    return found


def bands_text(names: Sequence[str], bands: Mapping[str, ErrorBands]) -> str:
    """A line on what the bands are made of, and the figures that decide."""
    reasons = dict.fromkeys(reason for each in bands.values() for reason in each.reasons)
    line = f"{SHARE} % bands of the figures by errors of kernel times ({'; '.join(reasons)})"
    table = Table(["", *names])
    for key, name, _ in FIGURES:
        cells = []
        for label in names:
            low, high = bands[label].of(key) if label in bands else (0.0, 0.0)
            cells.append(f"{digits(low)}–{digits(high)}" if label in bands else "")
        table.rows.append([name, *cells])
    return f"{wrapped(line)}\n\n{table.plain(width=screen_width())}"
