"""Times of a mixture-of-experts layer (router, dispatch, experts, combine) on one rank."""

from __future__ import annotations

from dataclasses import field
from itertools import product
from typing import TYPE_CHECKING

import numpy as np

from servesim.errors import InputError
from servesim.profiler.silicon.tables import read_table, table_versions
from servesim.slotted import dataclass

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from servesim.profiler.silicon.tables import Gpu, KernelTable

ROUTER_US = 8.0
"""Router GEMM and top-k selection, which the table leaves out."""
START_US = 20.0
"""Sorting tokens by expert, launching the grouped GEMMs and combining."""
STREAM_EFFICIENCY = 0.85
TABLE_FROM_TOKENS = 64
"""Below this the table's rows were measured on few, L2-resident experts."""
FEWEST = 3
"""Numbers of tokens from there on that have to be measured; some measurements ended at the first few rows."""


LOADS = ("balanced", "power_law_1.01", "power_law_1.2")
"""How unevenly the measured gates spread tokens over experts, from even to the most uneven."""


FORMATS: dict[str, tuple[str, ...]] = {
    "bfloat16": ("bfloat16",),
    "fp8": ("fp8", "fp8_block"),
    "fp8_block": ("fp8_block", "fp8"),
    "mxfp8": ("fp8_block", "fp8"),
    "nvfp4": ("nvfp4",),
    "int4": ("int4_wo",),
    "mxfp4": ("w4a16_mxfp4", "w4a8_mxfp4_mxfp8"),
}
"""Format of the experts' weights -> the tables' names for it, the best one first."""
WIDENED = ("int4", "mxfp4", "nvfp4", "fp8", "fp8_block", "mxfp8")
"""Formats that can be kept narrow and computed with in 16 bit, on GPUs and in sizes that nobody measured."""


@dataclass(frozen=True, slots=True)
class ExpertSizes:
    """A layer's experts, whole."""

    hidden: int
    inter: int
    experts: int
    top_k: int
    matrices: int = 3
    """Of an expert: two without a gate."""

    def columns(self) -> dict[str, int]:
        """As the tables name them."""
        sizes = {"hidden_size": self.hidden, "inter_size": self.inter}
        return sizes | {"num_experts": self.experts, "topk": self.top_k}


