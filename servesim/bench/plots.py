"""PNG plots of a comparison with a recording; needs matplotlib (extra ``report``)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from servesim.bench.agreement import METRICS
from servesim.results.figures import new_figure, require_matplotlib, save_figures
from servesim.results.units import MS, SECOND

if TYPE_CHECKING:
    from pathlib import Path

    from servesim.bench.agreement import Agreement

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
