"""Record the golden logs with vLLM's scheduler, or check that the stored ones are still what vLLM does.

    python -m tests.golden.make_golden                 # record all
    python -m tests.golden.make_golden async_tight     # record some
    python -m tests.golden.make_golden --check         # record again, write nothing, report differences
    python -m tests.golden.make_golden --check --as 0.33  # compare with the goldens of another version

Needs vLLM importable (no GPU). The goldens of vLLM 0.24 are of all recipes, those of later versions (folder
``vllm-<version>``) of the recipes in :data:`ACROSS`. Every workload is made from a fixed seed, so that a
second recording with the same vLLM gives the same bytes.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from servesim.bench.record_scheduler import Recorder, record_scheduler
from servesim.bench.scheduler_log import SchedulerLog, differences
from servesim.bench.step_formula import StepFormula
from servesim.bench.vllm_scheduler import SchedulerSettings
from servesim.specs.vllm_versions import NEWEST, VERSIONS, VllmVersion, minor_version
from tests.golden.golden_file import (
    Golden,
    build_workload,
    drains,
    golden_name,
    golden_names,
    is_drained,
    read_golden,
    version_of,
    write_golden,
)
from tests.golden.workloads import (
    MS,
    Entry,
    bursts,
    conversations,
    cycling,
    echoes,
    identical,
    long_and_short,
    long_chats,
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

ODD = StepFormula(base_ns=7_313_011, per_token_ns=23_017, per_sequence_ns=11_003)
"""Odd numbers: step boundaries hardly ever coincide with arrivals."""
ROUND = StepFormula(base_ns=10 * MS, per_token_ns=0, per_sequence_ns=0)
"""Every step takes 10 ms: arrivals on multiples of it fall exactly on a boundary."""
CONTEXT = StepFormula(base_ns=6_000_007, per_token_ns=19_001, per_sequence_ns=9_001, per_context_ns=37)
"""A step also pays for the tokens already in the cache of its requests."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """How one golden is made."""

    about: str
    entries: Callable[[np.random.Generator], list[Entry]]
    settings: SchedulerSettings
    formula: StepFormula = ODD
    since: VllmVersion = VERSIONS[0]
    """The first version of vLLM that has such settings."""


def settings(num_gpu_blocks: int, **changes: Any) -> SchedulerSettings:
    return SchedulerSettings(**{"num_gpu_blocks": num_gpu_blocks, "max_num_batched_tokens": 512, **changes})


SYNC = {"async_scheduling": False}
NO_CACHE = {"enable_prefix_caching": False}
PRIORITY = {"scheduling_policy": "priority"}

PIPELINE = {
    "max_num_seqs": 16, "max_num_batched_tokens": 16, "long_prefill_token_threshold": 12,
    "pipeline_parallel_size": 3, **SYNC,
}  # fmt: skip
WAITS: VllmVersion = "0.28"
"""Before, a request that is preempted while a batch computes for it may be admitted again meanwhile."""
TWO, FOUR = {"pipeline_parallel_size": 2}, {"pipeline_parallel_size": 4}


def drafts(method: str, *rates: float) -> dict[str, Any]:
    """Settings for drafts of a method that are accepted at these rates, by position."""
    drafter = {} if method == "ngram" else {"model": "a drafter"}
    tokens = {"num_speculative_tokens": len(rates), "synthetic_acceptance_rates": rates}
    return {"speculative_config": json.dumps({"method": method, **drafter, **tokens})}


class DrainingRecorder(Recorder):
    """Behind a batch that :func:`drains` names nothing is scheduled until all in flight have ended, as if it
    waited for something from outside."""

    def _schedule(self) -> Any:
        in_flight = sum(batch is not None for batch in self.in_flight)
        if in_flight and drains(len(self.log.steps) + in_flight - 1):
            return None
        return super()._schedule()


RECIPES: dict[str, Recipe] = {
    "sync_plain": Recipe(
        "ample memory, no prefix cache", lambda r: unrelated(r, 100, 30, (5, 700), (1, 60)),
        settings(2000, **SYNC, **NO_CACHE),
    ),
    "async_plain": Recipe(
        "ample memory, no prefix cache", lambda r: unrelated(r, 100, 30, (5, 700), (1, 60)),
        settings(2000, **NO_CACHE),
    ),
    "sync_tight": Recipe(
        "memory for a few requests: many preemptions, recomputed in full",
        lambda r: unrelated(r, 80, 6, (5, 120), (20, 200)), settings(48, **SYNC, **NO_CACHE),
    ),
    "async_tight": Recipe(
        "memory for a few requests: many preemptions, recomputed in full",
        lambda r: unrelated(r, 80, 6, (5, 120), (20, 200)), settings(48, **NO_CACHE),
    ),
    "async_last_token_victims": Recipe(
        "preemptions strike requests whose last token is in flight",
        lambda r: long_and_short(r, 120), settings(32, **NO_CACHE, max_num_seqs=24),
    ),
    "async_last_token_victims_cached": Recipe(
        "preemptions strike requests whose last token is in flight, with the prefix cache on",
        lambda r: long_and_short(r, 120), settings(32, max_num_seqs=24),
    ),
    "async_two_seats_tight": Recipe(
        "two requests that do not fit together: a request gives up its own blocks and nothing is scheduled",
        lambda r: unrelated(r, 60, 80, (10, 60), (20, 90)), settings(10, max_num_seqs=2),
    ),
    "sync_prefix_tight": Recipe(
        "shared prefixes, preemptions, evictions", lambda r: shared_prefixes(r, 110, 8, output=(5, 90)),
        settings(60, **SYNC),
    ),
    "async_prefix_tight": Recipe(
        "shared prefixes, preemptions, evictions", lambda r: shared_prefixes(r, 110, 8, output=(5, 90)),
        settings(60),
    ),
    "async_prefix_ample": Recipe(
        "shared prefixes, nothing is ever evicted", lambda r: shared_prefixes(r, 110, 20), settings(3000),
    ),
    "async_evictions": Recipe(
        "prefixes are evicted before they come up again", lambda r: cycling(r, 80), settings(64),
    ),
    "sync_sessions": Recipe(
        "conversations", lambda r: conversations(r, 25, 80), settings(400, **SYNC, block_size=32),
    ),
    "async_sessions": Recipe("conversations", lambda r: conversations(r, 25, 80), settings(400)),
    "async_sessions_tight": Recipe(
        "conversations that push each other out",
        lambda r: conversations(r, 28, 20, output=(5, 90)), settings(50),
    ),
    "async_round_times": Recipe(
        "arrivals, ends and releases fall on the same instants", lambda r: round_times(r, 25),
        settings(120), ROUND,
    ),
    "sync_round_times": Recipe(
        "arrivals, ends and releases fall on the same instants", lambda r: round_times(r, 25),
        settings(120, **SYNC), ROUND,
    ),
    "async_sessions_long_answers": Recipe(
        "follow-ups are released in the middle of long runs of pure decode steps",
        lambda r: conversations(r, 8, 700, tool_ms=150, output=(40, 250)), settings(400), CONTEXT,
    ),
    "sync_sessions_long_answers": Recipe(
        "follow-ups are released in the middle of long runs of pure decode steps",
        lambda r: conversations(r, 8, 700, tool_ms=150, output=(40, 250)), settings(400, **SYNC), CONTEXT,
    ),
    "async_echoes": Recipe(
        "prompts quote earlier answers; little memory", lambda r: echoes(r, 150, 6),
        settings(22, max_num_seqs=24),
    ),
    "async_ends_together": Recipe(
        "requests of one group end at the same step, not in the order in which their prompts were done",
        lambda r: together(r, 60, 32), settings(140, long_prefill_token_threshold=32),
    ),
    "async_threshold_64": Recipe(
        "at most 64 tokens of a prompt per step", lambda r: shared_prefixes(r, 70, 20, prefix=(200, 600)),
        settings(300, long_prefill_token_threshold=64),
    ),
    "sync_threshold_256": Recipe(
        "at most 256 tokens of a prompt per step, blocks of 32, preemptions",
        lambda r: unrelated(r, 60, 12, (100, 900), (5, 150)),
        settings(64, **SYNC, long_prefill_token_threshold=256, block_size=32),
    ),
    "async_no_chunking": Recipe(
        "a prompt is computed in one step or waits", lambda r: unrelated(r, 70, 15, (20, 400), (1, 60)),
        settings(90, enable_chunked_prefill=False),
    ),
    "sync_no_chunking_threshold": Recipe(
        "chunking is off, but a threshold chunks all the same",
        lambda r: shared_prefixes(r, 60, 15, prefix=(100, 300)),
        settings(90, **SYNC, enable_chunked_prefill=False, long_prefill_token_threshold=64),
    ),
    "async_tiny_budget": Recipe(
        "16 tokens a step, 12 requests at once: decodes eat the budget",
        lambda r: shared_prefixes(r, 40, 40, output=(1, 40)),
        settings(200, max_num_batched_tokens=16, max_num_seqs=12),
    ),
    "sync_tiny_budget_tight": Recipe(
        "24 tokens a step and little memory", lambda r: unrelated(r, 50, 20, (5, 90), (10, 80)),
        settings(22, **SYNC, max_num_batched_tokens=24, max_num_seqs=16),
    ),
    "async_three_seats": Recipe(
        "three requests at once", lambda r: unrelated(r, 50, 60, (5, 300), (1, 60)),
        settings(500, max_num_seqs=3),
    ),
    "async_bursts": Recipe(
        "twenty arrivals at the same nanosecond", lambda r: bursts(r, 100, 20, 500),
        settings(130, max_num_seqs=16),
    ),
    "async_single_token": Recipe(
        "outputs of one token, and a few of two",
        lambda r: shared_prefixes(r, 120, 9, output=(1, 2)), settings(80),
    ),
    "sync_single_token": Recipe(
        "outputs of one token, and a few of two",
        lambda r: shared_prefixes(r, 120, 9, output=(1, 2)), settings(80, **SYNC),
    ),
    "async_block_edges": Recipe(
        "lengths on the edges of blocks", lambda r: on_block_edges(r, 90, 16), settings(28),
    ),
    "sync_block_edges_32": Recipe(
        "lengths on the edges of blocks of 32", lambda r: on_block_edges(r, 70, 32),
        settings(40, **SYNC, block_size=32),
    ),
    "async_identical": Recipe(
        "the same prompts and answers: blocks of equal content", lambda r: identical(r, 80, 25), settings(45),
    ),
    "sync_identical": Recipe(
        "the same prompts and answers: blocks of equal content", lambda r: identical(r, 80, 25),
        settings(45, **SYNC),
    ),
    "async_no_full_gate": Recipe(
        "admission looks at the first chunk only",
        lambda r: shared_prefixes(r, 80, 10, prefix=(100, 400), output=(5, 70)),
        settings(60, reserve_full_isl=False, max_num_batched_tokens=128),
    ),
    "async_no_ids": Recipe(
        "prompts without ids share nothing, but find their own blocks after a preemption",
        lambda r: without_ids(r, 80, 6, (5, 120), (20, 200)), settings(48),
    ),
    "pipeline_drained": Recipe(
        "a pipeline that now and then runs dry: what comes back together does not fit the budget",
        lambda r: unrelated(r, 60, 60, (1, 120), (5, 40)), settings(2000, **PIPELINE),
    ),
    "pipeline_drained_shared": Recipe(
        "a pipeline that now and then runs dry, with shared prefixes",
        lambda r: shared_prefixes(r, 60, 60, prefix=(20, 120), output=(5, 40)), settings(2000, **PIPELINE),
    ),
    "async_alone": Recipe(
        "a threshold, and mostly a single request in the system",
        lambda r: unrelated(r, 40, 400, (40, 900), (1, 40)), settings(400, long_prefill_token_threshold=48),
    ),
    "sync_alone": Recipe(
        "a threshold, and mostly a single request in the system",
        lambda r: unrelated(r, 40, 400, (40, 900), (1, 40)),
        settings(400, **SYNC, long_prefill_token_threshold=48),
    ),
    "async_alone_prefixes": Recipe(
        "a threshold, few requests at once, shared prefixes",
        lambda r: shared_prefixes(r, 60, 120, prefix=(100, 600), output=(1, 30)),
        settings(160, long_prefill_token_threshold=40),
    ),
    "sync_alone_sessions": Recipe(
        "a threshold, and sessions that follow each other one by one",
        lambda r: conversations(r, 16, 500, output=(1, 20)),
        settings(300, **SYNC, long_prefill_token_threshold=24),
    ),
    "async_alone_sessions": Recipe(
        "a threshold, and sessions that follow each other one by one",
        lambda r: conversations(r, 16, 500, output=(1, 20)),
        settings(300, long_prefill_token_threshold=24),
    ),
    "async_alone_single_token": Recipe(
        "a threshold, answers of one or two tokens: the other request's last token is in flight",
        lambda r: unrelated(r, 90, 35, (20, 300), (1, 2)), settings(120, long_prefill_token_threshold=32),
    ),
    "async_alone_resumed": Recipe(
        "a threshold and little memory: a preempted request comes back when nobody else is left",
        lambda r: unrelated(r, 60, 120, (20, 150), (20, 120)),
        settings(18, **NO_CACHE, max_num_seqs=3, long_prefill_token_threshold=24),
    ),
    "sync_alone_no_chunking": Recipe(
        "chunking is off, a threshold, and few requests at once",
        lambda r: unrelated(r, 60, 150, (20, 500), (1, 30)),
        settings(200, **SYNC, enable_chunked_prefill=False, long_prefill_token_threshold=64),
    ),
    "async_alone_round_times": Recipe(
        "a threshold, and arrivals exactly when another request ends", lambda r: round_times(r, 25),
        settings(200, long_prefill_token_threshold=16), ROUND,
    ),
    "async_alone_tiny_budget": Recipe(
        "a threshold of 5 within 16 tokens a step, few requests at once",
        lambda r: unrelated(r, 40, 260, (5, 120), (1, 30)),
        settings(100, max_num_batched_tokens=16, max_num_seqs=12, long_prefill_token_threshold=5),
    ),
    "pipeline_alone": Recipe(
        "a pipeline, a threshold, and few requests at once",
        lambda r: unrelated(r, 50, 250, (1, 120), (1, 30)), settings(2000, **PIPELINE),
    ),
    "sync_pipeline_two": Recipe(
        "two stages, shared prefixes, ample memory",
        lambda r: shared_prefixes(r, 50, 12, output=(5, 60)), settings(900, **SYNC, **TWO),
    ),
    "async_pipeline_two": Recipe(
        "two stages, shared prefixes, ample memory",
        lambda r: shared_prefixes(r, 50, 12, output=(5, 60)), settings(900, **TWO),
    ),
    "sync_pipeline_two_tight": Recipe(
        "two stages and memory for a few requests: preemptions",
        lambda r: unrelated(r, 45, 6, (5, 120), (20, 120)), settings(60, **SYNC, **TWO),
    ),
    "async_pipeline_two_tight": Recipe(
        "two stages and memory for a few requests: preemptions",
        lambda r: unrelated(r, 45, 6, (5, 120), (20, 120)), settings(60, **TWO), since=WAITS,
    ),
    "sync_pipeline_four_tight": Recipe(
        "four stages, prompts that quote earlier answers, preemptions, 48 tokens a step",
        lambda r: echoes(r, 70, 6), settings(30, **SYNC, **FOUR, max_num_seqs=24, max_num_batched_tokens=48),
    ),
    "async_pipeline_four_tight": Recipe(
        "four stages, prompts that quote earlier answers, preemptions, 48 tokens a step",
        lambda r: echoes(r, 70, 6), settings(30, **FOUR, max_num_seqs=24, max_num_batched_tokens=48),
        since=WAITS,
    ),
    "async_pipeline_four": Recipe(
        "four stages, conversations, 16 tokens a step: decodes wait for those before them",
        lambda r: conversations(r, 24, 20, output=(1, 40)),
        settings(300, **FOUR, max_num_seqs=16, max_num_batched_tokens=16),
    ),
    "async_pipeline_four_stops": Recipe(
        "four stages, priorities, answers that end by a stop token, preemptions",
        lambda r: with_priorities(r, with_stops(r, shared_prefixes(r, 45, 8, output=(1, 60)), 0.5), 3),
        settings(50, **FOUR, **PRIORITY), since=WAITS,
    ),
    "async_dcp_two": Recipe(
        "two ranks share the KV of a head: blocks of 32 tokens, shared prefixes, evictions",
        lambda r: shared_prefixes(r, 60, 8, output=(5, 70)), settings(36, decode_context_parallel_size=2),
    ),
    "sync_dcp_four_tight": Recipe(
        "four ranks share the KV of a head: blocks of 32 tokens from 8, preemptions, a watermark",
        lambda r: echoes(r, 70, 6),
        settings(
            20, **SYNC, block_size=8, decode_context_parallel_size=4, max_num_seqs=24, watermark=0.1,
            max_num_batched_tokens=48,
        ),
    ),
    "async_dcp_eight_sessions": Recipe(
        "eight ranks share the KV of a head: blocks of 128 tokens, sessions, preemptions",
        lambda r: conversations(r, 16, 20, output=(5, 60)),
        settings(16, decode_context_parallel_size=8, max_num_seqs=16),
    ),
    "async_priority": Recipe(
        "three priorities and little memory: victims were served in the same step, or preempt themselves",
        lambda r: with_priorities(r, unrelated(r, 60, 6, (5, 120), (20, 120)), 3),
        settings(48, **NO_CACHE, **PRIORITY),
    ),
    "sync_priority": Recipe(
        "three priorities and little memory: victims were served in the same step, or preempt themselves",
        lambda r: with_priorities(r, unrelated(r, 60, 6, (5, 120), (20, 120)), 3),
        settings(48, **SYNC, **NO_CACHE, **PRIORITY),
    ),
    "async_priority_prefixes": Recipe(
        "priorities, shared prefixes and evictions",
        lambda r: with_priorities(r, shared_prefixes(r, 70, 8, output=(5, 70)), 4), settings(50, **PRIORITY),
    ),
    "sync_priority_echoes": Recipe(
        "priorities; prompts quote earlier answers, chunks of 12 tokens",
        lambda r: with_priorities(r, echoes(r, 70, 6), 3),
        settings(22, **SYNC, **PRIORITY, max_num_seqs=24, long_prefill_token_threshold=12),
    ),
    "async_priority_last_token": Recipe(
        "priorities; preemptions strike requests whose last token is in flight",
        lambda r: with_priorities(r, long_and_short(r, 80), 3), settings(32, **PRIORITY, max_num_seqs=24),
    ),
    "async_priority_tiny_budget": Recipe(
        "priorities, 16 tokens a step and little memory",
        lambda r: with_priorities(r, shared_prefixes(r, 40, 40, output=(1, 40)), 3),
        settings(24, **PRIORITY, max_num_batched_tokens=16, max_num_seqs=12),
    ),
    "async_priority_equal": Recipe(
        "one priority for all: the order is that of arrival, preempted requests keep their place",
        lambda r: unrelated(r, 50, 6, (5, 120), (20, 120)), settings(40, **PRIORITY, max_num_seqs=16),
    ),
    "sync_priority_sessions": Recipe(
        "sessions with priorities that push each other out",
        lambda r: with_priorities(r, conversations(r, 14, 20, output=(5, 60)), 5),
        settings(50, **SYNC, **PRIORITY),
    ),
    "async_stops": Recipe(
        "answers that end by a stop token: a step more is scheduled before it is known; little memory",
        lambda r: with_stops(r, shared_prefixes(r, 60, 8, output=(1, 60)), 0.7), settings(50),
    ),
    "sync_stops_chunks": Recipe(
        "answers that end by a stop token, in turns with others, 16 tokens a step",
        lambda r: with_stops(r, unrelated(r, 40, 30, (5, 60), (1, 30)), 0.5),
        settings(60, **SYNC, max_num_batched_tokens=16, max_num_seqs=12),
    ),
    "async_context_full": Recipe(
        "answers cut at the longest context, some that end by a stop token before it",
        lambda r: with_stops(r, unrelated(r, 50, 20, (5, 100), (20, 110)), 0.3),
        settings(60, max_model_len=140),
    ),
    "async_watermark": Recipe(
        "admission keeps a fifth of the blocks free, and 60 tokens a step are scheduled at most",
        lambda r: unrelated(r, 60, 8, (5, 120), (20, 90)),
        settings(60, watermark=0.2, max_num_scheduled_tokens=60),
    ),
    "async_cadence": Recipe(
        "prompts every fourth step, a threshold of at least a fair share, 9 of 24 seats used",
        lambda r: shared_prefixes(r, 60, 25, output=(5, 60)),
        settings(
            90, prefill_schedule_interval=4, max_num_active_seqs=9, max_num_seqs=24,
            long_prefill_token_threshold=20, long_prefill_token_threshold_adaptive=True,
        ),
        since="0.33",
    ),
    "sync_cadence": Recipe(
        "prompts every third step, little memory", lambda r: unrelated(r, 60, 12, (5, 120), (20, 90)),
        settings(60, **SYNC, prefill_schedule_interval=3), since="0.33",
    ),
    "async_loras": Recipe(
        "five LoRA adapters, two in a step; shared prefixes apart by adapter, some requests without",
        lambda r: with_loras(r, shared_prefixes(r, 60, 8, output=(5, 60)), 5, 0.8),
        settings(300, max_loras=2),
    ),
    "async_loras_tight": Recipe(
        "four LoRA adapters, one in a step; preemptions strike between those that were passed over",
        lambda r: with_loras(r, unrelated(r, 60, 6, (5, 120), (20, 160)), 4, 0.6), settings(40, max_loras=1),
    ),
    "sync_loras_sessions": Recipe(
        "conversations whose turns change adapters, three in a step",
        lambda r: with_loras(r, conversations(r, 14, 20, output=(5, 60)), 6, 0.7),
        settings(60, **SYNC, max_loras=3),
    ),
    "sync_loras_cadence": Recipe(
        "LoRA adapters, one in a step, prompts every third step, chunks of 24 tokens",
        lambda r: with_loras(r, unrelated(r, 60, 12, (5, 120), (5, 60)), 3, 0.9),
        settings(
            60, **SYNC, max_loras=1, prefill_schedule_interval=3, long_prefill_token_threshold=24,
            max_num_seqs=16,
        ),
        since="0.33",
    ),
    "async_loras_priority": Recipe(
        "LoRA adapters and priorities, 32 tokens a step",
        lambda r: with_priorities(r, with_loras(r, shared_prefixes(r, 50, 20, output=(5, 60)), 5, 0.9), 3),
        settings(60, **PRIORITY, max_num_batched_tokens=32, max_num_seqs=12, max_loras=2),
    ),
    "async_long_chats": Recipe(
        "long runs of pure decode steps whose time grows with the context", long_chats,
        settings(500), CONTEXT,
    ),
    "sync_long_chats": Recipe(
        "long runs of pure decode steps, with preemptions", long_chats,
        settings(48, **SYNC), CONTEXT,
    ),
    "async_groups_alternating": Recipe(
        "every other layer has a window (as gpt-oss), shared prefixes",
        lambda r: shared_prefixes(r, 36, 20, prefix=(60, 400), output=(5, 120)),
        settings(300, kv_groups="full,sliding:128"),
    ),
    "async_groups_alternating_tight": Recipe(
        "every other layer has a window, preemptions and evictions",
        lambda r: shared_prefixes(r, 30, 8, prefix=(60, 300), output=(5, 120)),
        settings(116, kv_groups="full,sliding:128"),
    ),
    "sync_groups_alternating_tight": Recipe(
        "every other layer has a window, preemptions and evictions",
        lambda r: shared_prefixes(r, 30, 8, prefix=(60, 300), output=(5, 120)),
        settings(96, **SYNC, kv_groups="full,sliding:128"),
    ),
    "async_groups_five_to_one": Recipe(
        "five layers with a window for one without (as Gemma 3), a tree of prefixes",
        lambda r: shared_prefixes(r, 36, 12, prefixes=3, prefix=(100, 500), output=(5, 150)),
        settings(330, kv_groups="full" + 5 * ",sliding:96"),
    ),
    "async_groups_five_to_one_tight": Recipe(
        "five layers with a window for one without, no prefix cache, preemptions",
        lambda r: unrelated(r, 25, 8, (20, 300), (20, 160)),
        settings(240, **NO_CACHE, kv_groups="full" + 5 * ",sliding:96"),
    ),
    "sync_groups_sessions": Recipe(
        "conversations of a model whose layers have windows of two lengths",
        lambda r: conversations(r, 12, 40, output=(5, 90)),
        settings(220, **SYNC, kv_groups="full,sliding:48,sliding:160"),
    ),
    "async_groups_sessions_tight": Recipe(
        "conversations that push each other out, with windows",
        lambda r: conversations(r, 10, 20, output=(5, 90)),
        settings(90, kv_groups="full,sliding:64"),
    ),
    "async_groups_two_sizes": Recipe(
        "layers with a window have blocks of half as many tokens (as Gemma 4)",
        lambda r: shared_prefixes(r, 34, 12, prefix=(60, 300), output=(5, 120)),
        settings(260, kv_groups="full@32,sliding:64,sliding:64"),
    ),
    "async_groups_chunked": Recipe(
        "three layers that attend in chunks for one in full (as Llama 4), a tree of prefixes",
        lambda r: shared_prefixes(r, 34, 12, prefixes=3, prefix=(100, 500), output=(5, 150)),
        settings(250, kv_groups="full" + 3 * ",chunked:128"),
    ),
    "sync_groups_chunked_tight": Recipe(
        "layers that attend in chunks, preemptions and evictions",
        lambda r: shared_prefixes(r, 34, 8, prefix=(60, 300), output=(5, 150)),
        settings(150, **SYNC, kv_groups="full,chunked:64"),
    ),
    "async_groups_states": Recipe(
        "three layers with a state for one in full (as Qwen3-Next), shared prefixes cached at boundaries",
        lambda r: shared_prefixes(r, 34, 20, prefix=(100, 500), output=(5, 90)),
        settings(80, block_size=64, kv_groups="full" + 3 * ",state"),
    ),
    "sync_groups_states_tight": Recipe(
        "states and full attention, preemptions and evictions",
        lambda r: shared_prefixes(r, 34, 8, prefix=(100, 300), output=(5, 150)),
        settings(40, **SYNC, block_size=32, kv_groups="full,state"),
    ),
    "async_groups_states_sessions": Recipe(
        "conversations of a model with states",
        lambda r: conversations(r, 10, 40, output=(5, 90)),
        settings(60, block_size=32, kv_groups="full,state,state"),
    ),
    "async_groups_states_uncached": Recipe(
        "one state a sequence, no prefix cache, preemptions",
        lambda r: unrelated(r, 25, 8, (20, 300), (20, 200)),
        settings(32, **NO_CACHE, block_size=64, kv_groups="full,state,state"),
    ),
    "async_groups_window_only": Recipe(
        "every layer has a window", lambda r: shared_prefixes(r, 34, 10, prefix=(60, 400), output=(5, 150)),
        settings(90, kv_groups="sliding:100"),
    ),
    "async_groups_long_chats": Recipe(
        "long runs of pure decode steps while windows move",
        lambda r: unrelated(r, 12, 300.0, (10, 300), (60, 260)),
        settings(500, kv_groups="full,sliding:80"), CONTEXT,
    ),
    "async_groups_echoes": Recipe(
        "prompts quote earlier answers; preemptions strike requests whose last token is in flight",
        lambda r: echoes(r, 60, 6), settings(42, max_num_seqs=24, kv_groups="full,sliding:24"),
    ),
    "async_groups_threshold": Recipe(
        "at most 48 tokens of a prompt per step: windows move in the middle of prompts",
        lambda r: shared_prefixes(r, 34, 20, prefix=(200, 600)),
        settings(260, long_prefill_token_threshold=48, kv_groups="full,sliding:64"),
    ),
    "sync_ngram": Recipe(
        "n-gram drafts: rejected tokens, shared prefixes, preemptions",
        lambda r: shared_prefixes(r, 40, 8, output=(5, 90)),
        settings(48, **SYNC, **drafts("ngram", 0.7, 0.5, 0.3, 0.3)),
    ),
    "async_eagle3": Recipe(
        "EAGLE-3 drafts, shared prefixes: the last cached block is computed again",
        lambda r: shared_prefixes(r, 45, 12, output=(5, 60)),
        settings(200, **drafts("eagle3", 0.73, 0.52, 0.35)),
    ),
    "async_eagle_tight": Recipe(
        "EAGLE drafts: preemptions with drafts in flight",
        lambda r: unrelated(r, 40, 6, (5, 120), (20, 160)),
        settings(40, max_num_seqs=12, **drafts("eagle", 0.8, 0.6)),
    ),
    "sync_eagle_sessions": Recipe(
        "EAGLE drafts in synchronous scheduling, conversations",
        lambda r: conversations(r, 10, 40, output=(5, 60)),
        settings(70, **SYNC, **drafts("eagle", 0.76, 0.52, 0.35, 0.24, 0.16)),
    ),
    "async_draft_model": Recipe(
        "a draft model takes a slot of the budget for every request; most drafts are accepted",
        lambda r: long_and_short(r, 50),
        settings(60, max_num_seqs=8, max_num_batched_tokens=48, **drafts("draft_model", 0.95, 0.9, 0.85)),
    ),
    "async_draft_echoes": Recipe(
        "requests that find all but a token cached are filled up to the others' drafts",
        lambda r: echoes(r, 60, 6), settings(40, max_num_seqs=16, **drafts("draft_model", 0.6, 0.4)),
    ),
    "async_loads": Recipe(
        "a connector reads the first 60 % of every prompt while the request waits; ample memory",
        lambda r: unrelated(r, 60, 15, (20, 200), (5, 60)), settings(600, kv_loads="async:0.6:9000:20"),
    ),
    "async_loads_tight": Recipe(
        "whole prompts are read, as from a prefill instance; little memory, preemptions",
        lambda r: unrelated(r, 60, 6, (5, 120), (20, 120)),
        settings(40, **NO_CACHE, kv_loads="async:1:20000:100"),
    ),
    "sync_loads_tight": Recipe(
        "whole prompts are read, as from a prefill instance; little memory, preemptions, one batch in flight",
        lambda r: unrelated(r, 60, 6, (5, 120), (20, 120)),
        settings(40, **SYNC, **NO_CACHE, kv_loads="async:1:20000:100"),
    ),
    "async_loads_prefixes": Recipe(
        "shared prefixes, of which one request at a time reads the beginning; preemptions",
        lambda r: shared_prefixes(r, 70, 8, output=(5, 70)), settings(50, kv_loads="async:0.5:30000:0"),
    ),
    "async_loads_priority": Recipe(
        "every second request has KV elsewhere; priorities, stop tokens, little memory",
        lambda r: with_priorities(r, with_stops(r, unrelated(r, 60, 6, (5, 120), (20, 120)), 0.4), 3),
        settings(48, **PRIORITY, kv_loads="async:0.9:15000:50/2"),
    ),
    "async_loads_in_step": Recipe(
        "KV that is there when the step begins, half of every prompt; shared prefixes, little memory",
        lambda r: shared_prefixes(r, 70, 8, output=(5, 70)), settings(50, kv_loads="sync:0.5"),
    ),
    "sync_loads_in_step": Recipe(
        "KV that is there when the step begins, whole prompts, one batch in flight; little memory",
        lambda r: unrelated(r, 60, 6, (5, 120), (20, 120)), settings(40, **SYNC, kv_loads="sync:1"),
    ),
    "sync_loads_evicted": Recipe(
        "the head of the queue lacks blocks; what it would hit is evicted, then it waits for another's read",
        lambda _: shared_prefixes(
            np.random.default_rng(1_002_397), 40, 4, prefix=(20, 100), tail=(1, 60), output=(5, 40)
        ),
        settings(
            242, block_size=1, max_num_seqs=16, max_model_len=300, **SYNC, kv_loads="async:0.5:400000:0"
        ),
    ),
    "async_loads_pipeline": Recipe(
        "two stages, every second request has KV elsewhere, little memory",
        lambda r: unrelated(r, 45, 6, (5, 120), (20, 120)),
        settings(60, **TWO, kv_loads="async:1:20000:100/2"), since=WAITS,
    ),
}  # fmt: skip


ACROSS = (
    *(name for name, recipe in RECIPES.items() if recipe.settings.long_prefill_token_threshold),
    *(
        name
        for name in RECIPES
        if any(word in name for word in ("priority", "stops", "cadence", "loras", "loads", "pipeline", "dcp"))
    ),
    *("async_context_full", "async_watermark"),
    *("async_two_seats_tight", "sync_prefix_tight", "async_last_token_victims_cached", "async_echoes"),
    *("async_sessions_tight", "sync_sessions_long_answers", "async_no_full_gate", "async_block_edges"),
    *(name for name, recipe in RECIPES.items() if recipe.settings.speculative_config),
)
"""Recipes that are recorded with later versions of vLLM too: those of what versions differ in, and some."""

GROUPS_ACROSS = (
    *("async_groups_alternating_tight", "async_groups_chunked", "async_groups_states"),
    *("async_groups_echoes", "async_groups_two_sizes"),
)
"""Of the recipes of several groups of layers, those that are recorded with earlier versions of vLLM too."""


def is_stored(name: str, version: str) -> bool:
    """Whether the golden of a recipe is kept for a version of vLLM."""
    if "_groups_" in name:
        return version == NEWEST or name in GROUPS_ACROSS
    return version == VERSIONS[0] or name in ACROSS


def record(name: str) -> Golden:
    """Make one recipe's workload and record it with vLLM."""
    recipe = RECIPES[name]
    # Both modes of a pair get the same workload: the seed depends on the name without its first word.
    seed = [ord(letter) for letter in name.partition("_")[2]]
    entries = recipe.entries(np.random.default_rng(seed))
    recorder = DrainingRecorder if is_drained(name) else Recorder
    log = record_scheduler(build_workload(entries, name), recipe.settings, recipe.formula, recorder)
    golden = Golden(name, recipe.about, entries, log)
    golden.name = golden_name(name, version_of(golden))
    return golden


