"""Compare the engine with vLLM's scheduler on random workloads and settings, far beyond the stored goldens.

    python -m tests.parity.fuzz 200            # seeds 0 to 199
    python -m tests.parity.fuzz 1 --first 37   # one seed again

Needs vLLM importable (no GPU). Prints the first difference of every seed that has one; the exit status tells.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import numpy as np

from servesim.bench.record_scheduler import record_scheduler
from servesim.bench.scheduler_log import SchedulerLog, differences
from servesim.bench.step_formula import StepFormula
from servesim.bench.vllm_scheduler import SchedulerSettings
from servesim.errors import RunError
from servesim.specs.vllm_versions import (
    ACTIVE_SEQS,
    ADAPTIVE_THRESHOLD,
    LOCAL_CADENCE,
    VERSIONS,
    VllmVersion,
    minor_version,
)
from tests.golden.golden_file import Golden, build_workload
from tests.golden.make_golden import CONTEXT, ODD, ROUND
from tests.golden.workloads import (
    Entry,
    bursts,
    conversations,
    cycling,
    echoes,
    identical,
    long_and_short,
    on_block_edges,
    round_times,
    shared_prefixes,
    together,
    unrelated,
    with_loras,
    with_priorities,
    with_stops,
    without_ids,
)
from tests.parity.replay import logged, replay, replay_in_jumps

Setting = tuple[list[Entry], SchedulerSettings]
Outcome = tuple[SchedulerSettings, SchedulerLog, list[str]]


def random_entries(rng: np.random.Generator) -> list[Entry]:
    """A workload of a random kind with random parameters."""
    count, gap = int(rng.integers(5, 60)), float(rng.choice([1.0, 6.0, 15.0, 40.0, 150.0, 600.0]))
    prompt, output = (1, int(rng.integers(2, 300))), (1, int(rng.integers(2, 90)))
    kinds: list[Any] = [
        lambda: unrelated(rng, count, gap, prompt, output),
        lambda: without_ids(rng, count, gap, prompt, output),
        lambda: shared_prefixes(rng, count, gap, int(rng.integers(1, 6)), (10, 200), (1, 60), output),
        lambda: conversations(rng, 1 + count // 5, gap, tool_ms=gap, output=(1, output[1])),
        lambda: bursts(rng, count, int(rng.integers(2, 20)), gap * 10),
        lambda: on_block_edges(rng, count, 16),
        lambda: identical(rng, count, gap),
        lambda: round_times(rng, 1 + count // 5),
        lambda: cycling(rng, count),
        lambda: long_and_short(rng, count),
        lambda: echoes(rng, count, gap),
        lambda: together(rng, count, int(rng.integers(1, 60))),
    ]
    entries: list[Entry] = kinds[int(rng.integers(len(kinds)))]()
    return entries


def with_extras(
    rng: np.random.Generator,
    entries: list[Entry],
    settings: SchedulerSettings,
    vllm: VllmVersion,
    speculative: bool,
) -> Setting:
    """Entries and settings with what this version of vLLM has beside; priorities alone if ``speculative``."""
    budget, longest = settings.max_num_batched_tokens, max(_longest(entries), 1)
    if rng.random() < 0.4:
        settings = replace(settings, scheduling_policy="priority")
        entries = with_priorities(rng, entries, int(rng.choice([1, 2, 3, 50])))
    if speculative:
        return entries, settings
    if rng.random() < 0.4:
        entries = with_stops(rng, entries, float(rng.choice([0.2, 0.9])))
    if rng.random() < 0.2:
        least = max(max(r.input_tokens + 1, r.output_tokens) for r in build_workload(entries, "random"))
        settings = replace(settings, max_model_len=int(rng.integers(least, longest + 2)))
        longest = min(longest, settings.max_model_len)
        threshold = min(settings.long_prefill_token_threshold, longest)
        settings = replace(settings, long_prefill_token_threshold=threshold)
        if not settings.enable_chunked_prefill:  # vLLM refuses a smaller step than the longest context then
            budget = max(budget, settings.max_model_len)
            settings = replace(settings, max_num_batched_tokens=budget)
    if rng.random() < 0.15:
        entries = [{**entry, "salt": str(rng.choice(["a", "b"]))} for entry in entries]
    if rng.random() < 0.15:
        settings = replace(settings, watermark=float(rng.choice([0.02, 0.1, 0.4])))
    if rng.random() < 0.1 and settings.enable_chunked_prefill:
        settings = replace(settings, max_num_scheduled_tokens=int(rng.integers(1, budget + 1)))
    if rng.random() < 0.2 and LOCAL_CADENCE.holds(vllm):
        settings = replace(settings, prefill_schedule_interval=int(rng.choice([2, 3, 7])))
    if rng.random() < 0.2 and ACTIVE_SEQS.holds(vllm):
        settings = replace(settings, max_num_active_seqs=int(rng.integers(1, settings.max_num_seqs + 1)))
    if rng.random() < 0.3 and ADAPTIVE_THRESHOLD.holds(vllm):
        threshold = settings.long_prefill_token_threshold or min(int(rng.choice([1, 8, 30])), longest)
        settings = replace(
            settings, long_prefill_token_threshold=threshold, long_prefill_token_threshold_adaptive=True
        )
    # servers refuse requests that ask for more than the context
    return [{**entry, "limit": min(entry.get("limit", 0), longest)} for entry in entries], settings


def _longest(entries: list[Entry]) -> int:
    """Tokens of the longest request."""
    return max(r.input_tokens + r.output_tokens for r in build_workload(entries, "random"))


def random_settings(rng: np.random.Generator, entries: list[Entry]) -> SchedulerSettings:
    """Settings that can serve the workload, with little memory as often as not."""
    longest = _longest(entries)
    block_size = int(rng.choice([1, 4, 16, 16, 16, 32]))
    least = -(-longest // block_size) + 1
    chunked = bool(rng.random() < 0.85)
    seats = int(rng.choice([1, 2, 3, 8, 32, 128]))
    budget = max(seats, int(rng.choice([1, 8, 32, 64, 128, 512])), 0 if chunked else longest)
    return SchedulerSettings(
        num_gpu_blocks=least + int(rng.choice([0, 1, least // 4, least, 3 * least, 50 * least])),
        block_size=block_size,
        max_num_seqs=seats,
        max_num_batched_tokens=budget,
        long_prefill_token_threshold=min(int(rng.choice([0, 0, 1, 2, 20, 64])), longest),
        enable_chunked_prefill=chunked,
        reserve_full_isl=bool(rng.random() < 0.8),
        enable_prefix_caching=bool(rng.random() < 0.7),
        async_scheduling=bool(rng.random() < 0.6),
    )


def random_groups(rng: np.random.Generator, settings: SchedulerSettings) -> SchedulerSettings:
    """The same with several groups of layers, and memory enough for the longest request."""
    size = settings.block_size
    window, chunk = int(rng.integers(2, 20 * size)), size * int(rng.integers(1, 12))
    wider, other = window + int(rng.integers(1, 100)), f"@{2 * size}"
    if rng.random() < 0.6:  # states need blocks that a step can hold
        kinds = [
            f"sliding:{window}",
            f"sliding:{window},sliding:{window}",
            f"sliding:{window},sliding:{wider}",
        ]
        kinds += [f"sliding:{window},full", f"sliding:{window}{other}", f"sliding:{wider},full{other}"]
        kinds += [f"chunked:{chunk}", f"chunked:{chunk},chunked:{chunk}"]
        groups = f"full,{kinds[int(rng.integers(len(kinds)))]}"
        if rng.random() < 0.1:
            groups = f"sliding:{window}"
    else:
        groups = "full,state" + ",state" * int(rng.integers(3))
    least = sum(
        -(-settings.max_model_len // group.block_size) + 1
        for group in replace(settings, kv_groups=groups).groups
    )
    more = int(rng.choice([0, 1, least // 4, least, 3 * least, 50 * least]))
    return replace(settings, kv_groups=groups, num_gpu_blocks=least + 1 + more)


def random_speculation(rng: np.random.Generator, settings: SchedulerSettings) -> SchedulerSettings:
    """The same with speculative decoding, and what has to be larger for it."""
    longest, block_size = settings.max_model_len, settings.block_size
    least, chunked = -(-longest // block_size) + 3, settings.enable_chunked_prefill
    drafts = int(rng.integers(1, 8))
    method = str(rng.choice(["ngram", "eagle", "eagle3", "draft_model"]))
    rates = sorted((round(float(rate), 2) for rate in rng.random(drafts)), reverse=True)
    config = {
        "method": method,
        "num_speculative_tokens": drafts,
        "synthetic_acceptance_rates": rates,
        **({} if method == "ngram" else {"model": "a drafter"}),
    }
    room = int(rng.choice([0, 0, 1, 3, 50]))
    slots = int(rng.choice([1, 2, 3, 8, 32]))
    budget = max(2 * slots, int(rng.choice([8, 32, 64, 128, 512])), 0 if chunked else longest + room + slots)
    spare = -(-3 * drafts // block_size)
    return replace(
        settings,
        num_gpu_blocks=least + spare + int(rng.choice([0, 1, least // 4, least, 3 * least, 50 * least])),
        max_num_seqs=slots,
        max_num_batched_tokens=budget,
        max_model_len=longest + room,
        long_prefill_token_threshold=min(int(rng.choice([0, 0, 0, 20, 64])), longest),
        async_scheduling=settings.async_scheduling and method != "ngram",
        speculative_config=json.dumps(config),
    )


def random_loras(seed: int, entries: list[Entry], settings: SchedulerSettings) -> Setting:
    """The same with LoRA adapters, drawn on their own so that the rest of a seed stays as it is."""
    rng = np.random.default_rng([seed, 1])
    entries = with_loras(rng, entries, int(rng.choice([1, 2, 3, 6, 20])), float(rng.choice([0.3, 0.8, 1.0])))
    return entries, replace(settings, max_loras=int(rng.choice([1, 1, 2, 3, 5])))


def random_pipeline(seed: int, settings: SchedulerSettings) -> SchedulerSettings:
    """The same in a pipeline, drawn on its own so that the rest of a seed stays as it is."""
    rng = np.random.default_rng([seed, 2])
    return replace(settings, pipeline_parallel_size=int(rng.choice([2, 2, 3, 4, 4, 7])))


def random_shards(seed: int, settings: SchedulerSettings) -> SchedulerSettings:
    """The same with ranks that share the tokens of a block, drawn on its own so that the rest of a seed stays
    as it is."""
    rng = np.random.default_rng([seed, 3])
    shards = int(rng.choice([2, 2, 3, 4, 8]))
    if rng.random() < 0.5:  # else blocks of the same tokens are fewer, and all the larger
        return replace(settings, decode_context_parallel_size=shards)
    blocks = -(-settings.num_gpu_blocks // shards) + 1
    return replace(settings, decode_context_parallel_size=shards, num_gpu_blocks=blocks)


def random_loads(seed: int, settings: SchedulerSettings) -> SchedulerSettings:
    """The same with a KV connector, drawn on its own so that the rest of a seed stays as it is."""
    rng = np.random.default_rng([seed, 4])
    share = float(rng.choice([0.3, 0.6, 0.9, 1.0, 1.0]))
    every = int(rng.choice([1, 1, 1, 2, 3]))
    base, each = float(rng.choice([1, 500, 9000, 60000, 400000])), float(rng.choice([0, 1, 77.7, 1000]))
    mode = f"async:{share}:{base}:{each}" if rng.random() < 0.8 else f"sync:{share}"
    return replace(settings, kv_loads=f"{mode}/{every}")


def installed_version() -> VllmVersion:
    """The version of the vLLM that is driven."""
    found = str(minor_version(version("vllm")))
    return next(known for known in VERSIONS if known == found)


def random_formula(rng: np.random.Generator) -> StepFormula:
    return [ODD, ROUND, CONTEXT][int(rng.integers(3))]


def compare(
    seed: int,
    grouped: bool = False,
    speculative: bool = False,
    loras: bool = False,
    pipelined: bool = False,
    sharded: bool = False,
    loaded: bool = False,
) -> Outcome:
    """Run one seed through vLLM and through the engine, stepped and, but for pipelines, jumping.

    ``grouped``: with several groups of layers; ``speculative``: with speculative decoding; ``loras``: with
    LoRA adapters; ``pipelined``: in a pipeline; ``sharded``: with decode context parallelism;
    ``loaded``: with a KV connector.
    """
    rng = np.random.default_rng(seed)
    entries = random_entries(rng)
    settings = random_settings(rng, entries)
    entries, settings = with_extras(rng, entries, settings, installed_version(), speculative)
    if grouped or speculative:
        longest = max(r.input_tokens + r.output_tokens for r in build_workload(entries, "random"))
        settings = replace(settings, max_model_len=longest)
        settings = (random_groups if grouped else random_speculation)(rng, settings)
    if loras:
        entries, settings = random_loras(seed, entries, settings)
    if pipelined:
        settings = random_pipeline(seed, settings)
    if sharded:
        settings = random_shards(seed, settings)
    if loaded:
        settings = random_loads(seed, settings)
    try:
        log = record_scheduler(build_workload(entries, "random"), settings, random_formula(rng))
    except RunError:  # vLLM comes to a halt: a step holds less than the block of a state (0.24)
        return settings, SchedulerLog(), []
    golden = Golden(f"seed {seed}", "", entries, log)
    found = differences(log, replay(golden), limit=3)
    if pipelined:
        return settings, log, found
    jumped = replay_in_jumps(golden)
    requests = SchedulerLog(requests=[logged(record) for record in jumped.requests])
    found += differences(SchedulerLog(requests=log.requests), requests, limit=3)
    if len(jumped.instances[0].steps) != len(log.steps):
        found.append(f"jumping: {len(jumped.instances[0].steps)} steps, expected {len(log.steps)}")
    return settings, log, found


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Compare the engine with vLLM's scheduler at random.")
    parser.add_argument("seeds", type=int, help="number of seeds")
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--groups", action="store_true", help="with several groups of layers")
    kinds.add_argument("--speculative", action="store_true", help="with speculative decoding")
    kinds.add_argument("--pipelines", action="store_true", help="in pipelines")
    parser.add_argument("--loras", action="store_true", help="with LoRA adapters, also beside the others")
    kinds.add_argument("--context-parallel", action="store_true", help="with decode context parallelism")
    parser.add_argument("--kv-loads", action="store_true", help="with a KV connector, also beside the others")
    parser.add_argument("--first", type=int, default=0, help="first seed (default: 0)")
    options = parser.parse_args(arguments)
    failures = steps = preemptions = halted = 0
    for seed in range(options.first, options.first + options.seeds):
        settings, log, found = compare(
            seed,
            options.groups,
            options.speculative,
            options.loras,
            options.pipelines,
            options.context_parallel,
            options.kv_loads,
        )
        steps += len(log.steps)
        halted += not log.steps
        preemptions += sum(request.preemptions for request in log.requests)
        if found:
            failures += 1
            print(f"seed {seed}: {settings}", *found, sep="\n  ", flush=True)
    print(
        f"{options.seeds} seeds, {steps} steps, {preemptions} preemptions, {halted} halted: {failures} differ"
    )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
