"""A profile bundle: the measured kernel times of one (hardware, model, variant), read from its folder.

``meta.yaml`` is read at once, the tables of a tensor-parallel degree when they are asked for.
"""

from __future__ import annotations

import shlex
from dataclasses import field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from servesim.cost.bundle_csv import (
    check_grid,
    check_whole,
    read_labelled,
    read_numbers,
    refuse_repeats,
    stated_stamps,
)
from servesim.cost.expert_stage import MoeTable
from servesim.cost.finding import (
    folder_root,
    made_for_run,
    no_degree,
    no_variant,
    places,
    profile_command,
    refreshed,
)
from servesim.cost.identity import Wanted, differences, is_computed, source_of
from servesim.cost.skew import read_skew
from servesim.cost.tables import Curve, Surface, densify, weighted_sum
from servesim.errors import InputError, MissingFileError
from servesim.slotted import dataclass
from servesim.specs.block_layers import ATTENTION, ATTENTION_KINDS, attention_groups
from servesim.specs.kept import keep_arrays, kept_arrays, key_of
from servesim.specs.reading import read_bytes, read_yaml_object
from servesim.specs.validation import UNLIMITED

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from servesim.cost.bundle_csv import Stamp
    from servesim.cost.skew import SkewTable
    from servesim.cost.terms import Stage

