"""The sources of kernel times: what each can do, what it refuses, and the meter it puts to work."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from typing import TYPE_CHECKING

from servesim.errors import NotSupportedError, ServingError
from servesim.slotted import dataclass

if TYPE_CHECKING:
    from collections.abc import Callable

    from servesim.profiler.bundle_writer import BundleContent
    from servesim.profiler.meter import Meter, ProfileJob
    from servesim.specs.hardware import HardwareSpec

_NOBODY = "nobody published kernel measurements of this hardware"
PROBE = 16
"""Size of the bundle that is made in memory to see whether a source can make one."""


@dataclass(frozen=True, slots=True)
class Source:
    """One source, as the command line and the support matrix show it."""

    about: str
    letter: str
    """In the matrix: M measured, S derived from public measurements, R computed."""
    computes: bool
    """Makes a bundle on any machine; the others need the device."""
    home: str
    """Its :class:`~servesim.profiler.meter.Meter`, as module:class; made from a job, and those that measure
    from their own flags too."""

    @property
    def meter(self) -> Callable[..., Meter]:
        """The class, which needs the packages of its source."""
        module, _, name = self.home.partition(":")
        found: Callable[..., Meter] = getattr(import_module(module), name)
        return found


SOURCES = {
    "silicon": Source(
        "derived from public kernel measurements (pip install 'servesim[silicon]'); needs no GPU",
        letter="S",
        computes=True,
        home="servesim.profiler.silicon.meter:SiliconMeter",
    ),
    "vllm": Source(
        "measured layer by layer inside vLLM on this machine's GPU",
        letter="M",
        computes=False,
        home="servesim.profiler.vllm_source.meter:VllmMeter",
    ),
    "torch": Source(
        "measured with PyTorch kernels on this machine's GPU or CPU",
        letter="M",
        computes=False,
        home="servesim.profiler.torch_source.meter:TorchMeter",
    ),
    "roofline": Source(
        "computed from peak rates, for hardware nobody measured",
        letter="R",
        computes=True,
        home="servesim.profiler.roofline.meter:RooflineMeter",
    ),
}
COMPUTING = tuple(name for name, source in SOURCES.items() if source.computes)
"""Sources that make a bundle on any machine, the better one first."""
MEASURING = tuple(sorted(name for name, source in SOURCES.items() if not source.computes))


def check(source: str, job: ProfileJob) -> None:
    """What a source refuses of a job, whatever the machine.

    Raises:
        NotSupportedError: it covers no such model, format or load.
        InputError: a degree does not split the model.
    """
    from servesim.cost.finding import PUBLIC_DTYPES
    from servesim.specs.block_layers import beyond_files
    from servesim.specs.dtypes import KV_CACHE_SIZED
    from servesim.specs.kv_skip import OPTION as SKIP
    from servesim.specs.kv_skip import wide_layers
    from servesim.specs.rank_shapes import block_windows, rank_shapes

    model = job.model
    for name, dtype in (("--dtype", job.dtype), ("--kv-cache-dtype", job.kv_dtype)):
        derived = KV_CACHE_SIZED if name == "--kv-cache-dtype" else ()
        if source == "silicon" and dtype not in (*PUBLIC_DTYPES, *derived):
            raise NotSupportedError(
                f"{name} {dtype} is not supported by the {source} source: the public measurements cover "
                "bfloat16 (float16 runs alike) and fp8"
            )
        if dtype in derived and not SOURCES[source].computes:
            raise NotSupportedError(
                f"--kv-cache-dtype {dtype}: --source {source} measures 16 bit and fp8; use --source "
                f"{' or '.join(COMPUTING)}, which derive it from them"
            )
        if source == "vllm" and dtype == "int8":
            raise NotSupportedError(
                "--source vllm: vLLM quantises to int8 from a checkpoint only; use --dtype fp8 or 16 bit"
            )
    if not SOURCES[source].computes:
        if beyond := beyond_files(model.layers):
            raise NotSupportedError(
                f"{model.name}: the {source} source measures standard blocks alone, not "
                f"{', '.join(beyond)}; use --source {' or '.join(COMPUTING)}"
            )
        _check_measured(source, job)
    if not SOURCES[source].computes and (wide := wide_layers(model.layers)):
        raise NotSupportedError(
            f"{SKIP}: the {source} source measures caches of one format, not layers {wide[0]} to {wide[-1]} "
            f"in another; use --source {' or '.join(COMPUTING)}"
        )
    if source == "vllm" and len(block_windows(model)) > 1:
        raise NotSupportedError(
            f"{model.name}: not all blocks slide; --source vllm runs one block, use --source torch"
        )
    for tp in job.tp_degrees:
        rank_shapes(model, tp)


def _check_measured(source: str, job: ProfileJob) -> None:
    """What other sources derive and those that measure do not."""
    for flag, value, measured in (
        ("--fp8-scaling", job.fp8_scaling, "tensor"),
        ("--expert-load", job.expert_load, "balanced"),
        ("--collectives", "none" if job.collectives == "auto" else job.collectives, "none"),
    ):
        if value != measured:
            raise NotSupportedError(f"{flag} {value}: --source {source} measures {measured} only, so far")


def source_for(hardware: HardwareSpec, variant: str) -> tuple[str, str] | None:
    """The source that makes a variant's bundle on this machine, and why it is not the better one, if so.

    Public measurements of the GPU's own kernels where there are any and they are installed, else peak rates.
    None: nothing is known about the hardware.
    """
    from servesim.cost.finding import has_public_format

    if hardware.model_fields_set == {"name"}:
        return None
    if hardware.silicon is None:
        return "roofline", _NOBODY
    if not has_public_format(variant):
        return "roofline", "the public kernel measurements do not cover these formats"
    if not silicon_installed():
        return "roofline", "pip install 'servesim[silicon]' for this GPU's measured kernels"
    from servesim.profiler.silicon.tables import other_rates

    if others := other_rates(hardware):
        return "roofline", f"the hardware file describes no measured GPU: {', '.join(others)}"
    return "silicon", ""


def silicon_installed() -> bool:
    """Whether the extra is there that the silicon source derives from."""
    from servesim.profiler.silicon.tables import installed

    return installed()


def compute(source: str, job: ProfileJob) -> BundleContent:
    """A bundle's content from a source that needs no device.

    Raises:
        InputError: the source does not cover the job, or what it derives from is not there.
    """
    from servesim.profiler.sweep import computed_bundle

    check(source, job)
    return computed_bundle(job, SOURCES[source].meter(job))


def capability(source: str, job: ProfileJob) -> tuple[bool, str]:
    """Whether a computing source can make the bundle, and how far to trust it or why not.

    It is asked to make a very small one, so that the answer is that of the formulas and their data.
    """
    if source == "silicon" and job.hardware.silicon is None:
        return False, _NOBODY
    try:
        content = compute(
            source, replace(job, max_num_batched_tokens=PROBE, max_num_seqs=PROBE, max_kv=PROBE)
        )
    except ServingError as error:
        return False, str(error).splitlines()[0]
    return True, str(content.meta["confidence"])
