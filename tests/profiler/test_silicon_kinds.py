"""Attention of other kinds from the public tables: rows come back as they are, and none beats the GPU."""

from __future__ import annotations

from dataclasses import replace
from math import comb
from typing import TYPE_CHECKING

import numpy as np
import pytest

from servesim.cost.bundle import load_bundle
from servesim.errors import InputError
from servesim.profiler.bundle_writer import share_tables, write_bundle
from servesim.profiler.meter import ProfileJob
from servesim.profiler.silicon.decode_grid import DecodeGrid, Prompts
from servesim.profiler.silicon.tables import read_table, silicon_gpu
from servesim.profiler.silicon.windows import pairs
from servesim.profiler.sources import compute, silicon_installed
from servesim.specs.block_layers import architecture_of, attention_groups, block_layers, is_module
from servesim.specs.hardware import load_hardware
from servesim.specs.layers import LatentAttention, Recurrent
from servesim.specs.model import known_models, load_model
from servesim.specs.weights import rank_shape
from tests.profiler.roofline_toy import build_bundle, job, sliding_half

if TYPE_CHECKING:
    from pathlib import Path

    from servesim.profiler.bundle_writer import BundleContent

needs_silicon = pytest.mark.skipif(not silicon_installed(), reason="needs the silicon extra")


def _made(name: str, hardware: str, kv: str = "auto", tp: int = 8, **changes: int) -> BundleContent:
    model = load_model(name)
    limits = {"max_num_batched_tokens": 2048, "max_num_seqs": 256, "max_kv": 16384, **changes}
    what = ProfileJob(
        model, architecture_of(model), load_hardware(hardware), model.torch_dtype, kv, (tp,), **limits
    )
    return compute("silicon", what)


def _rows(content: BundleContent, name: str, tp: int = 8) -> dict[tuple[int, int, int, int], float]:
    return {row[:4]: row[4] for row in content.tables[tp, name]}


@needs_silicon
@pytest.mark.parametrize(
    ("name", "folder", "table", "model", "kv"),
    [
        ("deepseek-ai/DeepSeek-R1", "mla", "mla", "deepseek-ai/DeepSeek-V3", "bfloat16"),
        ("deepseek-ai/DeepSeek-V3.2", "sparse_attention", "dsa", "deepseek-ai/DeepSeek-V3.2", "bfloat16"),
        ("deepseek-ai/DeepSeek-V3.2", "sparse_attention", "dsa", "deepseek-ai/DeepSeek-V3.2", "fp8"),
    ],
)
def test_rows_of_latent_attention_come_back(name: str, folder: str, table: str, model: str, kv: str) -> None:
    from servesim.profiler.silicon.tables import read_table

    found = _rows(_made(name, "H200", "auto" if kv == "bfloat16" else kv), "attention.csv")
    like = {"model": model, "gemm_type": "fp8_block", "kv_cache_dtype": kv, "num_heads": 16}
    decodes = read_table("h200_sxm", folder, f"{table}_generation_module_perf").where(**like)
    for batch in (1, 16, 256):
        rows = decodes.where(batch_size=batch)
        for step, us in zip(rows.integers("step").tolist(), rows.latency_us, strict=True):
            if 16 <= step <= 16384:
                assert found[0, 0, batch, step] == us
    prompts = read_table("h200_sxm", folder, f"{table}_context_module_perf").where(
        **like, batch_size=1, step=0
    )
    for tokens, us in zip(prompts.integers("isl").tolist(), prompts.latency_us, strict=True):
        if 16 <= tokens <= 2048:
            assert found[tokens, 0, 0, 0] == us


@needs_silicon
def test_rows_of_a_gated_delta_net_come_back() -> None:
    from servesim.profiler.silicon.tables import read_table

    content = _made("Qwen/Qwen3-Next-80B-A3B-Instruct", "H100", tp=1)
    found = _rows(content, "attention_gated_delta_net.csv", tp=1)
    table = read_table("h100_sxm", "linear_attention", "gdn_perf")
    rows = table.where(phase="generation", num_k_heads=16, num_v_heads=32, d_model=2048)
    for batch in (1, 16, 256):
        assert found[0, 0, batch, 16] == pytest.approx(
            rows.where(batch_size=batch).latency_us.sum(), rel=1e-12
        )
    assert {point[3] for point in found} == {0, 16}  # the context makes no difference
    assert content.meta["attention_kinds"]["attention_gated_delta_net"]["share"] == 0.75


