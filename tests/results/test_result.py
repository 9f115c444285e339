"""The public view of a run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import servesim
from tests.hand_made import MS, two_requests


def test_requests_are_an_array_of_integers() -> None:
    rows = two_requests().requests
    assert rows["request_id"].tolist() == [0, 1]
    assert rows["TTFT"].tolist() == [9 * MS, 8 * MS]
    assert rows["latency"].tolist() == [41 * MS, 48 * MS]
    assert rows["queuing_delay"].tolist() == [1 * MS, 0]
    assert all(rows.dtype[name] == np.int64 for name in rows.dtype.names)


def test_tpot_is_the_mean_gap_rounded_down_and_0_for_one_token() -> None:
    result = two_requests()
    result.log.requests[1].token_steps = [(0, 1, 1)]
    result.log.requests[1].end_ns = 20 * MS
    assert result.requests["TPOT"].tolist() == [32 * MS // 3, 0]
    assert result.summary["mean_tpot_ms"] == pytest.approx(32 / 3, abs=1e-6)  # a single token has none


def test_inter_token_latencies_of_one_request() -> None:
    result = two_requests(rejected=True)
    assert result.inter_token_latencies(1).tolist() == [12 * MS, 28 * MS]
    with pytest.raises(KeyError, match="request 2 did not finish"):
        result.inter_token_latencies(2)


def test_steps_are_numbered_within_their_instance() -> None:
    steps = two_requests().steps
    assert steps["step"].tolist() == [0, 1, 2, 3, 4]
    assert steps["end_ns"].tolist() == [10 * MS, 20 * MS, 32 * MS, 42 * MS, 60 * MS]
    assert steps["hit_tokens"].sum() == 32


def test_the_step_file_has_the_documented_columns(tmp_path: Path) -> None:
    result = two_requests()
    result.save_steps(tmp_path / "steps.csv")
    lines = (tmp_path / "steps.csv").read_text().splitlines()
    assert lines[0] == (
        "instance,step,start_ns,end_ns,prefill_tokens,decode_tokens,running,waiting,kv_blocks_used,preempted"
    )
    assert lines[2] == "0,1,12000000,20000000,18,1,2,0,11,0"
    parquet = pytest.importorskip("pyarrow.parquet")
    result.save_steps(tmp_path / "steps.parquet")
    table = parquet.read_table(tmp_path / "steps.parquet")
    assert [",".join(map(str, row.values())) for row in table.to_pylist()] == lines[1:]
    assert table.schema.metadata[b"servesim.vllm_version"] == b"0.33"


def test_pandas_gets_the_columns_of_the_file() -> None:
    pytest.importorskip("pandas")
    frame = two_requests().to_pandas()
    assert frame.columns[:3].tolist() == ["instance id", "request id", "model"]
    assert frame["session id"].isna().tolist() == [True, False]
    assert frame["session id"][1] == "chat, 1"


def test_the_summary_speaks_the_language_of_vllm_bench_serve() -> None:
    summary = two_requests(rejected=True).summary
    assert (summary["completed"], summary["failed"]) == (2, 1)
    assert summary["duration"] == 0.059  # first arrival at 1 ms, last end at 60 ms
    assert summary["total_input_tokens"] == 150
    assert summary["output_throughput"] == pytest.approx(7 / 0.059, abs=1e-6)
    assert summary["median_ttft_ms"] == 8.5
    assert summary["mean_itl_ms"] == pytest.approx((10 + 12 + 10 + 12 + 28) / 5)
    assert summary["p99_e2el_ms"] == pytest.approx(41 + 0.99 * 7)
    assert summary["preemptions"] == 1
    assert summary["recomputed_tokens"] == 52
    assert summary["kv_cache"] == {
        "tokens": 1616,
        "tokens_band": [1616, 1616],
        "blocks": 101,
        "blocks_band": [101, 101],
        "bytes_per_block": 16 << 20,
        "peak": 0.11,
    }
    assert summary["prefix_cache"]["hit_rate"] == pytest.approx(32 / 150, abs=1e-6)
    assert summary["energy"] is None
    assert summary["options"]["kv_cache_dtype"] == "fp8"


def test_the_summary_file_is_the_same_bytes_every_time(tmp_path: Path) -> None:
    for name in ("one.json", "two.json"):
        two_requests().save_summary(tmp_path / name)
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "two.json").read_bytes()
    assert json.loads((tmp_path / "one.json").read_text())["completed"] == 2


def test_the_summary_names_bundles_without_the_machines_folders() -> None:
    result = two_requests()
    result.log.instances[0].bundle_source = "/elsewhere/profiler/perf/NPU1/org/tiny/bf16 (source silicon)"
    assert result.summary["bundle"] == ["profiler/perf/NPU1/org/tiny/bf16 (source silicon)"]


def test_an_infinite_request_rate_is_still_json(tmp_path: Path) -> None:
    result = two_requests()
    assert result.options is not None
    result.options = result.options.replace(request_rate=float("inf"))
    result.save_summary(tmp_path / "run.json")
    assert json.loads((tmp_path / "run.json").read_text())["options"]["request_rate"] == "inf"


def test_a_run_in_which_nothing_finished_has_a_summary_of_zeros() -> None:
    result = two_requests(rejected=True)
    result.log.requests.clear()
    assert (result.summary["completed"], result.summary["duration"]) == (0, 0.0)
    assert result.summary["p99_itl_ms"] == 0.0
    assert result.summary["output_throughput"] == 0.0


def test_results_say_what_they_are() -> None:
    result = servesim.simulate(num_reqs=4)
    assert repr(result).startswith("<Result: 4 of 4 requests in ")
    assert set(result.summary) | {"front_end"} == set(servesim.Summary.__annotations__)
    assert result.figure("completed") == 4
