"""Kernel times from peak rates: the roofline of each kernel, with what keeps real kernels below it.

A kernel starts, and then computes and streams at once; the slower of the two counts, and a little of the
other where they are alike (:func:`overlapped`). All functions take and return arrays, times in us. The
numbers in capitals describe how such kernels are built and were chosen once for all GPUs together; what
differs from one accelerator to the next is in :class:`~servesim.profiler.roofline.efficiency.Efficiency`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from servesim.errors import InputError
from servesim.profiler.roofline.efficiency import efficiency_of, share_at
from servesim.slotted import dataclass
from servesim.specs.dtypes import dtype_bytes

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    from servesim.profiler.roofline.efficiency import Efficiency
    from servesim.specs.hardware import HardwareSpec

    Floats = NDArray[np.float64]

ACTIVATION_BYTES = 2
GEMM_TILES = ((64, 64, 0.8), (128, 128, 1.0))
"""Rows, columns and relative speed of the tiles that a GEMM can be cut into."""
GEMM_FILL_BYTES = 512
"""Bytes of k that filling and draining a tile's pipeline costs."""
GEMM_SHARPNESS = 3.5
QUANTISE_BYTES = 3
"""Read and written per activation to turn it into 8 bit."""
ROW_TILE = 128
"""Query rows of one thread block of prefill attention; the heads of a KV group share it."""
PREFILL_STREAM = 0.8
PREFILL_SHARPNESS = 3.0
EXPERT_TILES = (16, 64)
"""Tokens of one expert are padded to the first, or to the second once they exceed it."""
MOE_SHARPNESS = 1.5
FIRST_4_BIT = 10.0
"""Compute capability from which on products run in NVFP4."""
CACHE_SPEEDUP = 3.5
"""Speed of the last-level cache over the memory's."""
CACHE_SHARE = 0.38
"""Share of that cache in which a layer still finds what the layer before it wrote."""


@dataclass(frozen=True, slots=True)
class Accelerator:
    """An accelerator as the formulas see it."""

    name: str
    bytes_per_us: float
    flop_per_us: dict[str, float]
    """Peak rate per dtype; ``bfloat16`` is always there."""
    units: int
    """SMs, compute units or matrix units: what works on tiles independently."""
    cache_bytes: float
    efficiency: Efficiency
    link_bytes_per_us: float | None = None
    link_latency_us: float = 0.0
    computes_4_bit: bool = False
    """Whether products with 4-bit weights and activations run as such, here at the rate of 8 bit."""

    def rate(self, dtype: str) -> tuple[float, bool]:
        """Peak rate in flop/us for weights of ``dtype``, and whether it is 8-bit arithmetic.

        Without 8-bit arithmetic 8-bit weights are widened on the way and computed with in 16 bit.
        """
        if dtype_bytes(dtype) == 1:
            if dtype in self.flop_per_us:
                return self.flop_per_us[dtype], True
            return self.flop_per_us["bfloat16"], False
        name = "bfloat16" if dtype == "float16" else dtype
        if name not in self.flop_per_us:
            raise InputError(
                f"configs/hardware/{self.name}.yaml: peak_tflops.{dtype}: is missing; the roofline source "
                f"needs it for weights in {dtype} (there are {', '.join(self.flop_per_us)})"
            )
        return self.flop_per_us[name], False


def accelerator(hardware: HardwareSpec, efficiency: Efficiency | None = None) -> Accelerator:
    """The accelerator of a hardware file.

    Raises:
        InputError: the file lacks a fact that the formulas need.
    """
    where = f"configs/hardware/{hardware.name}.yaml"
    needed = {"memory_bandwidth_gbs": hardware.memory_bandwidth_gbs, "l2_mib": hardware.l2_mib}
    needed |= {"sm_count": hardware.sm_count}
    for name, value in needed.items():
        if value is None:
            raise InputError(
                f"{where}: {name}: is missing; the roofline source computes kernel times from it"
            )
    rates = {dtype: tflops * 1e6 for dtype, tflops in hardware.peak_tflops.items()}
    rates.setdefault("bfloat16", rates.get("float16", 0.0))
    if not rates["bfloat16"]:
        raise InputError(
            f"{where}: peak_tflops.bfloat16: is missing; the roofline source computes kernel times from it"
        )
    link = hardware.link
    return Accelerator(
        name=hardware.name,
        bytes_per_us=(hardware.memory_bandwidth_gbs or 0.0) * 1e3,
        flop_per_us=rates,
        units=hardware.sm_count or 1,
        cache_bytes=(hardware.l2_mib or 0.0) * 2**20,
        efficiency=efficiency or efficiency_of(hardware),
        link_bytes_per_us=link.bandwidth_gbs * 1e3 if link else None,
        link_latency_us=link.latency_us if link else 0.0,
        computes_4_bit=float(hardware.compute_capability or 0) >= FIRST_4_BIT,
    )