@needs_silicon
@pytest.mark.parametrize(("ratio", "label"), [(4, "attention"), (128, "attention_compressed")])
def test_rows_of_compressed_tokens_come_back(ratio: int, label: str) -> None:
    from servesim.profiler.silicon.tables import read_table

    content = _made("deepseek-ai/DeepSeek-V4-Flash", "H200", "fp8_ds_mla")
    found = _rows(content, f"{label}.csv")
    table = read_table(
        "h200_sxm", "sparse_attention", f"dsv4_{'csa' if ratio == 4 else 'hca'}_generation_module_perf"
    )
    like = {"model": "sgl-project/DeepSeek-V4-Flash-FP8", "num_heads": 8, "compress_ratio": ratio}
    compared = 0
    for batch in (1, 16, 256):
        rows = table.where(**like, batch_size=batch)
        for step, us in zip(rows.integers("step").tolist(), rows.latency_us, strict=True):
            if (0, 0, batch, step) in found:
                assert found[0, 0, batch, step] == us
                compared += 1
    assert compared > 20
    window = _rows(content, "attention_compressed_2.csv")  # of 128 tokens, the context beyond is not read
    assert window[0, 0, 16, 16384] == window[0, 0, 16, 128]


@needs_silicon
def test_hyper_connections_come_back() -> None:
    """Rows of both halves of a block; what was not measured is computed from bytes."""
    from servesim.profiler.silicon.tables import read_table

    rows = {
        row[:2]: row[2]
        for row in _made("deepseek-ai/DeepSeek-V4-Flash", "H200", "fp8_ds_mla").tables[8, "dense.csv"]
    }
    table = read_table("h200_sxm", "mhc", "mhc_module_perf").where(hidden_size=4096)
    for tokens in (16, 128, 1024):
        parts = table.where(num_tokens=tokens)
        assert len(parts) == 2
        assert rows["hyper_connections", tokens] == pytest.approx(parts.latency_us.sum(), rel=1e-12)


@needs_silicon
def test_rows_of_a_window_come_back() -> None:
    from servesim.profiler.silicon.tables import read_table

    found = _rows(_made("openai/gpt-oss-20b", "B200", tp=1), "attention_sliding.csv", tp=1)
    shape = {"num_heads": 64, "num_key_value_heads": 8, "head_dim": 64, "kv_cache_dtype": "bfloat16"}
    context = read_table("b200_sxm", "attention", "context_attention_perf")
    rows = context.where(**shape, window_size=128, batch_size=1)
    for tokens, us in zip(rows.integers("isl").tolist(), rows.latency_us, strict=True):
        if 16 <= tokens <= 2048:
            assert found[tokens, 0, 0, 0] == us
    longest = {n: found[0, 0, n, 16384] for n in (1, 64, 256)}
    assert all(found[0, 0, n, 256] == pytest.approx(us, rel=0.2) for n, us in longest.items())


@needs_silicon
def test_experts_run_in_their_own_format() -> None:
    from servesim.profiler.silicon.tables import read_table

    found = {row[:2]: row[2] for row in _made("openai/gpt-oss-120b", "H100", tp=1).tables[1, "moe.csv"]}
    table = read_table("h100_sxm", "moe", "moe_perf")
    own = table.where(
        moe_dtype="w4a16_mxfp4", num_experts=128, topk=4, hidden_size=2880, moe_tp_size=1, moe_ep_size=1,
        num_tokens=1024, distribution="balanced",
    )  # fmt: skip
    assert found[1024, 128] == pytest.approx(float(own.latency_us.min()) + 8.0)


LATENT = ("deepseek-ai/DeepSeek-R1", "deepseek-ai/DeepSeek-V3.2", "zai-org/GLM-5", "moonshotai/Kimi-K2.5")


@needs_silicon
@pytest.mark.parametrize("hardware", ["H100", "H200", "B200"])
@pytest.mark.parametrize("name", LATENT)
def test_no_latent_attention_beats_its_gpu(name: str, hardware: str) -> None:
    gpu = load_hardware(hardware)
    dram_us = 1e-3 / gpu.memory_bandwidth_gbs  # type: ignore[operator]
    group = attention_groups(load_model(name).layers)[0]
    a = group.attention
    assert isinstance(a, LatentAttention)
    weights = sum(rows * cols for t in group.tensors if t.matrix for _, rows, cols in [rank_shape(t, 8)])
    for kv, size in (("auto", 2), ("fp8", 1)):
        for (chunk, _, n, length), us in _rows(_made(name, hardware, kv), "attention.csv").items():
            read = weights  # in 8 bit at least
            if not chunk:
                top = min(length, a.index_top_k) if a.index_top_k else length
                # an L2 of latents may be found again when a measurement is repeated
                read += max(0.0, n * top * (a.kv_rank + a.rope_dim) * size - gpu.l2_mib * 2**20)
            computed = 2.0 * (chunk + n) * weights / (gpu.peak_tflops["fp8"] * 1e6)
            assert us * 1.00001 >= max(computed, 0.8 * read * dram_us), (kv, chunk, n, length)


