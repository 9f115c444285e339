"""A profile bundle: the measured kernel times of one (hardware, model, variant), read from its folder.

``meta.yaml`` is read at once, the tables of a tensor-parallel degree when they are asked for.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from servesim.cost.bundle_csv import read_labelled, read_numbers, refuse_repeats
from servesim.cost.missing import made_for, refreshed
from servesim.cost.moe import MoeTable
from servesim.cost.skew_csv import read_skew
from servesim.cost.tables import Curve, Surface, densify
from servesim.cost.variant import find_tp_folder, find_variant, profile_command
from servesim.errors import InputError, MissingFileError
from servesim.specs.reading import read_yaml_object

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from servesim.cost.skew import SkewTable

UNLIMITED = 2**31 - 1  # what max_num_seqs 0 stands for
LINKS = ("pcie", "nvlink")
ATTENTION_AXES = ("prefill_chunk", "n_decode", "kv_prefill", "kv_decode")
"""Nesting order of the attention lookup, outermost first."""


@dataclass(slots=True, frozen=True)
class BundleLimits:
    """Largest step the engine could run while it was profiled; None: not recorded."""

    max_num_batched_tokens: int | None
    max_num_seqs: int | None


@dataclass(slots=True, frozen=True)
class RankTables:
    """Kernel times of one rank at one tensor-parallel degree; all values in µs."""

    folder: Path
    dense: dict[str, Curve]
    """Layer → time over tokens."""
    per_sequence: dict[str, Curve]
    """Layer → time over sequences."""
    attention: Surface
    """Time over :data:`ATTENTION_AXES`."""
    moe: MoeTable | None
    skew: SkewTable | None
    collectives: dict[tuple[str, int], Curve]
    """(collective, ranks) → measured time over payload bytes."""

    def collective(self, name: str, ranks: int) -> Curve | None:
        """The measured ``all_reduce``, ``all_gather``, ``reduce_scatter``, ``all_to_all`` or ``send`` among
        so many ranks; None when there is none."""
        return self.collectives.get((name, ranks))

    def layer(self, table: str, layer: str) -> Curve:
        """The curve of a layer from ``dense`` or ``per_sequence``.

        Raises:
            InputError: the bundle has no rows for it.
        """
        curves = self.dense if table == "dense" else self.per_sequence
        if layer not in curves:
            raise InputError(
                f"{self.folder / f'{table}.csv'}: layer {layer} of the architecture has no rows "
                f"(there are rows for {', '.join(sorted(curves))}); profile it again with this layer"
            )
        return curves[layer]


@dataclass(slots=True)
class Bundle:
    """One bundle folder; :func:`load_bundle` makes it."""

    folder: Path
    hardware: str
    model: str
    variant: str
    meta: dict[str, Any]
    _tables: dict[int, RankTables] = field(default_factory=dict)
    _whole_experts: MoeTable | None = None

    @property
    def limits(self) -> BundleLimits:
        """Bounds of the sweep, from ``engine_effective`` of meta.yaml."""
        engine = _mapping(self.meta, "engine_effective", self.folder / "meta.yaml")
        return BundleLimits(
            *(_positive(engine, key, self.folder) for key in ("max_num_batched_tokens", "max_num_seqs"))
        )

    @property
    def collectives_link(self) -> str | None:
        """What comm.csv was measured over, ``pcie`` or ``nvlink``; None: meta.yaml does not say.

        Peers reach each other over PCIe as well or as badly as their machine lets them, over NVLink alike in
        every machine.
        """
        path = self.folder / "meta.yaml"
        link = _mapping(self.meta, "collectives", path).get("link")
        if link not in (None, *LINKS):
            allowed = ", ".join(LINKS)
            raise InputError(f"{path}: collectives.link: {link!r} is not allowed; must be one of {allowed}")
        return link

    def tables(self, tp: int) -> RankTables:
        """The tables of ``tp<N>``; read on first use.

        Raises:
            MissingFileError: the degree or one of its files is not there; InputError: a file is malformed.
        """
        if tp not in self._tables:
            try:
                folder = find_tp_folder(self.folder, self.hardware, self.model, self.variant, tp)
                self._tables[tp] = self._read(folder, tp)
            except MissingFileError as missing:
                if self.meta.get("source") != "silicon":
                    raise  # a degree made from other measurements has no place beside measured ones
                made = made_for(self.hardware, self.model, self.variant, tp, missing)
                self._tables[tp] = self._beside(made)._read(made / f"tp{tp}", tp)
        return self._tables[tp]

    def _beside(self, folder: Path) -> Bundle:
        """The bundle of the same name in another place."""
        meta = read_yaml_object(folder / "meta.yaml")
        return Bundle(folder, self.hardware, self.model, self.variant, meta)

    def whole_experts(self) -> MoeTable:
        """The expert layer of ranks that hold whole experts, as expert parallelism has them: ``tp1/moe.csv``.

        Raises:
            MissingFileError: it was not measured; InputError: it is malformed.
        """
        if self._whole_experts is None:
            path = self._file(self.folder / "tp1", "moe.csv", 1)
            self._whole_experts = _read_moe_table(path, 1)
        return self._whole_experts

    def describe(self) -> str:
        """One line for people: where the numbers come from and how far to trust them."""
        meta = self.meta
        vllm = meta.get("vllm_version")
        source = meta.get("source") or ("vllm" if vllm else "unknown source")
        parts = [f"source {source}"]
        if meta.get("gpu"):
            parts.append(str(meta["gpu"]))
        if vllm:
            parts.append(f"vLLM {vllm}")
        confidence = meta.get("confidence")
        if isinstance(confidence, dict):
            parts.extend(f"{name} {level}" for name, level in confidence.items())
        elif confidence:
            parts.append(str(confidence))
        return f"{self.folder} ({', '.join(parts)})"

    def _read(self, folder: Path, tp: int) -> RankTables:
        return RankTables(
            folder=folder,
            dense=_read_curves(self._file(folder, "dense.csv", tp), "tokens"),
            per_sequence=_read_curves(self._file(folder, "per_sequence.csv", tp), "sequences"),
            attention=_read_attention(self._file(folder, "attention.csv", tp)),
            moe=self._read_moe(folder, tp),
            skew=self._read_skew(tp),
            collectives=_read_collectives(folder / "comm.csv"),
        )

    def _file(self, folder: Path, name: str, tp: int) -> Path:
        path = folder / name
        if not path.is_file():
            command = profile_command(self.hardware, self.model, self.variant, tp)
            raise MissingFileError(
                f"{path}: no such file; the bundle is incomplete\nMake it with:  {command}"
            )
        return path

    def _read_moe(self, folder: Path, tp: int) -> MoeTable | None:
        """``tp<N>/moe.csv``, or the one of ``tp1`` read as whole experts shared by N ranks."""
        for place, split in ((folder, 1), (self.folder / "tp1", tp)):
            path = place / "moe.csv"
            if path.is_file():
                return _read_moe_table(path, split)
        return None

    def _read_skew(self, tp: int) -> SkewTable | None:
        """The fit of meta.yaml's ``skew_fit``; None when this degree has none or it is switched off."""
        fit = _mapping(self.meta, "skew_fit", self.folder / "meta.yaml")
        return read_skew(self.folder, fit, tp) if fit.get("enabled") else None


