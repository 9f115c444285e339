"""Bytes that one token of a step sends over the links between NPUs, summed over all links."""

from __future__ import annotations

from math import comb
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from servesim.specs.cluster import InstanceSpec
    from servesim.specs.model import ModelSpec

ACTIVATION_BYTES = 2
"""Hidden states travel in 16 bit."""


def link_bytes_per_token(model: ModelSpec, instance: InstanceSpec) -> int:
    """Collectives and hand-overs of an instance, bytes per token that it computes."""
    return (
        all_reduce_bytes_per_token(model, instance.tp_size)
        + stage_bytes_per_token(model, instance.pp_size)
        + expert_bytes_per_token(model, instance.tp_size, instance.ep_size, instance.moe_backend)
    )


def all_reduce_bytes_per_token(model: ModelSpec, tp: int) -> int:
    """Tensor parallelism: two all-reduces of a hidden state per transformer block.

    In a ring each of N ranks sends ``2 (N-1) / N`` of the payload, all of them ``2 (N-1)`` times the payload
    (Thakur et al., "Optimization of Collective Communication Operations in MPICH", 2005).
    """
    return 2 * model.num_hidden_layers * 2 * (tp - 1) * model.hidden_size * ACTIVATION_BYTES


def stage_bytes_per_token(model: ModelSpec, pp: int) -> int:
    """Pipeline parallelism: a hidden state from every stage to the next."""
    return (pp - 1) * model.hidden_size * ACTIVATION_BYTES


def expert_bytes_per_token(model: ModelSpec, tp: int, ep: int, backend: str) -> int:
    """Expert parallelism over M = ep / tp members of a data-parallel group: dispatch and combine.

    ``allgather_reducescatter``: hidden state and router logits to each of the M-1 others, a hidden state from
    each. ``all_to_all``: a hidden state to each other member that has one of the token's k experts, with
    probability ``1 - C(E - E/ep, k) / C(E, k)``, and one back. Every tensor-parallel rank does so.
    """
    members = ep // tp
    if not model.is_moe or members < 2:
        return 0
    layers = sum(model.has_experts(block) for block in range(model.num_hidden_layers))
    hidden, logits = model.hidden_size * ACTIVATION_BYTES, model.num_experts * ACTIVATION_BYTES
    if backend == "all_to_all":
        elsewhere = model.num_experts - model.num_experts // ep
        chosen = model.num_experts_per_tok
        chance = 1.0 - comb(elsewhere, chosen) / comb(model.num_experts, chosen)
        return round(layers * tp * (members - 1) * 2 * chance * hidden)
    return layers * tp * (members - 1) * (2 * hidden + logits)
