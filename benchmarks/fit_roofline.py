"""Fits the roofline source's constants to every measured GPU and writes them where the source reads them.

    python benchmarks/fit_roofline.py          needs: pip install 'servesim[silicon]'

Each kernel family is fitted on its own to the least mean of |ln(predicted / measured)|, by a pattern search
that starts from the same place for every GPU; so the result does not depend on the machine or on the order.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from roofline_samples import Samples, log_errors, measured_hardware, samples_of

from servesim.profiler.roofline.efficiency import FITTED, Efficiency
from servesim.profiler.roofline.formulas import accelerator
from servesim.profiler.silicon.tables import LICENCE, PACKAGE, package_version

if TYPE_CHECKING:
    from servesim.specs.hardware import HardwareSpec

STARTING = Efficiency(
    product_start_us=5.0,
    product_compute=0.8,
    product_compute_8bit=0.6,
    product_stream=0.85,
    decode_start_us=10.0,
    decode_block_us=0.01,
    decode_stream=0.85,
    decode_stream_8bit=0.75,
    prefill_start_us=10.0,
    prefill_compute=0.6,
    prefill_compute_8bit=0.5,
    prefill_tail=0.8,
    moe_compute=0.5,
    moe_compute_8bit=0.4,
    link_share=0.4,
)
FITTED_TOGETHER = {
    "product": ("product_start_us", "product_compute", "product_compute_8bit", "product_stream"),
    "decode": ("decode_start_us", "decode_block_us", "decode_stream", "decode_stream_8bit"),
    "prefill": ("prefill_start_us", "prefill_compute", "prefill_compute_8bit", "prefill_tail"),
    "moe": ("moe_compute", "moe_compute_8bit"),
    "all_reduce": ("link_share",),
}
LEAST, MOST_SHARE, MOST = 1e-4, 1.5, 500.0


def fit(hardware: HardwareSpec, samples: list[Samples]) -> dict[str, float]:
    """The constants of one GPU; those that none of its samples depends on are left out."""
    found: dict[str, float] = {}
    for family, names in FITTED_TOGETHER.items():
        own = [some for some in samples if some.family == family]
        if own:
            known = [name for name in names if _matters(hardware, own, name)]
            found |= _search(hardware, own, known)
    return found


def _matters(hardware: HardwareSpec, samples: list[Samples], name: str) -> bool:
    changed = replace(STARTING, **{name: getattr(STARTING, name) * 0.9})
    before, after = (log_errors(samples, accelerator(hardware, eff)) for eff in (STARTING, changed))
    return bool((before != after).any())


def _search(hardware: HardwareSpec, samples: list[Samples], names: list[str]) -> dict[str, float]:
    """Every constant in turn a step up or down, by ever smaller factors."""

    def badness(values: dict[str, float]) -> float:
        acc = accelerator(hardware, replace(STARTING, **values))
        return float(np.abs(log_errors(samples, acc)).mean())

    best = {name: float(getattr(STARTING, name)) for name in names}
    least, step = badness(best), 0.4
    while step > 0.002:
        improved = False
        for name in names:
            for factor in (1 + step, 1 / (1 + step)):
                most = MOST if name.endswith(("_us", "_tail")) else MOST_SHARE
                value = min(max(best[name] * factor, LEAST), most)
                tried = {**best, name: value}
                if (found := badness(tried)) < least * (1 - 1e-6):
                    best, least, improved = tried, found, True
        step = step if improved else step / 2
    return {name: float(f"{value:.3g}") for name, value in best.items()}


def main() -> None:
    gpus = {}
    for hardware in measured_hardware():
        gpus[hardware.silicon] = fit(hardware, samples_of(hardware))
        print(
            f"{hardware.name:12}",
            " ".join(f"{name}={value:g}" for name, value in gpus[hardware.silicon].items()),
        )
    written = {
        "made_by": "benchmarks/fit_roofline.py",
        "data_package": PACKAGE,
        "data_version": package_version(),
        "data_licence": LICENCE,
        "gpus": dict(sorted(gpus.items())),
    }
    FITTED.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {FITTED}")


if __name__ == "__main__":
    main()
