"""Sweeps that are stopped, taken up, completed and renewed."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from servesim.api import load_cluster
from servesim.cost.bundle import load_bundle
from servesim.errors import InputError, RunError
from servesim.profiler.measure.bundle import measure_bundle
from servesim.profiler.measure.work_folder import MeasureOptions
from servesim.profiler.shots import CATEGORIES
from servesim.specs.reading import read_yaml_object
from tests.profiler.measure.fake_meter import GRID, FakeMeter, PulledPlug, job
from tests.specs import clusters

if TYPE_CHECKING:
    from collections.abc import Sequence

    from servesim.profiler.meter import ProfileJob
    from servesim.profiler.sweep import SweepReport

ALL = MeasureOptions()


pytestmark = pytest.mark.usefixtures("root")


def _measure(what: ProfileJob, meter: FakeMeter, options: MeasureOptions = ALL) -> SweepReport:
    return measure_bundle(what, GRID, meter, _folder(what), options, io.StringIO())


def _folder(what: ProfileJob) -> Path:
    return Path("profiler/perf/Fake") / what.model.name / what.variant


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.csv"))}


@pytest.mark.parametrize("model", ["servesim/tiny-llama", "servesim/tiny-moe"])
def test_a_sweep_makes_a_bundle_of_the_times_it_measured(model: str) -> None:
    what = job(model, tp=(1, 2))
    report = _measure(what, FakeMeter())
    bundle = load_bundle("Fake", model, "bf16")
    for tp in (1, 2):
        tables = bundle.tables(tp)
        assert tables.layer("dense", "qkv_proj").at([16]) == 16.0
        assert tables.layer("per_sequence", "sampler").at([4]) == 8.0
        # 4 decodes of 16: 68 tokens, the longest 17.
        assert tables.attention.at([0], [4], [0], [16]) == pytest.approx(1 + 0.068 + 0.17)
        assert (tables.moe is not None) == what.model.is_moe
        assert tables.skew is not None
    assert report.measured == sum(
        data.count(b"\n") - 1 for name, data in _files(_folder(what)).items() if "fit" not in name
    )
    assert bundle.limits.max_num_batched_tokens == 64


def test_alpha_comes_out_as_the_clock_was_made() -> None:
    # Of mean m and greatest g, the clock's time grows by 0.01 (g - m) where unequal lengths add no tokens,
    # and by (0.01 + 0.001 n) (g - m) where all are of the greatest: α = 0.01 / (0.01 + 0.001 n).
    what = job()
    _measure(what, FakeMeter())
    skew = load_bundle("Fake", what.model.name, "bf16").tables(1).skew
    assert skew is not None
    assert skew.of(0, 8, 0.5, 256, 0) == pytest.approx(0.01 / 0.018, abs=0.01)


@pytest.mark.parametrize("stop_after", [0, 1, 20, 60])
def test_a_stopped_sweep_ends_with_the_same_bytes(stop_after: int) -> None:
    what = job(tp=(1, 2))
    whole = FakeMeter()
    _measure(what, whole)
    expected = _files(_folder(what))
    _folder(what).rename("whole")

    stopped = FakeMeter(stop_after=stop_after)
    with pytest.raises(PulledPlug):
        _measure(what, stopped)
    assert not _folder(what).exists()
    rest = FakeMeter()
    report = _measure(what, rest)
    assert _files(_folder(what)) == expected
    assert stop_after <= whole.shots + 20 - rest.shots  # skew shots that were cut short measure again
    assert report.kept > 0 or stop_after < 2


def test_what_is_measured_already_is_not_measured_again() -> None:
    what = job()
    _measure(what, FakeMeter())
    before = {path: path.stat().st_mtime_ns for path in _folder(what).rglob("*")}
    again = FakeMeter()
    report = _measure(what, again)
    assert (again.shots, report.measured) == (0, 0)
    assert {path: path.stat().st_mtime_ns for path in _folder(what).rglob("*")} == before


def test_force_measures_everything_again() -> None:
    what = job()
    first, second = FakeMeter(), FakeMeter()
    _measure(what, first)
    assert _measure(what, second, MeasureOptions(force=True)).kept == 0
    assert second.shots == first.shots


def test_one_table_can_be_renewed_alone() -> None:
    what = job()
    _measure(what, FakeMeter())
    expected = _files(_folder(what))
    meter = FakeMeter()
    _measure(what, meter, MeasureOptions(force=True, only=("attention",)))
    assert meter.shots == expected["tp1/attention.csv"].count(b"\n") - 1
    assert _files(_folder(what)) == expected


def test_a_bundle_that_lacks_tables_does_not_appear() -> None:
    what = job()
    with pytest.raises(RunError, match=r"still lacks tp1/dense\.csv, tp1/per_sequence\.csv"):
        _measure(what, FakeMeter(), MeasureOptions(only=("attention",)))
    assert not _folder(what).exists()
    assert _measure(what, FakeMeter()).kept > 0


def test_a_degree_is_added_to_a_bundle_without_touching_the_others() -> None:
    what = job()
    _measure(what, FakeMeter())
    first = _files(_folder(what))
    meter = FakeMeter()
    _measure(job(tp=(1, 2)), meter)
    assert meter.ranks == [2]
    both = _files(_folder(what))
    assert {name: data for name, data in both.items() if name.startswith("tp1")} == first
    assert read_yaml_object(_folder(what) / "meta.yaml")["tp_degrees"] == [1, 2]
    assert load_bundle("Fake", what.model.name, "bf16").tables(2).skew is not None


def test_force_keeps_the_degrees_that_were_not_asked_for() -> None:
    what = job(tp=(1, 2))
    _measure(what, FakeMeter())
    meter = FakeMeter()
    _measure(job(tp=(1,)), meter, MeasureOptions(force=True))
    assert meter.ranks == [1]
    assert read_yaml_object(_folder(what) / "meta.yaml")["tp_degrees"] == [1, 2]
    with pytest.raises(InputError, match="gpu: was 'fake device'"):  # tp 2 would be of another device
        _measure(job(tp=(1,)), FakeMeter(device="another device"), MeasureOptions(force=True))


def test_remeasured_table_is_not_reused() -> None:
    _measure(job(), FakeMeter())
    fp8 = job(dtype="fp8")
    _measure(fp8, FakeMeter())
    assert read_yaml_object(_folder(fp8) / "meta.yaml")["taken_from"] == {"attention": "bf16", "skew": "bf16"}
    _measure(fp8, FakeMeter(), MeasureOptions(force=True, only=("attention",)))
    assert read_yaml_object(_folder(fp8) / "meta.yaml")["taken_from"] == {"skew": "bf16"}


def test_rows_of_another_device_are_refused() -> None:
    what = job()
    _measure(what, FakeMeter())
    with pytest.raises(
        InputError, match=r"meta\.yaml: gpu: was 'fake device' .* 'another device' now; .*--force"
    ):
        _measure(what, FakeMeter(device="another device"))
    _measure(what, FakeMeter(device="another device"), MeasureOptions(force=True))
    assert read_yaml_object(_folder(what) / "meta.yaml")["gpu"] == "another device"


def test_a_stopped_sweep_of_another_device_is_refused_too() -> None:
    with pytest.raises(PulledPlug):
        _measure(job(), FakeMeter(stop_after=30))
    with pytest.raises(InputError, match=r"conditions\.yaml: gpu"):
        _measure(job(), FakeMeter(device="another device"))


def test_half_a_sweep_is_not_finished_on_another_grid() -> None:
    what, coarser = job(), replace(GRID, kv_factor=8.0)
    with pytest.raises(PulledPlug):
        _measure(what, FakeMeter(stop_after=30))
    with pytest.raises(InputError, match=r"unfinished sweep has kv_factor 4\.0; give it the same"):
        measure_bundle(what, coarser, FakeMeter(), _folder(what), ALL, io.StringIO())
    # A budget would choose a grid; there is one already.
    measure_bundle(what, coarser, FakeMeter(), _folder(what), MeasureOptions(budget_s=1e-9), io.StringIO())
    assert read_yaml_object(_folder(what) / "meta.yaml")["attention_grid"]["kv_factor"] == 4.0


def test_a_finished_bundle_takes_the_points_of_a_second_grid() -> None:
    what = job()
    _measure(what, FakeMeter())
    before = len((_folder(what) / "tp1" / "attention.csv").read_text().splitlines())
    finer = replace(GRID, kv_factor=2.0)
    report = measure_bundle(what, finer, FakeMeter(), _folder(what), ALL, io.StringIO())
    assert report.measured > 0
    assert len((_folder(what) / "tp1" / "attention.csv").read_text().splitlines()) > before


def test_variants_share_the_tables_that_do_not_differ() -> None:
    _measure(job(), FakeMeter())
    fp8_kv, fp8, both = FakeMeter(), FakeMeter(), FakeMeter()
    _measure(job(kv="fp8"), fp8_kv)  # its dense layers are those of bf16
    _measure(job(dtype="fp8"), fp8)  # its attention is that of bf16
    _measure(job(dtype="fp8", kv="fp8"), both)  # nothing is new
    assert (min(fp8_kv.shots, fp8.shots) > 0, both.shots) == (True, 0)
    taken = read_yaml_object(_folder(job(dtype="fp8", kv="fp8")) / "meta.yaml")["taken_from"]
    assert taken == {"attention": "bf16-kvfp8", "skew": "bf16-kvfp8", "dense": "fp8", "per_sequence": "fp8"}


def test_a_small_memory_leaves_large_batches_out() -> None:
    what = job()
    _measure(what, FakeMeter(capacity=700))
    rows = (_folder(what) / "tp1" / "attention.csv").read_text().splitlines()[1:]
    tokens = [c + h + n * (kv + 1) for c, h, n, kv in ([int(x) for x in r.split(",")[:4]] for r in rows)]
    assert max(tokens) <= 700
    load_bundle("Fake", what.model.name, "bf16").tables(1)


def test_meta_says_how_it_was_measured() -> None:
    what = job()
    _measure(what, FakeMeter())
    meta = read_yaml_object(_folder(what) / "meta.yaml")
    assert meta["source"] == "torch"
    assert meta["engine_effective"] == {"max_num_batched_tokens": 64, "max_num_seqs": 8, "block_size": 16}
    assert meta["attention_grid"]["n_decode"] == [0, 1, 4, 8]
    assert meta["measured"] == {"clock": "a formula"}
    assert len(meta["architecture_sha256"]) == 64
    assert meta["skew_fit"]["per_tp"][1]["bucket_table"] == "tp1/skew_fit.csv"


def test_a_time_that_is_none_stops_the_sweep() -> None:
    class Broken(FakeMeter):
        def experts_us(self, points: Sequence[tuple[int, int]]) -> list[float]:
            return [float("nan")] if points == [(4, 4)] else super().experts_us(points)

    with pytest.raises(RunError, match=r"tp1 moe: shot \(4, 4\) gave"):
        _measure(job("servesim/tiny-moe"), Broken(), MeasureOptions(only=("moe",)))


def test_a_run_can_use_the_bundle() -> None:
    from servesim.cost.build import build_stage_cost
    from servesim.specs.instance_options import resolve
    from servesim.specs.model import load_model
    from servesim.specs.options import RuntimeOptions

    _measure(job(), FakeMeter())
    memory = clusters.npu_mem(mem_size=4, mem_bw=100)
    tiny = clusters.instance(model_name="servesim/tiny-llama", hardware="Fake", npu_mem=memory)
    cluster = load_cluster(clusters.cluster(tiny))
    instance = cluster.instances[0][1]
    model = load_model("servesim/tiny-llama")
    options = RuntimeOptions(max_num_seqs=8, max_num_batched_tokens=64, cudagraph=False)
    timer = build_stage_cost(instance, model, resolve(options, instance, model), cluster)
    # 4 blocks of 8 dense layers, embedding and final norm at 1 µs a token; 2 heads at 2 µs; attention as
    # above.
    dense = 4 * 8 + 2
    assert timer.decode_ns(4, 64, 16, 16) == round(1000 * (dense * 4 + 2 * 8 + 4 * 1.238))


def test_only_known_tables_exist() -> None:
    assert CATEGORIES == ("dense", "per_sequence", "attention", "moe", "skew")
