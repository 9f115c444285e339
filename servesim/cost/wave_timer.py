"""How long a wave takes: instances with pipeline stages, with expert parallelism, or in lock-step.

A wave is one batch of every member of a data-parallel group, or of a single instance; it passes the pipeline
stages one after the other. In each stage

- members compute on their own and the wave leaves with the slowest, if no experts are shared;
- members that share experts meet in every expert layer: what their blocks take apart from the experts is that
  of the slowest member, then come exchange and experts (:mod:`servesim.cost.expert_stage`).

When every member's tokens fit its CUDA graphs, all are padded to the graph that holds the largest batch;
otherwise each computes its own count, unpadded. A member without work runs a dummy batch of one
token: its dense layers and experts run, attention and output head do not. (All as vLLM does.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np

from servesim.cost.cudagraph import capture_sizes, padded_tokens
from servesim.cost.expert_stage import ExpertStage, TokenExchange
from servesim.cost.stage import pipeline_stages
from servesim.cost.step_terms import ACTIVATION_BYTES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from servesim.cost.expert_stage import ExpertRouting
    from servesim.cost.offload_timer import Offload, OffloadTimer
    from servesim.cost.stage import Stage
    from servesim.cost.step_timer import StepTimer
    from servesim.cost.step_timers import StepTimers
    from servesim.network.topology import Dimension
    from servesim.specs.cluster import InstanceSpec
    from servesim.specs.model import ModelSpec
    from servesim.specs.options import InstanceOptions

_IDLE_TOKENS = 1
_WORD = (1 << 64) - 1
_MIX = 0x9E3779B97F4A7C15  # odd, with no pattern in its bits: 2**64 over the golden ratio


class BatchShape(Protocol):
    """The integers of a batch that decide how long it takes; see :class:`servesim.engine.batch.Batch`."""

    @property
    def step(self) -> int: ...
    @property
    def chunks(self) -> Sequence[tuple[int, int]]: ...
    @property
    def num_decodes(self) -> int: ...
    @property
    def kv_sum(self) -> int: ...
    @property
    def kv_min(self) -> int: ...
    @property
    def kv_max(self) -> int: ...
    @property
    def kv_lengths(self) -> Sequence[int] | None: ...


class WaveStage:
    """One pipeline stage of all members.

    ``timers``: of every member's stage. ``experts``: None, or one for every run of consecutive members that
    share experts, all of the same length. ``offloads``: None, or for every member what its blocks take where
    weights, KV cache or attention are elsewhere.
    """

    def __init__(
        self,
        stage: Stage,
        timers: Sequence[StepTimer],
        experts: Sequence[ExpertStage] | None,
        link: Dimension,
        offloads: Sequence[OffloadTimer | None] | None = None,
    ) -> None:
        self._stage = stage
        self._offloads = offloads or [None] * len(timers)
        self._experts = experts
        width = len(timers) // len(experts) if experts else 1
        self._teams = [
            (range(first, first + width), timers[first : first + width])
            for first in range(0, len(timers), width)
        ]
        self._link = link
        self._send = timers[0].tables.collective("send", 2)

    def compute_ns(self, batches: Sequence[BatchShape | None], tokens: Sequence[int], wave: int) -> int:
        """Until the slowest member is through; ``tokens``: what each computes, padding included."""
        longest = 0.0
        for number, (members, timers) in enumerate(self._teams):
            blocks = once = head = overhead = 0.0
            for member, timer in zip(members, timers, strict=True):
                batch, count = batches[member], tokens[member]
                once = max(once, timer.once.ns(count))
                offload = self._offloads[member]
                ns = timer.in_blocks.ns(count) if offload is None else offload.blocks_ns(batch, count)
                if batch is not None:
                    chunks, n = batch.chunks, batch.num_decodes
                    if offload is None:
                        ns += timer.attention_ns(chunks, n, batch.kv_sum, batch.kv_min, batch.kv_max)
                    head = max(head, timer.sequences_ns(n + len(chunks)))
                    if self._stage.is_first:
                        overhead = max(overhead, timer.overhead_ns(bool(chunks)))
                blocks = max(blocks, ns)
            ns = blocks + once + head + overhead
            if self._experts is not None:
                theirs = tokens[members.start : members.stop]
                ns += self._experts[number].ns(sum(theirs), max(theirs), wave)
            longest = max(longest, ns)
        return max(round(longest), 1)

    def hand_over_ns(self, tokens: Sequence[int]) -> int:
        """The hidden states of the largest member on their way to the next stage; 0 after the last."""
        if self._stage.is_last:
            return 0
        payload = max(tokens) * self._stage.model.hidden_size * ACTIVATION_BYTES
        if self._send is not None:
            return round(float(self._send.at(payload)[0]) * 1000.0)
        return round(self._link.send_ns(payload))


class WaveTimer:
    """Durations of the waves of a group of members, or of one instance with several stages or with experts
    on several ranks."""

    def __init__(self, stages: Sequence[WaveStage], capture_limit: int) -> None:
        """
        Args:
            stages: in order.
            capture_limit: tokens of the largest step that every member runs as a CUDA graph; 0: none.
        """
        self._stages = stages
        self._padded = [0]
        """Tokens → tokens of the graph that holds them, as far as graphs reach."""
        if capture_limit:
            largest = int(capture_sizes(capture_limit)[-1])
            self._padded += padded_tokens(np.arange(1, largest + 1), capture_limit).tolist()

    def stages_ns(self, batches: Sequence[BatchShape | None]) -> list[tuple[int, int]]:
        """(compute, hand-over to the next stage) in ns of every pipeline stage.

        ``batches``: one per member, None for a member without work.
        """
        tokens = [_IDLE_TOKENS if batch is None else _scheduled_tokens(batch) for batch in batches]
        if (most := max(tokens)) < len(self._padded):
            tokens = [self._padded[most]] * len(tokens)
        wave = _wave_number(batches)
        return [
            (stage.compute_ns(batches, tokens, wave), stage.hand_over_ns(tokens)) for stage in self._stages
        ]


def _scheduled_tokens(batch: BatchShape) -> int:
    tokens = batch.num_decodes
    for chunk, _ in batch.chunks:
        tokens += chunk
    return tokens


def _wave_number(batches: Sequence[BatchShape | None]) -> int:
    """A number below 2**64 that the members' step numbers decide: no two waves of a run share it, but by
    chance."""
    number = 0
    for batch in batches:
        number = ((number ^ (0 if batch is None else batch.step + 1)) * _MIX + 1) & _WORD
    return number


def build_wave_timer(
    members: Sequence[tuple[int, InstanceSpec]],
    model: ModelSpec,
    options: Sequence[InstanceOptions],
    timers: StepTimers,
    routing: ExpertRouting | None = None,
    offloads: Sequence[Offload | None] | None = None,
) -> WaveTimer:
    """The timer of a data-parallel group, or of one instance with pipeline stages or expert parallelism.

    Args:
        members: (node, instance), as ``ClusterSpec.instances`` has them; they agree on the model and on all
            parallel degrees.
        model: what they run.
        options: of every member.
        timers: the cluster's, which also knows its links.
        routing: how tokens choose experts over ``ep_size`` ranks; needed if ``ep_size`` > 1.
        offloads: of every member what it keeps elsewhere, None if nothing; None: no member does.

    Raises:
        InputError: (MissingFileError among them) a bundle does not exist, is malformed, or lacks a layer.
    """
    leader = members[0][1]
    shared = leader.ep_size > 1
    stages = []
    for index, stage in enumerate(pipeline_stages(model, leader.pp_size)):
        pairs = zip(members, options, strict=True)
        own = [timers.of(spec, model, chosen, stage, experts=not shared) for (_, spec), chosen in pairs]
        experts = None
        if shared:
            assert routing is not None
            experts = _expert_stages(members, stage, options[0], timers, own, routing)
        elsewhere = [
            None
            if offload is None
            else offload.timer(index, steps, timers.of(spec, model, chosen, stage), spec, model, chosen)
            for (_, spec), chosen, steps, offload in zip(
                members, options, own, offloads or [None] * len(members), strict=True
            )
        ]
        stages.append(WaveStage(stage, own, experts, timers.topology.pp, elsewhere))
    limits = [timer.capture_limit if timer.engine.cudagraph else 0 for timer in own]
    return WaveTimer(stages, min(limits))


def _expert_stages(
    members: Sequence[tuple[int, InstanceSpec]],
    stage: Stage,
    options: InstanceOptions,
    timers: StepTimers,
    own: Sequence[StepTimer],
    routing: ExpertRouting,
) -> list[ExpertStage]:
    """The expert layers of each group of members that hold all experts between them."""
    leader = members[0][1]
    tp, ep = leader.tp_size, leader.ep_size
    width, replicas = max(ep // tp, 1), max(tp // ep, 1)
    stages = []
    for first in range(0, len(members), width):
        team = members[first : first + width]
        tables = [own[first + rank // tp].bundle.whole_experts() for rank in range(ep)]
        exchange = None
        if width > 1:
            group = timers.topology.data_parallel([node for node, _ in team])
            exchange = TokenExchange(stage.model, ep, group, own[first].tables)
        stages.append(
            ExpertStage(
                routing,
                stage.expert_blocks,
                tables,
                replicas,
                exchange,
                leader.moe_backend,
                options.enable_block_copy,
            )
        )
    return stages