@needs_silicon
@pytest.mark.parametrize("hardware", ["H100", "H200", "B200", "L40S", "RTXPRO6000"])
def test_no_state_beats_its_gpu(hardware: str) -> None:
    gpu = load_hardware(hardware)
    dram_us = 1e-3 / gpu.memory_bandwidth_gbs  # type: ignore[operator]
    for name in ("Qwen/Qwen3-Next-80B-A3B-Instruct", "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16"):
        group = attention_groups(load_model(name).layers)[1]
        a = group.attention
        assert isinstance(a, Recurrent)
        state = a.heads * a.state_rows * a.state_columns * a.memory_itemsize
        for (chunk, _, n, _), us in _rows(_made(name, hardware, tp=1), f"{group.label}.csv", tp=1).items():
            if not chunk:
                assert us >= (2 * n * state - gpu.l2_mib * 2**20) * dram_us, (name, n)


def test_a_grid_returns_its_points_and_lines_between_them() -> None:
    sizes, lengths = np.array([1, 1, 4, 4]), np.array([16, 64, 16, 64])
    grid = DecodeGrid.of_rows(sizes, lengths, np.array([2.0, 8.0, 4.0, 16.0]))
    assert [grid.at(1, 16), grid.at(4, 64), grid.at(1, 8)] == [2.0, 16.0, 2.0]
    assert grid.at(2, 32) == pytest.approx((2 * 8 * 4 * 16) ** 0.25)
    assert replace(grid, flat=True).at(4, 128) == 16.0


def test_a_grid_goes_on_along_lines_and_not_in_proportion() -> None:
    sizes, lengths = np.repeat([1, 2, 4], 3), np.tile([1024, 2048, 4096], 3)
    grid = DecodeGrid.of_rows(sizes, lengths, 90.0 + sizes + 0.001 * sizes * lengths)  # 90 us of weights
    assert grid.at(64, 2048) == pytest.approx(90 + 64 + 131.072)
    assert grid.at(4, 65536) == pytest.approx(90 + 4 + 262.144)
    assert grid.at(64, 65536) == pytest.approx(90 + 64 + 4194.304)
    alone = DecodeGrid.of_rows(np.array([2]), np.array([16]), np.array([3.0]))
    assert (alone.at(4, 16), alone.at(2, 32)) == (6.0, 6.0)


@needs_silicon
@pytest.mark.parametrize("name", ["mla_generation_module_perf", "dsa_generation_module_perf"])
def test_a_grid_foretells_larger_batches_of_modules(name: str) -> None:
    family = "mla" if name.startswith("mla") else "sparse_attention"
    table = read_table(silicon_gpu(load_hardware("H200")).folder, family, name)
    names = [key for key in ("model", "num_heads", "kv_cache_dtype", "gemm_type") if key in table.columns]
    rows = table.where(**{key: table.columns[key][0] for key in names})
    sizes, lengths = rows.integers("batch_size"), rows.integers("step")
    kept = sizes * lengths * 8 <= (sizes * lengths).max()
    grid = DecodeGrid.of_rows(sizes[kept], lengths[kept], rows.latency_us[kept])
    left = list(zip(sizes[~kept].tolist(), lengths[~kept].tolist(), rows.latency_us[~kept], strict=True))
    errors = [grid.at(size, length) / us - 1 for size, length, us in left]
    assert len(errors) > 10
    assert np.percentile(np.abs(errors), 80) < 0.25


def test_two_kernels_at_a_point_count_as_the_quicker() -> None:
    assert Prompts.of_rows(np.array([8, 4, 8]), np.array([3.0, 1.0, 2.0])).us.tolist() == [1.0, 2.0]


def test_a_prompt_grows_beyond_the_table_as_its_end_does() -> None:
    tokens = np.array([1000, 2000, 4000])
    curved = Prompts.of_rows(tokens, 5.0 + 0.01 * tokens + 1e-5 * tokens**2)
    assert curved.at(8000) == pytest.approx(5.0 + 80.0 + 640.0)
    assert curved.at(8000, squared=0.0) == pytest.approx(205.0 + 4000 * 0.07)


def test_pairs_of_a_window_are_those_counted_one_by_one() -> None:
    for chunk, history, window in ((1, 0, 4), (10, 0, 4), (10, 3, 4), (10, 50, 4), (3, 1, 100)):
        counted = sum(min(window, history + i + 1) for i in range(chunk))
        assert pairs(chunk, history, window) == counted


