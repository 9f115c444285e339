"""From a job to a bundle: a hidden folder where a sweep can be left and resumed, then the bundle at once."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import asdict, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from servesim._version import __version__
from servesim.errors import RunError
from servesim.profiler.bundle_writer import BundleContent, write_bundle
from servesim.profiler.measure.budget import grid_within
from servesim.profiler.measure.grid import SweepGrid
from servesim.profiler.measure.skew_fit import BUCKET_AXES, fit_skew, sample_of
from servesim.profiler.measure.table_file import TableFile
from servesim.profiler.measure.work_folder import (
    CONDITIONS,
    MeasureOptions,
    degrees,
    prepare,
    same_grid,
    take_over,
    write_yaml,
)
from servesim.profiler.provenance import described, measured_reach, profiled
from servesim.profiler.shots import CATEGORIES, TABLE_HEADERS, VALUES
from servesim.profiler.sweep import SweepReport, sweep, wanted
from servesim.specs.reading import read_yaml_object

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path
    from typing import TextIO

    from servesim.profiler.job import ProfileJob
    from servesim.profiler.meter import Meter


def measure_bundle(
    job: ProfileJob, grid: SweepGrid, meter: Meter, folder: Path, options: MeasureOptions, stream: TextIO
) -> SweepReport:
    """Make, complete or renew the bundle at ``folder``.

    Rows of the finished bundle and of a sweep that was stopped are kept, unless ``options.force``; the bundle
    at ``folder`` changes only once everything is measured.

    Raises:
        InputError: what is there was measured under other conditions, or is damaged.
        RunError: something cannot be measured or written.
    """
    work = folder.with_name(f".{folder.name}.measuring")
    conditions = _conditions(job, meter)
    begun = prepare(work, folder, conditions, job, options)
    taken = dict(begun.get("taken_from", {}))
    if not options.force:
        taken |= take_over(work, folder, conditions, job, options.only)
    only = tuple(name for name in options.only if name not in taken)
    if "grid" in begun:
        grid = same_grid(work / CONDITIONS, begun["grid"], grid, options)
    elif options.budget_s is not None:
        grid = grid_within(options.budget_s, job, grid, meter, only, stream)
    write_yaml(work / CONDITIONS, {**conditions, "grid": asdict(grid), "taken_from": taken})
    started = datetime.now(UTC)
    try:
        report = sweep(job, grid, meter, work, stream, only)
    except BaseException:
        again = "the same command without --force" if options.force else "the same command"
        print(f"stopped; what was measured is kept in {work}, {again} goes on from there", file=stream)
        raise
    if not report.measured and not taken and (folder / "meta.yaml").is_file():  # nothing new to say
        shutil.rmtree(work, ignore_errors=True)
        return report
    absent = _absent(work, job)
    if absent:
        raise RunError(
            f"{work}: measured {', '.join(options.only)}; the bundle still lacks {', '.join(absent)}. "
            "Run again without --only to complete it"
        )
    if (folder / "meta.yaml").is_file():
        before = read_yaml_object(folder / "meta.yaml").get("taken_from", {})
        stale = only if options.force else ()
        taken = {name: variant for name, variant in before.items() if name not in stale} | taken
    content = BundleContent(meta={})
    skew_fit = _collect(work, content)
    own = meter.provenance(content)
    when = {"profiler_version": __version__, "profiled_at": started.isoformat(timespec="seconds")}
    about = _conditions_met(work, folder, conditions)
    claims = {**about, **own.claims, **_claims(job, folder, grid, report, taken)}
    provenance = replace(own, origin={**own.origin, **when}, claims=claims)
    content.meta = {**described(job, provenance), "skew_fit": skew_fit, **measured_reach(content)}
    write_bundle(folder, content)
    shutil.rmtree(work, ignore_errors=True)
    return report


def _conditions(job: ProfileJob, meter: Meter) -> dict[str, Any]:
    """What all rows of one bundle have in common."""
    shape = job.model.model_dump_json(exclude={"name"})
    about = profiled(job)
    return {
        **meter.conditions,
        "architecture": about["architecture"],
        # of what the file says, not of its text: a comment does not make rows another measurement's
        "architecture_sha256": _sha256(job.architecture.model_dump_json(by_alias=True)),
        "model_sha256": _sha256(shape),
        "variant": about["variant"],
        "engine_effective": {**about["engine_effective"], "block_size": 16},
    }


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _absent(work: Path, job: ProfileJob) -> list[str]:
    """Tables without rows that a loadable bundle must have."""
    return [
        f"tp{tp}/{category}.csv"
        for tp in job.tp_degrees
        for category in wanted(job, CATEGORIES[:4])
        if not (path := work / f"tp{tp}" / f"{category}.csv").is_file() or path.read_bytes().count(b"\n") < 2
    ]


def _collect(work: Path, content: BundleContent) -> dict[str, Any]:
    """All tables of all degrees, sorted; ``skew_fit`` of meta.yaml, from those that have a skew sweep."""
    fits: dict[int, dict[str, Any]] = {}
    for tp in degrees(work):
        for category in CATEGORIES:
            path = work / f"tp{tp}" / f"{category}.csv"
            if not path.is_file():
                continue
            table = TableFile(path, TABLE_HEADERS[category], VALUES.get(category, 1))
            table.close()
            if category == "skew" and not table.rows:
                continue
            content.tables[tp, f"{category}.csv"] = sorted(table.rows.values(), key=_in_order)
            if category == "skew" and (fit := fit_skew(sample_of(row) for row in table.rows.values())):
                content.tables[tp, "skew_fit.csv"] = list(fit.rows)
                fits[tp] = {**fit.summary, "bucket_table": f"tp{tp}/skew_fit.csv"}
    return {"enabled": True, "bucket_axes": BUCKET_AXES, "per_tp": fits} if fits else {"enabled": False}


def _in_order(row: Sequence[str]) -> list[tuple[int, float, str]]:
    """Numbers by size, names by letter."""
    return [
        (0, float(cell), "") if cell.replace(".", "", 1).isdigit() else (1, 0.0, cell) for cell in row[:10]
    ]


def _conditions_met(work: Path, folder: Path, conditions: dict[str, Any]) -> dict[str, Any]:
    """Of all rows that the bundle will have: those of the sweep before reach as far as they did then."""
    limits = dict(conditions["engine_effective"])
    if (folder / "meta.yaml").is_file():
        before = read_yaml_object(folder / "meta.yaml")
        limits = {
            key: max(value, before.get("engine_effective", {}).get(key, 0)) for key, value in limits.items()
        }
    return {**conditions, "tp_degrees": degrees(work), "engine_effective": limits}


def _claims(
    job: ProfileJob, folder: Path, grid: SweepGrid, report: SweepReport, taken: dict[str, str]
) -> dict[str, Any]:
    axes = grid.describe()
    if "attention" in taken:
        there = read_yaml_object(folder.with_name(taken["attention"]) / "meta.yaml")
        axes = {name: there.get(name, value) for name, value in axes.items()}
    return {
        "last_sweep": {
            "rows_measured": report.measured,
            "rows_kept": report.kept,
            "seconds": round(report.seconds, 1),
        },
        **({"taken_from": taken} if taken else {}),
        "confidence": dict.fromkeys(wanted(job, CATEGORIES[:4]), "measured"),
        **axes,
    }
