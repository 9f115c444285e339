"""An accelerator's public facts and the engine constants of a machine: ``configs/hardware/<name>.yaml``."""

from __future__ import annotations

from typing import Annotated, Literal

from servesim.errors import MissingFileError
from servesim.specs import paths
from servesim.specs.annotated import BeforeValidator, Discriminator, Field, Tag
from servesim.specs.reading import read_yaml_object
from servesim.specs.validation import BandwidthGbs, Count, SizeGb, Spec, Unit, list_as_tuple, validated

OverheadUs = Annotated[float, Field(ge=0, le=1e7), Unit("us")]
Megabytes = Annotated[float, Field(ge=1e-3, le=1e6), Unit("MiB")]
Teraflops = Annotated[float, Field(ge=1e-6, le=1e7), Unit("TFLOPS")]
ErrorPercent = Annotated[float, Field(ge=-1e9, le=1e9), Unit("%")]
StartUs = Annotated[float, Field(ge=0, le=1e5), Unit("us")]


def _number_or_list(value: object) -> str:
    return "list" if isinstance(value, list | tuple) else "number"


Fraction = Annotated[float, Field(ge=1e-6, le=2)]
"""Above 1 where a datasheet understates what the chip does."""
Point = Annotated[tuple[Annotated[float, Field(ge=0, le=1e9)], Fraction], BeforeValidator(list_as_tuple)]
Share = Annotated[
    Annotated[Fraction, Tag("number")]
    | Annotated[tuple[Point, ...], BeforeValidator(list_as_tuple), Field(min_length=1), Tag("list")],
    Discriminator(_number_or_list),
]
"""Share of a peak rate that kernels reach: a number, or a curve of (size, share) points.

The size is the step's tokens, or its sequences for a decode share; between points the share is linear in the
size's logarithm, outside it stays.
"""


class EngineSpec(Spec):
    """Host time, how the engine launches its work, and corrections of kernel times that a server shows.

    Host times belong to one machine; a hardware file that sets them says under ``sources`` or
    ``calibration`` whose they are. Without one they are 0, and predictions lean to the fast side.
    """

    front_end_us: OverheadUs = 0.0
    """From the client to the engine and back, each request: HTTP, tokenizer, queues between processes.

    Part of TTFT and latency as a client sees them, not of the engine's own stamps.
    """
    front_end_jitter_us: OverheadUs = 0.0
    """Mean of what a request needs there beyond ``front_end_us``, drawn for each one (exponential)."""
    host_step_us: OverheadUs = 0.0
    """Work of the host for every step: scheduler, inputs, launch, output.

    With asynchronous scheduling it goes on while the accelerator computes the step before, so that a step
    takes the longer of both; with synchronous scheduling both are paid.
    """
    host_sequence_us: OverheadUs = 0.0
    """The same for every sequence of the step."""
    eager_launch_us: OverheadUs | None = None
    """Without CUDA graphs: time of the host to launch one layer, for which the accelerator waits.

    None: 100 us where an option (``--enforce-eager``) turns graphs off on a GPU with a hardware file, 0
    elsewhere. An A100 server decodes 2.2 to 2.7 times slower so (an 8B model, some 290 layers); nobody else's
    time is known.
    """
    sustained_tflops_16bit: Teraflops | None = None
    """Rate that GEMMs of 16-bit weights hold for seconds, at the power limit; tables hold bursts."""
    sustained_tflops_8bit: Teraflops | None = None
    """The same of 8-bit weights."""
    decode_attention_8bit: Annotated[float, Field(ge=0.05, le=10)] = 1.0
    """Decode attention over 8-bit KV under load, as a multiple of the table's."""
    smooth_gemms: Literal["none", "tile", "all"] = "none"
    """Where a GEMM takes at most what the table says of more rows, which could stand in for it.

    ``tile``: up to 16 rows, all of which a tensor core computes alike, so that differences are noise.
    ``all``: everywhere; for a table whose noise exceeds the differences between its kernels.
    """

    prefill_step_overhead_us: OverheadUs = 0.0
    """Added to every step with a prefill chunk."""
    decode_step_overhead_us: OverheadUs = 0.0
    """Added to every step of decodes alone."""
    skew_in_mixed_steps: bool = False
    """Whether decodes of unequal length cost extra in steps that also prefill, by the bundle's skew fit.

    Off: the fit's buckets jump by tens of milliseconds a step, which recorded steps do not.
    """
    tail_in_mixed_steps: bool = True
    """Whether such steps wait for their longest decode; without effect beside the skew fit."""
    cudagraph: bool = True
    """Whether small steps are padded to the size of a captured graph."""
    chunked_attention: bool = True
    """Whether every prefill chunk of a step is looked up on its own, instead of their sum."""


