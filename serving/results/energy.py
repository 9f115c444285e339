"""Energy of a run: what the step logs say about the nodes whose power is described."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from serving.memory.sizing import kv_bytes_per_token
from serving.power.activity import Spans, moved_within
from serving.power.node import NodeActivity, NpuActivity, node_energy
from serving.power.quantities import AJ, joules, mean_watts
from serving.power.traffic import link_bytes_per_token
from serving.results.units import SECOND, digits
from serving.specs.model import load_model

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from serving.power.node import NodeEnergy
    from serving.results.records import InstanceLog
    from serving.results.result import Result
    from serving.specs.cluster import ClusterSpec, NodeSpec

MOST_INTERVALS = 2000
"""Entries of a power series in the summary; longer runs have longer intervals."""
POWER_DTYPE = np.dtype(
    [("node", np.int64), ("start_ns", np.int64), ("end_ns", np.int64), ("power_w", np.float64)]
)


class InstanceMeter:
    """Reads what one instance did out of its step log."""

    def __init__(self, log: InstanceLog) -> None:
        self._log = log
        self._first = self._last = 0
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
        return Spans(self._column("start_ns"), self._column("end_ns"))

    def npus(self, spans: Spans) -> list[NpuActivity]:
        """The NPUs of every pipeline stage; the stages of a step are taken to be equally long."""
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
        if self._sends_kv:
            sent += (tokens + self._column("hit_tokens")) * self._kv_bytes_per_token
        return moved_within(spans, sent, begin_ns, end_ns)

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
        return np.array(getattr(self._log.steps, name)[self._first : self._last], dtype=np.int64)


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


def node_meters(cluster: ClusterSpec | None, instances: Sequence[InstanceLog]) -> dict[int, NodeMeter]:
    """A meter for every node with a power section, by node."""
    if cluster is None:
        return {}
    return {
        index: NodeMeter(index, node, [InstanceMeter(log) for log in instances if log.node == index])
        for index, node in enumerate(cluster.nodes)
        if node.power is not None
    }


def boundaries(end_ns: int, interval_ns: int) -> list[tuple[int, int]]:
    """The intervals of a run, the last one for what is left."""
    return [(start, min(start + interval_ns, end_ns)) for start in range(0, end_ns, interval_ns)]


def power_series(result: Result, interval_ns: int) -> NDArray[np.void]:
    """Mean power of every modelled node in every interval of a run, node by node.

    Raises:
        ValueError: ``interval_ns`` is not positive.
    """
    if interval_ns < 1:
        raise ValueError(f"an interval of {interval_ns} ns is not allowed; must be at least 1 ns")
    meters = node_meters(result.cluster, result.instances).values()
    windows = boundaries(result.log.end_ns, interval_ns)
    rows = [(meter.node, *window, meter.mean_w(*window)) for meter in meters for window in windows]
    return np.array(rows, dtype=POWER_DTYPE)


def series_interval_ns(result: Result) -> int:
    """The log interval, or as many of them as keep a series within :data:`MOST_INTERVALS`."""
    interval_s = result.options.log_interval if result.options is not None else 1.0
    interval_ns = max(round(interval_s * SECOND), 1)
    return interval_ns * max(-(-result.log.end_ns // (interval_ns * MOST_INTERVALS)), 1)


def energy_entry(result: Result) -> dict[str, Any] | None:
    """``energy`` of the summary; None if no node has a power section."""
    meters = node_meters(result.cluster, result.instances)
    if result.cluster is None or not meters:
        return None
    end_ns, interval_ns = result.log.end_ns, series_interval_ns(result)
    energies = {node: meter.energy(0, end_ns) for node, meter in meters.items()}
    total_aj = sum(energy.total_aj for energy in energies.values())
    tokens = _output_tokens(result, set(meters))
    return {
        "total_j": joules(total_aj),
        "mean_w": mean_watts(total_aj, end_ns),
        "output_tokens": tokens,
        "j_per_output_token": round(total_aj / AJ / tokens, 9) if tokens else None,
        "tokens_per_s_per_w": round(tokens * AJ / total_aj, 9) if total_aj else None,
        "not_modelled": [node for node in range(result.cluster.num_nodes) if node not in meters],
        "interval_s": interval_ns / SECOND,
        "per_node": [
            _node_entry(meters[node], energy, end_ns, interval_ns) for node, energy in energies.items()
        ],
    }


def energy_line(energy: dict[str, Any] | None) -> str:
    """:func:`energy_entry` on one line."""
    if energy is None:
        return "not modelled"
    parts = [f"{digits(energy['total_j'])} J", f"{digits(energy['mean_w'])} W on average"]
    if energy["j_per_output_token"] is not None:
        parts.append(f"{digits(energy['j_per_output_token'])} J per output token")
    if missing := energy["not_modelled"]:
        parts.append(f"node{'s' if len(missing) > 1 else ''} {', '.join(map(str, missing))} not modelled")
    return ", ".join(parts)


def _output_tokens(result: Result, nodes: set[int]) -> int:
    """Tokens generated on ``nodes`` by finished requests."""
    on_node = np.array([instance.node in nodes for instance in result.instances], dtype=bool)
    rows = result.requests
    return int(rows["output"][on_node[rows["decode_instance"]]].sum())


def _node_entry(meter: NodeMeter, energy: NodeEnergy, end_ns: int, interval_ns: int) -> dict[str, Any]:
    return {
        "node": meter.node,
        "total_j": joules(energy.total_aj),
        "mean_w": mean_watts(energy.total_aj, end_ns),
        "devices_j": {device: joules(taken) for device, taken in energy.devices.items()},
        "npus": [
            {
                "instance": npu.instance,
                "npu": npu.npu,
                "energy_j": joules(npu.energy_aj),
                "active_s": npu.states.active_ns / SECOND,
                "standby_s": npu.states.standby_ns / SECOND,
                "idle_s": npu.states.idle_ns / SECOND,
            }
            for npu in energy.npus
        ],
        "power_w": [meter.mean_w(*window) for window in boundaries(end_ns, interval_ns)],
    }
