"""PNG plots of a comparison with a recording; needs matplotlib (extra ``report``)."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from serving.bench.agreement import METRICS
from serving.errors import InputError
from serving.results.atomic import atomic_write
from serving.results.units import MS, SECOND

if TYPE_CHECKING:
    from serving.bench.agreement import Agreement

_RECORDED = {"color": "black", "label": "recorded"}
_SIMULATED = {"color": "tab:orange", "label": "simulated", "linestyle": "--"}
_GENERATED = "generated tokens/s"


def require_matplotlib() -> None:
    """Say before the run that plots cannot be drawn.

    Raises:
        InputError: matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        raise InputError("--plots: needs matplotlib; install it with  pip install 'servesim[report]'")


def save_plots(agreement: Agreement, folder: str | Path) -> list[Path]:
    """Draw what the recording allows into ``folder``; returns the files written."""
    require_matplotlib()
    place = Path(folder)
    figures = {"cdf.png": _distributions(agreement)}
    if "running" in agreement.curves:
        figures["load.png"] = _load(agreement)
    if _GENERATED in agreement.curves:
        figures["throughput.png"] = _throughput(agreement)
    paths = []
    for name, figure in figures.items():
        with atomic_write(place / name) as handle:
            figure.savefig(handle, format="png", dpi=120, metadata={"Software": None})
        paths.append(place / name)
    return paths


def _figure(width: float, height: float) -> Any:
    """A figure on the Agg canvas: no display is asked for, and no global state is touched."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _distributions(agreement: Agreement) -> Any:
    figure = _figure(12, 4)
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
    figure = _figure(10, 3 * len(names))
    for axes, name in zip(figure.subplots(len(names), 1, squeeze=False)[:, 0], names, strict=True):
        _over_time(axes, agreement, name)
        axes.set_ylabel(f"{name} requests")
    return figure


def _throughput(agreement: Agreement) -> Any:
    figure = _figure(10, 3)
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
