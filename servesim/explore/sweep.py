"""Many configurations of a run: one row each, on one process or several, resumable after whatever happens."""

from __future__ import annotations

import json
import logging
import os
import socket
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from servesim._version import __version__
from servesim.api import check_used, loading_key, read_workload, simulate_loaded
from servesim.cost.finding import MADE_LOG, READ_LOG
from servesim.engine.block_tables import BlockTables
from servesim.engine.build import Kept
from servesim.errors import ServingError
from servesim.explore.executors import RayPool, check_jobs, check_ray, run_parts
from servesim.explore.journal import Journal
from servesim.explore.notebook import rows_line
from servesim.explore.row_key import row_key
from servesim.explore.slo import num_gpus, parse_slo
from servesim.explore.space import Space, cluster_with, read_space, space_of, split
from servesim.explore.sweep_table import Sweep
from servesim.slotted import dataclass
from servesim.specs.cluster_changes import with_options
from servesim.specs.options import RuntimeOptions
from servesim.specs.validation import validated

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from servesim.cost.build import Costs
    from servesim.results.result import Result
    from servesim.specs.cluster import ClusterSpec
    from servesim.workload.request import Workload

_PARTS_PER_JOB = 8
"""Parts of a sweep for every process: few, so that what they read is read seldom, and enough to share out."""


@dataclass(slots=True, frozen=True)
class Setting:
    """What all configurations of a sweep have in common; travels to other processes."""

    options: dict[str, Any]
    cluster: str | dict[str, Any] | None
    """Path or content of a cluster config; None: the options name it."""
    slo: str | None
    journal: str | None
    """File that finished rows go to."""


@dataclass(slots=True, frozen=True)
class Part:
    """Some configurations that one process runs one after the other."""

    setting: Setting
    configurations: list[tuple[str, dict[str, Any]]]
    """(key, what the configuration sets)."""


def sweep(
    space: Space | Mapping[str, Any] | str | os.PathLike[str],
    options: RuntimeOptions | None = None,
    *,
    cluster: str | os.PathLike[str] | dict[str, Any] | None = None,
    workload: str | os.PathLike[str] | None = None,
    slo: str | None = None,
    journal: str | os.PathLike[str] | None = None,
    jobs: int = 1,
    ray: str | None = None,
    optimizer: str | None = None,
    trials: int = 64,
    goals: str | Sequence[str] = (),
    progress: Callable[[int, int, int], None] | None = None,
    **flags: Any,
) -> Sweep:
    """Run every configuration of ``space``.

    Args:
        space: a :class:`Space`, what a sweep file holds (``{"grid": {"tp": [1, 2]}}``), the file's path, or a
            DataFrame whose rows are configurations.
        options: what holds for every configuration unless it says otherwise.
        cluster: path or content of a cluster config; None: the options name it.
        workload: path of a workload file; None: the options name it.
        slo: bounds of latencies that every row is held against, such as ``"ttft:1000"``.
        journal: a file of finished rows: those whose configuration and inputs are the same are not run
            again, new ones are added as soon as they are finished.
        jobs: processes; more than 1 needs joblib (extra ``sweep``).
        ray: run on Ray (extra ``ray``): the address of a cluster, ``auto`` or ``local``; ``jobs`` are its
            workers then, 1: one for each CPU.
        optimizer: ``optuna:tpe`` or ``optuna:nsga2`` (extra ``optuna``): run ``trials`` configurations that
            it chooses, for a space that is too large to go through.
        trials: of the optimizer.
        goals: of the optimizer: figures with ``:max`` or ``:min``; None given: output throughput per GPU,
            and for nsga2 P99 TTFT too.
        progress: called with (done, all, failed) as rows are finished.
        **flags: single options for every configuration.

    Raises:
        InputError: the space or an option of it is wrong. What is wrong with one configuration is the reason
            in its row.
        RunError: worker processes of joblib keep dying, or the journal cannot be written.
    """
    chosen = _space(space)
    check_jobs(jobs)
    if ray is not None:
        check_ray()
    given = {} if options is None else options.model_dump(exclude_unset=True)
    common = {**chosen.options, **given, **flags}
    if workload is not None:
        common["dataset"] = os.fspath(workload)
    read = validated(RuntimeOptions, common, "options")
    check_used(read, "sweep", None, cluster)
    chosen = replace(chosen, options=common)  # constraints are about whatever holds, flags among it
    bounds = slo or chosen.slo
    if bounds is not None:
        parse_slo(bounds)
    where = os.fspath(cluster) if isinstance(cluster, os.PathLike) else cluster
    setting = Setting(common, where, bounds, None if journal is None else os.fspath(journal))
    runner = Runner(setting, jobs, ray, progress or rows_line())
    try:
        if optimizer is not None:
            from servesim.explore.optimizer import optimised

            found = optimised(chosen, runner, optimizer, trials, goals, read.seed)
            return replace(found, notes=[*runner.notes, *found.notes])
        configurations, ruled_out = chosen.configurations()
        rows = runner.run(configurations)
    finally:
        runner.close()
    names = list(dict.fromkeys(name for each in configurations for name in each))
    return Sweep(names, list({row["key"]: row for row in rows}.values()), ruled_out, runner.notes)


