"""``servesim profile import``: correct a bundle with whole steps that ``vllm bench forward`` measured."""

from __future__ import annotations

from typing import TYPE_CHECKING

from servesim.cli.parts import MODEL, add_formats
from servesim.cli.profile import OUTPUT_ROOT
from servesim.errors import InputError

if TYPE_CHECKING:
    import argparse

    from servesim.profiler.corrected import Correction

_HELP = "correct a bundle with whole steps that vllm bench forward measured"


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command and its flags."""

    parser = subparsers.add_parser("profile import", help=_HELP, description=_HELP, allow_abbrev=False)
    add = parser.add_argument
    add("files", nargs="+", metavar="FORWARD.json", help="what vllm bench forward --output-json wrote")
    add("--model", required=True, metavar="NAME", help=MODEL)
    add("--hardware", required=True, metavar="NAME", help="the GPU, as configs/hardware/<name>.yaml calls it")
    add_formats(parser)
    add("--tp", type=int, default=1, metavar="N", help="tensor-parallel degree (default: 1)")
    add("--measured-with", default="0.33.0", metavar="VERSION",
        help="vLLM that measured; the files do not say (default: %(default)s)")  # fmt: skip
    add(
        "--output-root",
        default=OUTPUT_ROOT,
        metavar="FOLDER",
        help="the bundle goes to FOLDER/<hardware>/<model>/<variant>/ (default: %(default)s)",
    )
    add("--force", action="store_true", help="replace a bundle that is there")


def run(args: argparse.Namespace) -> int:
    """Write the corrected bundle, and say what it covers; returns the exit status."""
    import re
    from pathlib import Path

    from servesim.api import making_bundles, read_cluster
    from servesim.profiler.bundle_writer import write_bundle
    from servesim.profiler.corrected import correct, told
    from servesim.profiler.forward import read_forward
    from servesim.results.atomic import check_creatable
    from servesim.specs.options import from_namespace

    if not 1 <= args.tp <= 1024:
        raise InputError(f"--tp: {args.tp} is not allowed; must be 1 to 1024")
    if not re.fullmatch(r"\d{1,3}\.\d{1,3}(\.\d{1,3})?", args.measured_with):
        raise InputError(f"--measured-with: {args.measured_with!r} is not allowed; must be as 0.33.0")
    check_creatable(Path(args.output_root), "--output-root")
    steps, left_out = read_forward(args.files, args.tp)
    options = from_namespace(args)
    with making_bundles(options.auto_profile):
        correction = correct(read_cluster(options), options, steps, args.measured_with)
    base = correction.base
    folder = Path(args.output_root) / base.hardware / base.model / base.variant
    if (folder / "meta.yaml").is_file() and not args.force:
        raise InputError(
            f"{folder}/: there is a bundle already; give --force to replace it, or --output-root to put the "
            "corrected one elsewhere"
        )
    write_bundle(folder, correction.content)
    print(
        "\n".join(
            [text(correction, str(folder)), *told(correction), *(f"left out {one}" for one in left_out)]
        )
    )
    return 0


def text(correction: Correction, folder: str) -> str:
    """Every step: as measured, by the bundle before, and by the new one."""
    from servesim.results.table import Table
    from servesim.terminal import screen_width

    table = Table(["case", "batch", "measured us", "before", "after", ""])
    for fit in correction.fits:
        table.rows.append(
            [
                fit.step.name,
                fit.step.batch,
                f"{fit.step.us:.1f}",
                f"{fit.error(fit.before_us):+.1%}",
                f"{fit.error(fit.after_us):+.1%}",
                "check" if fit.checks else "",
            ]
        )
    return (
        f"{folder}: tp{correction.tp} of {correction.base.folder}, corrected\n\n"
        f"{table.plain(width=screen_width())}\n"
    )
