"""Energy of a run: what the step logs say about the nodes whose power is described."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from servesim.power.quantities import AJ, joules, mean_watts
from servesim.results.units import SECOND, digits

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from servesim.power.node import NodeEnergy
    from servesim.results.meters import NodeMeter
    from servesim.results.records import InstanceLog
    from servesim.results.result import Result
    from servesim.specs.cluster import ClusterSpec

MOST_INTERVALS = 2000
"""Entries of a power series in the summary; longer runs have longer intervals."""
POWER_DTYPE = np.dtype(
    [("node", np.int64), ("start_ns", np.int64), ("end_ns", np.int64), ("power_w", np.float64)]
)


def node_meters(cluster: ClusterSpec | None, instances: Sequence[InstanceLog]) -> dict[int, NodeMeter]:
    """A meter for every node with a power section, by node."""
    powered = [] if cluster is None else [(i, node) for i, node in enumerate(cluster.nodes) if node.power]
    if not powered:
        return {}
    from servesim.results.meters import InstanceMeter, NodeMeter

    return {
        index: NodeMeter(index, node, [InstanceMeter(log) for log in instances if log.node == index])
        for index, node in powered
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
    energies = {node: meter.whole(end_ns) for node, meter in meters.items()}
    total_aj = sum(energy.total_aj for energy in energies.values())
    tokens = _output_tokens(result, set(meters))
    return {
        "total_j": joules(total_aj),
        "mean_w": mean_watts(total_aj, end_ns),
        "output_tokens": tokens,
        "j_per_output_token": round(total_aj / AJ / tokens, 9) if tokens else None,
        "tokens_per_s_per_w": round(tokens * AJ / total_aj, 9) if total_aj else None,
        "not_modelled": [node for node in range(result.cluster.num_nodes) if node not in meters],
        "not_charged": sorted({key for meter in meters.values() for key in meter.not_charged}),
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
    if missing := energy["not_charged"]:
        parts.append(f"bits moved to and from {', '.join(missing)} not charged")
    return ", ".join(parts)


def _output_tokens(result: Result, nodes: set[int]) -> int:
    """Tokens generated on ``nodes`` by finished requests."""
    on_node = np.array([instance.node in nodes for instance in result.instances], dtype=bool)
    rows = result.table
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
