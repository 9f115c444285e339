"""Reading the measured kernel tables that ``aiconfigurator-core`` carries, one parquet file a kernel family.

Files lie in ``systems/data/<gpu>/<family>/<framework>/<version>/<table>.parquet``; latencies are milliseconds
there and microseconds here. Releases add columns and reorder rows, so readers name the columns they want,
treat an absent one as "not distinguished", and never rely on row order.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from dataclasses import field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from servesim.errors import InputError, MissingFileError
from servesim.profiler.silicon import tables
from servesim.slotted import dataclass

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from servesim.specs.hardware import HardwareSpec

PACKAGES = {"aisimulate": "aisimulate_core", "aiconfigurator-core": "aiconfigurator_core"}
"""Distribution -> package that carries tables of this layout, the one with newer tables first."""
PACKAGE = "aiconfigurator-core"
"""What the extra installs."""
LICENCE = "Apache-2.0"
INSTALL_HINT = "install it with: pip install 'servesim[silicon]'"


@dataclass(frozen=True, slots=True)
class Gpu:
    """The few facts about a GPU that the derivations need.

    ``folder`` names it in the package's data; ``bandwidth_bytes_s`` is the nominal DRAM bandwidth; L2 size
    and SM count come from the maker's data sheet, since the package does not state them; ``peak_flops_s``
    holds a dtype's dense peak rate in operations per second, nothing for one that has none or is not stated.
    """

    folder: str
    bandwidth_bytes_s: float
    l2_bytes: float
    sm_count: int
    peak_flops_s: tuple[tuple[str, float], ...] = ()

    def flop_us(self, dtype: str) -> float:
        """Time of one operation at the peak rate of ``dtype``, 0 where that is not known."""
        rates = dict(self.peak_flops_s)
        rate = rates.get("fp8" if dtype.startswith("fp8") else dtype)
        return 1e6 / rate if rate else 0.0


@dataclass(frozen=True, slots=True)
class KernelTable:
    """Rows of one measured table as columns; ``latency_us`` is always there."""

    name: str
    version: str
    latency_us: NDArray[np.float64]
    columns: dict[str, NDArray[Any]] = field(repr=False)

    def __len__(self) -> int:
        return len(self.latency_us)

    def where(self, **wanted: object) -> KernelTable:
        """Rows whose columns equal ``wanted``; a column the table does not have cannot rule a row out."""
        keep = np.ones(len(self), dtype=bool)
        for name, value in wanted.items():
            if name in self.columns:
                keep &= self.columns[name] == value
        return self.those(keep)

    def those(self, rows: NDArray[np.bool_] | NDArray[np.int64]) -> KernelTable:
        """Chosen rows, by a mask or by their places."""
        columns = {name: values[rows] for name, values in self.columns.items()}
        return KernelTable(self.name, self.version, self.latency_us[rows], columns)

    def integers(self, name: str) -> NDArray[np.int64]:
        """A column as integers; a table without it cannot be used, which is an InputError."""
        if name not in self.columns:
            known = ", ".join(sorted(self.columns))
            raise InputError(f"{self.name} {self.version} has no column {name!r} (columns: {known})")
        return np.asarray(self.columns[name], dtype=np.int64)

    def values(self, name: str) -> list[str]:
        """Distinct values of a text column, sorted; empty when the column is not there."""
        return sorted({str(value) for value in self.columns.get(name, ())})


def installed() -> bool:
    """Whether there is a package with tables, and what reads them."""
    found = any(importlib.util.find_spec(module) is not None for module in PACKAGES.values())
    return found and importlib.util.find_spec("pyarrow") is not None


def package_name() -> str:
    """The distribution that tables are read from: of those installed the one with newer tables.

    Raises:
        InputError: there is none; the message says how to get one.
    """
    for name, module in PACKAGES.items():
        if importlib.util.find_spec(module) is not None:
            return name
    raise InputError(f"the silicon source needs the package {PACKAGE}; {INSTALL_HINT}")


def package_version() -> str:
    """Version of the installed data package.

    Raises:
        InputError: there is none.
    """
    name = package_name()
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        raise InputError(f"the package {name} states no version; {INSTALL_HINT}") from None


def data_root() -> Path:
    """Folder ``systems`` of the data package; nothing of the package is imported, so that what it requires
    need not be there.

    Raises:
        InputError: there is none.
    """
    spec = importlib.util.find_spec(PACKAGES[package_name()])
    places = list(spec.submodule_search_locations or []) if spec is not None else []
    if not places:
        raise InputError(f"the silicon source needs the package {PACKAGE}; {INSTALL_HINT}")
    return Path(places[0]) / "systems"


def _version_key(version: str) -> tuple[tuple[int, str], ...]:
    """Orders ``0.9.0 < 0.14.0 < 0.24.0``; text parts sort before numbers."""
    return tuple((int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"[.+-]", version))


def available_gpus() -> list[str]:
    """GPU folders that carry vLLM attention measurements."""
    return sorted(path.parent.parent.name for path in data_root().glob("data/*/attention/vllm"))


def table_versions(
    gpu: str, family: str, table: str, framework: str = "vllm", like: Mapping[str, object] | None = None
) -> list[str]:
    """Versions of the framework for which ``table`` was measured on ``gpu``, oldest first.

    ``like``: column -> value of rows that have to be in it.
    """
    folder = data_root() / "data" / gpu / family / framework
    found = sorted((path.parent.name for path in folder.glob(f"*/{table}.parquet")), key=_version_key)
    if not like:
        return found
    return [name for name in found if len(_read(folder / name / f"{table}.parquet").where(**like))]


def read_table(
    gpu: str, family: str, table: str, framework: str = "vllm", like: Mapping[str, object] | None = None
) -> KernelTable:
    """The newest measured ``table`` of ``family`` on ``gpu`` that has rows ``like`` these; of all the newest
    where none has.

    Raises:
        MissingFileError: there is none.
    """
    versions = table_versions(gpu, family, table, framework)
    folder = data_root() / "data" / gpu / family / framework
    for version in reversed(versions):
        found = _read(folder / version / f"{table}.parquet")
        if not like or len(found.where(**like)):
            return found
    if versions:
        return _read(folder / versions[-1] / f"{table}.parquet")
    package, installed = package_name(), package_version()
    raise MissingFileError(
        f"{package} {installed} has no {framework} table {table} for GPU {gpu!r}; "
        f"GPUs with vLLM data: {', '.join(available_gpus())}"
    )


def read_exchange(gpu: str, table: str, framework: str, version: str) -> KernelTable:
    """A table of exchanges of tokens; ``latency_us`` is the sum of its columns of times, in us there."""
    columns = _columns(data_root() / "data" / gpu / "comm" / framework / version / f"{table}.parquet")
    times = [columns[name].astype(np.float64) for name in columns if name.endswith("_us")]
    return KernelTable(table, version, np.sum(times, axis=0), columns)


def gpus_a_node(gpu: str) -> int:
    """GPUs of one node of the machines that were measured."""
    return int(_description(gpu)["node"]["num_gpus_per_node"])


def _columns(path: Path) -> dict[str, NDArray[Any]]:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise InputError(f"reading the kernel tables needs pyarrow; {INSTALL_HINT}") from None
    data = parquet.ParquetFile(path).read()  # read_table would import pandas
    return {name: _column(data.column(name)) for name in data.column_names}


@lru_cache(maxsize=64)
def _read(path: Path) -> KernelTable:
    columns = _columns(path)
    latency = columns.pop("latency", None)
    if latency is None:
        raise InputError(f"{path.name} of {package_name()} {package_version()} has no column 'latency'")
    return KernelTable(path.stem, path.parent.name, latency.astype(np.float64) * 1e3, columns)


def _column(values: Any) -> NDArray[Any]:
    """A column as an array; texts by way of their dictionary, since few of them differ."""
    if str(values.type) != "string":
        return np.asarray(values.to_numpy())
    coded = values.combine_chunks().dictionary_encode()
    words = np.asarray(coded.dictionary.to_pylist())
    found: NDArray[Any] = words[coded.indices.to_numpy()]
    return found


FAST_LINK_BYTES_S = 200e9
"""Between PCIe (64 GB/s at most) and NVLink (300 GB/s and more)."""


def nominal_bandwidth(gpu: str) -> float:
    """DRAM bandwidth in bytes/s, as the package's description of the GPU states it."""
    return float(_description(gpu)["gpu"]["mem_bw"])


