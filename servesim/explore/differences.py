"""How far the differences between option sets spread when every run is noisy, and how far to trust them."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from servesim.explore.capacity_band import band, capacity_matters
from servesim.explore.ensemble import figures_of, noisy_figures, spread_of
from servesim.explore.slo import FIGURES, num_gpus, survives
from servesim.results.stated_errors import RESULTS
from servesim.results.table import Table
from servesim.slotted import dataclass
from servesim.terminal import screen_width, wrapped

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from servesim.explore.ensemble import Spread
    from servesim.results.result import Result
    from servesim.specs.options import RuntimeOptions


@dataclass(slots=True, frozen=True)
class Differences:
    """Spread of every difference to the first set, in %, over the same noisy runs of both."""

    options: RuntimeOptions
    """Number of runs, size of the noise and seed."""
    sets: dict[str, dict[str, Spread]]
    """Label of a set -> key of a figure -> spread."""

    def to_dict(self) -> dict[str, Any]:
        """The ``ensemble`` entry of a comparison, ready for JSON."""
        return {
            "runs": self.options.ensemble,
            "seed": self.options.seed,
            "step_noise": self.options.step_noise,
            "run_noise": self.options.run_noise,
            "arrival_jitter_s": self.options.arrival_jitter,
            "change_percent": {
                name: {
                    key: {
                        **{part: round(value, 6) for part, value in asdict(spread).items()},
                        "survives": survives(spread),
                    }
                    for key, spread in spreads.items()
                }
                for name, spreads in self.sets.items()
            },
        }

    def text(self) -> str:
        """A line on the noise, and a table of the differences that decide."""
        noise = self.options
        jitter = f", arrivals ±{noise.arrival_jitter:g} s" if noise.arrival_jitter else ""
        line = (
            f"differences in % over {noise.ensemble} noisy runs of each set, P5 to P95 (each step "
            f"±{noise.step_noise * 100:.3g} %, all steps of a run ±{noise.run_noise * 100:.3g} %{jitter}); "
            "? = lost in the noise"
        )
        table = Table(["", *self.sets])
        shown = [(key, name) for key, name, _ in FIGURES]
        for key, name in [*shown, ("output_throughput_per_gpu", "output per GPU")]:
            cells = [_band(spreads.get(key)) for spreads in self.sets.values()]
            if any(cells) and [["output throughput", *cells]] != table.rows[:1]:  # per GPU says the same
                table.rows.append([name, *cells])
        return f"{wrapped(line)}\n\n{table.plain(width=screen_width())}"


def differences(
    names: Sequence[str],
    results: Sequence[Result],
    options: Sequence[RuntimeOptions],
    before_run: Callable[[str], None] | None = None,
) -> Differences:
    """Repeat every run ``ensemble`` times with noise and compare run k of each set with run k of the first.

    Sets that read the same kernel times get the same noise, as they have the same errors; kernel times from
    other tables err on their own.

    Args:
        names: labels of the sets.
        results: their runs without noise.
        options: of every set, with ``ensemble`` and the noise.
        before_run: called with a label before its noisy runs.
    """
    tables = [tuple(sorted({log.bundle_source for log in result.instances})) for result in results]
    streams = {source: number for number, source in enumerate(dict.fromkeys(tables))}
    figures = []
    for name, result, chosen, source in zip(names, results, options, tables, strict=True):
        if before_run is not None:
            before_run(name)
        runs = noisy_figures(result, chosen, stream=streams[source])
        figures.append([_with_per_gpu(each, num_gpus(result)) for each in runs])
    plain = [_with_per_gpu(figures_of(result), num_gpus(result)) for result in results]
    sets = {}
    for name, nominal, runs in zip(names[1:], plain[1:], figures[1:], strict=True):
        sets[name] = {
            key: spread_of(_percent(plain[0][key], nominal[key]), changes)
            for key in nominal
            if all(run[key] for run in figures[0])
            and (changes := [_percent(one[key], two[key]) for one, two in zip(figures[0], runs, strict=True)])
        }
    return Differences(options[0], sets)


def _with_per_gpu(figures: dict[str, float], gpus: int) -> dict[str, float]:
    return {**figures, "output_throughput_per_gpu": figures["output_throughput"] / max(gpus, 1)}


def _percent(before: float, after: float) -> float:
    return (after / before - 1) * 100 if before else 0.0


def _band(spread: Spread | None) -> str:
    if spread is None:
        return ""
    return f"{spread.p5:+.1f} to {spread.p95:+.1f}" + ("" if survives(spread) else "?")


def trust_lines(names: Sequence[str], results: Sequence[Result]) -> list[str]:
    """Two to four lines: error of the kernel times, extrapolation, what is left out, capacity."""
    lines = [_errors(results), _extrapolated(names, results), _left_out(results)]
    return [line for line in (*lines, _capacity(names, results)) if line]


def _errors(results: Sequence[Result]) -> str:
    by_reason: dict[str, dict[str, None]] = {}
    for result in results:
        for log in result.instances:
            error = log.stated_error
            if error is not None:
                told = f"{log.spec.hardware} {log.options.variant} ±{error.percent:g} %"
                if error.ttft_percent > error.percent:
                    told += f" (TTFT ±{error.ttft_percent:g} %, by public serving runs)"
                by_reason.setdefault(error.reason, {})[told] = None
    parts = [f"{', '.join(told)} ({reason})" for reason, told in by_reason.items()]
    return f"kernel times: {'; '.join(parts)}; see {RESULTS}" if parts else ""


def _extrapolated(names: Sequence[str], results: Sequence[Result]) -> str:
    """What of these runs lies beyond the measurements; empty where nothing does."""
    parts: dict[str, list[str]] = {}
    for name, result in zip(names, results, strict=True):
        for words in _beyond(result):
            parts.setdefault(words, []).append(name)
    if not parts:
        return ""
    told = "; ".join(
        words + ("" if len(sets) == len(names) else f" ({', '.join(sets)})") for words, sets in parts.items()
    )
    return f"extrapolated, with an error that nobody measured: {told}"


def _beyond(result: Result) -> list[str]:
    rows = result.requests
    reaches = [log.reach for log in result.instances if log.reach is not None]
    prompt = min((each.prompt_tokens for each in reaches if each.prompt_tokens), default=None)
    context = min((each.context_tokens for each in reaches if each.context_tokens), default=None)
    sequences = min((each.sequences for each in reaches if each.sequences), default=None)
    found = []
    if prompt and (longer := int((rows["input"] > prompt).sum())):
        found.append(f"prompts over {prompt:,} tokens, {longer / len(rows) * 100:.0f} % of the requests")
    if context and (longer := int((rows["input"] + rows["output"] > context).sum())):
        found.append(f"contexts over {context:,} tokens, {longer / len(rows) * 100:.0f} % of the requests")
    if sequences and result.summary["peak_batch"] > sequences:
        found.append(f"steps of more than {sequences:,} sequences (up to {result.summary['peak_batch']:,})")
    return found


def _left_out(results: Sequence[Result]) -> str:
    by_words: dict[str, dict[str, None]] = {}
    for result in results:
        for log in result.instances:
            by_words.setdefault(log.host, {})[log.spec.hardware] = None
    hosts = [f"{', '.join(hardware)}: {words}" for words, hardware in by_words.items()]
    logs = [log for result in results for log in result.instances]
    front_ends = [log.front_end_us[0] > 0 for log in logs]
    left_out = (
        "not in the figures: client and API server (6 to 12 ms of TTFT between public vLLM results and "
        "kernel times). "
    )
    return f"{'' if all(front_ends) else left_out}Host of {'; '.join(hosts)}"


def _capacity(names: Sequence[str], results: Sequence[Result]) -> str:
    parts = []
    for name, result in zip(names, results, strict=True):
        bands = band(result)
        if bands is None:
            continue
        blocks = result.summary["kv_cache"]["blocks"]
        low, high = (sum(ends) / blocks * 100 - 100 for ends in zip(*bands, strict=True))
        parts.append((f"{low:+.1f} to {high:+.1f} %", name, capacity_matters(result)))
    if not parts:
        return ""
    widths = dict.fromkeys(width for width, _, _ in parts)
    limited = [name for _, name, matters in parts if matters]
    meaning = f"it has a part in {', '.join(limited)}" if limited else "no set comes near it"
    return f"KV capacity: estimated, {' or '.join(widths)}; {meaning}"
