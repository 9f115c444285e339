"""``servesim run``: simulate a workload on a cluster, print and save the outcome."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse

    from servesim.explore.ensemble import Ensemble
    from servesim.results.result import Result
    from servesim.results.step_stream import StepStream
    from servesim.specs.options import RuntimeOptions

_HELP = "simulate a workload on a cluster"


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command and its flags."""
    from servesim.specs.options import add_arguments

    parser = subparsers.add_parser(
        "run", help=_HELP, description=_HELP, usage="servesim run [OPTIONS]", allow_abbrev=False
    )
    add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Check everything, simulate, print, save; returns the exit status."""
    from servesim.cli.screen import tell
    from servesim.profiler.on_demand import bundles_on_demand
    from servesim.specs.acting import check_beside
    from servesim.specs.options import from_namespace

    started_s = time.perf_counter()
    options = from_namespace(args)
    check_beside(options)
    options = with_run_id(options)
    with bundles_on_demand(options.auto_profile, tell):
        return simulate_and_save(options, started_s)


def simulate_and_save(options: RuntimeOptions, started_s: float) -> int:
    """The run itself; ``started_s`` is where its wall time counts from."""
    from servesim import api
    from servesim.cli.screen import RunScreen, say, set_up_messages, tell
    from servesim.explore.ensemble import ensemble_text
    from servesim.results.closing import closing
    from servesim.results.outputs import save_outputs

    set_up_messages(options.log_level)
    cluster = api.read_cluster(options)
    workload = api.read_workload(options)
    workload.pack()
    check_outputs(options)
    stream = step_stream(options)
    screen = RunScreen(options, workload, cluster, stream)
    try:
        result = api.simulate_loaded(cluster, workload, api.single(options), screen)
        screen.finish(result.log)
    except BaseException:
        if stream is not None and (left := stream.leave()):
            tell(f"steps so far: {', '.join(map(str, left))}")
        raise
    finally:
        screen.close()
    result.steps_went_to(stream)
    wall_s = time.perf_counter() - started_s
    if result.nothing_ran:
        print(f"error: every request was rejected: {result.rejected[0].reason}", file=sys.stderr)
    try:
        spread = spread_around(result, options) if options.ensemble and not result.nothing_ran else None
        extra = {} if spread is None else {"ensemble": spread.to_dict()}
        saved = save_outputs(result, options, extra)
    finally:
        if stream is not None:
            stream.remove()
    say(closing(result, wall_s))
    if spread is not None:
        say(f"\n{ensemble_text(spread)}")
    if saved:
        say(f"written        {', '.join(saved)}")
    return 1 if result.nothing_ran else 0


def step_stream(options: RuntimeOptions) -> StepStream | None:
    """Where the steps go while the run goes on; None: they are written at the end, or not at all."""
    if options.steps is None:
        return None
    from servesim.results.step_stream import StepStream

    return StepStream.to(options.steps)


def with_run_id(options: RuntimeOptions) -> RuntimeOptions:
    """The options with ``{run_id}`` replaced in every output path; a missing run id is made from the time."""
    from servesim.specs.options import output_fields

    paths = {name: getattr(options, name) for name in output_fields()}
    if not any(path and "{run_id}" in path for path in paths.values()):
        return options
    run_id = options.run_id or f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    return options.replace(**{name: path.replace("{run_id}", run_id) for name, path in paths.items() if path})


def check_outputs(options: RuntimeOptions) -> None:
    """Find out before the run that every output can be written.

    Raises:
        InputError: a path cannot be written, is an input of the run, or is given twice; or Parquet is wanted
            and pyarrow missing.
    """
    from servesim.errors import InputError
    from servesim.results.atomic import check_suffix, check_writable
    from servesim.results.csv import require_parquet
    from servesim.specs.flags import flag_name
    from servesim.specs.options import FOLDER, output_fields

    taken = {
        os.path.realpath(options.cluster_config): "--cluster-config",
        os.path.realpath(options.dataset): "--dataset",
    }
    for name, suffixes in output_fields().items():
        path, flag = getattr(options, name), flag_name(name)
        if path is None:
            continue
        if suffixes == FOLDER:
            check_plots(path, flag)
            continue
        require_parquet(path, flag)
        other = taken.setdefault(os.path.realpath(path), flag)
        if other != flag and (Path(path).is_file() or not Path(path).exists()):
            raise InputError(f"{flag} {path}: is the file of {other} too; give another path")
        check_suffix(path, suffixes, flag)
        check_writable(path, flag)


def check_plots(path: str, flag: str = "--plots") -> None:
    """Find out before the work that plots can be drawn into a folder.

    Raises:
        InputError: the path is no folder, or cannot be made, or matplotlib is missing.
    """
    from servesim.results.atomic import check_creatable
    from servesim.results.figures import require_matplotlib

    require_matplotlib(flag)
    check_creatable(Path(path), flag)


def spread_around(result: Result, options: RuntimeOptions) -> Ensemble:
    """Repeat the run with noise, counting the runs on a terminal."""
    from servesim.explore.ensemble import ensemble

    def count(member: int) -> None:
        print(f"\rnoisy run {member + 1} of {options.ensemble}", end="", file=sys.stderr, flush=True)

    shown = sys.stderr.isatty()
    try:
        return ensemble(options=options, nominal=result, before_run=count if shown else None)
    finally:
        if shown:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
