"""Bundles measured by others load as they are, and whole steps are the sums of their rows."""

from __future__ import annotations

import csv
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from servesim.cost.batch_shape import Shape
from servesim.cost.build import Costs
from servesim.cost.bundle import load_bundle, range_warnings
from servesim.cost.stage_cost import StageCost
from servesim.cost.step_terms import stage_terms
from servesim.cost.terms import whole_model
from servesim.engine.batch import Batch
from servesim.engine.experts import expert_routing
from servesim.network.topology import Dimension
from servesim.specs.architecture import load_architecture
from servesim.specs.hardware import NO_HOST_TIME, EngineSpec
from servesim.specs.model import load_model
from tests.cost.bundles import instance_options, slow_lookup
from tests.recorded import recorded_path

if TYPE_CHECKING:
    from pathlib import Path

LLAMA, QWEN, MOE = "meta-llama/Llama-3.1-8B", "Qwen/Qwen3-32B", "Qwen/Qwen3-30B-A3B-Instruct-2507"
EVERY = [(model, tp) for model in (LLAMA, QWEN, MOE) for tp in (1, 2)]


@pytest.fixture
def perf(root: Path) -> Path:
    folder = recorded_path("perf")
    (root / "profiler").mkdir()
    (root / "profiler" / "perf").symlink_to(folder)
    return folder / "RTXPRO6000"


def timer_of(name: str, tp: int, engine: EngineSpec) -> StageCost:
    model = load_model(recorded_path("model", f"{name}.json"))
    bundle = load_bundle("RTXPRO6000", name, "bf16")
    tables = bundle.tables(tp)
    link = Dimension("tp", "ring", 16, 20_000)
    terms = stage_terms(load_architecture(model.model_type), whole_model(model), tables, tp, link)
    return StageCost(bundle, tables, model.num_hidden_layers, terms, engine)


def rows_of(path: Path) -> list[dict[str, Any]]:
    with path.open() as handle:
        return list(csv.DictReader(handle))


@pytest.mark.usefixtures("perf")
@pytest.mark.parametrize(("name", "tp"), EVERY)
def test_every_bundle_loads_and_describes_itself(name: str, tp: int) -> None:
    timer = timer_of(name, tp, EngineSpec())
    assert timer.tables.skew is not None
    assert "source vllm, NVIDIA RTX PRO 6000 Blackwell Server Edition, vLLM 0.19.0" in timer.bundle.describe()
    assert range_warnings(timer.bundle, 2048, 256) == []
    assert 1e6 < timer.decode_ns(1, 1000, 1000, 1000) < timer.decode_ns(64, 64_000, 1000, 1000) < 1e8


@pytest.mark.parametrize(("name", "tp"), [(LLAMA, 1), (QWEN, 2)])
def test_a_step_on_measured_points_is_the_sum_of_its_rows(perf: Path, name: str, tp: int) -> None:
    folder = perf / name / "bf16" / f"tp{tp}"
    timer = timer_of(name, tp, EngineSpec())
    per_block = {"layernorm": 2, "qkv_proj": 1, "qk_norm": 1, "rotary_emb": 1, "o_proj": 1}
    per_block |= {"gate_up_proj": 1, "act_fn": 1, "down_proj": 1}
    blocks = timer.blocks
    us = 0.0
    for row in rows_of(folder / "dense.csv"):
        if row["tokens"] == "128":
            us += float(row["time_us"]) * per_block.get(row["layer"], 0) * blocks
            us += float(row["time_us"]) * (row["layer"] in ("embedding", "final_layernorm"))
    us += sum(float(r["time_us"]) for r in rows_of(folder / "per_sequence.csv") if r["sequences"] == "128")
    key = ("0", "0", "128", "1024")
    (attention,) = [r for r in rows_of(folder / "attention.csv") if tuple(r.values())[:4] == key]
    us += float(attention["time_us"]) * blocks
    if tp == 2:
        hidden = {QWEN: 5120}[name]
        us += 2 * blocks * 2 * (20.0 + 128 * hidden * 2 / 2 / 16 / 1000)
    assert timer.decode_ns(128, 128 * 1024, 1024, 1024) == pytest.approx(us * 1000, abs=1)


