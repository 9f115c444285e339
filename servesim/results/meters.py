"""Power meters of the nodes whose power is described: they read the step logs of their instances."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import replace
from functools import reduce
from itertools import pairwise
from operator import add
from typing import TYPE_CHECKING

import numpy as np

from servesim.memory.placement import CPU, NPU, PIM, kv_bytes_per_layer, placed_stages
from servesim.memory.sizing import kv_bytes_per_token
from servesim.memory.traffic import reaches_of, traffic_by_place
from servesim.power.activity import Spans, link_bytes_per_token, moved_within, shared_kv_bytes_per_token
from servesim.power.node import NodeActivity, NpuActivity, node_energy
from servesim.power.quantities import mean_watts
from servesim.slotted import dataclass
from servesim.specs.block_layers import architecture_of
from servesim.specs.memories import KINDS, split_place
from servesim.specs.model import load_model

if TYPE_CHECKING:
    from array import array
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from servesim.memory.traffic import Traffic
    from servesim.power.node import NodeEnergy
    from servesim.results.records import InstanceLog
    from servesim.specs.cluster import NodeSpec
    from servesim.specs.model import ModelSpec


_AT_ONCE = 1 << 16
"""Steps of an instance that are computed with at once."""


class InstanceMeter:
    """Reads what one instance did out of its step log."""

    def __init__(self, log: InstanceLog) -> None:
        self._log = log
        self._first = self._last = 0
        self._dummies = Spans.none()
        spec = log.spec
        self._sends_kv = spec.pd_type == "prefill"
        self._bytes_per_token = self._kv_bytes_per_token = self._shared_bytes = 0
        self._decodes_alone = False
        """Whether only decodes have queries sent around, where ranks share KV."""
        if spec.num_npus > 1 or spec.ep_size > 1 or self._sends_kv:
            model = load_model(spec.model_name)
            self._bytes_per_token = link_bytes_per_token(model, spec)
            self._kv_bytes_per_token = kv_bytes_per_token(model, log.options.kv_dtype)
            ranks, backend = log.options.decode_context_parallel_size, log.options.dcp_comm_backend
            self._shared_bytes = shared_kv_bytes_per_token(model, spec.tp_size, ranks, backend)
            self._decodes_alone = model.is_mla
        self._model: ModelSpec | None = None
        """What an instance with bytes elsewhere runs."""
        self._traffic: dict[str, list[Traffic]] = {}
        """Kind of memory -> what the steps move to and from each of that kind."""
        if log.kv_reads is not None:
            placed = self._model = load_model(spec.model_name)
            stages = placed_stages(spec, placed, log.options, architecture_of(placed))
            kv_layer_bytes = kv_bytes_per_layer(placed, log.options, spec.tp_size)
            by_place = traffic_by_place(stages, kv_layer_bytes, spec.tp_size, reaches_of(placed))
            for place, traffic in by_place.items():
                if place != NPU:
                    kind = split_place(CPU if place == PIM else place)[0]
                    self._traffic.setdefault(kind, []).append(traffic)

    def piece_ends(self) -> Iterator[int]:
        """Times in ns that cut the run into pieces of :data:`_AT_ONCE` steps."""
        for log in (self._log.steps, self._log.dummies):
            yield from (log.end_ns[step] for step in range(_AT_ONCE, len(log), _AT_ONCE))

    def look_at(self, begin_ns: int, end_ns: int) -> Spans:
        """Move to the steps in a window; returns their times, those of the step before included."""
        steps = self._log.steps
        self._first = max(bisect_right(steps.end_ns, begin_ns) - 1, 0)
        self._last = max(bisect_left(steps.start_ns, end_ns), self._first)
        if len(dummies := self._log.dummies):
            first = max(bisect_right(dummies.end_ns, begin_ns) - 1, 0)
            window = slice(first, max(bisect_left(dummies.start_ns, end_ns), first))
            self._dummies = Spans(_numbers(dummies.start_ns[window]), _numbers(dummies.end_ns[window]))
        return Spans(self._column("start_ns"), self._column("end_ns"))

    def npus(self, spans: Spans) -> list[NpuActivity]:
        """The NPUs of every pipeline stage; the stages of a step are taken to be equally long.

        Dummy batches keep them as busy as steps do.
        """
        spans = Spans.union([spans, self._dummies])
        index, spec = self._log.index, self._log.spec
        return [
            NpuActivity(
                index, stage * spec.tp_size, spec.tp_size, spec.hardware, spans.part(stage, spec.pp_size)
            )
            for stage in range(spec.pp_size)
        ]

    def link_bytes(self, spans: Spans, begin_ns: int, end_ns: int) -> int:
        """Sent by the instance's NPUs over links: collectives, and the KV cache of what it prefills for
        others (prefix hits leave with it)."""
        if not (self._bytes_per_token or self._sends_kv):
            return 0
        tokens = self._column("prefill_tokens") + self._column("decode_tokens")
        sent = tokens * self._bytes_per_token
        if self._shared_bytes:
            decodes = self._column("decode_tokens")
            # what prompts send in steps without decodes is not counted: the log does not tell their history
            sent += np.where(decodes > 0, decodes if self._decodes_alone else tokens, 0) * self._shared_bytes
        if self._sends_kv:  # what was sent before a preemption is not sent again
            new = tokens - self._column("recomputed_tokens") + self._column("hit_tokens")
            sent += new * self._kv_bytes_per_token
        of_dummies = np.full(len(self._dummies.start_ns), self._bytes_per_token)  # one token each
        return moved_within(spans, sent, begin_ns, end_ns) + moved_within(
            self._dummies, of_dummies, begin_ns, end_ns
        )

    @property
    def memories(self) -> set[str]:
        """Kinds of the memories beside its NPUs' that the instance moves bytes to and from."""
        tier = self._log.tier
        return {*self._traffic, *([split_place(tier.storage)[0]] if tier else ())}

    def memory_bytes(self, kind: str, spans: Spans, begin_ns: int, end_ns: int) -> int:
        """Moved to and from memories of one kind: what a lower tier of the prefix cache there is read and
        written, weights and KV cache that are placed there. A dummy batch reads the weights for a token."""
        moved, tier, log = 0, self._log.tier, self._log
        if tier is not None and split_place(tier.storage)[0] == kind:
            moved += moved_within(spans, self._column("tier_bytes"), begin_ns, end_ns)
        if self._model is None or kind not in self._traffic:
            return moved
        tokens, model = self._column("prefill_tokens") + self._column("decode_tokens"), self._model
        kv_tokens = np.zeros_like(tokens)
        if log.kv_reads is not None:
            kv_tokens = _numbers(log.kv_reads[self._first : self._last])
        within = {
            reach: _numbers(reads[self._first : self._last]) for reach, reads in log.window_reads.items()
        }
        one = np.ones(len(self._dummies.start_ns), dtype=np.int64)
        for traffic in self._traffic[kind]:
            of_dummies = replace(traffic, kv_bytes=0, window_bytes={}).moved(one, one, model)
            sizes = traffic.moved(tokens, kv_tokens, model, within)
            moved += moved_within(spans, sizes, begin_ns, end_ns)
            moved += moved_within(self._dummies, of_dummies, begin_ns, end_ns)
        return moved

    def pim(self, spans: Spans) -> Spans:
        """When processing-in-memory channels compute: in every step with decodes that offloads attention."""
        if not self._log.options.enable_attn_offloading:
            return Spans.none()
        decoding = self._column("decode_tokens") > 0
        return Spans(spans.start_ns[decoding], spans.end_ns[decoding])

    def _column(self, name: str) -> NDArray[np.int64]:
        return self._log.steps.column(name, self._first, self._last)


