"""Reading the measured kernel tables that ``aiconfigurator-core`` carries, one parquet file a kernel family.

Files lie in ``systems/data/<gpu>/<family>/<framework>/<version>/<table>.parquet``; latencies are milliseconds
there and microseconds here. Releases add columns and reorder rows, so readers name the columns they want,
treat an absent one as "not distinguished", and never rely on row order.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from servesim.errors import InputError, MissingFileError

if TYPE_CHECKING:
    from numpy.typing import NDArray

PACKAGE = "aiconfigurator-core"
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
        columns = {name: values[keep] for name, values in self.columns.items()}
        return KernelTable(self.name, self.version, self.latency_us[keep], columns)

    def integers(self, name: str) -> NDArray[np.int64]:
        """A column as integers; a table without it cannot be used, which is an InputError."""
        if name not in self.columns:
            known = ", ".join(sorted(self.columns))
            raise InputError(f"{self.name} {self.version} has no column {name!r} (columns: {known})")
        return np.asarray(self.columns[name], dtype=np.int64)

    def values(self, name: str) -> list[str]:
        """Distinct values of a text column, sorted; empty when the column is not there."""
        return sorted({str(value) for value in self.columns.get(name, ())})


def package_version() -> str:
    """Version of the installed data package, or an InputError that says how to get it."""
    try:
        return importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        raise InputError(f"the silicon source needs the package {PACKAGE}; {INSTALL_HINT}") from None


def data_root() -> Path:
    """Folder ``systems`` of the installed data package."""
    package_version()
    spec = importlib.util.find_spec("aiconfigurator_core")
    if spec is None or spec.origin is None:
        raise InputError(f"the silicon source needs the package {PACKAGE}; {INSTALL_HINT}")
    return Path(spec.origin).parent / "systems"


def _version_key(version: str) -> tuple[tuple[int, str], ...]:
    """Orders ``0.9.0 < 0.14.0 < 0.24.0``; text parts sort before numbers."""
    return tuple((int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"[.+-]", version))


def available_gpus() -> list[str]:
    """GPU folders that carry vLLM attention measurements."""
    return sorted(path.parent.parent.name for path in data_root().glob("data/*/attention/vllm"))


def table_versions(gpu: str, family: str, table: str, framework: str = "vllm") -> list[str]:
    """Versions of the framework for which ``table`` was measured on ``gpu``, oldest first."""
    folder = data_root() / "data" / gpu / family / framework
    found = [path.parent.name for path in folder.glob(f"*/{table}.parquet")]
    return sorted(found, key=_version_key)


@lru_cache(maxsize=64)
def read_table(gpu: str, family: str, table: str, framework: str = "vllm") -> KernelTable:
    """The newest measured ``table`` of ``family`` on ``gpu``; MissingFileError when there is none."""
    versions = table_versions(gpu, family, table, framework)
    if not versions:
        raise MissingFileError(
            f"{PACKAGE} {package_version()} has no {framework} table {table} for GPU {gpu!r}; "
            f"GPUs with vLLM data: {', '.join(available_gpus())}"
        )
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise InputError(f"reading the kernel tables needs pyarrow; {INSTALL_HINT}") from None
    path = data_root() / "data" / gpu / family / framework / versions[-1] / f"{table}.parquet"
    data = parquet.read_table(path)
    columns = {name: np.asarray(data.column(name).to_pylist()) for name in data.column_names}
    latency = columns.pop("latency", None)
    if latency is None:
        raise InputError(f"{path.name} of {PACKAGE} {package_version()} has no column 'latency'")
    return KernelTable(table, versions[-1], latency.astype(np.float64) * 1e3, columns)


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
            f"{PACKAGE} {package_version()} does not describe a GPU {gpu!r}; "
            f"GPUs with vLLM data: {', '.join(available_gpus())}"
        )
    described: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return described
