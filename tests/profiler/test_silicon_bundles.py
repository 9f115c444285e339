"""The shipped bundles are what the command makes, complete, small, and true between their grid points."""

from __future__ import annotations

import importlib
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from servesim.__main__ import main
from servesim.cost.tables import densify
from servesim.errors import InputError, NotSupportedError
from servesim.profiler import grids
from servesim.profiler.bundle_writer import BundleContent, bundle_files, write_bundle
from servesim.profiler.meter import ProfileJob
from servesim.specs.architecture import load_architecture
from servesim.specs.hardware import load_hardware
from servesim.specs.model import load_model
from tests.profiler.silicon_data import needs_silicon

SHIPPED = Path(__file__).resolve().parents[2] / "profiler" / "perf" / "RTXPRO6000"
MODELS = ("meta-llama/Llama-3.1-8B", "Qwen/Qwen3-32B", "Qwen/Qwen3-30B-A3B-Instruct-2507")
VARIANTS = ("bf16", "bf16-kvfp8", "fp8", "fp8-kvfp8")
MOE = MODELS[2]


def _job(model: str, dtype: str, kv_cache_dtype: str, tp: int) -> ProfileJob:
    spec = load_model(model)
    return ProfileJob(
        model=spec,
        architecture=load_architecture(spec.model_type),
        hardware=load_hardware("RTXPRO6000"),
        dtype=dtype,
        kv_cache_dtype=kv_cache_dtype,
        tp_degrees=(tp,),
        max_num_batched_tokens=8192,
        max_num_seqs=1024,
    )


@needs_silicon
@pytest.mark.parametrize(
    ("dtype", "kv", "variant"), [("bfloat16", "fp8", "bf16-kvfp8"), ("fp8", "fp8", "fp8-kvfp8")]
)
def test_a_shipped_bundle_can_be_made_again_byte_for_byte(dtype: str, kv: str, variant: str) -> None:
    from servesim.profiler.silicon.tables import package_version
    from servesim.profiler.sources import compute

    shipped = SHIPPED / MOE / variant
    meta = yaml.safe_load((shipped / "meta.yaml").read_text(encoding="utf-8"))
    made_with = meta["data_version"]
    if made_with != package_version():
        pytest.skip(
            f"the shipped bundles are from aiconfigurator-core {made_with}, here is {package_version()}"
        )
    files = bundle_files(compute("silicon", _job(MOE, dtype, kv, 8)))
    del files["meta.yaml"]  # names the degrees that were made together
    assert set(files) == {f"tp8/{name}" for name in _tables(meta, 8)}
    for name, data in files.items():
        owner = shipped.parent / meta.get("same_as", {}).get(name, variant)
        assert (owner / name).read_bytes() == data, name


def _tables(meta: dict[str, Any], tp: int) -> set[str]:
    """Tables of a degree, those that another variant has the file of among them."""
    return {name.partition("/")[2] for name in meta["files"] if name.startswith(f"tp{tp}/")}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("model", MODELS)
def test_every_shipped_variant_is_complete(model: str, variant: str) -> None:
    folder = SHIPPED / model / variant
    meta = yaml.safe_load((folder / "meta.yaml").read_text(encoding="utf-8"))
    assert meta["source"] == "silicon"
    assert meta["data_licence"] == "Apache-2.0"
    assert meta["tp_degrees"] == [1, 2, 4, 8]
    assert meta["skew_fit"]["enabled"] is not variant.endswith("kvfp8")
    assert meta["collectives"] == {"link": "pcie"}  # so that the cluster's links decide
    for tp in meta["tp_degrees"]:
        names = _tables(meta, tp)
        assert {"dense.csv", "per_sequence.csv", "attention.csv"} <= names
        assert ("moe.csv" in names) == (model == MOE)
        assert ("comm.csv" in names) == (tp > 1)
        assert ("skew_fit.csv" in names) == meta["skew_fit"]["enabled"]


def test_all_shipped_bundles_together_stay_small() -> None:
    assert sum(path.stat().st_size for path in SHIPPED.parent.rglob("*") if path.is_file()) < 60e6


