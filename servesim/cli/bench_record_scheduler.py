"""``servesim bench record-scheduler``: drive vLLM's own scheduler over a workload and write its log."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse

    from servesim.bench.step_formula import StepFormula
    from servesim.bench.vllm_scheduler import SchedulerSettings


AS_IN_A_RUN = (
    *("block_size", "max_num_seqs", "max_num_batched_tokens", "long_prefill_token_threshold"),
    *("enable_chunked_prefill", "reserve_full_isl", "enable_prefix_caching", "async_scheduling"),
    *("scheduling_policy", "max_num_active_seqs", "max_num_scheduled_tokens"),
    *("long_prefill_token_threshold_adaptive", "prefill_schedule_interval", "watermark"),
)
"""Settings that are options of ``servesim run``: flag, help, default and check are those of the run."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The action's flags."""
    from servesim.specs.engine_options import EngineOptions
    from servesim.specs.flags import add_flags

    parser.description = (
        "Drive the scheduler of the installed vLLM over a workload, without GPU or model, and log every "
        "step: who got how many tokens, who was preempted or finished, free blocks, prefix hits. A step "
        "takes BASE + TOKEN x tokens + SEQUENCE x requests + CONTEXT x cached tokens."
    )
    add = parser.add_argument
    add("--dataset", required=True, metavar="FILE", help="workload, in any known format")
    add("--output", required=True, metavar="FILE", help="the log, JSON lines; compressed if it ends in .gz")
    add("--num-reqs", type=int, default=0, metavar="N", help="entries to load, 0: all (default: 0)")
    scheduling = parser.add_argument_group("scheduler")
    add = scheduling.add_argument
    add("--num-gpu-blocks", type=_positive, required=True, metavar="N", help="KV blocks, null block included")
    add(
        "--kv-groups",
        default="",
        metavar="KINDS",
        help="groups of layers that share blocks, such as full,sliding:128,sliding:128: full, state, "
        "sliding:TOKENS, chunked:TOKENS, each perhaps with @BLOCK_SIZE (default: one that keeps every token)",
    )
    add(
        "--max-model-len",
        type=int,
        default=0,
        metavar="N",
        help="longest sequence in tokens, 0: the longest of the workload (default: 0)",
    )
    add(
        "--pipeline-parallel-size",
        type=_positive,
        default=1,
        metavar="N",
        help="stages, each of which takes the step time below (default: 1)",
    )
    add(
        "--decode-context-parallel-size",
        "-dcp",
        type=_positive,
        default=1,
        metavar="N",
        help="ranks that share the tokens of a block, which then holds N times --block-size (default: 1)",
    )
    add(
        "--speculative-config",
        default="",
        metavar="JSON",
        help="speculative decoding as vLLM takes it, with synthetic_acceptance_rates (default: none)",
    )
    add(
        "--max-loras",
        type=_positive,
        default=0,
        metavar="N",
        help="most LoRA adapters in a step (default: LoRA is off)",
    )
    scheduling.add_argument(
        "--kv-loads",
        default="",
        metavar="WHAT",
        help="a KV connector that has KV of the prompts: async:SHARE:BASE_US:PER_TOKEN_US (requests wait "
        "with their blocks while a share of their prompt is read in that time) or sync:SHARE (it is there in "
        "the step), perhaps with /N for every N-th request (default: none)",
    )
    add_flags(parser, EngineOptions, only=AS_IN_A_RUN, title="scheduler, as in a run")
    formula = parser.add_argument_group("step time, in microseconds")
    for name, default, text in (
        ("base", 9000.0, "of every step"),
        ("per-token", 25.0, "per scheduled token"),
        ("per-sequence", 10.0, "per scheduled request"),
        ("per-context", 0.0, "per token already in the cache of the scheduled requests"),
    ):
        formula.add_argument(
            f"--{name}-us", type=float, default=default, metavar="US", help=f"{text} (default: {default:g})"
        )


def run(args: argparse.Namespace) -> int:
    """Record, write the log, and say in one line what is in it."""
    from servesim.bench.record_scheduler import record_scheduler
    from servesim.bench.scheduler_log import write_log
    from servesim.workload.formats import load_workload

    workload = load_workload(args.dataset, num_reqs=args.num_reqs)
    log = record_scheduler(workload, settings_of(args), formula_of(args))
    write_log(args.output, log)
    last_ns = log.steps[-1].end if log.steps else 0
    print(
        f"{args.output}: vLLM {log.header['vllm']}, {len(log.requests)} requests, {len(log.steps)} steps, "
        f"{last_ns / 1e9:.3f} s, {sum(request.preemptions for request in log.requests)} preemptions, "
        f"{sum(request.hit for request in log.requests)} prompt tokens hit"
    )
    return 0


def settings_of(args: argparse.Namespace) -> SchedulerSettings:
    """The scheduler's settings in the arguments.

    Raises:
        InputError: an option of a run is out of bounds, or without a limit, which this scheduler has to have.
    """
    from argparse import Namespace
    from dataclasses import fields

    from servesim.bench.vllm_scheduler import SchedulerSettings
    from servesim.errors import InputError
    from servesim.specs.engine_options import EngineOptions
    from servesim.specs.flags import flag_name, from_flags

    given = vars(args)
    chosen = from_flags(EngineOptions, Namespace(**{n: given[n] for n in AS_IN_A_RUN if n in given}))
    for name in ("max_num_seqs", "max_num_batched_tokens"):
        if getattr(chosen, name) == 0:
            raise InputError(f"{flag_name(name)}: 0 is not allowed here: vLLM's scheduler has a limit")
    names = [item.name for item in fields(SchedulerSettings)]
    return SchedulerSettings(**{n: getattr(chosen if n in AS_IN_A_RUN else args, n) for n in names})


def formula_of(args: argparse.Namespace) -> StepFormula:
    """The step formula in the arguments.

    Raises:
        InputError: a coefficient is negative, or a step would take no time.
    """
    from servesim.bench import step_formula
    from servesim.errors import InputError

    values = (args.base_us, args.per_token_us, args.per_sequence_us, args.per_context_us)
    given = ", ".join(f"{value:g}" for value in values)
    formula = step_formula.StepFormula.from_us(*values)
    if min(values) < 0 or formula.step_ns(1, 1, 0) < 1:
        raise InputError(
            "--base-us, --per-token-us, --per-sequence-us, --per-context-us: "
            f"{given}; none may be negative, and a step has to take time"
        )
    return formula


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


_positive.__name__ = "positive number"  # argparse names the type in its message
