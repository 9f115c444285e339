"""How many bytes the weights take, and how many KV-cache blocks fit beside them.

Follows what vLLM does at start-up: it profiles the memory that weights, activations and libraries need and
gives the rest of ``utilization x total`` to the KV cache. Activations cannot be profiled here; the estimate
is explained at :func:`activation_bytes`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from servesim.errors import InputError
from servesim.specs.dtypes import dtype_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from servesim.specs.cluster import InstanceSpec
    from servesim.specs.model import ModelSpec
    from servesim.specs.options import InstanceOptions

GIB = 1 << 30
_HALF = 2  # bytes of a 16-bit float
_LOGIT_BYTES = 14  # sampler: logits in 16 and 32 bit, sorted copy, probabilities; fitted to one vLLM start-up
_NON_TORCH_BYTES_TP1 = GIB // 4
_NON_TORCH_BYTES_TP = 21 * GIB // 10  # NCCL buffers and CUDA contexts of a tensor-parallel rank


@dataclass(frozen=True, slots=True)
class Outside:
    """What an instance, all its ranks together, keeps in a memory that is not its NPUs'."""

    place: str
    """``cpu``, ``cxl:<device>`` or ``pim``."""
    weight_bytes: int
    kv_bytes_per_token: int
    room_bytes: int
    """For the instance's KV cache."""
    total_bytes: int
    """Of the memory."""

    def blocks(self, block_size: int) -> int:
        """KV blocks that fit."""
        return self.room_bytes // (self.kv_bytes_per_token * block_size)

    def no_room(self, block_size: int) -> str:
        """That not even two blocks fit, with the figures."""
        return (
            f"no room for the KV cache in {self.place}: of {self.total_bytes} bytes, {self.room_bytes} are "
            "left to this instance beside weights and other instances, for blocks of "
            f"{self.kv_bytes_per_token * block_size} bytes (2 are needed at least); choose a larger memory "
            "or another kv_loc"
        )


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
    total_bytes: int
    utilization: float
    overridden: bool
    """Whether ``num_gpu_blocks`` of the cluster config set the number of blocks."""
    outside: tuple[Outside, ...] = ()
    """What lies elsewhere; ``weight_bytes`` and ``kv_bytes`` are without it, bytes per token and block with
    it."""

    @property
    def npu_bytes_per_block(self) -> int:
        """KV bytes of a block on the NPU that holds most of it."""
        return self.kv_bytes // self.num_blocks

    @property
    def tokens(self) -> int:
        """Tokens the pool holds."""
        return self.num_blocks * self.block_size

    @property
    def usable_blocks(self) -> int:
        """Blocks that requests can hold."""
        return self.num_blocks - 1


