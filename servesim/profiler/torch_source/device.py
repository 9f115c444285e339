"""The device under the stopwatch: PyTorch itself, a GPU or the CPU, and how long a call takes on it."""

from __future__ import annotations

import re
import statistics
import subprocess
import time
from contextlib import suppress
from dataclasses import field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from servesim.errors import InputError, NotSupportedError
from servesim.slotted import dataclass

if TYPE_CHECKING:
    from collections.abc import Callable

ROUND_US = {"cuda": 3000.0, "cpu": 1000.0}
"""Device time worth spending on one round of one shot."""
MOST_CALLS = {"cuda": 32, "cpu": 10}
_HOLD_GHZ = 2.0  # at least the clock of any GPU: a slower clock only holds the stream longer
_HOLD_MARGIN_US = 100.0
_CPU_CACHE_BYTES = 32 * 2**20  # where the system does not say


def import_torch() -> Any:
    """The ``torch`` module.

    Raises:
        NotSupportedError: it is not installed.
    """
    try:
        import torch
    except ImportError as error:
        raise NotSupportedError(
            f"--source torch: PyTorch cannot be imported ({error}); install it with `pip install "
            "'servesim[torch]'`, "
            "or choose --source silicon, which needs no device"
        ) from error
    return torch


@dataclass(frozen=True, slots=True)
class Calls:
    """A layer ready to run: the same work over different buffers, to be called in turn."""

    functions: list[Callable[[], object]]
    cold_bytes: int = 0
    """Bytes that one call reads from memory and that no other call's buffers share."""


