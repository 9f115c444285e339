"""Closed-form times of collectives over a ring of ranks.

Every function takes the payload in bytes, the bandwidth of one link in GB/s (1e9 bytes/s, so bytes per ns)
and the latency of one hop in ns, and returns ns. ``payload_bytes`` is the size of the full buffer that every
rank ends up holding (all-gather), starts with (all-reduce, reduce-scatter) or spreads over its peers
(all-to-all). The formulas are the usual bandwidth-optimal ring ones (Thakur et al., "Optimization of
Collective Communication Operations in MPICH", 2005): N-1 hops that each move 1/N of the payload; an
all-reduce is a reduce-scatter and an all-gather.
"""

from __future__ import annotations


def ring_all_reduce_ns(ranks: int, payload_bytes: float, bandwidth_gbs: float, latency_ns: float) -> float:
    """``2 (N-1) (latency + payload / N / bandwidth)``; 0 for a single rank."""
    return 2 * _ring_pass_ns(ranks, payload_bytes, bandwidth_gbs, latency_ns)


def ring_all_gather_ns(ranks: int, payload_bytes: float, bandwidth_gbs: float, latency_ns: float) -> float:
    """``(N-1) (latency + payload / N / bandwidth)``; 0 for a single rank."""
    return _ring_pass_ns(ranks, payload_bytes, bandwidth_gbs, latency_ns)


def ring_reduce_scatter_ns(
    ranks: int, payload_bytes: float, bandwidth_gbs: float, latency_ns: float
) -> float:
    """``(N-1) (latency + payload / N / bandwidth)``; 0 for a single rank."""
    return _ring_pass_ns(ranks, payload_bytes, bandwidth_gbs, latency_ns)


def ring_all_to_all_ns(ranks: int, payload_bytes: float, bandwidth_gbs: float, latency_ns: float) -> float:
    """``(N-1) (latency + payload / N / bandwidth)``; 0 for a single rank."""
    return _ring_pass_ns(ranks, payload_bytes, bandwidth_gbs, latency_ns)


def send_ns(payload_bytes: float, bandwidth_gbs: float, latency_ns: float) -> float:
    """One transfer over one link: ``latency + payload / bandwidth``."""
    return latency_ns + payload_bytes / bandwidth_gbs


def _ring_pass_ns(ranks: int, payload_bytes: float, bandwidth_gbs: float, latency_ns: float) -> float:
    """Once around the ring: N-1 hops of 1/N of the payload each."""
    return (ranks - 1) * (latency_ns + payload_bytes / ranks / bandwidth_gbs)
