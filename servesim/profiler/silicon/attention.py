"""Attention times from the measured context (prefill) and generation (decode) tables.

The tables know prefills without history and decodes of equal length, on buffers that are replayed. What they
lack is derived here from how the kernels work:

- a decode that fits L2 was measured on a warm cache; a served model never has one, so its KV bytes are
  charged at the bandwidth that DRAM-resident rows of the same table show;
- history lengthens every tile of a chunk by the same amount, which the slope of long prefills gives;
- a mixed batch is one launch under FlashAttention-2 (no split-KV, no packing of grouped heads: its thread
  blocks are list-scheduled on the SMs), one launch that does the work of both under FlashAttention-3, and two
  launches under FlashInfer and the others.
"""

from __future__ import annotations

import math
from dataclasses import field
from typing import TYPE_CHECKING

import numpy as np

from servesim.errors import InputError
from servesim.profiler.silicon.head_shapes import measured_heads, rows_for
from servesim.profiler.silicon.list_schedule import repeated_makespan_us
from servesim.profiler.silicon.tables import read_table
from servesim.slotted import dataclass

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from servesim.profiler.silicon.tables import Gpu, KernelTable

TILE_ROWS = 64
"""Query rows of one FlashAttention-2 thread block at head sizes up to 128."""
HIDDEN_WAVES = 5
"""Waves of decode blocks whose starts show beside the stream of KV; fitted."""
RETAINED = 0.27
"""Share of L2 that survives from one replay of a measurement to the next; fitted."""
EMPTY_BLOCK_US = 0.34
"""SM time of a thread block that finds its sequence has no rows for it."""
STREAM_SHARE = 0.85
"""Share of the nominal bandwidth that decodes reach where no row of the shape was read from DRAM."""
WARM_BYTES = 4.0
"""Rows whose KV is at least this many times L2 are certainly read from DRAM."""


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """One rank's attention: heads, KV heads, head size and the dtype of its KV cache (bfloat16 or fp8)."""

    heads: int
    kv_heads: int
    head_dim: int
    kv_dtype: str
    window: int = 0
    """Tokens that a row of the tables has to be measured with; 0: the whole context."""

    def kv_bytes(self, sequences: float, tokens: float) -> float:
        """KV bytes one layer reads for ``sequences`` of ``tokens`` each."""
        element = 1 if self.kv_dtype == "fp8" else 2
        return sequences * tokens * self.kv_heads * self.head_dim * 2.0 * element

    def select(self, table: KernelTable) -> KernelTable:
        """The rows measured with exactly this shape."""
        return self.select_any_heads(table).where(num_heads=self.heads, num_key_value_heads=self.kv_heads)

    def select_any_heads(self, table: KernelTable) -> KernelTable:
        """The rows of this head size and KV dtype."""
        return table.where(head_dim=self.head_dim, window_size=self.window, kv_cache_dtype=self.kv_dtype)