@dataclass(slots=True)
class MoeTimes:
    """Times of one layer's experts on one of ``tp`` ranks, which holds a slice of every expert.

    Where the degree was not measured, or with few tokens, the time beyond the start is that of the nearest
    degree in proportion to the slice; where the experts' sizes were not, streaming and arithmetic are scaled
    from the nearest.
    ``narrow_bits``: of a weight with its scales where rows of 16 bit stand for a narrower format; a time is
    then taken for ``hypot(stream, compute)``, and the stream gets shorter.
    """

    gpu: Gpu
    table: KernelTable
    dtype: str
    """By the tables' name."""
    sizes: ExpertSizes
    weight_bits: float
    tp: int = 1
    load: str = "balanced"
    narrow_bits: float | None = None
    kernels: list[str] = field(init=False)
    notes: list[str] = field(init=False)
    """What is not as measured, for meta.yaml."""
    _tokens: NDArray[np.float64] = field(init=False)
    _times: NDArray[np.float64] = field(init=False)
    _own_size: bool = field(init=False)

    def __post_init__(self) -> None:
        self.notes = []
        rows = self._of_load(self._of_size(self.table.where(moe_dtype=self.dtype, moe_ep_size=1)))
        scale, sizes = 1.0, self.sizes
        if not self._own_size:
            scale = sizes.hidden * sizes.inter * sizes.top_k / self._flops(rows)
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
        if self.narrow_bits is not None:
            wide = START_US + sizes.experts * self._expert_us(16.0)
            compute = np.sqrt(np.maximum(self._times**2 - wide**2, 0.0))
            narrow = START_US + sizes.experts * self.expert_us
            self._times = np.minimum(np.hypot(narrow, compute), self._times)
            self.notes.append(
                f"derived from 16-bit experts and {self.weight_bits:.3g} bits a weight, not measured"
            )

    def _of_size(self, rows: KernelTable) -> KernelTable:
        """Rows of these experts, or of the nearest that were measured.

        Raises:
            InputError: there are none.
        """
        sizes, wanted = self.sizes, self.sizes.columns()
        own = _whole(rows.where(**wanted))
        self._own_size = len(own) > 0
        if self._own_size:
            return own
        away = sum(np.abs(np.log(rows.integers(name) / value)) for name, value in wanted.items())
        order = np.argsort(away, kind="stable")
        columns = [rows.integers(name)[order].tolist() for name in wanted]
        for near in dict.fromkeys(zip(*columns, strict=True)):
            found = _whole(rows.where(**dict(zip(wanted, near, strict=True))))
            if len(found):
                hidden, inter, experts, top_k = near
                self.notes.append(
                    f"{sizes.experts} experts of {sizes.hidden} x {sizes.inter}, top {sizes.top_k}, scaled "
                    f"from {experts} of {hidden} x {inter}, top {top_k}"
                )
                return found
        raise InputError(
            f"no {self.dtype} experts were measured on {self.gpu.folder} with vLLM {self.table.version}; "
            f"measured: {', '.join(self.table.values('moe_dtype'))}"
        )

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
        """Time to stream this rank's slice of one expert's matrices from DRAM."""
        return self._expert_us(self.weight_bits)

    def _expert_us(self, weight_bits: float) -> float:
        sizes = self.sizes
        weights = sizes.matrices * sizes.hidden * sizes.inter // self.tp
        return weights * (weight_bits / 8) / (STREAM_EFFICIENCY * self.gpu.bandwidth_bytes_s) * 1e6

    @property
    def token_us(self) -> float:
        """Compute time of one more token once the experts are full, from the table's longest batches."""
        return float((self._times[-1] - self._times[-3]) / (self._tokens[-1] - self._tokens[-3]))

    def time_us(self, tokens: int, activated: int) -> float:
        """``tokens`` tokens spread evenly over ``activated`` of the experts."""
        streamed = START_US + activated * self.expert_us
        if self._own_size and activated >= min(self.sizes.experts, self.sizes.top_k * tokens):
            if tokens < TABLE_FROM_TOKENS:
                return ROUTER_US + streamed
            return ROUTER_US + max(streamed, self._table_us(tokens))
        return ROUTER_US + float(np.hypot(streamed, self.token_us * tokens))

    def _table_us(self, tokens: int) -> float:
        if tokens > self._tokens[-1]:
            return float(self._times[-1] + self.token_us * (tokens - self._tokens[-1]))
        return float(np.interp(tokens, self._tokens, self._times))


def _whole(rows: KernelTable) -> KernelTable:
    """Those of a degree and a load that were measured with :data:`FEWEST` numbers of tokens."""
    many = rows.integers("num_tokens") >= TABLE_FROM_TOKENS
    degrees = rows.integers("moe_tp_size")
    loads = rows.columns.get("distribution", np.full(len(rows), ""))
    keep = np.zeros(len(rows), dtype=bool)
    for degree, load in product(np.unique(degrees), np.unique(loads)):
        group = (degrees == degree) & (loads == load)
        if (group & many).sum() >= FEWEST:
            keep |= group
    return rows.those(keep)


def moe_times(gpu: Gpu, element: str, weight_bits: float, sizes: ExpertSizes, tp: int, load: str) -> MoeTimes:
    """Experts with weights of a format (one of :data:`FORMATS`), each cut in ``tp`` slices.

    Rows of these sizes in the format come first, then rows of these sizes in 16 bit with the stream of the
    weights shortened, then other sizes scaled.
    """
    own = [name for name in FORMATS[element] if _versions(gpu, moe_dtype=name, **sizes.columns())]
    measured = [name for name in FORMATS[element] if _versions(gpu, moe_dtype=name)]
    if not own and element in WIDENED:
        wide = _versions(gpu, moe_dtype="bfloat16", **sizes.columns())
        if not measured or (wide and element in ("int4", "mxfp4")):
            table = read_table(
                gpu.folder, "moe", "moe_perf", like={"moe_dtype": "bfloat16", **sizes.columns()}
            )
            return MoeTimes(gpu, table, "bfloat16", sizes, weight_bits, tp, load, weight_bits)
    name = (own or measured or FORMATS[element])[0]
    like = {"moe_dtype": name, **(sizes.columns() if own else {})}
    table = read_table(gpu.folder, "moe", "moe_perf", like=like)
    times = MoeTimes(gpu, table, name, sizes, weight_bits, tp, load)
    if name != FORMATS[element][0]:
        times.notes.append(f"{element} experts timed as {name}")
    return times


def _versions(gpu: Gpu, **like: object) -> list[str]:
    return table_versions(gpu.folder, "moe", "moe_perf", like=like)
