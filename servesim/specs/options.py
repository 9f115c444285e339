"""The runtime options: the one source of flags, help, checks, and of what an instance may override."""

from __future__ import annotations

import json
import os
import re
from decimal import Decimal
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from servesim.errors import InputError
from servesim.specs import acting
from servesim.specs.checked import BeforeValidator, Field, model_validator
from servesim.specs.dtypes import (
    KV_CACHE_ALIASES,
    KV_CACHE_DTYPES,
    KvCacheDtypeName,
    WeightDtypeName,
    kv_refusal,
)
from servesim.specs.flags import Flag, add_flags, flag_of, from_flags, renamed
from servesim.specs.kv_skip import skip_words
from servesim.specs.memories import TIER_WORDS
from servesim.specs.presets import Preset
from servesim.specs.validation import Spec, Unit
from servesim.specs.vllm_versions import NEWEST, VllmVersion, minor_version

if TYPE_CHECKING:
    import argparse
    from collections.abc import Collection


UNLIMITED = 2**31 - 1
"""What a 0 that means "no limit" is resolved to."""

_INPUT = "what to simulate"
_ENGINE = "engine (an instance of the cluster config may set these for itself)"
_ENGINE_OF_ALL = "engine of every instance"
_CLUSTER = "cluster"
_RUN = "how requests arrive and run"
_UNCERTAINTY = "uncertainty"
_OUTPUT = "output"
_TABLE = (".csv", ".parquet")
_JSON = (".json",)
_HTML = (".html",)
FOLDER = ("/",)
"""In the place of endings: the option names a folder."""
_OTHER_TOOLS = "accepted from scripts of other simulators"

SCHEDULING_POLICIES = ("fcfs", "priority")
"""Names in :data:`servesim.engine.queue_policy.QUEUE_POLICIES`."""
ROUTING_POLICIES = ("LOAD", "RR", "RAND", "PREFIX", "CUSTOM")
EXPERT_POLICIES = ("BALANCED", "RR", "RAND", "ZIPF", "CUSTOM")


def _text_path(value: object) -> object:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _kv_alias(value: object) -> object:
    if not isinstance(value, str):
        return value
    if reason := kv_refusal(value):
        raise ValueError(reason)
    return KV_CACHE_ALIASES.get(value, value)


def _none_word(value: object) -> object:
    return None if value == "None" else value


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


def _policy(known: tuple[str, ...], variable: str) -> BeforeValidator:
    """One of ``known`` or ``module:callable``; the environment variable says which callable CUSTOM is."""

    def check(value: object) -> object:
        if value == "CUSTOM":
            value = os.environ.get(variable, "")
            if not value:
                raise ValueError(
                    "CUSTOM is not allowed without a callable; give module:callable itself, or set "
                    f"{variable}=module:callable in the environment"
                )
        words = [word for word in known if word != "CUSTOM"]
        if not isinstance(value, str):
            raise ValueError(
                f"{value!r} is not allowed; must be one of {', '.join(words)}, or module:callable"
            )
        module, colon, name = value.removeprefix("CUSTOM:").partition(":")
        if value in words or (
            colon and name.isidentifier() and all(map(str.isidentifier, module.split(".")))
        ):
            return value
        raise ValueError(
            f"'{value}' is not allowed; must be one of {', '.join(words)}, or module:callable for a "
            "custom policy"
        )

    return BeforeValidator(check)


def _json_text(value: object) -> object:
    """A mapping as the JSON text that it stands for."""
    return json.dumps(value) if isinstance(value, dict) else value


FilePath = Annotated[str, BeforeValidator(_text_path), Field(min_length=1)]
Limit = Annotated[int, Field(ge=0, le=UNLIMITED)]

