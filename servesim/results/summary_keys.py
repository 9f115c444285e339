"""The summary of a run as a type: every key with what it holds, for editors and type checkers."""

from __future__ import annotations

from typing import Any, TypedDict


class Summary(TypedDict):
    """Figures of a run under the names of ``vllm bench serve``, and ours; docs/output.md explains each.

    Times of distributions are in ms, ``duration`` in s, throughputs per second of the run.
    """

    duration: float
    completed: int
    failed: int
    total_input_tokens: int
    total_output_tokens: int
    request_throughput: float
    output_throughput: float
    total_token_throughput: float
    mean_ttft_ms: float
    median_ttft_ms: float
    std_ttft_ms: float
    p90_ttft_ms: float
    p95_ttft_ms: float
    p99_ttft_ms: float
    mean_tpot_ms: float
    median_tpot_ms: float
    std_tpot_ms: float
    p90_tpot_ms: float
    p95_tpot_ms: float
    p99_tpot_ms: float
    mean_itl_ms: float
    median_itl_ms: float
    std_itl_ms: float
    p90_itl_ms: float
    p95_itl_ms: float
    p99_itl_ms: float
    mean_e2el_ms: float
    median_e2el_ms: float
    std_e2el_ms: float
    p90_e2el_ms: float
    p95_e2el_ms: float
    p99_e2el_ms: float
    mean_queuing_delay_ms: float
    median_queuing_delay_ms: float
    std_queuing_delay_ms: float
    p90_queuing_delay_ms: float
    p95_queuing_delay_ms: float
    p99_queuing_delay_ms: float
    kv_cache: dict[str, Any]
    peak_batch: int
    steps: int
    preemptions: int
    recomputed_tokens: int
    prefix_cache: dict[str, Any]
    saturation: dict[str, Any]
    extrapolated: list[Any]
    energy: dict[str, Any] | None
    skipped_lines: int
    options: dict[str, Any]
    notes: list[Any]
    instances: list[Any]
    bundle: list[Any]
    run_id: str
    versions: dict[str, Any]
