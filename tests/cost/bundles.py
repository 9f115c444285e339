"""Small bundles on disk, and slow, obvious twins of what is looked up in them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import yaml

from servesim.cost.batch_shape import IDLE
from servesim.cost.bundle import Bundle, load_bundle
from servesim.cost.stage_cost import StageCost
from servesim.cost.step_terms import stage_terms
from servesim.cost.terms import Role, whole_model
from servesim.network.topology import Dimension
from servesim.specs.architecture import Architecture, read_architecture
from servesim.specs.hardware import EngineSpec
from servesim.specs.model import ModelSpec, model_from_config

HARDWARE, MODEL, VARIANT = "Toy", "org/toy", "bf16"
BLOCK_LAYERS = ("qkv_proj", "o_proj", "down_proj")

Rows = dict[tuple[int, ...], float]

BINS: dict[str, Any] = {
    "n_bins": [0, 2, 8, 1000000],
    "n_labels": ["n<=2", "n<=8", "n>8"],
    "skew_rate_bins": [-0.01, 0.5, 1.01],
    "skew_rate_labels": ["sr<=50%", "sr>50%"],
    "kv_big_bins": [0, 100, 1000000000],
    "kv_big_labels": ["kvB<=100", "kvB>100"],
    "kp_bins": [-1, 0, 1000000000],
    "kp_labels": ["kp=0", "kp>0"],
}


def instance_options(**changes: Any) -> Any:
    """What the cost model reads of an instance's options, with some changed."""
    usual = {
        "variant": "bf16",
        "dtype": "bfloat16",
        "kv_dtype": "bfloat16",
        "kept": lambda model: model,
        "async_scheduling": True,
        "plan_as_vllm": None,
        "speculative": None,
        "decode_context_parallel_size": 1,
        "dcp_comm_backend": "ag_rs",
        "cudagraph": True,
        "max_num_batched_tokens": 2048,
    }
    return SimpleNamespace(**{**usual, **changes})


def attention_rows() -> Rows:
    """(chunk, n, history, kv) → µs, ragged as real ones: n = 0 only with a chunk, n = 8 only without."""
    rows: Rows = {}
    for n in (1, 4, 8):
        for kv in (16, 64, 256):
            rows[0, n, 0, kv] = 5 + n + n * kv / 64
    for chunk in (16, 64):
        for n in (0, 1, 4):
            for history in (0, 32) if n else (0, 32, 128):
                for kv in (16, 256) if n else (0,):
                    rows[chunk, n, history, kv] = 8 + n + n * kv / 32 + chunk / 4 + chunk * history / 64
    return rows


@dataclass
class Toy:
    """What goes into a toy bundle; every field may be replaced before it is written."""

    dense: dict[str, Rows] = field(
        default_factory=lambda: {
            **{layer: {(1,): 10.0, (9,): 18.0, (100,): 109.0} for layer in BLOCK_LAYERS},
            "embedding": {(1,): 2.0, (101,): 102.0},
            "final_layernorm": {(1,): 1.0},
        }
    )
    per_sequence: dict[str, Rows] = field(default_factory=lambda: {"lm_head": {(1,): 50.0, (11,): 60.0}})
    attention: Rows = field(default_factory=attention_rows)
    moe: Rows | None = None
    comm: list[tuple[str, int, int, float]] | None = None
    skew: list[tuple[int, str, str, str, str, float]] | None = None
    meta: dict[str, Any] = field(default_factory=lambda: {"source": "roofline", "gpu": "Toy GPU"})
    tp: int = 1
    products: tuple[str, ...] = ()
    """Dense layers that the architecture calls linear."""

    def write(self, root: Path) -> Path:
        """Write the bundle below ``root``; returns the variant folder."""
        folder = root / "profiler" / "perf" / HARDWARE / MODEL / VARIANT
        tp = folder / f"tp{self.tp}"
        tp.mkdir(parents=True, exist_ok=True)
        for name, axis, table in (
            ("dense", "tokens", self.dense),
            ("per_sequence", "sequences", self.per_sequence),
        ):
            lines = [f"{layer},{x},{us}" for layer, rows in table.items() for (x,), us in rows.items()]
            _csv(tp / f"{name}.csv", f"layer,{axis},time_us", lines)
        lines = [f"{c},{h},{n},{k},{us}" for (c, n, h, k), us in self.attention.items()]
        _csv(tp / "attention.csv", "prefill_chunk,kv_prefill,n_decode,kv_decode,time_us", lines)
        if self.moe is not None:
            (folder / "tp1").mkdir(exist_ok=True)
            lines = [f"{t},{a},{us}" for (t, a), us in self.moe.items()]
            _csv(folder / "tp1" / "moe.csv", "tokens,activated_experts,time_us", lines)
        if self.comm is not None:
            _csv(
                tp / "comm.csv",
                "collective,ranks,bytes,time_us",
                [",".join(map(str, row)) for row in self.comm],
            )
        meta = dict(self.meta)
        if self.skew is not None:
            header = "pc,n_label,skew_rate_label,kv_big_label,kp_label,alpha,n_samples"
            _csv(tp / "skew_fit.csv", header, [",".join(map(str, row)) + ",1" for row in self.skew])
            meta["skew_fit"] = {
                "enabled": True,
                "bucket_axes": BINS,
                "per_tp": {self.tp: {"alpha_default": 0.25, "bucket_table": f"tp{self.tp}/skew_fit.csv"}},
            }
        (folder / "meta.yaml").write_text(yaml.safe_dump(meta))
        return folder

    def bundle(self, root: Path) -> Bundle:
        """Write and load; the working directory must be ``root``."""
        self.write(root)
        return load_bundle(HARDWARE, MODEL, VARIANT)

    def timer(self, root: Path, *, experts: int = 0, engine: EngineSpec | None = None) -> StageCost:
        """The timer of a two-block toy model on this bundle; links of 1 GB/s and 1000 ns."""
        bundle = self.bundle(root)
        tables = bundle.tables(self.tp)
        model = toy_model(experts)
        link = Dimension("tp", "ring", 1.0, 1000.0)
        architecture = toy_architecture(root, self.products)
        terms = stage_terms(architecture, whole_model(model), tables, self.tp, link)
        engine = engine or EngineSpec(cudagraph=False)
        return StageCost(bundle, tables, model.num_hidden_layers, terms, engine)


