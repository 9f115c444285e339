"""The memory of an NPU, and what vLLM takes of it beside weights and KV cache: estimates from start-up logs.

A start-up log gives the parts in GiB with two decimals, or only the KV cache that was left, from which the
sum of the parts follows. The start-ups are listed in ``benchmarks/start_ups.csv``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from servesim.errors import InputError
from servesim.memory.ledger import Memory
from servesim.memory.sizing import GIB
from servesim.slotted import dataclass

if TYPE_CHECKING:
    from collections.abc import Sequence

    from servesim.specs.cluster import InstanceSpec
    from servesim.specs.hardware import HardwareSpec
    from servesim.specs.model import ModelSpec

_HALF = 2  # bytes of a 16-bit float


class Estimate(NamedTuple):
    """A number of bytes: least, likely, most."""

    low: int
    likely: int
    high: int


def total(parts: Sequence[Estimate]) -> Estimate:
    """The sum of the parts; their ends are taken to come together."""
    return Estimate(*(sum(values) for values in zip(*parts, strict=True)))


def exactly(value_bytes: int) -> Estimate:
    """An estimate that is none."""
    return Estimate(value_bytes, value_bytes, value_bytes)


@dataclass(frozen=True, slots=True)
class EngineMemory:
    """What start-ups of a range of vLLM versions have in common."""

    since: tuple[int, int]
    """First version (major, minor) of the range."""
    versions: str
    """The range in words."""
    logit_bytes: tuple[float, float, float]
    """Of the sampler, per logit of ``max_num_seqs`` rows of the vocabulary: least, likely, most."""
    graph_gib: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Of CUDA graphs, as far as they are taken from the KV cache."""


_VERSIONS = (
    # A100 and A6000, 256 sequences, vLLM 0.10.1: what is left after the other parts is 12 to 17 bytes a logit
    # at TP 1, and 4 to 6 at TP 2 and 4. Some of the difference may be NCCL's, which no log names there.
    EngineMemory((0, 0), "0.10", (4, 10, 17)),
    # H100, 1024 sequences: 38.2 to 38.6 bytes at vocabularies of 128,256, 151,936 and 201,088. RTX 4090, 256
    # sequences (vLLM 0.19): 33.
    EngineMemory((0, 11), "0.11 to 0.20", (33, 38.3, 39)),
    # vLLM 0.21 began to take CUDA graphs from the KV cache (so says its start-up message), at least 1 MiB for
    # each of some 100 graphs. What they take is from no start-up known here, and neither is what a sampler of
    # FlashInfer saves, which these versions choose where they can.
    EngineMemory((0, 21), "0.21 and later", (10, 38.3, 39), (0.1, 0.5, 1.5)),
)
_DEFAULT_VERSION = "0.19"
_NON_TORCH_GIB = (0.05, 0.13, 0.25)
"""CUDA context and libraries of a GPU that works alone: 0.13 in the logs of H100 start-ups."""
_NON_TORCH_NCCL_GIB = (0.3, 0.545, 0.6)
"""The same with NCCL: 0.54 and 0.55 on H100; on A100 (vLLM 0.10.1) no more than about 0.3."""
_UNSEEN_SHARE = 0.5
"""No start-up is known in which the MLP's activations are the peak; they may be wrong by this share."""


def engine_memory(version: str | None) -> EngineMemory:
    """The estimates for a version such as ``0.19.1``; None: for vLLM 0.19.

    Raises:
        InputError: it is no version number.
    """
    wanted = engine_version(version)
    return next(each for each in reversed(_VERSIONS) if each.since <= wanted)


def engine_version(version: str | None) -> tuple[int, int]:
    """(major, minor) of a version such as ``0.19.1``; None: of vLLM 0.19.

    Raises:
        InputError: it is no version number.
    """
    numbers = (version or _DEFAULT_VERSION).split(".")
    if len(numbers) < 2 or not all(number.isdecimal() for number in numbers[:2]):
        raise InputError(f"'{version}' is not a version of vLLM; must be numbers such as 0.19 or 0.19.1")
    return int(numbers[0]), int(numbers[1])


def activations(
    model: ModelSpec, batched_tokens: int, num_seqs: int, tp: int, ep: int, engine: EngineMemory
) -> Estimate:
    """Peak of activations in bytes, as vLLM's start-up profile runs them: the sampler's or the MLP's.

    Sampler: some bytes a logit (16 and 32 bit, sorted values with their indices, probabilities) for
    ``num_seqs`` rows of the whole vocabulary, beside the hidden states in 16 bit. MLP: :func:`_mlp_bytes`.
    """
    logits = min(num_seqs, batched_tokens) * model.vocab_size
    hidden = _HALF * batched_tokens * model.hidden_size
    mlp = _mlp_bytes(model, batched_tokens, tp, ep)
    shares = (1 - _UNSEEN_SHARE, 1.0, 1 + _UNSEEN_SHARE)
    pairs = zip(engine.logit_bytes, shares, strict=True)
    return Estimate(*(max(int(each * logits) + hidden, int(share * mlp)) for each, share in pairs))


