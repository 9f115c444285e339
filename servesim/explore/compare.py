"""The same workload on the same cluster under several option sets, side by side."""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from servesim.api import (
    NOISE,
    check_used,
    loading_key,
    read_cluster,
    read_workload,
    simulate_loaded,
    single,
    with_flags,
)
from servesim.engine.build import Kept
from servesim.errors import InputError, MissingFileError
from servesim.explore.capacity_band import band_runs, capacity_matters
from servesim.explore.differences import differences, trust_lines
from servesim.explore.error_band import error_bands, survivals
from servesim.explore.rows import figures
from servesim.explore.slo import judge, parse_slo
from servesim.explore.verdict import verdict
from servesim.results.atomic import atomic_write
from servesim.workload.request import Workload

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from os import PathLike

    import pandas as pd

    from servesim.explore.capacity_band import BandRuns
    from servesim.explore.differences import Differences
    from servesim.explore.error_band import ErrorBands
    from servesim.explore.rows import Row
    from servesim.explore.slo import Slo
    from servesim.results.result import Result
    from servesim.specs.cluster import ClusterSpec
    from servesim.specs.options import RuntimeOptions

KV_BOUND_WORKLOAD = "workloads/long_context.jsonl"
"""Shipped workload that one accelerator cannot hold in 16-bit KV."""
DEFAULT_SETS: dict[str, dict[str, Any]] = {
    "kv auto": {"kv_cache_dtype": "auto"},
    "kv fp8": {"kv_cache_dtype": "fp8"},
}