SAME_AS = "same_as"
"""Key of meta.yaml: table -> variant of the same model and hardware whose file it is."""
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
    """Time over :data:`ATTENTION_AXES` of the average block of the model, or of the stage they are for."""
    moe: MoeTable | None
    skew: SkewTable | None
    collectives: dict[tuple[str, int], Curve]
    """(collective, ranks) → measured time over payload bytes."""
    attentions: dict[str, Surface] = field(default_factory=dict)
    """Stem of its file → time of one block, where blocks differ in their attention and have tables of their
    own; empty: all of them have the one of :attr:`attention`."""
    attention_source: str = ""
    """What :attr:`attention` was made of, where that is not a file of :attr:`folder`."""

    def for_stage(self, stage: Stage) -> RankTables:
        """With :attr:`attention` of the average block of a pipeline stage.

        Raises:
            InputError: a kind of attention that the stage has no table of.
        """
        if not self.attentions:
            return self
        shares = {}
        for group in attention_groups(stage.model.layers):
            if count := sum(block in stage.blocks for block in group.blocks):
                if group.label not in self.attentions:
                    raise InputError(
                        f"{self.folder / f'{group.label}.csv'}: no such file; {count} layers attend so"
                    )
                shares[group.label] = count / stage.num_blocks
        parts = [(self.attentions[label], share) for label, share in shares.items()]
        nothing = [(next(iter(self.attentions.values())), 0.0)]
        return replace(self, attention=weighted_sum(parts or nothing))

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
    """One bundle folder; :func:`find_bundle` makes it."""

    folder: Path
    hardware: str
    model: str
    variant: str
    meta: dict[str, Any]
    wanted: Wanted | None = None
    """What the run asked for; None: the names."""
    _tables: dict[int, RankTables] = field(default_factory=dict)
    _whole_experts: MoeTable | None = None
    _stamps: dict[str, Stamp] | None = None

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
        """The tables of ``tp<N>``, of this folder or of another place that has the degree; read on first use.

        Raises:
            MissingFileError: the degree or one of its files is not there; InputError: a file is malformed.
        """
        if tp not in self._tables:
            holder = self._holder(tp)
            self._tables[tp] = self._read(tp) if holder is self else holder.tables(tp)
        return self._tables[tp]

    def _holder(self, tp: int) -> Bundle:
        """The bundle that has a degree: this one, or the one that is found for it.

        A degree that was made since this one was read lies in the same folder beside a newer meta.yaml, which
        says what its tables hold.
        """
        here = (self.folder / f"tp{tp}").is_dir()
        files = self.meta.get("files")
        if here and (files is None or any(str(name).startswith(f"tp{tp}/") for name in files)):
            return self
        found = find_bundle(self._asked(), tp)
        return self if here and found.meta == self.meta else found

    def of_degree(self, tp: int) -> Bundle:
        """The bundle of the same name that has a degree, made if need be, with what its meta.yaml says now.

        Raises:
            InputError: (MissingFileError among them) there is none, and none can be made.
        """
        return find_bundle(self._asked(), tp)

    def with_tables(self, tp: int, tables: RankTables) -> Bundle:
        """The same bundle with other tables of one degree."""
        return replace(self, _tables={tp: tables})

    def _asked(self) -> Wanted:
        return self.wanted or Wanted(self.hardware, self.model, self.variant)

    def whole_experts(self) -> MoeTable:
        """The expert layer of ranks that hold whole experts, as expert parallelism has them: ``tp1/moe.csv``.

        Raises:
            MissingFileError: it was not measured; InputError: it is malformed.
        """
        if self._whole_experts is None:
            holder = self._holder(1)
            if holder is self:
                self._file("tp1/moe.csv", 1)
                self._whole_experts = self._read_moe("tp1/moe.csv", 1)
            else:
                self._whole_experts = holder.whole_experts()
        return self._whole_experts

    def exchanges(self) -> dict[tuple[str, int], Curve]:
        """(backend, ranks) → time of dispatch and combine over the tokens of a rank, in µs: of
        ``tp1/exchange.csv``; empty where nobody measured any."""
        path, stamp = self._holder(1)._optional("tp1/exchange.csv")
        if not path.is_file():
            return {}
        texts, rows = read_labelled(path, ("backend",), ("ranks", "tokens", "time_us"), stamp)
        names, which = _numbered([name for (name,) in texts])
        refuse_repeats(path, np.column_stack([which, rows[:, :2].astype(np.int64)]))
        curves = {}
        for i, ranks in sorted(set(zip(which.tolist(), rows[:, 0].astype(int).tolist(), strict=True))):
            own = (which == i) & (rows[:, 0] == ranks)
            curves[names[i], ranks] = Curve.from_rows(*rows[own, 1:].T)
        return curves

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

    def measured_reach(self, tp: int) -> tuple[int, int] | None:
        """Tokens of the longest prompt and of the longest KV of a decode that attention was measured with.

        From ``measured_up_to`` of meta.yaml; of a measured bundle without it the ends of its table. None: it
        was computed, or does not say.
        """
        path = self.folder / "meta.yaml"
        stated = _mapping(self.meta, "measured_up_to", path)
        if stated:
            lengths = {str(degree): tokens for degree, tokens in _mapping(stated, "decode_kv", path).items()}
            if str(tp) not in lengths and (self.folder / f"tp{tp}").is_dir():
                holder = self._holder(tp)
                if holder is not self:
                    return holder.measured_reach(tp)
            prompt, kv = stated.get("prompt_tokens"), lengths.get(str(tp))
            if not (isinstance(prompt, int) and isinstance(kv, int) and prompt >= 0 and kv >= 0):
                raise InputError(
                    f"{path}: measured_up_to: must have prompt_tokens and decode_kv.{tp}, whole numbers"
                )
            return prompt, kv
        if is_computed(self.meta):
            return None
        chunks, _, histories, kv_lengths = self.tables(tp).attention.axes
        return int(chunks[-1] + histories[-1]), int(kv_lengths[-1])

    def unstated(self) -> list[str]:
        """One warning where meta.yaml does not state what it takes to check the bundle; else empty."""
        lacks = []
        if self.meta.get("made_for") is None:
            lacks.append("which model's shape it was made for")
        if self.meta.get("files") is None:
            lacks.append("what its tables have to hold")
        if not lacks:
            return []
        return [f"{self.folder}: meta.yaml does not state {' or '.join(lacks)}; used as it is, unchecked"]

    def _read(self, tp: int) -> RankTables:
        name = f"tp{tp}"
        attentions, attention = self._read_attentions(name, tp)
        return RankTables(
            folder=self.folder / name,
            dense=_read_curves(*self._file(f"{name}/dense.csv", tp), "tokens"),
            per_sequence=_read_curves(*self._file(f"{name}/per_sequence.csv", tp), "sequences"),
            attention=attention,
            moe=self._moe(tp),
            skew=self._read_skew(tp),
            collectives=_read_collectives(*self._optional(f"{name}/comm.csv")),
            attentions=attentions,
        )

    def _read_attentions(self, name: str, tp: int) -> tuple[dict[str, Surface], Surface]:
        """The tables of every kind of attention, none where blocks do not differ, and the average block's."""
        first = _read_attention(*self._file(f"{name}/{ATTENTION}.csv", tp), self.meta)
        path = self.folder / "meta.yaml"
        kinds = _mapping(self.meta, ATTENTION_KINDS, path)
        if not kinds:
            return {}, first
        shares, tables = {}, {}
        for label, about in kinds.items():
            if not isinstance(about, dict) or not isinstance(about.get("share"), int | float):
                raise InputError(f"{path}: {ATTENTION_KINDS}.{label}: must have a share, a number of 0 to 1")
            shares[label] = float(about["share"])
            file = f"{name}/{label}.csv"
            tables[label] = first if label == ATTENTION else _read_attention(*self._file(file, tp), {})
        return tables, weighted_sum([(tables[label], share) for label, share in shares.items()])

    def _file(self, name: str, tp: int) -> tuple[Path, Stamp | None]:
        """A table that has to be there, and what is stated of it."""
        path, stamp = self._optional(name)
        if not path.is_file():
            asked = self._asked()
            command = profile_command(asked.hardware, asked.named, asked.variant, tp)
            raise MissingFileError(
                f"{path}: no such file; the bundle is incomplete\nMake it with:  {command}"
            )
        return path, stamp

    def file(self, name: str) -> Path:
        """Where a table lies: in the folder, or in that of the variant beside it that ``same_as`` names."""
        same = _mapping(self.meta, SAME_AS, self.folder / "meta.yaml").get(name)
        return self.folder / name if same is None else self.folder.parent / str(same) / name

    def _optional(self, name: str) -> tuple[Path, Stamp | None]:
        """A table that has to be there only if meta.yaml states it, and what is stated of it."""
        if self._stamps is None:
            self._stamps = stated_stamps(self.meta, self.folder / "meta.yaml")
        path, stamp = self.file(name), self._stamps.get(name)
        if stamp is not None and not path.is_file():
            raise MissingFileError(
                f"{path}: no such file, though meta.yaml states it with {stamp.rows} rows; the bundle is "
                "incomplete: restore the file, or make the bundle again"
            )
        return path, stamp

    def _moe(self, tp: int) -> MoeTable | None:
        """``tp<N>/moe.csv``, or the one of ``tp1`` read as whole experts shared by N ranks."""
        for name, split in ((f"tp{tp}/moe.csv", 1), ("tp1/moe.csv", tp)):
            path, _ = self._optional(name)
            if path.is_file():
                return self._read_moe(name, split)
        return None

    def _read_moe(self, name: str, split: int) -> MoeTable:
        return _read_moe_table(*self._optional(name), split)

    def _read_skew(self, tp: int) -> SkewTable | None:
        """The fit of meta.yaml's ``skew_fit``; None when this degree has none or it is switched off."""
        fit = _mapping(self.meta, "skew_fit", self.folder / "meta.yaml")
        if not fit.get("enabled"):
            return None
        stamps = {name: self._optional(name)[1] for name in self._stamps or {} if name.endswith("_fit.csv")}
        return read_skew(self.folder, fit, tp, stamps)