def _mlp_bytes(model: ModelSpec, tokens: int, tp: int, ep: int) -> int:
    """Dense: gate, up and their product beside the residual stream (5 hidden states), in 16 bit. Experts: the
    two buffers of vLLM's fused kernel, one of them as wide as the hidden state, for every chosen expert."""
    hidden = model.hidden_size
    if not model.is_moe:
        return _HALF * tokens * (3 * model.intermediate_size // tp + 5 * hidden)
    width = model.moe_intermediate_size // (1 if ep > 1 else tp)
    return _HALF * tokens * (model.num_experts_per_tok * (max(2 * width, hidden) + width) + 5 * hidden)


def outside_torch(*, alone: bool) -> Estimate:
    """Bytes of CUDA context and libraries; a GPU that is not ``alone`` has NCCL's buffers as well."""
    return _of_gib(_NON_TORCH_GIB if alone else _NON_TORCH_NCCL_GIB)


def cuda_graphs(engine: EngineMemory, *, captured: bool) -> Estimate:
    """Bytes of CUDA graphs that the KV cache does not get."""
    return _of_gib(engine.graph_gib) if captured else exactly(0)


def _of_gib(sizes_gib: tuple[float, float, float]) -> Estimate:
    return Estimate(*(int(size * GIB) for size in sizes_gib))


_SIZE_TOLERANCE = 0.002
_SPEED_TOLERANCE = 0.01


def npu_bytes(instance: InstanceSpec, hardware: HardwareSpec) -> int:
    """Memory of one NPU in bytes; that somebody says it was checked with the cluster."""
    stated = instance.npu_mem.mem_size
    size_gib = hardware.memory_gib if stated is None else stated
    assert size_gib is not None
    return int(size_gib * GIB)


def npu_memory(instance: InstanceSpec, hardware: HardwareSpec, where: str) -> Memory:
    """The memory of one NPU, where its speed counts.

    Raises:
        InputError: nobody says its bandwidth.
    """
    npu = instance.npu_mem
    bandwidth_gbs = hardware.memory_bandwidth_gbs if npu.mem_bw is None else npu.mem_bw
    if bandwidth_gbs is None:
        raise InputError(
            f"{where}: npu_mem.mem_bw: is missing; required where weights are streamed, as "
            f"configs/hardware/{instance.hardware}.yaml does not say memory_bandwidth_gbs"
        )
    return Memory(
        f"memory of an NPU of {where}", "rank", npu_bytes(instance, hardware), bandwidth_gbs, npu.mem_latency
    )


def differences(instance: InstanceSpec, hardware: HardwareSpec) -> list[str]:
    """Lines about what the cluster config says of the memory and the hardware file does not."""
    lines = []
    stated, known = instance.npu_mem.mem_size, hardware.memory_gib
    if stated is not None and known is not None and abs(stated / known - 1) > _SIZE_TOLERANCE:
        lines.append(
            f"npu_mem.mem_size is {stated:g} GiB, and an {instance.hardware} has {known:.2f} (its hardware "
            "file)"
        )
    if (priced := priced_hardware(instance, hardware)) is not hardware:
        lines.append(
            f"npu_mem.mem_bw is {priced.memory_bandwidth_gbs:g} GB/s, and an {instance.hardware} has "
            f"{hardware.memory_bandwidth_gbs:g} (its hardware file): kernel times are computed for the former"
        )
    return lines


def priced_hardware(instance: InstanceSpec, hardware: HardwareSpec) -> HardwareSpec:
    """The hardware that an instance's kernel times are of.

    That of its file; where nobody measured it, so that kernel times are computed from peak rates, with the
    memory bandwidth of the cluster config.
    """
    stated = instance.npu_mem.mem_bw
    if hardware.silicon is not None or stated is None or not _differs(stated, hardware):
        return hardware
    name = f"{hardware.name}-{stated:g}GBs"
    return hardware.model_copy(update={"name": name, "memory_bandwidth_gbs": stated})


def _differs(bandwidth_gbs: float, hardware: HardwareSpec) -> bool:
    known = hardware.memory_bandwidth_gbs
    return known is not None and abs(bandwidth_gbs / known - 1) > _SPEED_TOLERANCE


def check_speed(instance: InstanceSpec, hardware: HardwareSpec, where: str) -> None:
    """Refuse a bandwidth or latency that no time would follow: measured kernel times are of the hardware as
    its file describes it. To be asked of instances that keep everything on their NPUs.

    Raises:
        InputError: one of them differs from the hardware file.
    """
    npu, known = instance.npu_mem, hardware.memory_bandwidth_gbs
    why = f"kernel times are those of a bundle for {instance.hardware}"
    way_out = (
        "leave it out, or describe the other memory in a hardware file of its own and make a bundle for it "
        "with `servesim profile --source roofline`"
    )
    if npu.mem_bw is not None and hardware.silicon is not None and _differs(npu.mem_bw, hardware):
        raise InputError(
            f"{where}: npu_mem.mem_bw: {npu.mem_bw:g} is not allowed; must be {known:g} GB/s, as {why} "
            f"and do not follow it; {way_out}"
        )
    if npu.mem_latency and known is not None:
        raise InputError(
            f"{where}: npu_mem.mem_latency: {npu.mem_latency:g} is not allowed; must be 0, as {why}, "
            f"which hold the latency of its memory; {way_out}"
        )
