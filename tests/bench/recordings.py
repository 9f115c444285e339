"""Recordings written for tests, from runs of our own simulator: no real engine is needed to have one."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from servesim.api import simulate
from servesim.specs.options import RuntimeOptions
from servesim.workload.request import Request, Workload
from tests.specs import clusters

if TYPE_CHECKING:
    from pathlib import Path

    from servesim.results.result import Result

MODEL = "meta-llama/Llama-3.1-8B"
WALL_S, ENGINE_S = 1_700_000_000.0, 5_000.0
"""Where the wall clock and the engine's clock stand when a recording starts."""


def workload(count: int = 40, gap_ms: int = 30) -> Workload:
    """Requests of many lengths, one every ``gap_ms``."""
    return Workload(
        [
            Request(i, 40 + (i * 397) % 900, 5 + (i * 53) % 60, (i + 1) * gap_ms * 1_000_000)
            for i in range(count)
        ],
        "by hand",
    )


def cluster(engine: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """One GPU with a shipped bundle."""
    own = {"engine": engine} if engine else {}
    return clusters.cluster(clusters.instance(**own, **changes))


def arguments(**changes: Any) -> dict[str, Any]:
    """An engine's arguments, under the engine's names."""
    return {
        "model": MODEL,
        "tensor_parallel_size": 1,
        "data_parallel_size": 1,
        "max_num_seqs": 16,
        "max_num_batched_tokens": 1024,
        "max_model_len": None,
        "dtype": "bfloat16",
        "kv_cache_dtype": "auto",
        **changes,
    }


def simulated(engine: dict[str, Any] | None = None, sent: Workload | None = None) -> Result:
    """The run that :func:`arguments` describe."""
    options = RuntimeOptions(
        max_num_seqs=16, max_num_batched_tokens=1024, dtype="bfloat16", kv_cache_dtype="auto"
    )
    return simulate(cluster(engine), sent or workload(), options)


def rows(result: Result) -> list[dict[str, Any]]:
    """``requests.jsonl`` of a run: arrivals on the wall clock, the rest on the engine's."""
    return [
        {
            "request_id": f"bench-{row['request_id']}",
            "input_toks": int(row["input"]),
            "output_toks": int(row["output"]),
            "arrival_time": WALL_S + int(row["arrival"]) / 1e9,
            "queued_ts": ENGINE_S + int(row["queued"]) / 1e9,
            "scheduled_ts": ENGINE_S + int(row["arrival"] + row["queuing_delay"]) / 1e9,
            "first_token_ts": ENGINE_S + int(row["arrival"] + row["TTFT"]) / 1e9,
            "last_token_ts": ENGINE_S + int(row["end_time"]) / 1e9,
        }
        for row in result.requests
    ]


def write(
    folder: Path,
    requests: list[dict[str, Any]],
    *,
    meta: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
    timeseries: str | None = None,
) -> Path:
    """Write a recording; ``meta`` changes or (None) removes keys of ``meta.json``."""
    content = {
        "schema_version": 1,
        "model": MODEL,
        "vllm_version": "0.24.0",
        "engine_kwargs": arguments(),
        "num_requests": len(requests),
        "started_at": "2023-11-14T22:13:20Z",  # WALL_S
        **(meta or {}),
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "meta.json").write_text(json.dumps({k: v for k, v in content.items() if v is not None}))
    (folder / "requests.jsonl").write_text("".join(json.dumps(row) + "\n" for row in requests))
    (folder / "cluster.json").write_text(json.dumps(config or cluster()))
    if timeseries is not None:
        (folder / "timeseries.csv").write_text(timeseries)
    return folder


def write_workload(path: Path, sent: Workload) -> Path:
    """The workload as JSON lines."""
    path.write_text(
        "".join(
            json.dumps(
                {
                    "input_toks": r.input_tokens,
                    "output_toks": r.output_tokens,
                    "arrival_time_ns": r.arrival_ns,
                }
            )
            + "\n"
            for r in sent
        )
    )
    return path
