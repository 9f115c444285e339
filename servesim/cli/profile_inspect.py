"""``servesim profile inspect``: what a bundle holds, as text and as plots."""

from __future__ import annotations

from typing import TYPE_CHECKING

from servesim.errors import InputError

if TYPE_CHECKING:
    import argparse

    from servesim.cost.bundle import Bundle

_HELP = "what a bundle holds: where it is from, and its times at telling points"


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command and its flags."""
    parser = subparsers.add_parser("profile inspect", help=_HELP, description=_HELP, allow_abbrev=False)
    add = parser.add_argument
    add("bundle", help="a bundle's folder, or <hardware>/<org>/<model>/<variant> below profiler/perf")
    add("--tp", type=int, metavar="N", help="tensor-parallel degree (default: the smallest there is)")
    add("--plots", metavar="FOLDER", help="also draw dense.png, attention.png and moe.png there")


def run(args: argparse.Namespace) -> int:
    """Print the tables; returns the exit status."""
    from pathlib import Path

    from servesim.cli.run import check_plots
    from servesim.profiler.inspection import open_bundle, overview
    from servesim.terminal import screen_width

    if args.plots:
        check_plots(args.plots)
    bundle = open_bundle(args.bundle)
    tp = chosen_degree(bundle, args.tp)
    tables = bundle.tables(tp)
    print("\n".join(heading(bundle)))
    for title, table in overview(tables).items():
        print(f"\ntp{tp} {title}\n{table.plain(width=screen_width())}")
    if args.plots:
        from servesim.profiler.bundle_plots import save_plots

        name = f"{bundle.hardware} {bundle.model} {bundle.variant}, tp {tp}"
        for path in save_plots(tables, name, Path(args.plots)):
            print(f"wrote {path}")
    return 0


def chosen_degree(bundle: Bundle, asked: int | None) -> int:
    """The degree asked for, else the smallest.

    Raises:
        InputError: the bundle does not have it.
    """
    from servesim.cost.finding import degrees_in

    there = degrees_in(bundle.folder)
    if not there:
        raise InputError(f"{bundle.folder}: there is no tp<N> folder; the bundle is incomplete")
    if asked is not None and asked not in there:
        listed = ", ".join(map(str, there))
        raise InputError(f"--tp: {asked} is not allowed; {bundle.folder} has {listed}")
    return there[0] if asked is None else asked


def heading(bundle: Bundle) -> list[str]:
    """What the bundle says about itself."""
    from servesim.cost.finding import degrees_in

    lines = [bundle.describe(), f"degrees: {', '.join(map(str, degrees_in(bundle.folder)))}"]
    claims = bundle.meta.get("tables")
    if isinstance(claims, dict):
        lines += [f"  {name}: {claim}" for name, claim in claims.items()]
    return lines
