"""Whether a model can be simulated on a hardware: the bundle there is and its reach, or how to make one."""

from __future__ import annotations

from dataclasses import field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from servesim.cost.bundle import find_bundle
from servesim.cost.finding import degrees_in, places, profile_command
from servesim.cost.identity import wanted_for
from servesim.errors import InputError, ServingError
from servesim.memory.sizing import weight_bytes_per_npu
from servesim.profiler.meter import ProfileJob
from servesim.profiler.sources import COMPUTING, SOURCES, capability
from servesim.results.stated_errors import RESULTS, stated_error
from servesim.results.units import GIB
from servesim.slotted import dataclass
from servesim.specs import paths
from servesim.specs.dtypes import variant_name
from servesim.specs.rank_shapes import rank_shapes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from servesim.cost.bundle import Bundle, RankTables
    from servesim.specs.hardware import HardwareSpec
    from servesim.specs.model import ModelSpec

VARIANTS = (("bfloat16", "auto"), ("bfloat16", "fp8"), ("fp8", "auto"), ("fp8", "fp8"))
"""Dtype combinations of the matrix, in the order of a cell's letters."""
DEGREES = (1, 2, 4, 8)
"""Tensor-parallel degrees that the matrix looks at."""
DEFAULT_UTILIZATION = 0.9
"""Share of the memory that the engine uses unless it is told otherwise."""


@dataclass(frozen=True, slots=True)
class FoundBundle:
    """A bundle that a run would read; ranges are (first, last) of each table axis at the degree asked for."""

    folder: str
    place: str
    """shipped, yours (the user's data folder) or here (below the working folder)."""
    source: str
    gpu: str | None
    versions: list[str]
    """Of the data it was made from and of the engine measured."""
    confidence: str | None
    error: str
    """How far its times are off, with the source of the number."""
    tables: dict[str, str]
    degrees: list[int]
    ranges: dict[str, tuple[int, int]]
    extrapolated: list[str]


@dataclass(frozen=True, slots=True)
class Way:
    """A source that could make the bundle, or the reason why it could not."""

    source: str
    possible: bool
    about: str
    command: str


@dataclass(frozen=True, slots=True)
class Answer:
    """What there is for one model on one hardware in one variant at one degree."""

    model: str
    hardware: str
    variant: str
    tp: int
    bundle: FoundBundle | None
    problem: str | None
    """Why a bundle that is there cannot be used for this degree."""
    ways: list[Way] = field(default_factory=list)
    no_fit: str | None = None
    """Why the weights do not fit the hardware's memory at this degree, with figures."""

    @property
    def letter(self) -> str:
        """In the matrix: a capital for a bundle that is there, a small letter for one that can be made, x for
        a model that does not fit; p: by measurements of this GPU's kernels, once they are installed."""
        if self.no_fit is not None:
            return "x"
        if self.bundle is not None and self.problem is None:
            return SOURCES[self.bundle.source].letter if self.bundle.source in SOURCES else "M"
        if any(way.source == "silicon" and "pip install" in way.about for way in self.ways):
            return "p"
        made = [SOURCES[way.source].letter.lower() for way in self.ways if way.possible]
        return made[0] if made else "-"

    @property
    def usable(self) -> bool:
        """Whether a run can have it on this machine."""
        found = self.bundle is not None and self.problem is None
        return self.no_fit is None and (found or any(way.possible for way in self.ways))


def answer(job: ProfileJob, asked: dict[str, int], ways: bool = True) -> Answer:
    """What there is for a job of one degree; ``asked`` are the sizes the run may reach, by range name.

    ``ways=False`` looks for ways to make a bundle only where there is none, and only for the first that does.
    """
    tp = job.tp_degrees[0]
    found, problem = look_up(job, tp, asked)
    no_fit = weights_that_do_not_fit(job.model, job.hardware, job.dtype, tp)
    told = Answer(job.model.name, job.hardware.name, job.variant, tp, found, problem, no_fit=no_fit)
    if ways or found is None or problem is not None:
        told = replace(told, ways=_ways(job, all_of_them=ways))
    return told


def best_answer(job: ProfileJob, degrees: Sequence[int]) -> Answer:
    """What there is at whichever of the degrees has most: a bundle, else a way to make one.

    Degrees that cannot split the model or whose ranks cannot hold its weights do not count.
    """
    fitting: list[int] = []
    told = Answer(job.model.name, job.hardware.name, job.variant, degrees[0], None, None)
    for tp in degrees:
        try:
            rank_shapes(job.model, tp)
        except InputError:
            continue
        no_fit = weights_that_do_not_fit(job.model, job.hardware, job.dtype, tp)
        if no_fit is not None:
            told = replace(told, tp=tp, no_fit=no_fit)
            continue
        fitting.append(tp)
        found, problem = look_up(job, tp, {})
        if found is not None and problem is None:
            return replace(told, tp=tp, bundle=found, no_fit=None)
    if not fitting:
        return told
    one = replace(job, tp_degrees=(fitting[0],))
    return replace(told, tp=fitting[0], no_fit=None, ways=_ways(one, all_of_them=False))


