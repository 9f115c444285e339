"""Fitting the host constants of a machine, and nothing else, on one recorded run.

The two constants (µs of host time that every step with a prefill chunk, and every step of decodes alone, adds
to the kernels) are chosen so that the means of TTFT, TPOT and latency come out as recorded: the least sum of
squares of their relative errors. A scheduler is chaotic in the small (a microsecond more, and a request joins
another step), so the errors of a single run jump by a few tenths of a percent. Each round therefore runs nine
simulations around the present guess, lays a plane through each metric's errors, and moves to the planes'
least squares; the next round looks closer. The fit is deterministic.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from servesim.bench.agreement import METRICS
from servesim.slotted import dataclass

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from servesim.bench.agreement import Agreement
    from servesim.bench.validate import RecordedRun
    from servesim.specs.hardware import EngineSpec, HardwareSpec

_FIRST_SPACING_US = (4000.0, 400.0)
_LAST_SPACING_US = (500.0, 50.0)
_MOST_ROUNDS = 12
_MAX_US = 1e6
_ROUNDED_TO_US = 10.0  # the errors' jumps leave no meaning to finer digits


@dataclass(slots=True, frozen=True)
class Calibration:
    """Host constants that were fitted, with the run before and after."""

    engine: EngineSpec
    before: Agreement
    """Without the constants."""
    after: Agreement
    simulations: int


def calibrate(run: RecordedRun, anchor: str = "queued", *, tail: bool = True) -> Calibration:
    """Fit the host constants on a recorded run.

    Unequal lengths in mixed steps cost what the tail says, whatever the hardware file wants; ``tail=False``
    makes them cost nothing.

    Raises:
        InputError: the recording or what it is run with does not fit.
    """
    from servesim.specs.hardware import NO_HOST_TIME, EngineSpec

    simulations = 0

    def engine_of(constants: NDArray[np.float64]) -> EngineSpec:
        prefill_us, decode_us = (_ROUNDED_TO_US * np.rint(constants / _ROUNDED_TO_US)).tolist()
        return EngineSpec(
            prefill_step_overhead_us=prefill_us,
            decode_step_overhead_us=decode_us,
            skew_in_mixed_steps=False,
            tail_in_mixed_steps=tail,
        )

    def errors(constants: NDArray[np.float64]) -> list[float]:
        nonlocal simulations
        simulations += 1
        agreement = run.simulate(anchor, engine_of(constants))
        return [agreement.error(metric) for metric in METRICS]

    before = run.simulate(anchor, NO_HOST_TIME)
    centre, spacing = np.array(_FIRST_SPACING_US), np.array(_FIRST_SPACING_US)
    for _ in range(_MOST_ROUNDS):
        # The constants are never negative, so near zero the nine points are not centred.
        points = np.array(
            [
                np.clip(centre + spacing * (i, j), 0.0, _MAX_US)
                for i in (-1.0, 0.0, 1.0)
                for j in (-1.0, 0.0, 1.0)
            ]
        )
        found = _least_squares(points, np.array([errors(point) for point in points]))
        nearer = np.clip(found, np.maximum(centre - 2 * spacing, 0.0), centre + 2 * spacing)
        inside = bool((np.abs(nearer - centre) <= spacing).all())
        centre = nearer
        if inside:  # otherwise the planes hold for another place: go there first, at the same distance
            if (spacing <= _LAST_SPACING_US).all():
                break
            spacing = np.maximum(spacing / 2, _LAST_SPACING_US)
    engine = engine_of(centre)
    return Calibration(engine, before, run.simulate(anchor, engine), simulations + 2)


def calibrated_hardware(run: RecordedRun, fit: Calibration, anchor: str, machine: str) -> HardwareSpec:
    """The hardware of the recorded cluster with the fitted constants and where they come from."""
    from servesim.specs.hardware import CalibrationSpec, load_hardware

    _, instance = run.cluster.instances[0]
    return load_hardware(instance.hardware).model_copy(
        update={
            "engine": fit.engine,
            "calibration": CalibrationSpec(
                machine=machine,
                recording=run.recording.name,
                engine=run.recording.engine,
                model=instance.model_name,
                bundle=fit.after.result.instances[0].bundle_source,
                requests=len(run.recording),
                anchor=anchor,
                error_percent=_percent(fit.after),
                uncalibrated_error_percent=_percent(fit.before),
            ),
        }
    )


def hardware_yaml(hardware: HardwareSpec) -> str:
    """The text of a hardware file."""
    import yaml

    content = hardware.model_dump(mode="json", exclude_none=True, exclude_defaults=True)
    content["engine"] = hardware.engine.model_dump(mode="json")
    text: str = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=100)
    return (
        "# Host constants fitted by `servesim bench calibrate`. They belong to the machine named under\n"
        f"# `calibration`, and to no other.\n{text}"
    )


def _percent(agreement: Agreement) -> dict[str, float]:
    return {metric: round(100 * agreement.error(metric), 3) for metric in METRICS}


def _least_squares(points: NDArray[np.float64], errors: NDArray[np.float64]) -> NDArray[np.float64]:
    """Where the planes through ``errors`` (points, metrics) over ``points`` (points, 2) are closest to zero.

    No coordinate is negative: one that would be is set to zero and the other found anew.
    """
    scale = np.maximum(np.ptp(points, axis=0), 1.0)
    design = np.column_stack([np.ones(len(points)), points / scale])
    planes = np.linalg.lstsq(design, errors, rcond=None)[0]  # (3, metrics)
    offset, slopes = planes[0], planes[1:].T
    best = np.linalg.lstsq(slopes, -offset, rcond=None)[0]
    if (best >= 0).all():
        return np.asarray(best * scale)
    candidates = [np.zeros(2)]
    for axis in (0, 1):
        slope = slopes[:, axis]
        value = float(-(slope @ offset) / (slope @ slope)) if slope.any() else 0.0
        if value > 0:
            candidates.append(np.eye(2)[axis] * value)
    best = min(candidates, key=lambda point: float(((offset + slopes @ point) ** 2).sum()))
    return np.asarray(best * scale)
