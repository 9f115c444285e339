"""What a comparison concludes, and on what grounds."""

from __future__ import annotations

import json
import math
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import servesim
from servesim.__main__ import main
from servesim.errors import InputError
from servesim.explore.capacity_band import BandRuns
from servesim.explore.compare import Comparison
from servesim.explore.kernels import kernel_changes
from servesim.explore.limits import Limits
from servesim.explore.show import comparison_text, heading
from servesim.explore.slo import ALIKE, COSTS, FURTHER, NEARER, PAYS, TRADES, change, judge, parse_slo
from servesim.explore.verdict import verdict
from servesim.results import stated_errors
from servesim.results.result import Result
from servesim.results.stated_errors import StatedError, stated_error
from servesim.workload.request import Request, Workload
from tests.hand_made import instance_options, two_requests

CLUSTER = "configs/cluster/single_node_single_instance.json"


def moved(error: float = 5.0, **factors: float) -> Result:
    """The hand-made run with figures of its summary multiplied, and a stated error of its tables."""
    result = two_requests()
    result.instances[0].stated_error = StatedError(error, "made up")
    for key, factor in factors.items():
        result.summary[key] *= factor
    return result


def many(count: int, output: int = 50) -> Workload:
    return Workload([Request(i, 1000, output, i * 100_000_000) for i in range(count)], "steady")


@pytest.mark.parametrize(
    ("factors", "conclusion"),
    [
        ({"output_throughput": 1.04, "mean_e2el_ms": 0.97}, ALIKE),
        ({"output_throughput": 1.2}, PAYS),
        ({"mean_ttft_ms": 0.9}, PAYS),
        ({"output_throughput": 0.9, "mean_e2el_ms": 1.1}, COSTS),
        ({"output_throughput": 1.2, "mean_tpot_ms": 1.48}, TRADES),
    ],
)
def test_only_what_exceeds_the_stated_error_counts(factors: dict[str, float], conclusion: str) -> None:
    assert judge(moved(), moved(**factors)).conclusion == conclusion


def test_ttft_has_an_error_of_its_own() -> None:
    base, other = moved(), moved(mean_ttft_ms=0.9)
    for result in (base, other):
        result.instances[0].stated_error = StatedError(5.0, "made up", ttft=12.0)
    assert judge(base, other).conclusion == ALIKE
    assert judge(base, moved(mean_ttft_ms=0.8)).conclusion == PAYS


def test_the_worse_tables_of_both_runs_set_the_threshold() -> None:
    assert judge(moved(2.0), moved(2.0, output_throughput=1.08)).conclusion == PAYS
    assert judge(moved(2.0), moved(12.0, output_throughput=1.08)).conclusion == ALIKE
    words = verdict("a", moved(2.0), "b", two_gpus(12.0, output_throughput=1.0))
    assert "the tables' error" not in words, "per GPU it is half"


def two_gpus(error: float = 5.0, **factors: float) -> Result:
    result = moved(error, **factors)
    result.instances[0].spec.num_npus = 2
    return result


def test_more_gpus_are_judged_per_gpu() -> None:
    words = verdict("one", moved(), "two", two_gpus(output_throughput=1.13, mean_tpot_ms=0.7))
    assert words.startswith("two is a trade-off (better: TPOT; worse: output throughput per GPU):")
    assert "output throughput +13 % for 2 times the GPUs (1 to 2): per GPU -44 %" in words


def test_gpus_and_rates_per_gpu_are_rows() -> None:
    comparison = Comparison(["one", "two"], [moved(), two_gpus()])
    rows = json.loads(comparison.json_text())["rows"]
    assert rows["num_gpus"]["values"] == {"one": 1, "two": 2}
    each = rows["output_throughput_per_gpu"]
    assert each["values"]["two"] == pytest.approx(each["values"]["one"] / 2)
    assert each["change_percent"] == {"two": -50.0}
    assert "total_token_throughput_per_gpu" in rows
    assert json.loads(comparison.json_text())["conclusions"] == {"two": COSTS}


