"""``servesim profile``: make a profile bundle, the kernel times of a model on a hardware."""

from __future__ import annotations

from typing import TYPE_CHECKING

from servesim.cli.parts import MODEL, add_formats
from servesim.errors import InputError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence
    from pathlib import Path

    from servesim.profiler.meter import ProfileJob
    from servesim.specs.model import ModelSpec

EXPERT_LOADS = ("balanced", "power_law_1.01", "power_law_1.2")
OUTPUT_ROOT = "profiler/perf"
_HELP = "make a profile bundle: kernel times of a model on a hardware"


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command and its flags."""
    from servesim.profiler.measure.command import add_arguments as add_measuring_arguments
    from servesim.profiler.sources import SOURCES

    parser = subparsers.add_parser("profile", help=_HELP, description=_HELP, allow_abbrev=False)
    add = parser.add_argument
    add("model", help=MODEL)
    add(
        "--hardware",
        required=True,
        metavar="NAME",
        help="names configs/hardware/<name>.yaml and the bundle's folder",
    )
    sources = "; ".join(f"{name}: {source.about}" for name, source in SOURCES.items())
    add("--source", choices=sorted(SOURCES), default="silicon", help=f"{sources} (default: silicon)")
    add_formats(parser)
    add("--tp", default="1", metavar="N,N,...", help="tensor-parallel degrees (default: 1)")
    add(
        "--max-num-batched-tokens",
        type=int,
        default=2048,
        metavar="N",
        help="largest step, in tokens, that the bundle should cover (default: %(default)s)",
    )
    add(
        "--max-num-seqs",
        type=int,
        default=256,
        metavar="N",
        help="most sequences of a step that the bundle should cover (default: %(default)s)",
    )
    add(
        "--max-kv",
        type=int,
        metavar="N",
        help="longest context that the bundle should cover, in tokens (default: 131072; measured: 16384)",
    )
    add(
        "--collectives",
        choices=("auto", "measured", "none"),
        default="auto",
        help="put all-reduces in comm.csv; a run's cluster decides whether they win over its links "
        "(default: auto: silicon puts those that were measured, roofline those over NVLink)",
    )
    add(
        "--fp8-scaling",
        choices=("tensor", "block"),
        default="tensor",
        help="silicon: scales of fp8 weights, one per tensor or one per block of 128 x 128 "
        "(default: %(default)s)",
    )
    add(
        "--expert-load",
        choices=EXPERT_LOADS,
        default=EXPERT_LOADS[0],
        help="silicon: how evenly the gate spreads tokens over experts (default: %(default)s)",
    )
    add(
        "--output-root",
        default=OUTPUT_ROOT,
        metavar="FOLDER",
        help="the bundle goes to FOLDER/<hardware>/<model>/<variant>/ and replaces what is there "
        "(default: %(default)s)",
    )
    add_measuring_arguments(parser)
    parser.set_defaults(usual={action.dest: action.default for action in parser._actions})


def run(args: argparse.Namespace) -> int:
    """Make the bundle and say where it is; returns the exit status."""
    from servesim.profiler.bundle_writer import write_bundle
    from servesim.profiler.sources import MEASURING, compute
    from servesim.results.atomic import check_creatable

    job = job_of(args)
    refuse_unused(args, job)
    check_creatable(bundle_folder(args.output_root, job), "--output-root")
    if args.source in MEASURING:
        from servesim.profiler.measure.command import measure

        return measure(args, job, bundle_folder(args.output_root, job))
    folder = bundle_folder(args.output_root, job)
    if not args.force:
        refuse_to_lose(folder, args.source, job.tp_degrees)
    try:
        content = compute(args.source, job)
    except InputError as error:
        if args.source != "silicon":
            raise
        raise InputError(f"{error}\n--source roofline computes such a bundle from peak rates") from None
    write_bundle(folder, content)
    rows = sum(len(table) for table in content.tables.values())
    degrees = ", ".join(f"tp{tp}" for tp in job.tp_degrees)
    print(f"{folder}: {degrees}, {rows} rows ({content.meta['confidence']})")
    return 0


def refuse_unused(args: argparse.Namespace, job: ProfileJob) -> None:
    """Flags that change nothing in the bundle of this source and model.

    Raises:
        InputError: one was given.
    """
    from servesim.profiler.measure.command import MEASURING_FLAGS, TORCH_FLAGS
    from servesim.profiler.sources import MEASURING

    reasons = {
        **{name: "only --source torch measures with it" for name in TORCH_FLAGS if args.source != "torch"},
        **{
            name: f"--source {args.source} measures nothing; --source torch and vllm do"
            for name in MEASURING_FLAGS
            if args.source not in MEASURING
        },
    }
    if job.dtype != "fp8":
        reasons["fp8_scaling"] = f"the weights are {job.dtype}; it is about --dtype fp8"
    elif args.source == "roofline":
        reasons["fp8_scaling"] = "the peak rates of --source roofline know no scales"
    if job.tp_degrees == (1,):
        reasons["collectives"] = "one GPU reduces nothing; it is about --tp 2 and more"
    if not job.model.is_moe:
        reasons["expert_load"] = f"{job.model.name} has no experts"
    elif args.source == "roofline":
        reasons["expert_load"] = "--source roofline takes a balanced load"
    for name, reason in reasons.items():
        value = getattr(args, name)
        if value != args.usual[name]:
            flag = "--" + name.replace("_", "-")
            told = (
                flag if value is True else f"{flag} {' '.join(value) if isinstance(value, list) else value}"
            )
            raise InputError(f"{told}: has no effect here: {reason}; leave it out")


def refuse_to_lose(folder: Path, source: str, degrees: Sequence[int]) -> None:
    """Keep a bundle that the new one would not fully replace.

    Raises:
        InputError: the bundle in ``folder`` is from another source, or has degrees beside ``degrees``.
    """
    from servesim.cost.finding import degrees_in
    from servesim.specs.reading import read_yaml_object

    meta = folder / "meta.yaml"
    if not meta.is_file():
        return
    there = read_yaml_object(meta).get("source", "vllm")
    lost = sorted({*degrees_in(folder)} - {*degrees})
    if there == source and not lost:
        return
    what = (
        f"it is from source {there}" if there != source else f"tp {', '.join(map(str, lost))} would be lost"
    )
    raise InputError(
        f"{folder}/: there is a bundle already and {what}; give --force to replace it, --output-root to put "
        "the new one elsewhere, or all degrees in --tp"
    )


def job_of(args: argparse.Namespace) -> ProfileJob:
    """The checked command line.

    Raises:
        InputError: a number is out of range, or the model or its architecture is unknown.
    """
    from servesim.profiler.meter import ProfileJob
    from servesim.profiler.sources import MEASURING
    from servesim.specs.block_layers import architecture_of
    from servesim.specs.hardware import load_hardware
    from servesim.specs.model import load_model

    limits = {"max_num_batched_tokens": 1 << 20, "max_num_seqs": 1 << 16, "max_kv": 1 << 24}
    if args.max_kv is None:
        args.max_kv = 16384 if args.source in MEASURING else 131072
    for name, most in limits.items():
        given = getattr(args, name)
        if not 16 <= given <= most:
            flag = "--" + name.replace("_", "-")
            raise InputError(f"{flag}: {given} is not allowed; must be 16 to {most}")
    model = _with_skipped(load_model(args.model), args)
    return ProfileJob(
        model=model,
        architecture=architecture_of(model),
        hardware=load_hardware(args.hardware),
        dtype=args.dtype or model.torch_dtype,
        kv_cache_dtype=model.kv_word(args.kv_cache_dtype),
        tp_degrees=parse_degrees(args.tp),
        max_num_batched_tokens=args.max_num_batched_tokens,
        max_num_seqs=args.max_num_seqs,
        max_kv=args.max_kv,
        collectives=args.collectives,
        fp8_scaling=args.fp8_scaling,
        expert_load=args.expert_load,
    )


def _with_skipped(model: ModelSpec, args: argparse.Namespace) -> ModelSpec:
    """The model with layers left out of the KV format, those among them that the format leaves out itself.

    Raises:
        InputError: a word is wrong, or names nothing that could be left out.
    """
    from servesim.specs.dtypes import resolve_kv_dtype
    from servesim.specs.kv_skip import OPTION, as_kept, skip_words, skipped_layers

    try:
        words = skip_words(args.kv_cache_dtype_skip_layers)
    except ValueError as error:
        raise InputError(f"{OPTION}: {error}") from None
    kv_format = model.kv_word(args.kv_cache_dtype)
    told = None if words is None else str(words)
    skipped = skipped_layers(model.layers, told, kv_format)
    if told and skipped == skipped_layers(model.layers, None, kv_format):
        raise InputError(
            f"{OPTION} {told}: has no effect with --kv-cache-dtype {args.kv_cache_dtype}; leave it out"
        )
    return as_kept(model, skipped, resolve_kv_dtype(args.dtype or model.torch_dtype, "auto"))


def parse_degrees(text: str) -> tuple[int, ...]:
    """``1,2,4`` (or separated by spaces) as rising degrees without repeats."""
    words = text.replace(",", " ").split()
    if not words or not all(word.isdecimal() and 1 <= int(word) <= 1024 for word in words):
        raise InputError(f"--tp: {text!r} is not allowed; give whole numbers such as 1,2,4")
    return tuple(sorted({int(word) for word in words}))


def bundle_folder(root: str, job: ProfileJob) -> Path:
    """``<root>/<hardware>/<model>/<variant>``, the model by :func:`servesim.specs.shape.bundle_label`."""
    from pathlib import Path

    from servesim.specs.shape import bundle_label

    return Path(root) / job.hardware.name / bundle_label(job.model) / job.variant