def attention_params(model: ModelSpec, tp: int) -> int:
    """Parameters of one layer's attention projections on one rank; KV heads are replicated once tp exceeds
    them."""
    hidden, head = model.hidden_size, model.head_dim
    if model.is_mla:
        rank, rope = model.kv_lora_rank or 0, model.qk_rope_head_dim or 0
        return hidden * (rank + rope) + (hidden + rank) * model.num_attention_heads * head * 2 // tp
    heads = model.num_attention_heads // tp
    kv_heads = max(model.num_key_value_heads // tp, 1)
    return hidden * (heads + 2 * kv_heads) * head + heads * head * hidden


def block_weight_bytes(model: ModelSpec, dtype: str, tp: int, ep: int) -> int:
    """Bytes of one transformer block's weights on one rank. Norms and the MoE router stay in 16 bit or
    more."""
    size = dtype_bytes(dtype)
    plain = max(size, _HALF)
    hidden = model.hidden_size
    weights = attention_params(model, tp) * size + 2 * hidden * plain
    if model.is_moe:
        experts = 3 * hidden * model.moe_intermediate_size * model.num_experts
        return weights + experts * size // (ep if ep > 1 else tp) + hidden * model.num_experts * plain
    return weights + 3 * hidden * model.intermediate_size * size // tp


def stage_layers(num_layers: int, pp: int) -> list[int]:
    """Blocks of each pipeline stage: as even as possible, the remainder to the stages before the last."""
    layers = [num_layers // pp] * pp
    for extra in range(num_layers % pp):
        layers[pp - 2 - extra] += 1
    return layers


def weight_bytes_per_npu(model: ModelSpec, dtype: str, tp: int = 1, pp: int = 1, ep: int = 1) -> int:
    """Bytes of weights on the NPU that holds most of them.

    Blocks are sharded by ``tp`` (experts by ``ep``) and split over ``pp`` stages; embedding and output head
    are vocabulary-sharded, counted once when tied, and stay in 16 bit when the rest is in 8.
    """
    plain = max(dtype_bytes(dtype), _HALF)
    vocabulary = model.vocab_size * model.hidden_size * plain // tp
    block = block_weight_bytes(model, dtype, tp, ep)
    layers = stage_layers(model.num_hidden_layers, pp)
    stages = [count * block for count in layers]
    stages[0] += vocabulary
    stages[-1] += model.hidden_size * plain
    if not (model.tie_word_embeddings and pp == 1):
        stages[-1] += vocabulary
    return max(stages)


def kv_bytes_per_token(model: ModelSpec, kv_dtype: str, tp: int = 1, pp: int = 1) -> int:
    """KV-cache bytes of one token on one rank, over the layers of the longest pipeline stage.

    Keys and values of every local KV head; for multi-head latent attention the one compressed vector, which
    is not sharded by ``tp``.
    """
    layers = max(stage_layers(model.num_hidden_layers, pp))
    if model.is_mla:
        width = (model.kv_lora_rank or 0) + (model.qk_rope_head_dim or 0)
    else:
        width = 2 * max(model.num_key_value_heads // tp, 1) * model.head_dim
    return layers * width * dtype_bytes(kv_dtype)


def activation_bytes(model: ModelSpec, max_num_batched_tokens: int, max_num_seqs: int, tp: int) -> int:
    """Estimated peak of activations in bytes: the larger of the sampler's and the MLP's.

    Sampler: 14 bytes a logit for ``max_num_seqs`` rows (both as vLLM's start-up profile runs them) plus the
    hidden states; MLP: gate, up and their product next to the residual stream, in 16 bit. Checked against one
    vLLM 0.19 start-up (RTX 4090, Llama-3.1-8B): 2588 blocks there, 2806 (+8.4 %) by this estimate.
    """
    hidden, tokens = model.hidden_size, max_num_batched_tokens
    width = model.intermediate_size
    if model.is_moe:
        width = model.moe_intermediate_size * model.num_experts_per_tok
    sampler = _LOGIT_BYTES * min(max_num_seqs, tokens) * model.vocab_size + 6 * tokens * hidden
    mlp = 2 * tokens * (3 * width // tp + 5 * hidden)
    return max(sampler, mlp)


def kv_cache_capacity(
    model: ModelSpec,
    instance: InstanceSpec,
    options: InstanceOptions,
    where: str = "instance",
    on_npus: Sequence[tuple[int, int]] | None = None,
    outside: tuple[Outside, ...] = (),
) -> KvCapacity:
    """Plan the memory of one NPU of ``instance``.

    ``npu_mem.reserve`` (GiB) replaces the estimate of everything that is neither weights nor KV cache;
    ``num_gpu_blocks`` sets the number of blocks outright.

    ``on_npus``: (weight bytes, KV bytes per token) of a rank of each pipeline stage, where some of them lie
    ``outside``; None: everything is on the NPUs. The memory that is full first bounds the blocks.

    Raises:
        InputError: the weights do not fit, or no block is left for the KV cache.
    """
    tp, pp, ep = instance.tp_size, instance.pp_size, instance.ep_size
    npu = instance.npu_mem
    total = int(npu.mem_size * GIB)
    budget = int(total * options.npu_memory_utilization)
    per_token = kv_bytes_per_token(model, options.kv_dtype, tp, pp)
    if on_npus is None:
        on_npus = [(weight_bytes_per_npu(model, options.dtype, tp, pp, ep), per_token)]
    weights = max(stage for stage, _ in on_npus)
    if npu.reserve is None:
        activations = activation_bytes(model, options.max_num_batched_tokens, options.max_num_seqs, tp)
        non_torch = _NON_TORCH_BYTES_TP1 if tp * pp == 1 else _NON_TORCH_BYTES_TP
    else:
        activations, non_torch = int(npu.reserve * GIB), 0
    per_block = per_token * options.block_size
    left = budget - weights - activations - non_torch
    num_blocks = instance.num_gpu_blocks
    if num_blocks is None:
        fits = [(left + weights - own) // (size * options.block_size) for own, size in on_npus if size]
        fits += [memory.blocks(options.block_size) for memory in outside if memory.kv_bytes_per_token]
        num_blocks = min(fits)
    if weights > budget:
        raise InputError(
            f"{where}: the {options.dtype} weights of {model.name} take {weights / GIB:.2f} GiB per NPU "
            f"(tp_size {tp}, pp_size {pp}), but npu_mem allows {budget / GIB:.2f} GiB ({npu.mem_size:g} "
            f"GB x utilization {options.npu_memory_utilization:g}); raise tp_size, choose a smaller --dtype, "
            "or an NPU with more memory"
        )
    for memory in outside:
        if memory.kv_bytes_per_token and memory.blocks(options.block_size) < 2:
            raise InputError(f"{where}: {memory.no_room(options.block_size)}")
    homeless = left < 0 and instance.num_gpu_blocks is None  # the KV cache may lie elsewhere altogether
    if num_blocks < 2 or homeless:
        raise InputError(
            f"{where}: no room for the KV cache: of {budget / GIB:.2f} GiB, weights take {weights / GIB:.2f} "
            f"GiB and activations and libraries {(activations + non_torch) / GIB:.2f} GiB, which leaves "
            f"{left} bytes for blocks of {per_block} bytes (2 are needed at least); lower "
            "--max-num-batched-tokens or --max-num-seqs, raise --npu-memory-utilization or tp_size"
        )
    return KvCapacity(
        num_blocks=num_blocks,
        block_size=options.block_size,
        bytes_per_token=per_token,
        bytes_per_block=per_block,
        kv_bytes=num_blocks * options.block_size * max(size for _, size in on_npus),
        weight_bytes=weights,
        activation_bytes=activations,
        non_torch_bytes=non_torch,
        total_bytes=total,
        utilization=options.npu_memory_utilization,
        overridden=instance.num_gpu_blocks is not None,
        outside=outside,
    )
