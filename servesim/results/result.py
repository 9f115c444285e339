"""The public view of a finished run."""

from __future__ import annotations

import hashlib
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from servesim._version import __version__
from servesim.results.csv import COLUMNS, NUMERIC_COLUMNS, save_requests, text_columns
from servesim.results.energy import power_series, series_interval_ns
from servesim.results.request_log import RequestLog
from servesim.results.request_table import RequestTable
from servesim.results.stats import TokenGaps
from servesim.results.steps import save_steps, steps_array
from servesim.results.summary import save_summary, summarise
from servesim.results.units import SECOND
from servesim.specs.vllm_versions import NEWEST

if TYPE_CHECKING:
    from pathlib import Path

    import pandas as pd
    from numpy.typing import NDArray

    from servesim.results.records import InstanceLog, RejectedRequest, RunLog
    from servesim.results.step_stream import StepStream
    from servesim.results.summary import Summary
    from servesim.specs.cluster import ClusterSpec
    from servesim.specs.options import RuntimeOptions
    from servesim.workload.request import Workload


class Result:
    """What a run produced, as NumPy arrays, a summary and files.

    Everything is derived on first use from the engine's log and kept; nothing holds one number per token.
    """

    def __init__(
        self,
        log: RunLog,
        workload: Workload,
        options: RuntimeOptions | None = None,
        cluster: ClusterSpec | None = None,
    ) -> None:
        self.log = log
        self.workload = workload
        self.options = options
        self.cluster = cluster
        self.step_stream: StepStream | None = None
        """What wrote the steps while the run went on; None: nothing did."""

    def __repr__(self) -> str:
        one = self.summary
        return (
            f"<Result: {one['completed']} of {len(self.workload)} requests in {one['duration']:.1f} s, "
            f"{one['output_throughput']:,.0f} output tok/s, mean TTFT {one['mean_ttft_ms']:,.1f} ms, "
            f"mean TPOT {one['mean_tpot_ms']:,.2f} ms>"
        )

    def steps_went_to(self, stream: StepStream | None) -> None:
        """Steps were written while the run went on; None: they were not."""
        self.step_stream = stream

    def figure(self, key: str) -> float:
        """One number of :attr:`summary` by its key."""
        return float(cast("dict[str, Any]", self.summary)[key])

    @cached_property
    def records(self) -> RequestLog:
        """The engine's record of each finished request, ordered by request id."""
        found = self.log.requests
        return (found if isinstance(found, RequestLog) else RequestLog(found)).in_order()

    @cached_property
    def session_ids(self) -> dict[int, str]:
        """Request -> its session, of those that belong to one."""
        special = self.workload.special
        return {request.index: request.session_id for request in special if request.session_id is not None}

    @property
    def rejected(self) -> list[RejectedRequest]:
        """Requests that could never run, each with its reason."""
        return self.log.rejected

    @property
    def nothing_ran(self) -> bool:
        """Whether every request was rejected: all figures are 0 then, and mean nothing."""
        return bool(self.log.rejected) and not self.log.requests

    @property
    def instances(self) -> list[InstanceLog]:
        """Per instance: its options, KV-cache capacity, bundle and step log."""
        return self.log.instances

    @cached_property
    def token_gaps(self) -> TokenGaps:
        """Token times, as tracks and runs of their entries."""
        return TokenGaps(self.log.tracks(), self.records)

    @cached_property
    def requests(self) -> NDArray[np.void]:
        """One row per finished request, ordered by request id; shape (requests,), every field int64.

        The fields are the numeric columns of the per-request file with underscores for spaces:

        - ``instance_id``, ``request_id``; ``decode_instance`` (differs with separate prefill and decode)
        - ``input``, ``output``: tokens of the prompt, tokens generated
        - ``arrival``, ``queued``, ``end_time``: ns on the simulation clock; ``queued`` is the step boundary
          at which the engine took the request in
        - ``latency`` (arrival to end), ``queuing_delay`` (arrival to the first step that schedules it, front
          end left out), ``TTFT`` (arrival to first token): ns
        - ``TPOT``: (latency - TTFT) // (output - 1) in ns, 0 for a single token
        - ``sub_request``: position in its session
        - ``prefix_hit`` = ``npu_hit`` + ``storage_hit``: prompt tokens found in the NPU's prefix cache, and
          recalled from a lower tier
        - ``preemptions``: times it lost its KV blocks
        """
        return self.table.rows()

    @cached_property
    def table(self) -> RequestTable:
        """The same as columns, or a few rows at a time, for those who do not need all of it at once."""
        return RequestTable(self.token_gaps, self.workload)

    @cached_property
    def steps(self) -> NDArray[np.void]:
        """One row per engine step, instance by instance; shape (steps,), every field int64.

        ``instance``, ``step``, ``start_ns``, ``end_ns``, ``prefill_tokens`` (tokens of chunks),
        ``decode_tokens`` (sequences with one token), ``running``, ``waiting``, ``kv_blocks_used``,
        ``preempted``, ``hit_tokens`` and ``lookup_tokens`` (prompt tokens found and looked up in the prefix
        cache by the requests it was the first to admit), ``recalled_tokens`` (those found that came from the
        lower tier), ``recalled_bytes`` (read for them), ``tier_bytes`` (read from and written to the tier),
        ``recomputed_tokens`` (computed again after a preemption).
        """
        return steps_array(self.instances)

    def inter_token_latencies(self, request: int) -> NDArray[np.int64]:
        """Times between successive tokens of one request in ns, shape (output - 1,).

        Raises:
            KeyError: no request of this id finished.
        """
        position = int(np.searchsorted(self.requests["request_id"], request))
        if position >= len(self.records) or self.records[position].request != request:
            raise KeyError(f"request {request} did not finish in this run")
        return self.token_gaps.of(self.records[position])

    @cached_property
    def run_id(self) -> str:
        """Name of the run in the summary, the timeline and the metadata of Parquet files.

        ``--run-id`` where it was given; else 16 hexadecimal digits that follow from the per-request table:
        files with the same name hold the same run. A CSV file has no place for it.
        """
        if self.options is not None and self.options.run_id:
            return self.options.run_id
        digest = hashlib.sha256(__version__.encode())
        for rows in self.table.parts():
            digest.update(rows.view(np.uint8).data)
        return digest.hexdigest()[:16]

    @property
    def metadata(self) -> dict[str, str]:
        """What the timeline and the metadata of Parquet files say of the run."""
        version = self.options.vllm_version if self.options is not None else NEWEST
        return {"run_id": self.run_id, "vllm_version": version}

    @cached_property
    def summary(self) -> Summary:
        """Figures of the run under the names of ``vllm bench serve``, and ours; ready for JSON."""
        return cast("Summary", summarise(self))

    def power(self, interval_s: float = 1.0) -> NDArray[np.void]:
        """Mean power of every node with a ``power`` section over the run, shape (nodes * intervals,).

        ``node``, ``start_ns``, ``end_ns`` (the last interval is what is left), ``power_w`` in W.

        Raises:
            ValueError: the interval is shorter than a nanosecond.
        """
        return power_series(self, round(interval_s * SECOND))

    def to_pandas(self) -> pd.DataFrame:
        """The per-request table as a DataFrame with the columns of the file (without ITL).

        Raises:
            ImportError: pandas is not installed.
        """
        import pandas

        frame = pandas.DataFrame(self.requests)
        frame.columns = pandas.Index(NUMERIC_COLUMNS)
        for name, values in text_columns(self).items():
            frame[name] = [value or None for value in values]
        return frame[[name for name in COLUMNS if name in frame.columns]]

    def save(self, path: str | Path, *, itl: bool = True) -> None:
        """Write the per-request file: Parquet for a path ending in ``.parquet``, CSV otherwise.

        Args:
            path: its folder is created; rejected requests go to ``<path>.rejected.jsonl``.
            itl: False leaves the inter-token latencies out.
        """
        save_requests(self, path, itl=itl)

    def save_steps(self, path: str | Path) -> None:
        """Write the step log: Parquet for a path ending in ``.parquet``, CSV otherwise."""
        save_steps(self.instances, path, self.metadata)

    def save_timeline(self, path: str | Path) -> None:
        """Write the run as a Chrome trace, for ui.perfetto.dev."""
        from servesim.results.timeline import save_timeline

        save_timeline(self.log, path, power_series(self, series_interval_ns(self)), self.metadata)

    def save_summary(self, path: str | Path) -> None:
        """Write :attr:`summary` as JSON; byte-identical for the same input and seed."""
        save_summary(self.summary, path)
