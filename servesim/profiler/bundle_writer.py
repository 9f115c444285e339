"""Writing a profile bundle: CSV tables per tensor-parallel degree, and ``meta.yaml`` for where they are from.

A bundle appears whole or not at all: it is written beside its place and then takes it, so that a reader never
sees half a bundle. The same content gives the same bytes.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import field
from typing import TYPE_CHECKING, Any

from servesim.errors import RunError
from servesim.slotted import dataclass

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

HEADERS: dict[str, tuple[str, ...]] = {
    "dense.csv": ("layer", "tokens", "time_us"),
    "per_sequence.csv": ("layer", "sequences", "time_us"),
    "attention.csv": ("prefill_chunk", "kv_prefill", "n_decode", "kv_decode", "time_us"),
    "moe.csv": ("tokens", "activated_experts", "time_us"),
    "exchange.csv": ("backend", "ranks", "tokens", "time_us"),
    "comm.csv": ("collective", "ranks", "bytes", "time_us"),
    "skew.csv": (
        *("regime", "n", "nb", "ratio", "skew", "pc", "kp", "kvs", "kv_big", "kv_mean"),
        *("t_mean_us", "t_max_us", "t_skew_us", "alpha"),
    ),
    "skew_fit.csv": ("pc", "n_label", "skew_rate_label", "kv_big_label", "kp_label", "alpha", "n_samples"),
}
"""Column names of every table a bundle may have; ``attention_<kind>.csv`` have those of attention.csv."""

Row = tuple[Any, ...]


@dataclass(slots=True)
class BundleContent:
    """Everything of one bundle: ``meta`` for meta.yaml, ``tables`` from (tp, file name) to rows."""

    meta: dict[str, Any]
    tables: dict[tuple[int, str], list[Row]] = field(default_factory=dict)


def header_of(name: str) -> tuple[str, ...]:
    """Column names of a table."""
    return HEADERS["attention.csv" if name.startswith("attention") else name]


def _text(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def csv_bytes(header: Sequence[str], rows: Iterable[Row]) -> bytes:
    """A table as bytes: floats with six significant digits, one line feed a row."""
    lines = [",".join(header), *(",".join(map(_text, row)) for row in rows)]
    return ("\n".join(lines) + "\n").encode()


def meta_bytes(meta: dict[str, Any]) -> bytes:
    """``meta.yaml`` in the order its keys were given, a list on one line."""
    import yaml

    class Dumper(yaml.SafeDumper):
        """Its representers are its own; those of yaml.SafeDumper stay as they are."""

    def one_line(dumper: yaml.SafeDumper, data: list[Any]) -> yaml.Node:
        return dumper.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=True)

    Dumper.add_representer(list, one_line)
    text: str = yaml.dump(meta, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=1000)
    return text.encode()


def bundle_files(content: BundleContent) -> dict[str, bytes]:
    """Every file of the bundle by its path inside the bundle's folder.

    ``meta.yaml`` states the rows and the checksum of every table, by which a reader knows that it has them
    whole.
    """
    from servesim.cost.bundle_csv import stamp_of  # with NumPy: --help needs the headers alone

    files = {
        f"tp{tp}/{name}": csv_bytes(header_of(name), rows)
        for (tp, name), rows in sorted(content.tables.items())
    }
    stamps = {path: str(stamp_of(data)) for path, data in files.items()}
    return {"meta.yaml": meta_bytes({**content.meta, "files": stamps}), **files}


def write_bundle(folder: Path, content: BundleContent) -> None:
    """Put the bundle at ``folder``, in place of the one that is there.

    Raises:
        RunError: the folder cannot be written (missing permission, full disk).
    """
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    former = folder.with_name(f".{folder.name}.{os.getpid()}.former")
    try:
        for relative, data in bundle_files(content).items():
            path = partial / relative
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        if folder.exists():
            folder.rename(former)
        partial.rename(folder)
        shutil.rmtree(former, ignore_errors=True)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        if former.exists() and not folder.exists():
            former.rename(folder)
        raise RunError(f"{folder}: the bundle cannot be written: {error.strerror or error}") from error


def share_tables(root: Path) -> int:
    """Keep tables that variants of a model have in common once: attention does not depend on the weights.

    ``root``: a ``profiler/perf``. ``meta.yaml`` then names the variant that has the file. Returns how many
    files were removed.
    """
    from servesim.cost.bundle import SAME_AS
    from servesim.specs.reading import read_yaml_object

    removed = 0
    for model in sorted({meta.parent.parent for meta in root.glob("*/*/*/*/meta.yaml")}):
        seen: dict[tuple[str, str], str] = {}
        for folder in sorted(path.parent for path in model.glob("*/meta.yaml")):
            meta, same = read_yaml_object(folder / "meta.yaml"), {}
            for name, stamp in meta.get("files", {}).items():
                if not name.rpartition("/")[2].startswith("attention"):
                    continue
                owner = seen.setdefault((name, stamp), folder.name)
                if owner != folder.name and (folder / name).is_file():
                    (folder / name).unlink()
                    same[name] = owner
            if same:
                (folder / "meta.yaml").write_bytes(meta_bytes({**meta, SAME_AS: same}))
                removed += len(same)
    return removed
