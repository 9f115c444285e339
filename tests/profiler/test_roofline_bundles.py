"""Bundles computed from peak rates: complete, loadable, and true to what the model is."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from servesim.cost.bundle import load_bundle
from servesim.errors import NotSupportedError
from servesim.profiler.bundle_writer import BundleContent, bundle_files, write_bundle
from servesim.profiler.roofline.meter import BY_NAME, layer_kind
from servesim.specs import paths
from servesim.specs.architecture import LayerEntry
from servesim.specs.block_layers import architecture_of, attention_groups
from servesim.specs.hardware import load_hardware
from servesim.specs.model import known_models, load_model
from servesim.specs.rank_shapes import block_windows
from servesim.specs.runnable import why_not_simulated
from tests.profiler.roofline_toy import PERFECT, TOY_HARDWARE, build_bundle, job, sliding_half

if TYPE_CHECKING:
    from pathlib import Path

Key = tuple[int, int, int, int]


def attention(content: BundleContent, tp: int = 1) -> dict[Key, float]:
    return {row[:4]: row[4] for row in content.tables[tp, "attention.csv"]}


SIMULATED = [name for name in known_models() if why_not_simulated(load_model(name)) is None]


@pytest.mark.parametrize("name", SIMULATED)
def test_every_shipped_model_gets_a_bundle_with_all_its_layers(name: str) -> None:
    model = load_model(name)
    content = build_bundle(job(model))
    architecture = architecture_of(model)
    assert {row[0] for row in content.tables[1, "dense.csv"]} == set(architecture.catalog.dense)
    assert {row[0] for row in content.tables[1, "per_sequence.csv"]} == set(architecture.catalog.per_sequence)
    assert ((1, "moe.csv") in content.tables) == model.is_moe
    assert all(row[-1] > 0 for rows in content.tables.values() for row in rows)


def test_the_same_job_gives_the_same_bytes() -> None:
    assert bundle_files(build_bundle(job())) == bundle_files(build_bundle(job()))


def test_a_written_bundle_loads_and_says_nothing_was_measured(root: Path) -> None:
    asked = job(tp_degrees=(1, 2), kv_cache_dtype="fp8")
    write_bundle(root / "profiler/perf/Toy" / asked.model.name / asked.variant, build_bundle(asked))
    bundle = load_bundle("Toy", asked.model.name, "bf16-kvfp8")
    assert "nothing measured" in bundle.describe()
    assert bundle.limits.max_num_batched_tokens == 64
    assert bundle.tables(2).collective("all_reduce", 2) is not None
    assert bundle.collectives_link == "nvlink"


def test_halving_the_heads_halves_a_long_decodes_stream() -> None:
    content = build_bundle(job(tp_degrees=(1, 2)), PERFECT)
    one, two = (attention(content, tp)[0, 0, 16, 1024] - PERFECT.decode_start_us for tp in (1, 2))
    assert two == pytest.approx(one / 2)


def test_a_mixed_step_is_its_prefill_and_its_decodes() -> None:
    rows = attention(build_bundle(job()))
    assert rows[64, 0, 16, 1024] == pytest.approx(rows[64, 0, 0, 0] + rows[0, 0, 16, 1024])


def test_sliding_blocks_have_a_table_that_bends_at_the_window() -> None:
    full = load_model("meta-llama/Llama-3.1-8B")
    sliding = sliding_half(full, 256)
    assert block_windows(full) == [(None, 1.0)]
    assert block_windows(sliding) == [(None, 0.5), (256, 0.5)]
    content = build_bundle(job(sliding), PERFECT)
    whole, start = attention(content), PERFECT.decode_start_us
    window = {row[:4]: row[4] for row in content.tables[1, "attention_sliding.csv"]}
    assert window[0, 0, 16, 1024] - start == pytest.approx((whole[0, 0, 16, 1024] - start) * 256 / 1025)
    assert window[0, 0, 16, 128] == pytest.approx(whole[0, 0, 16, 128])
    assert (0, 0, 16, 256) in window  # the table has a point where the time bends
    kinds = content.meta["attention_kinds"]
    assert {name: kind["share"] for name, kind in kinds.items()} == {
        "attention": 0.5,
        "attention_sliding": 0.5,
    }


def test_slow_links_are_left_to_the_cluster_file() -> None:
    slow = TOY_HARDWARE.model_copy(
        update={"link": TOY_HARDWARE.link.model_copy(update={"bandwidth_gbs": 32.0})}
    )  # type: ignore[union-attr]
    assert (2, "comm.csv") not in build_bundle(job(hardware=slow, tp_degrees=(2,))).tables
    assert (2, "comm.csv") not in build_bundle(job(collectives="none", tp_degrees=(2,))).tables
    asked = build_bundle(job(hardware=slow, collectives="measured", tp_degrees=(2,)))
    assert asked.meta["collectives"] == {"link": "pcie"}


def test_expert_slices_shrink_with_the_degree() -> None:
    content = build_bundle(job("Qwen/Qwen3-30B-A3B-Instruct-2507", tp_degrees=(1, 2)), PERFECT)
    one, two = ({row[:2]: row[2] for row in content.tables[tp, "moe.csv"]} for tp in (1, 2))
    assert two[64, 128] == pytest.approx(one[64, 128] / 2, rel=0.05)


@pytest.mark.parametrize(
    ("entry", "kind"),
    [
        ({"class": "GemmaRMSNorm"}, "norm"),
        ({"class": "LlamaRotaryEmbedding"}, "rotary"),
        ({"class": "VocabParallelEmbedding"}, "embedding"),
        ({"class": "RowParallelLinear", "within": "FalconAttention"}, "o_proj"),
        ({"class": "RowParallelLinear", "within": "FalconMLP"}, "down_proj"),
        ({"class": "ColumnParallelLinear", "within": "Starcoder2MLP"}, "up_proj"),
        ({"class": "GeluAndMul"}, "activation"),
        ({"class": "NewGELU"}, "plain_activation"),
    ],
)
def test_a_layer_of_any_name_is_known_by_its_class(entry: dict[str, str], kind: str) -> None:
    assert layer_kind("some_layer", LayerEntry.model_validate(entry), "x.yaml") == kind


def test_usual_names_need_no_class() -> None:
    assert all(
        layer_kind(name, LayerEntry.model_validate({"class": "Any"}), "x.yaml") == kind
        for name, kind in BY_NAME.items()
    )


def test_a_layer_of_no_known_kind_is_refused_by_name() -> None:
    entry = LayerEntry.model_validate({"class": "Mamba2Mixer"})
    with pytest.raises(NotSupportedError, match=r"x.yaml: catalog: layer 'mixer' of class Mamba2Mixer"):
        layer_kind("mixer", entry, "x.yaml")


def test_latent_attention_of_few_heads_costs_less() -> None:
    deepseek = load_model("deepseek-ai/DeepSeek-R1")
    one, eight = (attention(build_bundle(job(deepseek, tp_degrees=(tp,))), tp) for tp in (1, 8))
    assert all(eight[point] < one[point] for point in one)
    assert one[0, 0, 16, 1024] > one[0, 0, 16, 16]


KINDS = (
    "openai/gpt-oss-20b",  # windows and sinks, MXFP4
    "deepseek-ai/DeepSeek-R1",  # latents, fp8 in blocks
    "deepseek-ai/DeepSeek-V3.2",  # an indexer
    "Qwen/Qwen3-Next-80B-A3B-Instruct",  # a gated delta net, shared experts
    "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16",  # Mamba-2, experts without a gate
    "meta-llama/Llama-4-Maverick-17B-128E-Instruct",  # chunks
    "moonshotai/Kimi-K2.5",  # int4
    "nvidia/Gemma-4-31B-IT-NVFP4",  # heads of two sizes, NVFP4
    "deepseek-ai/DeepSeek-V4-Flash",  # compressed tokens
)
HARDWARE = sorted(path.stem for path in paths.find_all("configs/hardware/*.yaml"))


@pytest.mark.parametrize("hardware", HARDWARE)
def test_every_kind_of_layer_has_a_time_on_every_hardware(hardware: str) -> None:
    facts = load_hardware(hardware)
    for name in KINDS:
        model = load_model(name)
        asked = job(model, hardware=facts, dtype=model.torch_dtype, tp_degrees=(4,))
        if facts.memory_bandwidth_gbs is None or not facts.peak_tflops:
            continue
        content = build_bundle(asked)
        assert all(row[-1] > 0 for rows in content.tables.values() for row in rows)
        labels = {group.label for group in attention_groups(model.layers)}
        assert {name[:-4] for _, name in content.tables if name.startswith("attention")} == labels


def test_at_least_sixty_models_are_shipped() -> None:
    assert len([name for name in known_models() if not name.startswith("servesim/")]) >= 60
