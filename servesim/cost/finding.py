"""Where the bundle of a (hardware, model, variant) lies, and what happens when it does not.

A run that misses a bundle, or a degree of one, is told which there are and how to make it. So is one whose
bundle was made for something else. Unless a maker was put in place: the packages below know no source of
kernel times, so that whoever starts a run says who makes bundles for it, and who looks at old ones.
"""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar
from glob import escape
from typing import TYPE_CHECKING

from servesim.cost.identity import FORWARD
from servesim.errors import InputError, MissingFileError, ServingError
from servesim.specs import paths
from servesim.specs.dtypes import KV_CACHE_SIZED, WEIGHT_DTYPES, dtype_bytes, short_dtype
from servesim.specs.hardware import load_hardware
from servesim.specs.kv_skip import OPTION as SKIP
from servesim.specs.kv_skip import without_skipped

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from servesim.cost.identity import Wanted

    Maker = Callable[[Wanted, int], Path | None]
    """(wanted, tp) -> folder of a bundle with this degree; None: it makes none of these."""
    Refresher = Callable[[Path, Wanted], None]
    """(folder, wanted): looks at a bundle before it is read, and may replace it."""

PUBLIC_DTYPES = ("bfloat16", "float16", "fp8")
"""Formats of weights and KV that the public kernel measurements cover; those of KV that are derived from them
are :data:`servesim.specs.dtypes.KV_CACHE_SIZED`."""
MADE_LOG, READ_LOG = "servesim.made", "servesim.bundles"
"""Loggers of what is told once in a process: that a bundle was made; what is wrong with one that is read."""
_LISTED = 12  # bundles named in a message before "and N more"


def variant_path(hardware: str, model: str, variant: str) -> str:
    """``profiler/perf/<hardware>/<model>/<variant>``."""
    return f"profiler/perf/{hardware}/{model}/{variant}"


def places(wanted: Wanted) -> Iterator[Path]:
    """The folders that may hold the bundle: in the working folder, the user's data, the shipped data."""
    seen = set()
    for label in wanted.labels:
        for folder in paths.find_each(variant_path(wanted.hardware, label, wanted.variant)):
            if (where := folder.resolve()) not in seen:
                seen.add(where)
                yield folder


def degrees_in(folder: Path) -> list[int]:
    """Tensor-parallel degrees that a bundle's folder has, rising."""
    return sorted(int(path.name[2:]) for path in folder.glob("tp*") if path.name[2:].isdecimal())


def no_variant(wanted: Wanted, tp: int) -> MissingFileError:
    """That there is no such bundle, with the variants there are, and the command that makes this one."""
    return MissingFileError(
        f"{variant_path(wanted.hardware, wanted.model, wanted.variant)}/ does not exist\n"
        f"{_what_there_is(wanted.hardware, wanted.model)}\n"
        f"Make it with:  {profile_command(wanted.hardware, wanted.named, wanted.variant, tp)}"
    )


def no_degree(wanted: Wanted, tp: int, found: list[Path]) -> MissingFileError:
    """That none of the folders has the degree, with those there are, and the command that makes this one.

    The command makes the degrees of the first folder again, which it would replace otherwise.
    """
    there = []
    for folder in found:
        own = ", ".join(f"tp{degree}" for degree in degrees_in(folder))
        there.append(f"{folder} has {own or 'no tp<N> folder'}.")
    degrees = sorted({*degrees_in(found[0]), tp})
    return MissingFileError(
        f"{variant_path(wanted.hardware, wanted.model, wanted.variant)}/tp{tp}/ does not exist\n"
        + "\n".join(there)
        + f"\nMake it with:  {profile_command(wanted.hardware, wanted.named, wanted.variant, *degrees)}"
    )