EAGER_LAUNCH_US = 100.0
"""Of one A100 server; see ``eager_launch_us``."""
HOST_CONSTANTS = (
    "prefill_step_overhead_us",
    "decode_step_overhead_us",
    "host_step_us",
    "host_sequence_us",
    "front_end_us",
    "front_end_jitter_us",
)
"""Constants of :class:`EngineSpec` that are times of a host."""
NO_HOST_TIME = EngineSpec.model_validate(dict.fromkeys(HOST_CONSTANTS, 0.0))
"""Kernels alone, whatever a hardware file says of its host."""


class LinkSpec(Spec):
    """What one accelerator sends to its peers in the same machine, over all its links together."""

    bandwidth_gbs: BandwidthGbs
    """One direction."""
    latency_us: OverheadUs = 5.0
    """Time of a collective over next to nothing: launch and synchronisation."""


class RooflineSpec(Spec):
    """How close kernels come to an accelerator's peak rates; None: what measured GPUs do.

    A start is the time of a kernel with next to nothing to do.
    """

    launch_us: StartUs | None = None
    """Time from one kernel to the next beyond its own; the fitted starts hold 1.5 us of it."""
    product_start_us: StartUs | None = None
    product_compute: Share | None = None
    """GEMMs: share of the peak rate of their dtype."""
    product_compute_8bit: Share | None = None
    product_stream: Share | None = None
    """GEMMs: share of the memory bandwidth at which weights arrive."""
    decode_start_us: StartUs | None = None
    decode_block_us: StartUs | None = None
    """Decode attention: for every KV head of every sequence, on top of its bytes."""
    decode_stream: Share | None = None
    """Decode attention: share of the memory bandwidth at which 16-bit KV arrives."""
    decode_stream_8bit: Share | None = None
    prefill_start_us: StartUs | None = None
    prefill_compute: Share | None = None
    """Prefill attention: share of the 16-bit peak rate, 16-bit KV."""
    prefill_compute_8bit: Share | None = None
    prefill_tail: Annotated[float, Field(ge=0, le=100)] | None = None
    """Prefill attention: longest row tiles for which all SMs wait at the end."""
    moe_start_us: StartUs | None = None
    moe_compute: Share | None = None
    moe_compute_8bit: Share | None = None
    moe_stream: Share | None = None
    moved_start_us: StartUs | None = None
    """Layers that only move bytes: norms, activation, rotary embedding."""
    moved_stream: Share | None = None
    link_share: Share | None = None
    """All-reduce: share of the link's bandwidth."""


class CalibrationSpec(Spec):
    """Where engine constants that were fitted come from; ``servesim bench calibrate`` writes it."""

    machine: str
    """The host they belong to."""
    recording: str
    engine: str
    """What was recorded, such as ``vLLM 0.19.0``."""
    model: str
    bundle: str
    """The kernel times they were fitted beside."""
    requests: Count
    anchor: str
    error_percent: dict[str, ErrorPercent]
    """Metric -> error of its simulated mean after the fit."""
    uncalibrated_error_percent: dict[str, ErrorPercent]
    """The same without the constants."""


class HardwareSpec(Spec):
    """What is publicly known about an accelerator; None where nobody said."""

    name: Annotated[str, Field(min_length=1)]
    gpu: str | None = None
    """The product's full name."""
    compute_capability: Annotated[str, Field(pattern=r"^\d{1,2}\.\d$")] | None = None
    """Of an NVIDIA GPU, such as ``9.0``: which formats its kernels take follows from it."""
    memory_gib: SizeGb | None = None
    """As CUDA reports it, where ``sources`` says so; nvidia-smi and datasheets say 0.5 to 1 % more."""
    memory_bandwidth_gbs: BandwidthGbs | None = None
    l2_mib: Megabytes | None = None
    sm_count: Count | None = None
    peak_tflops: dict[str, Teraflops] = Field(default_factory=dict)
    """Dense peak rate per dtype."""
    link: LinkSpec | None = None
    silicon: str | None = None
    """Folder of this GPU in the public kernel measurements; None: it is not among them."""
    plan_as_vllm: Annotated[str, Field(pattern=r"^\d+\.\d+(\.\d+)?$")] | None = None
    """Version of vLLM whose start-ups on this GPU are known, so that the memory plan follows them; None: the
    default of :func:`servesim.memory.engine_memory.engine_memory`."""
    sources: dict[str, str] = Field(default_factory=dict)
    """Field -> where its value is from."""
    roofline: RooflineSpec = Field(default_factory=RooflineSpec)
    engine: EngineSpec = Field(default_factory=EngineSpec)
    engine_rows: str | None = None
    """What the engine constants were fitted to, where that is no recording: rows, models, versions."""
    calibration: CalibrationSpec | None = None
    """None: nobody fitted the engine constants to a recorded run."""


