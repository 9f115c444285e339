"""Every argument of ``vllm serve`` (0.33), and what a simulation makes of it.

Also what the command line answers to a flag of vLLM that is none of its own.
"""

from __future__ import annotations

OWN = {
    "--model": "model",
    "--tensor-parallel-size": "tp",
    "-tp": "tp",
    "--pipeline-parallel-size": "pp",
    "-pp": "pp",
    "--decode-context-parallel-size": "decode_context_parallel_size",
    "-dcp": "decode_context_parallel_size",
    "--dcp-comm-backend": "dcp_comm_backend",
    "--data-parallel-size": "dp",
    "-dp": "dp",
    "--dtype": "dtype",
    "--quantization": "dtype",
    "-q": "dtype",
    "--kv-cache-dtype": "kv_cache_dtype",
    "--kv-cache-dtype-skip-layers": "kv_cache_dtype_skip_layers",
    "--block-size": "block_size",
    "--max-num-seqs": "max_num_seqs",
    "--max-num-batched-tokens": "max_num_batched_tokens",
    "--max-model-len": "max_model_len",
    "--long-prefill-token-threshold": "long_prefill_token_threshold",
    "--gpu-memory-utilization": "npu_memory_utilization",
    "--device-memory-utilization": "npu_memory_utilization",
    "--num-gpu-blocks-override": "num_gpu_blocks",
    "--speculative-config": "speculative_config",
    "-sc": "speculative_config",
    "--scheduling-policy": "scheduling_policy",
    "--max-num-active-seqs": "max_num_active_seqs",
    "--max-num-scheduled-tokens": "max_num_scheduled_tokens",
    "--prefill-schedule-interval": "prefill_schedule_interval",
    "--watermark": "watermark",
    "--max-loras": "max_loras",
    "--max-num-queued-reqs": "max_num_queued_reqs",
    "--max-num-queued-tokens": "max_num_queued_tokens",
}
"""Argument with a value -> the option that it sets."""
OWN_SWITCHES = {
    "--enable-chunked-prefill": ("enable_chunked_prefill", True),
    "--enable-prefix-caching": ("enable_prefix_caching", True),
    "--scheduler-reserve-full-isl": ("reserve_full_isl", True),
    "--async-scheduling": ("async_scheduling", True),
    "--disable-hybrid-kv-cache-manager": ("disable_hybrid_kv_cache_manager", True),
    "--enforce-eager": ("cudagraph", False),
    "--enable-expert-parallel": ("enable_expert_parallel", True),
    "-ep": ("enable_expert_parallel", True),
    "--enable-lora": ("enable_lora", True),
    "--long-prefill-token-threshold-adaptive": ("long_prefill_token_threshold_adaptive", True),
}
"""Switch -> the option that it sets, and to what."""

