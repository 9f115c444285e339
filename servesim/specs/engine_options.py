"""What one engine can be told: options that are flags, and that an instance of a cluster may set for itself.

A new one is a type with its :class:`~servesim.specs.flags.Flag`, a default in :class:`EngineOptions`, and a
line of :class:`OwnOptions`.
"""

from __future__ import annotations

import json
import re
from decimal import Decimal
from typing import Annotated, Literal

from servesim.specs import conditions
from servesim.specs.annotated import BeforeValidator, Field
from servesim.specs.dtypes import (
    KV_CACHE_ALIASES,
    KV_CACHE_DTYPES,
    KvCacheDtypeName,
    WeightDtypeName,
    kv_refusal,
)
from servesim.specs.flags import Flag
from servesim.specs.kv_skip import skip_words
from servesim.specs.validation import UNLIMITED, Limit, Spec, Unit

ENGINE = "engine (an instance of the cluster config may set these for itself)"
SCHEDULING_POLICIES = ("fcfs", "priority")
"""Names in :data:`servesim.engine.queue_policy.QUEUE_POLICIES`."""


def _kv_alias(value: object) -> object:
    if not isinstance(value, str):
        return value
    if reason := kv_refusal(value):
        raise ValueError(reason)
    return KV_CACHE_ALIASES.get(value, value)


_MULTIPLES = {
    letter: base**power
    for base, letters in ((1000, "kmgt"), (1024, "KMGT"))
    for power, letter in enumerate(letters, 1)
}
"""vLLM's letters: small ones count in thousands, capitals in 1024."""


def human_number(text: str) -> int | None:
    """``16k`` -> 16000, ``16K`` -> 16384, ``25.6k`` -> 25600, as in vLLM; None: it is no such number."""
    match = re.fullmatch(r"(-?\d{1,10})(\.\d{1,9})?([kmgtKMGT]?)", text.strip())
    if match is None or (match[2] and not match[3].islower()):
        return None
    return int(Decimal(match[1] + (match[2] or "")) * _MULTIPLES.get(match[3], 1))


def _model_len(value: object) -> object:
    """``auto`` and ``-1`` -> auto; a number as :func:`human_number` reads it."""
    if value is None or value == "auto":
        return value
    number = value if type(value) is int else None
    if isinstance(value, str):
        number = human_number(value)
    if number == -1:
        return "auto"
    if number is None or not 1 <= number <= UNLIMITED:
        raise ValueError(
            f"{json.dumps(value, default=str)} is not allowed; must be a number of tokens, at least 1, such "
            "as 16000, 16k (16000) or 16K (16384); or auto"
        )
    return number


