"""The flags of ``servesim profile`` that concern measuring, and what they set in motion."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from servesim.errors import InputError
from servesim.profiler.shots import CATEGORIES

if TYPE_CHECKING:
    import argparse
    from pathlib import Path

    from servesim.profiler.measure.grid import SweepGrid
    from servesim.profiler.meter import Meter, ProfileJob


TORCH_FLAGS = ("device", "attention", "warm_cache", "cuda_graphs", "kv_memory_gib", "threads")
"""Flags of --source torch alone, by the names of their values."""
MEASURING_FLAGS = (
    *("only", "budget_s", "iterations", "no_skew"),
    *("chunk_factor", "decode_factor", "kv_factor", "token_factor", "skew_factor"),
)
"""Flags of both measuring sources; ``--force`` is everybody's."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of both measuring sources, and those of one alone."""
    group = parser.add_argument_group("measuring (--source torch or vllm)")
    add = group.add_argument
    add(
        "--only",
        action="append",
        choices=CATEGORIES,
        metavar="TABLE",
        help=f"measure only {', '.join(CATEGORIES)}",
    )
    add(
        "--force",
        action="store_true",
        help="measure again what is there (default: measure what is missing); "
        "replace a bundle of another source",
    )
    add(
        "--budget-s",
        type=float,
        metavar="SECONDS",
        help="coarsen the grid until the sweep should take no longer",
    )
    add(
        "--iterations",
        type=int,
        default=5,
        metavar="N",
        help="rounds of a shot; the median counts (default: 5)",
    )
    for axis, what in (
        ("chunk", "prefill chunks"),
        ("decode", "numbers of decodes"),
        ("kv", "KV lengths and histories"),
    ):
        add(f"--{axis}-factor", type=float, default=2.0, metavar="F", help=f"growth of {what} (default: 2)")
    add(
        "--token-factor",
        type=float,
        metavar="F",
        help="growth of token counts (default: the kernels' own steps)",
    )
    add(
        "--skew-factor",
        type=float,
        default=2.0,
        metavar="F",
        help="growth of the skew sweep's axes (default: 2)",
    )
    add("--no-skew", action="store_true", help="leave out the sweep of decodes of unequal length")
    torch_only = parser.add_argument_group("measuring with --source torch").add_argument
    torch_only(
        "--device", choices=("auto", "cuda", "cpu"), default="auto", help="where to measure (default: auto)"
    )
    torch_only("--attention", choices=("auto", "flashinfer", "sdpa"), default="auto", help="attention kernel")
    torch_only(
        "--warm-cache",
        action="store_true",
        help="reuse the same buffers (default: weights and KV from memory)",
    )
    torch_only("--cuda-graphs", action="store_true", help="replay every shot as a CUDA graph")
    torch_only(
        "--kv-memory-gib", type=float, metavar="GIB", help="memory for the KV pool (default: what is free)"
    )
    torch_only("--threads", type=int, metavar="N", help="CPU threads (default: PyTorch's own choice)")


def measure(args: argparse.Namespace, job: ProfileJob, folder: Path) -> int:
    """Measure the bundle and say where it is; returns the exit status.

    Raises:
        InputError: a flag is out of range, or the source cannot work here.
    """
    from servesim.profiler.measure.bundle import measure_bundle
    from servesim.profiler.measure.work_folder import MeasureOptions
    from servesim.profiler.sources import check

    check(args.source, job)
    grid = grid_of(args, job)
    only = tuple(name for name in CATEGORIES if not args.only or name in args.only)
    if "moe" in (args.only or ()) and not job.model.is_moe:
        raise InputError(f"--only moe: {job.model.name} has no experts")
    if args.budget_s is not None and not args.budget_s > 0:
        raise InputError(f"--budget-s {args.budget_s:g}: is not allowed; must be above 0")
    meter = open_meter(args, job)
    try:
        options = MeasureOptions(args.force, only, args.budget_s)
        report = measure_bundle(job, grid, meter, folder, options, sys.stderr)
    finally:
        meter.close()
    degrees = ", ".join(f"tp{tp}" for tp in job.tp_degrees)
    print(f"{folder}: {degrees}, {report.measured} rows measured, {report.kept} kept, {report.seconds:.1f} s")
    return 0


def grid_of(args: argparse.Namespace, job: ProfileJob) -> SweepGrid:
    """The grid of the command line."""
    from servesim.profiler.measure.grid import SweepGrid

    return SweepGrid(
        job.max_num_batched_tokens,
        job.max_num_seqs,
        job.max_kv,
        chunk_factor=args.chunk_factor,
        decode_factor=args.decode_factor,
        kv_factor=args.kv_factor,
        token_factor=args.token_factor,
        skew_factor=None if args.no_skew else args.skew_factor,
    )


def open_meter(args: argparse.Namespace, job: ProfileJob) -> Meter:
    """The measuring source of the command line, ready to work.

    Raises:
        NotSupportedError: what it needs (PyTorch, vLLM, a GPU) is not there, or cannot do the format.
    """
    from servesim.profiler.sources import SOURCES

    meter = SOURCES[args.source].meter
    if args.source != "torch":
        return meter(job, iterations=args.iterations)
    from servesim.profiler.torch_source.device import open_device

    device = open_device(
        args.device,
        iterations=args.iterations,
        cold=not args.warm_cache,
        graphs=args.cuda_graphs,
        threads=args.threads,
    )
    return meter(device, job, attention=args.attention, kv_memory_gib=args.kv_memory_gib)