def weights_that_do_not_fit(model: ModelSpec, hardware: HardwareSpec, dtype: str, tp: int) -> str | None:
    """That the weights alone exceed what the engine uses of a rank's memory, with figures and the degree that
    holds them; None: they fit, or nobody says how much memory there is."""
    if hardware.memory_gib is None:
        return None
    usable = DEFAULT_UTILIZATION * hardware.memory_gib
    needed = {n: weight_bytes_per_npu(model, dtype, n) / GIB for n in sorted({tp, *DEGREES})}
    if needed[tp] <= usable:
        return None
    fits = [n for n, weights in needed.items() if n > tp and weights <= usable]
    way_out = f"tp {fits[0]} fits" if fits else f"nor at tp {max(needed)} ({needed[max(needed)]:.1f} GiB)"
    return (
        f"{needed[tp]:.1f} GiB of {dtype} weights per GPU at tp {tp}, of {usable:.1f} GiB that can be used "
        f"({hardware.memory_gib:g} GiB x {DEFAULT_UTILIZATION:g}); {way_out}"
    )


def _ways(job: ProfileJob, all_of_them: bool) -> list[Way]:
    tried: list[Way] = []
    for source in COMPUTING:
        tried.append(way(job, source))
        if tried[-1].possible and not all_of_them:
            break
    return tried


def look_up(job: ProfileJob, tp: int, asked: dict[str, int]) -> tuple[FoundBundle | None, str | None]:
    """The bundle a run would read, and what is wrong with it for this degree."""
    wanted = wanted_for(job.model, job.hardware, job.variant)
    if next(places(wanted), None) is None:
        return None, None
    bundle = None
    try:
        bundle = find_bundle(wanted, tp)
        return _described(bundle, bundle.tables(tp), asked), None
    except ServingError as error:
        problem = str(error).splitlines()[0]
    try:
        return _described(bundle or find_bundle(wanted), None, asked), problem
    except ServingError:
        return None, problem


def _described(bundle: Bundle, tables: RankTables | None, asked: dict[str, int]) -> FoundBundle:
    meta = bundle.meta
    ranges = axis_ranges(tables) if tables is not None else {}
    versions = [f"vLLM {meta['vllm_version']}"] if meta.get("vllm_version") else []
    if meta.get("data_package"):
        versions.insert(0, f"{meta['data_package']} {meta.get('data_version', '')}".rstrip())
    error = stated_error(meta, bundle.hardware, "fp8" if "kvfp8" in bundle.variant else "")
    return FoundBundle(
        folder=str(bundle.folder),
        place=_place(bundle.folder),
        source=str(meta.get("source") or ("vllm" if meta.get("vllm_version") else "unknown")),
        gpu=str(meta["gpu"]) if meta.get("gpu") else None,
        versions=versions,
        confidence=_confidence(meta),
        error=f"kernel times ±{error.percent:g} % ({error.reason}; {RESULTS})",
        tables={str(name): str(claim) for name, claim in (meta.get("tables") or {}).items()},
        degrees=degrees_in(bundle.folder),
        ranges=ranges,
        extrapolated=[
            f"{name} {ranges[name][1] + 1} to {most}"
            for name, most in asked.items()
            if name in ranges and most > ranges[name][1]
        ],
    )


def axis_ranges(tables: RankTables) -> dict[str, tuple[int, int]]:
    """First and last point of every axis of the tables."""
    tokens = [curve.points for curve in tables.dense.values()]
    sequences = [curve.points for curve in tables.per_sequence.values()]
    chunks, decodes, histories, lengths = tables.attention.axes
    ranges = {
        "tokens": (max(int(points[0]) for points in tokens), min(int(points[-1]) for points in tokens)),
        "sequences": (max(int(at[0]) for at in sequences), min(int(at[-1]) for at in sequences)),
    }
    axes = {"chunk": chunks, "history": histories, "decodes": decodes, "decode KV": lengths}
    return ranges | {
        name: (int(axis[axis > 0][0]), int(axis[-1])) for name, axis in axes.items() if axis[-1] > 0
    }


def _confidence(meta: dict[str, Any]) -> str | None:
    level = meta.get("confidence")
    if isinstance(level, dict):
        return ", ".join(f"{name} {value}" for name, value in level.items())
    return str(level) if level else None


def _place(folder: Path) -> str:
    whole = folder.resolve()
    for name, root in (("shipped", paths.packaged_data_dir()), ("yours", paths.user_data_dir())):
        if whole.is_relative_to((root / "profiler").resolve()):
            return name
    return "here"


def way(job: ProfileJob, source: str) -> Way:
    """Whether a computing source can make the bundle, and by which command."""
    return Way(source, *capability(source, job), command_for(job, source))


def command_for(job: ProfileJob, source: str) -> str:
    """The command line that makes the bundle."""
    wanted = wanted_for(job.model, job.hardware, job.variant)
    return profile_command(wanted.hardware, wanted.named, wanted.variant, job.tp_degrees[0], source=source)


def variant_letters() -> list[str]:
    """Names of the matrix's variants, in the order of a cell's letters."""
    return [variant_name(*dtypes) for dtypes in VARIANTS]
