"""Two bundles side by side: what differs, by how much and where."""

from __future__ import annotations

from pathlib import Path

import pytest

from servesim.cost.bundle import Bundle
from servesim.cost.finding import degrees_in
from servesim.errors import MissingFileError
from servesim.profiler.bundle_writer import write_bundle
from servesim.profiler.difference import differences
from servesim.profiler.inspection import open_bundle, overview, some
from tests.profiler.roofline_toy import PERFECT, build_bundle, job

MOE = "Qwen/Qwen3-30B-A3B-Instruct-2507"


def bundle(folder: Path, model: str = "meta-llama/Llama-3.1-8B", **changes: object) -> Bundle:
    asked = job(model, **changes)
    place = folder / "Toy" / asked.model.name / asked.variant
    write_bundle(place, build_bundle(asked, PERFECT))
    return open_bundle(str(place))


def test_a_bundle_does_not_differ_from_itself(tmp_path: Path) -> None:
    one = bundle(tmp_path, MOE, tp_degrees=(2,))
    found = differences(one, one, 2)
    assert {row.table for row in found} >= {
        "dense qkv_proj",
        "per_sequence lm_head",
        "attention decode",
        "attention prefill",
        "attention mixed",
        "moe",
        "comm all_reduce of 2",
    }
    assert max(abs(row.worst) for row in found) < 1e-9
    assert all(row.outside == 0 for row in found)


def test_a_slower_layer_is_named_with_its_worst_point(tmp_path: Path) -> None:
    base, other = bundle(tmp_path / "a"), bundle(tmp_path / "b")
    path = other.folder / "tp1/dense.csv"
    lines = path.read_text().splitlines()
    changed = []
    for line in lines:
        layer, tokens, time = line.split(",")
        factor = {"32": 3.0, "64": 1.1}.get(tokens, 1.1) if layer == "o_proj" else 1.0
        changed.append(line if factor == 1.0 else f"{layer},{tokens},{float(time) * factor}")
    path.write_text("\n".join(changed) + "\n")
    meta = other.folder / "meta.yaml"
    kept = [line for line in meta.read_text().splitlines() if "tp1/dense.csv" not in line]
    meta.write_text("\n".join(kept) + "\n")  # the way to use a table that was changed on purpose
    by_table = {row.table: row for row in differences(base, open_bundle(str(other.folder)), 1)}
    found = by_table["dense o_proj"]
    assert found.worst == pytest.approx(2.0, abs=1e-6)
    assert found.where == "32 tokens"
    assert found.signed_median == pytest.approx(0.1, abs=1e-6)
    assert found.median == pytest.approx(0.1, abs=1e-6)
    assert found.other_us == pytest.approx(3 * found.base_us)
    assert by_table["dense qkv_proj"].worst == 0.0


def test_rows_beyond_the_others_range_are_counted_not_compared(tmp_path: Path) -> None:
    wide, narrow = bundle(tmp_path / "a", max_kv=4096), bundle(tmp_path / "b", max_kv=1024)
    decode = next(row for row in differences(wide, narrow, 1) if row.table == "attention decode")
    assert decode.outside == 2 * 5  # 2048 and 4096 tokens, with 1, 2, 4, 8 and 16 sequences
    assert decode.worst == pytest.approx(0.0, abs=1e-9)


def test_a_bundle_is_found_by_its_name_below_profiler_perf(root: Path) -> None:
    made = bundle(root / "profiler/perf", tp_degrees=(1, 4))
    found = open_bundle("Toy/meta-llama/Llama-3.1-8B/bf16")
    assert found.folder.resolve() == made.folder.resolve()
    assert (found.hardware, found.model, found.variant) == ("Toy", "meta-llama/Llama-3.1-8B", "bf16")
    assert degrees_in(found.folder) == [1, 4]
    with pytest.raises(MissingFileError, match=r"no such bundle; give a folder that holds meta\.yaml"):
        open_bundle("Toy/meta-llama/Llama-3.1-8B/fp8")


def test_an_overview_shows_every_table_at_its_ends(tmp_path: Path) -> None:
    tables = bundle(tmp_path, MOE).tables(1)
    shown = overview(tables)
    assert len(shown) == 6
    dense = shown["dense, us over tokens"]
    assert (dense.header[1], dense.header[-1]) == ("1", "64")
    decodes = shown["attention, decodes alone, us: sequences down, KV tokens across"]
    assert (decodes.header[1], decodes.header[-1]) == ("16", "1024")
    # 16 sequences of 1025 tokens, 4 KV heads of 128 in 16 bit, at half of 1 MB/us
    assert decodes.rows[-1][-1] == f"{10 + 16 * 1025 * 2 * 4 * 128 * 2 / 0.5e6:.1f}"


def test_a_long_axis_is_thinned_but_keeps_its_ends() -> None:
    import numpy as np

    assert some(np.arange(3)).tolist() == [0, 1, 2]
    thinned = some(np.arange(100), 5).tolist()
    assert (len(thinned), thinned[0], thinned[-1]) == (5, 0, 99)
