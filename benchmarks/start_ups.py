"""The memory plan against start-ups of real vLLM servers.

    python benchmarks/start_ups.py            every start-up, and the section of benchmarks/RESULTS.md
    python benchmarks/start_ups.py --print    the section on the screen only

The start-ups are those of start_ups.csv.
"""

from __future__ import annotations

import csv
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from results_page import command

from servesim.memory.plan import kv_cache_capacity
from servesim.specs.cluster import load_cluster
from servesim.specs.instance_options import resolve
from servesim.specs.model import load_model, model_from_config
from servesim.specs.options import RuntimeOptions

if TYPE_CHECKING:
    from servesim.memory.plan import KvCapacity

TABLE = Path(__file__).with_name("start_ups.csv")
_QWEN = {"torch_dtype": "bfloat16", "max_position_embeddings": 32768}
SHAPES: dict[str, dict[str, Any]] = {
    "Qwen2-7B": {
        **_QWEN,
        "model_type": "qwen2",
        "hidden_size": 3584,
        "num_hidden_layers": 28,
        "vocab_size": 152064,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "intermediate_size": 18944,
    },
    "Qwen3-0.6B": {
        **_QWEN,
        "model_type": "qwen3",
        "hidden_size": 1024,
        "num_hidden_layers": 28,
        "vocab_size": 151936,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "intermediate_size": 3072,
        "head_dim": 128,
        "tie_word_embeddings": True,
    },
}
"""Published shapes of the models that have no file in configs/model."""


@dataclass(frozen=True, slots=True)
class StartUp:
    """One start-up and the plan for it."""

    row: dict[str, str]
    plan: KvCapacity

    @property
    def tokens(self) -> int:
        """Tokens of KV cache that the server reported."""
        return int(self.row["tokens"])

    @property
    def error(self) -> float:
        """Of the planned tokens, relative."""
        return self.plan.tokens / self.tokens - 1


def start_ups() -> list[StartUp]:
    """Every start-up of the table, planned."""
    with TABLE.open(encoding="utf-8", newline="") as handle:
        return [StartUp(row, _planned(row)) for row in csv.DictReader(handle)]


def _planned(row: dict[str, str]) -> KvCapacity:
    instance = {
        "model_name": row["model"],
        "hardware": row["hardware"],
        "tp_size": int(row["tp"]),
        "npu_mem": {"mem_size": float(row["memory_gib"])},
        "pd_type": None,
    }
    memory = {"mem_size": 512, "mem_bw": 256, "mem_latency": 0}
    node = {"num_instances": 1, "cpu_mem": memory, "instances": [instance]}
    cluster = load_cluster({"num_nodes": 1, "link_bw": 64, "link_latency": 0, "nodes": [node]})
    spec = cluster.instances[0][1]
    name = row["model"]
    model = model_from_config(SHAPES[name], name, name) if name in SHAPES else load_model(name)
    settings: dict[str, Any] = {
        "dtype": row["dtype"],
        "npu_memory_utilization": float(row["utilization"]),
        **{key: int(row[key]) for key in ("max_num_seqs", "max_num_batched_tokens", "block_size")},
    }
    options = RuntimeOptions(**settings)
    return kv_cache_capacity(model, spec, resolve(options, spec, model))


def section() -> str:
    """The section as Markdown."""
    lines = [
        "Tokens of KV cache that real vLLM servers reported at their start, and the memory plan's, with "
        "its band. The plan follows vLLM 0.10 on A100 and A6000, 0.11 to 0.20 elsewhere; its constants were "
        "taken from these start-ups, so that the table shows how well few constants describe them all, not "
        "how well they predict others. Made by `python benchmarks/start_ups.py`.",
        "",
        "| GPU | model | tp | utilization | max_num_seqs | reported | planned | error | band | source |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for each in start_ups():
        row = each.row
        low, high = each.plan.band_tokens
        lines.append(
            f"| {row['gpu']} | {row['model']} {row['dtype']} | {row['tp']} | {row['utilization']} | "
            f"{row['max_num_seqs']} | {each.tokens:,} | {each.plan.tokens:,} | {each.error:+.1%} | "
            f"{low:,} to {high:,} | {row['source']} |"
        )
    return "\n".join(lines)


def main() -> int:
    """Print the section, and put it on the page; returns the exit status."""
    return command("start-ups", (__doc__ or "").splitlines()[0], section)


if __name__ == "__main__":
    sys.exit(main())