@dataclass(slots=True)
class Device:
    """``cuda`` or ``cpu``, and the rules by which it is timed."""

    torch: Any
    name: str
    iterations: int = 5
    """Rounds of a shot; its time is their median."""
    cold: bool = True
    """Whether weights and KV come from memory, as in an engine, and not from the cache."""
    graphs: bool = False
    """Whether a round is captured as a CUDA graph and replayed."""
    _flush: Any = field(default=None, repr=False)
    _turn: int = 0

    @property
    def is_cuda(self) -> bool:
        return self.name == "cuda"

    @property
    def label(self) -> str:
        """The product's name."""
        if self.is_cuda:
            return str(self.torch.cuda.get_device_name())
        with suppress(OSError):
            found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
            if found:
                return f"{found[1]} ({self.torch.get_num_threads()} threads)"
        import platform

        return f"{platform.processor() or platform.machine()} ({self.torch.get_num_threads()} threads)"

    @property
    def cache_bytes(self) -> int:
        """Size of the last cache before the memory."""
        if self.is_cuda:
            return int(self.torch.cuda.get_device_properties(0).L2_cache_size)
        with suppress(OSError, ValueError):
            size = Path("/sys/devices/system/cpu/cpu0/cache/index3/size").read_text().strip()
            return int(size.removesuffix("K")) * 1024
        return _CPU_CACHE_BYTES

    def free_bytes(self) -> int:
        """Memory that can be had now."""
        if self.is_cuda:
            return int(self.torch.cuda.mem_get_info()[0])
        with suppress(OSError):
            found = re.search(r"MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text())
            if found:
                return int(found[1]) * 1024
        return 2 * 2**30

    def copies(self, bytes_each: int, most: int = 64, most_bytes: int | None = None) -> int:
        """How many copies of a buffer, used in turn, are larger than the cache twice over."""
        if not self.cold:
            return 1
        limit = most_bytes if most_bytes is not None else (4 * 2**30 if self.is_cuda else 256 * 2**20)
        wanted = 2 * self.cache_bytes // max(bytes_each, 1) + 1
        return max(1, min(wanted, most, limit // max(bytes_each, 1)))

    def time_us(self, calls: Calls) -> float:
        """µs of one call: the median over rounds of the mean of a round's calls.

        The functions are called in turn, and the turn goes on from round to round. On a GPU the stream is
        held by an idle kernel until the host has queued a whole round, so that the host is not in the time.
        Where the buffers together are smaller than twice the cache and still matter, the cache is overwritten
        before every call instead and each call is timed on its own.
        """
        functions = calls.functions
        functions[0]()
        once_us = self._once_us(functions[-1])
        if self.is_cuda and self._must_flush(calls):
            return statistics.median(self._flushed_us(functions) for _ in range(self.iterations))
        count = int(min(max(ROUND_US[self.name] / max(once_us, 0.1), 1), MOST_CALLS[self.name]))
        if not self.is_cuda:
            return statistics.median(self._cpu_round_us(functions, count) for _ in range(self.iterations))
        if self.graphs:
            return self._graph_us(functions, count)
        return statistics.median(self._cuda_round_us(functions, count) for _ in range(self.iterations))

    def _must_flush(self, calls: Calls) -> bool:
        rotated = calls.cold_bytes * len(calls.functions)
        return self.cold and calls.cold_bytes > self.cache_bytes // 256 and rotated < 2 * self.cache_bytes

    def _once_us(self, function: Callable[[], object]) -> float:
        if self.is_cuda:
            self.torch.cuda.synchronize()
        started = time.perf_counter()
        function()
        if self.is_cuda:
            self.torch.cuda.synchronize()
        return (time.perf_counter() - started) * 1e6

    def _in_turn(self, functions: list[Callable[[], object]], count: int) -> list[Callable[[], object]]:
        """The next ``count`` functions."""
        picked = [functions[(self._turn + i) % len(functions)] for i in range(count)]
        self._turn = (self._turn + count) % len(functions)
        return picked

    def _cpu_round_us(self, functions: list[Callable[[], object]], count: int) -> float:
        picked = self._in_turn(functions, count)
        started = time.perf_counter()
        for function in picked:
            function()
        return (time.perf_counter() - started) * 1e6 / count

    def _hold(self, host_us: float) -> None:
        self.torch.cuda._sleep(int((host_us * 1.2 + _HOLD_MARGIN_US) * 1e3 * _HOLD_GHZ))

    def _cuda_round_us(self, functions: list[Callable[[], object]], count: int) -> float:
        cuda = self.torch.cuda
        picked = self._in_turn(functions, count)
        host_started = time.perf_counter()
        picked[0]()
        host_us = (time.perf_counter() - host_started) * 1e6 * (count + 1)
        start, end = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
        self._hold(host_us)
        start.record()
        for function in picked:
            function()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e3 / count

    def _graph_us(self, functions: list[Callable[[], object]], count: int) -> float:
        cuda = self.torch.cuda
        picked = self._in_turn(functions, count)
        side = cuda.Stream()
        side.wait_stream(cuda.current_stream())
        with cuda.stream(side):
            picked[0]()
        cuda.current_stream().wait_stream(side)
        graph = cuda.CUDAGraph()
        with cuda.graph(graph):
            for function in picked:
                function()
        times = []
        for _ in range(self.iterations):
            start, end = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(float(start.elapsed_time(end)) * 1e3 / count)
        return statistics.median(times)

    def _flushed_us(self, functions: list[Callable[[], object]]) -> float:
        """One call after the cache was overwritten, less what an empty pair of events shows."""
        cuda = self.torch.cuda
        if self._flush is None:
            self._flush = self.torch.empty(2 * self.cache_bytes, dtype=self.torch.int8, device="cuda")
        (function,) = self._in_turn(functions, 1)
        cuda.synchronize()
        events = [cuda.Event(enable_timing=True) for _ in range(4)]
        self._hold(200.0)
        self._flush.zero_()
        events[0].record()
        events[1].record()
        self._flush.zero_()
        events[2].record()
        function()
        events[3].record()
        events[3].synchronize()
        empty_ms = events[0].elapsed_time(events[1])
        return float(max(events[2].elapsed_time(events[3]) - empty_ms, 0.0)) * 1e3

    def conditions(self) -> dict[str, Any]:
        """What must not change while a bundle is measured."""
        found: dict[str, Any] = {"gpu": self.label, "torch_version": str(self.torch.__version__)}
        if self.is_cuda:
            found["cuda_version"] = str(self.torch.version.cuda)
        found["measurement"] = {
            "iterations": self.iterations,
            "statistic": "median",
            "cache": "cold" if self.cold else "warm",
            "cuda_graphs": self.graphs,
        }
        return found

    def notes(self) -> dict[str, Any]:
        """Clocks, temperature, power and driver as the device reports them now; empty where it does not."""
        if not self.is_cuda:
            return {"threads": self.torch.get_num_threads(), "cache_mib": round(self.cache_bytes / 2**20, 1)}
        return {"cache_mib": round(self.cache_bytes / 2**20, 1), **nvidia_state()}


_SMI_FIELDS = {
    "clocks.sm": "sm_clock_mhz",
    "clocks.mem": "memory_clock_mhz",
    "clocks.max.sm": "sm_clock_max_mhz",
    "temperature.gpu": "temperature_c",
    "power.draw": "power_w",
    "power.limit": "power_limit_w",
    "driver_version": "driver_version",
}


def nvidia_state() -> dict[str, Any]:
    """Clocks, temperature, power and driver of the first GPU from nvidia-smi; empty without one."""
    command = [
        "nvidia-smi",
        f"--query-gpu={','.join(_SMI_FIELDS)}",
        "--format=csv,noheader,nounits",
        "--id=0",
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    return read_smi(done.stdout)


def read_smi(line: str) -> dict[str, Any]:
    """A line of nvidia-smi's CSV by our names; numbers as numbers, what is not available left out."""
    found: dict[str, Any] = {}
    for name, cell in zip(_SMI_FIELDS.values(), line.strip().split(","), strict=False):
        value = cell.strip()
        if value.startswith("[") or not value:
            continue
        found[name] = float(value) if re.fullmatch(r"\d+(\.\d+)?", value) else value
    return found


def open_device(
    name: str, *, iterations: int = 5, cold: bool = True, graphs: bool = False, threads: int | None = None
) -> Device:
    """The device ``name``: ``cuda``, ``cpu``, or ``auto`` for a GPU where there is one.

    Raises:
        NotSupportedError: no PyTorch, or no GPU where one was asked for; InputError: a setting makes no
        sense.
    """
    torch = import_torch()
    if iterations < 1:
        raise InputError(f"--iterations {iterations}: is not allowed; must be at least 1")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise NotSupportedError(
            f"--device cuda: PyTorch {torch.__version__} finds no GPU; measure on a machine with one, or on "
            "the CPU "
            "with --device cpu"
        )
    if graphs and name == "cpu":
        raise InputError("--cuda-graphs: is not allowed with --device cpu")
    if threads is not None:
        if threads < 1:
            raise InputError(f"--threads {threads}: is not allowed; must be at least 1")
        torch.set_num_threads(threads)
    return Device(torch=torch, name=name, iterations=iterations, cold=cold, graphs=graphs)
