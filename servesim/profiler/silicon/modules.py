"""Times of attention that was measured as a whole module, its matrix products included.

Latent attention (MLA: DeepSeek V2, V3, R1, Kimi K2), the same with an indexer (DSA: DeepSeek V3.2, GLM-5),
its compressed successor (DeepSeek V4) and MiniMax M3's sparse attention. Points of the tables are returned as
they are. The module of another model of the kind takes what its own products take more or less than those of
the measured model.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache, lru_cache
from typing import TYPE_CHECKING

import numpy as np

from servesim.errors import InputError, MissingFileError
from servesim.profiler.silicon.decode_grid import DecodeGrid, Prompts
from servesim.profiler.silicon.head_shapes import on_the_line
from servesim.profiler.silicon.tables import KernelTable, read_table
from servesim.specs.layers import CompressedAttention, LatentAttention
from servesim.specs.weights import rank_shape

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from servesim.profiler.silicon.tables import Gpu
    from servesim.specs.block_layers import AttentionGroup

    Floats = NDArray[np.float64]
    Product = tuple[int, int]
    """Output and inner size of a matrix product on one rank."""
    ProductUs = Callable[[int, Product, str], float]
    """us of so many rows times a product of an element format."""

CURVED_FROM = 1024
"""Tokens of a prompt from which its time shows how it grows; below, launches hide it."""


@dataclass(frozen=True, slots=True)
class Family:
    """Tables of one kind of module, and the models that they were measured with."""

    folder: str
    context: str
    generation: str
    models: dict[str, Shape]
    flat_top: int = 0
    """Tokens that a token attends to at most, an indexer's choice; 0: all."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What the products of a measured module are made of; heads come from the row."""

    hidden: int
    q_rank: int
    kv_rank: int
    rope: int
    nope: int
    value: int
    index_heads: int = 0
    index_dim: int = 0

    def products(self, heads: int) -> list[Product]:
        """Every product of the module on one rank, as the model's list of layers has them."""
        found = [
            (self.q_rank, self.hidden),
            (heads * (self.nope + self.rope), self.q_rank),
            (self.kv_rank + self.rope, self.hidden),
            (heads * (self.nope + self.value), self.kv_rank),
            (self.hidden, heads * self.value),
        ]
        if self.index_heads:
            found += [(self.index_heads * self.index_dim, self.q_rank), (self.index_dim, self.hidden)]
        return sorted(found)


_V3 = Shape(7168, 1536, 512, 64, 128, 128)
_V32 = Shape(7168, 1536, 512, 64, 128, 128, 64, 128)
_GLM5 = Shape(6144, 2048, 512, 64, 192, 256, 32, 128)
MLA = Family("mla", "mla_context_module_perf", "mla_generation_module_perf", {"deepseek-ai/DeepSeek-V3": _V3})
DSA = Family(
    "sparse_attention",
    "dsa_context_module_perf",
    "dsa_generation_module_perf",
    {"deepseek-ai/DeepSeek-V3.2": _V32, "zai-org/GLM-5": _GLM5},
    flat_top=2048,
)
MSA = Family("msa", "msa_context_module_perf", "msa_generation_module_perf", {"MiniMaxAI/MiniMax-M3": _V3})


def _compressed(ratio: int) -> Family:
    name = "csa" if ratio == 4 else "hca"
    return Family(
        "sparse_attention",
        f"dsv4_{name}_context_module_perf",
        f"dsv4_{name}_generation_module_perf",
        {"sgl-project/DeepSeek-V4-Flash-FP8": _V3, "sgl-project/DeepSeek-V4-Pro-FP8": _V3},
    )


