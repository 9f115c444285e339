"""``servesim workload``: make synthetic workloads, describe workload files, convert other formats."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from servesim.cli.parts import check_apart
from servesim.errors import InputError

if TYPE_CHECKING:
    import argparse

FORMS = "VALUE, fixed:VALUE, uniform:LOW:HIGH or lognormal:MEAN:STD[:MIN:MAX]"

_NUM_REQS, _RATE, _SEED = 300, 10.0, 42
_HELP = "make, inspect and convert workload files"
_TEXT_FLAGS = ("tokenizer", "estimate_tokens", "columns")
"""Flags of a run about what is in the file."""


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Add ``workload`` with its actions to the command line."""
    parser = subparsers.add_parser("workload", help=_HELP, description=_HELP)
    actions = parser.add_subparsers(dest="action", required=True, metavar="{synth,describe,convert}")
    _add_synth(actions.add_parser("synth", help="make a workload from distributions and a seed"))
    _add_describe(
        actions.add_parser("describe", help="counts, lengths, rate and shareable prefixes of a file")
    )
    _add_convert(actions.add_parser("convert", help="write any known format as JSON lines"))


def _add_synth(parser: argparse.ArgumentParser) -> None:
    parser.description = f"Make a workload. LENGTHS and SECONDS are written {FORMS}."
    add = parser.add_argument
    add(
        "--like",
        metavar="FILE",
        help="learn lengths, burstiness, shared prefixes and sessions from a workload; beside it only "
        "--num-reqs, --duration, --rate and --seed",
    )
    add(
        "--num-reqs",
        type=int,
        default=None,
        metavar="N",
        help="requests, or sessions with --sessions (default: 300; with --like as many as the file has)",
    )
    add(
        "--duration",
        type=float,
        default=None,
        metavar="SECONDS",
        help="with --like, in place of --num-reqs: how long entries arrive",
    )
    add(
        "--rate",
        type=float,
        default=None,
        metavar="REQ/S",
        help="arrivals per second, inf: all at once (default: 10; with --like the file's own)",
    )
    add(
        "--arrival",
        default="poisson",
        metavar="PROCESS",
        help="poisson, gamma, uniform or burst (default: poisson)",
    )
    add(
        "--cv",
        type=float,
        default=2.0,
        metavar="X",
        help="coefficient of variation of gamma gaps (default: 2)",
    )
    add("--burst-size", type=int, default=10, metavar="N", help="requests that arrive together (default: 10)")
    add(
        "--input-len",
        default="lognormal:512:512:4:8192",
        metavar="LENGTHS",
        help="prompt tokens after the shared prefix; new tokens of a turn (default: %(default)s)",
    )
    add(
        "--output-len",
        default="lognormal:256:256:4:4096",
        metavar="LENGTHS",
        help="generated tokens (default: %(default)s)",
    )
    add("--prefix-groups", type=int, default=0, metavar="N", help="number of shared prefixes (default: 0)")
    add(
        "--prefix-len",
        default="fixed:256",
        metavar="LENGTHS",
        help="tokens of each prefix (default: %(default)s)",
    )
    add(
        "--prefix-share",
        type=float,
        default=1.0,
        metavar="SHARE",
        help="share of the requests or sessions that begin with a prefix (default: 1)",
    )
    add(
        "--sessions",
        action="store_true",
        help="sessions: each turn's prompt is all that came before in the session, and new tokens",
    )
    add("--turns", default="uniform:2:6", metavar="LENGTHS", help="turns of a session (default: %(default)s)")
    add(
        "--tool-time",
        default="lognormal:2:2:0:60",
        metavar="SECONDS",
        help="time between a turn's end and the next (default: %(default)s)",
    )
    add(
        "--vocab-size",
        type=int,
        default=32_000,
        metavar="N",
        help="token ids are below this (default: 32000)",
    )
    add("--seed", type=int, default=_SEED, metavar="N", help="the same seed makes the same file")
    ids = parser.add_mutually_exclusive_group()
    ids.add_argument("--ids", action="store_true", default=True, help="write token ids (default)")
    ids.add_argument(
        "--no-ids", action="store_false", dest="ids", help="no token ids: small file, nothing is shared"
    )
    add("--output", required=True, metavar="FILE", help="file to write: .jsonl or .jsonl.gz")
    parser.set_defaults(usual={action.dest: action.default for action in parser._actions})


def _add_describe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="workload in any known format")
    parser.add_argument(
        "--block-size", type=int, default=16, metavar="N", help="tokens per KV block (default: 16)"
    )
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    _add_loading(parser)


def _add_convert(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="workload in any known format")
    parser.add_argument("--output", required=True, metavar="FILE", help="file to write: .jsonl or .jsonl.gz")
    _add_loading(parser)


def _add_loading(parser: argparse.ArgumentParser) -> None:
    from servesim.specs.options import add_arguments

    parser.add_argument("--num-reqs", type=int, default=0, metavar="N", help="entries to load (default: all)")
    parser.add_argument(
        "--request-rate",
        type=float,
        default=None,
        metavar="REQ/S",
        help="rescale or replace the arrivals; inf: all at once (default: as in the file)",
    )
    parser.add_argument("--lenient", action="store_true", help="leave bad entries out and count them")
    parser.add_argument(
        "--seed", type=int, default=_SEED, metavar="N", help="of the arrivals that --request-rate makes"
    )
    add_arguments(parser, only=_TEXT_FLAGS)


