"""How far the roofline source is off, on GPUs that were measured: its section of benchmarks/RESULTS.md.

    python benchmarks/roofline_error.py            needs: pip install 'servesim[silicon]'
    python benchmarks/roofline_error.py --print    the section on the screen only

Every GPU is predicted three times: with the constants fitted to itself, with the medians of all others
(leave-one-GPU-out), and with the medians of those of other generations, since a B300 is nearly a B200. What
it is compared with are the kernel times of the silicon source, at the shapes of every shipped model.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from results_page import command
from roofline_samples import FAMILIES, log_errors, measured_hardware, samples_of, shipped_models

from servesim.cost.bundle import Bundle
from servesim.cost.stage_cost import StageCost
from servesim.cost.step_terms import stage_terms
from servesim.cost.terms import whole_model
from servesim.errors import ServingError
from servesim.profiler.bundle_writer import BundleContent, write_bundle
from servesim.profiler.meter import ProfileJob
from servesim.profiler.roofline.efficiency import efficiency_of, typical, with_overrides
from servesim.profiler.roofline.formulas import accelerator
from servesim.profiler.roofline.meter import RooflineMeter
from servesim.profiler.silicon.tables import installed
from servesim.profiler.sources import compute
from servesim.profiler.sweep import computed_bundle
from servesim.specs.architecture import load_architecture
from servesim.specs.hardware import EngineSpec
from servesim.specs.model import load_model

if TYPE_CHECKING:
    from collections.abc import Iterable

    from servesim.profiler.roofline.efficiency import Efficiency
    from servesim.specs.hardware import HardwareSpec

GENERATIONS = (
    {"h100_sxm", "h200_sxm"},
    {"b200_sxm", "b300_sxm", "gb200", "gb300", "rtx_pro_6000_server"},
    {"l40s"},
    {"a100_sxm"},
    {"b60"},
)
STEP_MODELS = (("meta-llama/Llama-3.1-8B", 1), ("Qwen/Qwen3-32B", 2))
VARIANTS = (("bfloat16", "auto"), ("bfloat16", "fp8"), ("fp8", "fp8"))
DECODES = [(n, kv) for n in (1, 8, 32, 128) for kv in (256, 1024, 4096, 8192)]
CHUNKS = [(c, h) for c in (128, 512, 1024, 2048) for h in (0, 2048)]
MIXED = [(c, n, kv) for c in (128, 512, 1900) for n in (8, 32, 128) for kv in (256, 1024, 4096)]


def candidates(hardware: HardwareSpec) -> dict[str, Efficiency]:
    """The three sets of constants a GPU is predicted with."""
    generation = next(folders for folders in GENERATIONS if hardware.silicon in folders)
    return {
        "own fit": efficiency_of(hardware),
        "GPU left out": with_overrides(typical({str(hardware.silicon)}), hardware.roofline),
        "generation left out": with_overrides(typical(generation), hardware.roofline),
    }


def sizes(log_error: np.ndarray) -> str:
    """``median / P95`` of relative errors in %."""
    relative = np.abs(np.exp(log_error) - 1.0) * 100
    return f"{np.median(relative):.0f} / {np.percentile(relative, 95):.0f}"


def kernel_tables(gpus: list[HardwareSpec]) -> Iterable[str]:
    """One table per set of constants: GPUs by kernel families."""
    samples = {gpu.name: samples_of(gpu, shipped_models()) for gpu in gpus}
    for title in candidates(gpus[0]):
        rows = []
        for gpu in gpus:
            acc = accelerator(gpu, candidates(gpu)[title])
            by_family = [[some for some in samples[gpu.name] if some.family == family] for family in FAMILIES]
            rows.append([gpu.name, *(sizes(log_errors(own, acc)) if own else "–" for own in by_family)])
        yield from ["", f"Kernels, {title} (median / P95 of the relative error, %):", ""]
        yield from markdown(["GPU", "products", "decode", "prefill", "experts", "all-reduce"], rows)


def step_table(gpus: list[HardwareSpec], folder: Path) -> Iterable[str]:
    """Whole steps against the silicon source's bundles."""
    kinds = ("decode", "prefill", "mixed")
    names = list(candidates(gpus[0]))
    rows = []
    for gpu in gpus:
        found: dict[tuple[str, str], list[np.ndarray]] = {}
        for name, tp in STEP_MODELS:
            for variant in VARIANTS:
                model = load_model(name)
                job = ProfileJob(model, load_architecture(model.model_type), gpu, *variant, (tp,))
                try:
                    truth = step_us(compute("silicon", job), job, folder / "silicon")
                except ServingError:
                    continue
                for title, efficiency in candidates(gpu).items():
                    ours = step_us(computed_bundle(job, RooflineMeter(job, efficiency)), job, folder / title)
                    for kind in kinds:
                        found.setdefault((title, kind), []).append(np.log(ours[kind] / truth[kind]))
        cells = [sizes(np.concatenate(found[title, kind])) for title in names for kind in kinds]
        rows.append([gpu.name, *cells])
    header = ["GPU", *(f"{title}: {kind}" for title in names for kind in kinds)]
    yield from ["", "Whole steps, kernels only (median / P95 of the relative error, %):", ""]
    yield from markdown(header, rows)


