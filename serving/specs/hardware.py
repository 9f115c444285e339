"""An accelerator's public facts and the engine constants of a machine: ``configs/hardware/<name>.yaml``."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from serving.errors import MissingFileError
from serving.specs import paths
from serving.specs.base import BandwidthGbs, Count, SizeGb, Spec, Unit
from serving.specs.reading import read_yaml_object
from serving.specs.validation import validated

OverheadUs = Annotated[float, Field(ge=0, le=1e7), Unit("us")]
Megabytes = Annotated[float, Field(gt=0, le=1e6), Unit("MiB")]
Teraflops = Annotated[float, Field(gt=0, le=1e7), Unit("TFLOPS")]


class EngineSpec(Spec):
    """Host time that does not hide behind the accelerator, and how the engine launches its work.

    The constants belong to one machine and are never carried to another. The defaults are those of a machine
    nobody calibrated; a calibrated one sets the overheads and turns skew in mixed steps off.
    """

    prefill_step_overhead_us: OverheadUs = 0.0
    """Added to every step with a prefill chunk."""
    decode_step_overhead_us: OverheadUs = 0.0
    """Added to every step of decodes alone."""
    skew_in_mixed_steps: bool = True
    """Whether decodes of unequal length cost extra in steps that also prefill."""
    cudagraph: bool = True
    """Whether small steps are padded to the size of a captured graph."""
    chunked_attention: bool = True
    """Whether every prefill chunk of a step is looked up on its own, instead of their sum."""


class HardwareSpec(Spec):
    """What is publicly known about an accelerator; None where nobody said."""

    name: Annotated[str, Field(min_length=1)]
    gpu: str | None = None
    """The product's full name."""
    memory_gib: SizeGb | None = None
    memory_bandwidth_gbs: BandwidthGbs | None = None
    l2_mib: Megabytes | None = None
    sm_count: Count | None = None
    peak_tflops: dict[str, Teraflops] = Field(default_factory=dict)
    """Dense peak rate per dtype."""
    silicon: str | None = None
    """Folder of this GPU in the public kernel measurements; None: it is not among them."""
    sources: dict[str, str] = Field(default_factory=dict)
    """Field -> where its value is from."""
    engine: EngineSpec = EngineSpec()


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
    hardware: HardwareSpec, override: EngineSpec | None, *, cudagraph: bool = True
) -> EngineSpec:
    """The engine constants of an instance: those it states itself, else the hardware's.

    ``cudagraph=False`` (``--no-cudagraph``) turns padding off whatever the files say.
    """
    engine = hardware.engine
    if override is not None:
        stated = {name: getattr(override, name) for name in override.model_fields_set}
        engine = engine.model_copy(update=stated)
    return engine if cudagraph else engine.model_copy(update={"cudagraph": False})
