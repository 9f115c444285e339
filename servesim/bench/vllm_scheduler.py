"""vLLM's own scheduler, built without a GPU and without a model: its settings and its groups of KV layers."""

from __future__ import annotations

import json
import os
import tempfile
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from servesim.bench.kv_loads import Elsewhere, LoadFormula, parse_loads, vllm_connector
from servesim.errors import InputError, RunError
from servesim.memory.kv_groups import KvGroup
from servesim.slotted import dataclass
from servesim.specs.engine_options import EngineOptions
from servesim.specs.speculative import SpeculativeSpec, speculative_spec

if TYPE_CHECKING:
    from collections.abc import Iterator

_KINDS = ("full", "sliding", "chunked", "state")
_PLACES = {
    "scheduler_config": (
        *("max_num_seqs", "max_num_batched_tokens", "long_prefill_token_threshold", "max_model_len"),
        *("enable_chunked_prefill", "reserve_full_isl", "async_scheduling", "scheduling_policy"),
        *("max_num_active_seqs", "max_num_scheduled_tokens", "long_prefill_token_threshold_adaptive"),
        *("prefill_schedule_interval", "watermark"),
    ),
    "lora_config": ("max_loras",),
    "cache_config": ("num_gpu_blocks", "block_size", "enable_prefix_caching"),
}
"""Part of vLLM's configuration -> the settings that are in it."""
_DRAFTERS = {
    "draft_model": "LlamaForCausalLM",
    "eagle": "EagleLlamaForCausalLM",
    "eagle3": "LlamaForCausalLMEagle3",
}
"""Method -> architecture of its drafter."""
_SECOND_RUNNER = "VLLM_USE_V2_MODEL_RUNNER"
_VLLM_NAMES = {"reserve_full_isl": "scheduler_reserve_full_isl", "scheduling_policy": "policy"}


def _default(name: str) -> Any:
    """Of the run's option of this name."""
    return EngineOptions.model_fields[name].default


@dataclass(frozen=True, slots=True)
class SchedulerSettings:
    """What the scheduler is configured with; names, and defaults but of two, are those of the run options."""

    num_gpu_blocks: int
    """KV blocks, the null block included: one less can be used."""
    block_size: int = _default("block_size")
    max_num_seqs: int = _default("max_num_seqs")
    max_num_batched_tokens: int = _default("max_num_batched_tokens")
    long_prefill_token_threshold: int = _default("long_prefill_token_threshold")
    max_model_len: int = 0
    """Longest sequence; 0: the longest of the workload."""
    enable_chunked_prefill: bool = _default("enable_chunked_prefill")
    reserve_full_isl: bool = _default("reserve_full_isl")
    enable_prefix_caching: bool = _default("enable_prefix_caching")
    async_scheduling: bool = _default("async_scheduling")
    scheduling_policy: str = _default("scheduling_policy")
    max_num_active_seqs: int | None = _default("max_num_active_seqs")
    max_num_scheduled_tokens: int | None = _default("max_num_scheduled_tokens")
    long_prefill_token_threshold_adaptive: bool = _default("long_prefill_token_threshold_adaptive")
    prefill_schedule_interval: int = _default("prefill_schedule_interval")
    watermark: float = _default("watermark")
    max_loras: int = 0
    """Most LoRA adapters in a step; 0: LoRA is off."""
    kv_groups: str = ""
    """Groups of layers, ``full,sliding:128``; empty: one that keeps every token. See :func:`parse_groups`."""
    speculative_config: str = ""
    """vLLM's JSON, with the rates of acceptance; names of drafters stand for a tiny one. Empty: none."""
    pipeline_parallel_size: int = 1
    """Stages; with asynchronous scheduling, of vLLM's second model runner."""
    decode_context_parallel_size: int = 1
    """Ranks that share the tokens of a block: it holds ``block_size`` of each."""
    kv_loads: str = ""
    """A KV connector that has KV of the prompts; see :func:`servesim.bench.kv_loads.parse_loads`. Empty:
    none."""

    @property
    def scheduler_block(self) -> int:
        """Tokens of a block as the scheduler counts them."""
        return self.block_size * self.decode_context_parallel_size

    @property
    def groups(self) -> tuple[KvGroup, ...]:
        """The groups; none: one that keeps every token."""
        return parse_groups(self) if self.kv_groups else ()

    @property
    def batches_in_flight(self) -> int:
        """Most batches in flight, as ``VllmConfig.max_concurrent_batches`` says."""
        return self.pipeline_parallel_size + self.async_scheduling

    @property
    def speculative(self) -> SpeculativeSpec | None:
        """What to speculate with, None if with nothing."""
        return speculative_spec(self.speculative_config or None)

    @property
    def loads(self) -> LoadFormula | None:
        """What its connector has, None without one."""
        return parse_loads(self.kv_loads) if self.kv_loads else None


