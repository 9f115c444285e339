"""Where the bundle of a (hardware, model, variant) lies, and what to tell somebody who does not have it."""

from __future__ import annotations

from glob import escape
from typing import TYPE_CHECKING

from servesim.errors import MissingFileError
from servesim.specs import paths
from servesim.specs.dtypes import WEIGHT_DTYPES, short_dtype
from servesim.specs.hardware import load_hardware

if TYPE_CHECKING:
    from pathlib import Path

_LISTED = 12  # bundles named in a message before "and N more"


def variant_path(hardware: str, model: str, variant: str) -> str:
    """``profiler/perf/<hardware>/<model>/<variant>``."""
    return f"profiler/perf/{hardware}/{model}/{variant}"


def find_variant(hardware: str, model: str, variant: str, tp: int) -> Path:
    """The folder of a bundle, from the first place that has it.

    Raises:
        MissingFileError: with the variants there are, and the command that makes this one.
    """
    relative = variant_path(hardware, model, variant)
    try:
        return paths.find(relative)
    except MissingFileError:
        raise MissingFileError(
            f"{relative}/ does not exist\n{_what_there_is(hardware, model)}\n"
            f"Make it with:  {profile_command(hardware, model, variant, tp)}"
        ) from None


def find_tp_folder(folder: Path, hardware: str, model: str, variant: str, tp: int) -> Path:
    """``tp<N>`` of a bundle.

    Raises:
        MissingFileError: with the degrees there are, and the command that makes this one.
    """
    found = folder / f"tp{tp}"
    if found.is_dir():
        return found
    there = sorted(int(p.name[2:]) for p in folder.glob("tp*") if p.name[2:].isdecimal())
    raise MissingFileError(
        f"{variant_path(hardware, model, variant)}/tp{tp}/ does not exist\n"
        f"{folder} has {', '.join(f'tp{degree}' for degree in there) or 'no tp<N> folder'}.\n"
        f"Make it with:  {profile_command(hardware, model, variant, *sorted({*there, tp}))}"
    )


def profile_command(hardware: str, model: str, variant: str, *degrees: int, source: str | None = None) -> str:
    """The command line that produces a bundle: from ``source``, by default public kernel measurements, or
    peak
    rates if the hardware's file names no measurements."""
    dtype, kv_cache_dtype = variant_dtypes(variant)
    if source is None:
        known = paths.find_all(f"configs/hardware/{escape(hardware)}.yaml")
        source = "roofline" if known and not load_hardware(hardware).silicon else "silicon"
    return (
        f"servesim profile {model} --hardware {hardware} --source {source} "
        f"--dtype {dtype} --kv-cache-dtype {kv_cache_dtype} --tp {','.join(map(str, degrees))}"
    )


def variant_dtypes(variant: str) -> tuple[str, str]:
    """``bf16-kvfp8`` -> ``("bfloat16", "fp8")``; no KV part -> ``auto``; unknown parts stay."""
    long_names = {short_dtype(name): name for name in WEIGHT_DTYPES}
    weights, _, kv = variant.partition("-kv")
    return long_names.get(weights, weights), long_names.get(kv, kv) or "auto"


def available_variants(hardware: str, model: str) -> list[str]:
    """Variants that have a bundle for this hardware and model, wherever they lie."""
    return [folder.name for folder in _bundles(f"{escape(hardware)}/{escape(model)}/*")]


def _what_there_is(hardware: str, model: str) -> str:
    variants = available_variants(hardware, model)
    if variants:
        return f"There is for {model} on {hardware}: {', '.join(variants)}."
    on_others = _bundles(f"*/{escape(model)}/*")
    if on_others:
        return f"There is no bundle for {model} on {hardware}; other hardware has {_some(on_others)}."
    of_others = _bundles(f"{escape(hardware)}/**")
    if of_others:
        return f"There is no bundle for {model}; for {hardware} there is {_some(of_others)}."
    return f"There is no bundle for {model}, and none for {hardware}."


def _bundles(pattern: str) -> list[Path]:
    """Bundle folders below profiler/perf that match."""
    return [meta.parent for meta in paths.find_all(f"profiler/perf/{pattern}/meta.yaml")]


def _some(folders: list[Path]) -> str:
    names = [folder.as_posix().rpartition("profiler/perf/")[2] for folder in folders]
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
