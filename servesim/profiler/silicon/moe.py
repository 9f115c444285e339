"""Times of a mixture-of-experts layer (router, dispatch, experts, combine) on one rank."""

from __future__ import annotations

from dataclasses import field
from typing import TYPE_CHECKING

import numpy as np

from servesim.errors import InputError
from servesim.profiler.silicon.tables import read_table
from servesim.slotted import dataclass

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from servesim.profiler.silicon.tables import Gpu, KernelTable
    from servesim.specs.model import ModelSpec

ROUTER_US = 8.0
"""Router GEMM and top-k selection, which the table leaves out."""
START_US = 20.0
"""Sorting tokens by expert, launching the grouped GEMMs and combining."""
STREAM_EFFICIENCY = 0.85
TABLE_FROM_TOKENS = 64
"""Below this the table's rows were measured on few, L2-resident experts."""


LOADS = ("balanced", "power_law_1.01", "power_law_1.2")
"""How unevenly the measured gates spread tokens over experts, from even to the most uneven."""


@dataclass(slots=True)
class MoeTimes:
    """Times of one layer's gated experts on one of ``tp`` ranks, which holds a slice of every expert.

    Where the degree was not measured, the time beyond the start is that of the nearest degree in proportion
    to the slice; where the experts' sizes were not, streaming and arithmetic are scaled from the nearest.
    """

    gpu: Gpu
    table: KernelTable
    dtype: str
    hidden: int
    inter: int
    experts: int
    top_k: int
    tp: int = 1
    load: str = "balanced"
    kernels: list[str] = field(init=False)
    notes: list[str] = field(init=False)
    """What is not as measured, for meta.yaml."""
    _tokens: NDArray[np.float64] = field(init=False)
    _times: NDArray[np.float64] = field(init=False)
    _own_size: bool = field(init=False)

    def __post_init__(self) -> None:
        self.notes = []
        rows = self._of_load(self._of_size(self.table.where(moe_dtype=self.dtype, moe_ep_size=1)))
        scale = 1.0
        if not self._own_size:
            scale = self.hidden * self.inter * self.top_k / self._flops(rows)
        degrees = np.unique(rows.integers("moe_tp_size"))
        if self.tp in degrees:
            rows = rows.where(moe_tp_size=self.tp)
        else:
            nearest = int(degrees[np.abs(np.log(degrees / self.tp)).argmin()])
            rows, scale = rows.where(moe_tp_size=nearest), scale * nearest / self.tp
            self.notes.append(f"tp{self.tp} scaled from tp{nearest}")
        self.kernels = rows.values("kernel_source")
        tokens = rows.integers("num_tokens")
        order = np.argsort(tokens)
        self._tokens, times = tokens[order].astype(np.float64), rows.latency_us[order]
        self._times = times if scale == 1.0 else START_US + np.maximum(times - START_US, 0.0) * scale

    def _of_size(self, rows: KernelTable) -> KernelTable:
        """Rows of these experts, or of the nearest that were measured."""
        sizes = {"hidden_size": self.hidden, "inter_size": self.inter}
        gate = {"num_experts": self.experts, "topk": self.top_k}
        own = rows.where(**sizes, **gate)
        self._own_size = len(own) > 0
        if self._own_size:
            return own
        if not len(rows):
            raise InputError(
                f"no {self.dtype} experts were measured on {self.gpu.folder} with vLLM {self.table.version}; "
                f"measured: {', '.join(self.table.values('moe_dtype'))}"
            )
        away = sum(np.abs(np.log(rows.integers(name) / value)) for name, value in (sizes | gate).items())
        at = int(np.argmin(away))
        nearest = {name: int(rows.integers(name)[at]) for name in (*sizes, *gate)}
        hidden, inter, experts, top_k = nearest.values()
        self.notes.append(
            f"{self.experts} experts of {self.hidden} x {self.inter}, top {self.top_k}, scaled from "
            f"{experts} of {hidden} x {inter}, top {top_k}"
        )
        return rows.where(**nearest)

    def _of_load(self, rows: KernelTable) -> KernelTable:
        """Rows of the load asked for, or of the most even one there is."""
        known = rows.values("distribution")
        if not known or self.load in known:
            return rows.where(distribution=self.load)
        even = min(known, key=lambda name: LOADS.index(name) if name in LOADS else len(LOADS))
        self.notes.append(f"{self.load} load was not measured, {even} stands in")
        return rows.where(distribution=even)

    @staticmethod
    def _flops(rows: KernelTable) -> int:
        sizes = (int(rows.integers(name)[0]) for name in ("hidden_size", "inter_size", "topk"))
        return int(np.prod(list(sizes)))

    @property
    def most_tokens(self) -> int:
        """Tokens of the largest batch measured."""
        return int(self._tokens[-1])

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
        if self._own_size and activated >= min(self.experts, self.top_k * tokens):
            if tokens < TABLE_FROM_TOKENS:
                return ROUTER_US + streamed
            return ROUTER_US + max(streamed, self._table_us(tokens))
        return ROUTER_US + float(np.hypot(streamed, self.token_us * tokens))

    def _table_us(self, tokens: int) -> float:
        if tokens > self._tokens[-1]:
            return float(self._times[-1] + self.token_us * (tokens - self._tokens[-1]))
        return float(np.interp(tokens, self._tokens, self._times))


def moe_times(gpu: Gpu, dtype: str, model: ModelSpec, tp: int, load: str) -> MoeTimes:
    """The experts of ``model`` in ``dtype`` on ``gpu``, each cut in ``tp`` slices."""
    table = read_table(gpu.folder, "moe", "moe_perf")
    sizes = (model.hidden_size, model.moe_intermediate_size, model.num_experts, model.num_experts_per_tok)
    return MoeTimes(gpu, table, dtype, *sizes, tp, load)
