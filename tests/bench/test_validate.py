from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from servesim.__main__ import main
from servesim.bench.agreement import METRICS, STATISTICS, Agreement
from servesim.bench.recording import Recording, load_recording
from servesim.bench.validate import options_of, recorded_run, with_calibration
from servesim.errors import InputError, NotSupportedError, RunError
from servesim.specs.hardware import EngineSpec, HardwareSpec
from tests.bench import recordings
from tests.hand_made import MS, two_requests

HEADER = "t,prompt_throughput,gen_throughput,running,waiting"


@pytest.fixture(scope="module")
def own_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recording of our own simulator."""
    folder = tmp_path_factory.mktemp("own") / "run"
    return recordings.write(folder, recordings.rows(recordings.simulated()))


@pytest.mark.parametrize("anchor", ["queued", "arrival"])
def test_a_run_agrees_with_itself(own_run: Path, anchor: str) -> None:
    agreement = recorded_run(load_recording(own_run)).simulate(anchor)
    for metric in METRICS:
        for statistic in STATISTICS:
            assert abs(agreement.error(metric, statistic)) < 1e-4
        relative, ms = agreement.request_errors(metric)
        assert np.abs(relative).max() < 1e-3  # stamps are written as floats of seconds
        assert np.abs(ms).max() < 0.002
    report = agreement.report()
    assert abs(report["throughput"]["output_tokens_per_second"]["error_percent"]) < 0.01
    assert report["over_time"]["running"]["mean_absolute_error"] == 0
    assert report["over_time"]["waiting"]["mean_absolute_error"] == 0


def test_arrivals_of_the_workload_win_over_the_recorded_ones(own_run: Path, tmp_path: Path) -> None:
    dataset = recordings.write_workload(tmp_path / "sent.jsonl", recordings.workload())
    recording = load_recording(own_run)
    planned = [request.arrival_ns for request in recordings.workload()]
    run = recorded_run(recording, dataset=dataset)
    assert run.arrivals == "workload"
    assert [request.arrival_ns for request in run.workload] == planned
    late = recorded_run(recording, dataset=dataset, arrivals="recording")
    assert [request.arrival_ns for request in late.workload] == recording.arrival_ns.tolist()


def by_hand() -> tuple[Recording, Agreement]:
    """Two recorded requests beside the run of ``two_requests``, which is 1 ms behind the recording's clock.

    Simulated from arrival: TTFT 9 and 8 ms, latency 41 and 48 ms, TPOT 32/3 and 40/2 ms.
    """

    def ms(*values: float) -> Any:
        return np.array([round(value * MS) for value in values], dtype=np.int64)

    recording = Recording(
        source=Path("by hand"),
        name="by hand",
        model="org/tiny",
        engine="a pencil",
        arguments={},
        input_tokens=np.array([100, 50]),
        output_tokens=np.array([4, 3]),
        arrival_ns=ms(2, 13),
        queued_ns=ms(2, 13),
        scheduled_ns=ms(3, 14),
        first_token_ns=ms(12, 21),
        last_token_ns=ms(42, 61),
    )
    return recording, Agreement(recording, two_requests(), "arrival")


def test_errors_are_those_of_a_pencil() -> None:
    _, agreement = by_hand()
    # Recorded TTFT 10 and 8 ms, latency 40 and 48 ms, TPOT 10 and 20 ms.
    assert agreement.error("TTFT") == pytest.approx(17 / 18 - 1)
    assert agreement.error("latency") == pytest.approx(89 / 88 - 1)
    assert agreement.error("TPOT") == pytest.approx((32 / 3 + 20) / 30 - 1, rel=1e-6)
    relative, ms = agreement.request_errors("TTFT")
    assert relative.tolist() == pytest.approx([-0.1, 0.0])
    assert ms.tolist() == [-1.0, 0.0]
    figures = agreement.report()["metrics"]["TTFT"]
    assert figures["mean"] == {
        "recorded_ms": 9.0,
        "simulated_ms": 8.5,
        "error_ms": -0.5,
        "error_percent": pytest.approx(-100 / 18),
    }
    assert figures["per_request"]["median_absolute_error_percent"] == pytest.approx(5.0)
    assert figures["per_request"]["median_absolute_error_ms"] == 0.5


def test_both_runs_are_counted_on_one_clock() -> None:
    _, agreement = by_hand()
    times = np.array([2, 3, 12, 14, 42, 61, 62]) * MS
    # Simulated on the recorded clock: the first runs from 3 to 43 ms, the second from 13 to 61 ms.
    assert agreement.simulated.running_at(times).tolist() == [0, 1, 1, 2, 2, 0, 0]  # type: ignore[union-attr]
    assert agreement.recorded.running_at(times).tolist() == [0, 1, 1, 2, 1, 0, 0]  # type: ignore[union-attr]


def test_generated_tokens_are_counted_between_ticks(tmp_path: Path) -> None:
    result = recordings.simulated()
    folder = recordings.write(
        tmp_path, recordings.rows(result), timeseries=f"{HEADER}\n1,0,10,1,0\n2,0,20,1,0\n1000,0,30,0,0\n"
    )
    curves = recorded_run(load_recording(folder)).simulate("queued").curves["generated tokens/s"]
    spans = np.array([1, 1, 998])
    total = sum(request.output_tokens for request in recordings.workload())
    assert (curves.simulated * spans).sum() == pytest.approx(total)
    assert curves.recorded.tolist() == [10, 20, 30]


def test_single_tokens_have_no_time_per_token(tmp_path: Path) -> None:
    sent = recordings.workload(4)
    for request in sent:
        request.output_tokens = 1
    folder = recordings.write(tmp_path, recordings.rows(recordings.simulated(sent=sent)))
    agreement = recorded_run(load_recording(folder)).simulate("queued")
    assert len(agreement.recorded.metric("TPOT")) == 0
    assert agreement.report()["metrics"]["TPOT"]["mean"]["error_percent"] == 0


def test_the_engines_arguments_become_options(own_run: Path) -> None:
    recording = load_recording(own_run)
    recording.arguments.update(
        {"enforce_eager": True, "gpu_memory_utilization": 0.8, "speculative": "x", "disable_this": False}
    )
    options, left = options_of(recording, {"max_num_seqs": 4})
    assert (options.max_num_seqs, options.max_num_batched_tokens) == (4, 1024)
    assert options.npu_memory_utilization == 0.8
    assert not options.cudagraph
    assert left == {"speculative": "x"}
    recording.arguments["block_size"] = -1
    with pytest.raises(InputError, match=r"engine_kwargs.*block_size: -1 is not allowed"):
        options_of(recording, {})


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"model_name": "Qwen/Qwen3-32B"},
            f"model_name Qwen/Qwen3-32B is not the recorded {recordings.MODEL}",
        ),
        ({"tp_size": 2, "num_npus": 2}, "tp_size 2 is not the recording's tensor_parallel_size 1"),
    ],
)
def test_another_cluster_is_refused(
    own_run: Path, tmp_path: Path, changes: dict[str, Any], told: str
) -> None:
    path = tmp_path / "cluster.json"
    path.write_text(json.dumps(recordings.cluster(**changes)))
    with pytest.raises(InputError, match=told):
        recorded_run(load_recording(own_run), cluster_config=path)


def test_replicas_without_a_group_are_refused(tmp_path: Path) -> None:
    folder = recordings.write(
        tmp_path,
        recordings.rows(recordings.simulated(sent=recordings.workload(2))),
        meta={"engine_kwargs": recordings.arguments(data_parallel_size=2)},
    )
    with pytest.raises(InputError, match="has 1 instances, and the recording has data_parallel_size 2"):
        recorded_run(load_recording(folder))
    config = recordings.cluster()
    config["nodes"][0]["instances"] *= 2
    config["nodes"][0]["num_instances"] = 2
    (folder / "cluster.json").write_text(json.dumps(config))
    with pytest.raises(NotSupportedError, match="dp_group"):
        recorded_run(load_recording(folder))


def test_a_recording_without_a_cluster_needs_one(own_run: Path, tmp_path: Path) -> None:
    folder = recordings.write(tmp_path, recordings.rows(recordings.simulated(sent=recordings.workload(2))))
    (folder / "cluster.json").unlink()
    with pytest.raises(InputError, match="--cluster-config names the cluster"):
        recorded_run(load_recording(folder))
    assert len(recorded_run(load_recording(folder), cluster_config=own_run / "cluster.json").workload) == 2


def test_another_workload_is_refused(own_run: Path, tmp_path: Path) -> None:
    recording = load_recording(own_run)
    other = recordings.workload()
    other.requests[3].input_tokens += 1
    with pytest.raises(InputError, match=r"request 3 has 332 prompt .* and the recording 331"):
        recorded_run(recording, dataset=write_other(tmp_path, other))
    with pytest.raises(InputError, match="has 10 requests, and the recording 40"):
        recorded_run(recording, dataset=write_other(tmp_path, recordings.workload(10)))
    with pytest.raises(InputError, match="--dataset names it"):
        recorded_run(recording, arrivals="workload")
    longer = recorded_run(recording, dataset=write_other(tmp_path, recordings.workload(50)))
    assert len(longer.workload) == 40


def write_other(folder: Path, sent: Any) -> Path:
    return recordings.write_workload(folder / "other.jsonl", sent)


def test_a_request_the_simulation_rejects_ends_the_comparison(tmp_path: Path) -> None:
    rows = recordings.rows(recordings.simulated(sent=recordings.workload(3)))
    rows[1]["input_toks"] = 200_000
    with pytest.raises(
        RunError, match="request 1 was served in the recording, and the simulation rejects it"
    ):
        recorded_run(load_recording(recordings.write(tmp_path, rows))).simulate("queued")


def test_recorded_blocks_are_used_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = recordings.rows(recordings.simulated())
    folder = recordings.write(tmp_path / "a", rows, meta={"kv_cache": {"num_gpu_blocks": 700}})
    run = recorded_run(load_recording(folder))
    assert run.simulate("queued").result.instances[0].capacity.num_blocks == 700
    assert main(["bench", "validate", str(folder)]) == 0
    assert "KV blocks: 700 a replica, as recorded" in capsys.readouterr().out
    told = recordings.arguments(num_gpu_blocks=800)
    other = recorded_run(load_recording(recordings.write(tmp_path / "b", rows, meta={"engine_kwargs": told})))
    assert (other.options.num_gpu_blocks, other.not_simulated) == (800, {})


def test_what_is_given_wins_over_recorded_blocks(tmp_path: Path) -> None:
    rows, meta = recordings.rows(recordings.simulated()), {"kv_cache": {"num_gpu_blocks": 700}}
    recording = load_recording(recordings.write(tmp_path / "a", rows, meta=meta))
    run = recorded_run(recording, flags={"kv_cache_dtype": "fp8"})
    assert run.options.num_gpu_blocks is None
    assert run.kv_blocks == "not the recorded 700 a replica, since kv_cache_dtype is given"
    wrong = recordings.write(tmp_path / "b", rows, meta={"kv_cache": {"num_gpu_blocks": "many"}})
    with pytest.raises(InputError, match=r"kv_cache\.num_gpu_blocks: .* must be at least 2 blocks"):
        load_recording(wrong)


def test_gib_links_carry_seven_percent_more(own_run: Path, tmp_path: Path) -> None:
    recording = load_recording(own_run)
    with pytest.raises(InputError, match="has one GPU, and nothing goes over a link"):
        recorded_run(recording, link_gib=True)
    recording = load_recording(
        recordings.write(
            tmp_path / "stages",
            recordings.rows(recordings.simulated(sent=recordings.workload(2))),
            meta={"engine_kwargs": recordings.arguments(pipeline_parallel_size=2)},
            config=recordings.cluster(pp_size=2, num_npus=2),
        )
    )
    assert recorded_run(recording).cluster.link_bandwidths_gbs == (16.0,)
    assert recorded_run(recording, link_gib=True).cluster.link_bandwidths_gbs == (16 * 1.073741824,)


def test_calibrated_constants_go_to_their_hardware_only(own_run: Path) -> None:
    cluster = recorded_run(load_recording(own_run)).cluster
    engine = EngineSpec(prefill_step_overhead_us=7.0)
    (_, instance), *_ = with_calibration(
        cluster, HardwareSpec(name="RTXPRO6000", engine=engine), "x.yaml"
    ).instances
    assert instance.engine == engine
    with pytest.raises(InputError, match="was calibrated for H100, and the cluster has RTXPRO6000"):
        with_calibration(cluster, HardwareSpec(name="H100", engine=engine), "x.yaml")
    with pytest.raises(InputError, match="has no engine block"):
        with_calibration(cluster, HardwareSpec(name="RTXPRO6000"), "x.yaml")


def test_the_command_prints_and_writes_json(
    own_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out" / "figures.json"
    assert main(["bench", "validate", str(own_run), "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "TTFT mean" in printed
    assert "latency of a request, median |error|" in printed
    figures = json.loads(out.read_text())
    assert figures["anchor"] == "queued"
    assert figures["requests"] == 40
    assert set(figures["metrics"]) == set(METRICS)
    assert abs(figures["metrics"]["TPOT"]["p99"]["error_percent"]) < 0.01
    first = out.read_bytes()
    assert main(["bench", "validate", str(own_run), "--json", str(out)]) == 0
    assert out.read_bytes() == first


def test_flags_win_over_the_recording(own_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    assert main(["bench", "validate", str(own_run), "--max-num-seqs", "1", "--json", str(out)]) == 0
    figures = json.loads(out.read_text())
    assert figures["options"]["max_num_seqs"] == 1
    assert figures["metrics"]["latency"]["mean"]["error_percent"] > 100


def test_a_client_recording_is_compared_from_arrival(
    own_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recording = load_recording(own_run)
    first, last = recording.first_token_ns / 1e9, recording.last_token_ns / 1e9
    result = {
        "model_id": recordings.MODEL,
        "input_lens": recording.input_tokens.tolist(),
        "output_lens": recording.output_tokens.tolist(),
        "start_times": (recording.arrival_ns / 1e9).tolist(),
        "ttfts": (first - recording.arrival_ns / 1e9).tolist(),
        "itls": [[gap] for gap in (last - first).tolist()],
    }
    path = tmp_path / "result.json"
    path.write_text(json.dumps(result))
    flags = ["--max-num-seqs", "16", "--max-num-batched-tokens", "1024"]
    config = ["--cluster-config", str(own_run / "cluster.json")]
    out = tmp_path / "figures.json"
    assert main(["bench", "validate", str(path), *flags, *config, "--json", str(out)]) == 0
    figures = json.loads(out.read_text())
    assert figures["anchor"] == "arrival"
    assert abs(figures["metrics"]["latency"]["mean"]["error_percent"]) < 0.01
    assert main(["bench", "validate", str(path), *config, "--anchor", "queued"]) == 2
    assert "--anchor arrival compares" in capsys.readouterr().err


def test_plots_are_png_files(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    ticks = "\n".join([HEADER, "1,0,100,2,0", "2,0,100,2,0"]) + "\n"
    folder = recordings.write(
        tmp_path / "run",
        recordings.rows(recordings.simulated(sent=recordings.workload(10))),
        timeseries=ticks,
    )
    assert main(["bench", "validate", str(folder), "--plots", str(tmp_path / "plots")]) == 0
    written = sorted((tmp_path / "plots").iterdir())
    assert [path.name for path in written] == ["cdf.png", "load.png", "throughput.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)


def test_without_matplotlib_plots_are_refused_before_the_run(
    own_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("servesim.results.figures.find_spec", lambda _: None)
    assert main(["bench", "validate", str(own_run), "--plots", "plots"]) == 2
    captured = capsys.readouterr()
    assert "pip install 'servesim[report]'" in captured.err
    assert not captured.out


def test_bundles_of_another_place_are_used_alone(
    own_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "validate", str(own_run), "--bundles", str(tmp_path)]) == 2
    assert "does not exist" in capsys.readouterr().err
    assert main(["bench", "validate", str(own_run), "--bundles", str(tmp_path / "none")]) == 2
    assert "no such folder" in capsys.readouterr().err
