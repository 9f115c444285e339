"""Times of attention that keeps a state of fixed size: gated delta net and Kimi delta attention as measured,
Mamba and short convolutions from the bytes of their states.

A decode reads and writes the state of every sequence, whatever its context; a prompt passes it chunk by
chunk. Tables hold the kernels alone: the products around them are layers of their own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from servesim.errors import InputError, MissingFileError
from servesim.profiler.silicon.decode_grid import DecodeGrid, Prompts
from servesim.profiler.silicon.tables import read_table

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from servesim.profiler.silicon.decode_grid import Floats
    from servesim.profiler.silicon.tables import Gpu, KernelTable
    from servesim.specs.layers import Recurrent

START_US = 3.0
"""Of one kernel; a state takes two, the convolution and the recurrence."""
STREAM_SHARE = 0.85
SCAN_TOKENS = 256
"""Tokens of a piece that a chunked scan computes at once."""
SCAN_SHARE = 0.3
"""Share of the peak rate that a chunked scan reaches; that of the gated delta net on H100 is 0.2 to 0.35."""
KERNELS = {
    "gated_delta_net": (
        "linear_attention",
        "gdn_perf",
        ("causal_conv1d_update", "fused_recurrent_gated_delta_rule_packed_decode"),
    ),
    "kimi_delta": ("kda", "kda_perf", ("causal_conv1d_update", "fused_recurrent_kda_packed_decode")),
}
"""Kind -> folder, table and the kernels of a decode; a prompt takes all of its phase."""


def state_bytes(a: Recurrent, tp: int) -> float:
    """Bytes of the state of one sequence on one rank."""
    memory = a.heads * a.state_rows * a.state_columns * a.memory_itemsize
    return (memory + a.channels * (a.kernel - 1) * 2) / tp


def scan_flops(a: Recurrent, tp: int) -> float:
    """Operations of one token of a prompt on one rank: within its piece of the scan, with the state."""
    inside = SCAN_TOKENS * (a.state_rows + a.state_columns)
    return a.heads / tp * (inside + 4.0 * a.state_rows * a.state_columns)


@dataclass(slots=True)
class StateTimes:
    """One layer's state on one rank; ``scale`` stretches rows of other heads."""

    decodes: DecodeGrid
    prompts: Prompts
    version: str
    decode_kernels: list[str]
    prefill_kernels: list[str]
    notes: list[str] = field(default_factory=list)

    @property
    def longest_decode(self) -> int:
        return 1 << 30  # the context does not matter

    @property
    def longest_prompt(self) -> int:
        return int(self.prompts.tokens[-1])

    def decode_us(self, sequences: int, kv: int) -> float:
        del kv
        return self.decodes.at(sequences, 1)

    def prefill_us(self, chunk: int, history: int) -> float:
        del history
        return self.prompts.at(chunk, squared=0.0)

    def mixed_us(self, chunk: int, history: int, sequences: int, kv: int) -> float:
        """Decodes and chunks have kernels of their own."""
        decode_us = self.decode_us(sequences, kv) if sequences else 0.0
        return decode_us + (self.prefill_us(chunk, history) if chunk else 0.0)


def state_times(gpu: Gpu, a: Recurrent, tp: int, hidden: int) -> StateTimes:
    """Times of a state on one of ``tp`` ranks."""
    if a.kind in KERNELS:
        try:
            return _measured(gpu, a, tp, hidden)
        except MissingFileError:
            pass
    return computed_times(gpu.bandwidth_bytes_s, gpu.flop_us("bfloat16"), a, tp)


def _measured(gpu: Gpu, a: Recurrent, tp: int, hidden: int) -> StateTimes:
    folder, name, kernels = KERNELS[a.kind]
    table = read_table(gpu.folder, folder, name)
    values = max(a.heads // tp, 1)
    keys = max((a.channels - a.heads * a.state_columns) // 2 // a.state_rows // tp, 1)
    rows, note = _of_heads(table, keys, values, hidden)
    scale = values / int(rows.integers("num_v_heads")[0])
    decodes = [rows.where(phase="generation", kernel_source=kernel) for kernel in kernels]
    prompts = rows.where(phase="context", batch_size=1)
    tokens = np.unique(prompts.integers("seq_len"))
    total = _sum_us(
        [prompts.where(kernel_source=name) for name in prompts.values("kernel_source")], "seq_len", tokens
    )
    sizes = np.unique(decodes[0].integers("batch_size"))
    us = _sum_us(decodes, "batch_size", sizes)
    grid = DecodeGrid(sizes, np.array([1]), us[:, None] * scale, flat=True)
    return StateTimes(
        grid, Prompts(tokens.astype(np.float64), total * scale), table.version, list(kernels),
        prompts.values("kernel_source"), [note] if note else [],
    )  # fmt: skip


def _sum_us(kernels: list[KernelTable], axis: str, at: NDArray[np.int64]) -> Floats:
    """us of kernels that run one after the other, at points of an axis."""
    total: Floats = np.zeros(len(at), dtype=np.float64)
    for rows in kernels:
        order = np.argsort(rows.integers(axis))
        known: Floats = np.interp(at, rows.integers(axis)[order], rows.latency_us[order])
        total = np.asarray(total + known, dtype=np.float64)
    return total


def _of_heads(table: KernelTable, keys: int, values: int, hidden: int) -> tuple[KernelTable, str]:
    """Rows of one model's heads, the hidden size nearest (it changes nothing), else of the nearest heads."""
    own = table.where(num_k_heads=keys, num_v_heads=values)
    note = ""
    if not len(own):
        known = table.integers("num_v_heads")
        if not len(known):
            raise InputError(f"{table.name} {table.version}: has no rows")
        nearest = int(known[np.abs(np.log(known / values)).argmin()])
        own = table.where(num_v_heads=nearest)
        own = own.where(num_k_heads=int(own.integers("num_k_heads").max()))
        note = f"state of {values} heads scaled from {nearest}"
    sizes = own.integers("d_model")
    return own.where(d_model=int(sizes[np.abs(sizes - hidden).argmin()])), note


def computed_times(bandwidth_bytes_s: float, flop_us: float, a: Recurrent, tp: int) -> StateTimes:
    """From bytes and operations: a decode reads and writes every state once, a prompt scans in pieces."""
    byte_us = 1e6 / (STREAM_SHARE * bandwidth_bytes_s)
    sizes = 2 ** np.arange(0, 14)
    decodes = (2 * START_US + sizes * 2.0 * state_bytes(a, tp) * byte_us).astype(np.float64)
    tokens = 2.0 ** np.arange(0, 17)
    moved = tokens * 6.0 * a.channels / tp * byte_us  # read and written once by each of the two kernels
    computed = tokens * scan_flops(a, tp) * flop_us / SCAN_SHARE
    prompts = 2 * START_US + np.maximum(moved, computed)
    return StateTimes(
        DecodeGrid(sizes, np.array([1]), decodes[:, None], flat=True),
        Prompts(tokens.astype(np.float64), np.asarray(prompts, dtype=np.float64)),
        "",
        ["computed"],
        ["computed"],
        [f"{a.kind.replace('_', ' ')}: not measured, computed from bytes and operations, 30 % off or more"],
    )
