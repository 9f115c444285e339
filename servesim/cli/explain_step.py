"""``servesim explain-step``: what one step costs, layer by layer, and where the numbers come from."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from servesim.errors import InputError

if TYPE_CHECKING:
    import argparse

    from servesim.cost.batch_shape import Shape
    from servesim.cost.terms import LayerCost
    from servesim.engine.pricing import StepPricing
    from servesim.specs.cluster import InstanceSpec

_HELP = "what one step costs, layer by layer, and where the numbers come from"
_FLAGS = (
    *("cluster_config", "hardware", "model", "tp", "dtype", "kv_cache_dtype"),
    *("max_num_seqs", "max_num_batched_tokens", "cudagraph", "auto_profile", "expert_routing_policy"),
    *("enable_local_offloading", "enable_attn_offloading", "enable_sub_batch_interleaving"),
    *("decode_context_parallel_size", "dcp_comm_backend"),
)


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command and its flags."""
    from servesim.specs.options import add_arguments

    parser = subparsers.add_parser("explain-step", help=_HELP, description=_HELP, allow_abbrev=False)
    add_arguments(parser, only=_FLAGS)
    step = parser.add_argument_group("the step")
    add = step.add_argument
    add("--instance", type=int, default=0, metavar="N", help="which instance of the cluster, from 0")
    add(
        "--chunks",
        default="",
        metavar="TOKENS@HISTORY,...",
        help="prefill chunks, and the tokens that each has in the cache: 512@0,256@1024",
    )
    add("--decodes", type=int, default=0, metavar="N", help="sequences that decode one token")
    add("--kv", type=int, default=0, metavar="N", help="mean KV length of the decodes, in tokens")
    add(
        "--kv-max",
        type=int,
        metavar="N",
        help="greatest KV length of the decodes, in tokens (default: all are equal)",
    )
    add(
        "--kv-min",
        type=int,
        metavar="N",
        help="least KV length of the decodes, in tokens (default: as far below the mean)",
    )


def run(args: argparse.Namespace) -> int:
    """Print the table; returns the exit status."""
    from servesim.cli.screen import tell
    from servesim.cost.batch_shape import Shape
    from servesim.engine.build import step_pricing
    from servesim.profiler.on_demand import bundles_on_demand
    from servesim.specs.cluster_changes import cluster_of
    from servesim.specs.conditions import EAGER
    from servesim.specs.options import from_namespace

    chunks = parse_chunks(args.chunks)
    kv_sum, kv_min, kv_max = decode_lengths(args.decodes, args.kv, args.kv_min, args.kv_max)
    if not chunks and not args.decodes:
        raise InputError("the step is empty; give --chunks 512@0, --decodes 32 --kv 1000, or both")
    if not args.decodes and (args.kv or args.kv_min or args.kv_max):
        raise InputError("--kv, --kv-min and --kv-max have no effect without --decodes")
    options = from_namespace(args)
    cluster = cluster_of(options)
    if not 0 <= args.instance < len(cluster.instances):
        raise InputError(
            f"--instance: {args.instance} is not allowed; must be 0 to {len(cluster.instances) - 1}"
        )
    with bundles_on_demand(options.auto_profile, tell):
        pricing = step_pricing(cluster, options, args.instance)
    lengths = each_length(args.decodes, kv_sum, kv_min, kv_max)
    batch = Shape(tuple(chunks), args.decodes, kv_sum, kv_min, kv_max, lengths)
    instance = cluster.instances[args.instance][1]
    print(_head(pricing, batch, instance))
    if not (options.cudagraph if instance.cudagraph is None else instance.cudagraph):
        print(f"warning: without CUDA graphs, {EAGER}")
    stages = pricing.stages(batch)
    for number, lines in enumerate(stages):
        if len(stages) > 1:
            print(f"\nstage {number}")
        print(table(lines))
    ns = round(pricing.us(batch) * 1000)
    tokens, sequences = args.decodes + sum(c for c, _ in chunks), args.decodes + len(chunks)
    print(f"\n{tokens} tokens, {sequences} sequences: {ns} ns = {ns / 1e6:.3f} ms")
    if len(stages) > 1:
        slowest = max(sum(line.total_us for line in lines) for lines in stages)
        print(f"from the first stage to the tokens; a stage is free again after {slowest / 1e3:.3f} ms")
    return 0


