"""``servesim plan``: the cheapest fleet that keeps latency bounds for a workload."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from servesim.cli.parts import add_command, check_apart
from servesim.errors import InputError

if TYPE_CHECKING:
    from servesim.specs.options import RuntimeOptions

_HELP = "the cheapest fleet that keeps latency bounds for a workload"
_EPILOG = """\
Fleets are GPUs x instances x parallel degrees x prefill and decode instances x formats x engine
limits. FILE is YAML with model, slo, goodput, workload, rates, fleet, max_gpus, objective, prices
and options; flags win over it. Exit status 1: no fleet keeps the bounds.

  servesim plan --slo ttft:p99:1000 tpot:p95:50 --max-gpus 8
  servesim plan --slo ttft:1000 --grid "--hardware H100,L40S --tp 1,2" --output outputs/plan
  servesim plan day.yaml --objective energy
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command and its flags."""
    from servesim.cli.reports import add_report_arguments
    from servesim.cli.slo import NOT_SEARCHED
    from servesim.explore.fleet import NOT_HERE, OBJECTIVES
    from servesim.specs.options import add_arguments

    parser = add_command(subparsers, "plan", _HELP, _EPILOG, "servesim plan [FILE] [OPTIONS]")
    add = parser.add_argument
    add("file", nargs="?", metavar="FILE", help="what is asked, YAML")
    add("--model", dest="served", metavar="NAME", help="what is served (default: meta-llama/Llama-3.1-8B)")
    add("--slo", nargs="+", metavar="METRIC:MS", help="bounds in ms, as for servesim slo")
    add(
        "--goodput",
        type=float,
        metavar="SHARE",
        help="share of the requests that keep every bound by themselves",
    )
    add(
        "--rates",
        metavar="R,R,...",
        help="requests per second in every hour; the fleet serves the highest (default: the workload's own)",
    )
    add(
        "--grid",
        action="append",
        default=[],
        metavar='"FLAG A,B,..."',
        help="choices: --hardware, --replicas, --tp, --pp, --experts, --prefill-share, --dtype, "
        "--kv-cache-dtype, --max-num-seqs, --max-num-batched-tokens",
    )
    add("--max-gpus", type=int, metavar="N", help="GPUs of a fleet at most (default: 16)")
    add("--objective", choices=OBJECTIVES, help="what is best (default: cost)")
    add("--prices", metavar="FILE", help="price file, YAML (default: configs/prices/examples.yaml)")
    add(
        "--exhaustive",
        action="store_true",
        help="run every candidate on the whole workload; finds the same, later",
    )
    add(
        "--output",
        dest="folder",
        metavar="FOLDER",
        help="write fleet.json (a cluster config), serve.sh (vllm serve lines), plan.json, candidates.csv",
    )
    add("--json", action="store_true", help="print everything as JSON")
    add_report_arguments(parser)
    add_arguments(parser, exclude=(*NOT_SEARCHED, *NOT_HERE))


def run(args: argparse.Namespace) -> int:
    """Search, write and print; returns the exit status."""
    from servesim.api import without
    from servesim.cli.reports import check_report_arguments, write_reports
    from servesim.cli.screen import say, set_up_messages
    from servesim.explore.fleet_space import question_of
    from servesim.explore.plan import plan
    from servesim.explore.plan_result import FILES
    from servesim.results.atomic import check_creatable
    from servesim.specs.options import from_namespace

    options: RuntimeOptions = from_namespace(args)
    set_up_messages(options.log_level)
    check_report_arguments(args)
    if args.folder:
        check_creatable(Path(args.folder), "--output")
        made = {f"--output ({name})": str(Path(args.folder, name)) for name in FILES}
        read = {"FILE": args.file, "--dataset": options.dataset, "--prices": args.prices}
        check_apart(read, {**made, "--report": args.page})
    question = question_of(_described(args), args.file or "plan")
    found = plan(
        question,
        without(options, "log_level"),
        prune=not args.exhaustive,
        progress=_tell if sys.stderr.isatty() else None,
    )
    written = [str(path) for path in found.save(args.folder)] if args.folder else []
    if args.page or args.images:
        from servesim.report.found import plan_page

        written += write_reports(args, lambda: plan_page(found))
    say(found.json_text().rstrip("\n") if args.json else found.text())
    if written and not args.json:
        say(f"written        {', '.join(written)}")
    return 0 if found.best else 1


def _described(args: argparse.Namespace) -> dict[str, Any]:
    """The file, and what the flags say over it."""
    from servesim.cli.sweep import parse_grid
    from servesim.explore.fleet_space import read_question

    described = read_question(args.file) if args.file else {}
    fleet = dict(described.get("fleet") or {})
    for text in args.grid:
        for flag, values in parse_grid(text).items():
            fleet[flag.removeprefix("--").replace("-", "_")] = values
    said = {name: getattr(args, name) for name in ("goodput", "max_gpus", "objective", "prices")}
    said["model"] = args.served
    if args.slo:
        said["slo"] = " ".join(args.slo)
    if args.rates:
        try:
            said["rates"] = [float(word) for word in args.rates.split(",")]
        except ValueError:
            raise InputError(
                f"--rates: {args.rates!r} is not allowed; must be numbers with commas, such as 2,5.5,3"
            ) from None
    return {**described, **{name: value for name, value in said.items() if value is not None}, "fleet": fleet}


def _tell(what: str) -> None:
    print(f"\r\033[K{what}", end="", file=sys.stderr, flush=True)
