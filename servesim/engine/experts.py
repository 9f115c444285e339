"""How tokens choose experts, when experts are spread over the ranks of an expert-parallel group.

Expert e of E lies on rank ``e * R // E`` of R. A policy says, for a number of tokens and a layer, how many
tokens choose each expert; ranks then work on (token, expert) pairs. What a rank's pairs are worth in tokens
is their number divided by the k experts that a token chooses.

``module:callable`` names a custom policy, ``policy(tokens, layer, experts, experts_per_token,
rng)``. It returns the number of tokens that choose each expert: ``experts`` whole numbers that add up to
``tokens * experts_per_token``, none above ``tokens``. ``rng`` is a seeded ``numpy.random.Generator``; a
policy that draws from nothing else gives the same run again. It is called once a wave and layer, or once a
wave and pipeline stage where one layer stands for all.

Every draw is decided by the seed, the wave and the first of the layers drawn for; what was asked before has
no say in it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from servesim.cost.expert_stage import ExpertLoads
from servesim.engine.custom_policy import call_custom_policy, load_custom_policy
from servesim.errors import InputError
from servesim.memory.traffic import expected_distinct_experts

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from servesim.cost.expert_stage import ExpertRouting
    from servesim.specs.model import ModelSpec

    Counts = NDArray[np.int64]
    ExpertPolicy = Callable[[int, int, int, int, np.random.Generator], Sequence[int]]

_ZIPF_EXPONENT = 1.0
"""Popularity of the i-th most popular expert: ``1 / i``, Zipf's law with exponent 1."""
_WORD = (1 << 64) - 1


def rank_loads(counts: Counts, ranks: int, experts_per_token: int) -> ExpertLoads:
    """Tokens per expert, shape (layers, experts) → what each of ``ranks`` ranks has to do."""
    by_rank = counts.reshape(len(counts), ranks, -1)
    return ExpertLoads(
        by_rank.sum(axis=2) / experts_per_token, np.count_nonzero(by_rank, axis=2).astype(np.float64)
    )


class Balanced:
    """BALANCED: every expert is equally popular, and every rank gets its even share.

    Of N tokens, a rank with E/R of the experts works on N/R tokens' worth and touches
    ``E/R (1 - (1 - k/E)^N)`` experts, the expected number.
    """

    varies = False

    def __init__(self, num_experts: int, experts_per_token: int, ranks: int) -> None:
        self._num_experts, self._experts_per_token, self._ranks = num_experts, experts_per_token, ranks

    def loads(self, tokens: int, layers: Sequence[int], wave: int) -> ExpertLoads:
        """See :class:`servesim.cost.expert_stage.ExpertRouting`."""
        del wave
        shape = len(layers), self._ranks
        (activated,) = expected_distinct_experts(
            np.array([tokens]), self._num_experts, self._experts_per_token
        )
        return ExpertLoads(
            np.full(shape, tokens / self._ranks), np.full(shape, float(activated) / self._ranks)
        )


class RoundRobin:
    """RR: experts take turns, token after token; each layer goes on where the one before it stopped."""

    varies = False

    def __init__(self, num_experts: int, experts_per_token: int, ranks: int) -> None:
        self._num_experts, self._experts_per_token, self._ranks = num_experts, experts_per_token, ranks

    def loads(self, tokens: int, layers: Sequence[int], wave: int) -> ExpertLoads:
        """See :class:`servesim.cost.expert_stage.ExpertRouting`."""
        del wave
        rounds, rest = divmod(tokens * self._experts_per_token, self._num_experts)
        starts = np.array(layers, dtype=np.int64)[:, None] * rest
        turns = (np.arange(self._num_experts) - starts) % self._num_experts
        return rank_loads(rounds + (turns < rest), self._ranks, self._experts_per_token)


class Drawn:
    """Every token draws its experts, none of them twice: RAND all alike, ZIPF some more often than others.

    ``popularity``: a weight for each expert. With ``shuffled``, each layer has its own order of experts,
    fixed by the seed: which experts are popular differs from layer to layer, and not from wave to wave.
    """

    varies = True

    def __init__(
        self,
        popularity: NDArray[np.float64],
        experts_per_token: int,
        ranks: int,
        seed: int,
        *,
        shuffled: bool,
    ) -> None:
        self._bounds = np.cumsum(popularity) / popularity.sum()
        self._bounds[-1] = 1.0
        self._alike = bool((popularity == popularity[0]).all())
        self._experts_per_token, self._ranks, self._seed = experts_per_token, ranks, seed
        self._shuffled = shuffled
        self._orders: dict[int, Counts] = {}

    def loads(self, tokens: int, layers: Sequence[int], wave: int) -> ExpertLoads:
        """See :class:`servesim.cost.expert_stage.ExpertRouting`."""
        experts = len(self._bounds)
        chosen = self._choose(len(layers) * tokens, _generator(self._seed, wave, layers[0]))
        layer = np.repeat(np.arange(len(layers)) * experts, tokens)
        counts = np.bincount((chosen + layer[:, None]).ravel(), minlength=len(layers) * experts)
        counts = counts.reshape(len(layers), experts)
        if self._shuffled:
            counts = np.stack([row[self._order(at)] for row, at in zip(counts, layers, strict=True)])
        return rank_loads(counts, self._ranks, self._experts_per_token)

    def _choose(self, rows: int, rng: np.random.Generator) -> Counts:
        """Experts of each row, shape (rows, k): one after the other, whoever is taken is drawn again.

        Drawing again is the same as drawing from those left, in proportion to their popularity.
        """
        experts, k = len(self._bounds), self._experts_per_token
        chosen = np.empty((rows, k), dtype=np.int64)
        if k == experts:
            chosen[:] = np.arange(experts)
            return chosen
        taken = np.zeros(rows * experts, dtype=bool)
        row_starts = np.arange(rows) * experts
        for choice in range(k):
            picks = self._pick(rng.random(rows))
            again = np.flatnonzero(taken[row_starts + picks])
            while len(again):
                new = self._pick(rng.random(len(again)))
                picks[again] = new
                again = again[taken[row_starts[again] + new]]
            taken[row_starts + picks] = True
            chosen[:, choice] = picks
        return chosen

    def _pick(self, uniform: NDArray[np.float64]) -> Counts:
        """Uniform numbers in [0, 1) → experts by popularity."""
        if self._alike:
            return (uniform * len(self._bounds)).astype(np.int64)
        return np.searchsorted(self._bounds, uniform, side="right")

    def _order(self, layer: int) -> Counts:
        """Expert → its place among the layer's experts by popularity."""
        if layer not in self._orders:
            keys = _generator(self._seed, 0, layer).random(len(self._bounds))
            self._orders[layer] = np.argsort(keys, kind="stable")
        return self._orders[layer]