def _head(pricing: StepPricing, batch: Shape, instance: InstanceSpec) -> str:
    """What is explained, and what to know before trusting it."""
    from servesim.cost.batch_shape import scheduled_tokens
    from servesim.cost.bundle import range_warnings

    bundle = pricing.cost.bundle
    degrees = f"tp {instance.tp_size}" + (f", pp {instance.pp_size}" if instance.pp_size > 1 else "")
    lines = [f"{instance.model_name} on {instance.hardware}, {degrees}: {bundle.describe()}"]
    if pricing.num_members > 1:
        lines.append(f"{pricing.num_members} members in lock-step, each with this batch")
    sequences = batch.num_decodes + len(batch.chunks)
    found = [*bundle.unstated(), *range_warnings(bundle, scheduled_tokens(batch), sequences)]
    return "\n".join([*lines, *(f"warning: {text}" for text in found)])


def each_length(decodes: int, kv_sum: int, kv_min: int, kv_max: int) -> list[int]:
    """KV lengths with this sum, least and greatest: the two ends once, the rest as equal as can be."""
    if decodes < 3 or kv_min == kv_max:
        return (
            [kv_min, kv_max][:decodes] if decodes == 2 else [kv_sum // decodes] * decodes if decodes else []
        )
    rest, count = kv_sum - kv_min - kv_max, decodes - 2
    return [kv_min, *(rest // count + (place < rest % count) for place in range(count)), kv_max]


_MOST_TOKENS = 4_194_304
"""Most tokens of a step's chunks, most decodes."""
_LONGEST_CONTEXT = 100_000_000
"""Longest context that a model may have."""


def parse_chunks(text: str) -> list[tuple[int, int]]:
    """``512@0,256@1024`` -> ``[(512, 0), (256, 1024)]``; a chunk without ``@`` has no history.

    Raises:
        InputError: something else is written there.
    """
    chunks = []
    for part in filter(None, (p.strip() for p in text.split(","))):
        tokens, _, history = part.partition("@")
        whole = re.fullmatch(r"\d{1,40}(@\d{0,40})?", part, re.ASCII)
        if not whole or int(tokens) < 2:
            raise InputError(
                f"--chunks: {part!r} is not allowed; must be tokens@history with at least 2 tokens, "
                "such as 512@0"
            )
        if max(int(tokens), int(history or 0)) > _LONGEST_CONTEXT:
            raise InputError(
                f"--chunks: {part[:40]!r} is not allowed; no context has {_LONGEST_CONTEXT:,} tokens"
            )
        chunks.append((int(tokens), int(history or 0)))
    if sum(tokens for tokens, _ in chunks) > _MOST_TOKENS:
        raise InputError(f"--chunks: all of them together may have {_MOST_TOKENS:,} tokens")
    return chunks


def decode_lengths(decodes: int, mean: int, least: int | None, greatest: int | None) -> tuple[int, int, int]:
    """(sum, least, greatest) of the decodes' KV lengths.

    Raises:
        InputError: negative numbers, or a mean that does not lie between least and greatest.
    """
    if decodes < 0 or mean < 0:
        raise InputError("--decodes and --kv: must not be negative")
    if decodes > _MOST_TOKENS or max(mean, greatest or 0) > _LONGEST_CONTEXT:
        raise InputError(
            f"--decodes {decodes}, --kv {mean}: at most {_MOST_TOKENS:,} decodes "
            f"and {_LONGEST_CONTEXT:,} tokens"
        )
    if not decodes:
        return 0, 0, 0
    if not mean:
        raise InputError(f"--decodes {decodes}: --kv is missing; give their tokens in the cache")
    given = {"--kv-min": least, "--kv": mean, "--kv-max": greatest}
    greatest = mean if greatest is None else greatest
    least = max(2 * mean - greatest, 0) if least is None else least
    if not 0 <= least <= mean <= greatest:
        told = ", ".join(f"{flag} {value}" for flag, value in given.items() if value is not None)
        raise InputError(f"{told}: must rise in this order")
    return decodes * mean, least, greatest


def table(costs: list[LayerCost]) -> str:
    """The breakdown as aligned text, one layer a line, with a line for the sum."""
    total = sum(cost.total_us for cost in costs)
    width = max(len("layer"), *(len(cost.layer) for cost in costs))
    lines = [f"{'layer':{width}}  {'calls':>5}  {'us a call':>12}  {'us':>12}  {'share':>6}  from"]
    for cost in costs:
        share = cost.total_us / total if total else 0.0
        lines.append(
            f"{cost.layer:{width}}  {cost.calls:>5}  {cost.us:>12.3f}  {cost.total_us:>12.1f}  {share:>6.1%}"
            f"  {cost.origin}"
        )
    lines.append(f"{'sum':{width}}  {'':>5}  {'':>12}  {total:>12.1f}  {'':>6}")
    return "\n".join(lines)