_ONLY_IF_ASKED = (
    *("max_num_active_seqs", "long_prefill_token_threshold_adaptive"),
    *("max_num_scheduled_tokens", "max_loras"),
)
"""Settings that old versions of vLLM do not have, or that vLLM works out itself; left alone at their
defaults."""


def _is_asked_for(name: str, settings: SchedulerSettings) -> bool:
    """Whether a setting is another than its default."""
    default = next(item.default for item in fields(settings) if item.name == name)
    return bool(getattr(settings, name) != default)


def parse_groups(settings: SchedulerSettings) -> tuple[KvGroup, ...]:
    """The groups that ``settings.kv_groups`` names: ``KIND[:REACH][@BLOCK_SIZE]``, divided by commas.

    ``full`` keeps every token, ``sliding:128`` a window of 128 tokens, ``chunked:64`` chunks of 64 tokens,
    ``state`` one state a sequence. Equal ones are groups of the same kind of layers.

    Raises:
        InputError: something else stands there.
    """
    groups: list[KvGroup] = []
    buckets: dict[str, int] = {}
    for text in settings.kv_groups.split(","):
        shape, _, size = text.partition("@")
        kind, _, reach = shape.partition(":")
        numbers = [part for part in (size, reach) if part]
        if (
            kind not in _KINDS
            or not all(part.isdecimal() and int(part) > 0 for part in numbers)
            or bool(reach) != (kind in ("sliding", "chunked"))
        ):
            raise InputError(
                f"--kv-groups: {text!r} is not allowed; must be full, state, sliding:TOKENS or "
                "chunked:TOKENS, each perhaps with @BLOCK_SIZE"
            )
        block = int(size) if size else settings.block_size
        if kind == "state" and not settings.enable_prefix_caching:
            block = settings.max_model_len  # one state a sequence, whatever its length
        number = buckets.setdefault(f"{kind}:{reach}@{block}", len(buckets))
        groups.append(KvGroup(kind, block, (1,), int(reach) if reach else None, number))  # type: ignore[arg-type]
    return tuple(groups)


def _spec(group: KvGroup, caching: bool) -> Any:
    """vLLM's description of the layers of a group."""
    import torch
    from vllm.v1 import kv_cache_interface as kinds

    if group.kind == "state":
        return kinds.MambaSpec(
            block_size=group.block_size,
            shapes=((1, 1),),
            dtypes=(torch.float32,),
            mamba_cache_mode="align" if caching else "none",
        )
    common = {
        "block_size": group.block_size,
        "num_kv_heads": 1,
        "head_size": group.bucket + 1,
        "dtype": torch.bfloat16,
    }
    if group.kind == "sliding":
        return kinds.SlidingWindowSpec(**common, sliding_window=group.reach)
    if group.kind == "chunked":
        return kinds.ChunkedLocalAttentionSpec(**common, attention_chunk_size=group.reach)
    return kinds.FullAttentionSpec(**common)


def _kv_config(settings: SchedulerSettings, config: Any) -> Any:
    """vLLM's description of the whole cache."""
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec

    groups = settings.groups or (KvGroup("full", settings.block_size, (1,)),)
    more = {}
    if "prefix_cache_retention_interval" in {field.name for field in fields(KVCacheConfig)}:
        more["prefix_cache_retention_interval"] = config.cache_config.prefix_cache_retention_interval
    return KVCacheConfig(
        num_blocks=settings.num_gpu_blocks,
        kv_cache_tensors=[],
        kv_cache_groups=[
            KVCacheGroupSpec([f"attention.{index}"], _spec(group, settings.enable_prefix_caching))
            for index, group in enumerate(groups)
        ],
        **more,
    )