# The options an instance may set for itself: each a type of its own, used here and by the cluster config.
WeightDtype = Annotated[
    WeightDtypeName | None,
    Flag("weight dtype", _ENGINE, default_text="the model's torch_dtype, else bfloat16", per_instance=True),
]
KvCacheDtype = Annotated[
    KvCacheDtypeName,
    BeforeValidator(_kv_alias),
    Flag(
        "KV cache dtype; fp8_e4m3, fp8_e5m2 and fp8_inc are the same as fp8",
        _ENGINE,
        choices=KV_CACHE_DTYPES,
        refusal=kv_refusal,
        default_text="auto = the weights' dtype, but 16-bit when the weights are 8-bit",
        per_instance=True,
    ),
]
KvCacheDtypeSkipLayers = Annotated[
    Annotated[str, Field(min_length=1, max_length=4096)] | None,
    BeforeValidator(skip_words),
    Flag(
        "layers whose KV cache stays in 16 bit: numbers from 0, and sliding_window for all with a window",
        _ENGINE,
        "LAYER",
        default_text="none; TurboQuant formats leave out the first and last two",
        per_instance=True,
        several=True,
        acts=acting.narrow_caches,
    ),
]
BlockSize = Annotated[
    int, Field(ge=1, le=65536), Unit("tokens"), Flag("tokens per KV block", _ENGINE, per_instance=True)
]
MaxNumSeqs = Annotated[Limit, Flag("most running requests; 0 = unlimited", _ENGINE, per_instance=True)]
MaxNumBatchedTokens = Annotated[
    Limit, Flag("token budget of a step; 0 = the longest context", _ENGINE, per_instance=True)
]
MaxModelLen = Annotated[
    Annotated[int, Field(ge=1, le=UNLIMITED)] | Literal["auto"] | None,
    BeforeValidator(_model_len),
    Unit("tokens"),
    Flag(
        "longest context of a request, prompt and output: a number of tokens, 16k (16000), 16K (16384), or "
        "auto (also -1): the longest that fits the KV cache",
        _ENGINE,
        "N|auto",
        default_text="the model's max_position_embeddings",
        per_instance=True,
        text=True,
    ),
]
LongPrefillTokenThreshold = Annotated[
    Limit,
    Flag(
        "most prompt tokens of one request in one step; 0 = no cap",
        _ENGINE,
        per_instance=True,
        acts=acting.below_the_budget,
        noted=True,
    ),
]
EnableChunkedPrefill = Annotated[
    bool,
    Flag(
        "split long prompts over several steps",
        _ENGINE,
        per_instance=True,
        acts=acting.whole_prompts_at_once,
        noted=True,
    ),
]
ReserveFullIsl = Annotated[
    bool,
    Flag(
        "admit a request only if the KV cache holds its whole prompt",
        _ENGINE,
        aliases=("--scheduler-reserve-full-isl",),
        per_instance=True,
    ),
]
EnablePrefixCaching = Annotated[
    bool,
    Flag(
        "reuse KV blocks of prompts with the same prefix",
        _ENGINE,
        per_instance=True,
        acts=acting.prompts_with_ids,
        noted=True,
    ),
]
DisableHybridKvCacheManager = Annotated[
    bool,
    Flag(
        "keep the KV of layers with windows or chunks as if they saw the whole context",
        _ENGINE,
        per_instance=True,
        acts=acting.windows_or_chunks,
    ),
]
AsyncScheduling = Annotated[
    bool,
    Flag(
        "keep one more batch in flight than there are stages, as vLLM does",
        _ENGINE,
        per_instance=True,
        acts=acting.second_runners,
        noted=True,
    ),
]
SchedulingPolicy = Annotated[
    Literal[*SCHEDULING_POLICIES],  # type: ignore[valid-type]
    Flag(
        "order of waiting requests, and who is preempted: fcfs (first come, first served) or priority (a "
        "request's priority in the workload, smaller first, then its arrival)",
        _ENGINE,
        choices=SCHEDULING_POLICIES,
        per_instance=True,
        acts=acting.priorities_differ,
        noted=True,
    ),
]
MaxNumActiveSeqs = Annotated[
    Annotated[int, Field(ge=1, le=UNLIMITED)] | None,
    Flag(
        "most running requests below --max-num-seqs, which the memory plan goes by",
        _ENGINE,
        "N",
        default_text="as --max-num-seqs",
        per_instance=True,
        acts=acting.fewer_seats,
        noted=True,
    ),
]
MaxNumScheduledTokens = Annotated[
    Annotated[int, Field(ge=1, le=UNLIMITED)] | None,
    Unit("tokens"),
    Flag(
        "most tokens of a step below --max-num-batched-tokens, which the memory plan goes by",
        _ENGINE,
        "N",
        default_text="as --max-num-batched-tokens",
        per_instance=True,
        acts=acting.smaller_steps,
        noted=True,
    ),
]
AdaptiveThreshold = Annotated[
    bool,
    Flag(
        "--long-prefill-token-threshold goes no lower than a step's tokens divided by the requests there are",
        _ENGINE,
        per_instance=True,
        acts=acting.has_threshold,
        noted=True,
    ),
]
PrefillScheduleInterval = Annotated[
    Annotated[int, Field(ge=1, le=UNLIMITED)],
    Flag(
        "compute prompts in every N-th step only, while requests decode and none has to wait; 1 = every step",
        _ENGINE,
        "N",
        per_instance=True,
        acts=acting.whole_prompts_at_once,
        noted=True,
    ),
]
Watermark = Annotated[
    Annotated[float, Field(ge=0, le=0.999)],
    Flag(
        "share of the KV blocks that stays free when a request is admitted beside others",
        _ENGINE,
        "SHARE",
        per_instance=True,
    ),
]
EnableLora = Annotated[
    bool,
    Flag(
        "serve the LoRA adapters that requests name (lora in the workload): slots and prefixes of their own; "
        "their kernels' time is not simulated",
        _ENGINE,
        per_instance=True,
        acts=acting.adapters_asked_for,
        except_for=acting.adapter_kernels,
        noted=True,
    ),
]
MaxLoras = Annotated[
    Annotated[int, Field(ge=1, le=UNLIMITED)],
    Flag(
        "most LoRA adapters at once; waiting requests of further ones are passed over",
        _ENGINE,
        per_instance=True,
        acts=acting.more_adapters,
        noted=True,
    ),
]
EnableLocalOffloading = Annotated[
    bool,
    Flag(
        "read the weights that stay on the NPU from its memory (npu_mem.mem_bw) in every step",
        _ENGINE,
        per_instance=True,
        except_for=acting.only_slow_memory,
    ),
]
EnableAttnOffloading = Annotated[
    bool, Flag("compute decode attention in PIM memory", _ENGINE, per_instance=True)
]
EnableSubBatchInterleaving = Annotated[
    bool,
    Flag(
        "split a batch in two halves and overlap NPU and PIM work; needs --enable-attn-offloading, pp_size 1",
        _ENGINE,
        per_instance=True,
    ),
]
EnableBlockCopy = Annotated[
    bool,
    Flag(
        "MoE only: draw expert loads once per stage and reuse them for every layer",
        _ENGINE,
        per_instance=True,
        acts=acting.unequal_layers,
    ),
]
Utilization = Annotated[
    float,
    Field(ge=1e-6, le=1),
    Flag(
        "share of NPU memory for weights and KV cache, in (0, 1]; npu_mem.mem_util of an instance says the "
        "same and wins",
        _ENGINE,
        aliases=("--gpu-memory-utilization",),
        per_instance=True,
        acts=acting.blocks_not_given,
        noted=True,
    ),
]
Cudagraph = Annotated[
    bool,
    Flag(
        "pad small steps to the size of a captured CUDA graph",
        _ENGINE,
        opposites=("--enforce-eager",),
        per_instance=True,
        except_for=acting.eager_launches,
    ),
]
NumGpuBlocks = Annotated[
    Annotated[int, Field(ge=2, le=UNLIMITED)] | None,
    Unit("blocks"),
    Flag(
        "number of KV blocks, in place of the computed one; as in vLLM, one is never used",
        _ENGINE,
        "N",
        aliases=("--num-gpu-blocks-override",),
        default_text="what fits into the memory",
        per_instance=True,
    ),
]
Degree = Annotated[int, Field(ge=1, le=65536)]


