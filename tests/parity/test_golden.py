"""The engine makes the decisions that vLLM's own scheduler made, step for step, on every golden log.

The goldens are recordings of vLLM's scheduler (tests/golden/make_golden.py); docs/parity.md says how to renew
them.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest

from servesim.bench.scheduler_log import SchedulerLog, differences
from servesim.engine.decode_set import DecodeSet
from servesim.engine.scheduler import Scheduler
from servesim.specs.vllm_versions import LONE_PREFILL, NEWEST, VERSIONS
from tests.golden.golden_file import (
    Golden,
    golden_name,
    golden_names,
    read_golden,
    version_of,
)
from tests.parity.replay import logged, replay, replay_in_jumps

NAMES = golden_names()

golden = cache(read_golden)


def stages_of(name: str) -> int:
    """Pipeline stages of a golden."""
    stages: int = golden(name).log.header["settings"].get("pipeline_parallel_size", 1)
    return stages


@pytest.mark.parametrize("name", NAMES)
def test_the_engine_does_what_vllm_did_in_every_step(name: str) -> None:
    found = differences(golden(name).log, replay(golden(name)))
    assert not found, "\n".join([f"{name} ({golden(name).about}):", *found])


@pytest.mark.parametrize("name", [name for name in NAMES if stages_of(name) == 1])
def test_jumping_over_quiet_stretches_changes_nothing(name: str) -> None:
    reference = golden(name).log
    run = replay_in_jumps(golden(name))
    steps, num_blocks = run.instances[0].steps, reference.header["settings"]["num_gpu_blocks"]
    counts = [list(step.sched.values()) for step in reference.steps]
    if reference.header["settings"].get("speculative_config"):
        # several tokens may be of a chunk, or the one of a decode and drafts
        both = steps.column("decode_tokens") + steps.column("prefill_tokens")
        assert both.tolist() == [sum(tokens) for tokens in counts]
        assert (np.array(run.instances[0].steps.prefill_tokens) > 1).any()
        counts = []
    columns = {
        "start_ns": [step.start for step in reference.steps],
        "end_ns": [step.end for step in reference.steps],
        "kv_blocks_used": [num_blocks - 1 - step.free for step in reference.steps],
        "preempted": [len(step.preempted) for step in reference.steps],
        "hit_tokens": [sum(hits.values()) for hits in first_hits(reference)],
    }
    if counts:
        columns["decode_tokens"] = [sum(tokens == 1 for tokens in step) for step in counts]
        columns["prefill_tokens"] = [sum(tokens for tokens in step if tokens > 1) for step in counts]
    for column, expected in columns.items():
        assert steps.column(column).tolist() == expected, column
    requests = SchedulerLog(requests=[logged(record) for record in run.requests])
    assert not differences(SchedulerLog(requests=reference.requests), requests)


@pytest.mark.pure
def test_the_goldens_drive_every_path_of_the_scheduler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Among them the walk of requests that the budget does not cover, and what comes back to a pipeline."""
    driven: Counter[str] = Counter()

    def noting(owner: type, name: str) -> None:
        real = getattr(owner, name)

        def note(self: Any, *arguments: Any) -> Any:
            driven[name] += 1
            if name == "_serve" and not arguments[2]:
                driven["walk"] += 1
            return real(self, *arguments)

        monkeypatch.setattr(owner, name, note)

    for owner, name in ((Scheduler, "_serve"), (Scheduler, "_stall"), (DecodeSet, "absorb")):
        noting(owner, name)
    replay(golden("pipeline_drained"))
    assert min(driven[name] for name in ("_serve", "walk", "_stall", "absorb")) > 5


def first_hits(log: SchedulerLog) -> list[dict[int, int]]:
    """Of every step, the hits of the requests that were never admitted before."""
    seen: set[int] = set()
    found = []
    for step in log.steps:
        found.append({index: hit for index, hit in step.hits.items() if index not in seen})
        seen |= step.hits.keys()
    return found


def test_the_goldens_cover_what_they_are_meant_to() -> None:
    assert len(NAMES) >= 14
    headers = [golden(name).log.header for name in NAMES]
    assert {header["vllm"] for header in headers} == {"0.24.0", "0.28.0", "0.33.0"}
    for version in ("0.24", "0.28", "0.33"):
        assert sum(version_of(golden(name)) == version for name in NAMES) >= 25
    wanted: dict[str, set[int]] = {
        "async_scheduling": {True, False},
        "enable_prefix_caching": {True, False},
        "enable_chunked_prefill": {True, False},
        "reserve_full_isl": {True, False},
        "block_size": {16, 32},
        "long_prefill_token_threshold": {0, 64, 256},
    }
    for option, values in wanted.items():
        assert {header["settings"][option] for header in headers} >= values, option


def test_goldens_speculate_in_every_version() -> None:
    speculating = [golden(name) for name in NAMES if settings_of(name).get("speculative_config")]
    assert Counter(version_of(one) for one in speculating) == dict.fromkeys(("0.24", "0.28", "0.33"), 6)
    methods = {json.loads(settings_of(one.name)["speculative_config"])["method"] for one in speculating}
    assert methods == {"ngram", "eagle", "eagle3", "draft_model"}
    assert sum(bool(step.preempted) for one in speculating for step in one.log.steps) > 30


