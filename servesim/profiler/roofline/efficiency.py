"""How close kernels come to an accelerator's peak rates.

Every constant comes from the first of: the hardware file's ``roofline:``, the fit to the accelerator's own
kernel measurements, the median of the fits to all measured GPUs. ``fitted.json`` holds those fits;
``benchmarks/fit_roofline.py`` writes it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Collection

    from numpy.typing import ArrayLike, NDArray

    from servesim.specs.hardware import HardwareSpec, RooflineSpec

LAUNCH_US = 1.5
"""Time from one kernel to the next that the fitted starts include."""

Curve = float | tuple[tuple[float, float], ...]
"""A share of a peak rate: a number, or (size, share) points."""

FITTED = Path(__file__).with_name("fitted.json")


@dataclass(frozen=True, slots=True)
class Efficiency:
    """Starts in us and shares of peak rates; the fields of ``RooflineSpec``, every one settled.

    The defaults are for what the public measurements do not contain.
    """

    product_start_us: float
    product_compute: Curve
    product_compute_8bit: Curve
    product_stream: Curve
    decode_start_us: float
    decode_block_us: float
    decode_stream: Curve
    decode_stream_8bit: Curve
    prefill_start_us: float
    prefill_compute: Curve
    prefill_compute_8bit: Curve
    prefill_tail: float
    moe_compute: Curve
    moe_compute_8bit: Curve
    link_share: Curve
    moe_start_us: float = 28.0  # router, top-k, sort by expert, two grouped GEMMs, combine
    moe_stream: Curve = 0.85
    moved_start_us: float = 2.3
    moved_stream: Curve = 0.85


def share_at(curve: Curve, size: ArrayLike) -> NDArray[np.float64]:
    """The share at each size: linear in the size's logarithm between points, constant outside them."""
    sizes = np.maximum(np.asarray(size, dtype=np.float64), 1.0)
    if not isinstance(curve, tuple):
        return np.full(sizes.shape, float(curve))
    points = np.array(sorted(curve), dtype=np.float64)
    return np.interp(np.log(sizes), np.log(np.maximum(points[:, 0], 1.0)), points[:, 1])


@lru_cache(maxsize=1)
def fits() -> dict[str, Any]:
    """``fitted.json``: provenance, and ``gpus``: folder in the public measurements -> constant -> value."""
    found: dict[str, Any] = json.loads(FITTED.read_text(encoding="utf-8"))
    return found


def typical(without: Collection[str] = ()) -> Efficiency:
    """The medians over all measured GPUs that have the constant, but those in ``without``."""
    known = [gpu for folder, gpu in sorted(fits()["gpus"].items()) if folder not in without]
    names = sorted({name for gpu in known for name in gpu})
    middle = {name: median(gpu[name] for gpu in known if name in gpu) for name in names}
    return Efficiency(**{name: float(f"{value:.4g}") for name, value in middle.items()})


def efficiency_of(hardware: HardwareSpec) -> Efficiency:
    """The constants of one accelerator."""
    own = fits()["gpus"].get(hardware.silicon, {})
    return with_overrides(replace(typical(), **own), hardware.roofline)


def with_overrides(efficiency: Efficiency, stated: RooflineSpec) -> Efficiency:
    """``efficiency`` with what a hardware file states; ``launch_us`` moves the starts it does not state."""
    changes: dict[str, Any] = {}
    if stated.launch_us is not None:
        later_us = stated.launch_us - LAUNCH_US
        starts = [field.name for field in fields(Efficiency) if field.name.endswith("_start_us")]
        changes = {name: max(0.0, getattr(efficiency, name) + later_us) for name in starts}
    for field in fields(Efficiency):
        value = getattr(stated, field.name)
        if value is not None:
            changes[field.name] = value
    return replace(efficiency, **changes)
