"""Do the 80 % bands hold on runs that they were not made from? Fitted without a group, tried on that group.

    python benchmarks/left_out.py            all public rows, and the section of benchmarks/RESULTS.md
    python benchmarks/left_out.py --print    the section on the screen only

A band has one constant here: how far steps with prefill and steps of decodes may be off, in the ratio 3 : 2
that the shipped bands of H100 have. It is fitted so that 80 % of the figures of all other groups are held,
each group counting alike, and then tried on the group left out. ``benchmarks/accuracy.py`` prints the section
too.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from public_rows import FOLDER, Run, every_run
from results_page import command

from servesim.explore.error_band import SHARE
from servesim.results.stated_errors import FRONT_END_KNOWN, Uncertainty

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

PREFILL, DECODE = 0.12, 0.08
"""Half of the interval of steps with prefill and of decodes at scale 1."""
SCALES = (0.25, 0.5, 0.75, 1.0, 1.4, 2.0, 3.0)
FINE = np.geomspace(SCALES[0], SCALES[-1], 120)
GROUPINGS: dict[str, Callable[[Run], str]] = {
    "GPU": lambda run: run.gpu,
    "model": lambda run: run.model.rpartition("/")[2],
    "version": lambda run: run.version,
}


@dataclass(frozen=True)
class Widened:
    """One measured mean with its band at every scale."""

    groups: dict[str, str]
    metric: str
    held: np.ndarray
    """At each of :data:`FINE`."""
    width: np.ndarray
    """% of the simulated mean, likewise."""


def widened(runs: Sequence[Run], front_end_ms: tuple[float, float]) -> list[Widened]:
    """All means of the runs."""
    found = []
    for run in runs:
        groups = {name: of(run) for name, of in GROUPINGS.items()}
        at_scales = [
            run.figures(Uncertainty(PREFILL * scale, DECODE * scale, front_end_ms, "tried"))
            for scale in SCALES
        ]
        for figures in zip(*at_scales, strict=True):
            low, high = (
                np.interp(FINE, SCALES, [getattr(figure, name) for figure in figures])
                for name in ("low_ms", "high_ms")
            )
            one = figures[0]
            held = (low <= one.measured_ms) & (one.measured_ms <= high)
            width = 100 * (high - low) / one.simulated_ms
            found.append(Widened(groups, one.metric, held, width))
    return found


def fitted(means: Sequence[Widened], grouping: str) -> int:
    """The index of the least scale at which the groups' mean share of held figures is 80 %."""
    groups: dict[str, list[np.ndarray]] = defaultdict(list)
    for mean in means:
        groups[mean.groups[grouping]].append(mean.held)
    share = np.mean([np.mean(held, axis=0) for held in groups.values()], axis=0)
    enough = np.flatnonzero(share >= SHARE / 100)
    return int(enough[0]) if len(enough) else len(FINE) - 1


def lines(means: Sequence[Widened], grouping: str) -> tuple[list[str], list[Widened], list[int]]:
    """Rows of the table, and every mean with the scale that was fitted without its group."""
    rows, tried, scales = [], [], []
    for group in sorted({mean.groups[grouping] for mean in means}):
        own = [mean for mean in means if mean.groups[grouping] == group]
        at = fitted([mean for mean in means if mean.groups[grouping] != group], grouping)
        rows.append(f"| {grouping} {group} | {_told(own, [at] * len(own))} |")
        tried += own
        scales += [at] * len(own)
    return rows, tried, scales


def _told(means: Sequence[Widened], scales: Sequence[int]) -> str:
    scale = np.median(FINE[list(scales)])
    cells = [str(len(means)), f"{100 * PREFILL * scale:.0f} / {100 * DECODE * scale:.0f} %"]
    for metrics in (("TTFT",), ("TPOT", "ITL"), ("TTFT", "TPOT", "ITL", "latency")):
        own = [(mean, at) for mean, at in zip(means, scales, strict=True) if mean.metric in metrics]
        held = 100 * np.mean([mean.held[at] for mean, at in own])
        width = np.median([mean.width[at] for mean, at in own])
        cells.append(f"{held:.0f} % / {width:.0f} %")
    return " | ".join(cells)


def section() -> str:
    """The section as Markdown."""
    return table(widened(list(every_run()), FRONT_END_KNOWN))


def table(means: Sequence[Widened]) -> str:
    """The section from all means."""
    text = [
        (__doc__ or "").split("\n\n")[2].replace("\n", " ").split(" ``benchmarks")[0]
        + " The figures themselves are those with the constants of all rows. Cells: share of the measured "
        "means that the band holds / its median width, from end to end, as a share of the figure. Made by "
        "`python benchmarks/left_out.py`.",
        "",
        "| left out | figures | steps with prefill / decodes | TTFT | TPOT and ITL | all |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for grouping in GROUPINGS:
        rows, tried, scales = lines(means, grouping)
        text += [*rows, f"| **every {grouping}** | {_told(tried, scales)} |"]
    return "\n".join(text)


def main() -> int:
    """Print the section, and put it on the page; returns the exit status."""
    lacking = (
        ""
        if (FOLDER / "closed_loop.csv").is_file()
        else f"no closed_loop.csv at {FOLDER}; set SERVESIM_PUBLIC_ROWS to the folder that holds it"
    )
    return command("left-out", (__doc__ or "").splitlines()[0], section, lacking)


if __name__ == "__main__":
    sys.exit(main())