def nominal_tflops(gpu: str) -> dict[str, float]:
    """Dense peak rates by dtype that the package states; both 16-bit formats have one."""
    facts = _description(gpu)["gpu"]
    rates = {name: f"{name}_tc_flops" for name in ("bfloat16", "fp8", "int8")}
    known = {name: float(facts[key]) / 1e12 for name, key in rates.items() if key in facts}
    return known | ({"float16": known["bfloat16"]} if "bfloat16" in known else {})


def link_bandwidth(gpu: str) -> float:
    """Bytes/s, one direction, between GPUs of a node; 0: not stated."""
    return float(_description(gpu).get("node", {}).get("intra_node_bw", 0.0))


def has_fast_links(gpu: str) -> bool:
    """Whether GPUs of a node reach each other over links of their own, the same in every machine."""
    return link_bandwidth(gpu) > FAST_LINK_BYTES_S


@lru_cache(maxsize=16)
def _description(gpu: str) -> dict[str, Any]:
    import yaml

    path = data_root() / f"{gpu}.yaml"
    if not path.exists():
        raise MissingFileError(
            f"{package_name()} {package_version()} does not describe a GPU {gpu!r}; "
            f"GPUs with vLLM data: {', '.join(available_gpus())}"
        )
    described: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return described


ALSO_STATED_GBS = {"rtx_pro_6000_server": 1597.0}
"""Memory bandwidths that a maker's data sheet gives and the package does not: of the Server Edition (the
package has the Workstation Edition's)."""
SAME = 0.01
"""Data sheets round their figures by up to this share."""


