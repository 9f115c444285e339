"""``servesim compare``: one workload under several option sets, side by side."""

from __future__ import annotations

import shlex
import sys
from typing import TYPE_CHECKING, Any, NoReturn

from servesim.cli.parts import add_command, check_apart, check_file
from servesim.errors import InputError

if TYPE_CHECKING:
    import argparse

    from servesim.explore.compare import Comparison

_HELP = "the same workload on the same cluster under several option sets, side by side"
_EPILOG = """\
Without --set, --kv-cache-dtype auto is compared with fp8. With one --set, the flags as they are
(column "base") are compared with it; with several, the first is what the others are compared with.
Flags outside --set hold for all.

  servesim compare --set "small batch: --max-num-seqs 32" --set "large batch: --max-num-seqs 256"
"""
_NOT_COMPARED = ("itl", "log_interval", "run_id")
"""Run flags that a comparison has no use for, beside those of files."""
_NOISE = ("ensemble", "step_noise", "run_noise", "arrival_jitter")
"""Run flags that hold for all sets."""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command and its flags."""
    from argparse import BooleanOptionalAction

    from servesim.cli.reports import add_report_arguments
    from servesim.explore.compare import KV_BOUND_WORKLOAD
    from servesim.specs.options import add_arguments, output_fields

    parser = add_command(subparsers, "compare", _HELP, _EPILOG, "servesim compare [OPTIONS]")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="sets",
        metavar='"LABEL: FLAGS"',
        help="an option set: a label, a colon, and run flags; repeat for more",
    )
    parser.add_argument(
        "--json",
        nargs="?",
        const="-",
        metavar="PATH",
        help="write figures and verdict as JSON; no PATH: print them",
    )
    parser.add_argument(
        "--csv", nargs="?", const="-", metavar="PATH", help="write the table as CSV; no PATH: print it"
    )
    parser.add_argument(
        "--slo",
        nargs="+",
        metavar="METRIC:MS",
        help="bounds that decide whether a change pays: ttft, tpot, e2el in ms, P99 unless said, such as "
        "ttft:1000 tpot:p95:50; also shows the share of requests within them",
    )
    parser.add_argument(
        "--capacity-band",
        action=BooleanOptionalAction,
        default=True,
        help="where requests waited for KV blocks, run again at both ends of the estimate of the KV capacity "
        "(default: on)",
    )
    add_report_arguments(parser)
    parser.add_argument(
        "--error-band",
        action=BooleanOptionalAction,
        default=True,
        help="run every set again with kernel times at both ends of their 80 %% interval, for the band of "
        "every figure (default: on)",
    )
    add_arguments(parser, exclude=(*_NOT_COMPARED, *output_fields()))
    for action in parser._actions:
        if action.dest == "dataset":
            action.help = f"workload; its format is found by content (default: {KV_BOUND_WORKLOAD})"


def run(args: argparse.Namespace) -> int:
    """Run every option set and print the table; returns the exit status."""
    from servesim.api import without
    from servesim.cli.reports import check_report_arguments, write_reports
    from servesim.cli.screen import say, set_up_messages, tell
    from servesim.explore.compare import compare
    from servesim.explore.show import comparison_text
    from servesim.profiler.on_demand import bundles_on_demand
    from servesim.specs.options import from_namespace

    options = from_namespace(args)
    set_up_messages(options.log_level)
    sets = option_sets(args)
    check_file(args.json, (".json",), "--json")
    check_file(args.csv, (".csv",), "--csv")
    check_report_arguments(args)
    check_apart(
        {"--cluster-config": options.cluster_config, "--dataset": options.dataset},
        {"--json": args.json, "--csv": args.csv, "--report": args.page},
    )
    if args.json == args.csv == "-":
        raise InputError("--json and --csv: only one of them can be printed; give the other a path")
    with bundles_on_demand(options.auto_profile, tell):
        comparison = compare(
            sets=sets,
            options=without(options, "log_level"),
            slo=args.slo,
            capacity_band=args.capacity_band,
            error_band=args.error_band,
            before_run=_tell if sys.stderr.isatty() else None,
        )
    for name, reason in comparison.failures.items():
        print(f"error: {name}: every request was rejected: {reason}", file=sys.stderr)
    _save(comparison, args.json, args.csv)
    if args.page or args.images:
        from servesim.report.found import compare_page

        write_reports(args, lambda: compare_page(comparison))
    if args.json == "-":
        say(comparison.json_text().rstrip("\n"))
    elif args.csv == "-":
        say(comparison.csv_text().rstrip("\n"))
    else:
        say(comparison_text(comparison))
    return 1 if comparison.failures else 0


def option_sets(args: argparse.Namespace) -> dict[str, dict[str, Any]] | None:
    """The option sets of the command line: label -> the options it sets; None for the default pair.

    Raises:
        InputError: a set without label or flags, a label given twice, or a flag that no run has.
    """
    if not args.sets:
        if hasattr(args, "kv_cache_dtype"):
            raise InputError(
                f"--kv-cache-dtype {args.kv_cache_dtype}: without --set, auto is compared with fp8; to "
                'compare others, give each a set, such as --set "int8: --kv-cache-dtype int8"'
            )
        return None
    sets: dict[str, dict[str, Any]] = {"base": {}} if len(args.sets) == 1 else {}
    for text in args.sets:
        label, options = parse_set(text)
        if label in sets:
            raise InputError(f'--set "{text}": label {label!r} is taken; give every set a label of its own')
        sets[label] = options
    return sets


def parse_set(text: str) -> tuple[str, dict[str, Any]]:
    """``"large: --max-num-seqs 256"`` -> ``("large", {"max_num_seqs": 256})``.

    Raises:
        InputError: no label, or words that are no run flags.
    """
    import argparse

    from servesim.specs.options import RuntimeOptions, add_arguments

    label, colon, flags = text.partition(":")
    label = label.strip()
    if not colon or not label or label.startswith("-"):
        raise InputError(
            f'--set "{text}": a set is a label, a colon and run flags, such as '
            '"large batch: --max-num-seqs 256"'
        )

    from servesim.specs.options import output_fields

    class SetParser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise InputError(f'--set "{text}": {message}; allowed are the flags of `servesim run`')

    parser = SetParser(add_help=False, allow_abbrev=False)
    add_arguments(parser, exclude=(*_NOT_COMPARED, *_NOISE, *output_fields()))
    try:
        words = shlex.split(flags)
    except ValueError as error:
        raise InputError(f'--set "{text}": {error}') from error
    chosen = vars(parser.parse_args(words))
    return label, {name: value for name, value in chosen.items() if name in RuntimeOptions.model_fields}


def _tell(label: str) -> None:
    print(f"simulating {label} ...", file=sys.stderr)


def _save(comparison: Comparison, json_path: str | None, csv_path: str | None) -> None:
    if json_path not in (None, "-"):
        comparison.save_json(json_path)
    if csv_path not in (None, "-"):
        comparison.save_csv(csv_path)
