"""``servesim bench calibrate``: fit the host constants of a machine on a recorded run."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The action's flags."""
    from servesim.cli.bench_validate import add_run_arguments

    parser.description = (
        "Fit the two host constants of a machine (time that the engine adds to a step with a prefill "
        "chunk, and to a step of decodes alone) so that the means of TTFT, TPOT and latency come out as "
        "recorded, and write them as a hardware file. Kernel times are not touched."
    )
    add_run_arguments(parser)
    add = parser.add_argument_group("fit").add_argument
    add("-o", "--output", required=True, metavar="FILE", help="hardware file to write (YAML)")
    add(
        "--machine",
        metavar="TEXT",
        help="the host the constants belong to (default: the machine of the recording)",
    )


def run(args: argparse.Namespace) -> int:
    """Fit, write the file, and show the errors before and after."""
    from servesim.bench.agreement import METRICS
    from servesim.bench.calibrate import calibrate, calibrated_hardware, hardware_yaml
    from servesim.cli.bench_validate import run_of
    from servesim.results.atomic import atomic_write, check_writable
    from servesim.results.table import Table
    from servesim.specs.paths import bundles_from
    from servesim.terminal import screen_width

    check_writable(args.output, "--output")
    recorded = run_of(args)
    anchor = args.anchor or recorded.recording.anchors[0]
    with bundles_from(args.bundles):
        fit = calibrate(recorded, anchor)
    machine = args.machine or f"the machine of recording {recorded.recording.name}"
    hardware = calibrated_hardware(recorded, fit, anchor, machine)
    with atomic_write(args.output, "w") as handle:
        handle.write(hardware_yaml(hardware))
    engine = fit.engine
    print(
        f"{args.output}: prefill_step_overhead_us {engine.prefill_step_overhead_us:g}, "
        f"decode_step_overhead_us {engine.decode_step_overhead_us:g} ({fit.simulations} simulations)"
    )
    table = Table(["error of the mean", "before", "after"])
    for metric in METRICS:
        table.rows.append(
            [metric, f"{100 * fit.before.error(metric):+.2f} %", f"{100 * fit.after.error(metric):+.2f} %"]
        )
    print(table.plain(width=screen_width()))
    return 0
