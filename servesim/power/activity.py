"""When devices are busy, what that makes of a window of time, and the bytes that a step sends over links."""

from __future__ import annotations

from math import comb
from typing import TYPE_CHECKING

import numpy as np

from servesim.slotted import dataclass
from servesim.specs.context_parallel import shared_attention
from servesim.specs.layers import LatentAttention
from servesim.specs.vllm_versions import experts_by_chunk

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from servesim.specs.cluster import InstanceSpec
    from servesim.specs.model import ModelSpec


@dataclass(slots=True, frozen=True)
class Spans:
    """Times of activity in ns, one entry each; overlapping ones count once.

    Both columns never decrease from one entry to the next, as those of the steps of one instance do.
    """

    start_ns: NDArray[np.int64]
    end_ns: NDArray[np.int64]

    @classmethod
    def none(cls) -> Spans:
        """No activity at all."""
        nothing = np.empty(0, dtype=np.int64)
        return cls(nothing, nothing)

    @classmethod
    def union(cls, several: Sequence[Spans]) -> Spans:
        """Times at which at least one of several devices is active."""
        several = [spans for spans in several if len(spans.start_ns)]
        if not several:
            return cls.none()
        if len(several) == 1:
            return several[0]
        starts = np.concatenate([spans.start_ns for spans in several])
        ends = np.concatenate([spans.end_ns for spans in several])
        order = np.argsort(starts, kind="stable")
        return cls(starts[order], np.maximum.accumulate(ends[order]))

    def part(self, index: int, of: int) -> Spans:
        """Part ``index`` of every entry cut into ``of`` equal parts: the turn of one pipeline stage."""
        if of == 1:
            return self
        length = self.end_ns - self.start_ns
        return Spans(
            self.start_ns + length * index // of,
            self.start_ns + length * (index + 1) // of,
        )


@dataclass(slots=True, frozen=True)
class States:
    """A window of time by what a device did in it, ns."""

    active_ns: int
    standby_ns: int
    idle_ns: int

    def __add__(self, later: States) -> States:
        """Of this window and one that follows it."""
        return States(
            self.active_ns + later.active_ns,
            self.standby_ns + later.standby_ns,
            self.idle_ns + later.idle_ns,
        )


def states(spans: Spans, begin_ns: int, end_ns: int, standby_duration_ns: int = 0) -> States:
    """How long a device was active, in standby and idle in ``begin_ns`` to ``end_ns``.

    Standby is the time after activity until the next activity or until ``standby_duration_ns`` are over,
    whichever comes first. For every way of cutting a window in pieces, the pieces add up to the whole.
    """
    ends = spans.end_ns
    if not len(ends):
        return States(0, 0, end_ns - begin_ns)
    # Each span from where the one before has ended, and when the next one takes over; all cut to the window.
    times = np.empty((3, len(ends)), dtype=np.int64)
    starts, closes, calms = times
    closes[:] = ends
    starts[0] = spans.start_ns[0]
    np.maximum(spans.start_ns[1:], ends[:-1], out=starts[1:])
    np.minimum(starts[1:], ends[:-1] + standby_duration_ns, out=calms[:-1])
    calms[-1] = ends[-1] + standby_duration_ns
    np.minimum(np.maximum(times, begin_ns, out=times), end_ns, out=times)
    active, standby = np.diff(times, axis=0).sum(axis=1).tolist()
    return States(active, standby, end_ns - begin_ns - active - standby)


def moved_within(spans: Spans, amounts: NDArray[np.int64], begin_ns: int, end_ns: int) -> int:
    """What of ``amounts``, each moved evenly over its span, falls in ``begin_ns`` to ``end_ns``.

    Whole units: by a time within a span the share that is past, rounded down, has been moved. So pieces of a
    window add up to the whole.
    """
    return _moved_by(spans, amounts, end_ns) - _moved_by(spans, amounts, begin_ns)


def _moved_by(spans: Spans, amounts: NDArray[np.int64], time_ns: int) -> int:
    done = int(np.searchsorted(spans.end_ns, time_ns, side="right"))
    begun = max(int(np.searchsorted(spans.start_ns, time_ns)), done)
    moved: int = sum(amounts[:done].tolist())  # of any size; bytes of a long run pass 63 bits
    for index in range(done, begun):
        start, end = int(spans.start_ns[index]), int(spans.end_ns[index])
        moved += int(amounts[index]) * (time_ns - start) // (end - start)
    return moved