WeightDtype = Annotated[
    WeightDtypeName | None,
    Flag("weight dtype", ENGINE, default_text="the model's torch_dtype, else bfloat16"),
]
KvCacheDtype = Annotated[
    KvCacheDtypeName,
    BeforeValidator(_kv_alias),
    Flag(
        "KV cache dtype; fp8_e4m3, fp8_e5m2 and fp8_inc are the same as fp8",
        ENGINE,
        choices=KV_CACHE_DTYPES,
        refusal=kv_refusal,
        default_text="auto = the weights' dtype, but 16-bit when the weights are 8-bit",
    ),
]
KvCacheDtypeSkipLayers = Annotated[
    Annotated[str, Field(min_length=1, max_length=4096)] | None,
    BeforeValidator(skip_words),
    Flag(
        "layers whose KV cache stays in 16 bit: numbers from 0, and sliding_window for all with a window",
        ENGINE,
        "LAYER",
        default_text="none; TurboQuant formats leave out the first and last two",
        several=True,
        acts=conditions.narrow_caches,
    ),
]
BlockSize = Annotated[
    Annotated[int, Field(ge=1, le=65536), Unit("tokens")],
    Flag(
        "tokens per KV block",
        ENGINE,
        default_text="16, or more where the model's attention takes larger blocks only",
    ),
]
DecodeContextParallelSize = Annotated[
    Annotated[int, Field(ge=1, le=65536)],
    Flag(
        "ranks of tp_size that share the KV of one head, or of latent attention, by tokens; a block then "
        "holds so many times --block-size",
        ENGINE,
        "N",
        aliases=("-dcp",),
        except_for=conditions.derived_exchange,
    ),
]
DcpCommBackend = Annotated[
    Literal["ag_rs", "a2a"],
    Flag(
        "how those ranks bring outputs together: ag_rs (an all-gather and a reduce-scatter) or a2a (one "
        "all-to-all)",
        ENGINE,
        acts=conditions.shares_context,
    ),
]
MaxNumSeqs = Annotated[Limit, Flag("most running requests; 0 = unlimited", ENGINE)]
MaxNumBatchedTokens = Annotated[Limit, Flag("token budget of a step; 0 = the longest context", ENGINE)]
MaxModelLen = Annotated[
    Annotated[int, Field(ge=1, le=UNLIMITED)] | Literal["auto"] | None,
    BeforeValidator(_model_len),
    Unit("tokens"),
    Flag(
        "longest context of a request, prompt and output: a number of tokens, 16k (16000), 16K (16384), or "
        "auto (also -1): the longest that fits the KV cache",
        ENGINE,
        "N|auto",
        default_text="the model's max_position_embeddings",
        text=True,
    ),
]
LongPrefillTokenThreshold = Annotated[
    Limit,
    Flag(
        "most prompt tokens of one request in one step; 0 = no cap",
        ENGINE,
        acts=conditions.below_the_budget,
        noted=True,
    ),
]
EnableChunkedPrefill = Annotated[
    bool,
    Flag(
        "split long prompts over several steps",
        ENGINE,
        acts=conditions.whole_prompts_at_once,
        noted=True,
    ),
]
ReserveFullIsl = Annotated[
    bool,
    Flag(
        "admit a request only if the KV cache holds its whole prompt",
        ENGINE,
        aliases=("--scheduler-reserve-full-isl",),
    ),
]
EnablePrefixCaching = Annotated[
    bool,
    Flag(
        "reuse KV blocks of prompts with the same prefix",
        ENGINE,
        except_for=conditions.prompts_with_ids,
    ),
]
DisableHybridKvCacheManager = Annotated[
    bool,
    Flag(
        "keep the KV of layers with windows or chunks as if they saw the whole context",
        ENGINE,
        acts=conditions.windows_or_chunks,
    ),
]
AsyncScheduling = Annotated[
    bool,
    Flag(
        "keep one more batch in flight than there are stages, as vLLM does",
        ENGINE,
        acts=conditions.second_runners,
        noted=True,
    ),
]
SchedulingPolicy = Annotated[
    Literal[*SCHEDULING_POLICIES],  # type: ignore[valid-type]
    Flag(
        "order of waiting requests, and who is preempted: fcfs (first come, first served) or priority (a "
        "request's priority in the workload, smaller first, then its arrival)",
        ENGINE,
        choices=SCHEDULING_POLICIES,
        acts=conditions.priorities_differ,
        noted=True,
    ),
]
MaxNumActiveSeqs = Annotated[
    Annotated[int, Field(ge=1, le=UNLIMITED)] | None,
    Flag(
        "most running requests below --max-num-seqs, which the memory plan goes by",
        ENGINE,
        "N",
        default_text="as --max-num-seqs",
        acts=conditions.fewer_running,
        noted=True,
    ),
]
MaxNumScheduledTokens = Annotated[
    Annotated[int, Field(ge=1, le=UNLIMITED)] | None,
    Unit("tokens"),
    Flag(
        "most tokens of a step below --max-num-batched-tokens, which the memory plan goes by",
        ENGINE,
        "N",
        default_text="as --max-num-batched-tokens",
        acts=conditions.smaller_steps,
        noted=True,
    ),
]
AdaptiveThreshold = Annotated[
    bool,
    Flag(
        "--long-prefill-token-threshold goes no lower than a step's tokens divided by the requests there are",
        ENGINE,
        acts=conditions.has_threshold,
        noted=True,
    ),
]
PrefillScheduleInterval = Annotated[
    Annotated[int, Field(ge=1, le=UNLIMITED)],
    Flag(
        "compute prompts in every N-th step only, while requests decode and none has to wait; 1 = every step",
        ENGINE,
        "N",
        acts=conditions.whole_prompts_at_once,
        noted=True,
    ),
]
Watermark = Annotated[
    Annotated[float, Field(ge=0, le=0.999)],
    Flag(
        "share of the KV blocks that stays free when a request is admitted beside others",
        ENGINE,
        "SHARE",
    ),
]
KvLoad = Annotated[
    Literal["step", "async"],
    Flag(
        "how KV comes in from a lower tier or a prefill instance: step (the step that needs it waits, or it "
        "is sent before the request is queued) or async (the request waits with its blocks in hand while "
        "others run, as with vLLM's OffloadingConnector and NixlConnector)",
        ENGINE,
        acts=conditions.takes_kv_in,
    ),
]
EnableLora = Annotated[
    bool,
    Flag(
        "serve the LoRA adapters that requests name (lora in the workload): slots and prefixes of their own; "
        "their kernels' time is not simulated",
        ENGINE,
        acts=conditions.adapters_asked_for,
        except_for=conditions.adapter_kernels,
        noted=True,
    ),
]
MaxLoras = Annotated[
    Annotated[int, Field(ge=1, le=UNLIMITED)],
    Flag(
        "most LoRA adapters at once; waiting requests of further ones are passed over",
        ENGINE,
        acts=conditions.more_adapters,
        noted=True,
    ),
]
EnableLocalOffloading = Annotated[
    bool,
    Flag(
        "read the weights that stay on the NPU from its memory (npu_mem.mem_bw) in every step",
        ENGINE,
        except_for=conditions.only_slow_memory,
    ),
]
EnableAttnOffloading = Annotated[bool, Flag("compute decode attention in PIM memory", ENGINE)]
EnableSubBatchInterleaving = Annotated[
    bool,
    Flag(
        "split a batch in two halves and overlap NPU and PIM work; needs --enable-attn-offloading, pp_size 1",
        ENGINE,
    ),
]
EnableBlockCopy = Annotated[
    bool,
    Flag(
        "MoE only: draw expert loads once per stage and reuse them for every layer",
        ENGINE,
        acts=conditions.unequal_layers,
    ),
]
Utilization = Annotated[
    float,
    Field(ge=1e-6, le=1),
    Flag(
        "share of NPU memory for weights and KV cache, in (0, 1]; npu_mem.mem_util of an instance says the "
        "same and wins",
        ENGINE,
        aliases=("--gpu-memory-utilization",),
        acts=conditions.blocks_not_given,
        noted=True,
    ),
]
Cudagraph = Annotated[
    bool,
    Flag(
        "pad small steps to the size of a captured CUDA graph",
        ENGINE,
        opposites=("--enforce-eager",),
        except_for=conditions.eager_launches,
    ),
]
NumGpuBlocks = Annotated[
    Annotated[int, Field(ge=2, le=UNLIMITED)] | None,
    Unit("blocks"),
    Flag(
        "number of KV blocks, in place of the computed one; as in vLLM, one is never used",
        ENGINE,
        "N",
        aliases=("--num-gpu-blocks-override",),
        default_text="what fits into the memory",
    ),
]


