"""What shows while a run goes: a line per instance and interval of simulated time, and a progress line."""

from __future__ import annotations

import time
from bisect import bisect_right
from typing import TYPE_CHECKING, TextIO

from servesim.results.energy import node_meters
from servesim.results.units import GIB, SECOND, seconds, si

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.progress import Progress, TaskID

    from servesim.results.meters import NodeMeter
    from servesim.results.records import InstanceLog, RunLog
    from servesim.specs.cluster import ClusterSpec

NEVER_NS = 2**63 - 1


class _Cursor:
    """How far the lines of one instance have got in its step log."""

    __slots__ = ("hit_tokens", "idle", "lookup_tokens", "steps")

    def __init__(self) -> None:
        self.steps = 0
        self.hit_tokens = 0
        self.lookup_tokens = 0
        self.idle = False
        """The last line already showed an interval without a step."""


class Heartbeat:
    """An observer of the simulation that writes the documented log lines.

    A line is made from the steps that *ended* at or before its boundary, and only once the clock is past it,
    so the lines are the same whether steps were simulated one by one or in jumps. An instance without a step
    gets one line that says so and then none until it works again.
    """

    def __init__(
        self, interval_ns: int, write: Callable[[str], None], cluster: ClusterSpec | None = None
    ) -> None:
        """
        Args:
            interval_ns: simulated time between lines; 0 or less: no lines.
            write: takes one line without its line end.
            cluster: says which nodes' power to show; None: nobody's.
        """
        self.interval_ns = interval_ns
        self.next_ns = interval_ns if interval_ns > 0 else NEVER_NS
        self._decimals = next((places for places in (1, 2, 3, 6) if interval_ns % 10 ** (9 - places) == 0), 9)
        self._write = write
        self._last_ns = 0
        self._cursors: list[_Cursor] = []
        self._cluster = cluster
        self._meters: dict[int, NodeMeter] = {}
        """Node -> its power meter, where power is modelled."""

    def advance(self, now_ns: int, log: RunLog) -> None:
        """Write the lines of every boundary before ``now_ns``."""
        while self.next_ns < now_ns:
            self._emit(self.next_ns, log)
            self.next_ns += self.interval_ns
            self._skip_idle_boundaries(now_ns, log)

    def finish(self, log: RunLog) -> None:
        """Write the lines up to the end of the run, the last ones for what is left of an interval."""
        self.advance(log.end_ns, log)
        if self.interval_ns > 0 and log.end_ns > self._last_ns:
            self._emit(log.end_ns, log)

    def _skip_idle_boundaries(self, now_ns: int, log: RunLog) -> None:
        """Move on to the first boundary that has something new to say, or past ``now_ns``."""
        target = now_ns
        for instance, cursor in zip(log.instances, self._cursors, strict=True):
            if not cursor.idle:
                return
            if cursor.steps < len(instance.steps):
                target = min(target, instance.steps.end_ns[cursor.steps])
        skipped = (target - self.next_ns + self.interval_ns - 1) // self.interval_ns
        if skipped > 0:
            self.next_ns += skipped * self.interval_ns
            self._last_ns = self.next_ns - self.interval_ns

    def _emit(self, boundary_ns: int, log: RunLog) -> None:
        if not self._cursors:
            self._cursors = [_Cursor() for _ in log.instances]
            self._meters = node_meters(self._cluster, log.instances)
        elapsed_ns = boundary_ns - self._last_ns
        power = {
            node: f" power={meter.mean_w(self._last_ns, boundary_ns):.0f} W"
            for node, meter in self._meters.items()
        }
        self._last_ns = boundary_ns
        for instance, cursor in zip(log.instances, self._cursors, strict=True):
            before = cursor.steps
            after = bisect_right(instance.steps.end_ns, boundary_ns, lo=before)
            if after == before and cursor.idle:
                continue
            cursor.idle = after == before
            cursor.steps = after
            hits = instance.steps.hit_tokens.total(before, after)
            cursor.hit_tokens += hits
            cursor.lookup_tokens += instance.steps.lookup_tokens.total(before, after)
            again = instance.steps.recomputed_tokens.total(before, after)
            line = heartbeat_line(instance, before, after, elapsed_ns, hits - again)
            name = f" instance={instance.index}" if len(log.instances) > 1 else ""
            rate = cursor.hit_tokens / cursor.lookup_tokens if cursor.lookup_tokens else 0.0
            time = f"t={boundary_ns / SECOND:.{self._decimals}f}s"
            state = f"{_queue_state(instance, after)} hit={rate:.1%}{power.get(instance.node, '')}"
            if again:
                state += f" recomputed={si(again * SECOND / elapsed_ns)} tok/s"
            self._write(f"{line}{name} {time}{state}")


