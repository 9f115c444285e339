"""``servesim sweep``: many configurations of a run, one row each."""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from typing import TYPE_CHECKING, Any

from servesim.cli.parts import add_command, check_apart
from servesim.errors import InputError

if TYPE_CHECKING:
    from servesim.explore.space import Space

_HELP = "many configurations of a run, one row of figures each"
_EPILOG = """\
FILE is YAML with options, grid, list, constraints and slo; or vLLM's JSON list of serve
parameters. Flags outside --grid hold for every configuration. Rows that are in the journal beside
the output are not run again. Exit status 1: not one configuration has figures.

  servesim sweep --grid "--max-num-seqs 32,64,128" --grid "--kv-cache-dtype auto,fp8"
  servesim sweep sweep.yaml --jobs 4 --output sweep.parquet
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command and its flags."""
    from servesim.cli.reports import add_report_arguments
    from servesim.cli.slo import NOT_SEARCHED
    from servesim.specs.options import add_arguments

    parser = add_command(subparsers, "sweep", _HELP, _EPILOG, "servesim sweep [FILE] [OPTIONS]")
    parser.add_argument("file", nargs="?", metavar="FILE", help="what to go through, YAML or JSON")
    parser.add_argument(
        "--grid",
        action="append",
        default=[],
        metavar='"FLAG A,B,..."',
        help="values of a run flag, or of a key of the cluster config (cluster.link_bw 100,200); repeat for "
        "every combination with others",
    )
    parser.add_argument(
        "--constraint",
        action="append",
        default=[],
        metavar="CONDITION",
        help='leave out configurations that do not fulfil it, such as "max_num_seqs * tp <= 256"',
    )
    parser.add_argument(
        "--slo", nargs="+", metavar="METRIC:MS", help="bounds that every row is held against, as for compare"
    )
    parser.add_argument(
        "--output",
        dest="table",
        default="outputs/sweep.csv",
        metavar="PATH",
        help="table of all rows, .csv or .parquet (default: outputs/sweep.csv)",
    )
    parser.add_argument(
        "--journal",
        metavar="PATH",
        help="where finished rows are kept for the next time (default: the output with .journal.jsonl)",
    )
    parser.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="processes; more than 1 needs joblib (default: 1)"
    )
    parser.add_argument(
        "--ray",
        nargs="?",
        const="auto",
        metavar="ADDRESS",
        help="run on a Ray cluster; no ADDRESS: the one that runs here, else one that is started; --jobs N: "
        "that many workers (default: one for each CPU)",
    )
    parser.add_argument(
        "--optimizer",
        choices=("optuna:tpe", "optuna:nsga2"),
        help="let Optuna choose --trials configurations, for spaces that are too large to go through",
    )
    parser.add_argument("--trials", type=int, default=64, metavar="N", help="of the optimizer (default: 64)")
    parser.add_argument(
        "--goal",
        nargs="+",
        default=[],
        metavar="FIGURE:max|min",
        help="of the optimizer (default: output_throughput_per_gpu:max, with nsga2 p99_ttft_ms:min too)",
    )
    add_report_arguments(parser)
    add_arguments(parser, exclude=NOT_SEARCHED)