@dataclass(repr=False)
class Comparison:
    """Results of several option sets, the first being what the others are compared with."""

    names: list[str]
    results: list[Result]
    slo: Slo | None = None
    """What decides whether a change pays."""
    differences: Differences | None = None
    """How the differences spread under noise, where that was asked for."""
    bands: list[BandRuns | None] = field(default_factory=list)
    """Every set at both ends of its capacity band, where the capacity has a part in the results."""
    error_bands: dict[str, ErrorBands] = field(default_factory=dict)
    """Label -> 80 % intervals of its figures by the errors of kernel times, where they were asked for."""

    @cached_property
    def rows(self) -> list[Row]:
        """All figures, in the order they are shown in."""
        return figures(self.results, self.slo)

    @cached_property
    def verdict(self) -> str:
        """What each change did and why, in a few sentences derived from the results."""
        bands = self.bands or [None] * len(self.names)
        noise = self.differences.sets if self.differences else {}
        surviving = survivals(self.names, self.results, self.error_bands)
        told = [
            verdict(
                self.names[0],
                self.results[0],
                name,
                result,
                slo=self.slo,
                noise=noise.get(name),
                bands=(bands[0], band),
            )
            for name, result, band in zip(self.names[1:], self.results[1:], bands[1:], strict=True)
        ]
        return "\n".join(" ".join(filter(None, both)) for both in zip(told, surviving, strict=True))

    @cached_property
    def trust(self) -> list[str]:
        """How far the figures may be trusted, and what is in none of them; two to four lines."""
        return trust_lines(self.names, self.results)

    def __repr__(self) -> str:
        sets = ", ".join(f"{name}: {result!r}" for name, result in zip(self.names, self.results, strict=True))
        return f"<Comparison of {sets}>"

    def to_pandas(self) -> pd.DataFrame:
        """One row a figure: its title and unit, the value of every set, the differences to the first in %.

        Raises:
            ImportError: pandas is not installed.
        """
        import pandas

        columns = ["title", "unit", *self.names, *(f"{name} change %" for name in self.names[1:])]
        rows = [[row.title, row.unit, *row.values, *row.changes()[1:]] for row in self.rows]
        index = pandas.Index([row.key for row in self.rows], name="figure")
        return pandas.DataFrame(rows, index=index, columns=pandas.Index(columns))

    @property
    def failures(self) -> dict[str, str]:
        """Sets whose every request was rejected, and why the first one was."""
        return {
            name: result.rejected[0].reason
            for name, result in zip(self.names, self.results, strict=True)
            if result.nothing_ran
        }

    def to_dict(self) -> dict[str, Any]:
        """Figures, differences and verdict, ready for JSON."""
        rows = {
            row.key: {
                "title": row.title,
                "unit": row.unit,
                "values": dict(zip(self.names, row.values, strict=True)),
                "change_percent": dict(zip(self.names[1:], map(_rounded, row.changes()[1:]), strict=True)),
            }
            for row in self.rows
        }
        summaries = dict(zip(self.names, (result.summary for result in self.results), strict=True))
        return {
            "baseline": self.names[0],
            "sets": self.names,
            "rows": rows,
            **({"slo": [asdict(bound) for bound in self.slo.bounds]} if self.slo else {}),
            **({"ensemble": self.differences.to_dict()} if self.differences else {}),
            "error_bands": {name: bands.to_dict() for name, bands in self.error_bands.items()},
            "conclusions": self.conclusions,
            "verdict": self.verdict,
            "trust": self.trust,
            "summaries": summaries,
        }

    @property
    def conclusions(self) -> dict[str, str]:
        """Label of every set but the first -> the verdict in a few words: ``pays``, ``is a trade-off``…"""
        noise = self.differences.sets if self.differences else {}
        others = zip(self.names[1:], self.results[1:], strict=True)
        return {
            name: judge(self.results[0], result, self.slo, noise.get(name)).conclusion
            for name, result in others
        }

    def save_json(self, path: str | PathLike[str]) -> None:
        """Write :meth:`to_dict` as JSON."""
        with atomic_write(str(path), "w") as handle:
            handle.write(self.json_text())

    def json_text(self) -> str:
        """:meth:`to_dict` as indented JSON."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    def save_csv(self, path: str | PathLike[str]) -> None:
        """Write one line per figure: its name, unit, the value of every set and the differences in %."""
        with atomic_write(str(path), "w") as handle:
            handle.write(self.csv_text())

    def csv_text(self) -> str:
        """The text of :meth:`save_csv`."""
        import csv
        import io

        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["figure", "unit", *self.names, *(f"{name} change %" for name in self.names[1:])])
        for row in self.rows:
            changes = ["" if change is None else _rounded(change) for change in row.changes()[1:]]
            writer.writerow([row.key, row.unit, *row.values, *changes])
        return text.getvalue()


def compare(
    cluster: ClusterSpec | str | PathLike[str] | dict[str, Any] | None = None,
    workload: Workload | str | PathLike[str] | None = None,
    sets: Mapping[str, Mapping[str, Any]] | None = None,
    options: RuntimeOptions | None = None,
    *,
    slo: str | Sequence[str] | Mapping[str, float] | None = None,
    capacity_band: bool = True,
    error_band: bool = True,
    before_run: Callable[[str], None] | None = None,
    **flags: Any,
) -> Comparison:
    """Run every option set and put the results side by side.

    Args:
        cluster: as for :func:`servesim.simulate`.
        workload: as for :func:`servesim.simulate`; None: a shipped workload that the KV cache limits, unless
            ``options`` name a dataset.
        sets: label -> options by name, the first being the baseline; None: KV cache dtype auto against fp8.
        options: what holds for every set unless the set says otherwise. With ``ensemble``, every set is
            repeated so many times with noise, and the verdict counts differences that survive it.
        slo: upper bounds of latencies that decide whether a change pays, such as ``"ttft:1000 tpot:50"``
            (milliseconds, P99 unless said: ``ttft:p95:1000``).
        capacity_band: False: do not run again at both ends of the KV capacity's band, which is done where
            requests waited for KV blocks.
        error_band: False: do not run again at both ends of the kernel times' 80 % interval.
        before_run: called with the label of each set before it runs.
        **flags: single options for every set.

    Raises:
        InputError: fewer than two sets, or something given is wrong.
    """
    chosen = DEFAULT_SETS if sets is None else sets
    if len(chosen) < 2:
        raise InputError("a comparison needs at least two option sets")
    level = None if slo is None else parse_slo(slo)
    common = with_flags(options, flags)
    check_used(common, "compare", workload, cluster)
    if workload is None and "dataset" not in common.model_fields_set:
        common = common.replace(dataset=KV_BOUND_WORKLOAD)
    own = {name: _changed(common, name, changes) for name, changes in chosen.items()}
    for name, each in own.items():  # all checked first
        with _told_with_set(name):
            check_used(each, "compare", workload, cluster)
    results = []
    found: dict[str, ErrorBands] = {}
    loaded: dict[tuple[object, ...], Workload] = {}
    kept: dict[tuple[object, ...], Kept] = {}
    for name, each in own.items():
        with _told_with_set(name):
            spec = read_cluster(each, cluster)
        key = loading_key(each)
        if not isinstance(workload, Workload) and key not in loaded:
            loaded[key] = read_workload(each, workload)
        if before_run is not None:
            before_run(name)
        requests = workload if isinstance(workload, Workload) else loaded[key]
        with _told_with_set(name):
            own_kept = kept.setdefault(key, Kept())
            result = simulate_loaded(spec, requests, single(each), kept=own_kept)
            results.append(result)
            if error_band and (bands := error_bands(result, own_kept)) is not None:
                found[name] = bands
    comparison = Comparison(list(own), results, level, error_bands=found)
    if comparison.failures:
        return comparison
    if common.ensemble:
        comparison.differences = differences(list(own), results, list(own.values()), before_run)
    if capacity_band and any(map(capacity_matters, results)):
        comparison.bands = [band_runs(result) for result in results]
    return comparison


def _changed(common: RuntimeOptions, name: str, changes: Mapping[str, Any]) -> RuntimeOptions:
    for noise in NOISE:
        if noise in changes:
            raise InputError(f"option set {name!r}: {noise}: holds for all sets; give it beside them")
    with _told_with_set(name):
        return common.replace(**changes)


@contextmanager
def _told_with_set(name: str) -> Iterator[None]:
    """Errors inside the block name the option set they are about."""
    try:
        yield
    except InputError as error:
        if isinstance(error, MissingFileError):
            raise
        raise InputError(f"option set {name!r}: {error}") from None


def _rounded(change: float | None) -> float | None:
    return None if change is None else round(change, 4)
