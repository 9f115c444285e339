"""``servesim support``: is there a bundle, how far does it reach, how far to trust it, how to make one."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from servesim.cli.parts import MODEL, add_command, add_formats
from servesim.errors import InputError

if TYPE_CHECKING:
    import argparse

    from servesim.profiler.support import Answer, FoundBundle
    from servesim.specs.hardware import HardwareSpec

_HELP = "what can be simulated: bundles that are there, how far to trust them, how to make others"
_EPILOG = """\
Exit status 0 when there is a bundle or one can be made on this machine, 1 when neither.

  servesim support meta-llama/Llama-3.1-8B --hardware H100 --kv-cache-dtype fp8
  servesim support --matrix
"""
_OWN_MODELS = "servesim/"
"""Toy models for measuring on a CPU; the matrix leaves them out."""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command and its flags."""
    parser = add_command(subparsers, "support", _HELP, _EPILOG)
    add = parser.add_argument
    add("model", nargs="?", help=MODEL)
    add("--hardware", metavar="NAME", help="names configs/hardware/<name>.yaml and the bundles' folder")
    add_formats(parser, None, skip_layers=False)
    add(
        "--tp",
        type=int,
        metavar="N",
        help="tensor-parallel degree (default: 1; of the matrix: any of 1, 2, 4 and 8)",
    )
    add("--max-num-batched-tokens", type=int, metavar="N", help="largest step, in tokens (default: 2048)")
    add("--max-num-seqs", type=int, metavar="N", help="most sequences of a step (default: 128)")
    add("--max-context", type=int, metavar="N", help="longest context, in tokens (default: the model's)")
    add(
        "--matrix",
        action="store_true",
        help="every model on every hardware in four variants; a MODEL or --hardware keeps its row or column",
    )
    add("--json", action="store_true", help="print everything as JSON")


def run(args: argparse.Namespace) -> int:
    """Print the answer; returns the exit status."""
    check(args)
    if args.matrix:
        answers = matrix(args)
    elif args.model is None or args.hardware is None:
        raise InputError("give a MODEL and --hardware, or --matrix for an overview of all")
    else:
        answers = [single(args)]
    if args.json:
        print(json_text(answers))
    elif args.matrix:
        print(matrix_text(answers, args.tp))
    else:
        print(single_text(answers[0]))
    return 0 if any(answer.usable for answer in answers) else 1


