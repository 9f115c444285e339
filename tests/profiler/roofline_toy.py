"""An accelerator with round numbers, whose kernel times can be worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from servesim.profiler.bundle_writer import BundleContent
from servesim.profiler.meter import ProfileJob
from servesim.profiler.roofline.efficiency import Efficiency
from servesim.profiler.roofline.formulas import Accelerator
from servesim.profiler.roofline.meter import RooflineMeter
from servesim.profiler.sources import check
from servesim.profiler.sweep import computed_bundle
from servesim.specs.block_layers import architecture_of
from servesim.specs.hardware import HardwareSpec
from servesim.specs.layers import Attention
from servesim.specs.model import ModelSpec, load_model

PERFECT = Efficiency(
    product_start_us=0.0,
    product_compute=1.0,
    product_compute_8bit=1.0,
    product_stream=1.0,
    decode_start_us=10.0,
    decode_block_us=0.0,
    decode_stream=0.5,
    decode_stream_8bit=0.5,
    prefill_start_us=0.0,
    prefill_compute=1.0,
    prefill_compute_8bit=1.0,
    prefill_tail=0.0,
    moe_start_us=0.0,
    moe_compute=1.0,
    moe_compute_8bit=1.0,
    moe_stream=1.0,
    moved_start_us=2.0,
    moved_stream=1.0,
    link_share=0.5,
)
TOY = Accelerator(
    name="Toy",
    bytes_per_us=1e6,
    flop_per_us={"bfloat16": 1e9, "fp8": 2e9},
    units=10,
    cache_bytes=0.0,
    efficiency=PERFECT,
    link_bytes_per_us=1e5,
    link_latency_us=5.0,
)
TOY_HARDWARE = HardwareSpec.model_validate(
    {
        "name": "Toy",
        "memory_gib": 64.0,
        "memory_bandwidth_gbs": 1000.0,
        "l2_mib": 32.0,
        "sm_count": 10,
        "peak_tflops": {"bfloat16": 1000.0, "fp8": 2000.0},
        "link": {"bandwidth_gbs": 150.0},
    }
)


def toy(**changes: Any) -> Accelerator:
    """The toy with other efficiencies."""
    return replace(TOY, efficiency=replace(PERFECT, **changes))


def job(model: str | ModelSpec = "meta-llama/Llama-3.1-8B", **changes: Any) -> ProfileJob:
    """A small job on the toy."""
    spec = load_model(model) if isinstance(model, str) else model
    fields = {"hardware": TOY_HARDWARE, "max_num_batched_tokens": 64, "max_num_seqs": 16, "max_kv": 1024}
    return ProfileJob(model=spec, architecture=architecture_of(spec), **{**fields, **changes})


def build_bundle(job: ProfileJob, efficiency: Efficiency | None = None) -> BundleContent:
    """The roofline source's bundle; ``efficiency`` None: the hardware's own."""
    check("roofline", job)
    return computed_bundle(job, RooflineMeter(job, efficiency))


def sliding_half(model: ModelSpec, window: int) -> ModelSpec:
    """The model, every second block of which slides."""
    layers = tuple(
        replace(layer, attention=replace(layer.attention, kind="sliding", reach=window))
        if index % 2 and isinstance(layer.attention, Attention)
        else layer
        for index, layer in enumerate(model.layers.layers)
    )
    changes = {"sliding_window": window, "layers": replace(model.layers, layers=layers)}
    return model.model_copy(update=changes)