def load_hardware(name: str) -> HardwareSpec:
    """The facts about ``name``; a hardware without a file gets the defaults.

    Raises:
        InputError: there is a file and it is wrong.
    """
    try:
        path = paths.find(f"configs/hardware/{name}.yaml")
    except MissingFileError:
        return HardwareSpec(name=name)
    return validated(HardwareSpec, {"name": name, **read_yaml_object(path)}, str(path))


def resolve_engine(
    hardware: HardwareSpec,
    override: EngineSpec | None,
    *,
    cudagraph: bool = True,
    second_runner: bool = False,
) -> EngineSpec:
    """The engine constants of an instance: those it states itself, else the hardware's.

    Args:
        hardware: whose file has them.
        override: what the instance states.
        cudagraph: False (``--no-cudagraph``) turns padding off whatever the files say.
        second_runner: whether vLLM's second model runner is in use. The hardware's time of a step with
            prefill was measured with the first one, and there is none then.
    """
    engine = hardware.engine
    if second_runner:
        engine = engine.model_copy(update={"prefill_step_overhead_us": 0.0})
    if override is not None:
        stated = {name: getattr(override, name) for name in override.model_fields_set}
        engine = engine.model_copy(update=stated)
    if cudagraph:
        return engine
    launch_us = engine.eager_launch_us
    if launch_us is None and hardware.gpu is not None:
        launch_us = EAGER_LAUNCH_US
    return engine.model_copy(update={"cudagraph": False, "eager_launch_us": launch_us})


def describe_host(hardware: HardwareSpec, engine: EngineSpec, second_runner: str | None = None) -> str:
    """One line: the host time of ``engine``, and whose it is: the hardware file's, if it says the same.

    ``second_runner``: the version of vLLM that was asked for, if it runs the model with its second runner.
    """
    own = resolve_engine(hardware, None, second_runner=second_runner is not None)
    stated = any(getattr(engine, name) != getattr(own, name) for name in HOST_CONSTANTS)
    without = ""
    if second_runner and hardware.engine.prefill_step_overhead_us and not engine.prefill_step_overhead_us:
        without = f", none per step with prefill in vLLM {second_runner} (its second model runner)"
    times = _host_times(engine)
    if not times:
        why = (
            "the cluster config says so"
            if stated
            else without.removeprefix(", ") or "no machine is calibrated"
        )
        return f"no overhead ({why}), so predictions lean to the fast side"
    told = ", ".join(times) + without
    if stated:
        return f"{told} (from the cluster config)"
    if hardware.calibration is not None:
        return f"{told} (fitted on the {hardware.calibration.machine}, {hardware.calibration.engine})"
    if hardware.engine_rows:
        return f"{told} (from {hardware.engine_rows})"
    return f"{told} (from the hardware file)"


def _host_times(engine: EngineSpec) -> list[str]:
    """Every host time that is not 0, in words."""
    found = []
    prefill_us, decode_us = engine.prefill_step_overhead_us, engine.decode_step_overhead_us
    if prefill_us or decode_us:
        decode = (
            f", +{decode_us / 1000:g} ms per decode-only step" if decode_us or not engine.front_end_us else ""
        )
        found.append(f"+{prefill_us / 1000:g} ms per step with prefill{decode}")
    if engine.host_step_us or engine.host_sequence_us:
        found.append(
            f"{engine.host_step_us:g} µs per step and {engine.host_sequence_us:g} µs per sequence of it, "
            "beside the GPU where scheduling is asynchronous"
        )
    if engine.front_end_us or engine.front_end_jitter_us:
        drawn = (
            f" and {engine.front_end_jitter_us / 1000:g} ms at random" if engine.front_end_jitter_us else ""
        )
        found.append(f"front end {engine.front_end_us / 1000:g} ms a request{drawn}")
    return found