def run(args: argparse.Namespace) -> int:
    """Run what is not there yet, write and print; returns the exit status."""
    from servesim.api import without
    from servesim.cli.reports import check_report_arguments, write_reports
    from servesim.cli.screen import say, set_up_messages, tell
    from servesim.explore.sweep import sweep
    from servesim.profiler.on_demand import bundles_on_demand
    from servesim.results.atomic import check_suffix, check_writable
    from servesim.results.csv import TABLE_SUFFIXES, require_parquet
    from servesim.specs.options import from_namespace

    for flag in ("trials", "goal"):
        if args.optimizer is None and getattr(args, flag) not in (64, []):
            raise InputError(f"--{flag}: has no effect without --optimizer; leave it out")
    options = from_namespace(args)
    set_up_messages(options.log_level)
    check_suffix(args.table, TABLE_SUFFIXES, "--output")
    require_parquet(args.table, "--output")
    check_writable(args.table, "--output")
    check_report_arguments(args)
    journal = args.journal or f"{args.table}.journal.jsonl"
    check_writable(journal, "--journal")
    check_apart(
        {"--cluster-config": options.cluster_config, "--dataset": options.dataset, "FILE": args.file},
        {"--output": args.table, "--journal": journal, "--report": args.page},
    )
    space = _space(args)
    progress = Progress() if sys.stderr.isatty() else None
    try:
        with bundles_on_demand(options.auto_profile, tell):
            found = sweep(
                space,
                without(options, "log_level"),
                slo=" ".join(args.slo) if args.slo else None,
                journal=journal,
                jobs=args.jobs,
                ray=args.ray,
                optimizer=args.optimizer,
                trials=args.trials,
                goals=args.goal,
                progress=progress,
            )
    finally:
        if progress is not None:
            progress.close()
    found.save(args.table)
    written = [args.table, journal]
    if args.page or args.images:
        from servesim.report.found import sweep_page

        written += write_reports(args, lambda: sweep_page(found))
    say(found.text(args.table))
    say(f"written        {', '.join(written)}")
    return 1 if len(found.failed) == len(found.rows) else 0


def _space(args: argparse.Namespace) -> Space:
    from servesim.explore.space import Space, read_space, space_of

    space = read_space(args.file) if args.file else Space()
    grid: dict[str, list[Any]] = {}
    for text in args.grid:
        for name, values in parse_grid(text).items():
            if name in grid:
                raise InputError(f'--grid "{text}": {name} is there twice; give all its values at once')
            grid[name] = values
    if grid:
        space.grid.update(space_of({"grid": grid}, "--grid").grid)
    if not space.grid and not space.listed:
        raise InputError('sweep: nothing to go through; give a FILE, or --grid "--max-num-seqs 32,64,128"')
    space.constraints.extend(args.constraint)
    return space


def parse_grid(text: str) -> dict[str, list[Any]]:
    """``"--tp 1,2 --kv-cache-dtype auto,fp8"`` -> ``{"--tp": [1, 2], "--kv-cache-dtype": ["auto", "fp8"]}``.

    Raises:
        InputError: the words are no pairs of a flag and its values.
    """
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise InputError(f'--grid "{text}": {error}') from error
    flags, values = words[::2], words[1::2]
    if not words or len(words) % 2 or any(not flag.startswith(("--", "cluster.")) for flag in flags):
        raise InputError(
            f'--grid "{text}": must be a flag and its values with commas, such as "--max-num-seqs 32,64"'
        )
    return {flag: [_value(word) for word in row.split(",")] for flag, row in zip(flags, values, strict=True)}


def _value(word: str) -> Any:
    import yaml

    if word == "inf":
        return float("inf")
    try:
        value = yaml.safe_load(word)
    except yaml.YAMLError:
        return word
    return value if isinstance(value, bool | int | float) else word


class Progress:
    """A line on a terminal: rows done, failed, and the time that is left."""

    def __init__(self) -> None:
        self._started_s = time.monotonic()
        self._first: int | None = None

    def __call__(self, done: int, total: int, failed: int) -> None:
        """Show it."""
        passed_s = time.monotonic() - self._started_s
        if self._first is None:  # what was there already, but for the row that is just finished
            self._first = done - 1
        left_s = passed_s / max(done - self._first, 1) * (total - done)
        bad = f", {failed} failed" if failed else ""
        text = f"\r\033[K{done} of {total}{bad}, {int(left_s) // 60}:{int(left_s) % 60:02d} left"
        print(text, end="", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave the line empty."""
        print("\r\033[K", end="", file=sys.stderr, flush=True)
