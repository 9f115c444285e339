"""A simulated run in the files of benchmark clients; the figures are those worked out in `hand_made`."""

from __future__ import annotations

import csv
import io
import json
from typing import TYPE_CHECKING

import numpy as np
import pytest

from servesim.__main__ import main
from servesim.results.client_files import aiperf_table, vllm_result
from servesim.workload.formats import load_workload
from tests.hand_made import two_requests

if TYPE_CHECKING:
    from pathlib import Path

VLLM_KEYS = [
    "date",
    "endpoint_type",
    "backend",
    "label",
    "model_id",
    "tokenizer_id",
    "num_prompts",
    "request_rate",
    "burstiness",
    "max_concurrency",
    "duration",
    "completed",
    "failed",
    "total_input_tokens",
    "total_output_tokens",
    "request_throughput",
    "request_goodput",
    "output_throughput",
    "total_token_throughput",
    "input_lens",
    "output_lens",
    "ttfts",
    "itls",
    "latencies",
    "start_times",
    "queue_times",
    "generated_texts",
    "errors",
    "max_output_tokens_per_s",
    "max_concurrent_requests",
    "rtfx",
    "mean_ttft_ms",
    "median_ttft_ms",
    "std_ttft_ms",
    "p99_ttft_ms",
    "mean_tpot_ms",
    "median_tpot_ms",
    "std_tpot_ms",
    "p99_tpot_ms",
    "mean_itl_ms",
    "median_itl_ms",
    "std_itl_ms",
    "p99_itl_ms",
    "mean_e2el_ms",
    "median_e2el_ms",
    "std_e2el_ms",
    "p99_e2el_ms",
]
"""Of a run of `vllm bench serve --save-result --save-detailed` 0.33, in their order."""


def test_the_result_has_the_keys_of_vllm() -> None:
    assert list(vllm_result(two_requests())) == VLLM_KEYS


def test_the_lists_are_in_seconds_and_in_order() -> None:
    found = vllm_result(two_requests(rejected=True))
    assert found["ttfts"] == [0.009, 0.008, 0.0]
    assert found["latencies"] == [0.041, 0.048, 0.0]
    assert found["itls"][1] == [0.012, 0.028]
    assert found["errors"][:2] == ["", ""]
    assert found["errors"][2] != ""
    assert (found["completed"], found["failed"], found["num_prompts"]) == (2, 1, 3)
    assert {len(found[name]) for name in VLLM_KEYS if isinstance(found[name], list)} == {3}


def test_the_statistics_are_those_of_the_lists() -> None:
    found = vllm_result(two_requests())
    gaps = np.concatenate([np.array(each) for each in found["itls"]]) * 1000
    assert found["mean_itl_ms"] == pytest.approx(gaps.mean())
    assert found["p99_itl_ms"] == pytest.approx(np.percentile(gaps, 99))
    assert found["mean_ttft_ms"] == pytest.approx(8.5)
    tokens = sum(found["output_lens"])
    assert found["max_output_tokens_per_s"] == tokens  # all within the first second
    assert found["max_concurrent_requests"] == 2
    assert found["output_throughput"] == pytest.approx(tokens / found["duration"])


def test_the_table_of_aiperf_has_two_parts() -> None:
    rows = list(csv.reader(io.StringIO(aiperf_table(two_requests()))))
    blank = rows.index([])
    assert rows[0][:5] == ["Metric", "avg", "min", "max", "sum"]
    assert rows[blank + 1] == ["Metric", "Value"]
    spread = {row[0]: dict(zip(rows[0], row, strict=True)) for row in rows[1:blank]}
    assert spread["Time to First Token (ms)"]["avg"] == "8.50"
    assert spread["Request Latency (ms)"]["max"] == "48.00"
    assert dict(rows[blank + 2 :])["Request Count"] == "2"


def test_a_written_result_is_a_workload(tmp_path: Path) -> None:
    files = {"--save-result": tmp_path / "r.json", "--aiperf": tmp_path / "a.csv"}
    words = [word for flag, path in files.items() for word in (flag, str(path))]
    assert main(["run", "--num-reqs", "20", "--max-concurrency", "4", *words]) == 0
    found = json.loads(files["--save-result"].read_text(encoding="utf-8"))
    assert found["max_concurrency"] == 4
    assert found["mean_client_queue_time_ms"] == 0
    again = load_workload(files["--save-result"])
    once = load_workload("workloads/example_trace.jsonl", num_reqs=20)
    assert [(r.input_tokens, r.output_tokens) for r in again] == [
        (r.input_tokens, r.output_tokens) for r in once
    ]
