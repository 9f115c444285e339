"""``servesim slo``: the largest request rate, or concurrency, that keeps bounds of latencies."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from servesim.cli.parts import PRINTED, add_command, add_json, check_apart, check_file, check_plot

if TYPE_CHECKING:
    import argparse

_HELP = "the largest request rate, or concurrency, that keeps latency bounds"
_EPILOG = """\
The workload keeps its lengths and the pattern of its arrivals, which is stretched to every rate
tried. The search is repeated with the gaps between arrivals in another order until the mean is
stable, and with the kernel times longer and shorter; --effort says how long that may take. Exit
status 1: even the lowest load misses the bounds.

  servesim slo --slo ttft:p99:1000 tpot:p95:50
  servesim slo --slo ttft:1000 tpot:50 --goodput 0.95
  servesim slo --slo tpot:30 --by concurrency
"""
NOT_SEARCHED = (
    "output",
    "summary",
    "steps",
    "timeline",
    "save_result",
    "aiperf",
    "report",
    "plots",
    "itl",
    "log_interval",
    "run_id",
    "ensemble",
    "step_noise",
    "run_noise",
    "arrival_jitter",
)
"""Run flags that a search has no use for."""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command and its flags."""
    from argparse import BooleanOptionalAction

    from servesim.cli.reports import add_report_arguments
    from servesim.explore.rate_search import LEAST_PATTERNS, PATTERNS, PRECISION
    from servesim.specs.options import add_arguments

    parser = add_command(
        subparsers, "slo", _HELP, _EPILOG, "servesim slo --slo METRIC:MS [METRIC:MS ...] [OPTIONS]"
    )
    parser.add_argument(
        "--slo",
        nargs="+",
        required=True,
        metavar="METRIC:MS",
        help="bounds in ms: ttft, tpot, e2el, P99 unless said, such as ttft:1000 tpot:p95:50",
    )
    parser.add_argument(
        "--goodput",
        type=float,
        metavar="SHARE",
        help="share of the requests that keep every bound by themselves, as vllm bench serve --goodput "
        "counts them (default: the statistics of the run keep the bounds)",
    )
    parser.add_argument(
        "--by",
        choices=("rate", "concurrency"),
        default="rate",
        help="search the request rate, or the most requests in the system while all wait at the door "
        "(default: rate)",
    )
    parser.add_argument(
        "--precision",
        type=float,
        default=PRECISION,
        metavar="SHARE",
        help="relative width at which a search ends, and standard error that counts as stable (default: "
        f"{PRECISION})",
    )
    parser.add_argument(
        "--patterns",
        type=int,
        default=PATTERNS,
        metavar="N",
        help=f"most arrival patterns tried, the workload's own first; {LEAST_PATTERNS} are tried even "
        f"where the answer is stable before (default: {PATTERNS})",
    )
    parser.add_argument(
        "--kernel-error",
        action=BooleanOptionalAction,
        default=True,
        help="search again with all kernel times longer and shorter by their stated error (default: on)",
    )
    parser.add_argument(
        "--effort",
        choices=("quick", "full"),
        default="quick",
        help="quick: runs of some 3 s of processor time, and what they leave open is said; full: all "
        "patterns and the whole band, however long that takes (default: quick)",
    )
    add_json(parser)
    parser.add_argument("--plot", metavar="PATH", help="draw the curve, .png or .svg; needs matplotlib")
    add_report_arguments(parser)
    add_arguments(parser, exclude=NOT_SEARCHED)


def run(args: argparse.Namespace) -> int:
    """Search and print; returns the exit status."""
    from servesim.api import without
    from servesim.cli.reports import check_report_arguments, write_reports
    from servesim.cli.screen import say, set_up_messages, tell
    from servesim.explore.rate_search import slo
    from servesim.explore.show_limit import limit_text
    from servesim.profiler.on_demand import bundles_on_demand
    from servesim.specs.options import from_namespace

    options = from_namespace(args)
    set_up_messages(options.log_level)
    check_report_arguments(args)
    check_file(args.json, (".json",), "--json")
    check_plot(args.plot)
    check_apart(
        {"--cluster-config": options.cluster_config, "--dataset": options.dataset},
        {"--json": args.json, "--plot": args.plot, "--report": args.page},
    )
    with bundles_on_demand(options.auto_profile, tell):
        found = slo(
            bounds=args.slo,
            options=without(options, "log_level"),
            goodput=args.goodput,
            by=args.by,
            precision=args.precision,
            patterns=args.patterns,
            kernel_error=args.kernel_error,
            effort=args.effort,
            before_run=_tell if sys.stderr.isatty() else None,
        )
    if args.json not in (None, PRINTED):
        found.save_json(args.json)
    if args.plot:
        found.save_plot(args.plot)
    if args.page or args.images:
        from servesim.report.found import slo_page

        write_reports(args, lambda: slo_page(found))
    say(found.json_text().rstrip("\n") if args.json == PRINTED else limit_text(found))
    return 1 if found.load is None else 0


def _tell(what: str) -> None:
    print(f"searching: {what} ...", file=sys.stderr)