def test_the_dense_tensor_equals_the_ragged_lookup(perf: Path) -> None:
    timer = timer_of(LLAMA, 1, EngineSpec())
    axes = ("prefill_chunk", "n_decode", "kv_prefill", "kv_decode")
    rows = {
        tuple(int(r[a]) for a in axes): float(r["time_us"])
        for r in rows_of(perf / LLAMA / "bf16" / "tp1" / "attention.csv")
    }
    rng = np.random.default_rng(1)
    surface = timer.tables.attention
    for _ in range(12):
        picked = (int(rng.choice(axis)) + int(rng.integers(0, 700)) for axis in surface.axes)
        query = tuple(min(x, int(axis[-1])) for x, axis in zip(picked, surface.axes, strict=True))
        assert surface.at(*([x] for x in query))[0] == pytest.approx(slow_lookup(rows, query), rel=1e-9)
    for key in list(rows)[:: len(rows) // 200]:
        assert surface.at(*([x] for x in key))[0] == rows[key]


@pytest.mark.usefixtures("perf")
def test_a_run_is_its_single_steps_on_measured_skew() -> None:
    timer = timer_of(QWEN, 2, EngineSpec(decode_step_overhead_us=200))
    for n, low, high in ((2, 900, 1030), (37, 3, 4090), (128, 100, 16_300), (300, 8_000, 131_000)):
        kv_sum = n * low + (high - low) * max(n // 3, 1)
        run = timer.decode_run_ns(n, kv_sum, low, high, 500)
        assert run.tolist() == [timer.decode_ns(n, kv_sum + i * n, low + i, high + i) for i in range(500)]


@pytest.mark.usefixtures("perf")
def test_a_breakdown_of_a_real_step_adds_up() -> None:
    for name, tp in EVERY:
        timer = timer_of(name, tp, EngineSpec(prefill_step_overhead_us=6000))
        step = ([(512, 0), (256, 1024)], 32, 32_000, 200, 3000)
        assert sum(c.total_us for c in timer.explain(Shape(*step))) * 1000 == pytest.approx(
            timer.mixed_ns(*step), abs=0.6
        )


def test_a_wave_on_measured_points_is_the_sum_of_its_rows(perf: Path) -> None:
    """Two members of 64 and 128 decodes, all of 1024 tokens, with 64 experts each."""
    folder = perf / MOE / "bf16" / "tp1"
    model = load_model(recorded_path("model", f"{MOE}.json"))
    links: Any = SimpleNamespace(
        link_bandwidths_gbs=(16,),
        link_latencies_ns=(20_000,),
        link_wirings=("ring",),
        collectives="auto",
    )
    spec: Any = SimpleNamespace(
        hardware="RTXPRO6000",
        npu_mem=SimpleNamespace(mem_bw=None),
        tp_size=1,
        pp_size=1,
        ep_size=2,
        engine=NO_HOST_TIME,
    )
    spec.moe_backend = "allgather_reducescatter"
    options = instance_options(
        enable_block_copy=True,
        max_num_seqs=128,
    )
    routing = expert_routing("BALANCED", model, 2, seed=42)
    timer = Costs(links).of([(0, spec)] * 2, model, [options] * 2, routing)

    def row(file: str, *start: object) -> float:
        (found,) = [r for r in rows_of(folder / file) if tuple(r.values())[:-1] == tuple(map(str, start))]
        return float(found["time_us"])

    per_block = {"layernorm": 2, "qkv_proj": 1, "qk_norm": 1, "rotary_emb": 1, "o_proj": 1}
    block = sum(n * row("dense.csv", layer, 128) for layer, n in per_block.items())
    block += row("attention.csv", 0, 0, 128, 1024)
    experts = row("moe.csv", 128, 64)  # 256 tokens touch all 64 experts of a rank, but for 4e-6 of one
    exchange = 2 * 20.0 + 128 * (2 * 2048 + 128) * 2 / 1.75 / 16 / 1000
    us = 48 * (block + experts + exchange) + sum(
        row(file, layer, 128)
        for file, layer in (
            ("dense.csv", "embedding"),
            ("dense.csv", "final_layernorm"),
            ("per_sequence.csv", "lm_head"),
            ("per_sequence.csv", "sampler"),
        )
    )
    few, many = Batch(0), Batch(0)
    few.add_decodes(64, 64 * 1024, 1024, 1024)
    many.add_decodes(128, 128 * 1024, 1024, 1024)
    ((compute, _),) = timer.stages_ns([few, many])
    assert compute == pytest.approx(us * 1000, rel=1e-6)