def heartbeat_line(instance: InstanceLog, before: int, after: int, elapsed_ns: int, more_tokens: int) -> str:
    """The documented part of a line, about steps ``before`` to ``after - 1`` of one instance.

    Rates are over ``elapsed_ns``. ``more_tokens`` count as prompt tokens beside those of prefill steps: what
    the prefix cache had, less what was computed again after a preemption (vLLM counts a prompt once). Memory
    is weights and KV blocks in use on one NPU after the last step, in units of 2^30 bytes.
    """
    steps, capacity = instance.steps, instance.capacity
    prompt = max(steps.prefill_tokens.total(before, after) + more_tokens, 0) * SECOND / elapsed_ns
    decode = sum(steps.decode_tokens[before:after]) * SECOND / elapsed_ns
    batch = steps.running[after - 1] if after else 0
    used = steps.kv_blocks_used[after - 1] if after else 0
    memory = capacity.weight_bytes + used * capacity.npu_bytes_per_block
    return (
        f"[INFO] step={after} batch={batch} prompt_t={si(prompt)} tok/s decode_t={si(decode)} tok/s "
        f"npu_mem={memory / GIB:.1f} GB"
    )


def _queue_state(instance: InstanceLog, after: int) -> str:
    """Running and waiting requests and share of KV blocks in use, as of the last step."""
    steps = instance.steps
    running, waiting, used = (
        (steps.running[after - 1], steps.waiting[after - 1], steps.kv_blocks_used[after - 1])
        if after
        else (0, 0, 0)
    )
    return f" run={running} wait={waiting} kv={used / instance.capacity.usable_blocks:.1%}"


_SHOW_AFTER_S = 0.5
_REFRESH_S = 0.1


class ProgressBar:
    """An observer of the simulation that redraws one line; a run shorter than half a second shows none."""

    def __init__(self, interval_ns: int, total: int, stream: TextIO) -> None:
        """
        Args:
            interval_ns: simulated time after which to look again.
            total: requests of the workload.
            stream: the terminal.
        """
        self.next_ns = interval_ns
        self._interval_ns = interval_ns
        self._total = total
        self._stream = stream
        self._started_s = time.monotonic()
        self._drawn_s = self._started_s
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def advance(self, now_ns: int, log: RunLog) -> None:
        """Redraw when enough real time has passed."""
        self.next_ns = now_ns + self._interval_ns
        real_s = time.monotonic()
        if real_s - self._drawn_s < (_REFRESH_S if self._bar else _SHOW_AFTER_S):
            return
        self._drawn_s = real_s
        if self._bar is None or self._task is None:
            self._bar, self._task = self._start()
        done = len(log.requests) + len(log.rejected)
        steps = sum(len(instance.steps) for instance in log.instances)
        self._bar.update(self._task, completed=done, state=f"t={seconds(now_ns)} step={steps}")
        self._bar.refresh()

    def close(self) -> None:
        """Remove the line from the terminal."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _start(self) -> tuple[Progress, TaskID]:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        bar = Progress(
            TextColumn("simulating"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("requests  {task.fields[state]}  left"),
            TimeRemainingColumn(),
            console=Console(file=self._stream),
            auto_refresh=False,  # no thread beside the simulation
            transient=True,
        )
        bar.start()
        return bar, bar.add_task("", total=self._total, state="")
