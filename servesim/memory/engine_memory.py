"""What vLLM takes on a GPU beside weights and KV cache: estimates from start-up logs, with their spread.

A start-up log gives the parts in GiB with two decimals, or only the KV cache that was left, from which the
sum of the parts follows. The start-ups are listed in ``benchmarks/start_ups.csv``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from servesim.errors import InputError
from servesim.memory.sizing import GIB

if TYPE_CHECKING:
    from collections.abc import Sequence

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
    numbers = (version or _DEFAULT_VERSION).split(".")
    if len(numbers) < 2 or not all(number.isdecimal() for number in numbers[:2]):
        raise InputError(f"'{version}' is not a version of vLLM; must be numbers such as 0.19 or 0.19.1")
    wanted = int(numbers[0]), int(numbers[1])
    return next(each for each in reversed(_VERSIONS) if each.since <= wanted)


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
