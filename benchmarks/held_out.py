"""What lookups in measured tables are worth: points left out and told from the others.

    python benchmarks/held_out.py            all tables, and the section of benchmarks/RESULTS.md
    python benchmarks/held_out.py --print    the section on the screen only

Tables: the recorded layerwise profiles of three models (as accuracy.py finds them) and the public kernel
tables of ten GPUs (``pip install 'servesim[silicon]'``), each read as a bundle that was measured on a GPU.
"""

from __future__ import annotations

import csv
import sys
from collections import defaultdict
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from accuracy import RECORDED  # noqa: E402
from results_page import command  # noqa: E402

from servesim.cost.beyond import chunk_growth  # noqa: E402
from servesim.cost.tables import Curve  # noqa: E402
from servesim.profiler.silicon.attention import WARM_BYTES, AttentionShape  # noqa: E402
from servesim.profiler.silicon.comm import all_reduce_rows  # noqa: E402
from servesim.profiler.silicon.decode_grid import DecodeGrid  # noqa: E402
from servesim.profiler.silicon.gemm import gemm_times  # noqa: E402
from servesim.profiler.silicon.tables import (  # noqa: E402
    installed,
    read_table,
    silicon_gpu,
    table_versions,
)
from servesim.results.stated_errors import CHUNKED_PROMPTS  # noqa: E402
from servesim.specs.hardware import load_hardware  # noqa: E402
from servesim.specs.model import load_model  # noqa: E402
from servesim.specs.rank_shapes import GEMM_LAYERS, rank_shapes  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from numpy.typing import NDArray

    from servesim.profiler.silicon.tables import KernelTable

    Floats = NDArray[np.float64]
    Ints = NDArray[np.int64]
    Missed = tuple[float, float]
    """Errors in % of what was told before and of what is told now."""
    ByCut = dict[int, list[Missed]]

CUTS = (2, 4, 8)
"""The last point over the last that is kept."""
FEWEST = 4
"""Points that have to be kept."""
PROFILES = RECORDED / "perf"
SHIPPED = ROOT / "profiler" / "perf"
EXPERTS = (
    *("moe_dtype", "hidden_size", "inter_size", "topk", "num_experts"),
    *("moe_tp_size", "moe_ep_size", "distribution", "kernel_source"),
)
"""What tells two layers of experts apart."""
GEMM_SIZES = (1024, 2048, 4096, 5120, 6144, 8192, 12288, 14336, 16384)


@dataclass(frozen=True)
class Measured:
    """One axis of one table, all other axes held: ``us`` over rising ``points``."""

    kind: str
    points: Ints
    us: Floats
    far: float = 0.0
    """Last point that may be kept at least, for the others say nothing of a steady rate."""


# ---------------------------------------------------------------- the tables