def load_bundle(hardware: str, model: str, variant: str, tp: int = 1) -> Bundle:
    """Find and open a bundle; ``tp`` only serves the command shown when it is not there.

    Raises:
        MissingFileError: there is no such folder; InputError: its meta.yaml is missing or malformed.
    """
    try:
        folder = refreshed(find_variant(hardware, model, variant, tp), hardware, model, variant)
    except MissingFileError as missing:
        folder = made_for(hardware, model, variant, tp, missing)
    meta = folder / "meta.yaml"
    if not meta.is_file():
        raise MissingFileError(
            f"{meta}: no such file; a bundle says there where its numbers come from\n"
            f"Make it with:  {profile_command(hardware, model, variant, tp)}"
        )
    return Bundle(folder, hardware, model, variant, read_yaml_object(meta))


def range_warnings(bundle: Bundle, max_num_batched_tokens: int, max_num_seqs: int) -> list[str]:
    """Warnings when a run may ask for larger steps than were profiled; empty when all is covered."""
    limits = bundle.limits
    beyond = [
        f"{name} {'unlimited' if asked >= UNLIMITED else asked} (profiled up to {profiled})"
        for name, asked, profiled in (
            ("max_num_batched_tokens", max_num_batched_tokens, limits.max_num_batched_tokens),
            ("max_num_seqs", max_num_seqs, limits.max_num_seqs),
        )
        if profiled is not None and asked > profiled
    ]
    if not beyond:
        return []
    return [f"{bundle.folder}: {' and '.join(beyond)}: larger steps are extrapolated"]


