"""``--report`` and ``--plots`` of the commands that compare, search and validate; `run` has them as
options."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

    from servesim.report.page import Page


def add_report_arguments(parser: argparse.ArgumentParser, *, plots: bool = True) -> None:
    """Add the two flags; ``plots``: also the second, where the command has none of that name."""
    # other names than those of a run's options, which the same namespace holds
    parser.add_argument(
        "--report",
        dest="page",
        metavar="PATH",
        help="figures and charts as one HTML page that needs no network",
    )
    if plots:
        parser.add_argument(
            "--plots",
            dest="images",
            metavar="DIR",
            help="the charts of --report as PNG and SVG (needs 'servesim[report]')",
        )


def check_report_arguments(args: argparse.Namespace) -> None:
    """Find out before the work that what the flags ask for can be written.

    Raises:
        InputError: it cannot.
    """
    from servesim.cli.run import check_plots
    from servesim.results.atomic import check_suffix, check_writable

    if args.page:
        check_suffix(args.page, (".html",), "--report")
        check_writable(args.page, "--report")
    if getattr(args, "images", None):
        check_plots(args.images)


def write_reports(args: argparse.Namespace, page: Callable[[], Page]) -> list[str]:
    """Write what the flags ask for; returns the paths. ``page`` makes the report, if there is need of it."""
    images = getattr(args, "images", None)
    if not (args.page or images):
        return []
    made = page()
    if args.page:
        made.save(args.page)
    if images:
        from servesim.cli.screen import tell
        from servesim.report.images import save_images

        if not save_images(made, images):
            tell(f"--plots {images}: there is nothing to draw here, so no file was written")
            images = None
    return [path for path in (args.page, images) if path]