def check(args: argparse.Namespace) -> None:
    """Refuse numbers below 1, and what a matrix of all variants cannot follow.

    Raises:
        InputError: one of them.
    """
    for name in ("tp", "max_num_batched_tokens", "max_num_seqs", "max_context"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')}: {value} is not allowed; must be at least 1")
    for name in ("dtype", "kv_cache_dtype", "max_num_batched_tokens", "max_num_seqs", "max_context"):
        if args.matrix and getattr(args, name) is not None:
            raise InputError(
                f"--{name.replace('_', '-')}: has no effect with --matrix, which shows four variants and no "
                "ranges; leave it out, or give a MODEL and --hardware without --matrix"
            )


def single(args: argparse.Namespace) -> Answer:
    """What there is for the model and hardware of the command line."""
    from servesim.profiler.meter import ProfileJob
    from servesim.profiler.support import answer
    from servesim.specs.block_layers import architecture_of
    from servesim.specs.model import load_model

    model = load_model(args.model)
    job = ProfileJob(
        model=model,
        architecture=architecture_of(model),
        hardware=known_hardware(args.hardware),
        dtype=args.dtype or model.torch_dtype,
        kv_cache_dtype=model.kv_word(args.kv_cache_dtype or "auto"),
        tp_degrees=(args.tp or 1,),
    )
    context = args.max_context or model.max_position_embeddings
    tokens, sequences = args.max_num_batched_tokens or 2048, args.max_num_seqs or 128
    asked = {
        "tokens": tokens,
        "sequences": sequences,
        "chunk": tokens,
        "history": context,
        "decodes": sequences,
        "decode KV": context,
    }
    return answer(job, asked)


def known_hardware(name: str) -> HardwareSpec:
    """The hardware of a file, or one that has bundles.

    Raises:
        InputError: neither a file nor a bundle knows the name.
    """
    from servesim.specs import paths
    from servesim.specs.hardware import load_hardware
    from servesim.specs.validation import hint

    files = [path.stem for path in paths.find_all("configs/hardware/*.yaml")]
    bundles = {path.name for path in paths.find_all("profiler/perf/*")}
    if name not in files and name not in bundles:
        raise InputError(
            f"--hardware: {name!r} has neither configs/hardware/{name}.yaml nor a bundle; "
            f"{hint(name, sorted({*files, *bundles}))} Any accelerator can be tried by writing such a file"
        )
    return load_hardware(name)


def matrix(args: argparse.Namespace) -> list[Answer]:
    """Every model on every hardware file in the four variants, one GPU's kernel tables after the other's."""
    from servesim.profiler.meter import ProfileJob
    from servesim.profiler.support import DEGREES, VARIANTS, best_answer
    from servesim.specs import paths
    from servesim.specs.block_layers import architecture_of
    from servesim.specs.hardware import load_hardware
    from servesim.specs.model import known_models, load_model
    from servesim.specs.runnable import why_not_simulated

    names = [args.model] if args.model else [m for m in known_models() if not m.startswith(_OWN_MODELS)]
    models = [load_model(name) for name in names]
    files = [path.stem for path in paths.find_all("configs/hardware/*.yaml")]
    hardware = [known_hardware(args.hardware)] if args.hardware else [load_hardware(name) for name in files]
    if not args.model:
        models = [model for model in models if why_not_simulated(model) is None]
    architectures = [architecture_of(model) for model in models]
    answers = []
    for accelerator in hardware:
        if sys.stderr.isatty():
            print(f"looking at {accelerator.name} ...", file=sys.stderr)
        for variant in VARIANTS:
            for model, architecture in zip(models, architectures, strict=True):
                job = ProfileJob(model, architecture, accelerator, *variant)
                answers.append(best_answer(job, (args.tp,) if args.tp else DEGREES))
    return answers


def matrix_text(answers: list[Answer], tp: int | None = None) -> str:
    """Models down, hardware across; a cell has one letter for each variant, of ``tp`` or any degree."""
    from servesim.profiler.support import DEGREES, variant_letters
    from servesim.results.table import Table
    from servesim.terminal import screen_width

    hardware = list(dict.fromkeys(answer.hardware for answer in answers))
    models = list(dict.fromkeys(answer.model for answer in answers))
    cells: dict[tuple[str, str], str] = {}
    for answer in answers:
        at = (answer.model, answer.hardware)
        cells[at] = cells.get(at, "") + answer.letter
    table = Table(["model", *hardware])
    table.rows += [[model, *(cells[model, name] for name in hardware)] for model in models]
    there = sum(answer.letter.isupper() for answer in answers)
    made = sum(answer.letter in "srp" for answer in answers)
    lines = [
        table.plain(width=screen_width()),
        "",
        f"One letter for each of {', '.join(variant_letters())} at tp {tp or words_of(DEGREES)}.",
        "M measured, S silicon (derived from public kernel measurements), R roofline (computed).",
        "Capitals: the bundle is there. Small: a run makes it in seconds. -: neither.",
        "x: the weights do not fit. p: silicon, once the package below is installed; until then roofline.",
        f"{len(models)} models on {len(hardware)} hardware: {there} bundles there, {made} more can be made.",
    ]
    unusable = {way.about for answer in answers for way in answer.ways if "pip install" in way.about}
    no_fit = sum(answer.letter == "x" for answer in answers)
    if no_fit:
        lines.append(f"{no_fit} do not fit the memory.")
    if sizes_alone := models_of_sizes_alone():
        lines.append(
            f"{len(sizes_alone)} further models load and cannot be simulated yet: {', '.join(sizes_alone)}."
        )
    return "\n".join([*lines, *sorted(unusable)])


def models_of_sizes_alone() -> list[str]:
    """Shipped models whose sizes are known and whose steps are not."""
    from servesim.specs.model import known_models, load_model
    from servesim.specs.runnable import why_not_simulated

    return [name for name in known_models() if why_not_simulated(load_model(name)) is not None]


def words_of(degrees: tuple[int, ...]) -> str:
    """``1, 2 or 4``."""
    return f"{', '.join(map(str, degrees[:-1]))} or {degrees[-1]}"


def single_text(answer: Answer) -> str:
    """The answer in full."""
    lines = [f"{answer.model} on {answer.hardware}, {answer.variant}, tp {answer.tp}"]
    if answer.bundle is None:
        lines.append("bundle        none")
    else:
        lines += bundle_lines(answer.bundle)
    if answer.no_fit:
        lines.append(f"does not fit  {answer.no_fit}")
    if answer.problem:
        lines.append(f"problem       {answer.problem}")
    for way in answer.ways:
        lines.append(f"{way.source:<12}  {'can be made: ' if way.possible else 'not possible: '}{way.about}")
        if way.possible:
            lines.append(f"{'':<14}{way.command}")
    lines.append(f"{'torch, vllm':<12}  measure on a machine that has it: servesim profile --help")
    return "\n".join(lines)


def bundle_lines(bundle: FoundBundle) -> list[str]:
    """Where a bundle is from and how far it reaches."""
    origin = ", ".join(filter(None, [bundle.source, *bundle.versions, bundle.gpu]))
    lines = [
        f"bundle        {bundle.folder} ({bundle.place})",
        f"source        {origin}",
        f"trust         {bundle.confidence or 'measured; the bundle states no confidence'}",
        f"error         {bundle.error}",
        *(f"  {name}: {claim}" for name, claim in bundle.tables.items()),
        f"degrees       {', '.join(f'tp{tp}' for tp in bundle.degrees)}",
    ]
    if bundle.ranges:
        ranges = ", ".join(f"{name} {first}-{last}" for name, (first, last) in bundle.ranges.items())
        lines.append(f"ranges        {ranges}")
        lines.append(f"extrapolated  {', '.join(bundle.extrapolated) or 'nothing of what was asked'}")
    return lines


def json_text(answers: list[Answer]) -> str:
    """A list of the answers, each with its letter."""
    import json
    from dataclasses import asdict

    listed: list[dict[str, Any]] = [{**asdict(answer), "letter": answer.letter} for answer in answers]
    return json.dumps(listed, indent=1, ensure_ascii=False)
