"""A folder with two tiny models and their kernel times, and clusters that run them."""

from __future__ import annotations

import json
import shutil
from contextlib import chdir, contextmanager
from typing import TYPE_CHECKING, Any

from tests.cost.bundles import HARDWARE, MODEL, VARIANT, Toy, toy_architecture

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

DENSE, MOE, WINDOWS = MODEL, "org/toy-moe", "org/toy-windows"
LAYERS, EXPERTS = 5, 4
WINDOW = 100
"""Tokens that every second layer of the third model sees."""
KV_BYTES_PER_TOKEN = 2 * LAYERS * 2 * 4 * 2
"""Both sides, layers, KV heads, their size, bytes."""


@contextmanager
def toy_world(root: Path) -> Iterator[Path]:
    """Make ``root`` such a folder and the working directory."""
    experts: dict[tuple[int, ...], float] = {(t, a): 3.0 + t / 4 + a for t in (1, 64) for a in (1, 4)}
    for tp in (1, 2, 4):
        folder = Toy(tp=tp, moe=experts, meta={"source": "roofline", "gpu": f"{HARDWARE} GPU"}).write(root)
    for variant in ("bf16-kvfp8", "bf16-kvfp8-skip0", "fp8", "fp8-kvfp8"):
        shutil.copytree(folder, folder.parent / variant)
    for name in (MOE, WINDOWS):
        shutil.copytree(folder.parent, root / "profiler" / "perf" / HARDWARE / name)
    toy_architecture(root)
    config: dict[str, Any] = {
        "model_type": "toy",
        "hidden_size": 16,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 32,
        "vocab_size": 64,
        "max_position_embeddings": 2048,
        "torch_dtype": "bfloat16",
    }
    experts_too = {"num_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
    sliding = ["sliding_attention" if index % 2 else "full_attention" for index in range(LAYERS)]
    windows = {"layer_types": sliding, "sliding_window": WINDOW}
    for name, more in ((DENSE, {}), (MOE, experts_too), (WINDOWS, windows)):
        path = root / "configs" / "model" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({**config, **more}), encoding="utf-8")
    with chdir(root):
        yield root


def toy_instance(model: str = DENSE, **keys: Any) -> dict[str, Any]:
    """An instance of the cluster config; 1,000 usable blocks unless ``num_gpu_blocks`` says otherwise."""
    tp, pp = keys.pop("tp_size", 1), keys.pop("pp_size", 1)
    return {
        "model_name": model,
        "hardware": HARDWARE,
        "npu_mem": {"mem_size": 1, "mem_bw": 1000, "mem_latency": 0, "reserve": 0},
        "num_npus": tp * pp,
        "tp_size": tp,
        "pp_size": pp,
        "pd_type": None,
        "num_gpu_blocks": 1001,
        **keys,
    }


def toy_cluster(*nodes: list[dict[str, Any]], **keys: Any) -> dict[str, Any]:
    """A cluster config of nodes, each a list of instances."""
    described = [
        {
            "num_instances": len(instances),
            "cpu_mem": {"mem_size": 1, "mem_bw": 100, "mem_latency": 0},
            "instances": instances,
        }
        for instances in nodes
    ]
    return {"num_nodes": len(nodes), "link_bw": 1, "link_latency": 1000, "nodes": described, **keys}


__all__ = [
    "DENSE",
    "EXPERTS",
    "HARDWARE",
    "KV_BYTES_PER_TOKEN",
    "LAYERS",
    "MOE",
    "VARIANT",
    "WINDOW",
    "WINDOWS",
    "toy_cluster",
    "toy_instance",
    "toy_world",
]