@pytest.mark.parametrize("name", [name for name in known_models() if "tiny" not in name])
def test_every_weight_of_a_block_is_read_once(name: str) -> None:
    """Products, modules and experts together hold all matrices of the list of layers."""
    model = load_model(name).layers
    read = block_layers(model)
    modules = {index for g in attention_groups(model) if is_module(g.attention) for index in g.blocks}
    for index, (layer, names) in enumerate(zip(model.layers, read.blocks, strict=True)):
        found = sum(t.parameters for each in names if each in read.dense for t in read.dense[each].tensors)
        inside = "attention" if index in modules else None
        wanted = sum(
            t.parameters
            for t in layer.tensors
            if t.matrix and t.copies == 1 and not (inside and ("attn" in t.name or "indexer" in t.name))
        )
        assert found == wanted, index
        assert ("attention" in names) == (layer.attention is not None)


def test_a_bundle_of_two_kinds_adds_up_by_stage(root: Path) -> None:
    from servesim.cost.terms import Stage

    model = sliding_half(load_model("meta-llama/Llama-3.1-8B"), 256)
    folder = root / "profiler/perf/Toy" / model.name / "bf16"
    write_bundle(folder, build_bundle(job(model)))
    tables = load_bundle("Toy", model.name, "bf16", 1).tables(1)
    full, sliding = (tables.attentions[label] for label in ("attention", "attention_sliding"))
    point = ([0], [4], [0], [700])
    average = (full.at(*point) + sliding.at(*point)) / 2
    assert tables.attention.at(*point) == pytest.approx(average)
    three = tables.for_stage(Stage(model, 0, 3))  # full, sliding, full
    assert three.attention.at(*point) == pytest.approx((2 * full.at(*point) + sliding.at(*point)) / 3)
    (folder / "tp1" / "attention_sliding.csv").unlink()
    with pytest.raises(InputError, match=r"attention_sliding.csv: no such file"):
        load_bundle("Toy", model.name, "bf16", 1).tables(1)


def test_variants_share_the_tables_that_are_the_same(root: Path) -> None:
    root = root / "profiler/perf"
    for dtype in ("bfloat16", "fp8"):
        what = job(dtype=dtype)
        write_bundle(root / "Toy" / what.model.name / what.variant, build_bundle(what))
    name = job().model.name
    before = load_bundle("Toy", name, "fp8", 1).tables(1).attention.tensor
    assert share_tables(root) == 1
    assert not (root / "Toy" / name / "fp8/tp1/attention.csv").exists()
    assert (load_bundle("Toy", name, "fp8", 1).tables(1).attention.tensor == before).all()


@needs_silicon
def test_exchanges_of_deepep_come_back() -> None:
    """For block-scaled fp8 experts alone, in tp1: 8 ranks of the newer table, 16 to 64 of the older one."""
    from servesim.profiler.silicon.tables import read_exchange

    rows = {
        row[:3]: row[3] for row in _made("deepseek-ai/DeepSeek-R1", "H200", tp=1).tables[1, "exchange.csv"]
    }
    assert {backend: {ranks for name, ranks, _ in rows if name == backend} for backend, _, _ in rows} == {
        "deepep_high_throughput": {8, 16, 32, 64},
        "deepep_low_latency": {8, 16, 32, 64},
    }
    newer = read_exchange("h200_sxm", "wideep_deepep_ll_perf", "sglang", "0.5.12")
    newer = newer.where(hidden_size=7168, num_topk=8, num_experts=256)
    for tokens in (1, 64, 1024):
        one = newer.where(num_token=tokens).columns
        measured = float(one["dispatch_avg_t_us"][0] + one["combine_avg_t_us"][0])
        assert rows["deepep_low_latency", 8, tokens] == pytest.approx(measured, rel=1e-12)
    for name, tp in (("deepseek-ai/DeepSeek-R1", 8), ("Qwen/Qwen3-30B-A3B", 1)):
        assert (tp, "exchange.csv") not in _made(name, "H200", tp=tp).tables


@needs_silicon
@pytest.mark.parametrize("hardware", ["H100", "H200", "B200"])
def test_no_exchange_beats_its_link(hardware: str) -> None:
    """A token goes to 4.6 of 7 other ranks on average, in 8 bit, and comes back in 16."""
    content = _made("deepseek-ai/DeepSeek-R1", hardware, tp=1)
    link = load_hardware(hardware).link
    assert link is not None
    away = 7 * (1 - comb(224, 8) / comb(256, 8))
    before: dict[str, float] = {}
    for backend, ranks, tokens, us in content.tables[1, "exchange.csv"]:
        if ranks == 8:
            assert us >= tokens * away * 7168 * 3 / link.bandwidth_gbs / 1e3
            assert us >= 0.8 * before.get(backend, 0.0)  # measured: nearly rising
            before[backend] = us
