"""Times of the layers that only move bytes: norms, rotary embedding, activation, embedding lookup, sampler.

``t = t0 + min(B, 0.38·L2) / (3.5·BW) + rest / (0.85·BW)`` with B the bytes read and written: what fits a
share of L2 (left there by the layer before) moves at L2 speed, the rest at DRAM speed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from servesim.profiler.silicon.tables import Gpu

L2_SPEEDUP = 3.5
L2_SHARE = 0.38
DRAM_EFFICIENCY = 0.85
HEAD_NORM_NS = 58.0
"""SM time of normalising one head of one token: such short rows are bound by issue, not by bytes."""


def moved_us(gpu: Gpu, moved_bytes: NDArray[np.float64], start_us: float) -> NDArray[np.float64]:
    """Time of a kernel that reads and writes ``moved_bytes`` in all and starts in ``start_us``."""
    near = np.minimum(moved_bytes, L2_SHARE * gpu.l2_bytes)
    near_us = near / (L2_SPEEDUP * gpu.bandwidth_bytes_s) * 1e6
    far_us = (moved_bytes - near) / (DRAM_EFFICIENCY * gpu.bandwidth_bytes_s) * 1e6
    return start_us + near_us + far_us


def head_norm_us(gpu: Gpu, rows: NDArray[np.float64], start_us: float) -> NDArray[np.float64]:
    """Time of normalising ``rows`` vectors of one head's width (query or key heads times tokens)."""
    return start_us + rows * HEAD_NORM_NS * 1e-3 / gpu.sm_count
