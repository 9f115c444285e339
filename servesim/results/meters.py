"""Power meters of the nodes whose power is described: they read the step logs of their instances."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from servesim.memory.sizing import kv_bytes_per_token
from servesim.power.activity import Spans, moved_within
from servesim.power.node import NodeActivity, NpuActivity, node_energy
from servesim.power.quantities import mean_watts
from servesim.power.traffic import link_bytes_per_token
from servesim.specs.model import load_model

if TYPE_CHECKING:
    from array import array

    from numpy.typing import NDArray

    from servesim.power.node import NodeEnergy
    from servesim.results.records import InstanceLog
    from servesim.specs.cluster import NodeSpec


class InstanceMeter:
    """Reads what one instance did out of its step log."""

    def __init__(self, log: InstanceLog) -> None:
        self._log = log
        self._first = self._last = 0
        self._dummies = Spans.none()
        spec = log.spec
        self._sends_kv = spec.pd_type == "prefill"
        self._bytes_per_token = self._kv_bytes_per_token = 0
        if spec.num_npus > 1 or spec.ep_size > 1 or self._sends_kv:
            model = load_model(spec.model_name)
            self._bytes_per_token = link_bytes_per_token(model, spec)
            self._kv_bytes_per_token = kv_bytes_per_token(model, log.options.kv_dtype)

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
        if self._sends_kv:  # what was sent before a preemption is not sent again
            new = tokens - self._column("recomputed_tokens") + self._column("hit_tokens")
            sent += new * self._kv_bytes_per_token
        of_dummies = np.full(len(self._dummies.start_ns), self._bytes_per_token)  # one token each
        return moved_within(spans, sent, begin_ns, end_ns) + moved_within(
            self._dummies, of_dummies, begin_ns, end_ns
        )

    def tier_bytes(self, spans: Spans, begin_ns: int, end_ns: int, *, cxl: bool) -> int:
        """Moved to and from CXL or else host memory: what a lower tier of the prefix cache there is read and
        written."""
        tier = self._log.tier
        if tier is None or tier.storage.startswith("CXL") != cxl:
            return 0
        return moved_within(spans, self._column("tier_bytes"), begin_ns, end_ns)

    def pim(self, spans: Spans) -> Spans:
        """When processing-in-memory channels compute: in every step with decodes that offloads attention."""
        if not self._log.options.enable_attn_offloading:
            return Spans.none()
        decoding = self._column("decode_tokens") > 0
        return Spans(spans.start_ns[decoding], spans.end_ns[decoding])

    def _column(self, name: str) -> NDArray[np.int64]:
        return _numbers(getattr(self._log.steps, name)[self._first : self._last])


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
        link_bytes = dram_bytes = cxl_bytes = 0
        for instance in self.instances:
            spans = instance.look_at(begin_ns, end_ns)
            npus += instance.npus(spans)
            pim.append(instance.pim(spans))
            link_bytes += instance.link_bytes(spans, begin_ns, end_ns)
            dram_bytes += instance.tier_bytes(spans, begin_ns, end_ns, cxl=False)
            cxl_bytes += instance.tier_bytes(spans, begin_ns, end_ns, cxl=True)
        activity = NodeActivity(npus, Spans.union(pim), link_bytes, dram_bytes, cxl_bytes)
        return node_energy(self.spec.power, self.spec.cpu_mem.mem_size, activity, begin_ns, end_ns)

    def mean_w(self, begin_ns: int, end_ns: int) -> float:
        """Mean power over a window."""
        return mean_watts(self.energy(begin_ns, end_ns).total_aj, end_ns - begin_ns)