def profile_command(hardware: str, model: str, variant: str, *degrees: int, source: str | None = None) -> str:
    """The command line that produces a bundle: from ``source``, by default public kernel measurements, or
    peak rates if the hardware's file names no measurements or they are not of this format.

    ``model`` is written as it is: a path with blanks has to be quoted.
    """
    dtype, kv_cache_dtype = variant_dtypes(variant)
    if kv_cache_dtype == "auto" and dtype in WEIGHT_DTYPES and dtype_bytes(dtype) == 1:
        kv_cache_dtype = "bfloat16"  # beside 8-bit weights auto may be what a checkpoint asks for
    if source is None:
        known = paths.find_all(f"configs/hardware/{escape(hardware)}.yaml")
        measured = not known or load_hardware(hardware).silicon is not None
        source = "silicon" if measured and has_public_format(variant) else "roofline"
    skipped = without_skipped(variant)[1]
    skip = f" {SKIP} {skipped.replace(',', ' ')}" if skipped else ""
    if source == FORWARD:
        return (
            f"servesim profile import FORWARD.json --model {model} --hardware {hardware} --dtype {dtype} "
            f"--kv-cache-dtype {kv_cache_dtype}{skip} --tp {degrees[0]}"
        )
    return (
        f"servesim profile {model} --hardware {hardware} --source {source} "
        f"--dtype {dtype} --kv-cache-dtype {kv_cache_dtype}{skip} --tp {','.join(map(str, degrees))}"
    )


def folder_root(folder: Path) -> Path | None:
    """The ``profiler/perf`` that a bundle's folder lies below; None: none."""
    for root in folder.parents:
        if root.name == "perf" and root.parent.name == "profiler":
            return root
    return None


def variant_dtypes(variant: str) -> tuple[str, str]:
    """``bf16-kvfp8`` -> ``("bfloat16", "fp8")``; no KV part -> ``auto``; unknown parts stay. Layers left out
    (``bf16-kvfp8-skip0-1``) are passed over."""
    variant, _ = without_skipped(variant)
    long_names = {short_dtype(name): name for name in WEIGHT_DTYPES}
    weights, _, kv = variant.partition("-kv")
    return long_names.get(weights, weights), long_names.get(kv, kv) or "auto"


def has_public_format(variant: str) -> bool:
    """Whether kernels of a variant's formats are among the public measurements."""
    dtype, kv_cache_dtype = variant_dtypes(variant)
    return dtype in PUBLIC_DTYPES and kv_cache_dtype in (*PUBLIC_DTYPES, *KV_CACHE_SIZED, "auto")


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


_maker: ContextVar[Maker | None] = ContextVar("maker", default=None)
_refresher: ContextVar[Refresher | None] = ContextVar("refresher", default=None)


@contextmanager
def missing_bundles_from(maker: Maker | None, refresher: Refresher | None = None) -> Iterator[None]:
    """Inside the block, bundles that are not there are those that ``maker`` makes, and ``refresher`` sees
    those that are before they are read; None: an error again, and nothing."""
    tokens = _maker.set(maker), _refresher.set(refresher)
    try:
        yield
    finally:
        _maker.reset(tokens[0])
        _refresher.reset(tokens[1])


def makes_bundles() -> bool:
    """Whether somebody makes bundles that are missing."""
    return _maker.get() is not None


def refreshed(folder: Path, wanted: Wanted) -> Path:
    """``folder``, a bundle that was found, once it was seen to; those shipped with us are as we are."""
    refresher = _refresher.get()
    if refresher is not None and not folder.resolve().is_relative_to(paths.packaged_data_dir()):
        refresher(folder, wanted)
    return folder


def made_for_run(wanted: Wanted, tp: int, problem: InputError) -> Path:
    """The folder of a bundle made for this degree.

    Raises:
        InputError: ``problem`` itself, that it is missing or was made for something else, when nobody makes
            such bundles; with the reason added when making it failed.
    """
    maker = _maker.get()
    if maker is None:
        raise problem
    try:
        folder = maker(wanted, tp)
    except ServingError as error:
        kind = MissingFileError if isinstance(problem, MissingFileError) else InputError
        raise kind(f"{problem}\nIt was not made on demand: {error}") from None
    if folder is None:
        raise problem
    return folder
