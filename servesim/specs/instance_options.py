"""What holds for one instance: its own settings, else the flags, else the model's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from servesim.errors import InputError
from servesim.slotted import dataclass
from servesim.specs.context_parallel import check_context_parallel
from servesim.specs.dtypes import resolve_kv_dtype, variant_name
from servesim.specs.engine_options import EngineOptions
from servesim.specs.hardware import load_hardware
from servesim.specs.kv_skip import OPTION as SKIP
from servesim.specs.kv_skip import as_kept, skipped_layers, variant_with
from servesim.specs.kv_support import block_step
from servesim.specs.layers import Recurrent
from servesim.specs.presets import serve_defaults
from servesim.specs.speculative import OPTION, SpeculativeSpec, speculative_spec
from servesim.specs.validation import UNLIMITED
from servesim.specs.vllm_versions import NEWEST, STATE_STOPS, V2_NGRAM, VllmVersion, runs_v2

if TYPE_CHECKING:
    from collections.abc import Mapping

    from servesim.specs.cluster import InstanceSpec
    from servesim.specs.model import ModelSpec
    from servesim.specs.options import RuntimeOptions


@dataclass(frozen=True, slots=True)
class InstanceOptions:
    """The options of one instance, every default and every 0 resolved."""

    dtype: str
    kv_cache_dtype: str
    """As asked for: auto, fp8 or int8."""
    kv_dtype: str
    """What the KV cache is stored in."""
    variant: str
    """Folder name of the profile variant."""
    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    long_prefill_token_threshold: int
    enable_chunked_prefill: bool
    reserve_full_isl: bool
    enable_prefix_caching: bool
    async_scheduling: bool
    enable_local_offloading: bool
    enable_attn_offloading: bool
    enable_sub_batch_interleaving: bool
    enable_block_copy: bool
    npu_memory_utilization: float
    max_model_len: int
    """Longest context of a request, in tokens."""
    vllm_version: VllmVersion = NEWEST
    """Whose decisions are followed."""
    plan_as_vllm: VllmVersion | None = None
    """Version whose memory plan was asked for; None: the hardware file's."""
    cudagraph: bool = True
    num_gpu_blocks: int | None = None
    """KV blocks as given; None: what fits."""
    speculative: SpeculativeSpec | None = None
    """What to speculate with; None: nothing."""
    scheduling_policy: str = "fcfs"
    max_num_active_seqs: int | None = None
    max_num_scheduled_tokens: int | None = None
    long_prefill_token_threshold_adaptive: bool = False
    prefill_schedule_interval: int = 1
    watermark: float = 0.0
    kv_load: str = "step"
    """How KV comes in from elsewhere: step or async."""
    enable_lora: bool = False
    max_loras: int = 1
    disable_hybrid_kv_cache_manager: bool = False
    decode_context_parallel_size: int = 1
    """Ranks that share the KV of a head by tokens."""
    dcp_comm_backend: str = "ag_rs"
    kv_cache_dtype_skip_layers: str | None = None
    """As asked for."""
    skipped: tuple[int, ...] = ()
    """Layers whose KV cache stays in :attr:`wide_dtype`."""

    @property
    def wide_dtype(self) -> str:
        """What the KV cache is stored in where nothing else is asked for."""
        return resolve_kv_dtype(self.dtype, "auto")

    def kept(self, model: ModelSpec) -> ModelSpec:
        """The model with the formats that its layers' caches have beside :attr:`kv_dtype`."""
        return as_kept(model, self.skipped, self.wide_dtype) if self.skipped else model


def _speculative(
    options: RuntimeOptions, instance: InstanceSpec, chosen: dict[str, Any]
) -> SpeculativeSpec | None:
    """What an instance speculates with; asynchronous scheduling is switched off where vLLM has to.

    Raises:
        InputError: the options are not allowed, or speculation is not simulated together with another thing.
    """
    spec = speculative_spec(options.speculative_config, options.speculative_acceptance)
    if spec is None:
        return None
    threshold = chosen["long_prefill_token_threshold"]
    beside = {
        f"pp_size {instance.pp_size}": instance.pp_size > 1,
        **_moving_kv(options, instance, chosen),
        "--skip-prefill": options.skip_prefill,
        f"draft_tensor_parallel_size {spec.draft_tp} and tp_size {instance.tp_size}": (
            spec.draft_tp not in (None, instance.tp_size)
        ),
        "ep_size above 1, or a dp_group": instance.ep_size > 1 or instance.dp_group is not None,
        f"--long-prefill-token-threshold {threshold}, which would cut verifications": (
            0 < threshold <= spec.num_tokens
        ),
    }
    for name, there in beside.items():
        if there:
            raise InputError(f"{OPTION}: speculative decoding is not simulated with {name}; leave one out")
    if not spec.on_gpu and not V2_NGRAM.holds(options.vllm_version):
        chosen["async_scheduling"] = False
    return spec


def _moving_kv(options: RuntimeOptions, instance: InstanceSpec, chosen: dict[str, Any]) -> dict[str, bool]:
    """What moves KV or keeps it elsewhere, in words -> whether an instance has it."""
    return {
        "prefill and decode instances (pd_type)": instance.pd_type is not None,
        "a lower tier of the prefix cache (--prefix-storage)": options.prefix_storage is not None,
        "--enable-attn-offloading": chosen["enable_attn_offloading"],
        "--enable-local-offloading": chosen["enable_local_offloading"],
        "placement": instance.placement is not None,
    }


