"""One small instance with a step time that can be worked out by hand."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from servesim.engine.block_tables import BlockTables
from servesim.engine.build import loads_of, track_maker
from servesim.engine.instance import Instance
from servesim.engine.limits import SchedulerLimits
from servesim.engine.pipeline import Pipeline
from servesim.engine.scheduler import Scheduler
from servesim.engine.simulation import Simulation
from servesim.engine.step_loop import LoopPlan
from servesim.memory.kv_cache import KvCache
from servesim.network.links import NEVER
from servesim.results.records import InstanceLog
from servesim.specs.options import RuntimeOptions
from servesim.workload.request import Request, Workload
from tests.hand_made import OneInstance, capacity, instance, instance_options

if TYPE_CHECKING:
    from array import array
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from servesim.engine.batch import Batch
    from servesim.engine.connector import Connector
    from servesim.engine.noise import StepNoise
    from servesim.results.records import RunLog


class LinearTimes:
    """``base`` + ``per_token`` x tokens + ``per_kv`` x mean KV length of the decodes, in ns."""

    def __init__(self, base: int = 1000, per_token: int = 10, per_kv: int = 0) -> None:
        self.base, self.per_token, self.per_kv = base, per_token, per_kv

    def decode_ns(self, n: int, kv_sum: int, kv_min: int, kv_max: int) -> int:
        assert n > 0
        assert kv_min * n <= kv_sum <= kv_max * n
        return self.base + self.per_token * n + self.per_kv * (kv_sum // n)

    def decode_ends(
        self,
        ends_ns: list[int],
        n: int,
        kv_sum: int,
        kv_min: int,
        kv_max: int,
        steps: int,
        depth: int = 1,
        until_ns: int = NEVER,
    ) -> None:
        for i in range(steps):
            if i and ends_ns[-depth] >= until_ns:
                break
            ends_ns.append(ends_ns[-1] + self.decode_ns(n, kv_sum + i * n, kv_min + i, kv_max + i))

    def decode_run_ns(self, n: int, kv_sum: int, kv_min: int, kv_max: int, steps: int) -> NDArray[np.int64]:
        times = [self.decode_ns(n, kv_sum + i * n, kv_min + i, kv_max + i) for i in range(steps)]
        return np.array(times, dtype=np.int64)

    def mixed_ns(
        self, chunks: Sequence[tuple[int, int]], n: int, kv_sum: int, kv_min: int, kv_max: int
    ) -> int:
        assert all(tokens > 1 for tokens, _ in chunks)
        tokens = sum(tokens for tokens, _ in chunks)
        decodes = self.decode_ns(n, kv_sum, kv_min, kv_max) if n else self.base
        return decodes + self.per_token * tokens


class ConstantStages:
    """Every stage takes ``compute`` ns and hands over in ``hand_over`` ns, whatever is in the wave."""

    alone = None

    def __init__(self, stages: int, compute: int = 1000, hand_over: int = 0) -> None:
        self.each = [(compute, hand_over)] * (stages - 1) + [(compute, 0)]

    def stages_ns(self, batches: Sequence[Batch | None]) -> Sequence[tuple[int, int]]:
        assert any(batches)
        return self.each


class SlowestMember:
    """A wave takes as long as the member with most tokens: base + per_token x tokens."""

    alone = None

    def stages_ns(self, batches: Sequence[Batch | None]) -> Sequence[tuple[int, int]]:
        tokens = [b.num_decodes + sum(t for t, _ in b.chunks) if b else 1 for b in batches]
        return [(1000 + 10 * max(tokens), 0)]


def requests(*shapes: tuple[int, int, int], ids: Sequence[Sequence[int]] | None = None) -> Workload:
    """A workload of (prompt tokens, output tokens, arrival in ns)."""
    made = [Request(i, prompt, output, arrival) for i, (prompt, output, arrival) in enumerate(shapes)]
    for request, tokens in zip(made, ids or (), strict=bool(ids)):
        request.input_ids = np.array(tokens, dtype=np.int64)
    return Workload(made, "hand-made")


def small_loop(
    workload: Workload,
    *,
    index: int = 0,
    tables: BlockTables | None = None,
    blocks: int = 1001,
    block_size: int = 4,
    max_num_seqs: int = 8,
    budget: int = 64,
    depth: int = 1,
    caching: bool = True,
    jump: bool = False,
    times: LinearTimes | None = None,
    stages: ConstantStages | None = None,
    tracks: list[array[int]] | None = None,
    noise: StepNoise | None = None,
    connectors: Sequence[Connector] = (),
    **limits: Any,
) -> LoopPlan:
    """The loop of an instance with ``blocks`` blocks, vLLM's null block included.

    ``stages`` makes it a pipeline, which notes the times of its tokens in ``tracks``; ``depth`` 2: one that
    schedules asynchronously.
    """
    count = len(stages.each) if stages is not None else 0
    ring = count if depth > 1 else 0
    member = small_member(
        workload, index, tables, blocks, block_size, max_num_seqs, budget, caching, tracks, ring,
        connectors=connectors, **limits,
    )  # fmt: skip
    if stages is not None:
        return LoopPlan([member], stages, depth=count + (depth > 1), stages=count, jump=False)
    return LoopPlan([member], OneInstance(times or LinearTimes()), depth=depth, jump=jump, noise=noise)


def small_member(
    workload: Workload,
    index: int = 0,
    tables: BlockTables | None = None,
    blocks: int = 1001,
    block_size: int = 4,
    max_num_seqs: int = 8,
    budget: int = 64,
    caching: bool = True,
    tracks: list[array[int]] | None = None,
    ring: int = 0,
    instances: int = 1,
    pd_type: str | None = None,
    node: int = 0,
    connectors: Sequence[Connector] = (),
    kv_load: str = "step",
    asynchronous: bool = False,
    **limits: Any,
) -> Instance:
    """An instance that no loop runs yet; ``tracks`` where it is in a pipeline, ``asynchronous``: a loop that
    schedules a step while another runs."""
    options = instance_options(
        block_size=block_size,
        max_num_batched_tokens=budget,
        max_num_seqs=max_num_seqs,
        enable_chunked_prefill=limits.get("chunked_prefill", True),
        max_model_len=1 << 20,
        kv_load=kv_load,
        async_scheduling=asynchronous,
    )
    log = InstanceLog(
        index,
        node,
        instance(index).spec,
        options,
        capacity(num_blocks=blocks, block_size=block_size),
        "linear times",
        "no host",
    )
    log.spec.pd_type = pd_type  # type: ignore[misc, assignment]
    kv = KvCache(blocks, block_size, caching)
    loads, late_frees = loads_of(options, kv, log.spec, lower_tier=False)
    scheduler = Scheduler(
        SchedulerLimits(max_num_seqs, budget, **limits),
        kv,
        loads=loads,
        late_frees=late_frees,
        connectors=connectors,
        pipeline=None if tracks is None else Pipeline(track_maker(block_size, tracks, instances), ring),
        list_requests=pd_type == "prefill",
    )
    return Instance(log, scheduler, tables or BlockTables(workload))


def run_small(workload: Workload, *, max_concurrency: int = 0, **how: Any) -> RunLog:
    """Run ``workload`` on one small instance."""
    tracks: list[array[int]] | None = [] if how.get("stages") else None
    loop = small_loop(workload, tracks=tracks, **how)
    options = RuntimeOptions(max_concurrency=max_concurrency)
    log = Simulation([loop], workload, options, pipeline_tracks=tracks).run()
    loop.members[0].scheduler.kv.pool.check_integrity()
    assert loop.members[0].scheduler.kv.pool.num_used == 0, "blocks are held after the last request ended"
    return log
