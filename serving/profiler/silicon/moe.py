"""Times of a mixture-of-experts layer (router, dispatch, experts, combine) on one rank."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from serving.errors import InputError
from serving.profiler.silicon.tables import read_table

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from serving.profiler.silicon.tables import Gpu, KernelTable

ROUTER_US = 8.0
"""Router product and top-k selection, which the table leaves out."""
START_US = 20.0
"""Sorting tokens by expert, launching the grouped products and combining."""
STREAM_EFFICIENCY = 0.85
TABLE_FROM_TOKENS = 64
"""Below this the table's rows were measured on few, L2-resident experts."""


@dataclass(slots=True)
class MoeTimes:
    """Times of one layer's gated experts on one of ``tp`` ranks, which holds a slice of every expert."""

    gpu: Gpu
    table: KernelTable
    dtype: str
    hidden: int
    inter: int
    experts: int
    top_k: int
    tp: int = 1
    kernels: list[str] = field(init=False)
    _tokens: NDArray[np.float64] = field(init=False)
    _times: NDArray[np.float64] = field(init=False)

    def __post_init__(self) -> None:
        rows = self.table.where(
            moe_dtype=self.dtype,
            hidden_size=self.hidden,
            inter_size=self.inter,
            topk=self.top_k,
            num_experts=self.experts,
            moe_tp_size=self.tp,
            moe_ep_size=1,
            distribution="balanced",
        )
        if len(rows) < 3:
            raise InputError(
                f"{self.experts} experts of {self.hidden} x {self.inter}, top {self.top_k}, in {self.dtype} "
                f"were not measured on {self.gpu.folder} with vLLM {self.table.version} for tp {self.tp}"
            )
        tokens = rows.integers("num_tokens")
        order = np.argsort(tokens)
        self._tokens, self._times = tokens[order].astype(np.float64), rows.latency_us[order]
        self.kernels = rows.values("kernel_source")

    @property
    def expert_us(self) -> float:
        """Time to stream this rank's slice of one expert's three matrices from DRAM."""
        element = 1 if self.dtype.startswith("fp8") else 2
        weight_bytes = 3 * self.hidden * self.inter // self.tp * element
        return weight_bytes / (STREAM_EFFICIENCY * self.gpu.bandwidth_bytes_s) * 1e6

    @property
    def token_us(self) -> float:
        """Compute time of one more token once the experts are full, from the table's longest batches."""
        return float((self._times[-1] - self._times[-3]) / (self._tokens[-1] - self._tokens[-3]))

    def time_us(self, tokens: int, activated: int) -> float:
        """``tokens`` tokens spread evenly over ``activated`` of the experts."""
        streamed = START_US + activated * self.expert_us
        if activated >= min(self.experts, self.top_k * tokens):
            if tokens < TABLE_FROM_TOKENS:
                return ROUTER_US + streamed
            return ROUTER_US + max(streamed, self._table_us(tokens))
        return ROUTER_US + float(np.hypot(streamed, self.token_us * tokens))

    def _table_us(self, tokens: int) -> float:
        if tokens > self._tokens[-1]:
            return float(self._times[-1] + self.token_us * (tokens - self._tokens[-1]))
        return float(np.interp(tokens, self._tokens, self._times))


def moe_times(
    gpu: Gpu, dtype: str, hidden: int, inter: int, experts: int, top_k: int, tp: int = 1
) -> MoeTimes:
    """Experts of ``hidden x inter`` in ``dtype`` on ``gpu``, each cut in ``tp`` slices."""
    return MoeTimes(gpu, read_table(gpu.folder, "moe", "moe_perf"), dtype, hidden, inter, experts, top_k, tp)
