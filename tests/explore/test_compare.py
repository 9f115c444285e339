"""The same workload under several option sets."""

from __future__ import annotations

import csv
import io
import json
import re
from functools import cache
from pathlib import Path

import pytest

import servesim
from servesim.errors import InputError
from servesim.explore.compare import Comparison
from servesim.explore.show import comparison_text
from servesim.explore.verdict import option_differences
from servesim.specs.cluster import load_cluster
from servesim.workload.request import Request, Workload
from tests.hand_made import two_requests

CLUSTER = "configs/cluster/single_node_single_instance.json"


def tight_cluster(num_gpu_blocks: int) -> servesim.specs.cluster.ClusterSpec:  # type: ignore[name-defined]
    """The shipped single instance with few KV blocks."""
    content = json.loads(Path(CLUSTER).read_text())
    content["nodes"][0]["instances"][0]["num_gpu_blocks"] = num_gpu_blocks
    return load_cluster(content)


def long_answers(count: int) -> Workload:
    """Requests of 4,000 prompt and 200 output tokens, all at once."""
    return Workload([Request(index, 4000, 200, 0) for index in range(count)], "long answers")


@cache
def blocks_against_more() -> Comparison:
    return servesim.compare(
        tight_cluster(600),
        long_answers(6),
        {"few seats": {"max_num_seqs": 2}, "many seats": {"max_num_seqs": 64}},
    )


@cache
def fp8_against_auto() -> Comparison:
    return servesim.compare(CLUSTER, long_answers(4))


def test_the_default_pair_is_auto_against_fp8() -> None:
    comparison = fp8_against_auto()
    assert comparison.names == ["kv auto", "kv fp8"]
    rows = {row.key: row for row in comparison.rows}
    assert rows["kv_bytes_per_token"].values == [131072, 65536]
    assert rows["kv_cache_blocks"].values[1] in {
        rows["kv_cache_blocks"].values[0] * 2 + extra for extra in (0, 1)
    }
    assert [kernel in comparison.verdict for kernel in ("decoding", "prefilling", "attention")] == [True] * 3
    assert "holds 2.00 times the tokens" in comparison.verdict


def test_every_latency_has_mean_and_percentiles() -> None:
    keys = [row.key for row in fp8_against_auto().rows]
    for name in ("ttft", "tpot", "itl", "e2el"):
        assert [key for key in keys if f"_{name}_" in key] == [
            f"{statistic}_{name}_ms" for statistic in ("mean", "median", "p90", "p95", "p99")
        ]
    assert "energy_j" not in keys  # nothing modelled it


def test_more_seats_than_blocks_is_said_to_run_out_of_blocks() -> None:
    few, many = blocks_against_more().results
    assert few.summary["preemptions"] == 0
    assert (few.summary["peak_batch"], many.summary["peak_batch"]) == (2, 2)  # 599 blocks hold two of them
    assert "size was not a limit before" in blocks_against_more().verdict
    assert "requests wait for KV blocks" in blocks_against_more().verdict


def test_sets_that_resolve_alike_are_said_to_change_nothing() -> None:
    comparison = servesim.compare(
        CLUSTER,
        long_answers(1),
        {"a": {"kv_cache_dtype": "auto"}, "b": {"kv_cache_dtype": "auto", "block_size": 16}},
    )
    assert comparison.verdict == (
        "b resolves to the same options as a on every instance, so nothing can change."
    )
    assert {change for row in comparison.rows for change in row.changes()} == {0.0}


def test_differences_are_relative_to_the_first_set() -> None:
    slower = two_requests()
    slower.summary["mean_ttft_ms"] *= 1.5
    slower.summary["preemptions"] = 3
    slower.summary["recomputed_tokens"] = 0
    rows = {row.key: row.changes()[1] for row in Comparison(["a", "b"], [two_requests(), slower]).rows}
    assert rows["mean_ttft_ms"] == pytest.approx(50.0)
    assert rows["preemptions"] == pytest.approx(200.0)
    assert rows["recomputed_tokens"] == pytest.approx(-100.0)
    assert rows["p99_itl_ms"] == 0.0


def test_something_out_of_nothing_has_no_percentage() -> None:
    calm = two_requests()
    calm.summary["preemptions"] = 0
    comparison = Comparison(["calm", "busy"], [calm, two_requests()])
    row = next(row for row in comparison.rows if row.key == "preemptions")
    assert row.changes() == [0.0, None]
    assert "new" in next(line for line in comparison_text(comparison).splitlines() if "preemptions" in line)


def test_the_table_fits_and_is_aligned() -> None:
    lines = comparison_text(fp8_against_auto()).partition("80 % bands")[0].splitlines()
    table = [
        line for line in lines if line.startswith(("KV cache", "KV size", "TTFT", "peak batch", "makespan"))
    ]
    assert len({len(line) for line in table}) == 1
    assert max(map(len, lines[3:])) <= 100


def test_colours_change_nothing_but_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = comparison_text(fp8_against_auto())
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    coloured = comparison_text(fp8_against_auto())
    assert "\033[32m" in coloured
    assert re.sub("\033\\[[0-9]+m", "", coloured) == plain


def test_json_and_csv_hold_every_figure(tmp_path: Path) -> None:
    comparison = fp8_against_auto()
    comparison.save_json(tmp_path / "c.json")
    comparison.save_csv(tmp_path / "c.csv")
    saved = json.loads((tmp_path / "c.json").read_text())
    assert saved["rows"]["kv_bytes_per_token"]["values"] == {"kv auto": 131072, "kv fp8": 65536}
    assert saved["rows"]["kv_bytes_per_token"]["change_percent"] == {"kv fp8": -50.0}
    assert saved["verdict"] == comparison.verdict
    table = list(csv.DictReader(io.StringIO((tmp_path / "c.csv").read_text())))
    assert [row["figure"] for row in table] == [row.key for row in comparison.rows] == list(saved["rows"])
    assert table[3]["kv fp8 change %"] == "-50.0"


def test_one_set_is_no_comparison() -> None:
    with pytest.raises(InputError, match="at least two"):
        servesim.compare(CLUSTER, long_answers(1), {"alone": {}})


def test_a_wrong_option_is_told_before_anything_runs() -> None:
    ran: list[str] = []
    with pytest.raises(InputError, match="block_size"):
        servesim.compare(CLUSTER, long_answers(1), {"a": {}, "b": {"block_size": -1}}, before_run=ran.append)
    assert ran == []


def test_option_differences_name_what_changed() -> None:
    one, two = fp8_against_auto().results
    assert set(option_differences(one, two)) == {"kv_cache_dtype", "kv_dtype", "variant"}
    assert option_differences(one, one) == {}


def test_small_figures_keep_their_digits_beside_large_ones() -> None:
    slow = two_requests()
    slow.summary["mean_ttft_ms"] *= 1000
    shown = comparison_text(Comparison(["a", "b"], [two_requests(), slow]))
    row = next(line for line in shown.splitlines() if line.startswith("TTFT mean"))
    assert f"{two_requests().summary['mean_ttft_ms']:.2f}" in row


def test_a_comparison_becomes_a_table() -> None:
    pytest.importorskip("pandas")
    comparison = servesim.compare(CLUSTER, long_answers(2), {"a": {}, "b": {"max_num_seqs": 1}})
    table = comparison.to_pandas()
    assert table.loc["output_throughput", "a"] == comparison.results[0].figure("output_throughput")
    assert list(table.columns) == ["title", "unit", "a", "b", "b change %"]
    assert repr(comparison).startswith("<Comparison of a: <Result: 2 of 2")
