"""Tells single steps of the recorded runs apart by their stamps, and what their kernels do not explain.

    python benchmarks/recorded_steps.py            needs the recordings, as accuracy.py does
    python benchmarks/recorded_steps.py --print    the section on the screen only

An engine with two batches in flight stamps a request ``scheduled`` when the step before last has ended, and
``first token`` when the step that takes its prompt has: in between lie the step that was under way and the
step of the prompt, whole. Where the former holds decodes alone and the latter takes its prompts whole, both
are known but for the KV lengths; and since every running request gets a token a step, those follow from the
number of steps until any moment, which 300 requests of known length pin down.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from accuracy import ANCHOR, DENSE, LLAMA, MEASURED, RECORDED, markdown
from results_page import measured_against_recordings

from servesim.cost.build import Costs
from servesim.specs.hardware import NO_HOST_TIME, EngineSpec
from servesim.specs.instance_options import resolve
from servesim.specs.model import load_model
from servesim.specs.paths import bundles_from

if TYPE_CHECKING:
    from accuracy import Recorded
    from numpy.typing import NDArray

    from servesim.bench.recording import Recording
    from servesim.bench.validate import RecordedRun
    from servesim.cost.stage_cost import StageCost

    Floats = NDArray[np.float64]

RECORDINGS = (LLAMA, DENSE)
SAME_NS = 1_000_000
"""Stamps closer than this are of one step."""
BIN_NS = 500_000_000
BUCKET = 128
LONG = 4096
"""KV length in tokens at which the measured skew fits jump."""
SPREAD = (10, 50, 90)
WITH_SKEW = EngineSpec(**NO_HOST_TIME.model_dump(exclude_unset=True), skew_in_mixed_steps=True)


INTRODUCTION = """\
Single steps of the recorded runs, told apart by the requests' stamps, and what their kernels do not explain:
recorded time less that of the measured kernels, without host time, in ms. Each is a step that took whole
prompts beside decodes, together with the step of decodes before it. Median, and how many steps, by the step's
tokens. Made by `python benchmarks/recorded_steps.py`.
"""


@dataclass(frozen=True)
class Prompts:
    """A step that took whole prompts beside decodes, after one of decodes alone."""

    took_ns: int
    """Both steps together."""
    chunks: list[tuple[int, int]]
    """(tokens, tokens found in the prefix cache) of each prompt."""
    before: list[int]
    """KV lengths of the decodes of the step before."""
    beside: list[int]
    """KV lengths of the decodes beside the prompts."""

    @property
    def tokens(self) -> int:
        return len(self.beside) + sum(tokens for tokens, _ in self.chunks)

    def missing_ms(self, timer: StageCost) -> float:
        """How much longer they took than the timer says."""
        kernels_ns = timer.decode_ns(*shape(self.before)) + timer.mixed_ns(self.chunks, *shape(self.beside))
        return (self.took_ns - kernels_ns) / 1e6


def shape(lengths: list[int]) -> tuple[int, int, int, int]:
    return len(lengths), sum(lengths), min(lengths), max(lengths)


def steps_until(recording: Recording, when: NDArray[np.int64]) -> Floats:
    """How many steps had ended by each of the times: piecewise linear, so that every request fits best."""
    end = int(recording.last_token_ns.max())
    knots = np.arange(0, end + 2 * BIN_NS, BIN_NS)

    def bins(times: NDArray[np.int64]) -> Floats:
        """Share of every bin that has passed, shape (times, bins)."""
        return np.clip((times[:, None] - knots[None, :-1]) / BIN_NS, 0.0, 1.0)

    passed = bins(recording.last_token_ns) - bins(recording.first_token_ns)
    smooth = 0.05 * np.diff(np.eye(len(knots) - 1), axis=0)
    wanted = np.concatenate([recording.output_tokens - 1.0, np.zeros(len(smooth))])
    rates: Floats = np.linalg.lstsq(np.vstack([passed, smooth]), wanted, rcond=None)[0]
    return np.asarray(bins(when) @ rates)


def prompts_of(recording: Recording, hits: NDArray[np.int64]) -> list[Prompts]:
    """Every step that the stamps tell apart."""
    first, last, scheduled = recording.first_token_ns, recording.last_token_ns, recording.scheduled_ns
    assert scheduled is not None
    at_first, at_schedule = np.split(steps_until(recording, np.concatenate([first, scheduled])), 2)
    found: list[Prompts] = []
    seen: set[int] = set()
    for request in np.argsort(scheduled, kind="stable").tolist():
        start, end = int(scheduled[request]), int(first[request])
        together = np.flatnonzero(np.abs(scheduled - start) < SAME_NS)
        if request in seen:
            continue
        seen.update(together.tolist())
        others = (scheduled < start - SAME_NS) & (first > start)
        whole = bool((np.abs(first[together] - end) < SAME_NS).all())
        running = first < start
        before = np.flatnonzero(running & (last > start + SAME_NS))
        beside = np.flatnonzero(running & (last > end - SAME_NS))
        if not whole or others.any() or len(beside) == 0:
            continue
        done = np.rint(at_schedule[request] - at_first).astype(np.int64)
        lengths = recording.input_tokens + np.maximum(done, 0)  # in the cache when the step before begins
        chunks = [(int(recording.input_tokens[r] - hits[r]), int(hits[r])) for r in together.tolist()]
        found.append(Prompts(end - start, chunks, lengths[before].tolist(), (lengths[beside] + 1).tolist()))
    return found


def timers(run: RecordedRun) -> tuple[StageCost, StageCost]:
    """The measured kernels without host time: unequal lengths as shipped, and by the bundle's skew fit."""
    _, instance = run.cluster.instances[0]
    model = load_model(instance.model_name)
    options, made = resolve(run.options, instance, model), Costs(run.cluster)

    def timer(engine: EngineSpec) -> StageCost:
        return made.stage(instance.model_copy(update={"engine": engine}), model, options)

    return timer(NO_HOST_TIME), timer(WITH_SKEW)