def test_sets_on_other_gpus_are_named_each() -> None:
    comparison = Comparison(["one", "two"], [moved(), two_gpus()])
    assert heading(comparison)[1:] == [
        "cluster   one: org/tiny on 1 x NPU1",
        "cluster   two: org/tiny on 2 x NPU1",
    ]
    alike = Comparison(["one", "two"], [moved(), moved()])
    assert heading(alike)[1:] == ["cluster   org/tiny on 1 x NPU1"]


def test_a_preemption_now_and_then_is_no_limit() -> None:
    assert not Limits(0.02, 0, 0, preemptions=1, preempted_share=0.005).kv_bound
    assert Limits(0.02, 0, 0, preemptions=30, preempted_share=0.15).kv_bound
    assert Limits(0.08, 0, 0, preemptions=0).kv_bound


def slo_run(ttft: float, share: float) -> Result:
    """10 requests, ``share`` of which have a TTFT of 10 ms and the others of ``ttft`` ms."""
    result = moved()
    rows = result.requests.repeat(5)
    rows["TTFT"] = 10_000_000
    rows["TTFT"][: round((1 - share) * 10)] = int(ttft * 1e6)
    result.__dict__["requests"] = rows
    result.summary["p99_ttft_ms"] = ttft if share < 1 else 10.0
    return result


def test_who_meets_the_slo_pays() -> None:
    slo = parse_slo("ttft:100")
    good, poor, worse = slo_run(50, 1.0), slo_run(200, 0.8), slo_run(300, 0.2)
    assert (slo.goodput_share(good), slo.goodput_share(poor), slo.goodput_share(worse)) == (1.0, 0.8, 0.2)
    assert judge(poor, good, slo).conclusion == PAYS
    assert judge(good, poor, slo).conclusion == COSTS
    assert judge(worse, poor, slo).conclusion == NEARER
    assert judge(poor, worse, slo).conclusion == FURTHER
    words = verdict("a", poor, "b", two_slo(good), slo=slo)
    assert "Only b meets the SLO (TTFT P99 up to 100 ms); 80 % and 100 % of the requests" in words
    assert "a has TTFT P99 200" in words


def two_slo(result: Result) -> Result:
    result.instances[0].spec.num_npus = 2
    return result


def test_within_the_slo_faster_is_worth_nothing() -> None:
    slo = parse_slo(["ttft:100"])
    quick = slo_run(50, 1.0)
    quick.summary["mean_tpot_ms"] *= 0.5
    assert judge(slo_run(50, 1.0), quick, slo).conclusion == ALIKE
    quick.summary["output_throughput"] *= 1.5
    assert judge(slo_run(50, 1.0), quick, slo).conclusion == PAYS


def test_a_bound_within_the_error_is_called_open() -> None:
    words = verdict("a", slo_run(98, 0.5), "b", two_slo(slo_run(50, 1.0)), slo=parse_slo("ttft:100"))
    assert "within the tables' error of 5 %, so it may go either way: TTFT P99 of a" in words


@pytest.mark.parametrize("text", ["ttft:p99<1000", "ttft:1000", "ttft:p99:1000", "TTFT:1000ms"])
def test_bounds_are_p99_milliseconds_unless_said(text: str) -> None:
    (bound,) = parse_slo(text).bounds
    assert (bound.metric, bound.statistic, bound.limit_ms) == ("ttft", "p99", 1000.0)
    assert parse_slo({"ttft": 1000}).bounds == (bound,)


@pytest.mark.parametrize("text", ["", "ttft", "ttft:0", "ttft:-1", "ttft:p98:5", "speed:3", "ttft:1 ttft:2"])
def test_other_bounds_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="--slo"):
        parse_slo(text)


