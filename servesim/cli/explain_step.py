"""``servesim explain-step``: what one step costs, layer by layer, and where the numbers come from."""

from __future__ import annotations

from typing import TYPE_CHECKING

from servesim.errors import InputError

if TYPE_CHECKING:
    import argparse

    from servesim.cost.explain import LayerCost
    from servesim.specs.cluster import ClusterSpec, InstanceSpec
    from servesim.specs.model import ModelSpec
    from servesim.specs.options import InstanceOptions

_HELP = "what one step costs, layer by layer, and where the numbers come from"
_FLAGS = (
    *("cluster_config", "hardware", "model", "tp", "dtype", "kv_cache_dtype"),
    *("max_num_seqs", "max_num_batched_tokens", "cudagraph", "auto_profile"),
)


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command and its flags."""
    from servesim.specs.options import add_arguments

    parser = subparsers.add_parser("explain-step", help=_HELP, description=_HELP, allow_abbrev=False)
    add_arguments(parser, only=_FLAGS)
    step = parser.add_argument_group("the step")
    step.add_argument(
        "--instance", type=int, default=0, help="which instance of the cluster, from 0 (default 0)"
    )
    step.add_argument(
        "--chunks", default="", help="prefill chunks: tokens@history, separated by commas: 512@0,256@1024"
    )
    step.add_argument("--decodes", type=int, default=0, help="sequences that decode one token (default 0)")
    step.add_argument("--kv", type=int, default=0, help="mean KV length of the decodes, in tokens")
    step.add_argument("--kv-max", type=int, help="greatest KV length of the decodes (default: all are equal)")
    step.add_argument(
        "--kv-min", type=int, help="least KV length of the decodes (default: as far below the mean)"
    )


def run(args: argparse.Namespace) -> int:
    """Print the table; returns the exit status."""
    from servesim.cli.messages import tell
    from servesim.cost.bundle import range_warnings
    from servesim.cost.step_timer import build_step_timer
    from servesim.memory.placement import uses_placement
    from servesim.profiler.making import bundles_on_demand
    from servesim.specs.cluster import cluster_of
    from servesim.specs.model import load_model
    from servesim.specs.options import from_namespace, resolve

    chunks = parse_chunks(args.chunks)
    kv_sum, kv_min, kv_max = decode_lengths(args.decodes, args.kv, args.kv_min, args.kv_max)
    if not chunks and not args.decodes:
        raise InputError("the step is empty; give --chunks 512@0, --decodes 32 --kv 1000, or both")
    options = from_namespace(args)
    cluster = cluster_of(options)
    if not 0 <= args.instance < len(cluster.instances):
        raise InputError(
            f"--instance: {args.instance} is not allowed; must be 0 to {len(cluster.instances) - 1}"
        )
    _, instance = cluster.instances[args.instance]
    model = load_model(instance.model_name)
    resolved = resolve(options, instance, model)
    if uses_placement(instance, resolved):
        raise InputError(
            f"{cluster.source}: instance {args.instance} keeps or computes something outside of its NPUs, "
            "which explain-step does not take apart; leave out placement and offloading to see the NPUs' "
            "part"
        )
    _check_alone(instance, model.is_moe, f"{cluster.source}: instance {args.instance}")
    if instance.pp_size > 1:
        lengths = args.decodes, kv_sum, kv_min, kv_max
        with bundles_on_demand(options.auto_profile, tell):
            print(_pipeline_text(cluster, args.instance, model, resolved, chunks, lengths))
        return 0
    with bundles_on_demand(options.auto_profile, tell):
        timer = build_step_timer(instance, model, resolved, cluster)
    tokens = args.decodes + sum(c for c, _ in chunks)
    sequences = args.decodes + len(chunks)
    print(f"{model.name} on {instance.hardware}, tp {instance.tp_size}: {timer.bundle.describe()}")
    for warning in [*timer.bundle.unstated(), *range_warnings(timer.bundle, tokens, sequences)]:
        print(f"warning: {warning}")
    print(table(timer.explain(chunks, args.decodes, kv_sum, kv_min, kv_max)))
    ns = timer.mixed_ns(chunks, args.decodes, kv_sum, kv_min, kv_max)
    print(f"\n{tokens} tokens, {sequences} sequences: {ns} ns = {ns / 1e6:.3f} ms")
    return 0


def _check_alone(instance: InstanceSpec, is_moe: bool, where: str) -> None:
    """Raise InputError for an instance whose steps depend on others or on where tokens go."""
    way_out = "leave it out to see what the instance computes by itself"
    if instance.ep_size > 1:
        raise InputError(
            f"{where} has ep_size {instance.ep_size}: what a step takes depends on the experts that its "
            f"tokens choose, which explain-step does not know; {way_out}"
        )
    if instance.dp_group is not None and is_moe:
        raise InputError(
            f"{where} is in dp_group {instance.dp_group!r} and waits for the others in every expert layer, "
            f"which explain-step does not take apart; {way_out}"
        )


def _pipeline_text(
    cluster: ClusterSpec,
    index: int,
    model: ModelSpec,
    options: InstanceOptions,
    chunks: list[tuple[int, int]],
    lengths: tuple[int, int, int, int],
) -> str:
    """What every stage of a pipeline takes for one step, by the timer that a run uses."""
    from servesim.cost.stage import pipeline_stages
    from servesim.cost.step_timers import StepTimers
    from servesim.cost.wave_timer import build_wave_timer
    from servesim.engine.batch import Batch
    from servesim.results.table import Table
    from servesim.terminal import screen_width

    placed = cluster.instances[index]
    instance = placed[1]
    timer = build_wave_timer([placed], model, [options], StepTimers(cluster))
    n, kv_sum, kv_min, kv_max = lengths
    batch = Batch(step=0, chunks=chunks, num_decodes=n, kv_sum=kv_sum, kv_min=kv_min, kv_max=kv_max)
    stages = timer.stages_ns([batch])
    table = Table(["stage", "blocks", "compute us", "hand-over us"])
    parts = pipeline_stages(model, instance.pp_size)
    for number, (stage, (compute, send)) in enumerate(zip(parts, stages, strict=True)):
        blocks = f"{stage.first_block}-{stage.first_block + stage.num_blocks - 1}"
        table.rows.append([str(number), blocks, f"{compute / 1000:.1f}", f"{send / 1000:.1f}"])
    whole = sum(compute + send for compute, send in stages)
    slowest = max(compute for compute, _ in stages)
    tokens = n + sum(chunk for chunk, _ in chunks)
    return (
        f"{model.name} on {instance.hardware}, tp {instance.tp_size}, pp {instance.pp_size}; no "
        f"breakdown by layer for pipelines\n{table.plain(width=screen_width())}\n\n{tokens} tokens, "
        f"{n + len(chunks)} sequences: {whole} ns = {whole / 1e6:.3f} ms from the first stage to the tokens; "
        f"a stage is free again after {slowest / 1e6:.3f} ms"
    )


def parse_chunks(text: str) -> list[tuple[int, int]]:
    """``512@0,256@1024`` -> ``[(512, 0), (256, 1024)]``; a chunk without ``@`` has no history.

    Raises:
        InputError: something else is written there.
    """
    chunks = []
    for part in filter(None, (p.strip() for p in text.split(","))):
        tokens, _, history = part.partition("@")
        if not tokens.isdecimal() or not (history or "0").isdecimal() or int(tokens) < 2:
            raise InputError(
                f"--chunks: {part!r} is not allowed; must be tokens@history with at least 2 tokens, "
                "such as 512@0"
            )
        chunks.append((int(tokens), int(history or 0)))
    return chunks


def decode_lengths(decodes: int, mean: int, least: int | None, greatest: int | None) -> tuple[int, int, int]:
    """(sum, least, greatest) of the decodes' KV lengths.

    Raises:
        InputError: negative numbers, or a mean that does not lie between least and greatest.
    """
    if decodes < 0 or mean < 0:
        raise InputError("--decodes and --kv: must not be negative")
    if not decodes:
        return 0, 0, 0
    greatest = mean if greatest is None else greatest
    least = max(2 * mean - greatest, 0) if least is None else least
    if not 0 <= least <= mean <= greatest:
        raise InputError(f"--kv-min {least}, --kv {mean}, --kv-max {greatest}: must rise in this order")
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