def _numbers(column: array[int]) -> NDArray[np.int64]:
    return np.array(column, dtype=np.int64)


@dataclass(slots=True)
class NodeMeter:
    """Energy of one node over any window of a run, as far as its steps have been logged."""

    node: int
    spec: NodeSpec
    instances: list[InstanceMeter]

    def energy(self, begin_ns: int, end_ns: int) -> NodeEnergy:
        """Energy from ``begin_ns`` to ``end_ns``; adjacent windows add up exactly."""
        assert self.spec.power is not None
        npus: list[NpuActivity] = []
        pim: list[Spans] = []
        link_bytes = 0
        memory_bytes: dict[str, int] = {}
        for instance in self.instances:
            spans = instance.look_at(begin_ns, end_ns)
            npus += instance.npus(spans)
            pim.append(instance.pim(spans))
            link_bytes += instance.link_bytes(spans, begin_ns, end_ns)
            for kind in instance.memories:
                payer = KINDS[kind].power or ""
                moved = instance.memory_bytes(kind, spans, begin_ns, end_ns)
                memory_bytes[payer] = memory_bytes.get(payer, 0) + moved
        activity = NodeActivity(npus, Spans.union(pim), link_bytes, memory_bytes)
        return node_energy(self.spec.power, self.spec.cpu_mem.mem_size, activity, begin_ns, end_ns)

    def whole(self, end_ns: int) -> NodeEnergy:
        """Energy of a run that ends at ``end_ns``, worked out in pieces: a long one has a hundred million
        steps."""
        cuts = {cut for instance in self.instances for cut in instance.piece_ends() if 0 < cut < end_ns}
        edges = [0, *sorted(cuts), end_ns]
        return reduce(add, (self.energy(*window) for window in pairwise(edges)))

    @property
    def not_charged(self) -> set[str]:
        """Config keys of memories whose bits no device of the power section pays for."""
        kinds = (KINDS[kind] for instance in self.instances for kind in instance.memories)
        return {kind.field for kind in kinds if not (kind.power and getattr(self.spec.power, kind.power))}

    def mean_w(self, begin_ns: int, end_ns: int) -> float:
        """Mean power over a window."""
        return mean_watts(self.energy(begin_ns, end_ns).total_aj, end_ns - begin_ns)
