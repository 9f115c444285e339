"""LLMServingSim's published examples here and there: mean TTFT and TPOT of ten requests.

    python benchmarks/published_examples.py            every example, and the section of benchmarks/RESULTS.md
    python benchmarks/published_examples.py --print    the section on the screen only

Its cluster configs, workload, per-request files and measured bundles are looked for among the recordings.
Both without host time, with synchronous scheduling and without padding to CUDA graphs.
docs/from-llmservingsim.md says where each difference comes from.
"""

from __future__ import annotations

import csv
import json
import os
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from results_page import measured_against_recordings  # noqa: E402

import servesim  # noqa: E402
from servesim.specs.hardware import HOST_CONSTANTS  # noqa: E402
from servesim.specs.paths import bundles_from  # noqa: E402

RECORDED = Path(os.environ.get("SERVESIM_RECORDED") or ROOT.parent / "shared" / "data" / "recorded")
SHARED: dict[str, Any] = {"enable_prefix_sharing": True, "prefix_storage": "CPU"}
EXAMPLES: dict[str, tuple[str, dict[str, Any]]] = {
    "single": ("single_node_single_instance", {}),
    "multi": ("single_node_multi_instance", {}),
    "dp": ("single_node_dp_instance", {}),
    "pd": ("single_node_pd_instance", {}),
    "pp": ("single_node_pp_instance", {}),
    "tp_pp": ("single_node_tp_pp_instance", {}),
    "cxl": ("single_node_cxl_instance", {}),
    "prefix_cpu_mem_pool": ("single_node_multi_instance", SHARED),
    "dual_prefix_cpu_mem_pool": ("dual_node_multi_instance", SHARED),
    "power": ("single_node_power_instance", {}),
    "pim": ("single_node_pim_instance", {"enable_attn_offloading": True}),
    "pim_sub_batch": (
        "single_node_pim_instance",
        {"enable_attn_offloading": True, "enable_sub_batch_interleaving": True},
    ),
    "moe": ("single_node_moe_single_instance", {}),
    "moe_pp": ("single_node_moe_pp_instance", {}),
    "moe_dp_pp": ("single_node_moe_dp_pp_instance", {}),
    "moe_dp_tp": ("single_node_moe_dp_tp_instance", {}),
    "moe_dp_tp_pp": ("single_node_moe_dp_tp_pp_instance", {}),
    "dual_moe_dp_ep": ("dual_node_moe_dp_ep_intra_inter_instance", {}),
}
"""Name -> its cluster config, and what it was run with beside it."""


def main() -> int:
    """Run all, and replace the section of RESULTS.md; returns the exit status."""
    return measured_against_recordings("examples", (__doc__ or "").splitlines()[0], section, RECORDED)


def section() -> str:
    """The section as Markdown."""
    lines = [
        "Mean TTFT and TPOT, ms, of the first ten requests of the published examples of LLMServingSim: as it "
        "published them, and here, with its measured bundles, without host time, synchronous, without "
        "padding. docs/from-llmservingsim.md works the differences out. Made by "
        "`python benchmarks/published_examples.py`.",
        "",
        "| example | TTFT, theirs | ours | | TPOT, theirs | ours | |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name in EXAMPLES:
        cells = []
        for theirs, ours in zip(published(name), simulated(name), strict=True):
            cells += [f"{theirs:.2f}", f"{ours:.2f}", f"{100 * (ours / theirs - 1):+.1f} %"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def published(name: str) -> tuple[float, float]:
    """(mean TTFT, mean TPOT) in ms, as LLMServingSim published them."""
    csv.field_size_limit(1 << 24)
    with (RECORDED / "examples" / "outputs" / f"example_{name}_run.csv").open(encoding="utf-8") as handle:
        rows = list(csv.DictReader(handle))
    ttft, tpot = (sum(float(row[column]) for row in rows) / len(rows) / 1e6 for column in ("TTFT", "TPOT"))
    return ttft, tpot


def simulated(name: str) -> tuple[float, float]:
    """The same of this simulator."""
    config, flags = EXAMPLES[name]
    folder = RECORDED / "examples"
    spec = json.loads((folder / "cluster" / f"{config}.json").read_text(encoding="utf-8"))
    for node in spec["nodes"]:
        for instance in node["instances"]:
            instance["engine"] = {**dict.fromkeys(HOST_CONSTANTS, 0), "cudagraph": False}
    with bundles_from(RECORDED / "perf"):
        result = servesim.simulate(
            spec,
            str(folder / "example_trace.jsonl"),
            dtype="bfloat16",
            num_reqs=10,
            async_scheduling=False,
            **flags,
        )
    return result.figure("mean_ttft_ms"), result.figure("mean_tpot_ms")


if __name__ == "__main__":
    sys.exit(main())