ELSEWHERE = {
    "--kv-transfer-config": "prefill and decode instances: pd_type is set in the cluster config: "
    "docs/cluster-config.md",
    "--cpu-offload-gb": "where weights are: placement is set in the cluster config: docs/cluster-config.md",
    "--kv-offloading-size": "a lower tier of the prefix cache: --prefix-storage CPU --kv-load async",
    "--swap-space": "vLLM V1 has no swap; preempted requests are computed again, here too",
    "--kv-cache-memory-bytes": "give --num-gpu-blocks-override, or a utilization",
    "--quantization-config": "the model's quantization_config says it; --dtype fp8 sets 8-bit weights",
    "--hf-overrides": "write a config.json with the changed values and give its path as the model",
    "--nnodes": "deployments over several nodes: docs/cluster-config.md",
    "-n": "deployments over several nodes: docs/cluster-config.md",
    "--node-rank": "one line describes a whole deployment: docs/cluster-config.md",
    "-r": "one line describes a whole deployment: docs/cluster-config.md",
    "--headless": "one line describes a whole deployment: docs/cluster-config.md",
    "--data-parallel-size-local": "one line describes a whole deployment: docs/cluster-config.md",
    "-dpl": "one line describes a whole deployment: docs/cluster-config.md",
    "--data-parallel-start-rank": "one line describes a whole deployment: docs/cluster-config.md",
    "-dpr": "one line describes a whole deployment: docs/cluster-config.md",
    "--data-parallel-rank": "one line describes a whole deployment: docs/cluster-config.md",
    "-dpn": "one line describes a whole deployment: docs/cluster-config.md",
}
"""Argument -> where the same is said here."""
_BALANCERS = "another balancer than vLLM's own before the copies of an engine"
_CONTEXT_PARALLEL = "prefill context parallelism"
_RUNS = "KV that ranks share in runs of several tokens"
_STATES = "the state cache of layers without attention"
_SPECULATIVE = "speculative decoding that is not given as --speculative-config"
NOT_SIMULATED = {
    "--spec-method": _SPECULATIVE,
    "--spec-model": _SPECULATIVE,
    "--spec-tokens": _SPECULATIVE,
    "--max-num-partial-prefills": "more than the engine's one way to share a step among prompts",
    "--max-long-partial-prefills": "more than the engine's one way to share a step among prompts",
    "--prefill-context-parallel-size": _CONTEXT_PARALLEL,
    "-pcp": _CONTEXT_PARALLEL,
    "--dcp-q-replicate": "queries that every rank of decode context parallelism computes for itself",
    "--dcp-kv-cache-interleave-size": _RUNS,
    "--cp-kv-cache-interleave-size": _RUNS,
    "--enable-dbo": "dual-batch overlap",
    "--ubatch-size": "dual-batch overlap",
    "--enable-eplb": "moving experts between ranks",
    "--enable-elastic-ep": "moving experts between ranks",
    "--expert-placement-strategy": "another than the linear placement of experts",
    "--all2all-backend": "another exchange of experts than allgather_reducescatter; moe_backend of an "
    "instance in the cluster config can be all_to_all, deepep_high_throughput or deepep_low_latency",
    "--data-parallel-hybrid-lb": _BALANCERS,
    "-dph": _BALANCERS,
    "--data-parallel-external-lb": _BALANCERS,
    "-dpe": _BALANCERS,
    "--data-parallel-multi-port-external-lb": _BALANCERS,
    "-dpm": _BALANCERS,
    "--scheduler-cls": "a scheduler of your own",
    "--stream-interval": "several tokens in one message",
    "--performance-mode": "modes that change limits and kernels",
    "--disable-sliding-window": "a model whose windows are switched off",
    "--kv-sharing-fast-prefill": "prompts that skip layers",
    "--runner": "anything but generation",
    "--convert": "anything but generation",
    "--diffusion-config": "diffusion models",
    "-dc": "diffusion models",
    "--ec-transfer-config": "encoders on other servers",
    "--offload-backend": "weights that are fetched while others are used",
    "--offload-group-size": "weights that are fetched while others are used",
    "--additional-config": "settings of other platforms",
    "--model-class-overrides": "model classes of your own",
    "--pooler-config": "anything but generation",
    "--watermark-config": "marks in generated text",
    "--engram-config": "memories of their own in models",
    "--aux-output-config": "outputs beside the tokens",
    "--ec-manager-config": "encoders on other servers",
    "--enable-mamba-cache-stochastic-rounding": _STATES,
    "--mamba-cache-philox-rounds": _STATES,
    "--mamba-cache-dtype": _STATES,
    "--mamba-ssm-cache-dtype": _STATES,
    "--mamba-block-size": _STATES,
    "--mamba-cache-mode": _STATES,
    "--enable-mamba-shared-prefix-checkpoint": _STATES,
    "--dp-sync-interval": "how often copies tell each other that they are idle",
    "--prefix-cache-retention-interval": "blocks that the prefix cache lets go on purpose",
    "--prefix-match-unit": "prefixes that match in other units than blocks",
    "--mm-ipc-gpu-memory-gb": "inputs beside text on the GPU",
}
"""Argument -> what the simulation does not have."""
HARMLESS = {
    "--dcp-kv-cache-interleave-size": ("1",),
    "--cp-kv-cache-interleave-size": ("1",),
    "--prefill-context-parallel-size": ("1",),
    "-pcp": ("1",),
    "--ubatch-size": ("0",),
    "--expert-placement-strategy": ("linear",),
    "--all2all-backend": ("allgather_reducescatter",),
    "--stream-interval": ("1",),
    "--performance-mode": ("balanced",),
    "--runner": ("auto", "generate"),
    "--convert": ("auto", "none"),
    "--offload-backend": ("auto",),
    "--offload-group-size": ("0",),
    "--max-num-partial-prefills": ("1",),
    "--max-long-partial-prefills": ("1",),
    "--cpu-offload-gb": ("0", "0.0"),
    "--swap-space": ("0", "4"),
    "--mamba-cache-dtype": ("auto",),
    "--mamba-ssm-cache-dtype": ("auto",),
    "--mamba-cache-mode": ("none",),
    "--mamba-cache-philox-rounds": ("0",),
    "--dp-sync-interval": ("16",),
    "--prefix-cache-retention-interval": ("0",),
    "--mm-ipc-gpu-memory-gb": ("0", "0.0"),
    "--nnodes": ("1",),
    "-n": ("1",),
    "--node-rank": ("0",),
    "-r": ("0",),
}
"""Argument that is not simulated -> values that ask for nothing."""
REFUSED_SWITCHES = frozenset(
    {
        *("--enable-dbo", "--enable-eplb", "--enable-elastic-ep", "--headless"),
        *("--data-parallel-hybrid-lb", "-dph", "--data-parallel-external-lb", "-dpe"),
        *("--data-parallel-multi-port-external-lb", "-dpm"),
        *("--disable-sliding-window", "--kv-sharing-fast-prefill", "--dcp-q-replicate"),
        *("--enable-mamba-cache-stochastic-rounding", "--enable-mamba-shared-prefix-checkpoint"),
    }
)
"""Those of :data:`ELSEWHERE` and :data:`NOT_SIMULATED` that take no value."""


