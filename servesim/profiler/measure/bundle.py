"""From a job to a bundle: a hidden folder where a sweep can be left and resumed, then the bundle at once."""

from __future__ import annotations

import hashlib
import random
import shutil
import time
from bisect import bisect_left
from collections import defaultdict
from dataclasses import asdict, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import numpy as np

from servesim._version import __version__
from servesim.cost.finding import degrees_in
from servesim.errors import InputError, RunError
from servesim.profiler.bundle_writer import HEADERS, BundleContent, write_bundle
from servesim.profiler.measure.grid import SweepGrid
from servesim.profiler.measure.progress import duration
from servesim.profiler.measure.work_folder import (
    CONDITIONS,
    MeasureOptions,
    TableFile,
    prepare,
    same_grid,
    take_over,
    write_yaml,
)
from servesim.profiler.provenance import described, measured_reach, profiled
from servesim.profiler.shots import CATEGORIES, TABLE_HEADERS, VALUES, shots
from servesim.profiler.sweep import SweepReport, sweep, wanted
from servesim.slotted import dataclass
from servesim.specs.reading import read_yaml_object

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path
    from typing import TextIO

    from servesim.profiler.measure.grid import SweepGrid
    from servesim.profiler.meter import Meter, ProfileJob

COARSER = (1.0, 1.0, 1.0, 1.5, 2.0, 2.0, 4.0, 8.0)
"""Rungs: how much the attention axes' factors grow ..."""
COARSER_SKEW = (1.0, 2.0, 4.0, 4.0, 4.0, 8.0, None, None)
"""... and those of the skew sweep, which goes altogether on the last ones."""
_PILOTS = 6


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
    for tp in degrees_in(work):
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
    return {**conditions, "tp_degrees": degrees_in(work), "engine_effective": limits}


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


def ladder(grid: SweepGrid) -> Iterator[SweepGrid]:
    """The grid, then coarser and coarser ones."""
    for growth, skew_growth in zip(COARSER, COARSER_SKEW, strict=True):
        skew = None if grid.skew_factor is None or skew_growth is None else grid.skew_factor * skew_growth
        yield replace(
            grid,
            chunk_factor=grid.chunk_factor * growth,
            decode_factor=grid.decode_factor * growth,
            kv_factor=grid.kv_factor * growth,
            skew_factor=skew,
        )


def grid_within(
    budget_s: float, job: ProfileJob, grid: SweepGrid, meter: Meter, only: Sequence[str], stream: TextIO
) -> SweepGrid:
    """The finest grid of the ladder whose sweep should take at most ``budget_s`` seconds.

    The first degree stands for all; pilots (:data:`_PILOTS` shots a table, not kept) count against the
    budget.

    Raises:
        InputError: the budget is not above zero.
    """
    if not budget_s > 0:
        raise InputError(f"--budget-s {budget_s:g}: is not allowed; must be above 0")
    started_s = time.monotonic()
    meter.start_rank(job.tp_degrees[0])
    kv_tokens = meter.kv_capacity_tokens()
    cost_s = {}
    for category in wanted(job, only):
        pilots = shots(category, job, grid, kv_tokens)
        random.Random(0).shuffle(pilots)
        pilots = pilots[:_PILOTS]
        for shot in pilots:  # a kernel's first call may compile it
            shot.measure(meter)
        before_s = time.monotonic()
        for shot in pilots:
            shot.measure(meter)
        cost_s[category] = (time.monotonic() - before_s) / max(len(pilots), 1)
    left_s = budget_s - (time.monotonic() - started_s)
    for candidate in ladder(grid):
        counts = {category: len(shots(category, job, candidate, kv_tokens)) for category in cost_s}
        guess_s = len(job.tp_degrees) * sum(counts[category] * cost_s[category] for category in counts)
        if guess_s <= left_s:
            break
    print(
        f"budget {duration(budget_s)}: {sum(counts.values())} shots a degree, about {duration(guess_s)}"
        f"{' (the coarsest grid there is)' if guess_s > left_s else ''}; {_axes(candidate)}",
        file=stream,
    )
    return candidate


def _axes(grid: SweepGrid) -> str:
    skew = "no skew sweep" if grid.skew_factor is None else f"skew factor {grid.skew_factor:g}"
    factors = (grid.chunk_factor, grid.decode_factor, grid.kv_factor)
    return "attention factors " + "/".join(f"{factor:g}" for factor in factors) + f", {skew}"


SKEW_HEADER = HEADERS["skew.csv"]
"""Columns of skew.csv; the first ten name the shot."""