@dataclass(slots=True)
class ModuleTimes:
    """One layer's attention module on one rank."""

    generation: KernelTable
    context: KernelTable
    tokens_kept: int = 0
    """Most tokens of KV that a decode reads; 0: all."""
    correction: Callable[[int], float] | None = None
    """us that so many rows take more (or less) than in the measured module; None: it is the measured one."""
    upper_us: Callable[[int], float] | None = None
    """us to expand so many latent vectors of a chunk's history; None: nothing is expanded."""
    flat_top: int = 0
    notes: list[str] = field(default_factory=list)
    _decodes: DecodeGrid = field(init=False)
    _prompts: Prompts = field(init=False)
    _pair_us: float = field(init=False)
    _top_pair_us: float = field(init=False, default=0.0)

    def __post_init__(self) -> None:
        rows = self.generation
        self._decodes = DecodeGrid.of_rows(
            rows.integers("batch_size"), rows.integers("step"), rows.latency_us
        )
        alone = self.context.where(batch_size=1, step=0)
        self._prompts = Prompts.of_rows(alone.integers("isl"), alone.latency_us)
        self._pair_us = 2.0 * self._prompts.growth[1]
        if self.flat_top:
            self._top_pair_us = self._decode_pair_us()

    def _decode_pair_us(self) -> float:
        """us of a pair of a token and one that its indexer chose, from decodes of many sequences."""
        grid = self._decodes
        many = int(grid.sizes[grid.sizes <= 256][-1])
        return max(grid.at(many, self.flat_top) - grid.at(many, 2), 0.0) / (many * self.flat_top)

    @property
    def version(self) -> str:
        return self.generation.version

    @property
    def decode_kernels(self) -> list[str]:
        return self.generation.values("kernel_source")

    @property
    def prefill_kernels(self) -> list[str]:
        return self.context.values("kernel_source")

    @property
    def longest_decode(self) -> int:
        return int(self._decodes.lengths[-1])

    @property
    def longest_prompt(self) -> int:
        return int(self._prompts.tokens[-1])

    def _own(self, us: float, rows: int) -> float:
        """The time of this model's module from that of the measured one; never below a third of it."""
        return us if self.correction is None else max(us + self.correction(rows), us / 3)

    def decode_us(self, sequences: int, kv: int) -> float:
        seen = min(kv, self.tokens_kept) if self.tokens_kept else kv
        return self._own(self._decodes.at(sequences, max(seen, 1)), sequences)

    def prefill_us(self, chunk: int, history: int) -> float:
        """The measured prompt, and what its history adds: pairs as the longest prompts show them, and latent
        vectors that are expanded again for every chunk."""
        us = self._prompts.at(chunk)
        if history:
            us += self._pair_us * chunk * history
            if self.upper_us is not None:
                us += self.upper_us(history)
            if self.flat_top:
                # tokens that reach their most already do not read more for the history
                more = min(history, self.flat_top) * min(chunk, self.flat_top)
                us += self._top_pair_us * more / 2
            us = max(us, self._decodes.at(1, history))
        return self._own(us, chunk)

    def mixed_us(self, chunk: int, history: int, sequences: int, kv: int) -> float:
        """The products run over all tokens at once, so that their weights are read once for both parts."""
        if sequences == 0:
            return self.prefill_us(chunk, history)
        if chunk == 0:
            return self.decode_us(sequences, kv)
        once = min(self.decode_us(1, 1), self.decode_us(sequences, kv))
        return self.prefill_us(chunk, history) + self.decode_us(sequences, kv) - once