def build_scheduler(settings: SchedulerSettings) -> Any:
    """vLLM's scheduler for a model of one layer a group; the model's size does not matter to it."""
    stages = settings.pipeline_parallel_size
    if stages > 1 and (settings.kv_groups or settings.speculative_config):
        raise InputError(
            f"pipeline_parallel_size {stages}: pipelines are recorded with one KV cache group and without "
            "speculative decoding; leave one out"
        )
    shards = settings.decode_context_parallel_size
    if shards > 1 and (settings.kv_groups or settings.speculative_config):
        raise InputError(
            f"decode_context_parallel_size {shards}: recorded with one KV cache group and without "
            "speculative decoding; leave one out"
        )
    if settings.kv_loads and (settings.kv_groups or settings.speculative_config or shards > 1):
        raise InputError(
            "--kv-loads: connectors are recorded with one KV cache group, without speculative decoding and "
            "decode context parallelism; leave one out"
        )
    with _second_runner(None if stages > 1 else os.environ.get(_SECOND_RUNNER)):
        config = _vllm_config(settings)
    _undo_platform(config, settings)
    # vLLM refuses its second runner without Triton, but its scheduler does not need any
    asked = str(int(settings.async_scheduling)) if stages > 1 else os.environ.get(_SECOND_RUNNER)
    with _second_runner(asked):
        scheduler = _scheduler_of(config, settings)
        check_scheduler(scheduler, settings)
    return scheduler


@contextmanager
def _second_runner(asked: str | None) -> Iterator[None]:
    """Inside the block, vLLM is asked for its second model runner (``1``), the first (``0``) or neither."""
    before = os.environ.pop(_SECOND_RUNNER, None)
    if asked is not None:
        os.environ[_SECOND_RUNNER] = asked
    try:
        yield
    finally:
        os.environ.pop(_SECOND_RUNNER, None)
        if before is not None:
            os.environ[_SECOND_RUNNER] = before


def _vllm_config(settings: SchedulerSettings) -> Any:
    """vLLM's configuration of an engine with these settings, as its platform leaves it."""
    from vllm.config import (
        CacheConfig,
        DeviceConfig,
        LoRAConfig,
        ModelConfig,
        ParallelConfig,
        SchedulerConfig,
        VllmConfig,
    )

    stages, shards = settings.pipeline_parallel_size, settings.decode_context_parallel_size
    with tempfile.TemporaryDirectory() as folder:
        _write_tiny_model(Path(folder), settings.max_model_len, shards=shards)
        model = ModelConfig(
            model=folder, skip_tokenizer_init=True, dtype="bfloat16", max_model_len=settings.max_model_len
        )
        speculative = _speculative_config(Path(folder), settings, model)
    scheduling = SchedulerConfig(
        max_model_len=settings.max_model_len,
        is_encoder_decoder=False,
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        long_prefill_token_threshold=settings.long_prefill_token_threshold,
        enable_chunked_prefill=settings.enable_chunked_prefill,
        scheduler_reserve_full_isl=settings.reserve_full_isl,
        async_scheduling=settings.async_scheduling,
        policy=settings.scheduling_policy,
        prefill_schedule_interval=settings.prefill_schedule_interval,
        watermark=settings.watermark,
        **{
            name: getattr(settings, name)
            for name in _ONLY_IF_ASKED
            if name in _PLACES["scheduler_config"] and _is_asked_for(name, settings)
        },
    )
    degrees = {"pipeline_parallel_size": stages} if stages > 1 else {}
    if shards > 1:
        degrees |= {"tensor_parallel_size": shards, "decode_context_parallel_size": shards}
    cache = CacheConfig(block_size=settings.block_size, enable_prefix_caching=settings.enable_prefix_caching)
    config = VllmConfig(
        model_config=model,
        scheduler_config=scheduling,
        cache_config=cache,
        device_config=DeviceConfig(device="cpu"),
        speculative_config=speculative,
        lora_config=LoRAConfig(max_loras=settings.max_loras) if settings.max_loras else None,
        **({"parallel_config": ParallelConfig(**degrees)} if degrees else {}),
        **_kv_transfer(settings),
    )
    cache.num_gpu_blocks = settings.num_gpu_blocks
    if settings.enable_prefix_caching and any(group.kind == "state" for group in settings.groups):
        cache.mamba_cache_mode = "align"  # as vLLM does for such models
    return config


def _scheduler_of(config: Any, settings: SchedulerSettings) -> Any:
    """vLLM's scheduler with this configuration and the KV layout of the settings."""
    from vllm.v1.core.kv_cache_utils import resolve_kv_cache_block_sizes
    from vllm.v1.structured_output import StructuredOutputManager

    layout = _kv_config(settings, config)
    scheduler_block, hash_block = resolve_kv_cache_block_sizes(layout, config)
    return _scheduler_class(settings.async_scheduling)(
        vllm_config=config,
        kv_cache_config=layout,
        structured_output_manager=StructuredOutputManager(config),
        block_size=scheduler_block,
        hash_block_size=hash_block,
    )