def _no_single_run(value: object) -> object:
    if value == 1 and type(value) is int:
        raise ValueError("1 is not allowed; must be 0 (off) or at least 2 runs")
    return value


class RuntimeOptions(Spec):
    """Everything a run can be told beside its cluster and its workload. Field ``x_y`` is flag ``--x-y``."""

    cluster_config: Annotated[FilePath, Flag("cluster description (JSON)", _INPUT, "PATH")] = (
        "configs/cluster/single_node_single_instance.json"
    )
    dataset: Annotated[FilePath, Flag("workload; its format is found by content", _INPUT, "PATH")] = (
        "workloads/example_trace.jsonl"
    )
    hardware: Annotated[
        Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*$", max_length=100)] | None,
        Flag(
            "run every instance on this accelerator, with the bundles, memory and links of configs/hardware",
            _INPUT,
            "NAME",
            default_text="as in the cluster config",
        ),
    ] = None
    model: Annotated[
        Annotated[str, Field(min_length=1, max_length=1000)] | None,
        Flag("every instance serves this model", _INPUT, "NAME", default_text="as in the cluster config"),
    ] = None
    tp: Annotated[
        Degree | None,
        Flag(
            "tensor-parallel degree of every instance",
            _INPUT,
            "N",
            aliases=("--tensor-parallel-size", "-tp"),
            default_text="as in the cluster config",
        ),
    ] = None
    pp: Annotated[
        Degree | None,
        Flag(
            "pipeline stages of every instance",
            _INPUT,
            "N",
            aliases=("--pipeline-parallel-size", "-pp"),
            default_text="as in the cluster config",
        ),
    ] = None
    dp: Annotated[
        Annotated[int, Field(ge=1, le=1024)] | None,
        Flag(
            "put N copies of every instance side by side (models without experts)",
            _INPUT,
            "N",
            aliases=("--data-parallel-size", "-dp"),
            default_text="as in the cluster config",
        ),
    ] = None
    enable_expert_parallel: Annotated[
        bool,
        Flag(
            "spread the experts of every instance over all its NPUs, and those of its --dp copies",
            _INPUT,
            aliases=("-ep",),
            acts=acting.spread_experts,
            noted=True,
        ),
    ] = False
    num_reqs: Annotated[
        Limit,
        Flag("entries of the workload to load; a session counts as one", _INPUT, default_text="0 = all"),
    ] = 0
    lenient: Annotated[bool, Flag("skip and count bad lines of the workload instead of stopping", _INPUT)] = (
        False
    )

    tokenizer: Annotated[
        FilePath | None,
        Flag(
            "for a workload of texts: a tokenizer.json, or a folder with one (needs 'servesim[tokenizer]')",
            _INPUT,
            "PATH",
            default_text="none",
        ),
    ] = None
    estimate_tokens: Annotated[
        Annotated[float, Field(ge=0.1, le=100)] | None,
        Flag(
            "for a workload of texts, without a tokenizer: count so many characters as a token, 4 where no "
            "number is given",
            _INPUT,
            "CHARS",
            default_text="none",
            bare=4.0,
        ),
    ] = None
    columns: Annotated[
        Annotated[str, Field(min_length=1, max_length=2000)] | None,
        Flag(
            "any CSV or JSON lines file: which columns are input, output, arrival (:s, :ms, :us, :ns or "
            ":date), session, delay, model, hashes (:TOKENS), such as input=isl,output=osl,arrival=ts:ms",
            _INPUT,
            "NAME=COLUMN,...",
            default_text="none: the format is found by content",
        ),
    ] = None

    dtype: WeightDtype = None
    kv_cache_dtype: KvCacheDtype = "auto"
    kv_cache_dtype_skip_layers: KvCacheDtypeSkipLayers = None
    block_size: BlockSize = 16
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
    enable_lora: EnableLora = False
    max_loras: MaxLoras = 1
    enable_local_offloading: EnableLocalOffloading = False
    enable_attn_offloading: EnableAttnOffloading = False
    enable_sub_batch_interleaving: EnableSubBatchInterleaving = False
    enable_block_copy: EnableBlockCopy = True
    cudagraph: Cudagraph = True
    vllm_version: Annotated[
        VllmVersion,
        BeforeValidator(minor_version),
        Flag(
            "decide as this version of vLLM does, and plan memory as it does; not given: memory as the "
            "hardware file says",
            _ENGINE_OF_ALL,
            "VERSION",
            text=True,
        ),
    ] = NEWEST
    speculative_config: Annotated[
        Annotated[str, Field(min_length=2, max_length=20_000)] | None,
        BeforeValidator(_json_text),
        Flag(
            'speculative decoding, vLLM\'s JSON: \'{"method": "ngram", "num_speculative_tokens": 3}\', say; '
            "methods ngram, eagle, eagle3, mtp, draft_model",
            _ENGINE_OF_ALL,
            "JSON",
            aliases=("-sc",),
            default_text="none",
        ),
    ] = None
    speculative_acceptance: Annotated[
        Annotated[str, Field(min_length=1, max_length=4096)] | None,
        Flag(
            "shares of verifications that accept at least 1, 2, ... drafts: 0.7,0.5,0.3; or decay=0.7; or a "
            "JSON file with rates, decay, source",
            _ENGINE_OF_ALL,
            "RATES|PATH",
            default_text="a published measurement for the method, named in the banner",
            beside=acting.with_speculation,
        ),
    ] = None
    preset: Annotated[
        Preset | None,
        Flag(
            "vllm-serve: the limits that `vllm serve` of this version takes on this hardware, where none are "
            "given: 0.92 of the memory, 256 to 1024 requests and 2048 to 16384 tokens a step",
            _ENGINE_OF_ALL,
            default_text="none: the defaults shown above",
        ),
    ] = None
    vllm_serve: Annotated[
        Annotated[str, Field(min_length=1, max_length=20_000)] | None,
        Flag(
            "a deployment's own command line, 'vllm serve MODEL --tensor-parallel-size 4 ...', or the YAML "
            "file of its arguments; brings --preset vllm-serve along; flags given beside it win",
            _ENGINE_OF_ALL,
            "LINE|PATH",
            default_text="none",
        ),
    ] = None
    enable_prefix_sharing: Annotated[
        bool,
        Flag(
            "share the lower tier of the prefix cache among a node's instances",
            _CLUSTER,
            beside=acting.with_tier,
            acts=acting.nodes_with_several,
            noted=True,
        ),
    ] = False
    prefix_storage: Annotated[
        Literal[*TIER_WORDS] | None,  # type: ignore[valid-type]
        BeforeValidator(_none_word),
        Flag(
            "lower tier of the prefix cache",
            _CLUSTER,
            choices=("None", *TIER_WORDS),
            default_text="None",
            acts=acting.prompts_with_ids,
            noted=True,
        ),
    ] = None
    request_routing_policy: Annotated[
        str,
        _policy(ROUTING_POLICIES, "SERVESIM_ROUTING_POLICY"),
        Flag(
            "which instance takes a request: LOAD (least loaded), RR, RAND, PREFIX (longest cached prefix), "
            "or module:callable for a custom policy; CUSTOM: the one in $SERVESIM_ROUTING_POLICY",
            _CLUSTER,
            "POLICY",
            acts=acting.several_takers,
        ),
    ] = "LOAD"
    router_refresh: Annotated[
        Annotated[float, Field(ge=0, le=1e6)],
        Unit("s"),
        Flag(
            "time between refreshes of the load figures the router goes by; vLLM's data-parallel front end "
            "refreshes every 0.1 s",
            _CLUSTER,
            "SECONDS",
            default_text="0 = always up to date",
            acts=acting.looks_at_load,
        ),
    ] = 0.0
    sticky_sessions: Annotated[
        bool,
        Flag(
            "all requests of a session go to the instance that took the first one",
            _CLUSTER,
            acts=acting.several_fronts,
            except_for=acting.prefill_side_only,
        ),
    ] = False
    expert_routing_policy: Annotated[
        str,
        _policy(EXPERT_POLICIES, "SERVESIM_EXPERT_POLICY"),
        Flag(
            "how tokens choose experts that are spread over ranks: BALANCED, RR, RAND, ZIPF, or "
            "module:callable; CUSTOM: the one in $SERVESIM_EXPERT_POLICY",
            _CLUSTER,
            "POLICY",
            acts=acting.spread_experts,
        ),
    ] = "BALANCED"

    skip_prefill: Annotated[bool, Flag("decode only: prompts are already in the cache", _RUN)] = False
    max_concurrency: Annotated[
        Limit,
        Flag(
            "closed loop: at most this many requests in the system",
            _RUN,
            default_text="0 = open loop",
            acts=acting.more_than_the_cap,
            noted=True,
        ),
    ] = 0
    max_num_queued_reqs: Annotated[
        Limit | None,
        Flag(
            "turn a request away, as a server does with status 503, while so many are unfinished on all "
            "instances",
            _RUN,
            "N",
            default_text="no limit",
            acts=acting.one_front_end,
        ),
    ] = None
    max_num_queued_tokens: Annotated[
        Limit | None,
        Unit("tokens"),
        Flag(
            "turn a request away while the prompts of requests without a first token have so many tokens",
            _RUN,
            "N",
            default_text="no limit",
            acts=acting.one_front_end,
        ),
    ] = None
    request_rate: Annotated[
        Annotated[float, Field(ge=1e-9, allow_inf_nan=True)] | None,
        Unit("req/s"),
        Flag(
            "rescale or replace the arrivals; inf = all at once",
            _RUN,
            "REQ/S",
            default_text="as in the workload",
        ),
    ] = None
    seed: Annotated[
        int,
        Field(ge=0, le=2**63 - 1),
        Flag("seed of every random choice", _RUN, acts=acting.something_random, noted=True),
    ] = 42
    auto_profile: Annotated[
        bool,
        Flag(
            "make a missing profile bundle, from public kernel measurements (silicon extra) or peak rates, "
            "and keep it in the user's data folder",
            _RUN,
        ),
    ] = True
    stepped: Annotated[bool, Flag("debugging: simulate every step on its own", _RUN)] = False

    ensemble: Annotated[
        Annotated[int, Field(ge=0, le=100_000)],
        BeforeValidator(_no_single_run),
        Flag(
            "repeat the run this often with seeded noise and report every figure's spread",
            _UNCERTAINTY,
            default_text="0 = off",
        ),
    ] = 0
    step_noise: Annotated[
        Annotated[float, Field(ge=0, le=0.5)],
        Flag(
            "relative noise of every step's time in an ensemble, each step on its own",
            _UNCERTAINTY,
            beside=acting.with_ensemble,
        ),
    ] = 0.01
    run_noise: Annotated[
        Annotated[float, Field(ge=0, le=0.5)],
        Flag(
            "relative noise that all steps of a run of an ensemble share",
            _UNCERTAINTY,
            beside=acting.with_ensemble,
        ),
    ] = 0.01
    arrival_jitter: Annotated[
        Annotated[float, Field(ge=0, le=1e6)],
        Unit("s"),
        Flag(
            "every arrival moves by up to this much, either way, in the runs of an ensemble",
            _UNCERTAINTY,
            "SECONDS",
            default_text="0 = the workload's arrivals as they are",
            beside=acting.with_ensemble,
        ),
    ] = 0.0

    output: Annotated[
        FilePath | None,
        Flag("per-request results, .csv or .parquet; {run_id} is replaced", _OUTPUT, "PATH", writes=_TABLE),
    ] = None
    summary: Annotated[FilePath | None, Flag("run summary as JSON", _OUTPUT, "PATH", writes=_JSON)] = None
    steps: Annotated[FilePath | None, Flag("step log, .csv or .parquet", _OUTPUT, "PATH", writes=_TABLE)] = (
        None
    )
    timeline: Annotated[
        FilePath | None, Flag("Chrome trace, opens in ui.perfetto.dev", _OUTPUT, "PATH", writes=_JSON)
    ] = None
    save_result: Annotated[
        FilePath | None,
        Flag("the result that `vllm bench serve --save-result` writes", _OUTPUT, "PATH", writes=_JSON),
    ] = None
    aiperf: Annotated[
        FilePath | None, Flag("the table that AIPerf writes", _OUTPUT, "PATH", writes=(".csv",))
    ] = None
    report: Annotated[
        FilePath | None,
        Flag("figures and charts as one HTML page that needs no network", _OUTPUT, "PATH", writes=_HTML),
    ] = None
    plots: Annotated[
        FilePath | None,
        Flag(
            "the charts of --report as PNG and SVG (needs 'servesim[report]')", _OUTPUT, "DIR", writes=FOLDER
        ),
    ] = None
    itl: Annotated[
        bool, Flag("write every request's inter-token latencies", _OUTPUT, beside=acting.with_output)
    ] = True
    log_interval: Annotated[
        float,
        Field(ge=1e-6, le=1e9),
        Unit("s"),
        Flag("simulated seconds between heartbeats", _OUTPUT, "SECONDS"),
    ] = 1.0
    log_level: Annotated[
        Literal["WARNING", "INFO", "DEBUG"], Flag("the heartbeat prints at every level", _OUTPUT)
    ] = "WARNING"
    run_id: Annotated[
        Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*$", max_length=100)] | None,
        Flag("name of the run", _OUTPUT, default_text="generated", beside=acting.with_named_file),
    ] = None

    network_backend: Annotated[
        Literal["analytical"] | None,
        Flag("links", _OTHER_TOOLS, acts=acting.analytical_links, noted=True, hidden=True),
    ] = None
    inputs_root: Annotated[
        FilePath | None,
        Flag("inputs", _OTHER_TOOLS, "PATH", acts=acting.no_intermediate_files, noted=True, hidden=True),
    ] = None
    cleanup_inputs: Annotated[
        bool | None,
        Flag(
            "inputs",
            _OTHER_TOOLS,
            acts=acting.no_intermediate_files,
            noted=True,
            hidden=True,
            negative=True,
        ),
    ] = None

    @model_validator(mode="before")
    @classmethod
    def _own_names(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        data = renamed(cls.model_fields, data)
        if isinstance(data.get("vllm_serve"), str):
            from servesim.specs.serve_line import read_serve_line

            data = {"preset": "vllm-serve", **read_serve_line(data["vllm_serve"]).options, **data}
        return data

    if not TYPE_CHECKING:  # type checkers know the fields as keywords

        def __init__(self, **values: Any) -> None:
            """Raises InputError, as everything else does, when a value is not allowed."""
            from servesim.specs.checked import ValidationError
            from servesim.specs.validation import field_path, joined, problems

            try:
                super().__init__(**values)
            except ValidationError as error:
                raise InputError(joined("options", problems(error, type(self), field_path))) from None

    def replace(self, **changes: Any) -> Self:
        """These options with some changed, checked again. What the user set stays in ``model_fields_set``."""
        from servesim.specs.validation import validated

        return validated(type(self), {**self.model_dump(exclude_unset=True), **changes}, "")


def add_arguments(
    parser: argparse.ArgumentParser, *, only: Collection[str] | None = None, exclude: Collection[str] = ()
) -> None:
    """Add the flags of :class:`RuntimeOptions` (fields named in ``only``, without ``exclude``) to ``parser``.

    A flag not given is absent from the parsed namespace; :func:`from_namespace` fills in the defaults.
    """
    add_flags(parser, RuntimeOptions, only=only, exclude=exclude)


def from_namespace(namespace: argparse.Namespace, **overrides: Any) -> RuntimeOptions:
    """The options of a parsed command line, ``overrides`` winning.

    Raises:
        InputError: a value is not allowed; the message names its flag.
    """
    return from_flags(RuntimeOptions, namespace, **overrides)


def output_fields() -> dict[str, tuple[str, ...]]:
    """Option -> endings of the file that it names for a run to write."""
    flags = ((name, flag_of(field)) for name, field in RuntimeOptions.model_fields.items())
    return {name: flag.writes for name, flag in flags if flag is not None and flag.writes}


def per_instance_fields() -> list[str]:
    """Names of the options an ``instances[i]`` object may set."""
    fields = RuntimeOptions.model_fields.items()
    return [name for name, field in fields if (flag := flag_of(field)) is not None and flag.per_instance]
