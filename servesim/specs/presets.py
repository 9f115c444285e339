"""Limits that a server takes by default, by its version and its hardware.

They are vLLM's own (``EngineArgs.get_batch_defaults`` and ``CacheConfig``, read in versions 0.24 to 0.33).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from servesim.errors import InputError
from servesim.slotted import dataclass
from servesim.specs.vllm_versions import LARGE_GPU_BATCHES, VllmVersion

if TYPE_CHECKING:
    from collections.abc import Mapping

    from servesim.specs.hardware import HardwareSpec

Preset = Literal["vllm-serve"]

LIMITS = ("max_num_seqs", "max_num_batched_tokens", "npu_memory_utilization")
"""Options that a preset decides by the hardware, where nobody states them."""
_UTILIZATION = 0.92
_LARGE_GIB, _HUGE_GIB = 70, 160


@dataclass(frozen=True, slots=True)
class _Tier:
    """What ``vllm serve`` takes on GPUs of a size."""

    max_num_seqs: int
    max_num_batched_tokens: int


def _tier(hardware: HardwareSpec, memory_gib: float, version: VllmVersion) -> _Tier:
    name = f"{hardware.name} {hardware.gpu or ''}".lower()
    if "tpu" in name:
        raise InputError(
            f"--preset vllm-serve: is not allowed on {hardware.name}; vLLM's defaults of TPUs are not known "
            "here; give --max-num-seqs, --max-num-batched-tokens and --npu-memory-utilization instead"
        )
    if memory_gib >= _HUGE_GIB and LARGE_GPU_BATCHES.holds(version):
        return _Tier(1024, 16384)
    if memory_gib >= _LARGE_GIB and "a100" not in name:
        return _Tier(1024, 8192)
    return _Tier(256, 2048)


def serve_defaults(
    hardware: HardwareSpec,
    memory_gib: float,
    version: VllmVersion,
    longest: int,
    stated: Mapping[str, Any],
) -> dict[str, Any]:
    """Options that ``vllm serve`` fills in where they are not ``stated``.

    Args:
        hardware: what an instance runs on.
        memory_gib: of one of its NPUs.
        version: of vLLM.
        longest: context in tokens.
        stated: options that somebody gave, which win.

    Raises:
        InputError: vLLM's defaults on this hardware are not known.
    """
    tier = _tier(hardware, memory_gib, version)
    seqs = stated.get("max_num_seqs") or tier.max_num_seqs
    tokens = stated.get("max_num_batched_tokens")
    if tokens is None:
        tokens = tier.max_num_batched_tokens
        if stated.get("enable_chunked_prefill") is False:
            tokens = max(tokens, longest)
        tokens = min(tokens, seqs * longest)
    defaults = {
        "max_num_seqs": min(tier.max_num_seqs, tokens or longest),
        "max_num_batched_tokens": tokens,
        "npu_memory_utilization": _UTILIZATION,
    }
    return {name: value for name, value in defaults.items() if name not in stated}