def test_pipelines_are_in_every_version() -> None:
    pipelines = [golden(name) for name in NAMES if stages_of(name) > 1]
    counted = Counter(version_of(one) for one in pipelines)
    assert counted == {"0.24": 8, "0.28": 12, "0.33": 12}
    shapes = {(stages_of(one.name), settings_of(one.name)["async_scheduling"]) for one in pipelines}
    assert shapes >= {(2, True), (2, False), (4, True), (4, False)}
    preempting = [one for one in pipelines if any(step.preempted for step in one.log.steps)]
    assert Counter(version_of(one) for one in preempting) == {"0.24": 2, "0.28": 6, "0.33": 6}


def test_connectors_are_in_every_version() -> None:
    loading = [golden(name) for name in NAMES if settings_of(name).get("kv_loads")]
    assert Counter(version_of(one) for one in loading) == {"0.24": 8, "0.28": 9, "0.33": 9}
    modes = Counter(settings_of(one.name)["kv_loads"].partition(":")[0] for one in loading)
    assert modes == {"async": 20, "sync": 6}
    assert sum(bool(step.preempted) for one in loading for step in one.log.steps) > 300


def test_context_parallelism_is_in_every_version() -> None:
    sharded = [golden(name) for name in NAMES if shards_of(name) > 1]
    counted = Counter((version_of(one), shards_of(one.name)) for one in sharded)
    assert counted == {(version, ranks): 1 for version in ("0.24", "0.28", "0.33") for ranks in (2, 4, 8)}
    assert all(any(step.preempted for step in one.log.steps) for one in sharded)
    hits = {shards_of(one.name): {h for s in one.log.steps for h in s.hits.values()} for one in sharded}
    blocks = {2: 2 * 16, 4: 4 * 8, 8: 8 * 16}
    assert all(hit % blocks[ranks] == 0 for ranks, found in hits.items() for hit in found)
    assert all(max(found) > 0 for found in hits.values())


def test_blocks_of_fewer_ranks_are_not_taken_for_it() -> None:
    one = golden("vllm-0.33/async_dcp_two")
    settings = {**one.log.header["settings"], "decode_context_parallel_size": 1}
    header = {**one.log.header, "settings": settings}
    assert differences(one.log, replay(replace(one, log=replace(one.log, header=header))))


def test_a_pipeline_of_other_depth_is_not_taken_for_it() -> None:
    """The place more of asynchronous scheduling, and the turns of the ring, can be told from the log."""
    one = golden("vllm-0.33/async_pipeline_two")
    header = {**one.log.header, "settings": {**one.log.header["settings"], "async_scheduling": False}}
    assert differences(one.log, replay(replace(one, log=replace(one.log, header=header))))


def shards_of(name: str) -> int:
    return int(settings_of(name).get("decode_context_parallel_size", 1))


def settings_of(name: str) -> dict[str, Any]:
    settings: dict[str, Any] = golden(name).log.header["settings"]
    return settings


@pytest.mark.parametrize(
    "recipe",
    [
        *("async_alone", "sync_alone_sessions", "pipeline_alone", "async_eagle3", "async_eagle_tight"),
        *("async_loads_tight", "async_loads_in_step"),
    ],
)
def test_a_version_is_not_taken_for_another(recipe: str) -> None:
    old, new = golden(golden_name(recipe, "0.28")), golden(golden_name(recipe, "0.33"))
    assert differences(old.log, new.log)
    assert not differences(golden(recipe).log, old.log)
    wrong = Golden(recipe, "", new.entries, replace(new.log, header=old.log.header))
    assert differences(new.log, replay(wrong))


def test_every_version_has_its_differences() -> None:
    assert [version for version in VERSIONS if LONE_PREFILL.holds(version)] == ["0.31", "0.32", "0.33"]
    assert VERSIONS[-1] == NEWEST


def test_the_goldens_hold_the_rare_events() -> None:
    steps = [step for name in NAMES for step in golden(name).log.steps]
    assert any(len(step.preempted) > 1 for step in steps), "several requests preempted at once"
    assert any(step.hits.get(i, 0) for step in steps for i in step.hits), "a prefix hit"
    assert any(step.preempted and step.hits for step in steps), "a schedule that preempted and came out empty"
    assert any(_last_token_in_flight(golden(name)) for name in NAMES)
    resumed = [(name, i) for name in NAMES for i in _resumed_with_hit(golden(name))]
    assert resumed, "a preempted request that found its own blocks again"


def _last_token_in_flight(one: Golden) -> bool:
    """Whether a request was preempted that was never scheduled again, so its last token was in flight."""
    last_use = {index: number for number, step in enumerate(one.log.steps) for index in step.sched}
    return any(
        last_use[index] < number for number, step in enumerate(one.log.steps) for index in step.preempted
    )


def _resumed_with_hit(one: Golden) -> list[int]:
    seen: set[int] = set()
    resumed = []
    for step in one.log.steps:
        resumed += [index for index, hit in step.hits.items() if hit and index in seen]
        seen |= step.hits.keys()
    return resumed


def test_a_single_wrong_number_is_found() -> None:
    reference = golden("async_tight").log
    changed = [*reference.steps]
    changed[100] = replace(changed[100], free=changed[100].free + 1)
    wrong = SchedulerLog(reference.header, changed, reference.requests)
    assert differences(reference, wrong) == [
        f"step 100: free {changed[100].free}, expected {reference.steps[100].free}"
    ]
    late = [replace(request, end=request.end + (request.req == 7)) for request in reference.requests]
    assert len(differences(reference, SchedulerLog(reference.header, reference.steps, late))) == 1
    assert differences(reference, SchedulerLog(reference.header, reference.steps[:-1], reference.requests))