def other_rates(hardware: HardwareSpec) -> list[str]:
    """Rates of the hardware file that the measured GPU does not have, one each; empty: it is that GPU.

    Kernels were measured on one GPU. They are not those of an accelerator that a file describes otherwise, by
    an edited bandwidth for one.

    Raises:
        InputError: the package is not there.
    """
    gpu = hardware.silicon or ""
    stated = [("memory_bandwidth_gbs", hardware.memory_bandwidth_gbs, tables.nominal_bandwidth(gpu) / 1e9)]
    if gpu in ALSO_STATED_GBS and _same(hardware.memory_bandwidth_gbs, ALSO_STATED_GBS[gpu]):
        stated = []
    measured = tables.nominal_tflops(gpu)
    stated += [
        (f"peak_tflops.{dtype}", tflops, measured[dtype])
        for dtype, tflops in hardware.peak_tflops.items()
        if dtype in measured
    ]
    if hardware.link is not None and tables.has_fast_links(gpu):
        stated.append(("link.bandwidth_gbs", hardware.link.bandwidth_gbs, tables.link_bandwidth(gpu) / 1e9))
    return [
        f"{name} {here:g}, measured GPU {there:g}"
        for name, here, there in stated
        if here is not None and not _same(here, there)
    ]


def _same(here: float | None, there: float) -> bool:
    return here is not None and abs(here / there - 1) <= SAME


def silicon_gpu(hardware: HardwareSpec) -> Gpu:
    """The GPU's facts, or an InputError naming the field of the hardware file that is missing or is another
    GPU's."""
    tables.package_version()
    where = f"configs/hardware/{hardware.name}.yaml"
    if hardware.silicon is None:
        raise InputError(
            f"{where}: silicon: is missing; it names the GPU in the public kernel measurements "
            f"(there are {', '.join(tables.available_gpus())})"
        )
    if hardware.l2_mib is None or hardware.sm_count is None:
        missing = "l2_mib" if hardware.l2_mib is None else "sm_count"
        raise InputError(f"{where}: {missing}: is missing; kernel times are derived from it")
    if others := other_rates(hardware):
        raise InputError(
            f"{where}: {', '.join(others)}: kernels were measured on {hardware.silicon} as it is, and "
            "are not scaled to other rates; use --source roofline for this file, or correct it"
        )
    return Gpu(
        folder=hardware.silicon,
        bandwidth_bytes_s=tables.nominal_bandwidth(hardware.silicon),
        l2_bytes=hardware.l2_mib * 2**20,
        sm_count=hardware.sm_count,
        peak_flops_s=tuple((dtype, 1e12 * rate) for dtype, rate in sorted(hardware.peak_tflops.items())),
    )


@dataclass(frozen=True, slots=True)
class Column:
    """``unit`` is what one counts; ``evidence`` is how that is known."""

    unit: str
    evidence: str


