"""What each format of the KV cache buys on one model and GPU: memory from the groups that vLLM plans, steps
from the kernel times of the model's bundle.

A figure is from tables (16 bit and fp8), derived from another format's time and the bytes that are read (with
a band), unknown, or not simulated. The last two give the reason and no number.
"""

from __future__ import annotations

from dataclasses import asdict, field, replace
from typing import TYPE_CHECKING, Any, Literal

from servesim.errors import InputError, NotSupportedError
from servesim.memory.kv_groups import plan_groups
from servesim.memory.kv_layers import kv_layers
from servesim.memory.plan import kv_room, mxfp4_tiles
from servesim.memory.sizing import GIB, weight_bytes_per_npu
from servesim.slotted import dataclass
from servesim.specs.cluster_changes import cluster_of
from servesim.specs.dtypes import dtype_bytes, resolve_kv_dtype
from servesim.specs.hardware import load_hardware
from servesim.specs.instance_options import resolve
from servesim.specs.kv_skip import OPTION as SKIP
from servesim.specs.kv_skip import skipped_layers, with_wide_layers
from servesim.specs.kv_support import attention_kind, is_known, why_not
from servesim.specs.layers import Attention, Recurrent
from servesim.specs.model import load_model
from servesim.specs.options import RuntimeOptions
from servesim.specs.runnable import why_not_simulated

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from servesim.explore.kv_steps import KvSteps
    from servesim.memory.engine_memory import Estimate
    from servesim.specs.hardware import HardwareSpec
    from servesim.specs.instance_options import InstanceOptions
    from servesim.specs.model import ModelSpec

LENGTHS = (8192, 32768, 131072)
"""Tokens of the requests that are counted."""
DEFAULT_CONTEXT, DEFAULT_BATCH = 8192, 32
FORMATS_OF_HEADS = (
    *("fp8", "fp8_per_token_head", "int8_per_token_head", "int4_per_token_head", "nvfp4"),
    *("turboquant_k8v4", "turboquant_4bit_nc", "turboquant_k3v4_nc", "turboquant_3bit_nc"),
)
FORMATS_OF_LATENTS = ("fp8",)
FORMATS_OF_SPARSE_LATENTS = ("fp8", "fp8_ds_mla")

Origin = Literal["tables", "derived", "unknown", "not simulated"]


@dataclass(frozen=True, slots=True)
class Figure:
    """A number with where it is from, or why there is none."""

    origin: Origin
    value: float | None = None
    low: float | None = None
    high: float | None = None
    """Ends of the band of a derived figure."""
    reason: str = ""


@dataclass(frozen=True, slots=True)
class KvRow:
    """One format with the hybrid manager on or off. Bytes are of one GPU."""

    kv_format: str
    hybrid: bool
    refused: str | None
    """Why vLLM does not run it here; None: it does, or the table does not know the accelerator."""
    bytes_per_token: float | None = None
    """Of one more token of a long request."""
    bytes_per_block: int | None = None
    block_size: int | None = None
    """Tokens of a block of the layers that keep every token."""
    tokens: int | None = None
    """Of the longest request that fits alone; None: nothing fits."""
    band_tokens: tuple[int, int] | None = None
    shared_tokens: int | None = None
    """Tokens of all groups when they share the blocks evenly."""
    requests: dict[int, int | None] = field(default_factory=dict)
    """Tokens of a request -> how many of them fit at once; None: longer than the model's context."""
    batch_fits: bool | None = None
    """Whether the batch of the step fits at once."""
    wide_layers: int = 0
    """Layers whose cache stays in 16 bit."""
    step_ms: Figure = Figure("unknown")
    break_even: Figure = Figure("unknown")
    """Least context in tokens from which on the decode step is no longer than with 16 bit."""
    prefill_percent: Figure = Figure("unknown")
    """Change of the time of one prompt of the context's length against 16 bit, alone, chunk by chunk."""


@dataclass(frozen=True, slots=True)
class KvDial:
    """All rows, and what holds for all of them."""

    model: str
    hardware: str
    tp: int
    context: int
    batch: int
    base_format: str
    """The 16-bit format that others are compared with; the only one, where the model has but one."""
    auto_format: str
    """What ``auto`` stands for."""
    weight_gib: float
    room_gib: tuple[float, float, float]
    """Left for the KV cache: least, likely, most; negative where the weights do not fit."""
    rows: tuple[KvRow, ...]
    notes: tuple[str, ...]

    def json_text(self) -> str:
        """Everything as JSON."""
        import json

        return json.dumps(asdict(self), indent=1)

    def text(self) -> str:
        """As a table with notes."""
        from servesim.explore.show_kv_dial import dial_text

        return dial_text(self)

    def save_plot(self, path: str | Path) -> None:
        """Draw tokens and decode steps of the formats; ``.png`` or ``.svg``.

        Raises:
            InputError: matplotlib is not installed.
        """
        from servesim.explore.show_kv_dial import save_plot

        save_plot(self, path)