def _kv_transfer(settings: SchedulerSettings) -> dict[str, Any]:
    """vLLM's configuration of the KV connector, nothing without."""
    if settings.loads is None:
        return {}
    from vllm.config import KVTransferConfig
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    made = vllm_connector(Elsewhere(settings.loads, settings.block_size))
    KVConnectorFactory._registry[made.__name__] = lambda: made  # another one for every scheduler
    return {"kv_transfer_config": KVTransferConfig(kv_connector=made.__name__, kv_role="kv_consumer")}


def _speculative_config(folder: Path, settings: SchedulerSettings, model: Any) -> Any:
    """vLLM's configuration of speculative decoding, with a tiny drafter; None without."""
    spec = settings.speculative
    if spec is None:
        return None
    from vllm.config import ParallelConfig, SpeculativeConfig

    entries: dict[str, Any] = {"method": spec.method, "num_speculative_tokens": spec.num_tokens}
    if spec.method == "ngram":
        entries |= {"prompt_lookup_min": 2, "prompt_lookup_max": 4}
    elif spec.method in _DRAFTERS:
        drafter = folder / "drafter"
        drafter.mkdir()
        _write_tiny_model(drafter, settings.max_model_len, _DRAFTERS[spec.method])
        entries["model"] = str(drafter)
    else:
        raise InputError(
            f"method {spec.method} cannot be recorded, since it needs a target of its own; to the scheduler "
            "it is the same as eagle"
        )
    return SpeculativeConfig(target_model_config=model, target_parallel_config=ParallelConfig(), **entries)


def _scheduler_class(asynchronous: bool) -> Any:
    """vLLM's scheduler class, by the setting and not by what the platform has made of it.

    It also takes down whom it preempts: vLLM itself only tells the set.
    """
    if asynchronous:
        from vllm.v1.core.sched.async_scheduler import AsyncScheduler as Base
    else:
        from vllm.v1.core.sched.scheduler import Scheduler as Base

    class Noting(Base):  # type: ignore[misc]
        def __init__(self, **arguments: Any) -> None:
            self._victims: list[int] = []
            super().__init__(**arguments)

        def _preempt_request(self, request: Any, *arguments: Any, **more: Any) -> None:
            self._victims.append(int(request.request_id))
            super()._preempt_request(request, *arguments, **more)

        def take_victims(self) -> list[int]:
            victims, self._victims = self._victims, []
            return victims

    return type(Base.__name__, (Noting,), {})


def _undo_platform(config: Any, settings: SchedulerSettings) -> None:
    """Set again what vLLM's CPU platform changes: without a GPU it switches asynchronous scheduling off."""
    for part, names in _PLACES.items():
        for name in names:
            if name not in _ONLY_IF_ASKED or _is_asked_for(name, settings):
                setattr(getattr(config, part), _VLLM_NAMES.get(name, name), getattr(settings, name))


def check_scheduler(scheduler: Any, settings: SchedulerSettings) -> None:
    """Refuse a scheduler that is not the one asked for: its log would be of another one.

    Raises:
        RunError: it is of the other class, or works with other settings.
    """
    names = [kind.__name__ for kind in type(scheduler).__mro__]
    wanted = "AsyncScheduler" if settings.async_scheduling else "Scheduler"
    if wanted not in names or ("AsyncScheduler" in names) != settings.async_scheduling:
        raise RunError(f"vLLM built its {names[0]} where {wanted} was asked for; nothing is recorded")
    depth = scheduler.vllm_config.max_concurrent_batches
    if depth != settings.batches_in_flight:
        raise RunError(
            f"vLLM keeps {depth} batches in flight where {settings.batches_in_flight} were expected; nothing "
            "is recorded"
        )
    for part, names_in_part in _PLACES.items():
        for name in names_in_part:
            if name in _ONLY_IF_ASKED and not _is_asked_for(name, settings):
                continue
            theirs = getattr(getattr(scheduler.vllm_config, part), _VLLM_NAMES.get(name, name))
            if theirs != getattr(settings, name):
                raise RunError(
                    f"vLLM's scheduler works with {name} {theirs!r} where {getattr(settings, name)!r} was "
                    "asked for; nothing is recorded"
                )


def _write_tiny_model(
    folder: Path, max_model_len: int, architecture: str = "LlamaForCausalLM", shards: int = 1
) -> None:
    """A config.json that vLLM accepts, for so many ranks that share the KV of one head; no weights are ever
    read."""
    heads = 4 if shards == 1 else shards
    config = {
        "architectures": [architecture],
        "model_type": "llama",
        "hidden_size": 16 * heads,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": heads,
        "num_key_value_heads": 4 if shards == 1 else 1,
        "vocab_size": 1024,
        "max_position_embeddings": max_model_len,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