def overlapped(one: Floats, other: Floats, sharpness: float) -> Floats:
    """A smooth maximum: ``(one^s + other^s)^(1/s)``."""
    together: Floats = (one**sharpness + other**sharpness) ** (1.0 / sharpness)
    return together


def gemm_us(
    acc: Accelerator,
    tokens: ArrayLike,
    n: ArrayLike,
    k: ArrayLike,
    dtype: str,
    weight_bits: float | None = None,
) -> Floats:
    """``[tokens, k] x [k, n]`` with arithmetic in ``dtype`` and weights of so many bits; None: of ``dtype``.

    Computing goes tile by tile, at least one wave of tiles on all units; streaming reads weights and
    activations and writes the result. 8-bit arithmetic quantises the activations first.
    """
    eff = acc.efficiency
    m, n, k = (np.asarray(size, dtype=np.float64) for size in (tokens, n, k))
    element = dtype_bytes(dtype)
    peak, eight_bit = acc.rate(dtype)
    speed = peak * share_at(eff.product_compute_8bit if eight_bit else eff.product_compute, m)
    inner = 2.0 * (k + GEMM_FILL_BYTES / element)
    computed: Floats = np.full(np.broadcast(m, n, k).shape, np.inf)
    for rows, columns, relative in GEMM_TILES:
        waves = np.maximum(1.0, np.ceil(m / rows) * np.ceil(n / columns) / acc.units)
        computed = np.minimum(computed, waves * acc.units * rows * columns * inner / (speed * relative))
    weight_bytes = element if weight_bits is None else weight_bits / 8
    moved = n * k * weight_bytes + m * k * element + m * n * ACTIVATION_BYTES
    streamed = moved / (acc.bytes_per_us * share_at(eff.product_stream, m))
    quantised = m * k * QUANTISE_BYTES / acc.bytes_per_us if eight_bit else 0.0
    time: Floats = eff.product_start_us + overlapped(computed, streamed, GEMM_SHARPNESS) + quantised
    return time


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """One rank's attention; ``window`` None: every token sees the whole context."""

    heads: int
    kv_heads: int
    head_dim: int
    kv_bytes: float
    """Bytes of one element of the KV cache, scales included."""
    window: int | None = None

    @property
    def token_bytes(self) -> float:
        """KV of one token."""
        return 2 * self.kv_heads * self.head_dim * self.kv_bytes

    def seen(self, tokens: Floats) -> Floats:
        """How many of the ``tokens`` up to a token its window reaches."""
        return tokens if self.window is None else np.minimum(tokens, self.window)


def decode_us(acc: Accelerator, shape: AttentionShape, sequences: ArrayLike, kv: ArrayLike) -> Floats:
    """``sequences`` decodes with ``kv`` cached tokens each: the KV of all of them is streamed.

    Every KV head of every sequence is a block of its own, which costs a little whatever it reads.
    """
    eff = acc.efficiency
    count = np.asarray(sequences, dtype=np.float64)
    share = share_at(eff.decode_stream if shape.kv_bytes > 1 else eff.decode_stream_8bit, count)
    tokens = count * shape.seen(np.asarray(kv, dtype=np.float64) + 1.0)
    streamed = tokens * shape.token_bytes / (acc.bytes_per_us * share)
    time: Floats = eff.decode_start_us + count * shape.kv_heads * eff.decode_block_us + streamed
    return time


def mean_keys(shape: AttentionShape, chunk: Floats, history: Floats) -> Floats:
    """Tokens that a token of the chunk attends to on average, itself included."""
    full = history + (chunk + 1.0) / 2.0
    if shape.window is None:
        return full
    growing = np.clip(shape.window - history, 0.0, chunk)  # tokens whose window still reaches the start
    rising = growing * (history + (growing + 1.0) / 2.0)
    return (rising + (chunk - growing) * shape.window) / chunk


