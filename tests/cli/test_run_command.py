"""``servesim run``."""

from __future__ import annotations

import csv
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from servesim.__main__ import main

DOCUMENTED = [
    "--cluster-config",
    "configs/cluster/single_node_single_instance.json",
    "--dtype",
    "bfloat16",
    "--kv-cache-dtype",
    "fp8",
    "--block-size",
    "16",
    "--dataset",
    "workloads/example_trace.jsonl",
    "--log-interval",
    "1.0",
]
SMALL = ["--num-reqs", "5"]


pytestmark = pytest.mark.usefixtures("root")


def test_the_documented_command_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*DOCUMENTED, "--output", "outputs/fp8_kv_run.csv"]) == 0
    shown = capsys.readouterr().out
    form = r"^\[INFO\] step=\d+ batch=\d+ prompt_t=\S+ tok/s decode_t=\S+ tok/s npu_mem=\d+\.\d GB t="
    assert len(re.findall(form, shown, re.MULTILINE)) > 10
    assert "65536 bytes/token (kv fp8)" in shown
    assert "300 completed" in shown
    with (tmp_path / "outputs/fp8_kv_run.csv").open() as handle:
        rows = list(csv.DictReader(handle))
    assert [int(row["request id"]) for row in rows] == list(range(300))
    for row in rows[:20]:
        gaps = json.loads(row["ITL"])
        assert len(gaps) == int(row["output"]) - 1
        assert int(row["TTFT"]) + sum(gaps) == int(row["latency"])


def test_every_output_is_the_same_bytes_stepped_or_jumped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = []
    for name, extra in (("jumped", []), ("again", []), ("stepped", ["--stepped"])):
        outputs = ["--output", f"{name}/r.csv", "--steps", f"{name}/s.csv", "--summary", f"{name}/s.json"]
        assert main([*DOCUMENTED, "--num-reqs", "40", *outputs, *extra]) == 0
        shown.append([line for line in capsys.readouterr().out.splitlines() if line.startswith("[INFO]")])
    for file in ("r.csv", "s.csv", "s.json"):
        assert len({(tmp_path / name / file).read_bytes() for name in ("jumped", "again", "stepped")}) == 1
    assert shown[0] == shown[1] == shown[2]


def test_a_missing_bundle_is_told_with_its_folder_and_remedy(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([*DOCUMENTED, "--dtype", "int8", "--output", "x.csv"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(
        "FileNotFoundError: profiler/perf/RTXPRO6000/meta-llama/Llama-3.1-8B/int8-kvfp8/ does not exist"
    )
    assert "servesim profile" in error
    assert "Traceback" not in error


def test_the_run_id_stands_in_file_names(tmp_path: Path) -> None:
    assert (
        main([*SMALL, "--run-id", "mine", "--output", "{run_id}/r.csv", "--summary", "{run_id}/s.json"]) == 0
    )
    assert sorted(path.name for path in (tmp_path / "mine").iterdir()) == ["r.csv", "s.json"]
    assert main([*SMALL, "--output", "generated/{run_id}.csv"]) == 0
    (path,) = (tmp_path / "generated").iterdir()
    assert re.fullmatch(r"\d{8}-\d{6}-\d+\.csv", path.name)


def test_inter_token_latencies_can_be_left_out(tmp_path: Path) -> None:
    assert main([*SMALL, "--no-itl", "--output", "r.csv"]) == 0
    with (tmp_path / "r.csv").open() as handle:
        assert {row["ITL"] for row in csv.DictReader(handle)} == {""}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--output", "taken/r.csv"], "--output taken/r.csv: cannot be written"),
        (["--output", "."], "--output .: is a folder"),
        (["--steps", "same.csv", "--output", "same.csv"], "is the file of --output too"),
        (["--dataset", "my.jsonl", "--output", "my.jsonl"], "is the file of --dataset too"),
        (["--block-size", "0"], "--block-size: 0 is not allowed"),
        (["--log-interval", "0"], "--log-interval: 0.0 is not allowed"),
        (["--dataset", "none.jsonl"], "none.jsonl"),
    ],
)
def test_bad_input_is_told_before_the_run(
    flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "taken").write_text("")
    (tmp_path / "my.jsonl").write_text('{"input_toks": 10, "output_toks": 2, "arrival_time_ns": 0}\n')
    assert main(flags) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert "[INFO]" not in shown.out
    assert (tmp_path / "my.jsonl").read_text().startswith("{")


@pytest.mark.parametrize(
    "command",
    [
        "--cluster-config lost.json --output new/dir/x.csv",
        "--dataset bad.jsonl --output new/x.csv",
        "--dtype fp16 --output new/x.csv",
        "--kv-cache-dtype int8 --output a/x.csv --summary b/x.json --timeline c/x.json --steps d/x.csv",
        "compare --kv-cache-dtype fp8 --json new/x.json",
        'compare --set "int8: --kv-cache-dtype int8" --json a/x.json --csv b/x.csv',
        "workload convert bad.jsonl --output new/x.jsonl",
        "workload synth --input-len nonsense --output new/x.jsonl",
        "bench validate lost --json new/x.json --plots plots",
        "bench calibrate lost --output new/x.yaml",
        "bench replay --dataset good.jsonl --url http://127.0.0.1:9 --output new/recording",
        "bench record-scheduler --dataset bad.jsonl --num-gpu-blocks 10 --output new/log.jsonl",
        "profile servesim/tiny-llama --hardware H100 --source roofline --tp 3 --output-root new/perf",
    ],
)
def test_input_that_is_refused_leaves_nothing_behind(command: str, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"input_toks": 0}\n')
    (tmp_path / "good.jsonl").write_text('{"input_toks": 10, "output_toks": 2, "arrival_time_ns": 0}\n')
    try:
        status = main(shlex.split(command))
    except SystemExit as ended:  # argparse
        status = ended.code
    assert status == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.jsonl", "good.jsonl"]


def test_parquet_without_pyarrow_is_told_before_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("servesim.results.csv.find_spec", lambda _: None)
    assert main([*SMALL, "--output", "r.parquet"]) == 2
    assert "pip install 'servesim[parquet]'" in capsys.readouterr().err


def test_an_interrupted_run_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "r.csv").write_text("old")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("servesim.results.heartbeat.Heartbeat.advance", interrupt)
    assert main([*DOCUMENTED, "--output", "r.csv"]) == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert [path.name for path in tmp_path.iterdir()] == ["r.csv"]
    assert (tmp_path / "r.csv").read_text() == "old"


def test_a_rejected_request_is_reported_and_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [
        '{"input_toks": 10, "output_toks": 2, "arrival_time_ns": 0}',
        '{"input_toks": 200000, "output_toks": 2, "arrival_time_ns": 0}',
    ]
    (tmp_path / "w.jsonl").write_text("\n".join(lines))
    assert main(["--dataset", "w.jsonl", "--output", "r.csv"]) == 0
    assert "1 completed, 1 rejected" in capsys.readouterr().out
    assert json.loads((tmp_path / "r.csv.rejected.jsonl").read_text())["request id"] == 1


def test_a_reader_that_stops_reading_does_not_stop_the_run(tmp_path: Path) -> None:
    command = f"{sys.executable} -m serving --num-reqs 20 --log-interval 0.01 --output r.csv | head -n 1"
    root = Path(__file__).resolve().parents[2]
    ended = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command],
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": str(root)},
    )
    assert (ended.stderr, ended.returncode) == ("", 0)
    assert len((tmp_path / "r.csv").read_text().splitlines()) == 21
