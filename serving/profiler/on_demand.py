"""Bundles made while a run waits for them, kept in the user's data folder."""

from __future__ import annotations

import os
import time
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from serving.errors import ServingError
from serving.latency.variant import variant_dtypes, variant_path
from serving.profiler.bundle_writer import write_bundle
from serving.profiler.job import ProfileJob
from serving.specs import paths
from serving.specs.architecture import load_architecture
from serving.specs.hardware import load_hardware
from serving.specs.model import load_model
from serving.specs.reading import read_yaml_object

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SWITCH = "SERVESIM_AUTO_PROFILE"
"""Environment variable; 0 turns making on demand off, as --no-auto-profile does."""
LIMITS: dict[str, Any] = {"max_num_batched_tokens": 8192, "max_num_seqs": 1024, "max_kv": 131072}
"""What the shipped bundles cover too, so that a degree made on demand is the one that would have shipped."""
DTYPES = ("bfloat16", "float16", "fp8")


def maker(
    tell: Callable[[str], None], *, wanted: bool = True
) -> Callable[[str, str, str, int], Path | None] | None:
    """What makes missing bundles from public kernel measurements, for
    :func:`serving.latency.missing.missing_bundles_from`.

    ``tell`` gets one line per bundle made. None when it is switched off, or the measurements are not
    installed.
    """
    if not wanted or os.environ.get(SWITCH) == "0" or not _installed():
        return None
    return lambda hardware, model, variant, tp: _make(hardware, model, variant, tp, tell)


def _installed() -> bool:
    return find_spec("aiconfigurator_core") is not None and find_spec("pyarrow") is not None


def _make(hardware: str, model: str, variant: str, tp: int, tell: Callable[[str], None]) -> Path | None:
    """The folder of a bundle with this degree in the user's data folder; None: not a case for this source.

    Raises:
        ServingError: the measurements do not cover it, or the folder cannot be written.
    """
    dtype, kv_cache_dtype = variant_dtypes(variant)
    spec = load_hardware(hardware)
    if spec.silicon is None or dtype not in DTYPES or kv_cache_dtype not in (*DTYPES, "auto"):
        return None
    folder = paths.user_data_dir() / variant_path(hardware, model, variant)
    kept = _degrees(folder)
    if tp in kept:
        return folder
    from serving.profiler.silicon.build import build_bundle

    described = load_model(model)
    degrees = kept | {tp} | ({1} if described.is_moe else set())  # expert parallelism reads tp1
    architecture = load_architecture(described.model_type)
    started_s = time.perf_counter()
    job = ProfileJob(described, architecture, spec, dtype, kv_cache_dtype, tuple(sorted(degrees)), **LIMITS)
    content = build_bundle(job)
    write_bundle(folder, content)
    tell(
        f"made the profile bundle {hardware}/{model}/{variant} tp{tp} from public kernel measurements in "
        f"{time.perf_counter() - started_s:.1f} s ({content.meta['confidence']}); kept in {folder}"
    )
    return folder


def _degrees(folder: Path) -> set[int]:
    """Degrees of a bundle made earlier by the same package version; none of any other bundle."""
    try:
        meta = read_yaml_object(folder / "meta.yaml")
    except ServingError:
        return set()
    from serving.profiler.silicon.tables import package_version

    if meta.get("source") != "silicon" or meta.get("data_version") != package_version():
        return set()
    return {int(path.name[2:]) for path in folder.glob("tp*") if path.name[2:].isdecimal()}