ACTIVATION_BYTES = 2
"""Hidden states travel in 16 bit."""


def link_bytes_per_token(model: ModelSpec, instance: InstanceSpec) -> int:
    """Collectives and hand-overs of an instance, bytes per token that it computes."""
    return (
        all_reduce_bytes_per_token(model, instance.tp_size, instance.ep_size)
        + stage_bytes_per_token(model, instance.pp_size)
        + expert_bytes_per_token(model, instance.tp_size, instance.ep_size, instance.moe_backend)
    )


def all_reduce_bytes_per_token(model: ModelSpec, tp: int, ep: int = 1) -> int:
    """Tensor parallelism: two all-reduces of a hidden state per transformer block.

    One where every rank takes a chunk of the tokens to the experts.

    In a ring each of N ranks sends ``2 (N-1) / N`` of the payload, all of them ``2 (N-1)`` times the payload
    (Thakur et al., "Optimization of Collective Communication Operations in MPICH", 2005).
    """
    reduces = 2 * model.num_hidden_layers
    if experts_by_chunk(model.model_type, tp, ep):
        reduces -= _expert_layers(model)
    return reduces * 2 * (tp - 1) * model.hidden_size * ACTIVATION_BYTES


def shared_kv_bytes_per_token(model: ModelSpec, tp: int, ranks: int, backend: str) -> int:
    """Decode context parallelism: queries, log-sum-exps and outputs among the ``ranks`` that share KV.

    A pass of N ranks sends ``N - 1`` times its payload, in each of the ``tp / N`` groups; payloads as in
    :class:`servesim.cost.context_parallel.ContextExchange`. A decode in latent attention; any token in
    attention over heads, of steps in which something has KV.
    """
    if ranks == 1:
        return 0
    attention = shared_attention(model)
    if isinstance(attention, LatentAttention):
        query, value = attention.kv_rank + attention.rope_dim, attention.kv_rank
    else:
        query, value = attention.head_dim, attention.value_dim
    sums = 2 if backend == "a2a" else ranks * 2  # of 32 bit, in 16-bit elements
    elements = query + value + sums
    heads = attention.heads // tp * ranks
    return model.num_hidden_layers * (tp // ranks) * (ranks - 1) * heads * elements * ACTIVATION_BYTES


def stage_bytes_per_token(model: ModelSpec, pp: int) -> int:
    """Pipeline parallelism: a hidden state from every stage to the next."""
    return (pp - 1) * model.hidden_size * ACTIVATION_BYTES


def expert_bytes_per_token(model: ModelSpec, tp: int, ep: int, backend: str) -> int:
    """Expert parallelism over M = ep / tp members of a data-parallel group: dispatch and combine.

    ``allgather_reducescatter``: hidden state and router logits to each of the M-1 others, a hidden state from
    each. ``all_to_all``: a hidden state to each other member that has one of the token's k experts, with
    probability ``1 - C(E - E/ep, k) / C(E, k)``, and one back. Every tensor-parallel rank does so; or the one
    that has the token in its chunk, to all ranks, and hands the result to the others of its member.
    """
    members = ep // tp
    if not model.is_moe or members < 2:
        return 0
    layers = _expert_layers(model)
    hidden, logits = model.hidden_size * ACTIVATION_BYTES, model.num_experts * ACTIVATION_BYTES
    others, gathered = tp * (members - 1), 0
    if experts_by_chunk(model.model_type, tp, ep):
        others, gathered = ep - 1, layers * (tp - 1) * hidden
    if backend != "allgather_reducescatter":
        elsewhere = model.num_experts - model.num_experts // ep
        chosen = model.num_experts_per_tok
        chance = 1.0 - comb(elsewhere, chosen) / comb(model.num_experts, chosen)
        ways = 2.0 if backend == "all_to_all" else 1.5  # DeepEP's tokens travel in 8 bit, results in 16
        return round(layers * others * ways * chance * hidden) + gathered
    return layers * others * (2 * hidden + logits) + gathered


def _expert_layers(model: ModelSpec) -> int:
    return sum(model.has_experts(block) for block in range(model.num_hidden_layers))
