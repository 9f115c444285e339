"""A bundle corrected with measured whole steps: which bundle, its new content, and what it says of itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from servesim.cost.build import Costs
from servesim.cost.bundle import ATTENTION_AXES, SAME_AS
from servesim.cost.bundle_csv import read_numbers
from servesim.cost.identity import FORWARD, ON_DEMAND, source_of
from servesim.errors import InputError
from servesim.profiler.bundle_writer import BundleContent
from servesim.profiler.forward import UNSTEADY_PERCENT
from servesim.profiler.whole_steps import check_steps, fitted, forward_us
from servesim.slotted import dataclass
from servesim.specs.instance_options import resolve
from servesim.specs.model import load_model

if TYPE_CHECKING:
    from collections.abc import Sequence

    from servesim.cost.bundle import Bundle, RankTables
    from servesim.cost.stage_cost import StageCost
    from servesim.profiler.bundle_writer import Row
    from servesim.profiler.forward import MeasuredStep
    from servesim.specs.cluster import ClusterSpec
    from servesim.specs.options import RuntimeOptions


@dataclass(frozen=True, slots=True)
class StepFit:
    """One measured step beside the bundle, before and after."""

    step: MeasuredStep
    before_us: float
    after_us: float
    checks: bool
    """Whether the correction does not go by it."""

    def error(self, us: float) -> float:
        """How far ``us`` is from what was measured, as a share."""
        return us / self.step.us - 1.0


@dataclass(frozen=True, slots=True)
class Correction:
    """What came of it."""

    base: Bundle
    tp: int
    fits: list[StepFit]
    tables: RankTables
    content: BundleContent


def correct(
    cluster: ClusterSpec, options: RuntimeOptions, steps: Sequence[MeasuredStep], vllm_version: str
) -> Correction:
    """Correct the bundle of a cluster's one instance so that it gives the measured steps.

    Args:
        cluster: of one instance, which says model, hardware and degree.
        options: its dtypes.
        steps: as measured.
        vllm_version: that measured them.

    Raises:
        InputError: (MissingFileError among them) there is no bundle to correct, it is corrected already, or
            the steps are not of it.
    """
    _, spec = cluster.instances[0]
    model = load_model(spec.model_name)
    chosen = resolve(options, spec, model)
    base = Costs(cluster).bundle(spec, model, chosen)
    if source_of(base.meta) == FORWARD:
        raise InputError(
            f"{base.folder}: is corrected with measured steps already; remove that folder, then import all "
            "files of this model in one command"
        )
    tp = spec.tp_size
    tables = base.tables(tp)

    def priced(changed: RankTables) -> StageCost:
        costs = Costs(cluster)
        costs.use(spec, model, chosen, base.with_tables(tp, changed))
        return costs.stage(spec, model, chosen)

    used, checks = check_steps(steps)
    _, changed = fitted(tables, used, priced)
    before, after = priced(tables), priced(changed)
    fits = [
        StepFit(step, sum(forward_us(before, step)), sum(forward_us(after, step)), step in checks)
        for step in steps
    ]
    meta = _meta(base, tp, fits, vllm_version)
    return Correction(base, tp, fits, changed, BundleContent(meta, _rows(base, tp, tables, changed)))


# ---------------------------------------------------------------------- what it says of itself


def covered(steps: Sequence[MeasuredStep]) -> dict[str, list[int]]:
    """The ranges that steps to go by span: name -> [least, greatest]."""
    decodes = [step for step in steps if step.contexts]
    prompts = [chunk for step in steps for chunk in step.chunks]
    spans = {
        "decodes": [len(step.contexts) for step in decodes],
        "decode_contexts": [context for step in decodes for context in step.contexts],
        "prompt_tokens": [tokens for tokens, _ in prompts],
        "prompt_history": [before for _, before in prompts],
        "step_tokens": [step.tokens for step in steps],
    }
    return {name: [min(values), max(values)] for name, values in spans.items()}


def _meta(base: Bundle, tp: int, fits: Sequence[StepFit], vllm_version: str) -> dict[str, Any]:
    used = [fit.step for fit in fits if not fit.checks]
    spans = covered(used)
    worst = max(abs(fit.error(fit.after_us)) for fit in fits)
    dropped = (
        "files",
        SAME_AS,
        "attention_grid",
        "source",
        "confidence",
        "measured_up_to",
        "vllm_version",
        ON_DEMAND,
    )
    kept = {key: value for key, value in base.meta.items() if key not in dropped}
    longest = max(tokens + before for step in used for tokens, before in step.chunks)
    routing = sorted({fit.step.routing for fit in fits if fit.step.routing not in ("", "real")})
    return {
        "source": FORWARD,
        "corrects": source_of(base.meta),
        "confidence": f"{source_of(base.meta)} tables corrected with {len(used)} measured whole steps",
        "vllm_version": vllm_version,
        **kept,
        "tp_degrees": [tp],
        "measured_up_to": {
            "prompt_tokens": longest,
            "decode_kv": {tp: spans["decode_contexts"][1]},
        },
        "whole_steps": {
            "covers": spans,
            "largest_error_percent": round(100 * worst, 2),
            **({"expert_routing": routing} if routing else {}),
            "steps": [
                {
                    "batch": fit.step.batch,
                    "measured_us": round(fit.step.us, 1),
                    "before_us": round(fit.before_us, 1),
                    "after_us": round(fit.after_us, 1),
                    **({"checks": True} if fit.checks else {}),
                }
                for fit in fits
            ],
        },
    }


def told(correction: Correction) -> list[str]:
    """What the steps cover and what lies outside, in lines for people."""
    used = [fit.step for fit in correction.fits if not fit.checks]
    spans = {name: _span(*ends) for name, ends in covered(used).items()}
    lines = [
        f"covers   decodes: {spans['decodes']} at contexts of {spans['decode_contexts']} tokens; prompts of "
        f"{spans['prompt_tokens']} tokens with {spans['prompt_history']} before them; steps of "
        f"{spans['step_tokens']} tokens",
        "outside  beyond these the nearest correction holds; output logits, sampling and host time are no "
        "part of such a measurement and stay as they were",
    ]
    others = [tp for tp in (correction.base.meta.get("tp_degrees") or []) if tp != correction.tp]
    if others:
        lines.append(f"outside  other degrees (tp {', '.join(map(str, others))}): not corrected")
    if not any(step.chunks and step.chunks[0][1] for step in used):
        lines.append("outside  chunks behind others and prefix hits: no step has prompts with history")
    if not any(fit.checks for fit in correction.fits):
        lines.append("outside  steps that mix prompts and decodes: none was measured, so none checks the sum")
    lines += [
        f"unsteady {fit.step.name}: its samples are {fit.step.spread_percent:.1f} % apart; measure it again"
        for fit in correction.fits
        if fit.step.spread_percent > UNSTEADY_PERCENT
    ]
    return lines


def _span(low: int, high: int) -> str:
    return f"{low}" if low == high else f"{low} to {high}"


# ---------------------------------------------------------------------- tables as rows


def _rows(base: Bundle, tp: int, before: RankTables, after: RankTables) -> dict[tuple[int, str], list[Row]]:
    """Every table of the degree, with the rows that the bundle has."""
    tables: dict[tuple[int, str], list[Row]] = {
        (tp, "dense.csv"): _curve_rows(after.dense),
        (tp, "per_sequence.csv"): _curve_rows(after.per_sequence),
    }
    for label in before.attentions or ("attention",):
        surface = after.attentions.get(label, after.attention)
        keys = read_numbers(base.file(f"tp{tp}/{label}.csv"), (*ATTENTION_AXES, "time_us"))[:, :4]
        us = surface.at(*keys.T)
        tables[tp, f"{label}.csv"] = [
            (int(chunk), int(history), int(decodes), int(context), float(time))
            for (chunk, decodes, history, context), time in zip(keys, us, strict=True)
        ]
    if after.moe is not None:
        split, surface = after.moe.split, after.moe.surface
        tokens, experts = (axis.astype(np.int64) for axis in surface.axes)
        tables[tp, "moe.csv"] = [  # rows of whole experts become those of this degree
            (int(t) * split, int(e) * split, float(surface.tensor[i, j]))
            for i, t in enumerate(tokens)
            for j, e in enumerate(experts)
        ]
    if after.collectives:
        tables[tp, "comm.csv"] = [
            (name, ranks, int(size), float(us))
            for (name, ranks), curve in after.collectives.items()
            for size, us in zip(curve.points, curve.values, strict=True)
        ]
    if before.skew is not None:
        tables[tp, "skew_fit.csv"] = _skew_rows(base, tp)
    return tables


def _curve_rows(curves: dict[str, Any]) -> list[Row]:
    return [
        (layer, int(point), float(us))
        for layer, curve in curves.items()
        for point, us in zip(curve.points, curve.values, strict=True)
    ]


def _skew_rows(base: Bundle, tp: int) -> list[Row]:
    name = f"tp{tp}/skew_fit.csv"
    if not base.file(name).is_file():
        raise InputError(
            f"{base.folder}: its skew fit is not in {name}, so it cannot be taken over; correct a bundle of "
            "--source silicon or roofline"
        )
    _, *lines = base.file(name).read_text(encoding="utf-8").splitlines()
    return [tuple(line.split(",")) for line in lines]
