"""What vLLM checks before it serves: an instance that a real server would refuse is refused here as well.

All of it is known before any kernel time is looked up.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from servesim.errors import InputError, NotSupportedError
from servesim.memory.sizing import GIB
from servesim.slotted import dataclass
from servesim.specs.dtypes import KV_CACHE_SIZED
from servesim.specs.hardware import load_hardware
from servesim.specs.instance_options import wants_auto_model_len
from servesim.specs.kv_support import why_not
from servesim.specs.validation import UNLIMITED
from servesim.specs.vllm_versions import LOCAL_CADENCE, LONG_THRESHOLD, SINCE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from servesim.memory.memory_map import MemoryMap
    from servesim.memory.plan import KvCapacity
    from servesim.specs.cluster import InstanceSpec
    from servesim.specs.instance_options import InstanceOptions
    from servesim.specs.model import ModelSpec
    from servesim.specs.options import RuntimeOptions


@dataclass(frozen=True, slots=True)
class StartUp:
    """An instance that starts."""

    options: InstanceOptions
    """With the context that was found to fit."""
    capacity: KvCapacity
    notes: tuple[str, ...]
    """Lines that its user should see."""


def start_up(
    index: int,
    instance: InstanceSpec,
    model: ModelSpec,
    options: InstanceOptions,
    asked: RuntimeOptions,
    memories: MemoryMap,
) -> StartUp:
    """Plan the memory of instance ``index`` of the cluster and check all that vLLM would.

    Raises:
        InputError: it would not start; the message has the figures and the way out.
    """
    where = f"instance {index}"
    check_budget(options, where)
    check_limits(options, where)
    check_cadence(instance, model, options, where)
    check_quantised_shards(instance, model, options, where)
    check_kv_format(instance, model, options, where)
    capacity = memories.capacity(index)
    check_groups(instance, model, capacity, memories.tier_words[index], where)
    notes = memories.notes(index)
    if model.layers.vision:
        notes.append(
            f"{model.name}: images are not simulated: its vision tower counts in weights, and its time is in "
            "no figure"
        )
    if wants_auto_model_len(asked, instance):
        fitting = _fitting(options, capacity, capacity.num_blocks)
        if not fitting:
            raise InputError(
                f"{where}: --max-model-len auto: the KV cache of {capacity.num_blocks} blocks holds not even "
                "one token; raise --npu-memory-utilization or tp_size"
            )
        notes.append(_auto_line(options.max_model_len, fitting, capacity))
        options = replace(options, max_model_len=fitting)
    elif capacity.overridden:
        notes += _too_few_blocks(options, capacity)
    else:
        notes += check_full_context(options, capacity, where)
    return StartUp(options, capacity, tuple(notes))


def check_budget(options: InstanceOptions, where: str) -> None:
    """Without chunked prefill a step must hold the longest prompt: a preempted request is computed at once.

    Raises:
        InputError: the budget is smaller.
    """
    budget, longest = options.max_num_batched_tokens, options.max_model_len
    if not options.enable_chunked_prefill and budget < longest:
        raise InputError(
            f"{where}: --max-num-batched-tokens: {budget} is not allowed without chunked prefill; must be >= "
            f"{longest}, the longest context (vLLM does not start otherwise); shorten the context with "
            f"--max-model-len {budget}, raise the budget, or leave chunked prefill on"
        )


def check_limits(options: InstanceOptions, where: str) -> None:
    """Refuse limits with which vLLM does not start, and those that its version does not have.

    Raises:
        InputError: what is wrong, and what would do.
    """
    version, budget = options.vllm_version, options.max_num_batched_tokens
    running, longest = options.max_num_seqs, options.max_model_len
    threshold = options.long_prefill_token_threshold
    if budget < running < UNLIMITED:
        raise InputError(
            f"{where}: --max-num-batched-tokens: {budget} is not allowed; must be >= {running}, the most "
            f"requests that run (vLLM does not start otherwise); give --max-num-seqs {budget} or less too"
        )
    if longest < threshold < UNLIMITED and LONG_THRESHOLD.holds(version):
        raise InputError(
            f"{where}: --long-prefill-token-threshold: {threshold} is not allowed; must be <= {longest}, the "
            f"longest context (vLLM {LONG_THRESHOLD.since} and later do not start otherwise)"
        )
    for name, most, told in (
        ("max_num_active_seqs", running, "the most requests that run"),
        ("max_num_scheduled_tokens", budget, "the token budget of a step"),
    ):
        value = getattr(options, name)
        if value is not None and value > most:
            flag = "--" + name.replace("_", "-")
            raise InputError(f"{where}: {flag}: {value} is not allowed; must be <= {most}, {told}")
    for name, change in SINCE.items():
        if getattr(options, name) not in (None, False) and not change.holds(version):
            raise InputError(
                f"{where}: --{name.replace('_', '-')}: vLLM {version} has no such setting; give "
                f"--vllm-version {change.since} or later, or leave it out"
            )


def check_cadence(instance: InstanceSpec, model: ModelSpec, options: InstanceOptions, where: str) -> None:
    """Refuse an interval between prompts where it is not simulated, or does nothing.

    Raises:
        InputError: the instance goes in lock-step with others, or the version has it for those only.
    """
    if options.prefill_schedule_interval == 1:
        return
    flag = f"--prefill-schedule-interval {options.prefill_schedule_interval}"
    if instance.dp_group is not None and model.is_moe:
        raise InputError(
            f"{where}: {flag}: not simulated for data-parallel groups with experts, which count their steps "
            "together; leave it out"
        )
    if not LOCAL_CADENCE.holds(options.vllm_version):
        raise InputError(
            f"{where}: {flag}: has no effect before vLLM {LOCAL_CADENCE.since} but in data-parallel groups "
            "with experts; leave it out, or give a later --vllm-version"
        )


def check_groups(
    instance: InstanceSpec, model: ModelSpec, capacity: KvCapacity, tier: str | None, where: str
) -> None:
    """Refuse what moves KV elsewhere where layers do not all keep every token.

    Raises:
        NotSupportedError: the instance moves KV and its model has such layers.
    """
    if capacity.plan is None:
        return
    moves = []
    if instance.pd_type is not None:
        moves.append(f"pd_type '{instance.pd_type}' (KV handed over from prefill to decode instances)")
    if tier is not None:
        moves.append(f"a lower tier of the prefix cache ({tier})")
    if moves:
        raise NotSupportedError(
            f"{where}: {' and '.join(moves)} is not modelled for {model.name}, whose layers do not all keep "
            f"every token ({capacity.plan.words}); leave it out, or choose a model of full attention"
        )


def check_full_context(options: InstanceOptions, capacity: KvCapacity, where: str) -> list[str]:
    """One request of the longest context must fit the KV cache, beside vLLM's null block.

    Returns:
        A line where it does not fit at the low end of the band, which vLLM may find.

    Raises:
        InputError: it does not fit.
    """
    longest = options.max_model_len
    needed = capacity.request_blocks(longest)
    low, high = capacity.band_blocks
    if needed < capacity.num_blocks:
        if needed < low:
            return []
        fitting = _fitting(options, capacity, low)
        return [
            f"the longest context of {longest} tokens fits by the estimate, but not at the low end of the "
            f"band, where vLLM would not start; --max-model-len {fitting} fits there too"
        ]
    fitting = _fitting(options, capacity, capacity.num_blocks)
    there = capacity.usable_blocks * capacity.bytes_per_block
    holds = f"{capacity.usable_blocks} blocks"
    if capacity.plan is None:
        holds = f"{capacity.usable_blocks * capacity.block_size} tokens"
    perhaps = ""
    if needed < high:
        perhaps = f" (by the estimate; at the high end of its band it would, with num_gpu_blocks {high})"
    way_out = f"give --max-model-len {fitting} (or auto), " if fitting else ""
    raise InputError(
        f"{where}: one request of the longest context, {longest} tokens, takes "
        f"{needed * capacity.bytes_per_block / GIB:.2f} GiB of KV cache per NPU, and there are "
        f"{there / GIB:.2f} GiB ({holds}) beside {capacity.weight_bytes / GIB:.2f} "
        f"GiB of weights; vLLM does not start so{perhaps}; {way_out}raise --npu-memory-utilization or "
        "tp_size, or halve the cache with --kv-cache-dtype fp8"
    )


def _fitting(options: InstanceOptions, capacity: KvCapacity, num_blocks: int) -> int:
    """The most tokens, up to ``options.max_model_len``, of one request that the blocks hold; 0: none."""
    low, high = 0, options.max_model_len
    while low < high:
        middle = (low + high + 1) // 2
        if capacity.request_blocks(middle) < num_blocks:
            low = middle
        else:
            high = middle - 1
    return low


def _auto_line(longest: int, fitting: int, capacity: KvCapacity) -> str:
    """As vLLM prints it."""
    memory = f"available KV cache memory ({capacity.num_blocks * capacity.bytes_per_block / GIB:.2f} GiB)"
    if fitting >= longest:
        return f"Auto-fit max_model_len: full model context length {longest} fits in {memory}"
    return f"Auto-fit max_model_len: reduced from {longest} to {fitting} to fit in {memory}"


def _too_few_blocks(options: InstanceOptions, capacity: KvCapacity) -> list[str]:
    """Blocks that the user gives are taken as they are, for small caches are worth a look."""
    if capacity.request_blocks(options.max_model_len) < capacity.num_blocks:
        return []
    return [
        f"num_gpu_blocks holds {capacity.tokens} tokens, less than the longest context of "
        f"{options.max_model_len}: requests that need more are rejected; vLLM (0.33) starts only with a "
        "--max-model-len that fits"
    ]


def check_kv_format(instance: InstanceSpec, model: ModelSpec, options: InstanceOptions, where: str) -> None:
    """A GPU refuses a format of the KV cache that none of the engine's kernels takes there.

    Raises:
        InputError: so it is; the message says where the format runs.
    """
    wanted = options.kv_dtype
    if wanted != "fp8" and wanted not in KV_CACHE_SIZED:
        return
    if reason := why_not(wanted, options.kept(model).layers, load_hardware(instance.hardware)):
        raise InputError(f"{where}: kv_cache_dtype: {wanted!r} is not allowed for {model.name}: {reason}")


def check_quantised_shards(
    instance: InstanceSpec, model: ModelSpec, options: InstanceOptions, where: str
) -> None:
    """The shards of weights that were quantised in blocks must be whole blocks.

    Raises:
        InputError: one is not.
    """
    if model.weight_block is None or options.dtype != "fp8":
        return
    tp, ep = instance.tp_size, instance.ep_size
    wrong = next(_broken_shards(model, tp, ep), None)
    if wrong is None:
        return
    what, width, block = wrong
    degrees = [each for each in _divisors(tp) if each < tp and not any(_broken_shards(model, each, ep))]
    way_out = f"tp_size {' or '.join(map(str, degrees))}" if degrees else ""
    if model.is_moe and ep == 1 and not any(_broken_shards(model, tp, tp)):
        way_out += f"{' or ' if way_out else ''}ep_size {tp}"
    way_out = way_out or "another model, or --dtype bfloat16"
    raise InputError(
        f"{where}: tp_size: {tp} is not allowed; {model.name} is quantised in blocks of "
        f"{' x '.join(map(str, model.weight_block))}, and a rank's part of {what}, {width} wide, is no "
        f"multiple of {block} (vLLM does not start so); choose {way_out}"
    )


def _divisors(number: int) -> list[int]:
    return [each for each in range(1, number + 1) if number % each == 0]


def _broken_shards(model: ModelSpec, tp: int, ep: int) -> Iterator[tuple[str, int, int]]:
    """(matrix, width of a rank's part, block it should be a multiple of), for each that is not."""
    assert model.weight_block is not None
    rows, columns = model.weight_block
    # A matrix whose outputs are split, or are several side by side, is cut by rows; one whose inputs are
    # split, by columns.
    parts = []
    if model.is_moe:
        width = model.moe_intermediate_size // (1 if ep > 1 else tp)
        parts += [("the experts", width, rows), ("the experts", width, columns if tp > 1 and ep == 1 else 1)]
    if model.num_moe_layers < model.num_hidden_layers:
        width = model.intermediate_size // tp
        parts += [("the MLP", width, rows), ("the MLP", width, columns if tp > 1 else 1)]
    if not model.is_mla:
        queries = model.num_attention_heads // tp * model.head_dim
        keys = max(model.num_key_value_heads // tp, 1) * model.head_dim
        parts += [("the queries", queries, rows), ("the keys", keys, rows)]
        parts.append(("the attention output", queries, columns if tp > 1 else 1))
    yield from (part for part in parts if part[1] % part[2])
