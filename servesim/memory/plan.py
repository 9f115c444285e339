"""The start-up plan: how many KV-cache blocks fit beside the weights, and how sure that is.

Follows what vLLM does at start-up: it profiles the memory that weights, activations and libraries need and
gives the rest of ``utilization x total`` to the KV cache. What it would measure is estimated here
(:mod:`servesim.memory.engine_memory`), and the spread of the estimate carried along.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from servesim.errors import InputError, NotSupportedError
from servesim.memory.engine_memory import (
    Estimate,
    activations,
    cuda_graphs,
    engine_memory,
    engine_version,
    exactly,
    npu_bytes,
    outside_torch,
    total,
)
from servesim.memory.group_tables import GroupRules
from servesim.memory.kv_groups import KvPlan, plan_groups
from servesim.memory.kv_layers import kv_layers
from servesim.memory.sizing import GIB, drafter_bytes, kv_bytes_per_token, weight_bytes_per_npu
from servesim.slotted import dataclass
from servesim.specs.hardware import load_hardware
from servesim.specs.vllm_versions import SETTLED_FREES
from servesim.specs.weights import MXFP4_TILE, MXFP4_TILE_MARLIN, rank_bytes, stage_layers

if TYPE_CHECKING:
    from collections.abc import Sequence

    from servesim.memory.ledger import Share
    from servesim.specs.cluster import InstanceSpec
    from servesim.specs.hardware import HardwareSpec
    from servesim.specs.instance_options import InstanceOptions
    from servesim.specs.model import ModelSpec


@dataclass(frozen=True, slots=True)
class KvCapacity:
    """Memory plan of one NPU of an instance, in bytes; the same on every rank."""

    num_blocks: int
    """Blocks of the pool, vLLM's null block included."""
    block_size: int
    bytes_per_token: int
    bytes_per_block: int
    kv_bytes: int
    weight_bytes: int
    activation_bytes: int
    non_torch_bytes: int
    graph_bytes: int
    """Of CUDA graphs, as far as they are taken from the KV cache."""
    total_bytes: int
    utilization: float
    overridden: bool
    """Whether ``num_gpu_blocks`` of the cluster config set the number of blocks."""
    band_blocks: tuple[int, int]
    """The least and the most blocks that the start-ups behind the estimate allow; equal where nothing is
    estimated."""
    engine: str
    """Versions of vLLM whose start-ups the estimate follows."""
    outside: tuple[Share, ...] = ()
    """What lies elsewhere; ``weight_bytes`` and ``kv_bytes`` are without it, bytes per token and block with
    it."""
    plan: KvPlan | None = None
    """The groups of layers that do not all keep every token; None: all is one group, and does."""
    step_tokens: int = 0
    """Tokens in flight that vLLM reckons with as it starts, for layers with windows."""
    longest: int = 0
    """Tokens of the longest context; of requests so long vLLM counts the size of its KV cache."""

    @property
    def npu_bytes_per_block(self) -> int:
        """KV bytes of a block on the NPU that holds most of it."""
        return self.kv_bytes // self.num_blocks

    @property
    def tokens(self) -> int:
        """Tokens the pool holds; of requests of the longest context, where that makes a difference."""
        return self._tokens(self.num_blocks)

    @property
    def band_tokens(self) -> tuple[int, int]:
        """Tokens at the ends of :attr:`band_blocks`."""
        low, high = self.band_blocks
        return self._tokens(low), self._tokens(high)

    def _tokens(self, blocks: int) -> int:
        if self.plan is None:
            return blocks * self.block_size
        return int(blocks / self.request_blocks(self.longest) * self.longest)

    def request_blocks(self, tokens: int) -> int:
        """Blocks that one request of ``tokens`` tokens takes, as vLLM counts before it starts."""
        if self.plan is None:
            return -(-tokens // self.block_size)
        return self.plan.request_blocks(tokens, self.step_tokens)

    def admitted_blocks(self, tokens: int, options: InstanceOptions) -> int:
        """Free blocks that it takes to admit a request that has ``tokens`` tokens to compute, at most."""
        if self.plan is None:
            return -(-tokens // self.block_size)
        return self.plan.admitted_blocks(tokens, tokens_in_flight(options))

    @property
    def usable_blocks(self) -> int:
        """Blocks that requests can hold."""
        return self.num_blocks - 1


def tokens_in_flight(options: InstanceOptions) -> int:
    """Tokens, at most, of the steps that may still read a block behind a window when it is given back."""
    return group_rules(options).admitted_tokens


def group_rules(options: InstanceOptions) -> GroupRules:
    """What decides how groups of layers keep blocks, for an instance."""
    return GroupRules(
        options.vllm_version,
        options.max_num_batched_tokens,
        2 if options.async_scheduling else 1,
        options.max_model_len,
    )


def kv_plan(model: ModelSpec, options: InstanceOptions, tp: int = 1, pp: int = 1) -> KvPlan:
    """The groups of an instance's layers on the rank that keeps most.

    Raises:
        NotSupportedError: a layer keeps something that is not modelled, or layers of several kinds are split
            over pipeline stages.
    """
    model = options.kept(model)
    layers = model.layers.layers
    plans, first = [], 0
    for count in stage_layers(len(layers), pp):
        part = layers[first : first + count]
        first += count
        kept = kv_layers(model.layers, options.kv_dtype, tp, options.block_size, part)
        if not kept:
            continue
        plan = plan_groups(kept, hybrid=not options.disable_hybrid_kv_cache_manager)
        plan = plan.shared_by(options.decode_context_parallel_size)
        plans.append(replace(plan, states_held=2 if options.enable_prefix_caching else 1))
    if pp > 1 and not all(plan.is_plain for plan in plans):
        raise NotSupportedError(
            f"pp_size: {pp} is not modelled for {model.name}, whose layers do not all keep every token (its "
            "KV groups would span pipeline stages); use pp_size 1"
        )
    return max(plans, key=lambda plan: plan.bytes_per_block)


_HOPPER = range(9, 10)
"""Major compute capability."""
_STEPS_COUNTED_SINCE = engine_version(SETTLED_FREES.since)
"""From this version on, what a window keeps is reckoned with all steps in flight."""
_WEIGHT_ERROR = 0.001
"""Weights as start-up logs give them are within this share of the parameters' bytes (21 checkpoints)."""


@dataclass(frozen=True, slots=True)
class _Reserve:
    """What is kept from the KV cache, by what takes it."""

    activations: Estimate
    non_torch: Estimate
    graphs: Estimate

    @property
    def sum(self) -> Estimate:
        return total([self.activations, self.non_torch, self.graphs])


def _reserve(
    model: ModelSpec, instance: InstanceSpec, options: InstanceOptions, version: str | None
) -> _Reserve:
    if instance.npu_mem.reserve is not None:
        return _Reserve(exactly(int(instance.npu_mem.reserve * GIB)), exactly(0), exactly(0))
    engine = engine_memory(version)
    tp, ep = instance.tp_size, instance.ep_size
    seqs, tokens = options.max_num_seqs, options.max_num_batched_tokens
    return _Reserve(
        activations(model, tokens, seqs, tp, ep, engine),
        outside_torch(alone=instance.num_npus == 1 and ep == 1),
        cuda_graphs(engine, captured=options.cudagraph),
    )


_TRITON_COMES_WITH = (0, 12)
"""First version of vLLM whose wheel has ``third_party/triton_kernels``; that of 0.11.2 has not."""


def mxfp4_tiles(
    hardware: HardwareSpec, version: str | None = None
) -> tuple[tuple[int, int], tuple[int, int]]:
    """What MXFP4 experts are padded to, as vLLM chooses kernels: likely, and at most.

    Args:
        hardware: whose compute capability decides.
        version: of vLLM; None: the hardware file's.

    Hopper: the Triton kernels that come with vLLM from 0.12 on, which pad least; before, Marlin's, unless the
    other ones were installed beside it (``get_mxfp4_backend``). Before Hopper and on compute capability 12:
    Marlin's. 10: FlashInfer's, which pad as much
    (vllm/model_executor/layers/fused_moe/oracle/mxfp4.py of 0.24 to 0.33).
    """
    capability = hardware.compute_capability
    brought = engine_version(version or hardware.plan_as_vllm) >= _TRITON_COMES_WITH
    if (capability is None or int(float(capability)) in _HOPPER) and brought:
        return MXFP4_TILE, MXFP4_TILE_MARLIN
    return MXFP4_TILE_MARLIN, MXFP4_TILE_MARLIN


def kv_room(
    model: ModelSpec,
    instance: InstanceSpec,
    options: InstanceOptions,
    hardware: HardwareSpec | None = None,
    tile: tuple[int, int] | None = None,
) -> Estimate:
    """Bytes that are left for the KV cache on one NPU that keeps everything; negative: the rest does not fit.

    ``tile``: what MXFP4 experts are padded to; None: as :func:`mxfp4_tiles` says.
    """
    hardware = hardware or load_hardware(instance.hardware)
    budget = int(npu_bytes(instance, hardware) * options.npu_memory_utilization)
    reserve = _reserve(model, instance, options, hardware.plan_as_vllm)
    stored = model.stored_as(options.dtype)
    tiles = (tile, tile) if tile else mxfp4_tiles(hardware)
    degrees = instance.tp_size, instance.pp_size, instance.ep_size
    likely, most = (rank_bytes(stored, *degrees, tile=each) for each in tiles)
    if instance.npu_mem.reserve is not None:
        return exactly(budget - likely - reserve.sum.likely)
    slack = int(likely * _WEIGHT_ERROR)
    return Estimate(
        budget - most - slack - reserve.sum.high,
        budget - likely - reserve.sum.likely,
        budget - likely + slack - reserve.sum.low,
    )


def kv_cache_capacity(
    model: ModelSpec,
    instance: InstanceSpec,
    options: InstanceOptions,
    where: str = "instance",
    on_npus: Sequence[tuple[int, int]] | None = None,
    outside: tuple[Share, ...] = (),
    hardware: HardwareSpec | None = None,
) -> KvCapacity:
    """Plan the memory of one NPU of ``instance``.

    ``npu_mem.reserve`` (GiB) replaces the estimate of everything that is neither weights nor KV cache;
    ``num_gpu_blocks`` sets the number of blocks outright.

    ``on_npus``: (weight bytes, KV bytes per token) of a rank of each pipeline stage, where some of them lie
    ``outside``, and all layers keep every token; None: everything is on the NPUs. The memory that is full
    first bounds the blocks.
    ``hardware``: what its file says; None: it is read.

    Raises:
        InputError: the weights do not fit, or no block is left for the KV cache.
    """
    tp, pp, ep = instance.tp_size, instance.pp_size, instance.ep_size
    hardware = hardware or load_hardware(instance.hardware)
    version = options.plan_as_vllm or hardware.plan_as_vllm
    whole = npu_bytes(instance, hardware)
    budget = int(whole * options.npu_memory_utilization)
    size, plan = options.block_size, None
    padding = 0
    if on_npus is None:
        plan = kv_plan(model, options, tp, pp)
        size, per_token = plan.block_size, round(plan.bytes_per_token)
        likely, most = (
            weight_bytes_per_npu(model, options.dtype, tp, pp, ep, tile)
            for tile in mxfp4_tiles(hardware, version)
        )
        on_npus, padding = [(likely, plan.bytes_per_block)], most - likely
        if options.speculative:
            own, more = drafter_bytes(options.speculative, model, options.dtype, options.kv_dtype, tp)
            per_token += more
            on_npus = [(likely + own, plan.bytes_per_block + more * size)]
    else:
        if not kv_plan(model, options, tp, pp).is_plain:
            raise NotSupportedError(
                f"{where}: placement and attention in memory are not modelled for {model.name}, whose layers "
                "do not all keep every token; leave them out, or choose a model of full attention"
            )
        per_token = kv_bytes_per_token(model, options.kv_dtype, tp, pp)
        on_npus = [(own, each * size) for own, each in on_npus]
    block_bytes = plan.bytes_per_block if plan and not options.speculative else per_token * size
    weights = max(stage for stage, _ in on_npus)
    reserve = _reserve(model, instance, options, version)

    def blocks_beside(reserved_bytes: int) -> int:
        room = budget - reserved_bytes
        fits = [(room - own) // each for own, each in on_npus if each]
        return min(
            fits + [memory.blocks(options.block_size) for memory in outside if memory.kv_bytes_per_token]
        )

    if weights > budget:
        raise InputError(
            f"{where}: the {options.dtype} weights of {model.name} take {weights / GIB:.2f} GiB per NPU "
            f"(tp_size {tp}, pp_size {pp}), but npu_mem allows {budget / GIB:.2f} GiB "
            f"({whole / GIB:.5g} GiB x utilization {options.npu_memory_utilization:g}); raise tp_size, "
            "choose a smaller --dtype, or an NPU with more memory"
        )
    for memory in outside:
        if memory.kv_bytes_per_token and memory.blocks(options.block_size) < 2:
            raise InputError(f"{where}: {memory.no_room(options.block_size)}")
    given = options.num_gpu_blocks
    num_blocks = blocks_beside(reserve.sum.likely) if given is None else given
    left = budget - weights - reserve.sum.likely
    if given is None and (num_blocks < 2 or left < 0):  # the KV cache may lie elsewhere altogether
        raise InputError(
            f"{where}: no room for the KV cache: of {budget / GIB:.2f} GiB, weights take {weights / GIB:.2f} "
            f"GiB and activations and libraries {reserve.sum.likely / GIB:.2f} GiB, which leaves "
            f"{left} bytes for blocks of {block_bytes} bytes (2 are needed at least); "
            "lower --max-num-batched-tokens or --max-num-seqs, raise --npu-memory-utilization or tp_size"
        )
    band = num_blocks, num_blocks
    if given is None and instance.npu_mem.reserve is None:
        slack = int(weights * _WEIGHT_ERROR)
        most_reserved = reserve.sum.high + slack + padding
        band = max(blocks_beside(most_reserved), 2), blocks_beside(reserve.sum.low - slack)
    grouped = None if plan is None or plan.is_plain else plan
    steps = 2 if options.async_scheduling and engine_version(version) >= _STEPS_COUNTED_SINCE else 1
    return KvCapacity(
        num_blocks=num_blocks,
        block_size=size,
        bytes_per_token=per_token,
        bytes_per_block=block_bytes,
        kv_bytes=num_blocks * max(each for _, each in on_npus),
        weight_bytes=weights,
        activation_bytes=reserve.activations.likely,
        non_torch_bytes=reserve.non_torch.likely,
        graph_bytes=reserve.graphs.likely,
        total_bytes=whole,
        utilization=options.npu_memory_utilization,
        overridden=given is not None,
        band_blocks=band,
        engine=engine_memory(version).versions,
        outside=outside,
        plan=grouped,
        step_tokens=steps * options.max_num_batched_tokens,
        longest=options.max_model_len,
    )
