"""Access to the optional measurement package, and small hand-made kernel tables that stand in for it."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

import numpy as np
import pytest

from servesim.profiler.silicon.attention import AttentionShape, AttentionTimes
from servesim.profiler.silicon.tables import Gpu, KernelTable

if TYPE_CHECKING:
    from collections.abc import Iterable

needs_silicon = pytest.mark.skipif(
    find_spec("aiconfigurator_core") is None or find_spec("pyarrow") is None,
    reason="needs the kernel measurements: pip install 'servesim[silicon]'",
)

TOY = Gpu("toy", bandwidth_bytes_s=1e12, l2_bytes=1e6, sm_count=4)


def table(name: str, rows: Iterable[dict[str, object]]) -> KernelTable:
    """A kernel table from rows with ``us`` and any columns."""
    listed = list(rows)
    columns = {key: np.array([row[key] for row in listed]) for key in listed[0] if key != "us"}
    return KernelTable(name, "0.0.1", np.array([row["us"] for row in listed], dtype=np.float64), columns)


def toy_attention(kernel: str = "toy_flash_attn_fa2", kv_dtype: str = "bfloat16") -> AttentionTimes:
    """2 heads over 1 KV head of size 64 on 4 SMs: every time follows from the constants below.

    Decodes: 5 us + KV bytes at 1 TB/s. A prompt: 6 us + tile starts of 1 us and 0.01 us per token attended.
    """
    shape = AttentionShape(2, 1, 64, kv_dtype)
    fixed = {
        "num_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "window_size": 0,
        "kv_cache_dtype": kv_dtype,
        "kernel_source": kernel,
    }
    generation = [
        {**fixed, "batch_size": b, "step": length - 1, "us": 5.0 + shape.kv_bytes(b, length) / 1e6}
        for b in (1, 4, 16, 64)
        for length in (2, 64, 1024, 16384)
    ]
    context = []
    for batch in (1, 32, 64):
        for prompt in (16, 32, 64, 1024, 4096, 8192, 16384):
            tiles = -(-prompt // 64)
            attended = sum(min((tile + 1) * 64, prompt) for tile in range(tiles))
            work = (tiles * 1.0 + attended * 0.01) * 2 * batch / 4
            first = 1.0 + 0.01 * min(prompt, 64)  # the base holds the first round of blocks
            context.append({**fixed, "batch_size": batch, "isl": prompt, "us": 6.0 + max(0.0, work - first)})
    return AttentionTimes(TOY, shape, table("generation", generation), table("context", context))
