"""Running a simulation from Python; the command line is a caller of this."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from servesim.errors import InputError
from servesim.specs.acting import check_beside
from servesim.specs.cluster import ClusterSpec, load_cluster
from servesim.specs.cluster_changes import with_options
from servesim.specs.options import RuntimeOptions, output_fields
from servesim.specs.validation import validated
from servesim.workload.formats import load_workload
from servesim.workload.request import Workload

if TYPE_CHECKING:
    from collections.abc import Mapping
    from contextlib import AbstractContextManager
    from os import PathLike

    from servesim.engine.build import Kept
    from servesim.engine.simulation import Observer
    from servesim.results.result import Result

LOADING = ("num_reqs", "lenient", "request_rate", "dataset", "tokenizer", "estimate_tokens", "columns")
"""Options that act while a workload file is read."""
_SCREEN = ("itl", "log_interval", "log_level")
"""Options of what the command line prints and writes, beside its files."""
_READ_AGAIN = ("sweep", "plan")
"""Functions that read a workload more than once, or look at its content to know rows again."""
NOISE = ("ensemble", "step_noise", "run_noise", "arrival_jitter")
"""Options of the runs of an ensemble, as opposed to one run."""


def with_flags(options: RuntimeOptions | None, flags: Mapping[str, Any]) -> RuntimeOptions:
    """``options`` (the defaults when None) with some changed by keyword.

    Raises:
        InputError: an unknown flag or a value that is not allowed.
    """
    if options is None:
        return validated(RuntimeOptions, dict(flags), "options")
    return options.replace(**flags) if flags else options


def check_used(options: RuntimeOptions, who: str, workload: object = None, cluster: object = None) -> None:
    """Refuse options that a function of the Python API would pass over.

    Args:
        options: those that the user set count.
        who: the function, for messages.
        workload: what it was given beside the options.
        cluster: likewise.

    Raises:
        InputError: an option has no effect there.
    """
    fields = type(options).model_fields
    asked = [name for name in options.model_fields_set if getattr(options, name) != fields[name].default]
    for name in sorted(asked):
        if isinstance(workload, Workload) and name in LOADING:
            raise InputError(
                f"{name}: has no effect on a workload that is loaded already; give it to load_workload, or "
                f"give {who} the path of the workload"
            )
        if workload is not None and name == "dataset":
            raise InputError(f"dataset: {who} was given a workload beside it; leave one of them out")
        if cluster is not None and name == "cluster_config":
            raise InputError(f"cluster_config: {who} was given a cluster beside it; leave one of them out")
        if name in _SCREEN or name in output_fields():
            raise InputError(f"{name}: {who} prints nothing and writes no file; save what it returns")
    if options.dataset == "-" and who in _READ_AGAIN:
        raise InputError(
            f"--dataset -: {who} reads the workload more than once, and a pipe can be read once; give a file"
        )
    check_beside(without(options, "run_id"))  # what is returned carries it, files or not


def single(options: RuntimeOptions) -> RuntimeOptions:
    """The options of one run of an ensemble: without its size and its noise."""
    return without(options, *NOISE)


def without(options: RuntimeOptions, *names: str) -> RuntimeOptions:
    """The options with some as if they had never been set."""
    chosen = options.model_dump(exclude_unset=True)
    return type(options)(**{name: value for name, value in chosen.items() if name not in names})


def loading_key(options: RuntimeOptions) -> tuple[object, ...]:
    """What two options must have in common for :func:`read_workload` to give the same workload."""
    return tuple(getattr(options, name) for name in (*LOADING, "seed"))


def read_workload(options: RuntimeOptions, path: str | PathLike[str] | None = None) -> Workload:
    """The workload in ``path`` (``options.dataset`` when None), loaded as the options say."""
    return load_workload(
        str(path) if path is not None else options.dataset,
        num_reqs=options.num_reqs,
        lenient=options.lenient,
        request_rate=options.request_rate,
        seed=options.seed,
        tokenizer=options.tokenizer,
        estimate_tokens=options.estimate_tokens,
        columns=options.columns,
    )


def simulate(
    cluster: ClusterSpec | str | PathLike[str] | dict[str, Any] | None = None,
    workload: Workload | str | PathLike[str] | None = None,
    options: RuntimeOptions | None = None,
    *,
    observer: Observer | None = None,
    **flags: Any,
) -> Result:
    """Run ``workload`` on ``cluster`` and return what happened.

    Prints nothing, and writes no file but a profile bundle that is missing, which it keeps in the user's data
    folder and tells the logger ``servesim`` (``auto_profile=False``: an error instead).

    Args:
        cluster: a loaded cluster, the path of a cluster config, or its content; None: the options name it.
        workload: a loaded workload or the path of a workload file; None: the options name it.
        options: runtime options; None: the defaults.
        observer: called as the simulated clock advances.
        **flags: single options by name, such as ``kv_cache_dtype="fp8"``; they win over ``options``.

    Raises:
        InputError: something given is wrong or not supported yet.
        RunError: the run could not be finished.
    """
    chosen = with_flags(options, flags)
    if chosen.ensemble:
        raise InputError("ensemble: simulate is a single run; servesim.ensemble(...) makes several")
    check_used(chosen, "simulate", workload, cluster)
    requests = workload if isinstance(workload, Workload) else read_workload(chosen, workload)
    return simulate_loaded(read_cluster(chosen, cluster), requests, chosen, observer)


def read_cluster(
    options: RuntimeOptions, cluster: ClusterSpec | str | PathLike[str] | dict[str, Any] | None = None
) -> ClusterSpec:
    """The cluster given (``options.cluster_config`` when None), changed as the options say."""
    spec = cluster if isinstance(cluster, ClusterSpec) else load_cluster(cluster or options.cluster_config)
    return with_options(spec, options)


def making_bundles(wanted: bool) -> AbstractContextManager[None]:
    """Inside the block, bundles that are missing are made where that is possible, if ``wanted``."""
    from servesim.profiler.on_demand import bundles_on_demand

    return bundles_on_demand(wanted)


def measurements_version() -> str | None:
    """Version of the public measurements that bundles are made from on demand; None: not installed."""
    from servesim.profiler.on_demand import installed_version

    return installed_version()


def simulate_loaded(
    cluster: ClusterSpec,
    workload: Workload,
    options: RuntimeOptions,
    observer: Observer | None = None,
    kept: Kept | None = None,
) -> Result:
    """One run of what :func:`read_cluster` and :func:`read_workload` gave; the way of every caller."""
    from servesim.engine.build import run
    from servesim.profiler.on_demand import bundles_on_demand
    from servesim.results.result import Result

    with bundles_on_demand(options.auto_profile):
        log = run(cluster, workload, options, observer, kept)
    return Result(log, workload, options, cluster)