def _flags(text: str) -> frozenset[str]:
    return frozenset("--" + word for word in text.split())


KERNELS = _flags(
    """
    attention-backend attention-config mamba-backend mamba-ssu-algorithm moe-backend linear-backend
    sparse-indexer-topk-backend gdn-prefill-backend kda-prefill-backend kda-decode-backend
    mm-encoder-attn-backend mm-encoder-attn-dtype compilation-config kernel-config ir-op-priority
    optimization-level cudagraph-capture-sizes max-cudagraph-capture-size cuda-graph-sizes
    """
) | {"-ac", "-cc", "-O"}
"""Choices of kernels and captured graphs, with a value: the bundle's are used whatever they say."""
KERNEL_SWITCHES = _flags(
    """
    enable-flashinfer-autotune monokernel disable-custom-all-reduce disable-cascade-attn enable-hc-sp
    enable-batch-sharded-sampling use-replayssm
    """
)
WITHOUT_INFLUENCE = _flags(
    """
    api-server-count chat-template chat-template-content-format default-chat-template-kwargs
    reasoning-effort-map response-role tool-call-parser tool-parser-plugin tool-strict-level tool-server
    max-log-len sse-keep-alive-interval cohere-format anthropic-disabled-thinking-effort fingerprint-mode
    fingerprint-value host port grpc-port data-parallel-supervisor-port dp-supervisor-probe-interval-s
    dp-supervisor-probe-timeout-s dp-supervisor-probe-failure-threshold uds uvicorn-log-level
    disable-access-log-for-endpoints allowed-origins allowed-methods allowed-headers ssl-keyfile ssl-certfile
    ssl-ca-certs ssl-cert-reqs ssl-ciphers root-path middleware h11-max-incomplete-event-size
    h11-max-header-count tokenizer tokenizer-mode seed hf-config-path allowed-local-media-path revision
    code-revision tokenizer-revision max-logprobs logprobs-mode config-format hf-token generation-config
    override-generation-config sleep-mode-backend model-impl io-processor-plugin renderer-num-workers
    load-format download-dir safetensors-load-strategy safetensors-prefetch-num-threads
    safetensors-prefetch-block-size model-loader-extra-config pt-load-map-location reasoning-parser
    reasoning-parser-plugin distributed-executor-backend master-addr master-port distributed-timeout-seconds
    cpu-distributed-timeout-seconds device-ids data-parallel-address data-parallel-rpc-port
    data-parallel-backend max-parallel-loading-workers worker-cls worker-extension-cls
    fault-tolerance-config prefix-caching-hash-algo limit-mm-per-prompt media-io-kwargs mm-processor-kwargs
    mm-processor-cache-gb mm-processor-cache-type mm-hasher-algorithm mm-shm-cache-max-object-size-mb
    mm-encoder-tp-mode video-pruning-rate video-pruning-method mm-tensor-ipc mm-processor-device
    logging-config log-level log-config-file show-hidden-metrics-for-version otlp-traces-endpoint
    per-request-spec-decode-metrics kv-cache-metrics-sample custom-histogram-buckets jit-monitor-mode
    kv-events-config structured-outputs-config profiler-config watchdog-config weight-transfer-config
    shutdown-timeout max-lora-rank lora-dtype max-cpu-loras guided-decoding-backend reasoning-config
    dbo-decode-token-threshold dbo-prefill-token-threshold eplb-config
    elastic-ep-max-dp-size replayssm-buffer-len kv-offloading-backend
    offload-num-in-group offload-prefetch-step mm-encoder-fp8-scale-path mm-encoder-fp8-scale-save-path
    mm-encoder-fp8-scale-save-margin default-mm-loras max-lora-cls-labels
    """
) | {"-asc", "-dpa", "-dpp", "-dpb"}
"""Arguments with one value that no time depends on; some of them not without a switch that is refused."""
WITHOUT_INFLUENCE_LISTS = _flags(
    """
    api-key served-model-name lora-modules allowed-media-domains ignore-patterns logits-processors
    collect-detailed-traces numa-bind-nodes numa-bind-cpus lora-target-modules sleep-preserve-parameter-names
    cpu-offload-params offload-params
    """
)
"""The same, with one value or more."""
WITHOUT_INFLUENCE_SWITCHES = _flags(
    """
    grpc trust-request-chat-template trust-request-mm-kwargs return-tokens-as-token-ids
    enable-auto-tool-choice exclude-tools-when-tool-choice-none enable-prompt-tokens-details
    enable-per-request-metrics enable-server-load-tracking enable-force-include-usage
    enable-tokenizer-info-endpoint enable-log-outputs enable-log-deltas cohere-is-reasoning-model
    log-error-stack tokens-only enable-scale-out disable-uvicorn-access-log allow-credentials
    enable-ssl-refresh enable-request-id-headers disable-fastapi-docs enable-offline-docs
    enable-flash-late-interaction trust-remote-code allow-deprecated-quantization
    enable-return-routed-experts return-sampling-mask use-fp64-gumbel enable-trace-replay skip-tokenizer-init
    enable-prompt-embeds enable-sleep-mode sleep-mode-offload-cudagraph enable-cumem-allocator
    enable-nccl-comm-suspend use-tqdm-on-load numa-bind enable-ep-weight-filter enable-shm-tensor-arena
    disable-nccl-for-dp-synchronization ray-workers-use-nsight enable-fault-tolerance language-model-only
    enable-mm-embeds mm-encoder-only interleave-mm-strings skip-mm-profiling mm-device-do-normalize
    kv-cache-metrics cudagraph-metrics enable-layerwise-nvtx-tracing enable-mfu-metrics
    enable-logging-iteration-details jit-monitor-verbose disable-log-stats aggregate-engine-logging
    fail-on-environ-validation enable-log-requests disable-chunked-mm-input fully-sharded-loras
    swa-bounded-replay enable-tower-connector-lora specialize-active-lora enable-mixed-moe-lora-format
    enable-moe-shared-loras
    """
)
"""The same, without a value."""
LISTS = WITHOUT_INFLUENCE_LISTS | {
    *("--kv-cache-dtype-skip-layers", "--cudagraph-capture-sizes", "--cuda-graph-sizes"),
}
"""Arguments with one value or more."""
SWITCHES = KERNEL_SWITCHES | WITHOUT_INFLUENCE_SWITCHES | REFUSED_SWITCHES | frozenset(OWN_SWITCHES)
"""Arguments without a value; each has an opposite."""
KNOWN = (
    KERNELS | WITHOUT_INFLUENCE | LISTS | SWITCHES | frozenset([*OWN, *ELSEWHERE, *NOT_SIMULATED, "--config"])
)


def canonical(name: str) -> tuple[str, bool]:
    """A spelling of an argument -> (the one in the tables, whether it says the opposite)."""
    name = name.replace("_", "-")
    if name in KNOWN:
        return name, False
    opposites = [name.removeprefix("--no-")] if name.startswith("--no-") else []
    for prefix, other in (("--disable-", "enable-"), ("--enable-", "disable-")):
        if name.startswith(prefix):
            opposites.append(other + name.removeprefix(prefix))
    for opposite in opposites:
        if "--" + opposite in SWITCHES:
            return "--" + opposite, True
    return name, False