@pytest.mark.parametrize(
    ("hardware", "model", "variants", "degrees"),
    [
        *((hardware, MODELS[0], VARIANTS, [1, 2]) for hardware in ("H100", "H200", "B200", "L40S")),
        ("A100", MODELS[0], ("bf16",), [1, 2]),
        *((hardware, "openai/gpt-oss-20b", VARIANTS[:2], [1, 2]) for hardware in ("H100", "H200", "B200")),
        *((hardware, "openai/gpt-oss-120b", VARIANTS[:2], [1, 2]) for hardware in ("H100", "H200", "B200")),
        *(("H100", name, VARIANTS[:2], [1, 2]) for name in ("Qwen/Qwen3-32B", "Qwen/Qwen3-30B-A3B")),
        *((hardware, "meta-llama/Llama-3.1-70B", VARIANTS, [2, 4, 8]) for hardware in ("H100", "H200")),
    ],
)
def test_popular_accelerators_come_with_bundles(
    hardware: str, model: str, variants: tuple[str, ...], degrees: list[int]
) -> None:
    for variant in variants:
        folder = SHIPPED.parent / hardware / model / variant
        meta = yaml.safe_load((folder / "meta.yaml").read_text(encoding="utf-8"))
        assert meta["tp_degrees"] == degrees
        assert meta["collectives"] == {"link": "pcie" if hardware == "L40S" else "nvlink"}
        for tp in degrees:
            names = _tables(meta, tp)
            assert {"dense.csv", "per_sequence.csv", "attention.csv"} <= names
            assert ("comm.csv" in names) == (tp > 1)


@needs_silicon
@pytest.mark.parametrize("kv_dtype", ["bfloat16", "fp8"])
def test_linear_interpolation_between_grid_points_stays_true(kv_dtype: str) -> None:
    """Decodes and prefills at random points against the formulas; the median error is under 1 %."""
    from servesim.profiler.silicon.attention import AttentionShape, attention_times
    from servesim.profiler.silicon.tables import silicon_gpu

    times = attention_times(silicon_gpu(load_hardware("RTXPRO6000")), AttentionShape(8, 2, 128, kv_dtype))
    grid = grids.attention_grid(8192, 1024, 131072, lambda chunk: times.prefill_us(chunk, 8192))
    rows = [row for row in grid.rows() if not (row[0] and row[2])]
    keys = np.array([(chunk, n, history, kv) for chunk, history, n, kv in rows])
    surface = densify(keys, np.array([times.mixed_us(*row) for row in rows]))
    rng = random.Random(7)

    def between(low: int, high: int) -> int:
        return round(np.exp(rng.uniform(np.log(low), np.log(high))))

    def error_percent(points: list[tuple[int, int, int, int]]) -> np.ndarray:
        exact = np.array([times.mixed_us(*point) for point in points])
        chunk, history, n, kv = np.array(points).T
        return np.asarray(np.abs(surface.at(chunk, n, history, kv) / exact - 1) * 100)

    decodes = error_percent([(0, 0, between(1, 1024), between(16, 8192)) for _ in range(300)])
    assert np.median(decodes) < 1.0
    assert np.percentile(decodes, 95) < 2.5
    prefills = error_percent([(between(16, 8192), between(1, 65536), 0, 0) for _ in range(300)])
    assert np.median(prefills) < 1.0
    assert np.percentile(prefills, 95) < 8.0


def test_a_bundle_replaces_the_old_one_whole(tmp_path: Path) -> None:
    folder = tmp_path / "hw" / "org" / "model" / "bf16"
    old = BundleContent({"source": "silicon"}, {(1, "dense.csv"): [("act_fn", 1, 2.5)]})
    write_bundle(folder, old)
    assert (folder / "tp1" / "dense.csv").read_text() == "layer,tokens,time_us\nact_fn,1,2.5\n"
    write_bundle(folder, BundleContent({"source": "silicon"}, {(2, "dense.csv"): [("act_fn", 1, 1 / 3)]}))
    assert sorted(path.name for path in folder.iterdir()) == ["meta.yaml", "tp2"]
    assert (folder / "tp2" / "dense.csv").read_text().endswith("act_fn,1,0.333333\n")
    assert [path.name for path in folder.parent.iterdir()] == ["bf16"]


def test_without_the_extra_the_command_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import importlib.metadata as metadata

    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr("servesim.profiler.silicon.tables.importlib.metadata.version", missing)
    status = main(["profile", MOE, "--hardware", "RTXPRO6000", "--output-root", str(tmp_path)])
    assert status == 2
    assert "pip install 'servesim[silicon]'" in capsys.readouterr().err