class Custom:
    """A custom policy; the module's text says what it is called with."""

    varies = True

    def __init__(
        self, name: str, policy: ExpertPolicy, experts: int, experts_per_token: int, ranks: int, seed: int
    ) -> None:
        self._name, self._policy = name, policy
        self._experts, self._experts_per_token = experts, experts_per_token
        self._ranks, self._seed = ranks, seed

    def loads(self, tokens: int, layers: Sequence[int], wave: int) -> ExpertLoads:
        """See :class:`servesim.cost.expert_stage.ExpertRouting`.

        Raises:
            InputError: the policy returned something else than it must.
        """
        rows = []
        for layer in layers:
            rng = _generator(self._seed, wave, layer)
            wanted = tokens, layer, self._experts, self._experts_per_token, rng
            said = call_custom_policy(self._name, "--expert-routing-policy", self._policy, *wanted)
            rows.append(self._checked(said, tokens, layer))
        return rank_loads(np.stack(rows), self._ranks, self._experts_per_token)

    def _checked(self, said: Any, tokens: int, layer: int) -> Counts:
        pairs = tokens * self._experts_per_token
        wanted = (
            f"must be {self._experts} whole numbers, the tokens that choose each expert: 0 to {tokens} each, "
            f"{pairs} together"
        )
        try:
            counts = np.asarray(said)
        except ValueError:
            counts = np.empty(0)
        if counts.shape != (self._experts,) or counts.dtype.kind not in "iu":
            found = f"{type(said).__name__} of shape {counts.shape} and type {counts.dtype}"
        elif counts.min() < 0 or counts.max() > tokens or counts.sum() != pairs:
            found = f"numbers from {counts.min()} to {counts.max()} that add up to {counts.sum()}"
        else:
            return counts.astype(np.int64)
        raise InputError(
            f"--expert-routing-policy: {self._name} returned {found} for {tokens} tokens of layer {layer}; "
            f"{wanted}"
        )


def _zipf(experts: int, k: int, ranks: int, seed: int) -> Drawn:
    places = np.arange(1, experts + 1, dtype=np.float64)
    return Drawn(1.0 / places**_ZIPF_EXPONENT, k, ranks, seed, shuffled=True)


EXPERT_POLICIES: dict[str, Callable[[int, int, int, int], ExpertRouting]] = {
    "BALANCED": lambda experts, k, ranks, _: Balanced(experts, k, ranks),
    "RR": lambda experts, k, ranks, _: RoundRobin(experts, k, ranks),
    "RAND": lambda experts, k, ranks, seed: Drawn(np.ones(experts), k, ranks, seed, shuffled=False),
    "ZIPF": _zipf,
}
"""Name -> what makes the policy, from experts, experts of a token, ranks and a seed; one more needs its name
in :mod:`servesim.specs.options`."""


def expert_routing(policy: str, model: ModelSpec, ranks: int, seed: int) -> ExpertRouting:
    """How tokens of ``model`` choose among experts on ``ranks`` ranks.

    Args:
        policy: BALANCED, RR, RAND, ZIPF or ``module:callable``.
        model: says how many experts there are and how many a token chooses.
        ranks: a divisor of the number of experts.
        seed: of RAND, ZIPF and a custom policy.

    Raises:
        InputError: the module or the callable does not exist.
    """
    experts, k = model.num_experts, model.num_experts_per_tok
    if policy in EXPERT_POLICIES:
        return EXPERT_POLICIES[policy](experts, k, ranks, seed)
    arguments = "tokens, layer, experts, experts_per_token, rng"
    custom = load_custom_policy(policy, "--expert-routing-policy", ", ".join(EXPERT_POLICIES), arguments)
    return Custom(policy, custom, experts, k, ranks, seed)


def _generator(seed: int, wave: int, layer: int) -> np.random.Generator:
    """Random numbers of their own for every (seed, wave, layer): a counter-based generator keyed by them."""
    key = np.array([(seed ^ (layer << 40)) & _WORD, wave & _WORD], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key))