def _space(space: Space | Mapping[str, Any] | str | os.PathLike[str]) -> Space:
    if isinstance(space, Space):
        return space
    if hasattr(space, "to_dict") and hasattr(space, "columns"):  # a DataFrame: a row is a configuration
        return space_of({"list": [_given(row) for row in space.to_dict("records")]})
    return read_space(os.fspath(space)) if isinstance(space, str | os.PathLike) else space_of(space)


def _given(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a row of a DataFrame sets: empty cells are left out, and whole numbers are no fractions."""
    filled = {str(name): value for name, value in row.items() if value is not None and value == value}
    return {
        name: int(value) if isinstance(value, float) and value.is_integer() else value
        for name, value in filled.items()
    }


class Runner:
    """Runs configurations that have a setting in common, wherever they are to run."""

    def __init__(
        self,
        setting: Setting,
        jobs: int,
        ray: str | None = None,
        progress: Callable[[int, int, int], None] | None = None,
    ) -> None:
        self._setting, self._jobs, self._progress = setting, jobs, progress
        self.rows: dict[str, dict[str, Any]] = {}
        """Key -> row of everything that has been run or was in the journal."""
        self._digests: dict[str, Any] = {}
        self._bench: Bench | None = None
        self._journal = None if setting.journal is None else Journal(setting.journal)
        self._old_failures: set[str] = set()
        if self._journal is not None:
            self._journal.begin()
            self._old_failures = {
                key for key, row in self._journal.rows().items() if row["status"] == "failed"
            }
        self.notes: list[str] = []
        """Where the rows were made, if not in processes of this machine."""
        self._pool = None if ray is None else RayPool(ray, jobs, self.notes.append)

    def close(self) -> None:
        """Let go of what was needed for running."""
        if self._pool is not None:
            self._pool.close()

    def run(self, configurations: Sequence[dict[str, Any]], total: int | None = None) -> list[dict[str, Any]]:
        """The rows of ``configurations``, in their order; ``total``: of all to come, for progress."""
        keys = [_key(self._setting, each, self._digests) for each in configurations]
        keyed = dict(zip(keys, configurations, strict=True))
        self._look(keyed)

        def tell() -> None:
            if self._progress is not None:
                failed = sum(row["status"] == "failed" for row in self.rows.values())
                self._progress(len(self.rows), total or len(keyed), failed)

        for row in self._new_rows(keyed):
            self.rows[row["key"]] = row
            tell()
        return [self.rows[key] for key in keys]

    def _look(self, keyed: Mapping[str, dict[str, Any]]) -> None:
        """Take what is in the journal, rows of workers that have died among them."""
        if self._journal is not None:
            found = self._journal.rows()
            new = keyed.keys() & found.keys() - self._old_failures - self.rows.keys()
            self.rows.update({key: found[key] for key in keyed if key in new})

    def _new_rows(self, keyed: Mapping[str, dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """The rows that are not there, in any order, each noted in the journal."""
        waiting = {key: each for key, each in keyed.items() if key not in self.rows}
        if self._pool is not None and waiting:
            items = {key: (key, each) for key, each in waiting.items()}
            make = partial(_ray_worker, replace(self._setting, journal=None))
            for row in self._pool.run(make, items, _lost):
                if self._journal is not None:  # here, for another node may not see it
                    self._journal.append(row)
                yield row
        elif self._jobs == 1:
            self._bench = self._bench or Bench(self._setting)
            yield from self._bench.rows(waiting.items())
        else:

            def left() -> list[Part]:
                self._look(keyed)
                still = [(key, each) for key, each in waiting.items() if key not in self.rows]
                size = max(-(-len(still) // (self._jobs * _PARTS_PER_JOB)), 1)
                return [Part(self._setting, still[at : at + size]) for at in range(0, len(still), size)]

            for finished in run_parts(run_part, left, self._jobs):
                yield from finished


def _ray_worker(setting: Setting) -> Callable[[tuple[str, dict[str, Any]]], dict[str, Any]]:
    """What a worker of Ray does with (key, configuration)."""
    bench, digests = Bench(setting), dict[str, Any]()

    def row(item: tuple[str, dict[str, Any]]) -> dict[str, Any]:
        key, configuration = item
        if _key(setting, configuration, digests) != key:
            reason = (
                f"the worker on {socket.gethostname()} sees another version of servesim, or other cluster "
                "config or workload files; every node needs the same under the same paths"
            )
            return {"key": key, "status": "failed", "reason": reason, **configuration}
        return bench.row(key, configuration)

    return row


def _lost(key: str, item: tuple[str, dict[str, Any]]) -> dict[str, Any]:
    reason = "its worker died three times; there may be too little memory"
    return {"key": key, "status": "failed", "reason": reason, **item[1]}


def run_part(part: Part) -> list[dict[str, Any]]:
    """The rows of a part; what a worker process does."""
    return list(Bench(part.setting).rows(part.configurations))


class Bench:
    """Runs configurations one after the other; what they have in common is read once."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._workloads: dict[tuple[Any, ...], Workload] = {}
        self._read_with: dict[tuple[Any, ...], list[str]] = {}
        """What was told when a workload was read; it holds for every row of it."""
        self._tables: dict[tuple[Any, ...], BlockTables] = {}
        self._clusters: dict[str, ClusterSpec] = {}
        self._costs: Costs | None = None
        self._once: dict[str, None] = {}
        """What was told of bundles as they were read; it holds for all their rows."""

    def rows(self, configurations: Iterable[tuple[str, dict[str, Any]]]) -> Iterator[dict[str, Any]]:
        """The rows of (key, configuration), each noted in the journal before it is yielded."""
        journal = None if self._setting.journal is None else Journal(self._setting.journal)
        for key, configuration in configurations:
            row = self.row(key, configuration)
            if journal is not None:
                journal.append(row)
            yield row

    def row(self, key: str, configuration: Mapping[str, Any]) -> dict[str, Any]:
        """The row of one configuration; what goes wrong is in it."""
        row: dict[str, Any] = {"key": key, "status": "ok", "reason": "", **configuration}
        told: list[str] = []
        try:
            with _collected(told, self._once):
                result = self._simulate(configuration, told)
            if result.nothing_ran:
                row |= {"status": "rejected", "reason": result.rejected[0].reason}
            else:
                row |= _figures(result, self._setting.slo)
            row["notes"] = "; ".join([*result.log.notes, *self._warnings(told, result)])
            row |= _provenance(result)
        except ServingError as error:
            row |= {"status": "failed", "reason": str(error)}
        except Exception as error:  # one row's fault, which must not cost the others
            row |= {"status": "failed", "reason": f"a fault of servesim: {type(error).__name__}: {error}"}
        return row

    def _warnings(self, told: list[str], result: Result) -> list[str]:
        """What was told of this run, and of the bundles it reads; the same in whatever process."""
        sources = [f"{log.bundle_source} " for log in result.instances]  # path, then a blank
        subjects = {line: line.partition(": ")[0] for line in self._once}
        read = [line for line, about in subjects.items() if any(f"{about} " in source for source in sources)]
        return sorted({*told, *read})

    def _simulate(self, configuration: Mapping[str, Any], told: list[str]) -> Result:
        changes, keys = split(configuration)
        options = validated(RuntimeOptions, {**self._setting.options, **changes}, "options")
        check_used(options, "sweep", None, self._setting.cluster)
        cluster = with_options(self._cluster(options, keys), options)
        asked = loading_key(options)
        if asked not in self._workloads:
            with _collected(self._read_with.setdefault(asked, [])):
                self._workloads[asked] = read_workload(options)
            self._tables[asked] = BlockTables(self._workloads[asked])
        told += self._read_with[asked]
        kept = Kept(self._costs, self._tables[asked])
        result = simulate_loaded(cluster, self._workloads[asked], options, None, kept)
        self._costs = kept.costs
        return result

    def _cluster(self, options: RuntimeOptions, keys: Mapping[str, Any]) -> ClusterSpec:
        source = self._setting.cluster or options.cluster_config
        name = json.dumps([source, keys], sort_keys=True)
        if name not in self._clusters:
            self._clusters[name] = cluster_with(source, keys)
        return self._clusters[name]


def _figures(result: Result, slo: str | None) -> dict[str, Any]:
    """Figures of the summary as columns; those inside it under the name of both keys."""
    summary: Mapping[str, Any] = result.summary
    figures = {
        name: value
        for name, value in summary.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    gpus = num_gpus(result)
    figures |= {
        "kv_cache_tokens": summary["kv_cache"]["tokens"],
        "kv_cache_peak": summary["kv_cache"]["peak"],
        "prefix_cache_hit_rate": summary["prefix_cache"]["hit_rate"],
        "near_saturation": summary["saturation"]["near"],
        "num_gpus": gpus,
        "output_throughput_per_gpu": round(summary["output_throughput"] / max(gpus, 1), 6),
    }
    if summary["energy"] is not None:
        figures["energy_j"] = summary["energy"]["total_j"]
    if slo is not None:
        level = parse_slo(slo)
        figures |= {"slo_met": level.met(result), "goodput": round(level.goodput_share(result), 6)}
    return figures


def _provenance(result: Result) -> dict[str, Any]:
    summary: Mapping[str, Any] = result.summary
    return {
        "run_id": summary["run_id"],
        "servesim": __version__,
        "bundle": "; ".join(summary["bundle"]),
        "options": json.dumps(summary["options"], sort_keys=True),
    }


def _key(setting: Setting, configuration: Mapping[str, Any], digests: dict[str, Any]) -> str:
    return row_key(setting.options, setting.cluster, setting.slo, configuration, digests)


@contextmanager
def _collected(told: list[str], once: dict[str, None] | None = None) -> Iterator[None]:
    """Warnings of servesim go to ``told`` inside the block, those of bundles that are read to ``once``.

    That a bundle was made concerns no row, but whoever waits for it: it goes where it would go without.
    """
    logger = logging.getLogger("servesim")
    before, passed_on = logger.handlers[:], logger.propagate

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.name == MADE_LOG:
                for handler in before:
                    handler.handle(record)
                if passed_on:
                    logging.getLogger().callHandlers(record)
            elif record.name == READ_LOG and once is not None:
                once[record.getMessage()] = None
            else:
                told.append(record.getMessage())

    logger.handlers[:], logger.propagate = [Collector(logging.WARNING)], False
    try:
        yield
    finally:
        logger.handlers[:], logger.propagate = before, passed_on
