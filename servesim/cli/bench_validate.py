"""``servesim bench validate``: simulate a recorded run and say how far off the simulation is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import argparse
    from pathlib import Path

    from servesim.bench.agreement import Agreement
    from servesim.bench.validate import RecordedRun
    from servesim.specs.hardware import HardwareSpec


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The action's flags."""
    from servesim.cli.reports import add_report_arguments

    parser.description = (
        "Simulate a recorded run with the recording's own arguments and compare: mean, median, P90, P95 and "
        "P99 of TTFT, TPOT and latency, the error of each request, throughput, and load over time."
    )
    add_run_arguments(parser)
    add = parser.add_argument_group("comparison").add_argument
    add(
        "--calibration",
        metavar="FILE",
        help="hardware file whose engine constants are used, as written by `servesim bench calibrate`",
    )
    add(
        "--margin",
        type=_margin,
        default=5.0,
        metavar="PERCENT",
        help="means that differ by less count as equal (default: 5)",
    )
    add("--json", metavar="FILE", help="every figure as JSON")
    add("--plots", metavar="DIR", help="PNG plots: CDFs, running and waiting over time, throughput")
    add_report_arguments(parser, plots=False)


def _margin(text: str) -> float:
    import argparse

    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value <= 100:
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed; must be a number above 0, up to 100")
    return value


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that say what to simulate; those of the engine are named as for ``servesim run``."""
    from servesim.specs.engine_options import EngineOptions
    from servesim.specs.options import add_arguments as add_options

    add = parser.add_argument
    add(
        "recording",
        metavar="RECORDING",
        help="folder with meta.json and requests.jsonl, or a result of `vllm bench serve --save-detailed`",
    )
    add("--cluster-config", metavar="PATH", help="cluster (default: cluster.json of the recording)")
    add(
        "--dataset",
        metavar="PATH",
        help="the workload that was sent; its token ids make prefix hits (default: lengths as recorded)",
    )
    add(
        "--arrivals",
        choices=("workload", "recording"),
        help="when requests arrive: as planned in the workload, or as recorded (default: workload if given)",
    )
    add(
        "--anchor",
        choices=("queued", "arrival"),
        help="TTFT and latency count from the engine taking the request in, or from its arrival "
        "(default: queued, where the recording says it)",
    )
    add(
        "--bundles",
        metavar="DIR",
        help="take the kernel times from here: <hardware>/<org>/<model>/<variant> below it",
    )
    add(
        "--link-unit",
        choices=("GB", "GiB"),
        default="GB",
        help="link_bw of the cluster config counts 10^9 (GB) or 2^30 (GiB) bytes per second (default: GB)",
    )
    add_options(parser, only=EngineOptions.model_fields)


def run(args: argparse.Namespace) -> int:
    """Simulate, print the comparison, write what was asked for."""
    from pathlib import Path

    from servesim.bench.validate import with_calibration
    from servesim.cli.parts import check_apart
    from servesim.cli.reports import check_report_arguments, write_reports
    from servesim.results.atomic import check_writable
    from servesim.specs.paths import bundles_from

    if args.plots:
        from servesim.results.figures import require_matplotlib

        require_matplotlib()
    if args.json:
        check_writable(args.json, "--json")
    check_report_arguments(args)
    read = {"--cluster-config": args.cluster_config, "--dataset": args.dataset}
    recording = Path(args.recording)
    parts = list(recording.iterdir()) if recording.is_dir() else [recording]
    read |= {"--calibration": args.calibration, **{f"the recording ({part})": str(part) for part in parts}}
    check_apart(read, {"--json": args.json, "--report": args.page})
    recorded = run_of(args)
    hardware = None
    if args.calibration:
        from dataclasses import replace

        hardware = read_calibration(args.calibration)
        recorded = replace(recorded, cluster=with_calibration(recorded.cluster, hardware, args.calibration))
    with bundles_from(args.bundles):
        agreement = recorded.simulate(args.anchor or recorded.recording.anchors[0])
        from servesim.bench.fit import fit_tests, fit_text, moves
        from servesim.bench.validate import comparison_text

        fit = {"tests": fit_tests(agreement, args.margin), "moves": moves(agreement)}
    print(comparison_text(recorded, agreement))
    print()
    print(fit_text(fit["tests"], fit["moves"]))
    if args.json:
        write_json(args.json, recorded, agreement, hardware, fit)
        print(f"{args.json}: every figure")
    if args.plots:
        from servesim.bench.agreement import save_plots

        for path in save_plots(agreement, args.plots):
            print(path)
    if args.page:
        from servesim.report.found import validate_page

        print(*write_reports(args, lambda: validate_page(recorded, agreement)))
    return 0


def run_of(args: argparse.Namespace) -> RecordedRun:
    """The recorded run that the arguments describe."""
    from servesim.bench.recording import load_recording
    from servesim.bench.validate import recorded_run
    from servesim.specs.options import RuntimeOptions

    own = {"cluster_config", "dataset"}
    flags = {
        name: value
        for name, value in vars(args).items()
        if name in RuntimeOptions.model_fields and name not in own
    }
    return recorded_run(
        load_recording(args.recording),
        cluster_config=args.cluster_config,
        dataset=args.dataset,
        arrivals=args.arrivals,
        flags=flags,
        link_gib=args.link_unit == "GiB",
    )


def read_calibration(path: str) -> HardwareSpec:
    """The hardware file ``path``.

    Raises:
        InputError: it is not there, or no hardware file.
    """
    from servesim.specs import paths
    from servesim.specs.hardware import HardwareSpec
    from servesim.specs.reading import read_yaml_object
    from servesim.specs.validation import validated

    found = paths.find(path, "calibration")
    return validated(HardwareSpec, {"name": found.stem, **read_yaml_object(found)}, path)


def write_json(
    path: str | Path,
    recorded: RecordedRun,
    agreement: Agreement,
    hardware: HardwareSpec | None,
    fit: dict[str, Any],
) -> None:
    """Every figure of the comparison, its tests, and what it was made with."""
    import json

    from servesim.results.atomic import atomic_write

    recording = recorded.recording
    content: dict[str, Any] = {
        "recording": recording.name,
        "engine": recording.engine,
        "model": recording.model,
        "requests": len(recording),
        "anchor": agreement.anchor,
        "arrivals": recorded.arrivals,
        "workload": recorded.workload.source,
        "cluster": recorded.cluster.model_dump(mode="json", exclude_defaults=True),
        "bundles": [instance.bundle_source for instance in agreement.result.instances],
        "calibration": hardware.model_dump(mode="json", include={"engine", "calibration"})
        if hardware
        else None,
        "options": recorded.options.model_dump(mode="json", exclude_unset=True),
        "kv_blocks": recorded.kv_blocks,
        "not_simulated": recorded.not_simulated,
        **agreement.report(),
        **fit,
    }
    with atomic_write(path, "w") as handle:
        handle.write(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