def run(args: argparse.Namespace) -> int:
    """Carry out one action; returns the exit status."""
    return {"synth": _synth, "describe": _describe, "convert": _convert}[args.action](args)


def _synth(args: argparse.Namespace) -> int:
    from dataclasses import fields

    from servesim.workload.generators import SynthSpec, check_output, synthesise, write_jsonl

    check_output(args.output)
    check_apart({"--like": args.like}, {"--output": args.output})
    if args.like is not None:
        return _synth_like(args)
    if args.duration is not None:
        raise InputError(f"--duration {args.duration}: has no effect without --like")
    args.num_reqs = _NUM_REQS if args.num_reqs is None else args.num_reqs
    args.rate = _RATE if args.rate is None else args.rate
    refuse_unused(args)
    spec = SynthSpec(**{field.name: getattr(args, field.name) for field in fields(SynthSpec)})
    workload = synthesise(spec)
    write_jsonl(workload, args.output)
    print(f"{args.output}: {len(workload)} requests, seed {spec.seed}")
    return 0


_BESIDE_LIKE = ("action", "command", "like", "num_reqs", "duration", "rate", "seed", "output", "usual")


def _synth_like(args: argparse.Namespace) -> int:
    """Make a workload that is like another.

    Raises:
        InputError: a flag was given that describes what is learnt from the file.
    """
    from servesim.workload.alike import synthesise_like
    from servesim.workload.formats import load_workload
    from servesim.workload.generators import write_jsonl

    for name, value in args.usual.items():
        if name not in _BESIDE_LIKE and getattr(args, name, value) != value:
            raise InputError(f"--{name.replace('_', '-')}: is learnt from the file of --like; leave it out")
    model = load_workload(args.like)
    workload = synthesise_like(
        model, num_reqs=args.num_reqs, rate=args.rate, duration_s=args.duration, seed=args.seed
    )
    write_jsonl(workload, args.output)
    print(f"{args.output}: {len(workload)} requests like {args.like}, seed {args.seed}")
    return 0


def refuse_unused(args: argparse.Namespace) -> None:
    """
    Raises:
        InputError: a flag was given that the others leave nothing to do.
    """
    from servesim.workload.generators import parse_distribution

    no_gaps = args.rate == float("inf")
    lengths = ["input_len", "output_len", *(("turns", "tool_time") if args.sessions else ())]
    drawn = args.ids or (args.arrival in ("poisson", "gamma") and not no_gaps)
    for name in lengths:
        flag = f"--{name.replace('_', '-')}"
        drawn |= parse_distribution(getattr(args, name), flag, whole=False, least=0).kind != "fixed"
    needs = {
        "arrival": ("a finite --rate", not no_gaps),
        "cv": ("--arrival gamma", args.arrival == "gamma" and not no_gaps),
        "burst_size": ("--arrival burst", args.arrival == "burst" and not no_gaps),
        "prefix_len": ("--prefix-groups", args.prefix_groups != 0),
        "prefix_share": ("--prefix-groups", args.prefix_groups != 0),
        "turns": ("--sessions", args.sessions),
        "tool_time": ("--sessions", args.sessions),
        "vocab_size": ("token ids; leave out --no-ids", args.ids),
        "seed": ("something to draw: all of this workload is given", drawn),
    }
    for name, (what, there) in needs.items():
        value = getattr(args, name)
        if value != args.usual[name] and not there:
            raise InputError(f"--{name.replace('_', '-')} {value}: has no effect without {what}")


def _convert(args: argparse.Namespace) -> int:
    from servesim.workload.generators import check_output, write_jsonl

    check_output(args.output)
    check_apart(
        {"FILE": args.file, "--tokenizer": getattr(args, "tokenizer", None)}, {"--output": args.output}
    )
    workload = _load(args)
    write_jsonl(workload, args.output)
    skipped = f", {workload.skipped} entries left out" if workload.skipped else ""
    print(f"{args.output}: {len(workload)} requests{skipped}")
    return 0


def _describe(args: argparse.Namespace) -> int:
    from servesim.errors import InputError
    from servesim.workload.description import describe, description_text

    if args.block_size < 1:
        raise InputError(f"--block-size: {args.block_size} is not possible; must be >= 1")
    figures = describe(_load(args), args.block_size)
    if args.json:
        import json

        print(json.dumps(figures, indent=2))
    else:
        print(description_text(figures))
    return 0


def _load(args: argparse.Namespace) -> Any:
    from servesim.workload.formats import load_workload

    workload = load_workload(
        args.file,
        num_reqs=args.num_reqs,
        lenient=args.lenient,
        request_rate=args.request_rate,
        seed=args.seed,
        **{name: getattr(args, name, None) for name in _TEXT_FLAGS},
    )
    if args.seed != _SEED and not workload.drawn_arrivals:
        raise InputError(
            f"--seed {args.seed}: has no effect here: the arrivals of {args.file} are not random; leave it "
            "out"
        )
    return workload