def module_times(
    gpu: Gpu,
    group: AttentionGroup,
    tp: int,
    hidden: int,
    kv_dtype: str,
    element: str,
    product_us: ProductUs,
) -> ModuleTimes:
    """Times of a group of layers that are measured as modules; ``element``: the table's name of the format of
    its matrices.

    Raises:
        InputError: nothing of the kind was measured on this GPU.
    """
    attention = group.attention
    family = _family(group)
    heads = -(-attention.heads // tp) if hasattr(attention, "heads") else 1
    model = _nearest_model(family, hidden)
    generation, context = (
        _rows(read_table(gpu.folder, family.folder, name, like={"model": model}), model, kv_dtype, element)
        for name in (family.generation, family.context)
    )
    decodes = _of_heads(generation, heads, ("batch_size", "step"))
    prompts = _of_heads(context, heads, ("batch_size", "isl"))
    notes = []
    correction, upper = None, None
    measured = family.models[model]
    if isinstance(attention, LatentAttention):
        own = _own_products(group, tp)
        used = "fp8_block" if element.startswith("fp8") else "bfloat16"
        if own != measured.products(heads) or element != used:
            correction = _difference(own, element, measured.products(heads), used, product_us)
            notes.append(
                f"module of {model.rpartition('/')[2]}, its products exchanged for this model's own "
                f"({element}): derived"
            )
        if not attention.index_top_k:
            expand = (heads * (attention.nope_dim + attention.value_dim), attention.kv_rank)
            upper = lru_cache(maxsize=None)(lambda tokens: product_us(tokens, expand, "bfloat16"))
        elif not attention.index_dim:
            notes.append("another layer's index is used: timed with an indexer, an upper bound")
    kept = attention.window if isinstance(attention, CompressedAttention) and not attention.ratio else 0
    if kept:
        notes.append(f"a window of {kept} tokens alone, timed with the compressor of other layers")
    return ModuleTimes(decodes, prompts, kept, correction, upper, family.flat_top, notes)


def hyper_us(gpu: Gpu, streams_width: int, hidden: int) -> Callable[[NDArray[np.int64]], Floats] | None:
    """us that mixing the streams of a block's residual takes (hyper-connections), before and after attention
    and before and after its experts, at so many tokens; None: nobody measured it on this GPU.

    Rows are of both halves of a block together. Those of the nearest hidden size are scaled by the width.
    """
    try:
        table = read_table(gpu.folder, "mhc", "mhc_module_perf")
    except MissingFileError:
        return None
    sizes = table.integers("hidden_size")
    nearest = int(sizes[np.abs(sizes - hidden).argmin()])
    rows = table.where(hidden_size=nearest, hc_mult=streams_width // hidden)
    if not len(rows):
        return None
    parts = [rows.where(op_name=name) for name in rows.values("op_name")]
    tokens = np.unique(rows.integers("num_tokens"))
    us = np.zeros(len(tokens))
    for part in parts:
        order = np.argsort(part.integers("num_tokens"))
        us = us + np.interp(tokens, part.integers("num_tokens")[order], part.latency_us[order])
    scale, slope = hidden / nearest, (us[-1] - us[-2]) / (tokens[-1] - tokens[-2])

    def at(count: NDArray[np.int64]) -> Floats:
        beyond = np.maximum(count - tokens[-1], 0) * slope
        result: Floats = (np.interp(count, tokens, us) + beyond) * scale
        return result

    return at


def _family(group: AttentionGroup) -> Family:
    attention = group.attention
    if isinstance(attention, CompressedAttention):
        return _compressed(attention.ratio)
    if isinstance(attention, LatentAttention):
        return DSA if attention.index_top_k else MLA
    return MSA


def _nearest_model(family: Family, hidden: int) -> str:
    """The measured model whose hidden size is nearest; tables without the models' sizes name one alone."""
    if family.folder == "sparse_attention" and family.context.startswith("dsv4"):
        return next(name for name in family.models if ("Pro" in name) == (hidden > 5120))
    return min(family.models, key=lambda name: abs(family.models[name].hidden - hidden))


def _rows(table: KernelTable, model: str, kv_dtype: str, element: str) -> KernelTable:
    rows = table.where(model=model, gemm_type="fp8_block" if element.startswith("fp8") else "bfloat16")
    if not len(rows):  # some were measured in one format alone
        rows = table.where(model=model)
    own = rows.where(kv_cache_dtype=kv_dtype)
    if not len(own):
        measured = ", ".join(rows.values("kv_cache_dtype"))
        raise InputError(
            f"{table.name} {table.version}: {kv_dtype} KV cache: was not measured; measured: {measured}"
        )
    return own


def _of_heads(rows: KernelTable, heads: int, keys: tuple[str, str]) -> KernelTable:
    """The rows of so many heads, or on the line through the two measured numbers around them."""
    own = rows.where(num_heads=heads)
    if len(own):
        return own
    known = np.unique(rows.integers("num_heads"))
    above = min(max(int(np.searchsorted(known, heads)), 1), len(known) - 1)
    low, high = (rows.where(num_heads=int(known[i])) for i in (above - 1, above))
    weight = (heads - known[above - 1]) / (known[above] - known[above - 1])
    return on_the_line(low, high, weight, _ids(low, keys), _ids(high, keys))


def _ids(rows: KernelTable, keys: tuple[str, str]) -> NDArray[np.int64]:
    """One number for what tells the rows of one shape apart; prompts behind a history are others."""
    behind = rows.integers("step") if keys[1] == "isl" else np.zeros(len(rows), dtype=np.int64)
    return (rows.integers(keys[0]) << 40) + (rows.integers(keys[1]) << 20) + behind


def _own_products(group: AttentionGroup, tp: int) -> list[Product]:
    return sorted((shape[1], shape[2]) for t in group.tensors if t.matrix for shape in [rank_shape(t, tp)])


def _difference(
    own: list[Product], element: str, measured: list[Product], used: str, product_us: ProductUs
) -> Callable[[int], float]:
    @cache
    def more(rows: int) -> float:
        mine = sum(product_us(rows, product, element) for product in own)
        return mine - sum(product_us(rows, product, used) for product in measured)

    return more
