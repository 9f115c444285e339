"""``servesim profile diff``: how far two bundles are apart, table by table."""

from __future__ import annotations

from typing import TYPE_CHECKING

from servesim.errors import InputError

if TYPE_CHECKING:
    import argparse

    from servesim.profiler.difference import TableDifference

_HELP = "how far two bundles are apart: relative differences of B from A, table by table"


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command and its flags."""
    parser = subparsers.add_parser("profile diff", help=_HELP, description=_HELP, allow_abbrev=False)
    add = parser.add_argument
    add(
        "base",
        metavar="A",
        help="a bundle's folder, or <hardware>/<org>/<model>/<variant>: what is compared with",
    )
    add("other", metavar="B", help="the other bundle")
    add("--tp", type=int, metavar="N", help="only this tensor-parallel degree (default: all that both have)")
    add("--json", action="store_true", help="print the differences as JSON")


def run(args: argparse.Namespace) -> int:
    """Print the differences; returns the exit status."""
    from servesim.cost.finding import degrees_in
    from servesim.profiler.difference import differences
    from servesim.profiler.inspection import open_bundle

    base, other = open_bundle(args.base), open_bundle(args.other)
    there, here = degrees_in(base.folder), degrees_in(other.folder)
    common = sorted({*there} & {*here})
    if args.tp is not None:
        common = [tp for tp in common if tp == args.tp]
    if not common:
        raise InputError(f"{base.folder} has degrees {there}, {other.folder} has {here}: none to compare")
    found = [row for tp in common for row in differences(base, other, tp)]
    if args.json:
        import json
        from dataclasses import asdict

        print(json.dumps([asdict(row) for row in found], indent=1))
        return 0
    print(f"A  {base.describe()}\nB  {other.describe()}\n\n{text(found)}")
    return 0


def text(found: list[TableDifference]) -> str:
    """One line a table and layer; differences are B / A - 1."""
    from servesim.results.table import Table
    from servesim.terminal import screen_width

    table = Table(
        ["table", "points", "outside", "median", "|median|", "|P95|", "worst", "A us", "B us", "where"]
    )
    tp = None
    for row in found:
        if tp not in (None, row.tp):
            table.rows.append(None)
        tp = row.tp
        table.rows.append(
            [
                f"tp{row.tp} {row.table}",
                str(row.points),
                str(row.outside),
                f"{row.signed_median:+.1%}",
                f"{row.median:.1%}",
                f"{row.p95:.1%}",
                f"{row.worst:+.1%}",
                f"{row.base_us:.1f}",
                f"{row.other_us:.1f}",
                row.where,
            ]
        )
    return table.plain(width=screen_width())
