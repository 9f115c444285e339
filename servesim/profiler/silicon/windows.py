"""Attention over a window of recent tokens, from rows measured with the window or from those without.

Rows of some windows (128 tokens at head sizes 64, 128 and 192, 1,024 at 256, 8,192 at 128) are in the public
tables. Of others a decode takes what one over the window's tokens takes without a window, and a prompt's time
is scaled by the pairs of tokens that attend to each other.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from servesim.profiler.silicon.attention import TILE_ROWS, AttentionShape, attention_times
from servesim.profiler.silicon.decode_grid import DecodeGrid, Prompts
from servesim.profiler.silicon.head_shapes import rows_for
from servesim.profiler.silicon.tables import read_table

if TYPE_CHECKING:
    from servesim.profiler.silicon.attention import AttentionTimes
    from servesim.profiler.silicon.tables import Gpu, KernelTable


def pairs(chunk: int, history: int, window: int) -> float:
    """Query-key pairs of a chunk behind ``history`` tokens, every token attending to the last ``window``."""
    growing = min(max(window - history, 0), chunk)
    return growing * history + growing * (growing + 1) / 2 + (chunk - growing) * float(window)


@dataclass(slots=True)
class WindowTimes:
    """One layer's attention over a window on one rank."""

    full: AttentionTimes
    """Of the same heads without a window."""
    window: int
    generation: KernelTable | None
    """Rows measured with this window; None: there are none."""
    context: KernelTable | None
    derived_heads: str = ""
    _decodes: DecodeGrid | None = field(init=False, default=None)
    _prompts: Prompts | None = field(init=False, default=None)
    _pair_us: float = field(init=False, default=0.0)

    def __post_init__(self) -> None:
        if self.generation is None or self.context is None:
            return
        rows = self.generation
        lengths = rows.integers("step") + 1
        self._decodes = DecodeGrid.of_rows(rows.integers("batch_size"), lengths, rows.latency_us, flat=True)
        alone = self.context.where(batch_size=1)
        self._prompts = prompts = Prompts.of_rows(alone.integers("isl"), alone.latency_us)
        (first, last), (least, most) = prompts.tokens[-2:], prompts.us[-2:]
        more = pairs(int(last), 0, self.window) - pairs(int(first), 0, self.window)
        self._pair_us = max(float(most - least) / more, 0.0)

    @property
    def version(self) -> str:
        return self.full.version

    @property
    def decode_kernels(self) -> list[str]:
        return (
            self.full.decode_kernels if self.generation is None else self.generation.values("kernel_source")
        )

    @property
    def prefill_kernels(self) -> list[str]:
        return self.full.prefill_kernels if self.context is None else self.context.values("kernel_source")

    @property
    def longest_decode(self) -> int:
        return 1 << 30  # a window that is full takes no longer

    @property
    def longest_prompt(self) -> int:
        return self.full.longest_prompt

    @property
    def notes(self) -> list[str]:
        if self.generation is None:
            return [f"window of {self.window} tokens derived from times without one"]
        return [self.derived_heads] if self.derived_heads else []

    def decode_us(self, sequences: int, kv: int) -> float:
        """``sequences`` decodes that read no more than the window; never less than their bytes take."""
        seen = min(kv + 1, self.window)
        if self._decodes is None:
            return self.full.decode_us(sequences, max(seen - 1, 1))
        streamed = self.full.shape.kv_bytes(sequences, seen) / self.full.bandwidth_bytes_s * 1e6
        start = self._decodes.at(min(sequences, int(self._decodes.sizes[-1])), 2)
        return max(self._decodes.at(sequences, kv + 1), min(start, self.full.base_us) + streamed)

    def prefill_us(self, chunk: int, history: int) -> float:
        """A chunk with as much of its history as the window reaches."""
        if self._prompts is not None:
            more = pairs(chunk, history, self.window) - pairs(chunk, 0, self.window)
            return self._prompts.at(chunk, squared=0.0) + self._pair_us * more
        seen = min(history, self.window)
        whole, base = self.full.prefill_us(chunk, seen), self.full.base_us
        # a tile of rows attends to what the window of its first and last row reach together
        attended = pairs(chunk, history, min(self.window + TILE_ROWS, chunk + history))
        return base + max(whole - base, 0.0) * min(1.0, attended / pairs(chunk, seen, chunk + seen))

    def mixed_us(self, chunk: int, history: int, sequences: int, kv: int) -> float:
        if sequences == 0:
            return self.prefill_us(chunk, history)
        if chunk == 0:
            return self.decode_us(sequences, kv)
        both = self.prefill_us(chunk, history) + self.decode_us(sequences, kv)
        one_launch = self.full.single_launch or self.full.shared_launch
        return both - min(self.full.base_us, self.decode_us(1, 1)) if one_launch else both


def window_times(gpu: Gpu, shape: AttentionShape, window: int) -> WindowTimes:
    """Times of ``shape`` over a window.

    Raises:
        InputError: the shape is neither measured nor derived without a window.
    """
    full = attention_times(gpu, shape)
    own = replace(shape, window=window)
    tables = [
        read_table(gpu.folder, "attention", name, like={"head_dim": shape.head_dim, "window_size": window})
        for name in ("generation_attention_perf", "context_attention_perf")
    ]
    decodes, how = rows_for(tables[0], own, ("batch_size", "step"))
    prompts, how_prompts = rows_for(tables[1], own, ("batch_size", "isl"))
    if len(decodes) and len(prompts.where(batch_size=1)) > 1:
        return WindowTimes(full, window, decodes, prompts, how or how_prompts)
    return WindowTimes(full, window, None, None)
