"""Measured times of the all-reduce that tensor parallelism does twice a block, and of DeepEP's exchanges.

The tables' ``message_size`` is a number of elements (see ``silicon/columns.py``); bundles and formulas count
bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from servesim.errors import InputError, MissingFileError
from servesim.profiler.silicon.tables import (
    gpus_a_node,
    has_fast_links,
    read_exchange,
    read_table,
    table_versions,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from servesim.profiler.silicon.moe import ExpertSizes
    from servesim.profiler.silicon.tables import Gpu, KernelTable

ELEMENT_BYTES = {"bfloat16": 2, "float16": 2, "half": 2, "fp8": 1, "int8": 1}
"""Bytes of one element of a message, by the table's name of its dtype."""


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
        rows.integers("num_gpus"), payload_bytes(rows).tolist(), rows.latency_us, strict=True
    ):
        found.setdefault((int(ranks), size), []).append(float(time))
    return [("all_reduce", *key, sum(times) / len(times)) for key, times in sorted(found.items())], rows


def payload_bytes(rows: KernelTable) -> NDArray[np.int64]:
    """Bytes that one rank brings into each row's all-reduce: elements times the bytes of their dtype."""
    sizes = rows.integers("message_size")
    names = np.broadcast_to(rows.columns.get("allreduce_dtype", np.array("bfloat16")), sizes.shape)
    unknown = sorted({str(name) for name in names} - set(ELEMENT_BYTES))
    if unknown:
        raise InputError(
            f"{rows.name} {rows.version}: allreduce_dtype: {', '.join(unknown)} is not known, so that its "
            f"message_size, a number of elements, says no bytes (known: {', '.join(ELEMENT_BYTES)})"
        )
    elements = np.array([ELEMENT_BYTES[str(name)] for name in names], dtype=np.int64)
    return sizes * elements


EXCHANGES = {
    "deepep_high_throughput": "wideep_deepep_normal_perf",
    "deepep_low_latency": "wideep_deepep_ll_perf",
}
"""vLLM's all2all backend -> the table of the same kernels, measured with SGLang."""
EXCHANGE_SMS = 20
"""SMs that vLLM gives to DeepEP's high-throughput kernels (``DeepEPHTAll2AllManager``)."""
EXCHANGE_ELEMENT = "fp8_block"
"""Format of experts whose tokens travel in fp8, as they did where DeepEP was measured."""


def exchange_rows(gpu: Gpu, sizes: ExpertSizes) -> list[tuple[str, int, int, float]]:
    """Rows ``(backend, ranks, tokens of a rank, us)`` of dispatch and combine together, for experts of just
    these sizes; empty: nobody measured them on this GPU.

    Of two versions that have a number of ranks the newer one counts.
    """
    found: dict[tuple[str, int, int], float] = {}
    for backend, table in EXCHANGES.items():
        for version in table_versions(gpu.folder, "comm", table, "sglang"):
            rows = read_exchange(gpu.folder, table, "sglang", version)
            rows = rows.where(hidden_size=sizes.hidden, num_topk=sizes.top_k, num_experts=sizes.experts)
            if "dispatch_sms" in rows.columns:
                rows = rows.where(dispatch_sms=EXCHANGE_SMS, combine_sms=EXCHANGE_SMS)
            ranks = rows.integers("node_num") * gpus_a_node(gpu.folder)
            for key in set(ranks.tolist()):  # a newer version takes the place of all of an older one's
                found = {at: us for at, us in found.items() if at[:2] != (backend, key)}
            for count, tokens, us in zip(
                ranks.tolist(), rows.integers("num_token").tolist(), rows.latency_us, strict=True
            ):
                found[backend, int(count), int(tokens)] = float(us)
    return [(*at, us) for at, us in sorted(found.items())]
