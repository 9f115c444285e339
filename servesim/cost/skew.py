"""The extra time of decodes of unequal KV length.

A decode kernel over sequences of different length takes longer than over equal ones of the mean length, and
less than over equal ones of the greatest length: ``t(mean) + α (t(max) - t(mean))``. A bundle may carry α per
bucket of five quantities. A bucket is named after its upper bound and includes it; what lies beyond the last
bound belongs to the last bucket. α is a fit and used as it is, negative values included; since a bucket of
one or two samples can hold a wild one, whoever uses α keeps the time from falling below that of decodes of
the least length. The buckets come from
meta.yaml, α per bucket from skew_fit.csv.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from servesim.cost.bundle_csv import check_whole, line_of_row, read_labelled
from servesim.cost.tables import distinct
from servesim.errors import InputError, MissingFileError
from servesim.slotted import dataclass
from servesim.specs.kept import keep_arrays, kept_arrays, key_of
from servesim.specs.reading import read_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from servesim.cost.bundle_csv import Stamp


@dataclass(slots=True, frozen=True)
class SkewTable:
    """α over (chunk tokens, decodes, skew rate, greatest KV length, history): the axes of ``alpha``.

    ``bounds`` holds, per axis, the upper bounds of all buckets but the last. The chunk axis has the profiled
    chunk sizes as bounds, so that a chunk between two of them takes the larger, as on the other axes.
    """

    bounds: tuple[list[float], ...]
    alpha: NDArray[np.float64]

    def of(self, chunk: int, decodes: int, skew_rate: float, kv_max: int, history: int) -> float:
        """α of one step."""
        chunks, ns, rates, lengths, histories = self.bounds
        return self.alpha.item(
            bisect_left(chunks, chunk),
            bisect_left(ns, decodes),
            bisect_left(rates, skew_rate),
            bisect_left(lengths, kv_max),
            bisect_left(histories, history),
        )

    def for_decodes(self, decodes: int) -> tuple[list[float], list[float], list[list[float]]]:
        """Everything a step of ``decodes`` decodes and no chunk can ask for.

        Returns the bounds of the skew rate, the bounds of the greatest KV length, and α[skew rate][greatest
        KV].
        """
        plane = self.alpha[bisect_left(self.bounds[0], 0), bisect_left(self.bounds[1], decodes), :, :, 0]
        return self.bounds[2], self.bounds[3], plane.tolist()


def skew_rate(kv_mean: int, kv_min: int, kv_max: int) -> float:
    """Where the mean lies between least and greatest: ``(mean - min) / (max - min)``; 0 if all are equal."""
    return (kv_mean - kv_min) / (kv_max - kv_min) if kv_max > kv_min else 0.0


_AXES = ("n", "skew_rate", "kv_big", "kp")
"""Bucketed axes after the chunk, in the order of :class:`~servesim.cost.skew.SkewTable`."""
_LABELS = tuple(f"{axis}_label" for axis in _AXES)


def read_skew(
    folder: Path, fit: dict[str, Any], tp: int, stamps: Mapping[str, Stamp | None] | None = None
) -> SkewTable | None:
    """The α table of one tensor-parallel degree; None when the fit has none.

    ``fit`` is ``skew_fit`` of meta.yaml: ``bucket_axes`` with ``<axis>_bins`` and ``<axis>_labels``, and
    ``per_tp`` with ``alpha_default`` (for buckets without rows) and ``bucket_table`` (a file relative to the
    bundle). ``stamps`` are what is stated of the bundle's tables.

    Raises:
        InputError: something in meta.yaml or the table is malformed; MissingFileError: the table is not
        there.
    """
    meta = folder / "meta.yaml"
    per_tp = fit.get("per_tp")
    if per_tp is not None and not isinstance(per_tp, dict):
        raise InputError(
            f"{meta}: skew_fit.per_tp: {per_tp!r} is not allowed; must be a mapping `degree: fit`"
        )
    entry = (per_tp or {}).get(tp, (per_tp or {}).get(str(tp)))
    if entry is None:
        return None
    where = f"{meta}: skew_fit.per_tp.{tp}"
    if not isinstance(entry, dict):
        raise InputError(f"{where}: {entry!r} is not allowed; must be a mapping `key: value`")
    default = _number(entry.get("alpha_default", 0.0), f"{where}.alpha_default")
    if entry.get("bucket_table") is None:
        return SkewTable(([], [], [], [], []), np.full((1, 1, 1, 1, 1), default))
    path = folder / str(entry["bucket_table"])
    if not path.is_file():
        raise MissingFileError(
            f"{path}: no such file, though {where}.bucket_table names it; "
            "restore it, or profile the bundle again"
        )
    bounds, labels = _buckets(meta, fit.get("bucket_axes"))
    data, stamp = read_bytes(path), (stamps or {}).get(str(entry["bucket_table"]))
    makers = [__name__, "servesim.cost.bundle_csv", "servesim.cost.tables"]
    key = key_of("skew", data, json.dumps([default, labels]), by=makers)
    kept = kept_arrays(key)
    if kept is not None:
        check_whole(path, data, stamp)
    else:
        kept = _read_buckets(path, stamp, meta, labels, default)
        keep_arrays(key, kept)
    chunks, alpha = kept
    return SkewTable((chunks[:-1].astype(np.int64).tolist(), *bounds), alpha)


def _read_buckets(
    path: Path, stamp: Stamp | None, meta: Path, labels: list[dict[str, int]], default: float
) -> list[NDArray[np.float64]]:
    """The profiled chunk sizes, and α of every bucket of them and of ``labels``; ``default`` where the table
    has no row."""
    texts, rows = read_labelled(path, _LABELS, ("pc", "alpha"), stamp)
    chunks = distinct(rows[:, 0].astype(np.int64))
    alpha = np.full((len(chunks), *(len(names) for names in labels)), default)
    try:
        buckets = [
            list(map(known.__getitem__, names))
            for known, names in zip(labels, zip(*texts, strict=True), strict=True)
        ]
    except KeyError:
        row, name = next(
            (row, name)
            for row, names in enumerate(texts)
            for known, name in zip(labels, names, strict=True)
            if name not in known
        )
        raise InputError(
            f"{path}: line {line_of_row(path, row)}: bucket {name!r} is not among the labels "
            f"of skew_fit.bucket_axes in {meta}; profile the bundle again"
        ) from None
    alpha[tuple(np.array([np.searchsorted(chunks, rows[:, 0]), *buckets]))] = rows[:, 1]
    return [chunks.astype(np.float64), alpha]


def _buckets(meta: Path, axes: object) -> tuple[list[list[float]], list[dict[str, int]]]:
    """Upper bounds of all buckets but the last, and label → bucket, per axis."""
    where = f"{meta}: skew_fit.bucket_axes"
    if not isinstance(axes, dict):
        raise InputError(f"{where}: {axes!r} is not allowed; must be a mapping with the bins of every axis")
    bounds, labels = [], []
    for axis in _AXES:
        bins, names = axes.get(f"{axis}_bins"), axes.get(f"{axis}_labels")
        if (
            not isinstance(bins, list)
            or not isinstance(names, list)
            or len(bins) != len(names) + 1
            or not names
        ):
            raise InputError(
                f"{where}: {axis}_bins must be a list of numbers, one entry longer than the list "
                f"{axis}_labels"
            )
        edges = [_number(edge, f"{where}.{axis}_bins") for edge in bins]
        if any(low >= high for low, high in pairwise(edges)):
            raise InputError(f"{where}.{axis}_bins: {bins!r} is not allowed; the numbers must rise")
        bounds.append(edges[1:-1])
        labels.append({str(name): i for i, name in enumerate(names)})
    return bounds, labels


def _number(value: object, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not np.isfinite(value):
        raise InputError(f"{where}: {value!r} is not allowed; must be a finite number")
    return float(value)
