"""Running a simulation from Python; the command line is a caller of this."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from servesim.errors import InputError
from servesim.specs.cluster import ClusterSpec, load_cluster, with_options
from servesim.specs.options import RuntimeOptions
from servesim.specs.validation import validated
from servesim.workload.formats import load_workload
from servesim.workload.request import Workload

if TYPE_CHECKING:
    from collections.abc import Mapping
    from os import PathLike

    from servesim.engine.simulation import Observer
    from servesim.results.result import Result

_LOADING = ("num_reqs", "lenient", "request_rate")
"""Options that act while a workload file is read."""


def with_flags(options: RuntimeOptions | None, flags: Mapping[str, Any]) -> RuntimeOptions:
    """``options`` (the defaults when None) with some changed by keyword.

    Raises:
        InputError: an unknown flag or a value that is not allowed.
    """
    if options is None:
        return validated(RuntimeOptions, dict(flags), "options")
    return options.replace(**flags) if flags else options


def read_workload(options: RuntimeOptions, path: str | PathLike[str] | None = None) -> Workload:
    """The workload in ``path`` (``options.dataset`` when None), loaded as the options say."""
    return load_workload(
        str(path) if path is not None else options.dataset,
        num_reqs=options.num_reqs,
        lenient=options.lenient,
        request_rate=options.request_rate,
        seed=options.seed,
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
    from servesim.engine.build import run
    from servesim.profiler.making import bundles_on_demand
    from servesim.results.result import Result

    chosen = with_flags(options, flags)
    if chosen.ensemble:
        raise InputError("ensemble: simulate is a single run; servesim.ensemble(...) makes several")
    spec = cluster if isinstance(cluster, ClusterSpec) else load_cluster(cluster or chosen.cluster_config)
    spec = with_options(spec, chosen)
    if isinstance(workload, Workload):
        late = [name for name in _LOADING if name in flags]
        if late:
            raise InputError(
                f"{late[0]}: has no effect on a workload that is loaded already; give it to load_workload, "
                "or give simulate the path of the workload"
            )
        requests = workload
    else:
        requests = read_workload(chosen, workload)
    with bundles_on_demand(chosen.auto_profile):
        log = run(spec, requests, chosen, observer)
    return Result(log, requests, chosen, spec)