MILLISECONDS = Column(
    "ms",
    "physics: the quickest GEMMs of a GPU reach 0.82 to 0.99 of its bf16 peak rate and 0.87 to 0.99 of "
    "its memory bandwidth when read as ms",
)
COLUMNS: dict[str, dict[str, Column]] = {
    "gemm_perf": {
        "latency": MILLISECONDS,
        "m": Column(
            "rows: tokens of the step", "physics: 2*m*n*k reaches 0.82 to 0.99 of the bf16 peak rate"
        ),
        "n": Column("columns of the result on one GPU", "physics: as m"),
        "k": Column("inner size on one GPU", "physics: as m; n and k apart by the weights' bytes, n*k"),
        "gemm_dtype": Column(
            "dtype of weights and arithmetic",
            "physics: fp8 rows read half the weight bytes at the same 0.8 to 0.95 of the memory bandwidth",
        ),
    },
    "context_attention_perf": {
        "latency": MILLISECONDS,
        "batch_size": Column(
            "sequences of isl tokens each",
            "physics: 2*b*heads*head_dim*isl*(isl+1) reaches 0.58 to 0.80 of the bf16 peak rate",
        ),
        "isl": Column("query tokens of one sequence, all of them new", "physics: as batch_size; causal"),
        "num_heads": Column("query heads on one GPU", "query: heads / tp; physics: as batch_size"),
        "num_key_value_heads": Column("KV heads on one GPU", "query: KV heads / tp, at least one"),
        "head_dim": Column("elements of one head", "physics: as batch_size"),
        "window_size": Column("tokens; 0: the whole context", "query: sliding layers ask with their window"),
        "kv_cache_dtype": Column(
            "dtype of the KV cache", "query; arithmetic too on data-centre Blackwell: 1.16 of the bf16 rate"
        ),
    },
    "generation_attention_perf": {
        "latency": MILLISECONDS,
        "batch_size": Column(
            "sequences of one new token each",
            "physics: b*(step+1) tokens of KV reach 0.85 to 0.98 of the memory bandwidth beyond 4 times L2",
        ),
        "step": Column(
            "tokens in the cache before the new one",
            "query: lengths asked for are isl + step, isl always 1 and step 2^i - 1",
        ),
        "num_heads": Column("query heads on one GPU", "query: heads / tp"),
        "num_key_value_heads": Column("KV heads on one GPU", "query: KV heads / tp; physics: as batch_size"),
        "head_dim": Column("elements of one head", "physics: as batch_size"),
        "window_size": Column("tokens; 0: the whole context", "query: sliding layers ask with their window"),
        "kv_cache_dtype": Column("dtype of the KV cache", "physics: half the bytes at the same bandwidth"),
    },
    "moe_perf": {
        "latency": MILLISECONDS,
        "num_tokens": Column(
            "tokens of all ranks together, each sent to topk experts",
            "physics: 6*tokens*topk*hidden*inter / (tp*ep) reaches up to 0.74 of the peak rate; tokens of "
            "one rank would be 77 times it at moe_ep_size 256",
        ),
        "topk": Column("experts of one token", "physics: as num_tokens"),
        "num_experts": Column(
            "experts of the layer, over all ranks", "query: of the model; physics: weight bytes"
        ),
        "hidden_size": Column("elements of one token", "query: of the model"),
        "inter_size": Column(
            "width of one expert before it is cut in moe_tp_size slices",
            "query: of the model; physics: the slice's width would be 2.3 times the peak rate at tp 4",
        ),
        "moe_tp_size": Column("slices that each expert is cut in", "physics: as inter_size"),
        "moe_ep_size": Column("ranks that share the experts", "physics: as num_tokens"),
        "moe_dtype": Column("dtype of the experts' weights", "query"),
        "distribution": Column("load of the experts, by name", "query: workload_distribution"),
    },
    "custom_allreduce_perf": {
        "latency": MILLISECONDS,
        "num_gpus": Column("ranks", "query: tp"),
        "message_size": Column(
            "elements that one rank brings, of the allreduce_dtype: not bytes",
            "query: 2048 tokens of hidden size 8192 give the row 16777216; physics: as 16-bit elements eight "
            "H100 reach 469 GB/s of bus bandwidth (link 450, with reduction in the switch at most 700), as "
            "bytes none of ten GPUs more than 0.52 of its link; NCCL's table counts alike, and there gathers "
            "of int8 and half take the same time (within 1 %) at the same bytes when read as elements; read "
            "as bytes, half would take 1.8 to 2 times as long",
        ),
        "allreduce_dtype": Column("dtype of an element", "query: comm quant mode half, 2 bytes"),
        "backend": Column("launched one by one (eager) or in a CUDA graph", "query: vLLM asks for graph"),
    },
}
"""Table -> column -> what it counts."""