def recorded() -> Iterator[Measured]:
    """The layerwise profiles."""
    for path in sorted(PROFILES.rglob("*.csv")):
        with path.open(encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        us = np.array([float(row["time_us"]) for row in rows]) if "time_us" in rows[0] else np.zeros(0)
        if path.stem in ("dense", "per_sequence"):
            axis = "tokens" if path.stem == "dense" else "sequences"
            layers = [row["layer"] for row in rows]
            yield from _cut(f"{path.stem}, by {axis}", [layers], [int(row[axis]) for row in rows], us)
        elif path.stem == "moe":
            tokens, experts = ([int(row[name]) for row in rows] for name in ("tokens", "activated_experts"))
            yield from _cut("experts, by tokens", [experts], tokens, us)
        elif path.stem == "attention":
            yield from _attention(path, rows, us)


def _attention(path: Path, rows: list[dict[str, str]], us: Floats) -> Iterator[Measured]:
    names = ("prefill_chunk", "kv_prefill", "n_decode", "kv_decode")
    chunk, history, n, kv = (np.array([int(row[name]) for row in rows]) for name in names)
    hardware, organisation, model = path.relative_to(PROFILES).parts[:3]
    token_bytes = _kv_bytes(f"{organisation}/{model}", int(path.parent.name[2:]))
    far = WARM_BYTES * silicon_gpu(load_hardware(hardware)).l2_bytes / token_bytes
    alone = (chunk == 0) & (n > 0)
    yield from _decodes(n[alone], kv[alone], us[alone], far)
    prompts = (chunk > 0) & (n == 0)
    yield from _cut("a chunk, by history", [chunk[prompts]], history[prompts], us[prompts])
    mixed = (chunk > 0) & (n > 0)
    axes = [axis[mixed] for axis in (history, n, kv)]
    for at, what in enumerate(("history", "their number", "KV length")):
        others = [chunk[mixed], *axes[:at], *axes[at + 1 :]]
        yield from _cut(f"a chunk beside decodes, by {what}", others, axes[at], us[mixed])


def _decodes(sizes: Ints, lengths: Ints, us: Floats, far: float) -> Iterator[Measured]:
    """``far``: tokens of KV of all decodes that make four times L2."""
    for size in np.unique(sizes).tolist():
        rows = sizes == size
        yield from _cut("decodes, by KV length", [sizes[rows]], lengths[rows], us[rows], far / size)
    for length in np.unique(lengths).tolist():
        rows = lengths == length
        yield from _cut("decodes, by their number", [lengths[rows]], sizes[rows], us[rows], far / length)


def _kv_bytes(model: str, tp: int) -> float:
    """Of one token in one block on one rank, 16 bit."""
    spec = load_model(model)
    return max(spec.num_key_value_heads // tp, 1) * spec.head_dim * 4.0


def public(names: Iterable[str] = CHUNKED_PROMPTS) -> Iterator[Measured]:
    """The public kernel tables of these GPUs."""
    for hardware in names:
        gpu = silicon_gpu(load_hardware(hardware))
        decodes = read_table(gpu.folder, "attention", "generation_attention_perf").where(window_size=0)
        shape = ("num_heads", "num_key_value_heads", "head_dim", "kv_cache_dtype", "kernel_source")
        for rows in _groups(decodes, shape):
            kv_heads, head_dim = (int(rows.integers(name)[0]) for name in shape[1:3])
            own = AttentionShape(0, kv_heads, head_dim, rows.values("kv_cache_dtype")[0])
            far = WARM_BYTES * gpu.l2_bytes / own.kv_bytes(1, 1)
            lengths = rows.integers("step") + 1
            yield from _decodes(rows.integers("batch_size"), lengths, rows.latency_us, far)
        products = read_table(gpu.folder, "gemm", "gemm_perf")
        usual = np.isin(products.integers("n"), GEMM_SIZES) & np.isin(products.integers("k"), GEMM_SIZES)
        usual &= np.isin(products.columns["gemm_dtype"], ("bfloat16", "fp8"))
        keys = [products.columns[name][usual] for name in ("gemm_dtype", "n", "k")]
        yield from _cut("products, by rows", keys, products.integers("m")[usual], products.latency_us[usual])
        experts = read_table(gpu.folder, "moe", "moe_perf")
        keys = [experts.columns[name] for name in EXPERTS if name in experts.columns]
        yield from _cut("experts, by tokens", keys, experts.integers("num_tokens"), experts.latency_us)
        reduces, _ = all_reduce_rows(gpu)
        if reduces:
            ranks, sizes, times = (np.array([row[i] for row in reduces]) for i in (1, 2, 3))
            yield from _cut("all-reduce, by bytes", [ranks], sizes, times)


def _groups(table: KernelTable, names: tuple[str, ...]) -> Iterator[KernelTable]:
    columns = [table.columns[name] for name in names if name in table.columns]
    yield from map(table.those, _same(columns))


def _same(columns: Iterable[Any]) -> Iterator[NDArray[np.int64]]:
    """Rows that agree on all columns."""
    codes = np.stack(
        [np.unique(column, return_inverse=True)[1].ravel() for column in map(np.asarray, columns)]
    )
    _, group = np.unique(codes, axis=1, return_inverse=True)
    order = np.argsort(group.ravel(), kind="stable")
    yield from np.split(order, np.flatnonzero(np.diff(group.ravel()[order])) + 1)


def _cut(kind: str, others: list[Any], points: Any, us: Floats, far: float = 0.0) -> Iterator[Measured]:
    """One axis of a table for every combination of the other columns; of equal points the quickest counts."""
    points = np.asarray(points)
    if not len(points):
        return
    for rows in _same(others):
        order = rows[np.lexsort((us[rows], points[rows]))]
        first = np.r_[True, np.diff(points[order]) > 0]
        if first.sum() > FEWEST:
            yield Measured(kind, points[order][first].astype(np.int64), us[order][first], far)


# ---------------------------------------------------------------- beyond the last point


def last_interval(points: Ints, us: Floats, wanted: float) -> float:
    """Along the last interval, as lookups went on before; a time never falls."""
    slope = max((us[-1] - us[-2]) / (points[-1] - points[-2]), 0.0)
    return float(us[-1] + slope * (wanted - points[-1]))


def as_built(points: Ints, us: Floats, wanted: float) -> float:
    """What a lookup says."""
    return float(Curve(points, us).at([wanted])[0])


def _missed(before: float, now: float, truth: float) -> Missed:
    return 100 * (before / truth - 1), 100 * (now / truth - 1)


def _both(points: Ints, us: Floats, wanted: float, truth: float) -> Missed:
    """Of the ways along the last interval and as built."""
    return _missed(last_interval(points, us, wanted), as_built(points, us, wanted), truth)


def beyond(tables: Iterable[Measured]) -> dict[str, ByCut]:
    """Kind → cut → errors in % of the last point, along the last interval and as built."""
    found: dict[str, ByCut] = defaultdict(lambda: defaultdict(list))
    for table in tables:
        for cut in CUTS:
            kept = table.points * cut <= table.points[-1]
            if kept.sum() >= FEWEST and table.points[kept][-1] >= table.far:
                points, us, truth = table.points[kept], table.us[kept], table.us[-1]
                found[table.kind][cut].append(_both(points, us, table.points[-1], truth))
    return found


def chunks_beyond() -> dict[str, ByCut]:
    """The same for the largest chunk of the recorded tables, alone and beside decodes."""
    from servesim.profiler.inspection import open_bundle

    found: dict[str, ByCut] = defaultdict(lambda: defaultdict(list))
    for path in sorted(PROFILES.rglob("attention.csv")):
        surface = open_bundle(str(path.parent.parent)).tables(int(path.parent.name[2:])).attention
        chunks, decodes, histories, _ = surface.axes
        chunks, tensor = chunks[chunks > 0], surface.tensor[chunks > 0]
        most = int(chunks[-1])
        for cut in CUTS:
            kept = chunks * cut <= most
            last = int(chunks[kept][-1])
            growth = chunk_growth(chunks[kept], histories, tensor[kept][:, 0, :, 0])
            for h, history in enumerate(histories.tolist()):
                more = growth.us(most, history, last)
                for n, count in enumerate(decodes.tolist()):
                    for us in tensor[:, n, h, ::4].T if count else tensor[:, n, h, :1].T:
                        before = last_interval(chunks[kept], us[kept], most)
                        kind = "a chunk beside decodes, by tokens" if count else "a chunk, by tokens"
                        found[kind][cut].append(_missed(before, us[kept][-1] + more, us[-1]))
    return found


def shipped_beyond() -> dict[str, ByCut]:
    """Products of the shipped bundles beyond their last row, against the public tables, which go further."""
    from servesim.profiler.inspection import open_bundle

    of_table = cache(gemm_times)
    found: dict[str, ByCut] = defaultdict(lambda: defaultdict(list))
    for meta in sorted(SHIPPED.glob("*/meta-llama/*/*/meta.yaml")):
        bundle = open_bundle(str(meta.parent))
        model, gpu = load_model(bundle.meta["model"]), silicon_gpu(load_hardware(bundle.meta["hardware"]))
        usual = "fp8" if bundle.variant.startswith("fp8") else "bfloat16"
        for tp in bundle.meta["tp_degrees"]:
            tables, shapes = bundle.tables(tp), rank_shapes(model, tp)
            layers = [("products, by rows", name, tables.dense[name], usual) for name in GEMM_LAYERS]
            layers.append(("lm_head, by rows", "lm_head", tables.per_sequence["lm_head"], "bfloat16"))
            for kind, name, curve, dtype in layers:
                rows = curve.points[-1] * np.array([cut for cut in CUTS if cut * curve.points[-1] <= 32768])
                truth = of_table(gpu, dtype).time_us(rows, *shapes.gemm(name))
                for cut, wanted, us in zip(CUTS, rows.tolist(), truth.tolist(), strict=False):
                    found[kind][cut].append(_both(curve.points, curve.values, wanted, us))
    return found


MODULES = {
    "latent attention": ("mla", "mla_generation_module_perf"),
    "with an indexer": ("sparse_attention", "dsa_generation_module_perf"),
    "over compressed tokens": ("sparse_attention", "dsv4_csa_generation_module_perf"),
    "MiniMax M3's": ("msa", "msa_generation_module_perf"),
}
"""What a module computes -> its public table."""
MODULE = ("model", "num_heads", "kv_cache_dtype", "gemm_type")
MODULE_GPUS = ("H100", "H200", "B200", "GB200")
EVERY = 20
"""One in so many shapes of a table is tried."""


def modules_beyond(family: str, name: str) -> list[Missed]:
    """Errors in % of decodes whose KV is more than an eighth of the table's most: in proportion to the batch
    and as built."""
    found: list[Missed] = []
    for hardware in MODULE_GPUS:
        gpu = silicon_gpu(load_hardware(hardware)).folder
        if not table_versions(gpu, family, name):
            continue
        for rows in list(_groups(read_table(gpu, family, name), MODULE))[::EVERY]:
            sizes, lengths, us = rows.integers("batch_size"), rows.integers("step"), rows.latency_us
            kept = sizes * lengths * 8 <= (sizes * lengths).max()
            grid = DecodeGrid.of_rows(sizes[kept], lengths[kept], us[kept])
            for size, length, truth in zip(
                sizes[~kept].tolist(), lengths[~kept].tolist(), us[~kept], strict=True
            ):
                most = sizes[kept & (lengths == length)]
                if len(most) > 2:
                    flat = grid.at(int(most.max()), length) * size / int(most.max())
                    found.append(_missed(flat, grid.at(size, length), truth))
    return found


# ---------------------------------------------------------------- between points


def between(tables: Iterable[Measured]) -> dict[str, dict[str, list[Floats]]]:
    """Kind → way → errors in % of every second point, told from the others."""
    found: dict[str, dict[str, list[Floats]]] = defaultdict(lambda: defaultdict(list))
    for table in tables:
        kept = np.arange(len(table.points)) % 2 == 0
        kept[-1] = True
        if kept.all():
            continue
        x, us, wanted, truth = table.points[kept], table.us[kept], table.points[~kept], table.us[~kept]
        far = np.log(np.maximum(x, 1)), np.log(np.maximum(wanted, 1))
        ways = {
            "line": np.interp(wanted, x, us),
            "log-log": np.exp(np.interp(far[1], far[0], np.log(us))),
            "over the logarithm": np.interp(far[1], far[0], us),
            "next point": us[np.searchsorted(x, wanted)],
        }
        for way, told in ways.items():
            found[table.kind][way].append(100 * (told / truth - 1))
    return found


# ---------------------------------------------------------------- the section


BEYOND_TEXT = """\
Upper parts of tables left out: what is kept ends at a half, a quarter or an eighth of the last point, which
is then predicted, along the last interval that is kept (as lookups went on before) and as they go on now:
by the line through all points, each counted with the square of its place (chunks: by a time for every token
and one for every pair of tokens). Decodes count where the KV of the last point kept is at least four times
L2. Products of shipped bundles are compared with the public tables, which go on where a bundle ends. Errors
in %: signed median / P80 of the size. Made by `python benchmarks/held_out.py`."""
MODULES_TEXT = """\
Attention measured as a module, on H100, H200, B200 and GB200: decodes with more than an eighth of the
table's most KV left out and told from the rest, in proportion to the batch (as before) and along lines
(now); as above."""
BETWEEN_TEXT = """\
Every second point left out and told from its neighbours, which makes the gaps twice as wide as they are.
Errors in %: median / P80 of the size, and the greatest one, of a straight line (as lookups do); then median
/ P80 of other ways."""
WAYS = ("log-log", "over the logarithm", "next point")


def section() -> str:
    """The section as Markdown."""
    sources = {"recorded": list(recorded()), "public": list(public())}
    head = [f"| {cut} × as far, last interval | now" for cut in CUTS]
    lines = [BEYOND_TEXT, ""]
    lines += [f"| table | axis | rows {' '.join(head)} |", "| --- | --- | ---: |" + " ---: |" * 2 * len(CUTS)]
    for source, tables in sources.items():
        found = beyond(tables)
        if source == "recorded":
            found |= chunks_beyond()
        lines += [
            f"| {source} | {kind} | {_beyond_cells(errors)} |" for kind, errors in sorted(found.items())
        ]
    for kind, errors in shipped_beyond().items():
        lines.append(f"| shipped | {kind} | {_beyond_cells(errors)} |")
    lines += ["", MODULES_TEXT, "", "| module | rows | in proportion | now |", "| --- | ---: | ---: | ---: |"]
    for what, place in MODULES.items():
        missed = np.array(modules_beyond(*place))
        told = [f"{np.median(v):+.1f} / {np.percentile(abs(v), 80):.1f}" for v in missed.T]
        lines.append(f"| {what} | {len(missed):,} | {' | '.join(told)} |")
    lines += ["", BETWEEN_TEXT, "", f"| table | axis | points | line | greatest | {' | '.join(WAYS)} |"]
    lines.append("| --- | --- | ---: | ---: | ---: |" + " ---: |" * len(WAYS))
    for source, tables in sources.items():
        for kind, ways in sorted(between(tables).items()):
            lines.append(f"| {source} | {kind} | {_between_cells(ways)} |")
    return "\n".join(lines)


def _beyond_cells(errors: ByCut) -> str:
    cells = [f"{len(errors[CUTS[0]]):,}"]
    for cut in CUTS:
        for column in (0, 1):
            values = np.array([pair[column] for pair in errors[cut]])
            told = f"{np.median(values):+.1f} / {np.percentile(abs(values), 80):.1f}" if len(values) else ""
            cells.append(told)
    return " | ".join(cells)


def _between_cells(ways: dict[str, list[Floats]]) -> str:
    sizes = {way: np.abs(np.concatenate(errors)) for way, errors in ways.items()}
    two = {way: f"{np.median(size):.1f} / {np.percentile(size, 80):.1f}" for way, size in sizes.items()}
    line = sizes["line"]
    return " | ".join([f"{len(line):,}", two["line"], f"{line.max():.0f}", *(two[way] for way in WAYS)])


def main() -> int:
    """Print the section, and put it on the page; returns the exit status."""
    lacking = "" if installed() else "needs pip install 'servesim[silicon]'"
    if not lacking and not PROFILES.is_dir():
        lacking = f"no recorded profiles at {PROFILES}; set SERVESIM_RECORDED to the folder that holds them"
    return command("held-out", (__doc__ or "").splitlines()[0], section, lacking)


if __name__ == "__main__":
    sys.exit(main())