def missing(recorded: Recorded) -> Floats:
    """One row a step: tokens, greatest KV length, ms missing as shipped, ms missing by the skew fit."""
    with bundles_from(MEASURED):
        run = recorded.run()
        hits = run.simulate(ANCHOR).result.requests["prefix_hit"]
        shipped, skewed = timers(run)
    budget = run.options.max_num_batched_tokens
    steps = [step for step in prompts_of(run.recording, hits) if step.tokens <= budget]
    return np.array(
        [(step.tokens, max(step.beside), step.missing_ms(shipped), step.missing_ms(skewed)) for step in steps]
    )


def section() -> str:
    """The section as Markdown."""
    found = {recorded.title: missing(recorded) for recorded in RECORDINGS}
    buckets = sorted({bucket for rows in found.values() for bucket in bucket_of(rows)})
    by_tokens = [
        [f"{int(bucket) - BUCKET + 1}–{int(bucket)}"]
        + [median_ms(rows[bucket_of(rows) == bucket, 2]) for rows in found.values()]
        for bucket in buckets
    ]
    by_length = []
    for title, rows in found.items():
        for name, chosen in (("up to", rows[:, 1] <= LONG), ("beyond", rows[:, 1] > LONG)):
            spread = [
                " / ".join(f"{ms:+.1f}" for ms in np.percentile(rows[chosen, c], SPREAD)) for c in (2, 3)
            ]
            by_length.append([title, f"{name} {LONG}", str(int(chosen.sum())), *spread])
    return "\n".join(
        [
            INTRODUCTION,
            *markdown(["tokens of the step", *found], by_tokens),
            "",
            "The same by the longest decode beside the prompt; P10 / median / P90 of the missing ms:",
            "",
            *markdown(
                [
                    "",
                    "longest decode",
                    "steps",
                    "the wait for the longest (shipped)",
                    "the bundle's skew fit",
                ],
                by_length,
            ),
        ]
    )


def bucket_of(rows: Floats) -> Floats:
    return np.ceil(rows[:, 0] / BUCKET) * BUCKET


def median_ms(values: Floats) -> str:
    return f"{np.median(values):+.1f} ({len(values)})" if len(values) else ""


def main() -> int:
    """Measure, and replace the section of RESULTS.md; returns the exit status."""
    return measured_against_recordings("recorded-steps", (__doc__ or "").splitlines()[0], section, RECORDED)


if __name__ == "__main__":
    sys.exit(main())