def _read_curves(path: Path, axis: str) -> dict[str, Curve]:
    """dense.csv or per_sequence.csv: layer → curve over ``axis``."""
    texts, rows = read_labelled(path, ("layer",), (axis, "time_us"))
    layers, which = _numbered([name for (name,) in texts])
    refuse_repeats(path, np.column_stack([which, rows[:, 0].astype(np.int64)]))
    return {name: Curve.from_rows(*rows[which == i].T) for i, name in enumerate(layers)}


def _read_moe_table(path: Path, split: int) -> MoeTable:
    rows = read_numbers(path, ("tokens", "activated_experts", "time_us"))
    keys = rows[:, :2].astype(np.int64)
    refuse_repeats(path, keys)
    return MoeTable(densify(keys, rows[:, 2]), f"{path.parent.name}/moe.csv", split)


def _read_attention(path: Path) -> Surface:
    rows = read_numbers(path, (*ATTENTION_AXES, "time_us"))
    keys = rows[:, :4].astype(np.int64)
    refuse_repeats(path, keys)
    decodes = (keys[:, 0] == 0) & (keys[:, 1] > 0)
    for rows_there, what in (
        (decodes.any(), "prefill_chunk 0 and n_decode above 0 (steps without prefill)"),
        ((keys[:, 0] > 0).any(), "prefill_chunk above 0 (steps with prefill)"),
    ):
        if not rows_there:
            raise InputError(f"{path}: layer attention has no rows with {what}; profile it again with them")
    return densify(keys, rows[:, 4])


def _read_collectives(path: Path) -> dict[tuple[str, int], Curve]:
    """comm.csv: (collective, ranks) → curve over payload bytes; empty when nothing was measured."""
    if not path.is_file():
        return {}
    texts, rows = read_labelled(path, ("collective",), ("ranks", "bytes", "time_us"))
    names, which = _numbered([name for (name,) in texts])
    ranks = rows[:, 0].astype(np.int64)
    refuse_repeats(path, np.column_stack([which, rows[:, :2].astype(np.int64)]))
    curves = {}
    for i, count in sorted(set(zip(which.tolist(), ranks.tolist(), strict=True))):
        curves[names[i], count] = Curve.from_rows(*rows[(which == i) & (ranks == count), 1:].T)
    return curves


def _numbered(names: list[str]) -> tuple[list[str], NDArray[np.int64]]:
    """The different names, and for each entry which one it is."""
    different = sorted(set(names))
    number = {name: i for i, name in enumerate(different)}
    return different, np.array([number[name] for name in names], dtype=np.int64)


def _mapping(meta: dict[str, Any], key: str, path: Path) -> dict[str, Any]:
    value = meta.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise InputError(f"{path}: {key}: {value!r} is not allowed; must be a mapping `key: value`")
    return value


def _positive(engine: dict[str, Any], key: str, folder: Path) -> int | None:
    value = engine.get(key)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(
            f"{folder / 'meta.yaml'}: engine_effective.{key}: {value!r} is not allowed; "
            "must be a whole number above 0"
        )
    return value