@dataclass(frozen=True, slots=True)
class _Asked:
    """What all rows have in common."""

    spec: ModelSpec
    hardware: HardwareSpec
    options: InstanceOptions
    tp: int
    room: Estimate
    """Bytes of one GPU for the KV cache."""
    base: str
    context: int
    batch: int


def kv_dial(
    model: str,
    hardware: str,
    *,
    context: int = DEFAULT_CONTEXT,
    batch: int = DEFAULT_BATCH,
    hybrid: bool | None = None,
    **flags: Any,
) -> KvDial:
    """What every KV format means for ``model`` on ``hardware``.

    Args:
        model: name or path, as everywhere.
        hardware: of ``configs/hardware``.
        context: tokens that each of ``batch`` decodes has in the cache.
        batch: decodes of the step.
        hybrid: whether layers that keep different things have managers of their own; None: both ways.
        flags: options of a run that act here: ``tp``, ``dtype``, ``npu_memory_utilization``,
            ``max_num_seqs``, ``max_num_batched_tokens``, ``block_size``, ``kv_cache_dtype_skip_layers``.

    Raises:
        InputError: an option is wrong, or the memory of the hardware is not known.
        NotSupportedError: what the model's layers keep is not modelled.
    """
    options = RuntimeOptions(model=model, hardware=hardware, **flags)
    spec, facts = load_model(model), load_hardware(hardware)
    _check(spec, facts, context, batch)
    instance = next(spec for _, spec in cluster_of(options).instances)
    resolved = resolve(options, instance, spec)
    tp, auto = instance.tp_size, spec.layers.kv_format or resolve_kv_dtype(resolved.dtype, "auto")
    base = auto if attention_kind(spec.layers) == "compressed" else _sixteen_bit(resolved.dtype)
    room = kv_room(spec, instance, resolved, facts)
    asked = _Asked(spec, facts, resolved, tp, room, base, context, batch)
    reason, steps = why_not_simulated(spec), None
    if reason is None:
        from servesim.explore.kv_steps import KvSteps

        steps = KvSteps(options, spec, base, context, batch)
    managers: tuple[bool, ...] = (True, False) if _has_windows(spec) else (True,)
    if hybrid is not None and len(managers) > 1:
        managers = (hybrid,)
    rows = []
    for kv_format in dict.fromkeys((base, auto, *_formats(spec))):
        both = [_priced(_memory(asked, kv_format, hybrid=manager), steps, reason) for manager in managers]
        rows += both[:1] if both[0].refused else both
    _check_skipped(spec, resolved.kv_cache_dtype_skip_layers, rows)
    left = (room.low / GIB, room.likely / GIB, room.high / GIB)
    return KvDial(
        *(spec.name, hardware, tp, context, batch, base, auto),
        weight_gib=weight_bytes_per_npu(spec, resolved.dtype, tp, tile=mxfp4_tiles(facts)[0]) / GIB,
        room_gib=left,
        rows=tuple(rows),
        notes=tuple(_notes(asked, rows, steps, reason)),
    )


def _check(model: ModelSpec, hardware: HardwareSpec, context: int, batch: int) -> None:
    if not 1 <= context <= model.max_position_embeddings:
        raise InputError(
            f"--context: {context} is not allowed; must be 1 to {model.max_position_embeddings}, the longest "
            f"context of {model.name}"
        )
    if not 1 <= batch <= 65536:
        raise InputError(f"--batch: {batch} is not allowed; must be 1 to 65536")
    if hardware.memory_gib is None:
        raise InputError(
            f"configs/hardware/{hardware.name}.yaml: memory_gib: is missing; what fits is counted from it"
        )


def _sixteen_bit(dtype: str) -> str:
    return dtype if dtype_bytes(dtype) > 1 and dtype != "float32" else "bfloat16"


def _formats(model: ModelSpec) -> tuple[str, ...]:
    kind = attention_kind(model.layers)
    if kind == "heads":
        return FORMATS_OF_HEADS
    if kind == "compressed":
        return ()  # its own alone
    return FORMATS_OF_SPARSE_LATENTS if kind == "sparse_mla" else FORMATS_OF_LATENTS


def _has_windows(model: ModelSpec) -> bool:
    """Whether a single manager would keep other layers whole than the hybrid one; states forbid it."""
    kept = [layer.attention for layer in model.layers.layers]
    windows = any(isinstance(a, Attention) and a.kind in ("sliding", "chunked") for a in kept)
    return windows and not any(isinstance(a, Recurrent) for a in kept)


