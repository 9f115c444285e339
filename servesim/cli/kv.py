"""``servesim kv``: what each format of the KV cache buys on a model and a GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

from servesim.cli.parts import MODEL, PRINTED, add_command, add_json, check_file, check_plot, give_json
from servesim.errors import InputError

if TYPE_CHECKING:
    import argparse

_HELP = "what each KV cache format buys: bytes, tokens that fit, decode step, break-even with 16 bit"
_EPILOG = """\
  servesim kv meta-llama/Llama-3.1-8B --hardware H100
  servesim kv openai/gpt-oss-120b --hardware H100 --context 16384 --batch 16
  servesim kv deepseek-ai/DeepSeek-V3.2 --hardware H200 --tp 8 --json
"""
_FLAGS = (
    *("hardware", "tp", "dtype", "npu_memory_utilization", "max_num_seqs", "max_num_batched_tokens"),
    *("block_size", "kv_cache_dtype_skip_layers", "cudagraph", "auto_profile"),
)


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command and its flags."""
    from servesim.explore.kv_dial import DEFAULT_BATCH, DEFAULT_CONTEXT
    from servesim.specs.options import add_arguments

    parser = add_command(subparsers, "kv", _HELP, _EPILOG)
    add = parser.add_argument
    add("model", nargs="?", help=MODEL)
    add("--context", type=int, metavar="N", default=DEFAULT_CONTEXT,
        help=f"tokens in the cache of each decode (default: {DEFAULT_CONTEXT})")  # fmt: skip
    add("--batch", type=int, metavar="N", default=DEFAULT_BATCH,
        help=f"decodes of the step (default: {DEFAULT_BATCH})")  # fmt: skip
    add("--disable-hybrid-kv-cache-manager", action="store_true",
        help="only the rows of vLLM with this flag: windows are kept whole (default: both ways)")  # fmt: skip
    add("--matrix", action="store_true",
        help="of a MODEL: which GPU runs which format; without one: what models keep")  # fmt: skip
    add("--kernels", action="store_true",
        help="beside --matrix: which kernels were measured on which GPU, with which vLLM")  # fmt: skip
    add_json(parser)
    add("--plot", metavar="PATH", help="draw tokens and steps, .png or .svg; needs matplotlib")
    add_arguments(parser, only=_FLAGS)


def run(args: argparse.Namespace) -> int:
    """Print the table; returns the exit status."""
    from servesim.cli.screen import say, tell
    from servesim.cli.support import known_hardware
    from servesim.explore.kv_dial import kv_dial
    from servesim.profiler.on_demand import bundles_on_demand

    if args.matrix:
        say(_matrix(args))
        return 0
    if args.kernels:
        raise InputError("--kernels: give --matrix with it")
    if args.model is None:
        raise InputError("give a MODEL and --hardware, or --matrix for an overview")
    given = {name: getattr(args, name) for name in _FLAGS if hasattr(args, name)}
    hardware = given.pop("hardware", None)
    if hardware is None:
        raise InputError("--hardware: is missing; name a file of configs/hardware, such as H100")
    known_hardware(hardware)
    check_file(args.json, (".json",), "--json")
    check_plot(args.plot)
    with bundles_on_demand(given.get("auto_profile", True), tell):
        dial = kv_dial(
            args.model,
            hardware,
            context=args.context,
            batch=args.batch,
            hybrid=False if args.disable_hybrid_kv_cache_manager else None,
            **given,
        )
    if args.plot:
        dial.save_plot(args.plot)
    if args.json:
        give_json(args.json, dial.json_text())
    if args.json != PRINTED:
        say(dial.text())
    return 0


def _matrix(args: argparse.Namespace) -> str:
    from servesim.explore.kv_matrix import formats_text, models_text

    given = [f"--{name.replace('_', '-')}" for name in _FLAGS if hasattr(args, name)]
    given += [f"--{name}" for name in ("json", "plot") if getattr(args, name)]
    if given:
        raise InputError(f"{', '.join(given)}: no effect beside --matrix")
    if args.kernels:
        if args.model is not None:
            raise InputError(f"{args.model}: no effect beside --kernels, which is about GPUs")
        from servesim.profiler.inspection import kernels_text

        return kernels_text()
    return models_text() if args.model is None else formats_text(args.model)
