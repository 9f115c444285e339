"""Bundles made while a run waits for them, kept in the user's data folder."""

from __future__ import annotations

import os
import time
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from servesim.cost.variant import profile_command, variant_dtypes, variant_path
from servesim.errors import ServingError
from servesim.profiler.bundle_writer import write_bundle
from servesim.profiler.derivation import outdated
from servesim.profiler.job import ProfileJob
from servesim.specs import paths
from servesim.specs.architecture import load_architecture
from servesim.specs.hardware import load_hardware
from servesim.specs.model import load_model
from servesim.specs.reading import read_yaml_object

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SWITCH = "SERVESIM_AUTO_PROFILE"
"""Environment variable; 0 turns making on demand off, as --no-auto-profile does."""
LIMITS: dict[str, Any] = {"max_num_batched_tokens": 8192, "max_num_seqs": 1024, "max_kv": 131072}
"""What the shipped bundles cover too, so that a degree made on demand is the one that would have shipped."""
MARK = "made_on_demand"
"""Key of meta.yaml: nobody chose anything about this bundle, so that it may be replaced."""
DTYPES = ("bfloat16", "float16", "fp8")


def maker(
    tell: Callable[[str], None], *, wanted: bool = True
) -> Callable[[str, str, str, int], Path | None] | None:
    """What makes missing bundles from public kernel measurements, for
    :func:`servesim.cost.missing.missing_bundles_from`.

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
    if not _covered(hardware, variant):
        return None
    folder = paths.user_data_dir() / variant_path(hardware, model, variant)
    meta = _meta(folder)
    kept = _degrees(folder) if meta.get("source") == "silicon" else set()
    if tp in kept and outdated(meta) is None:
        return folder
    _build(folder, hardware, model, variant, kept | {tp}, f"made the profile bundle {{}} tp{tp}", tell)
    return folder


def _covered(hardware: str, variant: str) -> bool:
    dtype, kv_cache_dtype = variant_dtypes(variant)
    known = dtype in DTYPES and kv_cache_dtype in (*DTYPES, "auto")
    return known and load_hardware(hardware).silicon is not None


def _build(
    folder: Path,
    hardware: str,
    model: str,
    variant: str,
    degrees: set[int],
    what: str,
    tell: Callable[[str], None],
) -> None:
    """Put a bundle with ``degrees`` at ``folder`` and tell so; ``what`` has braces for its name.

    Raises:
        ServingError: the measurements do not cover it, or the folder cannot be written.
    """
    from servesim.profiler.silicon.build import build_bundle

    described, spec = load_model(model), load_hardware(hardware)
    degrees = degrees | ({1} if described.is_moe else set())  # expert parallelism reads tp1
    architecture = load_architecture(described.model_type)
    dtypes = variant_dtypes(variant)
    started_s = time.perf_counter()
    job = ProfileJob(described, architecture, spec, *dtypes, tuple(sorted(degrees)), **LIMITS)
    content = build_bundle(job)
    content.meta[MARK] = True
    write_bundle(folder, content)
    tell(
        f"{what.format(f'{hardware}/{model}/{variant}')} from public kernel measurements in "
        f"{time.perf_counter() - started_s:.1f} s ({content.meta['confidence']}); kept in {folder}"
    )


def refresher(
    tell: Callable[[str], None], warn: Callable[[str], None], *, wanted: bool = True
) -> Callable[[Path, str, str, str], None]:
    """What sees to it that computed bundles of the user's data folder do not grow old unnoticed, for
    :func:`servesim.cost.missing.missing_bundles_from`.

    One that was made on demand is made again, with a line to ``tell``; where that cannot be, or where the
    user made it and may have chosen otherwise, ``warn`` gets a line. Each bundle is looked at once.
    """
    seen: set[Path] = set()
    can_make = maker(tell, wanted=wanted) is not None

    def look(folder: Path, hardware: str, model: str, variant: str) -> None:
        where = folder.resolve()
        if where in seen:
            return
        seen.add(where)
        meta = _meta(folder)
        reason = outdated(meta)
        if reason is None:
            return
        degrees = _degrees(folder)
        way_out = "servesim[silicon], installed and not switched off, makes it again"
        if not meta.get(MARK):
            source = str(meta["source"])
            command = profile_command(hardware, model, variant, *sorted(degrees), source=source)
            way_out = f"make it again: {command} --output-root {paths.user_data_dir() / 'profiler' / 'perf'}"
        elif can_make and _covered(hardware, variant):
            try:
                what = f"made the profile bundle {{}} again, for {reason},"
                _build(folder, hardware, model, variant, degrees, what, tell)
                return
            except ServingError as error:
                way_out = f"it was not made again: {str(error).splitlines()[0]}"
        warn(f"{folder}: this bundle is old: {reason}; {way_out}")

    return look


def _meta(folder: Path) -> dict[str, Any]:
    """meta.yaml of a bundle; empty where there is no sound one."""
    try:
        return read_yaml_object(folder / "meta.yaml")
    except ServingError:
        return {}


def _degrees(folder: Path) -> set[int]:
    return {int(path.name[2:]) for path in folder.glob("tp*") if path.name[2:].isdecimal()}
