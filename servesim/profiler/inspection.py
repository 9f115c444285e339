"""Looking into a bundle, its tables at telling points, and into the measurements behind bundles."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from servesim.cost.bundle import Bundle
from servesim.errors import MissingFileError
from servesim.profiler.silicon import tables as kernel_tables
from servesim.results.table import Table
from servesim.specs import paths
from servesim.specs.hardware import load_hardware
from servesim.specs.reading import read_yaml_object

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

    from servesim.cost.bundle import RankTables
    from servesim.cost.tables import Curve

_COLUMNS = 9
"""Points shown of an axis."""


def open_bundle(name: str) -> Bundle:
    """The bundle at a folder, or of ``<hardware>/<org>/<model>/<variant>`` wherever bundles are found.

    Raises:
        MissingFileError: there is none.
    """
    folder = Path(name).expanduser()
    if not (folder / "meta.yaml").is_file():
        try:
            folder = paths.find(f"profiler/perf/{name}", "bundle")
        except MissingFileError:
            raise MissingFileError(
                f"{name}: no such bundle; give a folder that holds meta.yaml, or "
                "<hardware>/<org>/<model>/<variant> of one below profiler/perf"
            ) from None
    parts = folder.resolve().parts
    hardware, model, variant = (
        (parts[-4], "/".join(parts[-3:-1]), parts[-1]) if len(parts) > 4 else ("", "", "")
    )
    return Bundle(folder, hardware, model, variant, read_yaml_object(folder / "meta.yaml"))


def overview(tables: RankTables) -> dict[str, Table]:
    """Title -> times in us at some points of each table of one degree."""
    found = {
        "dense, us over tokens": _curves(tables.dense),
        "per_sequence, us over sequences": _curves(tables.per_sequence),
        **_attention(tables),
    }
    if tables.moe is not None:
        tokens, experts = tables.moe.surface.axes
        found[f"{tables.moe.source}, us: tokens down, activated experts across"] = _grid(
            some(tokens),
            some(experts),
            lambda at: tables.moe.surface.at(*at),  # type: ignore[union-attr]
        )
    if tables.collectives:
        curves = {f"{name} of {ranks}": curve for (name, ranks), curve in tables.collectives.items()}
        found["comm, us over payload bytes"] = _curves(curves)
    return found


def some(points: NDArray[np.int64], most: int = _COLUMNS) -> NDArray[np.int64]:
    """At most so many of the points, evenly spread over their order, the first and the last among them."""
    if len(points) <= most:
        return points
    places = np.unique(np.round(np.linspace(0, len(points) - 1, most)).astype(int))
    return np.asarray(points[places])


def _curves(curves: Mapping[str, Curve]) -> Table:
    longest = max(curves.values(), key=lambda curve: len(curve.points)).points
    doubling = 2 ** np.arange(0, 40)
    shown = some(np.array([p for p in longest if p in doubling or p == longest[-1]], dtype=np.int64), 12)
    table = Table(["layer", *map(str, shown)])
    table.rows += [[name, *map(_us, curve.at(shown))] for name, curve in curves.items()]
    return table


def _attention(tables: RankTables) -> dict[str, Table]:
    surface = tables.attention
    chunks, decodes, histories, lengths = surface.axes
    chunks, decodes, lengths = (axis[axis > 0] for axis in (chunks, decodes, lengths))
    found = {
        "attention, decodes alone, us: sequences down, KV tokens across": _grid(
            some(decodes), some(lengths), lambda at: surface.at(0 * at[0], at[0], 0 * at[0], at[1])
        ),
        "attention, a chunk alone, us: tokens down, history across": _grid(
            some(chunks), some(histories), lambda at: surface.at(at[0], 0 * at[0], at[1], 0 * at[0])
        ),
    }
    if len(decodes) and len(lengths):
        middle = int(lengths[len(lengths) // 2])
        found[f"attention, a chunk beside decodes of {middle} tokens, us: chunk down, sequences across"] = (
            _grid(
                some(chunks),
                some(decodes),
                lambda at: surface.at(at[0], at[1], 0 * at[0], 0 * at[0] + middle),
            )
        )
    return found


def _grid(down: NDArray[np.int64], across: NDArray[np.int64], us: Callable[[list[Any]], Any]) -> Table:
    table = Table(["", *map(str, across)])
    for value in down:
        at = [np.full(len(across), value), across]
        table.rows.append([str(value), *map(_us, us(at))])
    return table


def _us(value: float) -> str:
    return f"{value:.1f}" if value < 1000 else f"{value:.0f}"


_KINDS: tuple[tuple[str, str], ...] = (
    ("full attention, bf16", "attention/context_attention_perf"),
    ("windows, heads of 64 to 512", "attention/generation_attention_perf"),
    ("latent attention (MLA)", "mla/mla_generation_module_perf"),
    ("with an indexer (DSA)", "sparse_attention/dsa_generation_module_perf"),
    ("MiniMax M3's (MSA)", "msa/msa_generation_module_perf"),
    ("compressed tokens (DeepSeek V4)", "sparse_attention/dsv4_csa_generation_module_perf"),
    ("gated delta net", "linear_attention/gdn_perf"),
    ("Kimi delta attention", "kda/kda_perf"),
    ("GEMMs", "gemm/gemm_perf"),
    ("experts", "moe/moe_perf"),
    ("all-reduce", "comm/custom_allreduce_perf"),
)
"""What a step runs -> the public table of it."""


def kernels_text() -> str:
    """What was measured on which GPU, with which vLLM; what was not is derived or computed.

    Raises:
        InputError: the extra with the public measurements is not installed.
    """
    files = sorted(path.stem for path in paths.find_all("configs/hardware/*.yaml"))
    gpus = [spec for spec in map(load_hardware, files) if spec.silicon is not None]
    table = Table(["kernels", *(gpu.name for gpu in gpus)])
    for what, place in _KINDS:
        family, name = place.split("/")
        found = [kernel_tables.table_versions(str(gpu.silicon), family, name) for gpu in gpus]
        if what.startswith("windows"):  # older tables do not tell windows apart
            for index, gpu in enumerate(gpus):
                rows = kernel_tables.read_table(str(gpu.silicon), family, name)
                found[index] = found[index] if max(rows.columns.get("window_size", (0,))) else []
        table.rows.append([what, *(versions[-1] if versions else "-" for versions in found)])
    for what, column, name, family in (
        ("formats of GEMMs", "gemm_dtype", "gemm_perf", "gemm"),
        ("formats of experts", "moe_dtype", "moe_perf", "moe"),
        ("formats of KV", "kv_cache_dtype", "generation_attention_perf", "attention"),
    ):
        counts = [
            len(kernel_tables.read_table(str(gpu.silicon), family, name).values(column)) for gpu in gpus
        ]
        table.rows.append([what, *map(str, counts)])
    others = [name for name in files if name not in {gpu.name for gpu in gpus}]
    origin = f"{kernel_tables.package_name()} {kernel_tables.package_version()}"
    lines = [
        f"Newest vLLM that a kernel was measured with ({origin}).",
        "-: not measured there; derived from other kernels, or computed from bytes and peak rates, as Mamba",
        f"is everywhere. Computed: {', '.join(others)}.",
    ]
    return "\n".join([table.plain(), "", *lines])
