"""Measured times of the all-reduce that tensor parallelism does twice a block."""

from __future__ import annotations

from typing import TYPE_CHECKING

from servesim.errors import MissingFileError
from servesim.profiler.silicon.tables import has_fast_links, read_table

if TYPE_CHECKING:
    from servesim.profiler.silicon.tables import Gpu, KernelTable


def link_of(gpu: Gpu) -> str:
    """What the GPUs were connected by: ``nvlink``, which comes with the GPUs, or ``pcie``.

    Over PCIe an all-reduce depends on the machine (8 KB between two GPUs takes 5 us with peer-to-peer access
    and 40 us without), so that a run goes by its cluster's links unless it is told otherwise.
    """
    return "nvlink" if has_fast_links(gpu.folder) else "pcie"


def all_reduce_rows(gpu: Gpu) -> tuple[list[tuple[str, int, int, float]], KernelTable | None]:
    """Rows ``(collective, ranks, bytes, us)`` of vLLM's all-reduce in CUDA graphs, and where they are from.

    Empty when the GPU was measured without peers; eager rows stand in where graphs were not measured.
    """
    try:
        table = read_table(gpu.folder, "comm", "custom_allreduce_perf")
    except MissingFileError:
        return [], None
    rows = table.where(backend="vllm_graph")
    if not len(rows):
        rows = table
    found: dict[tuple[int, int], list[float]] = {}
    for ranks, size, time in zip(
        rows.integers("num_gpus"), rows.integers("message_size"), rows.latency_us, strict=True
    ):
        found.setdefault((int(ranks), int(size)), []).append(float(time))
    return [("all_reduce", *key, sum(times) / len(times)) for key, times in sorted(found.items())], rows
