"""What to profile: a model on a hardware in one dtype combination, and the engine limits it should cover."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from servesim.specs.dtypes import resolve_kv_dtype, variant_name

if TYPE_CHECKING:
    from servesim.specs.architecture import Architecture
    from servesim.specs.hardware import HardwareSpec
    from servesim.specs.model import ModelSpec


@dataclass(frozen=True, slots=True)
class ProfileJob:
    """One bundle to make."""

    model: ModelSpec
    architecture: Architecture
    hardware: HardwareSpec
    dtype: str = "bfloat16"
    kv_cache_dtype: str = "auto"
    tp_degrees: tuple[int, ...] = (1,)
    max_num_batched_tokens: int = 2048
    max_num_seqs: int = 256
    max_kv: int = 131072
    collectives: str = "auto"
    """Whether comm.csv is made: none, measured, or auto, which leaves it to the source."""
    fp8_scaling: str = "tensor"
    """Scales of fp8 weights: one per ``tensor`` (or channel), or one per ``block`` of 128 x 128."""
    expert_load: str = "balanced"
    """How evenly the gate spreads tokens: balanced, power_law_1.01 or power_law_1.2."""

    @property
    def variant(self) -> str:
        """Folder name of the dtype combination."""
        return variant_name(self.dtype, self.kv_cache_dtype)

    @property
    def kv_dtype(self) -> str:
        """What the KV cache is stored in."""
        return resolve_kv_dtype(self.dtype, self.kv_cache_dtype)