def step_us(content: BundleContent, job: ProfileJob, folder: Path) -> dict[str, np.ndarray]:
    """Times of the stated steps by kind, without collectives, padding and skew."""
    write_bundle(folder, content)
    bundle = Bundle(folder, job.hardware.name, job.model.name, job.variant, content.meta)
    tables = replace(bundle.tables(job.tp_degrees[0]), skew=None)
    terms = stage_terms(job.architecture, whole_model(job.model), tables)
    timer = StageCost(bundle, tables, job.model.num_hidden_layers, terms, EngineSpec(cudagraph=False))
    return {
        "decode": np.array([timer.decode_ns(n, n * kv, kv, kv) for n, kv in DECODES]) / 1e3,
        "prefill": np.array([timer.mixed_ns([chunk], 0, 0, 0, 0) for chunk in CHUNKS]) / 1e3,
        "mixed": np.array([timer.mixed_ns([(c, 0)], n, n * kv, kv, kv) for c, n, kv in MIXED]) / 1e3,
    }


def markdown(header: list[str], rows: list[list[str]]) -> list[str]:
    """A table in Markdown."""
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


def section() -> str:
    """The text between the marks."""
    gpus = measured_hardware()
    lines = [
        "The roofline source (`--source roofline`) against the kernel times of the silicon source, at the "
        "shapes of every shipped model, TP 1 to 8, bf16 and fp8. Its constants are fitted to each measured "
        "GPU by `benchmarks/fit_roofline.py`, at the shapes of 13 of them; hardware nobody measured gets "
        "their medians, so *left out* is what to expect there. Made by "
        "`python benchmarks/roofline_error.py`.",
        *kernel_tables(gpus),
    ]
    with tempfile.TemporaryDirectory() as folder:
        lines += step_table(gpus, Path(folder))
    models = ", ".join(f"{name} at TP {tp}" for name, tp in STEP_MODELS)
    lines += [
        "",
        f"Steps: {models}, in bf16, bf16-kvfp8 and fp8-kvfp8 as far as measured; "
        f"{len(DECODES)} of decodes alone (1–128 sequences, 256–8192 tokens), {len(CHUNKS)} of one chunk "
        f"(128–2048 tokens, history 0 and 2048) and {len(MIXED)} of both. Where bf16 decodes run in "
        "FlashAttention-2 they share one launch with a chunk, at a price that the silicon source models and "
        "the roofline does not.",
    ]
    return "\n".join(lines)


def main() -> int:
    """Print the section, and put it on the page; returns the exit status."""
    lacking = "" if installed() else "needs pip install 'servesim[silicon]'"
    return command("roofline", (__doc__ or "").splitlines()[0], section, lacking)


if __name__ == "__main__":
    sys.exit(main())