def test_hardware_without_measurements_names_the_field() -> None:
    from servesim.profiler.silicon.tables import silicon_gpu

    importlib.import_module("servesim.profiler.silicon.tables")
    with pytest.raises(InputError, match="silicon"):
        silicon_gpu(load_hardware("NoSuchHardware"))


def test_a_bundle_of_another_source_is_not_replaced_unasked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "RTXPRO6000" / MOE / "bf16"
    (folder / "tp1").mkdir(parents=True)
    (folder / "meta.yaml").write_text("source: vllm\n")
    order = ["profile", MOE, "--hardware", "RTXPRO6000", "--output-root", str(tmp_path), "--tp", "1"]
    assert main(order) == 2
    assert "it is from source vllm; give --force" in capsys.readouterr().err
    assert (folder / "meta.yaml").read_text() == "source: vllm\n"


def test_a_degree_is_not_lost_unasked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "RTXPRO6000" / MOE / "bf16"
    (folder / "tp4").mkdir(parents=True)
    (folder / "meta.yaml").write_text("source: silicon\n")
    order = ["profile", MOE, "--hardware", "RTXPRO6000", "--output-root", str(tmp_path), "--tp", "1"]
    assert main(order) == 2
    assert "tp 4 would be lost" in capsys.readouterr().err


@pytest.mark.parametrize("tp", ["", "0", "1,x", "-2"])
def test_a_bad_degree_is_an_error(tp: str) -> None:
    from servesim.cli.profile import parse_degrees

    with pytest.raises(InputError, match="--tp"):
        parse_degrees(tp)


def test_degrees_are_sorted_and_distinct() -> None:
    from servesim.cli.profile import parse_degrees

    assert parse_degrees("4, 1 2,2") == (1, 2, 4)


def test_what_measures_one_block_refuses_other_attention() -> None:
    from servesim.profiler.meter import ProfileJob
    from servesim.profiler.sources import MEASURING, check
    from servesim.specs.block_layers import architecture_of

    model = load_model("deepseek-ai/DeepSeek-V2-Lite")
    job = ProfileJob(model, architecture_of(model), load_hardware("H100"))
    for source in MEASURING:
        with pytest.raises(NotSupportedError, match="not mla attention, shared experts"):
            check(source, job)


@needs_silicon
def test_block_scaled_products_are_told_from_their_launches(tmp_path: Path) -> None:
    claims = {}
    for scaling in ("tensor", "block"):
        folder = tmp_path / scaling
        command = "profile meta-llama/Llama-3.1-8B --hardware H100 --source silicon --tp 1 --dtype fp8"
        assert main([*command.split(), "--fp8-scaling", scaling, "--output-root", str(folder)]) == 0
        (meta,) = folder.rglob("meta.yaml")
        claims[scaling] = yaml.safe_load(meta.read_text(encoding="utf-8"))
    assert "read slow" not in str(claims["tensor"])
    assert claims["block"]["confidence"].startswith("products partly derived")
    assert "the smallest takes 55 us" in claims["block"]["tables"]["products"]


@needs_silicon
def test_measured_collectives_say_what_they_were_measured_over() -> None:
    from servesim.profiler.silicon import comm
    from servesim.profiler.silicon.tables import silicon_gpu

    pcie, nvlink = (silicon_gpu(load_hardware(name)) for name in ("RTXPRO6000", "H100"))
    assert (comm.link_of(pcie), comm.link_of(nvlink)) == ("pcie", "nvlink")
    rows, _ = comm.all_reduce_rows(nvlink)
    assert {row[1] for row in rows} >= {2, 4, 8}
    assert all(row[0] == "all_reduce" and row[3] > 0 for row in rows)


def test_heads_that_do_not_divide_are_refused() -> None:
    from servesim.specs.rank_shapes import rank_shapes

    with pytest.raises(InputError, match="32 attention heads cannot be split over tp 3"):
        rank_shapes(load_model(MODELS[0]), 3)


def test_replicated_kv_heads_keep_at_least_one() -> None:
    from servesim.specs.rank_shapes import rank_shapes

    shapes = rank_shapes(load_model(MOE), 8)
    assert (shapes.heads, shapes.kv_heads) == (4, 1)
    assert shapes.gemm("qkv_proj") == ((4 + 2) * 128, 2048)
