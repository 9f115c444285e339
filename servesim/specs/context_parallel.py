"""Decode context parallelism: which ranks may share KV by tokens, as in vLLM, and what is simulated of it.

The ranks of tensor parallelism that would keep the same KV (of one head, or of latent attention) keep every
``size``-th token of it each. The number of NPUs stays (``ModelConfig.verify_with_parallel_config`` and
``ParallelConfig`` of vLLM 0.24 to 0.33).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from servesim.errors import InputError, NotSupportedError
from servesim.specs.block_layers import attention_groups
from servesim.specs.dtypes import resolve_kv_dtype
from servesim.specs.layers import Attention, LatentAttention

if TYPE_CHECKING:
    from collections.abc import Mapping

    from servesim.specs.cluster import InstanceSpec
    from servesim.specs.model import ModelSpec

OPTION = "--decode-context-parallel-size"


def allowed_sizes(attention: Attention | LatentAttention, tp: int) -> list[int]:
    """How many of ``tp`` ranks may share KV, 1 among them.

    Divisors of ``tp``. With KV heads: at most the ranks that each of them has (``tp // kv_heads``), and a
    divisor of its query heads; no more than 1 unless ranks outnumber the KV heads.
    """
    sizes = [size for size in range(1, tp + 1) if tp % size == 0]
    if isinstance(attention, LatentAttention):
        return sizes
    if tp <= attention.kv_heads:
        return [1]
    queries = attention.heads // attention.kv_heads
    return [size for size in sizes if size <= tp // attention.kv_heads and queries % size == 0]


def shared_attention(model: ModelSpec) -> Attention | LatentAttention:
    """The attention that all layers have, whose KV ranks can share.

    Raises:
        NotSupportedError: layers have something else, or differ.
    """
    groups = attention_groups(model.layers)
    first = groups[0].attention if groups else None
    if len(groups) == 1 and isinstance(first, Attention) and first.kind == "full" and not first.index_dim:
        return first
    if len(groups) == 1 and isinstance(first, LatentAttention) and first.kind == "mla":
        return first
    kinds = ", ".join(dict.fromkeys(group.attention.kind.replace("_", " ") for group in groups)) or "none"
    raise NotSupportedError(
        f"{OPTION}: not simulated for {model.name}, whose attention is {kinds}; it is for attention of one "
        "kind in all layers, full or latent (mla); vLLM shares no KV of windows and chunks either; leave it "
        "out, or choose such a model"
    )


_FLASHINFER_FIRST = 10
"""Major compute capability on which vLLM takes FlashInfer where no attention backend is asked for."""


def new_tokens_apart(compute_capability: str | None) -> bool:
    """Whether a decode's new token has a kernel of its own beside the shared KV: FlashAttention attends to
    new tokens apart from the cache; FlashInfer, for decodes, writes them there first."""
    return compute_capability is None or int(float(compute_capability)) != _FLASHINFER_FIRST


def check_context_parallel(
    instance: InstanceSpec, model: ModelSpec, chosen: dict[str, Any], dtype: str, beside: Mapping[str, bool]
) -> None:
    """Refuse sizes that vLLM refuses, and what is not simulated beside one above 1.

    Args:
        instance: whose ranks share KV.
        model: what it runs.
        chosen: its options.
        dtype: of its weights.
        beside: what moves or drafts KV, in words, and whether the instance has it.

    Raises:
        InputError: the size is not allowed (NotSupportedError among them: not simulated here).
    """
    size, tp = chosen["decode_context_parallel_size"], instance.tp_size
    if size == 1:
        return
    attention = shared_attention(model)
    allowed = allowed_sizes(attention, tp)
    if size not in allowed:
        words = " or ".join([", ".join(map(str, allowed[:-1])), str(allowed[-1])] if allowed[1:] else ["1"])
        why = f"a divisor of tp_size {tp}"
        if isinstance(attention, Attention):
            queries = attention.heads // attention.kv_heads
            why += (
                f" and of the {queries} query heads of a KV head, no more than the ranks that keep the same "
                f"one of {attention.kv_heads} KV heads"
            )
        raise InputError(
            f"{OPTION}: {size} is not allowed for {model.name}; must be {words}: {why} (vLLM does not start "
            "otherwise); raise tp_size, or choose one of these"
        )
    kv_dtype = resolve_kv_dtype(dtype, chosen["kv_cache_dtype"])
    others = f"a KV cache in {kv_dtype}, whose kernels differ in what they exchange"
    for name, there in {others: kv_dtype not in ("bfloat16", "float16"), **beside}.items():
        if there:
            raise NotSupportedError(f"{OPTION}: not simulated with {name}; leave one out")