def load_bundle(hardware: str, model: str, variant: str, tp: int | None = None) -> Bundle:
    """The bundle filed under these names, whatever it was made for; see :func:`find_bundle`."""
    return find_bundle(Wanted(hardware, model, variant), tp)


def find_bundle(wanted: Wanted, tp: int | None = None) -> Bundle:
    """Find and open a bundle: of the working folder, the user's data folder and the shipped data, the first
    that has the degree and was made for what is wanted. None of them: the one that is made for it, where
    somebody makes bundles.

    Args:
        wanted: names, and what the run simulates.
        tp: the degree that will be read; None: any.

    Raises:
        MissingFileError: there is no such bundle or degree; InputError: it was made for something else, or
            its meta.yaml is malformed.
    """
    found, misfits = [], []
    measured = False
    for folder in places(wanted):
        found.append(folder)
        if tp is not None and not (folder / f"tp{tp}").is_dir():
            measured |= not is_computed(_meta_or_nothing(folder))
            continue
        meta = _read_meta(refreshed(folder, wanted), wanted, tp or 1)
        if folder.parent.name != wanted.model.rpartition("/")[2] and _is_only_a_namesake(meta):
            continue
        if differing := differences(meta, folder / "meta.yaml", wanted):
            misfits.append((folder, meta, differing))
        else:
            return Bundle(folder, wanted.hardware, wanted.model, wanted.variant, meta, wanted)
    degree = tp or 1
    if misfits:
        problem: InputError = _misfit(*misfits[0], wanted, degree)
        measured |= any(not is_computed(meta) for _, meta, _ in misfits)
    else:
        problem = no_degree(wanted, degree, found) if found else no_variant(wanted, degree)
    if measured:
        raise problem  # what is made from other data has no place beside measured times
    folder = made_for_run(wanted, degree, problem)
    meta = _read_meta(folder, wanted, degree)
    return Bundle(folder, wanted.hardware, wanted.model, wanted.variant, meta, wanted)