class EngineOptions(Spec):
    """Options of every engine that does not set its own, with their defaults."""

    dtype: WeightDtype = None
    kv_cache_dtype: KvCacheDtype = "auto"
    kv_cache_dtype_skip_layers: KvCacheDtypeSkipLayers = None
    block_size: BlockSize = 16
    decode_context_parallel_size: DecodeContextParallelSize = 1
    dcp_comm_backend: DcpCommBackend = "ag_rs"
    max_num_seqs: MaxNumSeqs = 128
    max_num_batched_tokens: MaxNumBatchedTokens = 2048
    max_model_len: MaxModelLen = None
    long_prefill_token_threshold: LongPrefillTokenThreshold = 0
    enable_chunked_prefill: EnableChunkedPrefill = True
    npu_memory_utilization: Utilization = 0.9
    num_gpu_blocks: NumGpuBlocks = None
    reserve_full_isl: ReserveFullIsl = True
    enable_prefix_caching: EnablePrefixCaching = True
    disable_hybrid_kv_cache_manager: DisableHybridKvCacheManager = False
    async_scheduling: AsyncScheduling = True
    scheduling_policy: SchedulingPolicy = "fcfs"
    max_num_active_seqs: MaxNumActiveSeqs = None
    max_num_scheduled_tokens: MaxNumScheduledTokens = None
    long_prefill_token_threshold_adaptive: AdaptiveThreshold = False
    prefill_schedule_interval: PrefillScheduleInterval = 1
    watermark: Watermark = 0.0
    kv_load: KvLoad = "step"
    enable_lora: EnableLora = False
    max_loras: MaxLoras = 1
    enable_local_offloading: EnableLocalOffloading = False
    enable_attn_offloading: EnableAttnOffloading = False
    enable_sub_batch_interleaving: EnableSubBatchInterleaving = False
    enable_block_copy: EnableBlockCopy = True
    cudagraph: Cudagraph = True


class OwnOptions(Spec):
    """Options that an instance sets for itself; None: the flag of the same name holds."""

    dtype: WeightDtype = None
    kv_cache_dtype: KvCacheDtype | None = None
    kv_cache_dtype_skip_layers: KvCacheDtypeSkipLayers = None
    block_size: BlockSize | None = None
    decode_context_parallel_size: DecodeContextParallelSize | None = None
    dcp_comm_backend: DcpCommBackend | None = None
    max_num_seqs: MaxNumSeqs | None = None
    max_num_batched_tokens: MaxNumBatchedTokens | None = None
    max_model_len: MaxModelLen = None
    long_prefill_token_threshold: LongPrefillTokenThreshold | None = None
    enable_chunked_prefill: EnableChunkedPrefill | None = None
    reserve_full_isl: ReserveFullIsl | None = None
    enable_prefix_caching: EnablePrefixCaching | None = None
    disable_hybrid_kv_cache_manager: DisableHybridKvCacheManager | None = None
    async_scheduling: AsyncScheduling | None = None
    scheduling_policy: SchedulingPolicy | None = None
    max_num_active_seqs: MaxNumActiveSeqs = None
    max_num_scheduled_tokens: MaxNumScheduledTokens = None
    long_prefill_token_threshold_adaptive: AdaptiveThreshold | None = None
    prefill_schedule_interval: PrefillScheduleInterval | None = None
    watermark: Watermark | None = None
    kv_load: KvLoad | None = None
    enable_lora: EnableLora | None = None
    max_loras: MaxLoras | None = None
    enable_local_offloading: EnableLocalOffloading | None = None
    enable_attn_offloading: EnableAttnOffloading | None = None
    enable_sub_batch_interleaving: EnableSubBatchInterleaving | None = None
    enable_block_copy: EnableBlockCopy | None = None
    cudagraph: Cudagraph | None = None
    npu_memory_utilization: Utilization | None = None
    num_gpu_blocks: NumGpuBlocks = None