def describe(log: SchedulerLog) -> str:
    """One line: what happens in a log."""
    last_use = {index: number for number, step in enumerate(log.steps) for index in step.sched}
    late = sum(last_use[i] < number for number, s in enumerate(log.steps) for i in s.preempted)
    # A step that preempts admits nobody, unless the preemption happened in a schedule that came out empty.
    empty = sum(bool(s.preempted and s.hits) for s in log.steps)
    several = sum(len(s.preempted) > 1 for s in log.steps)
    return (
        f"{len(log.requests)} requests, {len(log.steps)} steps, "
        f"{sum(r.preemptions for r in log.requests)} preemptions ({late} with the last "
        f"token in flight, {empty} then admitting, {several} several at once), "
        f"{sum(sum(s.hits.values()) for s in log.steps)} tokens hit, "
        f"least free {min(s.free for s in log.steps)}"
    )


def departures(golden: Golden, wanted: str) -> list[str]:
    """In what a recording differs from the stored golden ``wanted``."""
    if wanted not in golden_names():
        return ["not recorded yet"]
    stored = read_golden(wanted)
    found = differences(stored.log, golden.log, ordered=True)
    if stored.entries != golden.entries:
        found.insert(0, "the workload is another one")
    if stored.log.header["formula"] != golden.log.header["formula"]:
        found.insert(0, "the step formula is another one")
    return found


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Record the golden logs with vLLM's scheduler.")
    parser.add_argument("names", nargs="*", help="goldens to record (default: all)")
    parser.add_argument("--check", action="store_true", help="compare with the stored files, write nothing")
    parser.add_argument("--as", dest="version", choices=VERSIONS, help="compare with this version's goldens")
    options = parser.parse_args(arguments)
    unknown = set(options.names) - set(RECIPES)
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(RECIPES)}")
    failures = 0
    installed = minor_version(importlib.metadata.version("vllm"))
    for name in options.names or RECIPES:
        if VERSIONS.index(RECIPES[name].since) > VERSIONS.index(installed):  # type: ignore[arg-type]
            continue
        if options.version and not is_stored(name, options.version):
            continue
        own = record(name)
        wanted = golden_name(name, options.version) if options.version else own.name
        stored = is_stored(name, version_of(own))
        if options.check:
            if not stored and wanted not in golden_names():
                continue
            found = departures(own, wanted)
            failures += bool(found)
            print(f"{wanted}: {'differs' if found else 'same'}", *found[:5], sep="\n  ", flush=True)
        elif stored:
            write_golden(own)
            print(f"{own.name}: {describe(own.log)}", flush=True)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
