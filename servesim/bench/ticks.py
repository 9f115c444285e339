"""A replay second by second: throughput, running and waiting requests, from the stamps of the requests."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from servesim.results.atomic import atomic_write

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from servesim.bench.replay_folder import Segment

HEADER = "t,prompt_throughput,gen_throughput,running,waiting,kv_cache_pct"


def tick_rows(
    rows: Sequence[dict[str, Any]], segments: Sequence[Segment], tick_s: float
) -> list[tuple[float, float, float, int, int]]:
    """(seconds since the start, prompt tokens/s, generated tokens/s, running, waiting) of every tick.

    A prompt counts in the tick of its first token; a request waits from being sent to its first token and
    runs from there to its last. Without times of single tokens they are spread evenly. Pauses between two
    sessions are left out.
    """
    if not rows or not segments:
        return []
    origin = segments[0].started_s
    sent = np.array([row["arrival_time"] for row in rows]) - origin
    # from the engine's or the client's monotonic clock to seconds since the start, request by request
    shift = sent - np.array([row["queued_ts"] for row in rows])
    first = np.array([row["first_token_ts"] for row in rows]) + shift
    last = np.array([row["last_token_ts"] for row in rows]) + shift
    tokens = np.concatenate([_token_times(row) + offset for row, offset in zip(rows, shift, strict=True)])
    prompts = np.array([row["input_toks"] for row in rows], dtype=np.float64)
    end_s = float(last.max())
    spans = [(each.started_s - origin, (each.finished_s or math.inf) - origin) for each in segments]
    edges = np.arange(0.0, end_s + 2 * tick_s, tick_s)
    prompt_sums, _ = np.histogram(first, edges, weights=prompts)
    token_sums, _ = np.histogram(tokens, edges)
    table = []
    for i, end in enumerate(edges[1:].tolist()):
        if end - tick_s <= end_s and any(start <= end and end - tick_s <= stop for start, stop in spans):
            running = int(((first <= end) & (end < last)).sum())
            waiting = int(((sent <= end) & (end < first)).sum())
            table.append(
                (end, float(prompt_sums[i] / tick_s), float(token_sums[i] / tick_s), running, waiting)
            )
    return table


def save_ticks(
    path: Path, rows: Sequence[dict[str, Any]], segments: Sequence[Segment], tick_s: float
) -> None:
    """Write :func:`tick_rows` as CSV; ``kv_cache_pct`` stays empty, for a client cannot see it."""
    with atomic_write(path, "w") as handle:
        handle.write(HEADER + "\n")
        for end, prompt, generated, running, waiting in tick_rows(rows, segments, tick_s):
            handle.write(f"{end:.1f},{prompt:.1f},{generated:.1f},{running},{waiting},\n")


def _token_times(row: dict[str, Any]) -> NDArray[np.float64]:
    """Times of a request's tokens on the clock of its stamps."""
    if "token_ts" in row:
        return np.array(row["token_ts"], dtype=np.float64)
    return np.linspace(row["first_token_ts"], row["last_token_ts"], row["output_toks"])
