"""Whole-step times of two bundles side by side: the stated steps on which a derived bundle is judged.

Run as a script it prints the table: ``python -m tests.profiler.whole_steps [--root profiler/perf]``. The
measured side are recorded layerwise profiles (see tests/recorded.py); collectives, host time and skew are
left out, and steps are not padded, so that only kernel times are compared.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

import numpy as np

from servesim.cost.bundle import Bundle
from servesim.cost.stage_cost import StageCost
from servesim.cost.step_terms import stage_terms
from servesim.cost.terms import whole_model
from servesim.specs.architecture import load_architecture
from servesim.specs.hardware import EngineSpec
from servesim.specs.model import load_model
from servesim.specs.reading import read_yaml_object
from tests.recorded import recorded_path

HARDWARE = "RTXPRO6000"
MODELS = ("meta-llama/Llama-3.1-8B", "Qwen/Qwen3-32B", "Qwen/Qwen3-30B-A3B-Instruct-2507")

Step = tuple[tuple[int, int] | None, int, int]
"""A chunk (tokens, history) or None, number of decodes, their KV length."""

STEPS: dict[str, list[Step]] = {
    "decode": [(None, n, kv) for n in (1, 8, 32, 128) for kv in (256, 512, 1024, 2048, 4096, 8192)],
    "prefill": [((c, h), 0, 0) for c in (128, 256, 512, 1024, 2048) for h in (0, 512, 2048, 8192)],
    "mixed": [
        ((c, h), n, kv)
        for c in (128, 512, 1024, 1900)
        for h in (0, 1024)
        for n in (8, 32, 128)
        for kv in (256, 1024, 4096)
    ],
}


def step_timer(root: Path, model_name: str, tp: int, variant: str = "bf16") -> StageCost:
    """Kernel times of a bundle below ``root``, without collectives, padding and skew."""
    folder = root / HARDWARE / model_name / variant
    model = load_model(model_name)
    bundle = Bundle(folder, HARDWARE, model_name, variant, read_yaml_object(folder / "meta.yaml"))
    tables = dataclasses.replace(bundle.tables(tp), skew=None)
    terms = stage_terms(load_architecture(model.model_type), whole_model(model), tables)
    return StageCost(bundle, tables, model.num_hidden_layers, terms, EngineSpec(cudagraph=False))


def step_ns(timer: StageCost, step: Step) -> int:
    chunk, n, kv = step
    if chunk is None:
        return timer.decode_ns(n, n * kv, kv, kv)
    return timer.mixed_ns([chunk], n, n * kv, kv, kv)


def errors_percent(ours: StageCost, measured: StageCost, steps: list[Step]) -> np.ndarray:
    return np.array([step_ns(ours, step) / step_ns(measured, step) - 1 for step in steps]) * 100


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, default=Path("profiler/perf"))
    root = parser.parse_args().root
    print("| model | tp | steps | median | signed median | P95 | worst |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for model in MODELS:
        for tp in (1, 2):
            ours, measured = step_timer(root, model, tp), step_timer(recorded_path("perf"), model, tp)
            for kind, steps in STEPS.items():
                error = errors_percent(ours, measured, steps)
                size = np.abs(error)
                print(
                    f"| {model} | {tp} | {kind} | {np.median(size):.1f} % | {np.median(error):+.1f} % "
                    f"| {np.percentile(size, 95):.1f} % | {error[size.argmax()]:+.1f} % |"
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())
