"""What a server adds to the kernel times of a table: host, launches, sustained rates, load, noise."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from servesim.cost.attention import decodes_under_load
from servesim.cost.batch_shape import Shape
from servesim.cost.stage_cost import StageCost
from servesim.cost.step_terms import Gemms, LayerTerm, stage_terms
from servesim.cost.tables import Curve
from servesim.cost.terms import whole_model
from servesim.network.topology import Dimension
from servesim.specs.hardware import EngineSpec
from servesim.specs.vllm_versions import runs_v2
from tests.cost.bundles import Toy, toy_architecture, toy_model

if TYPE_CHECKING:
    from pathlib import Path

CHUNK = Shape([(16, 0)])


def cost(root: Path, *, overlaps: bool = True, **engine: Any) -> StageCost:
    """A toy stage with these engine constants."""
    toy = Toy()
    tables, model = toy.bundle(root).tables(1), toy_model()
    terms = stage_terms(
        toy_architecture(root, ()), whole_model(model), tables, 1, Dimension("tp", "ring", 1.0, 0)
    )
    spec = EngineSpec.model_validate({"cudagraph": False, **engine})
    return StageCost(toy.bundle(root), tables, 2, terms, spec, overlaps=overlaps)


def test_synchronous_host_time_is_added_to_every_step(root: Path) -> None:
    plain = cost(root)
    host = cost(root, overlaps=False, host_step_us=100.0, host_sequence_us=10.0)
    assert host.decode_ns(3, 48, 16, 16) == plain.decode_ns(3, 48, 16, 16) + 130_000
    assert host.step_ns(CHUNK) == plain.step_ns(CHUNK) + 110_000


def test_asynchronous_host_time_hides_behind_the_gpu(root: Path) -> None:
    plain = cost(root)
    assert cost(root, host_sequence_us=10.0).decode_ns(3, 48, 16, 16) == plain.decode_ns(3, 48, 16, 16)
    late = cost(root, host_step_us=5000.0, host_sequence_us=10.0, decode_step_overhead_us=7.0)
    assert late.decode_ns(3, 48, 16, 16) == 5_037_000
    assert late.step_ns(CHUNK) == 5_010_000


@pytest.mark.parametrize("host_us", [0.0, 100.0, 130.0, 5000.0])
def test_a_run_of_decodes_is_its_steps_with_a_floor(root: Path, host_us: float) -> None:
    step = cost(root, host_step_us=host_us)
    run = step.decode_run_ns(2, 40, 16, 24, 300).tolist()
    assert run == [step.decode_ns(2, 40 + 2 * i, 16 + i, 24 + i) for i in range(300)]


def test_the_lines_of_a_step_add_up_with_the_wait_for_the_host(root: Path) -> None:
    late = cost(root, host_step_us=5000.0, prefill_step_overhead_us=40.0)
    lines = late.explain(CHUNK)
    assert sum(line.total_us for line in lines) == pytest.approx(late.step_ns(CHUNK) / 1000)
    assert lines[-1].layer == "waiting for the host"


def test_eager_steps_wait_for_their_launches(root: Path) -> None:
    launches = 2 + sum(
        layer.calls
        for layers in (cost(root).layers.blocks, cost(root).layers.once, cost(root).layers.sequences)
        for layer in layers
    )
    eager = cost(root, eager_launch_us=100.0)
    assert eager.decode_ns(1, 16, 16, 16) == launches * 100_000
    graphs = cost(root, eager_launch_us=100.0, cudagraph=True)
    assert graphs.decode_ns(1, 16, 16, 16) < launches * 100_000


def test_no_gemm_is_faster_than_the_sustained_rate() -> None:
    model = toy_model()
    gemms = Gemms.of(EngineSpec(sustained_tflops_8bit=1e-3), model, "fp8", 1)
    curve = Curve(np.array([1, 1000]), np.array([1.0, 1.0]))
    term = gemms.term("down_proj", 1, curve, "dense.csv")
    # 2 x 8 x 16 operations a row at 10^9 a second
    assert term.us(np.array([160])).tolist() == pytest.approx([160 * 0.256])
    assert "sustain" in term.origin(160)
    assert Gemms.of(EngineSpec(sustained_tflops_8bit=1e-3), model, "bfloat16", 1).row_us == {}


@pytest.mark.parametrize(
    ("smooth", "read"),
    [("none", [5, 9, 4, 8, 6, 7]), ("tile", [4, 4, 4, 8, 6, 7]), ("all", [4, 4, 4, 6, 6, 7])],
)
def test_noise_of_a_table_is_read_over(smooth: str, read: list[float]) -> None:
    curve = Curve(np.array([1, 4, 16, 32, 64, 128]), np.array([5.0, 9, 4, 8, 6, 7]))
    engine = EngineSpec.model_validate({"smooth_gemms": smooth})
    term = Gemms.of(engine, toy_model(), "bfloat16", 1).term("o_proj", 1, curve, "dense.csv")
    assert term.us(curve.points).tolist() == read


def test_decodes_under_load_take_longer_beside_chunks_too(root: Path) -> None:
    attention = Toy().bundle(root).tables(1).attention
    loaded = decodes_under_load(attention, 1.5)
    for chunk in (0, 16):
        one, eight = ((loaded.at(chunk, n, 0, 64) - attention.at(chunk, n, 0, 64))[0] for n in (1, 8))
        assert one == 0.0
        assert eight == pytest.approx(0.5 * attention.at(0, 8, 0, 64)[0])


def test_the_second_model_runner_by_version() -> None:
    assert runs_v2("0.24", "llama", moe=False)
    assert not runs_v2("0.24", "gemma3", moe=False)
    assert runs_v2("0.28", "gemma3", moe=False)
    assert not runs_v2("0.28", "qwen3_moe", moe=True)
    assert runs_v2("0.33", "qwen3_moe", moe=True)


def test_an_output_head_beyond_its_rows_beats_no_peak() -> None:
    model = toy_model()
    gemms = Gemms.of(EngineSpec(), model, "fp8", 1, peak_tflops=1e-3)
    row_us = 2e-6 * model.vocab_size * model.hidden_size / 1e-3
    flat = Curve(np.array([1, 16, 256]), np.array([50.0, 50.0, 51.0]))  # reading the weights
    term = LayerTerm("lm_head", 1, flat, "sequences", "per_sequence.csv", peak_us=gemms.head_us)
    many = round(100 / row_us) + 300
    assert term.us(np.array([256, many])).tolist() == [51.0, pytest.approx(many * row_us)]
    assert term.origin(many) == f"{many} rows at the GPU's peak rate (peak_tflops)"
    assert term.origin(256) == "profiled at 256 sequences in per_sequence.csv"
    assert Gemms.of(EngineSpec(), model, "fp8", 1).head_us == 0.0
