"""Attention over KV formats that the public tables do not hold, from the kernels of formats that they do.

Tables hold 16 bit and fp8. Fewer bits read fewer bytes: what the fp8 kernel takes more as the context grows
is taken in proportion. Unpacking may cost what the bytes save, up to the 16-bit kernel and beyond, which
nobody published: figures so derived have a wide band. Before Ada no hardware converts fp8; whole steps
measured on A100 show that reading half the bytes is used up by converting them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from servesim.profiler.silicon.decode_grid import AttentionKernels

SHORT = 16
"""Tokens of KV whose bytes do not show in a kernel's time."""
BEFORE_ADA_DECODE, BEFORE_ADA_PREFILL = 0.997, 1.034
"""Time of decode and prefill steps with an fp8 cache over those with a 16-bit one, measured on A100."""
ADA = 8.9
"""Compute capability from which on fp8 is converted by the hardware."""


@dataclass(frozen=True, slots=True)
class ScaledTimes:
    """Kernels of one KV format standing for another of ``ratio`` times the bytes."""

    near: AttentionKernels
    ratio: float
    kv_format: str
    near_format: str

    @property
    def version(self) -> str:
        return self.near.version

    @property
    def decode_kernels(self) -> list[str]:
        return self.near.decode_kernels

    @property
    def prefill_kernels(self) -> list[str]:
        return self.near.prefill_kernels

    @property
    def longest_decode(self) -> int:
        return self.near.longest_decode

    @property
    def longest_prompt(self) -> int:
        return self.near.longest_prompt

    @property
    def notes(self) -> list[str]:
        told = (
            f"{self.kv_format} KV derived from the {self.near_format} kernel and {self.ratio:.3g} x its bytes"
        )
        return [*self.near.notes, told]

    def decode_us(self, sequences: int, kv: int) -> float:
        """What grows with the context, in proportion to the bytes."""
        us = self.near.decode_us(sequences, kv)
        growing = max(us - self.near.decode_us(sequences, min(kv, SHORT)), 0.0)
        return us - growing * (1.0 - self.ratio)

    def prefill_us(self, chunk: int, history: int) -> float:
        """As the other format: a prompt is bound by arithmetic, in 16 bit in both."""
        return self.near.prefill_us(chunk, history)

    def mixed_us(self, chunk: int, history: int, sequences: int, kv: int) -> float:
        if sequences == 0:
            return self.prefill_us(chunk, history)
        saved = self.near.decode_us(sequences, kv) - self.decode_us(sequences, kv)
        return max(self.near.mixed_us(chunk, history, sequences, kv) - saved, self.decode_us(sequences, kv))


@dataclass(frozen=True, slots=True)
class ConvertedTimes:
    """fp8 KV on a GPU whose kernels convert it themselves: 16-bit kernels, and what whole steps showed."""

    wide: AttentionKernels
    block_us: Callable[[int], float]
    """What the other layers of a block take for so many tokens."""

    @property
    def version(self) -> str:
        return self.wide.version

    @property
    def decode_kernels(self) -> list[str]:
        return self.wide.decode_kernels

    @property
    def prefill_kernels(self) -> list[str]:
        return self.wide.prefill_kernels

    @property
    def longest_decode(self) -> int:
        return self.wide.longest_decode

    @property
    def longest_prompt(self) -> int:
        return self.wide.longest_prompt

    @property
    def notes(self) -> list[str]:
        told = (
            f"fp8 KV: 16-bit kernels, decode steps {BEFORE_ADA_DECODE:g} x and prefill steps "
            f"{BEFORE_ADA_PREFILL:g} x as long, as measured on A100"
        )
        return [*self.wide.notes, told]

    def decode_us(self, sequences: int, kv: int) -> float:
        us = self.wide.decode_us(sequences, kv)
        return max(us - (1 - BEFORE_ADA_DECODE) * (us + self.block_us(sequences)), 0.5 * us)

    def prefill_us(self, chunk: int, history: int) -> float:
        us = self.wide.prefill_us(chunk, history)
        return us + (BEFORE_ADA_PREFILL - 1) * (us + self.block_us(chunk))

    def mixed_us(self, chunk: int, history: int, sequences: int, kv: int) -> float:
        if sequences == 0:
            return self.prefill_us(chunk, history)
        if chunk == 0:
            return self.decode_us(sequences, kv)
        more = self.prefill_us(chunk, history) - self.wide.prefill_us(chunk, history)
        return self.wide.mixed_us(chunk, history, sequences, kv) + more
