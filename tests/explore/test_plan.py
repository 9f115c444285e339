"""The cheapest fleet that keeps a service level: known optima, pruning, prices, and what is written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import servesim
from servesim import InputError
from servesim.__main__ import main
from servesim.explore.fleet import OBJECTIVES, Fleet, read_prices
from servesim.explore.fleet_bounds import SLOW_PREFILL
from servesim.explore.fleet_space import question_of
from servesim.specs.options import RuntimeOptions
from servesim.specs.serve_line import read_serve_line, write_serve_line
from tests.cost.bundles import HARDWARE, MODEL
from tests.engine.toy_world import toy_world

if TYPE_CHECKING:
    from collections.abc import Iterator

FAST = "Fast"
PRICES, WORKLOAD = "prices.yaml", "workload.jsonl"
FACTS = "memory_gib: 1\nmemory_bandwidth_gbs: 1000\nlink: {bandwidth_gbs: 100, latency_us: 2}\n"
ONE = {"async_scheduling": False, "enable_prefix_caching": False}


@pytest.fixture(autouse=True)
def toys(tmp_path: Path) -> Iterator[None]:
    with toy_world(tmp_path):
        perf = Path("profiler/perf")
        shutil.copytree(perf / HARDWARE, perf / FAST)
        for table in (perf / FAST).rglob("*.csv"):
            head, *lines = table.read_text(encoding="utf-8").splitlines()
            halved = [
                ",".join([*line.split(",")[:-1], str(float(line.split(",")[-1]) / 2)]) for line in lines
            ]
            table.write_text("\n".join([head, *halved]) + "\n", encoding="utf-8")
        Path("configs/hardware").mkdir(parents=True, exist_ok=True)
        for name in (HARDWARE, FAST):
            Path(f"configs/hardware/{name}.yaml").write_text(FACTS, encoding="utf-8")
        write_prices(2.0, 3.0)
        write_workload(1e9)
        yield


def write_prices(toy: float, fast: float) -> None:
    gpus = {
        HARDWARE: {"per_hour": toy, "watts": 300, "idle_watts": 30},
        FAST: {"per_hour": fast, "watts": 500, "idle_watts": 50},
    }
    Path(PRICES).write_text(json.dumps({"as_of": "2026-01-01", "gpus": gpus}), encoding="utf-8")


def write_workload(rate: float, count: int = 120, tokens: int = 1) -> None:
    """Prompts of equal length at equal distances, ``rate`` per second."""
    lines = [
        {"input_toks": 48, "output_toks": tokens, "arrival_time_ns": round(index * 1e9 / rate)}
        for index in range(count)
    ]
    Path(WORKLOAD).write_text("\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")


def asked(slo: str = "ttft:5", **more: Any) -> dict[str, Any]:
    fleet = {
        "hardware": [HARDWARE, FAST],
        "tp": [1],
        "prefill_share": [0],
        "kv_cache_dtype": ["auto"],
        "max_num_seqs": [1],
        "max_num_batched_tokens": [64],
        **more.pop("fleet", {}),
    }
    common = {"model": MODEL, "prices": PRICES, "workload": WORKLOAD, "max_gpus": 6, "options": ONE}
    return {**common, "slo": slo, "fleet": fleet, **more}


def service_ms(hardware: str) -> float:
    """Time of one request alone."""
    fleet = Fleet(MODEL, hardware, 1, max_num_seqs=1, max_num_batched_tokens=64)
    alone = servesim.simulate(fleet.cluster(read_prices(PRICES)), WORKLOAD, num_reqs=1, **ONE)
    return float(alone.requests["TTFT"][0]) / 1e6


@pytest.mark.parametrize(
    ("toy", "fast", "hardware", "replicas"),
    [(2.0, 3.0, FAST, 2), (1.0, 3.0, HARDWARE, 3), (2.0, 2.9, FAST, 2), (2.0, 3.1, HARDWARE, 3)],
)
def test_a_known_optimum_is_found(toy: float, fast: float, hardware: str, replicas: int) -> None:
    """Requests of D ms at equal distances of 0.4 D wait for nobody on 3 instances, and ever longer on 2.

    An instance that is twice as fast takes half: 2 of them have room. So the price of 2 fast ones against 3
    others decides.
    """
    one_ms = service_ms(HARDWARE)
    assert service_ms(FAST) == pytest.approx(one_ms / 2, rel=1e-3)
    write_prices(toy, fast)
    write_workload(1000 / (0.4 * one_ms))
    found = servesim.plan(asked(f"ttft:{1.5 * one_ms}"))
    assert found.best is not None
    assert (found.best.hardware, found.best.replicas) == (hardware, replicas)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_pruning_finds_what_an_exhaustive_run_finds(objective: str) -> None:
    rng = np.random.default_rng(5)
    times = np.cumsum(rng.exponential(4e5, 90)).astype(int).tolist()
    lines = [
        {"input_toks": 30 + i % 40, "output_toks": 12, "arrival_time_ns": t} for i, t in enumerate(times)
    ]
    Path(WORKLOAD).write_text("\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")
    limits = {"max_num_seqs": [2, 8], "prefill_share": [0, 0.5], "tp": [1, 2]}
    question = asked("ttft:p95:10 tpot:2", objective=objective, fleet=limits, max_gpus=4)
    quick, slow = servesim.plan(question), servesim.plan(question, prune=False)
    assert slow.candidates == len(slow.trials) == quick.candidates
    assert len(quick.trials) < len(slow.trials)
    assert 0 < sum(trial.meets for trial in slow.trials) < len(slow.trials)
    assert quick.best == slow.best
    assert quick.best is not None


def test_what_is_pruned_is_counted_with_its_reason(tmp_path: Path) -> None:
    fleet = {"replicas": [1], "tp": [1, 3], "max_num_seqs": [1, 2]}
    write_workload(1000 / (0.4 * service_ms(HARDWARE)), tokens=20)
    found = servesim.plan(asked("ttft:2 tpot:900", fleet=fleet, max_gpus=3))
    assert found.best is None
    (tmp_path / "serve.sh").write_text("of an earlier answer")
    assert [path.name for path in found.save(tmp_path)] == ["plan.json", "candidates.csv"]
    assert not (tmp_path / "serve.sh").exists()
    assert found.pruned["cannot start"] == 4
    assert "must divide the 4 attention heads" in found.details["cannot start"]
    assert found.candidates == 8
    assert "no fleet" in found.text()


def test_bounds_rule_out_what_one_request_alone_misses() -> None:
    one_ms = service_ms(FAST)
    found = servesim.plan(asked(f"ttft:{one_ms / 3}"))
    assert dict(found.pruned) == {SLOW_PREFILL: found.candidates}
    assert found.runs == 0
    assert "no fleet" in found.text()


def test_fleets_that_cannot_start_are_bad_input() -> None:
    with pytest.raises(InputError, match="none of 6 fleets can be simulated: 6 cannot start"):
        servesim.plan(asked(fleet={"tp": [3], "replicas": [1, 2, 3]}, max_gpus=9))


def test_a_bound_rules_out_nothing_that_keeps_the_slo() -> None:
    write_workload(3000, tokens=8)
    question = asked("ttft:p95:4 tpot:1", fleet={"max_num_seqs": [1, 4, 16]}, max_gpus=4)
    slow = servesim.plan(question, prune=False)
    quick = servesim.plan({**question, "fleet": {**question["fleet"], "replicas": [1, 2, 3, 4]}})
    kept = {trial.fleet for trial in slow.trials if trial.meets}
    assert kept
    assert {trial.fleet for trial in quick.trials if trial.meets} <= kept
    assert quick.best == slow.best


def test_the_fleet_runs_as_the_plan_says(tmp_path: Path) -> None:
    write_workload(1000, tokens=12)
    for share in (0, 0.5):
        found = servesim.plan(
            asked("ttft:9 tpot:9", fleet={"max_num_seqs": [8], "prefill_share": [share], "replicas": [2, 3]})
        )
        found.save(tmp_path / "out")
        again = servesim.simulate(str(tmp_path / "out/fleet.json"), WORKLOAD, **ONE)
        assert found.finalists[0].trial.figures["p99_ttft_ms"] == again.summary["p99_ttft_ms"]
        assert found.finalists[0].trial.figures["p99_e2el_ms"] == again.summary["p99_e2el_ms"]
        lines = (tmp_path / "out/serve.sh").read_text(encoding="utf-8").splitlines()
        assert len(lines) == len(again.instances)
        assert json.loads((tmp_path / "out/plan.json").read_text())["candidates"] == found.candidates
        rows = (tmp_path / "out/candidates.csv").read_text(encoding="utf-8").splitlines()
        assert len(rows) == len(found.trials) + 1


def test_serve_lines_say_what_the_fleet_says() -> None:
    fleet = Fleet(
        "Qwen/Qwen3-30B-A3B-Instruct-2507", "H100", 2, tp=4, pp=2, experts=True, dtype="fp8",
        kv_cache_dtype="fp8", max_num_seqs=64, max_num_batched_tokens=4096,
    )  # fmt: skip
    options = RuntimeOptions(
        block_size=32, enable_prefix_caching=False, npu_memory_utilization=0.8, cudagraph=False
    )
    lines = fleet.serve_lines(options)
    assert [line.rpartition(" ")[2] for line in lines] == ["8000", "8001"]
    for line in lines:
        assert read_serve_line(line).options == {
            **fleet.options(),
            "block_size": 32,
            "enable_prefix_caching": False,
            "npu_memory_utilization": 0.8,
            "cudagraph": False,
        }
    with pytest.raises(InputError, match="prefill and decode instances"):
        read_serve_line(Fleet("m", "H100", 2, prefill=1).serve_lines(options)[0])


@pytest.mark.parametrize(
    "options",
    [
        {"model": "m"},
        {"model": "m", "tp": 2, "dtype": "bfloat16", "kv_cache_dtype": "fp8", "max_model_len": "8192"},
        {"model": "a b/c", "dtype": "fp8", "enable_chunked_prefill": False, "async_scheduling": True},
    ],
)
def test_a_written_serve_line_reads_the_same(options: dict[str, Any]) -> None:
    assert read_serve_line(write_serve_line(options)).options == options


def test_more_load_and_prices_name_another_fleet() -> None:
    one_ms = service_ms(HARDWARE)
    write_prices(1.0, 3.0)
    write_workload(1000 / (0.36 * one_ms))  # 2.8 instances are busy; with 20 % more load 3.3
    found = servesim.plan(asked(f"ttft:{1.3 * one_ms}"))
    changes = {change.condition: change.fleet for change in found.changes}
    assert found.best is not None
    assert found.best.replicas == 3
    more = changes["20 % more load"]
    assert more is not None
    assert (more.hardware, more.replicas) == (HARDWARE, 4)
    (price,) = [condition for condition in changes if condition.startswith("Fast below 1.50 USD")]
    assert "now 3.00, -50 %" in price
    assert found.finalists[0].if_more_load is False
    assert found.finalists[-1].trial.fleet.hardware == FAST


def test_finalists_have_a_band_of_their_worst_figure() -> None:
    write_workload(1000, tokens=12)
    found = servesim.plan(asked("ttft:9 tpot:9", fleet={"max_num_seqs": [8]}))
    best = found.finalists[0]
    assert best.band is not None
    low, high = best.band
    assert low < best.trial.score < high
    assert (high <= 1) == best.if_slower
    told = found.to_dict()["finalists"][0]
    assert told["score_band"][0] == round(low, 6)
    for finalist in found.finalists:
        for key, (least, most) in finalist.bands.items():
            assert least <= finalist.trial.figures[key] + 1e-6, key
            assert most >= finalist.trial.figures[key] - 1e-6, key
    least, most = best.bands["p99_tpot_ms"]
    assert told["bands"]["p99_tpot_ms"] == [round(least, 6), round(most, 6)]
    assert f"{least:.3g}"[:3] in found.text()


def test_the_band_of_a_finalist_is_that_of_its_own_run() -> None:
    from servesim.explore.error_band import error_bands

    write_workload(1000, tokens=12)
    found = servesim.plan(asked("ttft:9 tpot:9", fleet={"max_num_seqs": [8]}))
    best = found.finalists[0]
    alone = servesim.simulate(found.cluster(), found.workload, found.options)
    bands = error_bands(alone)
    assert bands is not None
    assert best.bands["p99_tpot_ms"] == pytest.approx(bands.of("p99_tpot_ms"))


def test_the_peak_of_a_day_sizes_the_fleet() -> None:
    one_ms = service_ms(HARDWARE)
    rates = [500 / one_ms, 2500 / one_ms, 1500 / one_ms]
    write_prices(1.0, 9.0)
    described = {"input_len": "fixed:48", "output_len": "fixed:1", "num_reqs": 120, "arrival": "uniform"}
    found = servesim.plan(asked(f"ttft:{1.5 * one_ms}", workload=described, rates=rates))
    assert found.best is not None
    assert found.best.replicas == 3
    assert [count for _, count in found.hours] == [1, 3, 2]
    assert "6 GPU-hours in 3 hours instead of 9" in " ".join(found.text().split())


def test_the_front_has_nothing_that_is_beaten_in_both() -> None:
    write_workload(3000, tokens=12)
    found = servesim.plan(asked("ttft:p95:9 tpot:9", fleet={"max_num_seqs": [8]}), prune=False)
    front = found.front
    costs = [trial.figures["cost_per_hour"] for trial in front]
    latencies = [trial.figures["p99_e2el_ms"] for trial in front]
    assert len(front) > 1
    assert found._repr_html_().count("<svg") == 1
    assert costs == sorted(set(costs))
    assert latencies == sorted(set(latencies), reverse=True)


def test_the_plan_is_the_same_every_time() -> None:
    write_workload(3000, tokens=12)
    question = asked("ttft:p95:9 tpot:9", fleet={"max_num_seqs": [2, 8]})
    assert servesim.plan(question).json_text() == servesim.plan(question).json_text()


def test_the_command_writes_and_says_what_was_found(capsys: pytest.CaptureFixture[str]) -> None:
    write_workload(3000, tokens=12)
    Path("day.yaml").write_text(json.dumps(asked("ttft:p95:9")), encoding="utf-8")
    assert main(["plan", "day.yaml", "--grid", "--max-num-seqs 8 --tp 1", "--output", "out"]) == 0
    printed = capsys.readouterr().out
    for label in ("best fleet", "costs", "binds", "searched", "prices", "written"):
        assert label in printed
    assert main(["run", "--cluster-config", "out/fleet.json", "--dataset", WORKLOAD]) == 0
    capsys.readouterr()
    assert main(["plan", "day.yaml", "--slo", "ttft:0.001", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["finalists"] == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "slo: is missing"),
        ({"slo": "ttft:1", "gpu": 3}, "plan: gpu: is no key of a plan"),
        ({"slo": "ttft:1", "objective": "speed"}, "objective: 'speed' is not allowed"),
        ({"slo": "ttft:1", "max_gpus": 0}, "max_gpus: 0 is not allowed"),
        ({"slo": "ttft:1", "fleet": {"tps": [1]}}, "fleet: tps: is no choice of a fleet"),
        ({"slo": "ttft:1", "fleet": {"tp": [0]}}, "fleet: tp: 0 is not allowed"),
        ({"slo": "ttft:1", "fleet": {"prefill_share": [1]}}, "prefill_share: 1 is not allowed"),
        ({"slo": "ttft:1", "rates": [0]}, "rates: must be a list"),
        ({"slo": "ttft:1", "goodput": 2}, "goodput: 2 is not allowed"),
        ({"slo": "ttft:1", "workload": {"input_len": "fixed:5"}}, "rates: is missing"),
        ({"slo": "ttft:1", "workload": {"lengths": 5}, "rates": [1]}, "lengths: is no key"),
        ({"slo": "ttft:1", "fleet": {"hardware": ["B9"]}}, "hardware: B9: has no price"),
        ({"slo": "ttft:1", "options": {"tp": 2}}, "tp: has no effect on a plan"),
        ({"slo": "ttft:1", "rates": [1], "options": {"request_rate": 3.0}}, "no effect beside rates"),
        (
            {"slo": "ttft:1", "rates": [1], "workload": {"num_reqs": 9}, "options": {"num_reqs": 3}},
            "num_reqs: has no effect on a workload that the plan describes",
        ),
        ({"slo": "ttft:1", "prices": "no.yaml"}, "no such price file"),
    ],
)
def test_a_wrong_question_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        servesim.plan({"model": MODEL, "prices": PRICES, "workload": WORKLOAD, **given})


def test_shipped_prices_have_a_date_and_sources() -> None:
    prices = read_prices()
    assert prices.as_of
    assert all(price.source and price.per_hour > 0 and price.watts for price in prices.gpus.values())


def test_a_question_is_checked_once() -> None:
    question = question_of(asked("ttft:p99<5 tpot:p95<2", goodput=None))
    assert question.target.words() == "TTFT P99 up to 5 ms, TPOT P95 up to 2 ms"


def test_a_router_chooses_where_there_are_several() -> None:
    """Its options hold for fleets of several instances, and rule no fleet of one out."""
    one_ms = service_ms(HARDWARE)
    write_workload(1000 / (0.4 * one_ms))
    slo, routed = f"ttft:{1.5 * one_ms}", {**ONE, "request_routing_policy": "RR"}
    best = servesim.plan(asked(slo, options=routed)).best
    assert best is not None
    assert (best.hardware, best.replicas) == (FAST, 2)
    write_workload(1.0, count=20)
    alone = servesim.plan(asked(slo, options=routed)).best
    assert alone is not None
    assert alone.replicas == 1
    for words in ({"request_routing_policy": "RR"}, {"expert_routing_policy": "RAND"}):
        with pytest.raises(InputError, match="no fleet of the plan gives it a choice"):
            servesim.plan(asked(slo, max_gpus=1, options={**ONE, **words}))
    with pytest.raises(InputError, match="the workload has no sessions"):
        servesim.plan(asked(slo, options={**ONE, "sticky_sessions": True}))
