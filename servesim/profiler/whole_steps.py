"""Corrects a layerwise bundle with whole steps that were measured, so that it gives their times.

A step is priced as fixed parts (all-reduces, which a run takes from the bundle or the cluster's links), what
depends on its tokens (D: dense layers and experts) and attention (A). Steps of as many tokens form a group.
Its *anchor*, the one with the least attention, scales D and A alike: g = (measured - fixed) / (D + A). In the
others of the group D is scaled by g, and what is left of the measured time is attention. So every step that
the correction goes by is met, but for lookups between the points of the tables.

Between measured steps the factors are interpolated: g over the logarithm of the tokens, those of attention
over the logarithms of context and number of decodes (or of history and chunk). Beyond them the nearest one
holds. Mixed rows of attention have the factors of both parts, weighted by their times. Steps that mix, or
whose decodes have unequal contexts, are not used: they check the result.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from servesim.cost.expert_stage import MoeTable
from servesim.cost.tables import Curve, Surface
from servesim.cost.terms import Role
from servesim.errors import InputError
from servesim.slotted import dataclass

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from servesim.cost.bundle import RankTables
    from servesim.cost.stage_cost import StageCost
    from servesim.cost.tables import Floats, Ints
    from servesim.profiler.forward import MeasuredStep

    Priced = Callable[[RankTables], StageCost]

_ROUNDS = 30
_CLOSE = 2e-4
"""Lookups between points, and GEMM rates that a hardware file states, make one pass miss a little. Each
further one leaves a part of that, until all steps are so close, or to the last of so many."""
PLAUSIBLE = (0.2, 5.0)
"""Factors outside belong to another model, GPU, format or degree."""
_FIXED = ("all_reduce",)


@dataclass(slots=True)
class Factors:
    """What the tables of a bundle are multiplied by."""

    dense: dict[int, float]
    """Tokens of a step -> factor of its dense layers and experts."""
    decodes: dict[tuple[int, int], float]
    """(decodes, context) -> factor of attention of decodes."""
    prompts: dict[tuple[int, int], float]
    """(tokens, history) of a chunk -> factor of attention of prompts."""


def forward_us(cost: StageCost, step: MeasuredStep) -> tuple[float, float, float]:
    """µs of a model's forward by a bundle: (fixed parts, what depends on tokens, attention).

    Without output logits, sampler and host, and without padding, as ``vllm bench forward`` measures.
    """
    fixed = by_tokens = 0.0
    for term in cost.terms:
        if term is cost.attention or term.role in (Role.HEAD, Role.HOST):
            continue
        for line in term.explain(step.shape, step.tokens):
            if line.layer in _FIXED:
                fixed += line.total_us
            else:
                by_tokens += line.total_us
    return fixed, by_tokens, cost.attention.ns(step.shape, step.tokens) / 1000.0


def check_steps(steps: Sequence[MeasuredStep]) -> tuple[list[MeasuredStep], list[MeasuredStep]]:
    """(steps that a correction goes by, steps that check it).

    Raises:
        InputError: there is no decode step, or no prompt, to go by.
    """
    used = [step for step in steps if step.contexts and step.decodes_alike]
    used += [step for step in steps if step.chunks and step.prompts_alike]
    if not any(step.contexts for step in used):
        raise InputError(
            "no case is of decodes alone with one context; measure some with --kv-len-jitter 0, such as "
            "--case d=32*1@8193"
        )
    if not any(step.chunks for step in used):
        raise InputError("no case is of prompts alone; measure some, such as --case p=2048")
    return used, [step for step in steps if step not in used]


def fitted(tables: RankTables, steps: Sequence[MeasuredStep], priced: Priced) -> tuple[Factors, RankTables]:
    """The factors that make a bundle meet the steps, and its tables with them.

    Args:
        tables: of the bundle.
        steps: to go by; see :func:`check_steps`.
        priced: what steps cost by given tables.

    Raises:
        InputError: a step is so far from the bundle that it cannot be of what the bundle is of.
    """
    groups: dict[int, list[MeasuredStep]] = {}
    for step in steps:
        groups.setdefault(step.tokens, []).append(step)
    factors = Factors({step.tokens: 1.0 for step in steps}, {}, {})
    for step in steps:
        table, place = _place(factors, step)
        table[place] = 1.0
    now = tables
    for _ in range(_ROUNDS):
        cost = priced(now)
        parts = {
            tokens: [(step, *forward_us(cost, step)) for step in group] for tokens, group in groups.items()
        }
        if all(abs(sum(us) / step.us - 1.0) < _CLOSE for group in parts.values() for step, *us in group):
            break
        for tokens, group in parts.items():
            _fit_group(factors, tokens, group)
        now = scaled(tables, factors)
    return factors, now


def _fit_group(factors: Factors, tokens: int, group: list[tuple[MeasuredStep, float, float, float]]) -> None:
    """Take the steps of as many tokens into the factors, which the parts given hold already."""
    anchor, fixed, dense, attention = min(group, key=lambda one: one[3] / (one[2] + one[3]))
    both = (anchor.us - fixed) / (dense + attention)
    factors.dense[tokens] = _plausible(factors.dense[tokens] * both, anchor)
    for step, fixed, dense, attention in group:
        more = both if step is anchor else (step.us - fixed - both * dense) / attention
        table, place = _place(factors, step)
        table[place] = _plausible(table[place] * more, step)


def _place(factors: Factors, step: MeasuredStep) -> tuple[dict[tuple[int, int], float], tuple[int, int]]:
    """Which factor of attention a step goes by."""
    if step.chunks:
        return factors.prompts, step.chunks[0]
    return factors.decodes, (len(step.contexts), sum(step.contexts) // len(step.contexts))


def _plausible(factor: float, step: MeasuredStep) -> float:
    low, high = PLAUSIBLE
    if not low <= factor <= high:
        raise InputError(
            f"{step.where}: {step.name} ({step.batch}) took {step.us:g} us, for which a part of the bundle "
            f"would have to be multiplied by {factor:.2f}; {low:g} to {high:g} is allowed. Is it of another "
            "model, GPU, number format or --tp?"
        )
    return factor


# ---------------------------------------------------------------------- factors between measured steps


def _over_log(known: Mapping[int, float], wanted: Ints | Floats) -> Floats:
    """Factors interpolated over the logarithm (of 1 + the number), held at both ends."""
    places = sorted(known)
    result: Floats = np.interp(
        np.log1p(np.asarray(wanted, dtype=np.float64)),
        np.log1p(np.array(places, dtype=np.float64)),
        [known[place] for place in places],
    )
    return result


def _over_two(known: Mapping[tuple[int, int], float], first: Floats, second: Floats) -> Floats:
    """Factors at every pair of ``first`` and ``second``, shape (first, second): along the second number of
    each measured first one, then between those."""
    rows: dict[int, dict[int, float]] = {}
    for (one, other), factor in known.items():
        rows.setdefault(one, {})[other] = factor
    along = {one: _over_log(row, second) for one, row in rows.items()}
    columns = [
        _over_log({one: float(values[place]) for one, values in along.items()}, first)
        for place in range(len(second))
    ]
    return np.stack(columns, axis=1)


def scaled(tables: RankTables, factors: Factors) -> RankTables:
    """The tables times the factors; those over sequences (output logits, sampler) stay as they are."""
    moe = tables.moe
    if moe is not None:
        tokens, _ = moe.surface.axes
        by_tokens = _over_log(factors.dense, tokens * moe.split)[:, None]
        moe = MoeTable(Surface(moe.surface.axes, moe.surface.tensor * by_tokens), moe.source, moe.split)
    return replace(
        tables,
        dense={
            layer: Curve(curve.points, curve.values * _over_log(factors.dense, curve.points))
            for layer, curve in tables.dense.items()
        },
        attention=_scaled_attention(tables.attention, factors),
        attentions={label: _scaled_attention(table, factors) for label, table in tables.attentions.items()},
        moe=moe,
    )


def _scaled_attention(surface: Surface, factors: Factors) -> Surface:
    """A table over (chunk, decodes, history, context), axes that begin with 0 where there is none."""
    chunks, decodes, histories, contexts = (axis.astype(np.float64) for axis in surface.axes)
    tensor = surface.tensor
    of_prompts = _over_two(factors.prompts, chunks, histories)[:, None, :, None]
    of_decodes = _over_two(factors.decodes, decodes, contexts)[None, :, None, :]
    prompts, alone = tensor[:, :1, :, :1], tensor[:1, :, :1, :]
    prompts = np.where((chunks > 0)[:, None, None, None], prompts, 0.0)
    alone = np.where((decodes > 0)[None, :, None, None], alone, 0.0)
    both = prompts + alone
    share = np.divide(prompts, both, out=np.zeros_like(both), where=both > 0)
    return Surface(surface.axes, tensor * (share * of_prompts + (1.0 - share) * of_decodes))