def _check_skipped(chosen: dict[str, Any], beside: Mapping[str, bool]) -> None:
    """Layers with a KV format of their own are not simulated together with what moves or drafts KV.

    Raises:
        InputError: so it is asked.
    """
    for name, there in beside.items():
        if there:
            why = f"{SKIP}: layers with a KV format of their own are not simulated with {name}; leave one out"
            if not chosen["kv_cache_dtype_skip_layers"]:
                why += f" (--kv-cache-dtype {chosen['kv_cache_dtype']} leaves out the first and last two)"
            raise InputError(why)


def wants_auto_model_len(options: RuntimeOptions, instance: InstanceSpec) -> bool:
    """Whether the longest context that fits the KV cache is to be found."""
    wanted = options.max_model_len if instance.max_model_len is None else instance.max_model_len
    return wanted == "auto"


def _longest(wanted: int | str | None, model: ModelSpec) -> int:
    """The longest context in tokens, for ``auto`` the longest there may be.

    Raises:
        InputError: the model has no such positions; vLLM refuses it as well.
    """
    if not isinstance(wanted, int):
        return model.max_position_embeddings
    if wanted > model.max_position_embeddings:
        raise InputError(
            f"--max-model-len: {wanted} is not allowed; must be <= {model.max_position_embeddings}, the "
            f"max_position_embeddings of {model.name}; a model that was extended says so in its config.json"
        )
    return wanted


def _settle_block_size(
    instance: InstanceSpec, model: ModelSpec, chosen: dict[str, Any], stated: Mapping[str, Any]
) -> None:
    """Blocks that an attention backend takes: vLLM does not start with others, and chooses the smallest
    that will do where none are asked for.

    Raises:
        InputError: none takes the blocks asked for.
    """
    hardware = load_hardware(instance.hardware)
    step, size = block_step(model.layers, hardware), chosen["block_size"]
    if "block_size" not in stated:
        chosen["block_size"] = max(size, step)
    elif size % step:
        raise InputError(
            f"--block-size: {size} is not allowed for {model.name} on {hardware.name}; must be a multiple of "
            f"{step} tokens, as no attention backend of vLLM takes other blocks; leave it out, or give "
            f"{-(-size // step) * step}"
        )


def resolve(options: RuntimeOptions, instance: InstanceSpec, model: ModelSpec) -> InstanceOptions:
    """What holds for one instance: its own settings, else the flags, else the model's.

    Raises:
        InputError: options that exclude each other, or a context or blocks that the model cannot have.
    """
    chosen, stated = {}, {}
    for name in EngineOptions.model_fields:
        own = getattr(instance, name)
        chosen[name] = own if own is not None else getattr(options, name)
        if own is not None or name in options.model_fields_set:
            stated[name] = chosen[name]
    if chosen["enable_sub_batch_interleaving"]:
        if not chosen["enable_attn_offloading"]:
            raise InputError("--enable-sub-batch-interleaving: needs --enable-attn-offloading beside it")
        if instance.pp_size != 1:
            raise InputError(
                f"--enable-sub-batch-interleaving: pp_size {instance.pp_size} is not allowed; must be 1"
            )
    if "enable_prefix_caching" not in stated and not STATE_STOPS.holds(options.vllm_version):
        keeps_states = any(isinstance(layer.attention, Recurrent) for layer in model.layers.layers)
        chosen["enable_prefix_caching"] &= not keeps_states  # the default of these versions
    _settle_block_size(instance, model, chosen, stated)
    dtype = chosen.pop("dtype") or model.torch_dtype
    chosen["kv_cache_dtype"] = model.kv_word(chosen["kv_cache_dtype"])
    longest = _longest(chosen.pop("max_model_len"), model)
    if options.preset is not None:
        hardware = load_hardware(instance.hardware)
        size_gib = instance.npu_mem.mem_size or hardware.memory_gib or 0.0
        chosen |= serve_defaults(hardware, size_gib, options.vllm_version, longest, stated)
    speculative = _speculative(options, instance, chosen)
    skipped = skipped_layers(model.layers, chosen["kv_cache_dtype_skip_layers"], chosen["kv_cache_dtype"])
    beside = {
        "speculative decoding (--speculative-config)": options.speculative_config is not None,
        **_moving_kv(options, instance, chosen),
    }
    if skipped:
        _check_skipped(chosen, beside)
    check_context_parallel(instance, model, chosen, dtype, beside)
    if instance.pp_size > 1 and not runs_v2(options.vllm_version, model.model_type, moe=model.is_moe):
        # The first model runner puts every running request into every batch of a pipeline, and its first
        # stage waits for the last one; that is not simulated (a note says so).
        chosen["async_scheduling"] = False
    utilization = chosen.pop("npu_memory_utilization")
    if instance.npu_mem.mem_util is not None:
        utilization = instance.npu_mem.mem_util
    return InstanceOptions(
        **{
            **chosen,
            "max_num_seqs": chosen["max_num_seqs"] or UNLIMITED,
            "max_num_batched_tokens": chosen["max_num_batched_tokens"] or longest,
            "long_prefill_token_threshold": chosen["long_prefill_token_threshold"] or UNLIMITED,
        },
        dtype=dtype,
        kv_dtype=resolve_kv_dtype(dtype, chosen["kv_cache_dtype"]),
        variant=variant_with(variant_name(dtype, chosen["kv_cache_dtype"]), model.layers, skipped),
        skipped=skipped,
        npu_memory_utilization=utilization,
        max_model_len=longest,
        vllm_version=options.vllm_version,
        plan_as_vllm=options.vllm_version if "vllm_version" in options.model_fields_set else None,
        speculative=speculative,
    )