def test_the_command_takes_an_slo(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["compare", "--dataset", "workloads/short_chat.jsonl", "--num-reqs", "10"]
    assert main([*words, "--slo", "ttft:1000", "tpot:p95:50", "--json"]) == 0
    saved = json.loads(capsys.readouterr().out)
    assert [bound["statistic"] for bound in saved["slo"]] == ["p99", "p95"]
    assert saved["rows"]["goodput_percent"]["values"] == {"kv auto": 100, "kv fp8": 100}
    assert "Both meet the SLO" in saved["verdict"]
    assert main([*words, "--slo", "ttft:fast"]) == 2


@cache
def noisy() -> Comparison:
    return servesim.compare(
        CLUSTER,
        many(12),
        {"128": {}, "2": {"max_num_seqs": 2}, "100": {"max_num_seqs": 100}},
        ensemble=4,
        step_noise=0.05,
    )


def test_differences_say_what_survives_the_noise() -> None:
    found = noisy().differences
    assert found is not None
    assert set(found.sets) == {"2", "100"}
    far = found.sets["2"]["mean_ttft_ms"]
    assert far.p5 > 0, "two running requests make others wait in every noisy run"
    same = found.sets["100"]["mean_ttft_ms"]
    assert (same.min, same.max) == (0.0, 0.0), "the same kernels have the same noise"
    saved = json.loads(noisy().json_text())["ensemble"]
    assert (saved["runs"], saved["step_noise"]) == (4, 0.05)
    assert saved["change_percent"]["2"]["mean_ttft_ms"]["survives"] is True
    assert "over 4 noisy runs of each set" in " ".join(comparison_text(noisy()).split())


def test_noise_holds_for_all_sets() -> None:
    with pytest.raises(InputError, match="option set 'b': ensemble: holds for all sets"):
        servesim.compare(CLUSTER, many(2), {"a": {}, "b": {"ensemble": 3}})
    with pytest.raises(InputError, match="step-noise"):
        servesim.compare(CLUSTER, many(2), {"a": {}, "b": {}}, step_noise=0.1)


def test_a_conclusion_that_hangs_on_the_capacity_says_so() -> None:
    base, other = moved(), moved(output_throughput=1.2)
    other.instances[0].options = instance_options(max_num_seqs=64)
    low, high = BandRuns(base, base), BandRuns(moved(output_throughput=1.01), other)
    words = verdict("a", base, "b", other, bands=(low, high))
    assert "The conclusion hangs on the KV capacity" in words
    assert "b makes no measurable difference" not in words
    steady = BandRuns(other, other)
    assert "the conclusion is the same" in verdict("a", base, "b", other, bands=(low, steady))


def test_a_run_short_of_blocks_is_repeated_at_both_ends() -> None:
    content: dict[str, Any] = json.loads(Path(CLUSTER).read_text())
    content["nodes"][0]["instances"][0] |= {"npu_mem": {"mem_size": 20}, "max_model_len": 8192}
    sets = {"16": {}, "fp8": {"kv_cache_dtype": "fp8"}}
    workload = Workload([Request(i, 4000, 200, 0) for i in range(12)], "long")
    comparison = servesim.compare(content, workload, sets, npu_memory_utilization=0.89, seed=0)
    assert any(comparison.bands)
    assert "KV capacity" in comparison.verdict
    assert servesim.compare(content, workload, sets, capacity_band=False).bands == []


def test_steps_are_priced_on_the_instance_that_runs_them() -> None:
    comparison = servesim.compare("configs/cluster/prefill_decode_h100_l40s.json", many(10))
    found = {(change.where, change.step.split()[0]): change for change in kernel_changes(*comparison.results)}
    decode = found["instance 1 (L40S, decode)", "decoding"]
    assert decode.before_us > 20_000, "an L40S reads 15 GiB of weights at 864 GB/s"
    assert ("instance 0 (H100, prefill)", "decoding") not in found
    assert "instance 1 (L40S, decode): decoding" in " ".join(comparison.verdict.split())


def test_trust_has_numbers_and_names_what_is_left_out() -> None:
    comparison = servesim.compare("configs/cluster/prefill_decode_h100_l40s.json", many(4))
    shown = " ".join(comparison.trust)
    assert 2 <= len(comparison.trust) <= 4
    for part in ("H100 bf16 ±6.2 %", "L40S bf16-kvfp8 ±17.2 %", "benchmarks/RESULTS.md", "client"):
        assert part in shown


def test_what_lies_beyond_the_measurements_is_said() -> None:
    far = Workload([Request(0, 20_000, 5, 0), Request(1, 100, 5, 0)], "far")
    lines = servesim.compare(CLUSTER, far).trust
    assert "prompts over 16,384 tokens, 50 % of the requests" in lines[1]
    assert "extrapolated" not in " ".join(servesim.compare(CLUSTER, many(1)).trust)


@pytest.mark.parametrize(
    ("meta", "hardware", "kv", "percent"),
    [
        ({"source": "silicon"}, "RTXPRO6000", "bfloat16", 5.2),
        ({"source": "silicon"}, "H100", "bfloat16", 6.2),
        ({"source": "silicon"}, "H100", "fp8", 11.2),
        ({"source": "silicon"}, "A100", "fp8", 19.2),
        ({"source": "silicon"}, "B200", "fp8", 14.2),
        ({"source": "roofline"}, "H100", "bfloat16", 7),
        ({"source": "roofline"}, "MI300X", "bfloat16", 21),
        ({"vllm_version": "0.24.0"}, "H100", "bfloat16", 3.8),
        ({}, "H100", "bfloat16", 10.0),
    ],
)
def test_every_source_states_an_error(meta: dict[str, str], hardware: str, kv: str, percent: float) -> None:
    assert stated_error(meta, hardware, kv).percent == percent


def test_stated_errors_are_those_of_the_results_page() -> None:
    page = Path("benchmarks/RESULTS.md").read_text(encoding="utf-8")
    for gpu, (bf16, fp8) in stated_errors.CHUNKED_PROMPTS.items():
        shown = "not measured" if fp8 is None else f"{fp8:+d} %"
        assert re.search(
            rf"^\| {gpu} \| [^|]+\| {re.escape(f'{bf16:+d} %')} \| {re.escape(shown)} \|", page, re.M
        ), gpu
    runs = page[page.index("public-rows:begin") : page.index("public-rows:end")]
    for gpu, (tpot, ttft) in stated_errors.PUBLIC_RUNS.items():
        for metric, stated in (("TPOT", tpot), ("TTFT", ttft)):
            rows = re.findall(
                rf"^\| {gpu} TP \d, Llama-3.1-70B \| {metric} \| \d+ \| \S+ \| ([\d.]+) \|", runs, re.M
            )
            assert max(map(float, rows)) == stated, (gpu, metric)
    steps = page[page.index("Whole steps, kernels only") :]
    for gpu, worst in stated_errors.ROOFLINE_STEPS.items():
        row = re.search(rf"^\| {gpu} \|(.+)\|$", steps, re.M)
        assert row is not None
        pairs = [tuple(map(int, cell.split("/"))) for cell in row[1].split("|")]
        assert (max(m for m, _ in pairs[:3]), max(p for _, p in pairs[:3])) == worst, gpu
    stated = page[page.index("by which a bundle is") : page.index("All steps, stated or not")]
    assert max(
        float(p) for p in re.findall(r"\| ([\d.]+) % \| [+-][\d.]+ % \| [+-][\d.]+ % \|$", stated, re.M)
    ) == (stated_errors.WHOLE_STEPS)
    row = re.search(r"^\| measured bundles, no host time \|(.+)\|$", page, re.M)
    assert row is not None
    worst = max(abs(float(cell.split("/")[1])) for cell in row[1].split("|"))
    assert math.ceil(worst * 10) / 10 == stated_errors.MEASURED


def test_a_set_that_rejects_everything_ends_with_status_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    workload = tmp_path / "long.jsonl"
    workload.write_text('{"input_toks": 200000, "output_toks": 5, "arrival_time_ns": 0}\n')
    assert main(["compare", "--dataset", str(workload)]) == 1
    told = capsys.readouterr()
    assert told.err.startswith("error: kv auto: every request was rejected: ")
    assert "pay" not in told.out
    assert "kv auto cannot serve this workload" in told.out
    assert main(["--dataset", str(workload), "--ensemble", "3"]) == 1
    told = capsys.readouterr()
    assert told.err.startswith("error: every request was rejected: 200000 prompt")
    assert "TTFT" not in told.out
    result = servesim.simulate(CLUSTER, str(workload))
    assert result.nothing_ran
    assert change(result, result, "output_throughput") == 0.0
    with pytest.raises(servesim.RunError, match="every request was rejected"):
        servesim.ensemble(CLUSTER, str(workload), ensemble=2)