def _read_meta(folder: Path, wanted: Wanted, tp: int) -> dict[str, Any]:
    meta = folder / "meta.yaml"
    if not meta.is_file():
        raise MissingFileError(
            f"{meta}: no such file; a bundle says there where its numbers come from\n"
            f"Make it with:  {profile_command(wanted.hardware, wanted.named, wanted.variant, tp)}"
        )
    return read_yaml_object(meta)


def _meta_or_nothing(folder: Path) -> dict[str, Any]:
    """meta.yaml of a bundle that is not going to be read."""
    try:
        return read_yaml_object(folder / "meta.yaml")
    except InputError:
        return {}


def _is_only_a_namesake(meta: dict[str, Any]) -> bool:
    """Whether a bundle under the bare name of a model given by path has nothing but the name in common.

    Earlier versions filed every path's bundles so. One that states its shape is compared like any other, and
    one that was measured is not lost; a computed one is soon made again.
    """
    return meta.get("made_for") is None and is_computed(meta)


def _misfit(folder: Path, meta: dict[str, Any], differing: list[str], wanted: Wanted, tp: int) -> InputError:
    """That a bundle was made for something else, with what differs and the way out."""
    source = source_of(meta)
    again = "made" if is_computed(meta) else "measured"
    command = profile_command(wanted.hardware, wanted.named, wanted.variant, tp, source=source)
    root = folder_root(folder)
    where = "" if root is None else f" --output-root {shlex.quote(str(root))}"
    return InputError(
        f"{folder}: this bundle was {again} for something else than this run simulates: "
        f"{', '.join(differing)}\n"
        f"Have it {again} again with:  {command} --force{where}\n"
        "or give the other model, or the other hardware file, a name of its own"
    )


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


def _read_curves(path: Path, stamp: Stamp | None, axis: str) -> dict[str, Curve]:
    """dense.csv or per_sequence.csv: layer → curve over ``axis``."""
    texts, rows = read_labelled(path, ("layer",), (axis, "time_us"), stamp)
    layers, which = _numbered([name for (name,) in texts])
    refuse_repeats(path, np.column_stack([which, rows[:, 0].astype(np.int64)]))
    return {name: Curve.from_rows(*rows[which == i].T) for i, name in enumerate(layers)}


def _read_moe_table(path: Path, stamp: Stamp | None, split: int) -> MoeTable:
    rows = read_numbers(path, ("tokens", "activated_experts", "time_us"), stamp)
    keys = rows[:, :2].astype(np.int64)
    refuse_repeats(path, keys)
    return MoeTable(densify(keys, rows[:, 2]), f"{path.parent.name}/moe.csv", split)


def _read_attention(path: Path, stamp: Stamp | None, meta: dict[str, Any]) -> Surface:
    data = read_bytes(path)
    grid = "" if stamp else str(meta.get("attention_grid"))
    makers = [f"servesim.cost.{name}" for name in ("bundle", "bundle_csv", "tables")]
    key = key_of("attention", data, grid, by=makers)
    kept = kept_arrays(key)
    if kept is not None:
        check_whole(path, data, stamp)
        return Surface(tuple(axis.astype(np.int64) for axis in kept[1:]), kept[0])
    surface = _parse_attention(path, stamp, meta)
    keep_arrays(key, [surface.tensor, *surface.axes])
    return surface


def _parse_attention(path: Path, stamp: Stamp | None, meta: dict[str, Any]) -> Surface:
    rows = read_numbers(path, (*ATTENTION_AXES, "time_us"), stamp)
    keys = rows[:, :4].astype(np.int64)
    refuse_repeats(path, keys)
    decodes = (keys[:, 0] == 0) & (keys[:, 1] > 0)
    for rows_there, what in (
        (decodes.any(), "prefill_chunk 0 and n_decode above 0 (steps without prefill)"),
        ((keys[:, 0] > 0).any(), "prefill_chunk above 0 (steps with prefill)"),
    ):
        if not rows_there:
            raise InputError(f"{path}: layer attention has no rows with {what}; profile it again with them")
    if stamp is None:  # else it is whole
        check_grid(path, keys, meta)
    return densify(keys, rows[:, 4])


def _read_collectives(path: Path, stamp: Stamp | None) -> dict[tuple[str, int], Curve]:
    """comm.csv: (collective, ranks) → curve over payload bytes; empty when nothing was measured."""
    if not path.is_file():
        return {}
    texts, rows = read_labelled(path, ("collective",), ("ranks", "bytes", "time_us"), stamp)
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