def _memory(asked: _Asked, kv_format: str, *, hybrid: bool) -> KvRow:
    """The row without its times."""
    spec, options = asked.spec, asked.options
    skipped = skipped_layers(spec.layers, options.kv_cache_dtype_skip_layers, kv_format)
    model = with_wide_layers(spec.layers, skipped, asked.base)
    refused = why_not(kv_format, model, asked.hardware)
    try:
        layers = kv_layers(model, kv_format, asked.tp, options.block_size)
        plan = plan_groups(layers, hybrid=hybrid)
    except (InputError, NotSupportedError) as error:
        if kv_format == asked.base:
            raise NotSupportedError(f"{spec.name}: {error}") from error
        return KvRow(kv_format, hybrid, refused or str(error))
    step_tokens = options.max_num_batched_tokens
    low, likely, high = (max(plan.num_blocks(size), 0) for size in asked.room)
    tokens = [plan.longest(blocks, step_tokens) for blocks in (low, likely, high)]
    if not plan.bytes_per_token:  # windows and states alone: a request stops growing
        tokens = [min(each, spec.max_position_embeddings) for each in tokens]
    growing = [group.block_size for group in plan.groups if group.kind in ("full", "mla")]
    requests = {
        length: plan.requests(likely, length, step_tokens) if length <= spec.max_position_embeddings else None
        for length in LENGTHS
    }
    return KvRow(
        *(kv_format, hybrid, refused, plan.bytes_per_token, plan.bytes_per_block),
        block_size=min(growing or [group.block_size for group in plan.groups]),
        tokens=tokens[1],
        band_tokens=(tokens[0], tokens[2]),
        shared_tokens=plan.shared_tokens(likely),
        requests=requests,
        batch_fits=plan.requests(likely, asked.context, step_tokens) >= asked.batch,
        wide_layers=len(skipped),
    )


def _check_skipped(model: ModelSpec, words: str | None, rows: Sequence[KvRow]) -> None:
    """Refuse layers to leave out where no format leaves out any for it."""
    formats = {row.kv_format for row in rows}
    if words and all(
        skipped_layers(model.layers, words, name) == skipped_layers(model.layers, None, name)
        for name in formats
    ):
        raise InputError(f"{SKIP} {words}: has no effect here: {model.name} has no such layers; leave it out")


def _priced(row: KvRow, steps: KvSteps | None, reason: str | None) -> KvRow:
    """The row with its times."""
    if row.refused:
        none = Figure("unknown", reason="vLLM does not run it here")
        return replace(row, step_ms=none, break_even=none, prefill_percent=none)
    if steps is None:
        none = Figure("not simulated", reason=reason or "")
        return replace(row, step_ms=none, break_even=none, prefill_percent=none)
    return replace(
        row,
        step_ms=steps.step_ms(row.kv_format),
        break_even=steps.break_even(row.kv_format),
        prefill_percent=steps.prefill_percent(row.kv_format),
    )


def _notes(asked: _Asked, rows: Sequence[KvRow], steps: KvSteps | None, reason: str | None) -> list[str]:
    spec, hardware = asked.spec, asked.hardware
    notes = []
    if asked.room.likely <= 0:
        notes.append(
            f"the weights leave no room at tp {asked.tp}; more GPUs (--tp) or more memory are needed before "
            "anything fits"
        )
    if reason is not None:
        notes.append(f"times are not simulated: {reason}")
    if steps is not None:
        notes += steps.notes()
    if not is_known(hardware):
        notes.append(
            f"which formats {hardware.name} runs is not known here: only NVIDIA GPUs are in the table"
        )
    for count in sorted({row.wide_layers for row in rows if row.wide_layers and not row.refused}):
        formats = dict.fromkeys(row.kv_format for row in rows if row.wide_layers == count and not row.refused)
        notes.append(
            f"{', '.join(formats)}: the cache of {count} of {len(spec.layers.layers)} layers stays in 16 bit"
        )
    for row in rows:
        if row.refused:
            notes.append(f"{row.kv_format}: {row.refused}")
    if (kind := attention_kind(spec.layers)) == "compressed":
        notes.append("vLLM keeps the cache of compressed tokens in fp8_ds_mla alone, whatever is asked for")
    elif kind != "heads":
        names = [name for name in FORMATS_OF_HEADS if name not in FORMATS_OF_SPARSE_LATENTS]
        notes.append(f"vLLM has no kernels of latent attention (MLA) for {', '.join(names)}")
    small = [row.kv_format for row in rows if row.hybrid and not row.refused and row.batch_fits is False]
    if small and steps is not None and asked.room.likely > 0:
        notes.append(
            f"{asked.batch} requests of {asked.context:,} tokens do not fit at once in: {', '.join(small)}; "
            "their steps are for comparison"
        )
    return [*notes, "what a format does to a model's answers (accuracy) is in none of these figures"]
