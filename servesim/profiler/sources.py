"""The sources of kernel times: what each can do, what it refuses, and the meter it puts to work."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from servesim.errors import NotSupportedError, ServingError

if TYPE_CHECKING:
    from servesim.profiler.bundle_writer import BundleContent
    from servesim.profiler.job import ProfileJob
    from servesim.profiler.meter import Meter

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
    formats: tuple[str, ...] | None = None
    """Formats of weights and KV that it covers, a pair each; None: the device decides."""


_PUBLIC = ("bfloat16", "float16", "fp8")
SOURCES = {
    "silicon": Source(
        "derived from public kernel measurements (pip install 'servesim[silicon]'); needs no GPU",
        letter="S",
        computes=True,
        formats=_PUBLIC,
    ),
    "vllm": Source("measured layer by layer inside vLLM on this machine's GPU", letter="M", computes=False),
    "torch": Source("measured with PyTorch kernels on this machine's GPU or CPU", letter="M", computes=False),
    "roofline": Source("computed from peak rates, for hardware nobody measured", letter="R", computes=True),
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
    from servesim.profiler.shapes import block_windows, rank_shapes

    model, facts = job.model, SOURCES[source]
    if model.is_mla:
        raise NotSupportedError(
            f"{model.name}: multi-head latent attention is not supported by the {source} source yet"
        )
    for name, dtype in (("--dtype", job.dtype), ("--kv-cache-dtype", job.kv_dtype)):
        if facts.formats is not None and dtype not in facts.formats:
            raise NotSupportedError(
                f"{name} {dtype} is not supported by the {source} source: the public measurements cover "
                "bfloat16 (float16 runs alike) and fp8"
            )
        if source == "vllm" and dtype == "int8":
            raise NotSupportedError(
                "--source vllm: vLLM quantises to int8 from a checkpoint only; use --dtype fp8 or 16 bit"
            )
    if not facts.computes:
        _check_measured(source, job)
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


def compute(source: str, job: ProfileJob) -> BundleContent:
    """A bundle's content from a source that needs no device.

    Raises:
        InputError: the source does not cover the job, or what it derives from is not there.
    """
    from servesim.profiler.sweep import computed_bundle

    check(source, job)
    return computed_bundle(job, _computing_meter(source, job))


def _computing_meter(source: str, job: ProfileJob) -> Meter:
    if source == "silicon":
        from servesim.profiler.silicon.meter import SiliconMeter

        return SiliconMeter(job)
    from servesim.profiler.roofline.meter import RooflineMeter

    return RooflineMeter(job)


def capability(source: str, job: ProfileJob) -> tuple[bool, str]:
    """Whether a computing source can make the bundle, and how far to trust it or why not.

    It is asked to make a very small one, so that the answer is that of the formulas and their data.
    """
    if source == "silicon" and job.hardware.silicon is None:
        return False, "nobody published kernel measurements of this hardware"
    try:
        content = compute(
            source, replace(job, max_num_batched_tokens=PROBE, max_num_seqs=PROBE, max_kv=PROBE)
        )
    except ServingError as error:
        return False, str(error).splitlines()[0]
    return True, str(content.meta["confidence"])