BUCKET_AXES: dict[str, Any] = {
    "pc": "raw pc value (profiled grid point)",
    "n_bins": [0, 2, 4, 8, 16, 32, 64, 128, 256, 1000000],
    "n_labels": ["n<=2", "n<=4", "n<=8", "n<=16", "n<=32", "n<=64", "n<=128", "n<=256", "n>256"],
    "skew_rate_bins": [-0.01, 0.05, 0.15, 0.4, 0.7, 1.01],
    "skew_rate_labels": ["sr<=5%", "sr<=15%", "sr<=40%", "sr<=70%", "sr>70%"],
    "kv_big_bins": [0, 1024, 4096, 16384, 1000000000],
    "kv_big_labels": ["kvB<=1k", "kvB<=4k", "kvB<=16k", "kvB>16k"],
    "kp_bins": [-1, 0, 512, 1024, 2048, 4096, 8192, 1000000000],
    "kp_labels": ["kp=0", "kp<=512", "kp<=1k", "kp<=2k", "kp<=4k", "kp<=8k", "kp>8k"],
}
"""Buckets: a value belongs to the first bin whose upper bound is not below it."""

Bucket = tuple[int, str, str, str, str]


@dataclass(frozen=True, slots=True)
class SkewSample:
    """One skew shot: where it lies and its three times in µs."""

    bucket: Bucket
    mean_us: float
    longest_us: float
    skewed_us: float

    @property
    def room_us(self) -> float:
        """What the greatest length everywhere would add to the mean length everywhere."""
        return self.longest_us - self.mean_us


@dataclass(frozen=True, slots=True)
class SkewFit:
    """The rows of skew_fit.csv and the summary of meta.yaml."""

    rows: list[tuple[int, str, str, str, str, float, int]]
    summary: dict[str, Any]


def bucket_of(chunk: int, n: int, rate: float, kv_long: int, history: int) -> Bucket:
    """Chunk, and the labels of decodes, skew rate, greatest KV length and history."""
    values = {"n": n, "skew_rate": rate, "kv_big": kv_long, "kp": history}
    labels = [_label(axis, value) for axis, value in values.items()]
    return (chunk, labels[0], labels[1], labels[2], labels[3])


def _label(axis: str, value: float) -> str:
    upper: Sequence[float] = BUCKET_AXES[f"{axis}_bins"][1:-1]
    label: str = BUCKET_AXES[f"{axis}_labels"][bisect_left(upper, value)]
    return label


def sample_of(row: Sequence[str]) -> SkewSample:
    """A row of skew.csv (cells in the order of :data:`SKEW_HEADER`) as a sample."""
    cells = dict(zip(SKEW_HEADER, row, strict=True))
    kv, longest, mean = (int(cells[name]) for name in ("kvs", "kv_big", "kv_mean"))
    rate = (mean - kv) / (longest - kv) if longest > kv else 0.0
    bucket = bucket_of(int(cells["pc"]), int(cells["n"]), rate, longest, int(cells["kp"]))
    return SkewSample(bucket, *(float(cells[name]) for name in ("t_mean_us", "t_max_us", "t_skew_us")))


def fit_skew(samples: Iterable[SkewSample]) -> SkewFit | None:
    """α of every bucket that has samples, rounded to four digits; None without a single usable sample."""
    usable = [sample for sample in samples if sample.room_us > 0.0]
    if not usable:
        return None
    buckets: dict[Bucket, list[SkewSample]] = defaultdict(list)
    for sample in usable:
        buckets[sample.bucket].append(sample)
    alpha = {bucket: _slope(members) for bucket, members in buckets.items()}
    rows = [(*bucket, round(alpha[bucket], 4), len(buckets[bucket])) for bucket in sorted(buckets)]
    predicted = np.array([s.mean_us + alpha[s.bucket] * s.room_us for s in usable])
    error = predicted / np.array([s.skewed_us for s in usable]) - 1.0
    p50, p90, p99 = (round(float(q), 4) for q in np.percentile(np.abs(error), [50, 90, 99]))
    summary = {
        "method": "per_bucket_wls_5axis",
        "n_samples": len(usable),
        "alpha_default": round(_slope(usable), 4),
        "rel_err_p50": p50,
        "rel_err_p90": p90,
        "rel_err_p99": p99,
        "signed_mean": round(float(error.mean()), 4),
    }
    return SkewFit(rows, summary)


def _slope(samples: Sequence[SkewSample]) -> float:
    room = np.array([sample.room_us for sample in samples])
    added = np.array([sample.skewed_us - sample.mean_us for sample in samples])
    return float(room @ added / (room @ room))