def toy_model(experts: int = 0, **more: Any) -> ModelSpec:
    """Two blocks, hidden size 8; with ``experts``, two of them per token; ``more``: fields of the config."""
    config: dict[str, Any] = {
        "model_type": "toy",
        "hidden_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "intermediate_size": 16,
        "vocab_size": 32,
        "max_position_embeddings": 4096,
    }
    if experts:
        config |= {"num_experts": experts, "num_experts_per_tok": 2, "moe_intermediate_size": 4}
    return model_from_config(config | more, MODEL, "toy.json")


def toy_architecture(root: Path, products: tuple[str, ...] = ()) -> Architecture:
    """Three dense layers a block (o_proj last of two before the MLP), or two and an expert layer; those in
    ``products`` are matrix products, the others nothing in particular."""
    path = root / "profiler" / "models" / "toy.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    layers = (*BLOCK_LAYERS, "embedding", "final_layernorm")
    path.write_text(
        yaml.safe_dump(
            {
                "model_type": "toy",
                "sequence": {
                    "prologue": ["embedding"],
                    "pre_attn": ["qkv_proj"],
                    "post_attn": ["o_proj"],
                    "mlp_dense": ["down_proj"],
                    "mlp_moe": ["moe"],
                    "head": ["final_layernorm", "lm_head"],
                },
                "catalog": {
                    "dense": {layer: {"class": "XLinear" if layer in products else "X"} for layer in layers},
                    "per_sequence": {"lm_head": {"class": "X"}},
                    "attention": {"attention": {"class": "X"}},
                    "moe": {"moe": {"class": "X"}},
                },
            }
        )
    )
    return read_architecture(path)


def slow_lookup(rows: Rows, query: tuple[float, ...]) -> float:
    """The nested ragged lookup, written as it is told: bracket the first axis, ask below both sides, mix;
    beyond the last point go on with the slope of all, each counted with its square."""
    if not query:
        return rows[()]
    points = sorted({key[0] for key in rows})
    below: dict[int, float] = {}

    def at(point: int) -> float:
        if point not in below:
            below[point] = slow_lookup(
                {key[1:]: us for key, us in rows.items() if key[0] == point}, query[1:]
            )
        return below[point]

    x = query[0]
    if x <= points[0] or len(points) == 1:
        return at(points[0])
    if x > points[-1]:
        count = {p: p * p for p in points} if len(points) > 2 else dict.fromkeys(points, 1)
        middle = sum(count[p] * p for p in points) / sum(count.values())
        slope = sum(count[p] * (p - middle) * at(p) for p in points)
        slope /= sum(count[p] * (p - middle) ** 2 for p in points)
        return at(points[-1]) + slope * (x - points[-1])
    low = max((p for p in points[:-1] if p <= x), default=points[0])
    high = points[points.index(low) + 1]
    return at(low) + (at(high) - at(low)) * (x - low) / (high - low)


def cluster_links(**links: float) -> SimpleNamespace:
    """As much of a cluster as the timer looks at."""
    return SimpleNamespace(
        link_bandwidths_gbs=(links["bw"],),
        link_latencies_ns=(links["latency"],),
        link_wirings=("ring",),
        collectives="auto",
    )


def _csv(path: Path, header: str, lines: list[str]) -> None:
    path.write_text("\n".join([header, *lines]) + "\n")


def tokens_ns(cost: StageCost, tokens: int) -> float:
    """What a step pays for its tokens, all layers but attention and output head together."""
    padded = cost.padding.of(tokens)
    return cost.role_ns(Role.ONCE, IDLE, padded) + cost.dense.of(padded)


def slow_chunk_growth(rows: Rows, chunk: int, history: int) -> float:
    """What a chunk beyond the largest takes more than it, where a pair of tokens has its time, a token none:
    the chunks of the toy are so."""
    alone = [(c, h, us) for (c, n, h, _), us in rows.items() if c and not n]
    last = max(c for c, _, _ in alone)
    fit = np.array([[c / us, c * c * (h + c / 2) / us, c * h / us] for c, h, us in alone])
    _, pair_us, _ = np.linalg.lstsq(fit, np.array([c for c, _, _ in alone]), rcond=None)[0]
    return float(pair_us * (chunk * (history + chunk / 2) - last * (history + last / 2)))