@dataclass(slots=True)
class AttentionTimes:
    """Times of one layer's attention on one rank, in us, for any mix of one chunk and equal decodes."""

    gpu: Gpu
    shape: AttentionShape
    generation: KernelTable
    """Rows of this shape alone, as those of ``context``."""
    context: KernelTable
    derived_heads: str = ""
    """How the rows came from those of other head counts; empty when they were measured."""
    decode_kernels: list[str] = field(init=False)
    prefill_kernels: list[str] = field(init=False)
    bandwidth_bytes_s: float = field(init=False)
    base_us: float = field(init=False)
    tile_token_us: float = field(init=False)
    tile_start_us: float = field(init=False)
    pair_us: float = field(init=False)
    _sizes: NDArray[np.int64] = field(init=False)
    _lengths: NDArray[np.int64] = field(init=False)
    _grid: NDArray[np.float64] = field(init=False)
    _prompts: NDArray[np.float64] = field(init=False)
    _prompt_us: NDArray[np.float64] = field(init=False)
    _reaches: dict[int, int] = field(init=False)
    _decode_cache: dict[tuple[int, int], float] = field(init=False)

    def __post_init__(self) -> None:
        self._reaches = {}
        self._decode_cache = {}
        self._read_generation(self.generation)
        self._read_context(self.context)

    # ---------------------------------------------------------------- what the tables say

    def _read_generation(self, rows: KernelTable) -> None:
        sizes, lengths = rows.integers("batch_size"), rows.integers("step") + 1
        self.decode_kernels = rows.values("kernel_source")
        self._sizes, self._lengths = np.unique(sizes), np.unique(lengths)
        self._grid = np.full((len(self._sizes), len(self._lengths)), np.nan)
        at = np.searchsorted(self._sizes, sizes), np.searchsorted(self._lengths, lengths)
        self._grid[at] = rows.latency_us
        kv_bytes = self.shape.kv_bytes(1, 1) * np.outer(self._sizes, self._lengths)
        known = np.isfinite(self._grid) & np.isfinite(self._grid[:, [0]])
        streaming = known & (kv_bytes >= WARM_BYTES * self.gpu.l2_bytes)
        if not streaming.any():
            self.bandwidth_bytes_s = STREAM_SHARE * self.gpu.bandwidth_bytes_s
            return
        beyond_start = self._grid - self._grid[:, [0]]
        self.bandwidth_bytes_s = float(np.median(kv_bytes[streaming] / beyond_start[streaming]) * 1e6)

    def _read_context(self, rows: KernelTable) -> None:
        batch, prompt, time = rows.integers("batch_size"), rows.integers("isl"), rows.latency_us
        self.prefill_kernels = rows.values("kernel_source")
        alone = (batch == 1) & (prompt >= 16)
        order = np.lexsort((time[alone], prompt[alone]))
        prompts, first = np.unique(prompt[alone][order], return_index=True)
        self._prompts = prompts.astype(np.float64)
        self._prompt_us = time[alone][order][first]  # the quickest of those measured twice
        self.base_us = float(self._prompt_us[self._prompts <= TILE_ROWS].min())
        self._fit_blocks(batch, prompt, time)
        last, previous = self._prompts[-1], self._prompts[-2]
        slope = self._prompt_us[-1] - self._prompt_us[-2]
        self.pair_us = float(slope / ((last**2 - previous**2) / 2))

    def _fit_blocks(
        self, batch: NDArray[np.int64], prompt: NDArray[np.int64], time: NDArray[np.float64]
    ) -> None:
        """Split a thread block's time in a start and a time per KV token.

        Short prompts in large batches are nearly all starts, long prompts nearly all tokens; each is
        corrected for the other in turn, which settles at once because the corrections are small.
        """
        sms, heads = self.gpu.sm_count, self.shape.heads
        long = self._prompts >= 4096
        tiles = np.ceil(self._prompts[long] / TILE_ROWS)
        tokens = np.array([_tile_tokens(int(p)) for p in self._prompts[long]], dtype=np.float64)
        long_us = (self._prompt_us[long] - self.base_us) * sms / heads
        rounds = batch * heads / sms  # blocks an SM runs one after the other; ``base_us`` holds the first
        short = (batch >= 32) & ((prompt == 16) | (prompt == 32)) & (rounds > 1.5)
        short_us = (time[short] - self.base_us) / (rounds[short] - 1)
        self.tile_start_us = 0.0
        for _ in range(8):
            self.tile_token_us = float(np.median((long_us - tiles * self.tile_start_us) / tokens))
            if short.any():
                self.tile_start_us = float(np.median(short_us - self.tile_token_us * prompt[short]))

    @property
    def version(self) -> str:
        """Of vLLM."""
        return self.generation.version

    @property
    def notes(self) -> list[str]:
        """What is not as measured."""
        return [self.derived_heads] if self.derived_heads else []

    def measured_lengths(self, sequences: int) -> list[int]:
        """KV lengths that were measured with ``sequences`` decodes."""
        row = self._grid[int(np.searchsorted(self._sizes, sequences))]
        return [int(length) for length, time in zip(self._lengths, row, strict=True) if np.isfinite(time)]

    @property
    def longest_decode(self) -> int:
        """Tokens of KV of the longest decodes measured, whatever their number."""
        return int(self._lengths[-1])

    @property
    def longest_prompt(self) -> int:
        """Tokens of the longest prompt measured."""
        return int(self._prompts[-1])

    @property
    def single_launch(self) -> bool:
        """Whether prefill and decodes of a mixed batch share one FlashAttention-2 launch.

        Older tables do not tell the versions of FlashAttention apart; they are of GPUs that version 3 does
        not run on.
        """
        return any("flash_attn" in kernel and "fa3" not in kernel for kernel in self.decode_kernels)

    @property
    def shared_launch(self) -> bool:
        """Whether they share one FlashAttention-3 launch, which splits KV and packs heads for decodes too."""
        return any("fa3" in kernel for kernel in self.decode_kernels)

    # ---------------------------------------------------------------- decodes

    def _at_size(self, column: int, size: int) -> float:
        times = self._grid[:, column]
        known = np.isfinite(times)
        sizes = self._sizes[known]
        if size > sizes[-1]:
            return float(times[known][-1] * size / sizes[-1])
        return float(np.exp(np.interp(np.log(size), np.log(sizes), np.log(times[known]))))

    def measured_us(self, size: int, length: int) -> float:
        """The table's own time, log-log bilinear; beyond the longest decodes of this many, see
        :meth:`_token_us`."""
        reach = self._reach(size)
        if length > self._lengths[reach]:
            beyond = length - int(self._lengths[reach])
            return self._at_size(reach, size) + self._token_us(size, reach) * beyond
        above = max(int(np.searchsorted(self._lengths, length)), 1)
        low, high = float(self._lengths[above - 1]), float(self._lengths[above])
        weight = math.log(length / low) / math.log(high / low)
        return float(self._at_size(above - 1, size) ** (1 - weight) * self._at_size(above, size) ** weight)

    def _reach(self, size: int) -> int:
        """The column of the longest decodes that so many were measured with, at least the first.

        Large batches were measured over short lengths alone.
        """
        if size not in self._reaches:
            known = [self._sizes[np.isfinite(column)][-1] >= size for column in self._grid.T]
            self._reaches[size] = max((at for at, there in enumerate(known) if there), default=0)
        return self._reaches[size]

    def _token_us(self, size: int, reach: int) -> float:
        """What ``size`` decodes take longer for every token beyond column ``reach``: bytes at a rate.

        The rate is that of the same decodes where their KV comes from DRAM, by least squares; of too few such
        lengths the table's, and never more than the nominal one. The longest decodes of ten GPUs follow from
        those up to half as long within 3.5 % (P80) where time in proportion to the length is 7 % too long in
        the median, and time in proportion to the batch 4 % (benchmarks/long_contexts.py).
        """
        token_bytes = self.shape.kv_bytes(size, 1)
        lengths = self._lengths[: reach + 1]
        far = np.flatnonzero(lengths * token_bytes >= WARM_BYTES * self.gpu.l2_bytes)
        rate_us = token_bytes / self.bandwidth_bytes_s * 1e6
        if len(far) > 1:
            times = np.array([self._at_size(int(column), size) for column in far])
            x = lengths[far] - lengths[far].mean()
            rate_us = float((x * times).sum() / (x * x).sum())
        return max(rate_us, token_bytes / self.gpu.bandwidth_bytes_s * 1e6)

    def decode_us(self, sequences: int, kv: int) -> float:
        """``sequences`` decodes with ``kv`` tokens in cache each (the new token makes it kv + 1)."""
        key = (sequences, kv)
        if key not in self._decode_cache:
            cold = self._cold_decode_us(sequences, kv + 1)
            measured = self.measured_us(sequences, kv + 1)
            self._decode_cache[key] = max(measured, cold) + self._retained_us(sequences, kv + 1)
        return self._decode_cache[key]

    def _retained_us(self, sequences: int, length: int) -> float:
        """Reading what a replayed measurement still found in L2, however much it read.

        A share of L2 once blocks keep all SMs busy and the KV has outgrown it; fitted to layerwise
        measurements of decodes on one GPU, where it is 10 % of the time at twice L2 and 1 % at thirty times.
        """
        outgrown = self.shape.kv_bytes(sequences, length) / self.gpu.l2_bytes - 0.6
        waves = sequences * self.shape.kv_heads / self.gpu.sm_count
        retained = RETAINED * self.gpu.l2_bytes * (1.0 - math.exp(-waves))
        return min(1.0, max(0.0, outgrown)) * retained / self.bandwidth_bytes_s * 1e6

    def _cold_decode_us(self, sequences: int, length: int) -> float:
        """The decodes with none of their KV in L2.

        Work on the chip (measured where KV fits half of L2, proportional beyond) and the stream from DRAM
        overlap imperfectly, ``hypot(chip, stream)``, until the stream is all that counts at four times L2.
        """
        first = min(sequences, HIDDEN_WAVES * self.gpu.sm_count // self.shape.kv_heads)
        start = self.measured_us(first, 2)  # later waves start while earlier ones stream
        kv_bytes = self.shape.kv_bytes(sequences, length)
        streamed = kv_bytes / self.bandwidth_bytes_s * 1e6
        warm_length = int(length * min(1.0, 0.5 * self.gpu.l2_bytes / kv_bytes))
        if warm_length < 2:
            return start + streamed
        on_chip = max(0.0, self.measured_us(sequences, warm_length) - start) * length / warm_length
        far = math.log(kv_bytes / self.gpu.l2_bytes) / math.log(WARM_BYTES)
        overlapped = math.hypot(on_chip, streamed) - streamed
        return start + streamed + overlapped * min(1.0, max(0.0, 1.0 - far))

    # ---------------------------------------------------------------- prefill

    def prompt_us(self, chunk: int) -> float:
        """A chunk without history: the table, linear between prompts and quadratic beyond the longest."""
        if chunk > self._prompts[-1]:
            return float(self._prompt_us[-1] * (chunk / self._prompts[-1]) ** 2)
        return float(np.interp(chunk, self._prompts, self._prompt_us))

    def prefill_us(self, chunk: int, history: int) -> float:
        """A chunk whose tokens also attend to ``history`` tokens before it."""
        shape = self.shape
        if self.single_launch:
            blocks = math.ceil(chunk / TILE_ROWS) * shape.heads
            return (
                self.prompt_us(chunk) + math.ceil(blocks / self.gpu.sm_count) * self.tile_token_us * history
            )
        group = shape.heads // shape.kv_heads
        packed_rows = math.ceil(chunk * group / 128) * 128 / group
        computed = self.prompt_us(chunk) + self.pair_us * packed_rows * history
        streamed = self.base_us + shape.kv_bytes(1, chunk + history) / self.bandwidth_bytes_s * 1e6
        single = self.decode_us(1, history) if history else 0.0  # a chunk takes no less than its first token
        return max(computed, streamed, single)

    def history_error(self, chunk: int = 2048, prompt: int = 16384) -> float:
        """How much longer (0.1 = 10 %) a measured prompt takes in chunks with history than in one piece.

        A few per cent are the launches; the rest is the error of the history rule on full chunks.
        """
        pieces = sum(self.prefill_us(chunk, history) for history in range(0, prompt, chunk))
        return (pieces - self.base_us * (prompt // chunk - 1)) / self.prompt_us(prompt) - 1.0

    # ---------------------------------------------------------------- both at once

    def mixed_us(self, chunk: int, history: int, sequences: int, kv: int) -> float:
        """One chunk with its history and ``sequences`` decodes of ``kv`` cached tokens in the same step."""
        if sequences == 0:
            return self.prefill_us(chunk, history)
        if chunk == 0:
            return self.decode_us(sequences, kv)
        if not self.single_launch:
            both = self.prefill_us(chunk, history) + self.decode_us(sequences, kv)
            return both - min(self.base_us, self.decode_us(1, 1)) if self.shared_launch else both
        first_block_us = min(self.base_us, self.tile_start_us)  # already in the base
        joint = self.base_us - first_block_us + self._joint_launch_us(chunk, history, sequences, kv)
        return max(joint, self.prefill_us(chunk, history))

    def _joint_launch_us(self, chunk: int, history: int, sequences: int, kv: int) -> float:
        """Thread blocks head by head: the chunk's tiles, longest first, then one per decode."""
        shape, tiles = self.shape, math.ceil(chunk / TILE_ROWS)
        ends = [min((tile + 1) * TILE_ROWS, chunk) for tile in reversed(range(tiles))]
        attended = [history + end for end in ends] + [kv + 1] * sequences
        blocks = [self.tile_start_us + self.tile_token_us * tokens for tokens in attended]
        busy = repeated_makespan_us(blocks, shape.heads, self.gpu.sm_count)
        empty = shape.heads * sequences * (tiles - 1) * EMPTY_BLOCK_US / self.gpu.sm_count
        streamed = shape.kv_bytes(sequences, kv + 1) / self.bandwidth_bytes_s * 1e6
        outgrown = self._outgrown(sequences, kv)
        # The first of the heads that share KV waits for DRAM; half of it hides behind blocks of the next.
        waiting = 0.5 * max(0.0, streamed - shape.kv_heads * blocks[-1]) * (1.0 - outgrown)
        group = shape.heads // shape.kv_heads
        rereads = 1.0 + (group - 1) * min(1.0, sequences / self.gpu.sm_count) * outgrown
        # a smooth maximum: arithmetic and stream overlap, but not perfectly
        return float(((busy + empty + waiting) ** 4 + (rereads * streamed) ** 4) ** 0.25)

    def _outgrown(self, sequences: int, kv: int) -> float:
        """How far the KV in flight has outgrown L2, from 0 (the heads that share it find it there) to 1.

        Decodes of consecutive heads are ``sequences`` blocks apart, so that this share of an SM's worth of
        blocks runs in different waves and reads the same KV again. In flight is the geometric mean of one KV
        head of all decodes and of one decode per SM. The bounds were fitted to layerwise measurements.
        """
        token_bytes = self.shape.kv_bytes(1, kv + 1) / self.shape.kv_heads
        in_flight = math.sqrt(sequences * self.gpu.sm_count) * token_bytes / self.gpu.l2_bytes
        return min(1.0, max(0.0, (in_flight - 0.6) / (1.7 - 0.6)))


def _tile_tokens(prompt: int) -> int:
    """Tokens that the tiles of a prompt attend to, summed over its tiles."""
    return sum(min((tile + 1) * TILE_ROWS, prompt) for tile in range(math.ceil(prompt / TILE_ROWS)))


def attention_times(gpu: Gpu, shape: AttentionShape) -> AttentionTimes:
    """Times for ``shape`` on ``gpu``, derived from those of other head counts where it was not measured.

    Raises:
        InputError: no measured shapes lead to this one, or the GPU was not measured with such a KV cache.
    """
    wanted = {"head_dim": shape.head_dim, "kv_cache_dtype": shape.kv_dtype}
    generation = read_table(gpu.folder, "attention", "generation_attention_perf", like=wanted)
    context = read_table(gpu.folder, "attention", "context_attention_perf", like=wanted)
    measured_dtypes = generation.values("kv_cache_dtype")
    if shape.kv_dtype not in measured_dtypes:
        raise InputError(
            f"{shape.kv_dtype} KV cache: was not measured on {gpu.folder} (vLLM {generation.version} has no "
            f"attention kernel for it there); measured: {', '.join(measured_dtypes)}. Use --kv-cache-dtype "
            "auto, or --source roofline"
        )
    decodes, how = rows_for(generation, shape, ("batch_size", "step"))
    prompts, how_prompts = rows_for(context, shape, ("batch_size", "isl"))
    if not len(decodes) or not len(prompts):
        known = measured_heads(shape.select_any_heads(generation))
        listed = ", ".join(f"{heads}/{kv_heads}" for heads, kv_heads in known) or "none of this head size"
        raise InputError(
            f"attention with {shape.heads} heads, {shape.kv_heads} KV heads of size {shape.head_dim} and "
            f"{shape.kv_dtype} KV was not measured on {gpu.folder}, nor can it be derived from what was; "
            f"measured heads/KV heads: {listed}"
        )
    return AttentionTimes(gpu, shape, decodes, prompts, how or how_prompts)