def prefill_us(acc: Accelerator, shape: AttentionShape, chunk: ArrayLike, history: ArrayLike) -> Floats:
    """A chunk of one request whose tokens also attend to ``history`` tokens before it.

    Rows are padded to tiles, a tile's diagonal counts half; at the end the units wait for the longest tiles.
    """
    eff = acc.efficiency
    c, p = np.asarray(chunk, dtype=np.float64), np.asarray(history, dtype=np.float64)
    group = shape.heads / shape.kv_heads
    rows = np.ceil(c * group / ROW_TILE) * ROW_TILE / group
    blocks = shape.heads * rows / ROW_TILE
    pairs = shape.heads * rows * (mean_keys(shape, c, p) + ROW_TILE / 2)
    pairs = pairs + eff.prefill_tail * ROW_TILE * np.minimum(acc.units, blocks) * shape.seen(c)
    share = share_at(eff.prefill_compute if shape.kv_bytes > 1 else eff.prefill_compute_8bit, c)
    computed = 4.0 * shape.head_dim * pairs / (acc.flop_per_us["bfloat16"] * share)
    queries = c * shape.heads * shape.head_dim * 2 * ACTIVATION_BYTES
    streamed = (shape.seen(c + p) * shape.token_bytes + queries) / (acc.bytes_per_us * PREFILL_STREAM)
    time: Floats = eff.prefill_start_us + overlapped(computed, streamed, PREFILL_SHARPNESS)
    return time


@dataclass(frozen=True, slots=True)
class ExpertShape:
    """One rank's slice of every expert."""

    hidden: int
    inter: int
    top_k: int
    dtype: str
    """Of the arithmetic."""
    weight_bits: float | None = None
    """Of a weight with its scales; None: those of ``dtype``."""
    matrices: int = 3
    """Of an expert: two without a gate."""


def moe_us(acc: Accelerator, experts: ExpertShape, tokens: ArrayLike, activated: ArrayLike) -> Floats:
    """``tokens`` tokens spread evenly over ``activated`` experts: their weights are streamed, rows padded."""
    eff = acc.efficiency
    count, active = np.asarray(tokens, dtype=np.float64), np.asarray(activated, dtype=np.float64)
    routed = count * experts.top_k
    small, large = EXPERT_TILES
    per_expert = routed / active
    rows = active * np.where(
        per_expert <= large, np.ceil(per_expert / small) * small, np.ceil(per_expert / large) * large
    )
    peak, eight_bit = acc.rate(experts.dtype)
    share = share_at(eff.moe_compute_8bit if eight_bit else eff.moe_compute, count)
    computed = 2.0 * experts.matrices * experts.hidden * experts.inter * rows / (peak * share)
    bits = experts.weight_bits
    weight_bytes = dtype_bytes(experts.dtype) if bits is None else bits / 8
    weights = active * experts.matrices * experts.hidden * experts.inter * weight_bytes
    activations = routed * (2 * experts.hidden + 4 * experts.inter) * ACTIVATION_BYTES
    streamed = (weights + activations) / (acc.bytes_per_us * share_at(eff.moe_stream, count))
    time: Floats = eff.moe_start_us + overlapped(computed, streamed, MOE_SHARPNESS)
    return time


def moved_us(acc: Accelerator, moved_bytes: ArrayLike, start_us: float | None = None) -> Floats:
    """A kernel that only reads and writes ``moved_bytes``; what the cache keeps moves at its speed."""
    eff = acc.efficiency
    moved = np.asarray(moved_bytes, dtype=np.float64)
    near = np.minimum(moved, CACHE_SHARE * acc.cache_bytes)
    far = (moved - near) / share_at(eff.moved_stream, 1.0)
    start = eff.moved_start_us if start_us is None else start_us
    time: Floats = start + (near / CACHE_SPEEDUP + far) / acc.bytes_per_us
    return time


def all_reduce_us(acc: Accelerator, ranks: int, payload_bytes: ArrayLike) -> Floats:
    """``latency + 2 (N-1)/N · payload / (share · bandwidth)``, every link of a rank in use at once."""
    payload = np.asarray(payload_bytes, dtype=np.float64)
    if acc.link_bytes_per_us is None or ranks == 1:
        return np.zeros(payload.shape)
    reached = acc.link_bytes_per_us * share_at(acc.efficiency.link_share, 1.0)
    time: Floats = acc.link_latency_us + 2.0 * (ranks - 1) / ranks * payload / reached
    return time
