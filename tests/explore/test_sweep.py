"""Sweeps: what they go through, and rows that are the same however, and however often, they are made."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import servesim
from servesim import InputError, RunError
from servesim.__main__ import main
from servesim.cli.sweep import parse_grid
from servesim.explore.executors import run_parts
from servesim.explore.journal import Journal
from servesim.explore.space import Constraint, read_space, space_of
from servesim.specs.options import RuntimeOptions
from tests.engine.toy_world import toy_cluster, toy_instance, toy_world
from tests.explore.holding import ROWS, holding, let_go, wait_for_rows

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[2]
CLUSTER, WORKLOAD = "cluster.json", "workload.jsonl"
COMMON = ["--cluster-config", CLUSTER, "--dataset", WORKLOAD]


@pytest.fixture(autouse=True)
def toys(tmp_path: Path) -> Iterator[None]:
    with toy_world(tmp_path):
        lines = [{"input_toks": 40 + i, "output_toks": 9, "arrival_time_ns": i * 10**6} for i in range(30)]
        Path(WORKLOAD).write_text("\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")
        Path(CLUSTER).write_text(json.dumps(toy_cluster([toy_instance()])), encoding="utf-8")
        yield


def sweep(space: Any, **more: Any) -> servesim.Sweep:
    return servesim.sweep(space, cluster=CLUSTER, workload=WORKLOAD, **more)


def configurations(described: dict[str, Any]) -> list[dict[str, Any]]:
    return space_of(described).configurations()[0]


def test_a_row_has_the_figures_of_its_run() -> None:
    found = sweep({"grid": {"max_num_seqs": [2, 8]}}, slo="ttft:60")
    for row, seats in zip(found.rows, (2, 8), strict=True):
        summary = servesim.simulate(CLUSTER, WORKLOAD, max_num_seqs=seats).summary
        assert row["max_num_seqs"] == seats
        assert row["p99_ttft_ms"] == summary["p99_ttft_ms"]
        assert row["slo_met"] == (summary["p99_ttft_ms"] <= 60)
        assert row["run_id"] == summary["run_id"]
    assert found.best is found.rows[1]


def test_a_grid_is_every_combination_and_a_list_is_as_written() -> None:
    grid = {"tp": [1, 2], "kv_cache_dtype": {"choices": ["auto", "fp8"]}}
    assert configurations({"grid": grid}) == [
        {"tp": 1, "kv_cache_dtype": "auto"},
        {"tp": 1, "kv_cache_dtype": "fp8"},
        {"tp": 2, "kv_cache_dtype": "auto"},
        {"tp": 2, "kv_cache_dtype": "fp8"},
    ]
    listed = [{"max-num-seqs": 4}, {"tensor_parallel_size": 2, "enforce_eager": True}]
    assert configurations({"list": listed}) == [{"max_num_seqs": 4}, {"tp": 2, "cudagraph": False}]
    assert len(configurations({"grid": {"tp": [1, 2]}, "list": [{"pp": 1}, {"pp": 2}, {"pp": 1}]})) == 4


@pytest.mark.parametrize(
    ("given", "values"),
    [
        ({"min": 1, "max": 4}, [1, 2, 3, 4]),
        ({"min": 0.1, "max": 0.5, "step": 0.2}, [0.1, 0.3, 0.5]),
        ({"min": 16, "max": 130, "step": 2, "scale": "log"}, [16, 32, 64, 128]),
        ({"min": 1.0, "max": 100, "step": 10, "scale": "log"}, [1.0, 10.0, 100.0]),
    ],
)
def test_a_range_is_its_values(given: dict[str, Any], values: list[float]) -> None:
    assert space_of({"grid": {"request_rate": {"range": given}}}).grid["request_rate"] == values


def test_constraints_rule_configurations_out() -> None:
    space = space_of(
        {
            "grid": {"tp": [1, 2, 4], "max_num_seqs": [8, 16]},
            "constraints": ["tp * max_num_seqs <= 32", "not (tp == 1 and max_num_seqs == 16)"],
        }
    )
    kept, ruled_out = space.configurations()
    assert [(each["tp"], each["max_num_seqs"]) for each in kept] == [(1, 8), (2, 8), (2, 16), (4, 8)]
    assert ruled_out == 2


@pytest.mark.parametrize(
    "given",
    [
        {"max_num_seqs": 8},
        {"vllm_serve": "vllm serve org/toy --max-num-seqs 8"},
        {"options": RuntimeOptions(max_num_seqs=8)},
    ],
)
def test_constraints_hold_for_what_is_given_beside(given: dict[str, Any]) -> None:
    """The default of 128 is not what runs."""
    space = {"grid": {"block_size": [16, 32]}, "constraints": ["max_num_seqs * block_size <= 128"]}
    found = sweep(space, **given)
    assert [row["block_size"] for row in found.rows] == [16]
    assert found.ruled_out == 1


def test_constraints_ask_for_what_a_preset_decides() -> None:
    space = {"grid": {"block_size": [16]}, "constraints": ["max_num_seqs * block_size <= 128"]}
    with pytest.raises(InputError, match="max_num_seqs is not set; give it a value"):
        sweep(space, preset="vllm-serve")


def test_a_name_is_listed_or_in_the_grid() -> None:
    with pytest.raises(InputError, match=r"list\[1\]: max_num_seqs: stands in the grid, too"):
        sweep({"grid": {"max_num_seqs": [2]}, "list": [{"tp": 1}, {"max_num_seqs": 4}]})


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("tp in (1, 2)", True),
        ("kv_cache_dtype not in ['fp8']", True),
        ("1 < tp < 3", True),
        ("tp % 2 == 1 or -tp // 2 == 7", False),
        ("block_size / tp == 8", True),
    ],
)
def test_what_a_constraint_may_say(text: str, holds: bool) -> None:
    values = {"tp": 2, "kv_cache_dtype": "auto", "block_size": 16}
    assert Constraint(text, values).holds(values) is holds


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("__import__('os')", "__import__ is no option"),
        ("tp.real", "is not allowed"),
        ("tp ** 2", "is not allowed"),
        ("'a' * 9", "only numbers"),
        ("[t for t in (1, 2)]", "t is no option"),
        ("tp =", "is no expression"),
        ("pp > 1", "pp is not set"),
        ("(lambda: 1)()", "is not allowed"),
        ("max_num_seq > 1", "max_num_seq is no option of a run; did you mean"),
    ],
)
def test_what_a_constraint_may_not_say(text: str, message: str) -> None:
    values = {"tp": 2, "pp": None, "max_num_seqs": 8}
    with pytest.raises(InputError, match=message.replace("(", r"\(")):
        Constraint(text, values).holds(values)


@pytest.mark.parametrize(
    ("described", "message"),
    [
        ({}, "has neither grid nor list"),
        ({"grids": {}}, "grids: is no key of a sweep; did you mean 'grid'"),
        ({"grid": {"max_num_seq": [1]}}, "max_num_seq: is no option of a run"),
        ({"grid": {"tp": 3}}, "must be a list"),
        ({"grid": {"tp": []}}, "at least one value"),
        ({"grid": {"tp": {"range": {"min": 1}}}}, "must have numbers min, max and step"),
        ({"grid": {"tp": {"range": {"min": 1, "max": 9, "step": 0}}}}, "step above 0"),
        ({"grid": {"tp": {"range": {"min": 1, "max": 10**9}}}}, "too many"),
        ({"grid": {"output": ["a.csv"]}}, "output: has no effect in a sweep"),
        ({"list": [3]}, r"list\[0\]: must be an object"),
        ({"grid": {"tp": [1], "tensor_parallel_size": [2]}}, "is the same as tp"),
        ({"grid": {"tp": [1]}, "slo": "tfft:3"}, "is not allowed"),
    ],
)
def test_a_space_that_is_wrong_is_refused(described: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        space_of(described)


def test_vllm_serve_parameters_are_a_list(tmp_path: Path) -> None:
    entries = [{"max_num_seqs": 4, "_benchmark_name": "small"}, {"max-num-batched-tokens": 512}]
    for name, content in (("a.json", entries), ("b.json", {"small": entries[0], "large": entries[1]})):
        (tmp_path / name).write_text(json.dumps(content), encoding="utf-8")
        assert read_space(tmp_path / name).listed == [{"max_num_seqs": 4}, {"max_num_batched_tokens": 512}]


def test_a_grid_on_the_command_line() -> None:
    assert parse_grid("--tp 1,2 --kv-cache-dtype auto,fp8") == {
        "--tp": [1, 2],
        "--kv-cache-dtype": ["auto", "fp8"],
    }
    assert parse_grid("--enforce-eager true,false --request-rate inf,2.5") == {
        "--enforce-eager": [True, False],
        "--request-rate": [float("inf"), 2.5],
    }
    for wrong in ("", "--tp", "tp 1,2", "--tp 1 2"):
        with pytest.raises(InputError, match="must be a flag and its values"):
            parse_grid(wrong)


def test_keys_of_the_cluster_config_are_set() -> None:
    found = sweep({"grid": {"cluster.nodes.*.instances.0.num_gpu_blocks": [101, 201]}})
    assert [row["kv_cache_tokens"] for row in found.rows] == [101 * 16, 201 * 16]
    (row,) = sweep({"list": [{"cluster.nodes.7.num_instances": 1}]}).rows
    assert row["reason"] == "cluster.nodes.7.num_instances: 7: must be a number below 1, or * for all"
    (row,) = sweep({"list": [{"cluster.nodes.0.instances.0.npu_mem.mem_sise": 3}]}).rows
    assert "mem_sise" in row["reason"]


def test_what_fails_is_a_row_with_its_reason() -> None:
    found = sweep({"grid": {"num_gpu_blocks": [None], "tp": [1, 2, 16], "block_size": [16, -1]}})
    assert [row["status"] for row in found.rows] == ["ok", "failed", "ok", "failed", "failed", "failed"]
    assert "block_size" in found.rows[1]["reason"]
    assert found.rows[0]["reason"] == ""
    assert "mean_ttft_ms" not in found.rows[1]


def test_a_row_that_rejects_everything_says_why() -> None:
    (row,) = sweep({"list": [{"max_model_len": 16}]}).rows
    assert row["status"] == "rejected"
    assert row["reason"]


def test_rows_are_the_same_on_two_processes() -> None:
    pytest.importorskip("joblib")
    space = {"grid": {"max_num_seqs": [2, 4, 8], "kv_cache_dtype": ["auto", "fp8", "int8"]}}
    one, two = sweep(space), sweep(space, jobs=2)
    assert one.csv_text() == two.csv_text()
    assert [row["status"] for row in one.rows].count("failed") == 3  # no int8 tables


def test_a_row_has_no_note_of_another() -> None:
    """8 sequences are more than were profiled, 2 are not; that a bundle is old is told of each."""
    pytest.importorskip("joblib")
    for path in Path("profiler/perf").rglob("meta.yaml"):
        limits = "engine_effective: {max_num_seqs: 4, max_num_batched_tokens: 4096}\n"
        path.write_text(path.read_text(encoding="utf-8") + limits, encoding="utf-8")
    space = {"grid": {"max_num_seqs": [8, 2]}}
    one, two = sweep(space), sweep(space, jobs=2)
    assert one.csv_text() == two.csv_text()
    assert ["max_num_seqs 8 (profiled up to 4)" in row["notes"] for row in one.rows] == [True, False]
    assert ["this bundle is old" in row["notes"] for row in one.rows] == [True, True]


def test_that_a_bundle_was_made_is_no_note_of_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Only the process that comes first makes it."""
    monkeypatch.setenv("SERVESIM_AUTO_PROFILE", "1")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    common = {"workload": WORKLOAD, "model": "org/toy", "hardware": "MI300X"}
    rows = [servesim.sweep({"grid": {"max_num_seqs": [2]}}, **common).rows for _ in range(2)]
    assert rows[0] == rows[1]
    assert rows[0][0]["status"] == "ok", rows[0][0]["reason"]
    (told,) = [record.getMessage() for record in caplog.records]
    assert told.startswith("made the profile bundle MI300X/org/toy/bf16 tp1 from peak rates")


def test_what_reading_a_workload_tells_is_in_every_row() -> None:
    lines = [
        "TIMESTAMP,ContextTokens,GeneratedTokens,NumImages",
        *(f"2024-05-10 00:00:0{i},40,5,1" for i in range(6)),
    ]
    Path("images.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    found = servesim.sweep({"grid": {"max_num_seqs": [2, 4, 8]}}, cluster=CLUSTER, workload="images.csv")
    assert ["NumImages is not used" in row["notes"] for row in found.rows] == [True] * 3


def test_rows_in_the_journal_are_not_made_again() -> None:
    space = {"grid": {"max_num_seqs": [2, 4, 8]}}
    first = sweep(space, journal="j.jsonl")
    lines = Path("j.jsonl").read_bytes().splitlines()
    assert len(lines) == 3
    told: list[tuple[int, int, int]] = []
    more = {"grid": {"max_num_seqs": [2, 4, 8, 16]}}
    again = sweep(more, journal="j.jsonl", progress=lambda *seen: told.append(seen))
    assert again.rows[:3] == first.rows
    assert told == [(4, 4, 0)]
    with Path(WORKLOAD).open("a", encoding="utf-8") as handle:
        handle.write('{"input_toks": 5, "output_toks": 2, "arrival_time_ns": 0}\n')
    sweep(space, journal="j.jsonl")  # another workload: nothing of it is there
    assert len(Path("j.jsonl").read_bytes().splitlines()) == 7


def test_failed_rows_are_tried_again() -> None:
    space = {"list": [{"hardware": "Nosuch"}]}
    for expected in (1, 2):
        assert sweep(space, journal="j.jsonl").rows[0]["status"] == "failed"
        assert len(Path("j.jsonl").read_bytes().splitlines()) == expected


def test_a_line_that_was_cut_off_is_passed_over() -> None:
    space = {"grid": {"max_num_seqs": [2, 4]}}
    whole = sweep(space, journal="j.jsonl")
    written = Path("j.jsonl").read_bytes()
    Path("j.jsonl").write_bytes(written[:-20])
    assert sweep(space, journal="j.jsonl").rows == whole.rows
    assert len(Journal("j.jsonl").rows()) == 2


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="process groups")
def test_killing_everything_loses_no_finished_row() -> None:
    pytest.importorskip("joblib")
    journal = Journal("killed.csv.journal.jsonl")
    Path(CLUSTER).write_text(json.dumps(toy_cluster([toy_instance(), toy_instance()])), encoding="utf-8")
    words = ["sweep", *COMMON, *holding(journal), "--grid", "--max-num-seqs 1,2,3,4,5,6,7,8,9,10,11,12"]
    running = subprocess.Popen(
        [sys.executable, "-m", "servesim", *words, "--jobs", "2", "--output", "killed.csv"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        start_new_session=True,
    )
    try:
        wait_for_rows(journal, running)
    finally:
        os.killpg(running.pid, signal.SIGKILL)
        running.wait()
    let_go()
    finished = journal.rows()
    assert ROWS <= len(finished) < 12
    assert not Path("killed.csv").exists()
    assert main([*words, "--output", "killed.csv"]) == 0
    assert main([*words, "--output", "whole.csv"]) == 0
    assert Path("killed.csv").read_bytes() == Path("whole.csv").read_bytes()
    lines = journal.path.read_bytes().splitlines()
    assert len(lines) - 12 in (0, 1)  # none twice; perhaps one that was cut off
    assert {key: journal.rows()[key] for key in finished} == finished


def test_workers_of_an_earlier_sweep_come_along(tmp_path: Path) -> None:
    """Joblib keeps its processes; they are to read the files that are here now."""
    pytest.importorskip("joblib")
    space = {"grid": {"max_num_seqs": [2, 4]}}
    first = sweep(space, jobs=2)
    with toy_world(tmp_path / "other"):
        Path(WORKLOAD).write_text('{"input_toks": 9, "output_toks": 3, "arrival_time_ns": 0}\n')
        Path(CLUSTER).write_text(json.dumps(toy_cluster([toy_instance(num_gpu_blocks=101)])))
        one, two = sweep(space), sweep(space, jobs=2)
    assert [row["completed"] for row in first.rows] == [30, 30]
    assert [row["completed"] for row in one.rows] == [1, 1]
    assert one.csv_text() == two.csv_text()


def where(variable: str) -> tuple[str, str | None]:
    """The folder of the process that does it, and what it has in a variable."""
    return str(Path.cwd()), os.environ.get(variable)


def test_workers_have_the_folder_and_the_variables_of_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("joblib")
    (tmp_path / "other").mkdir()
    for folder, value in ((tmp_path, "1"), (tmp_path / "other", "2"), (tmp_path, None)):
        monkeypatch.chdir(folder)
        monkeypatch.delenv("SERVESIM_X", raising=False)
        if value is not None:
            monkeypatch.setenv("SERVESIM_X", value)
        assert list(run_parts(where, lambda: ["SERVESIM_X"] * 3, 2)) == [(str(folder), value)] * 3


def once_killed(part: str) -> str:
    """Kills its process the first time it is given ``b``."""
    mark = Path("killed")
    if part == "b" and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    Path(f"done-{part}").touch()
    return part


def always_killed(_: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_is_killed_is_replaced() -> None:
    pytest.importorskip("joblib")
    done: list[str] = []
    for part in run_parts(once_killed, lambda: [p for p in "abcdef" if p not in done], 2):
        done.append(part)
    assert sorted(done) == list("abcdef")


def test_workers_that_keep_dying_end_the_sweep() -> None:
    pytest.importorskip("joblib")
    with pytest.raises(RunError, match="worker processes died 3 times in a row"):
        list(run_parts(always_killed, lambda: ["a"], 2))


def test_the_command_writes_prints_and_counts(capsys: pytest.CaptureFixture[str]) -> None:
    Path("s.yaml").write_text(
        "grid:\n  max_num_seqs: [2, 4]\nconstraints: ['max_num_seqs < 4']\nslo: ttft:1e9\n", encoding="utf-8"
    )
    words = ["sweep", "s.yaml", *COMMON, "--grid", "--kv-cache-dtype auto,fp8", "--output", "out/s.csv"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "2 configurations, 0 without figures, 2 ruled out by constraints" in printed
    assert "best per GPU" in printed
    header, *lines = Path("out/s.csv").read_text(encoding="utf-8").splitlines()
    assert header.startswith("key,status,reason,max_num_seqs,kv_cache_dtype,duration,")
    assert len(lines) == 2
    assert main(["sweep", *COMMON, "--grid", "--block-size -1,-2", "--output", "bad.csv"]) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "nothing to go through"),
        (["--grid", "--tp 1,2", "--grid", "--tp 4"], "--tp is there twice"),
        (["--grid", "--tp 1", "--jobs", "0"], "--jobs: 0 is not allowed"),
        (["--grid", "--tp 1", "--output", "a.txt"], "--output a.txt: .txt is not a format"),
        (["--grid", "--tp 1,2", "--constraint", "tp > 2"], "the constraints rule out all 2"),
        (["nosuch.yaml"], "nosuch.yaml"),
    ],
)
def test_wrong_words_are_refused(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", *COMMON, *words]) == 2
    assert message in capsys.readouterr().err


def test_rows_as_parquet_and_as_a_frame() -> None:
    pytest.importorskip("pyarrow")
    pandas = pytest.importorskip("pandas")
    found = sweep({"list": [{"max_model_len": "auto"}, {"max_model_len": 512}, {"block_size": -1}]})
    found.save("s.parquet")
    frame = pandas.read_parquet("s.parquet")
    assert list(frame.columns) == found.columns
    assert frame["max_model_len"].tolist()[:2] == ["auto", "512"]
    assert found.to_pandas()["status"].tolist() == ["ok", "ok", "failed"]


def test_a_frame_of_configurations_is_a_list() -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame([{"max_num_seqs": 4, "block_size": None}, {"max_num_seqs": 8, "block_size": 32}])
    listed = sweep({"list": [{"max_num_seqs": 4}, {"max_num_seqs": 8, "block_size": 32}]})
    assert sweep(frame).rows == listed.rows


def test_options_for_all_and_options_of_one() -> None:
    found = sweep(
        {"options": {"max_num_seqs": 2, "block_size": 32}, "list": [{}, {"max_num_seqs": 4}]}, seed=1
    )
    options = [json.loads(row["options"]) for row in found.rows]
    assert [each["max_num_seqs"] for each in options] == [2, 4]
    assert [each["block_size"] for each in options] == [32, 32]
    with pytest.raises(InputError, match="summary: sweep prints nothing"):
        sweep({"list": [{}]}, options=RuntimeOptions(summary="x.json"))


@pytest.mark.parametrize(
    ("path", "before", "after"),
    [
        ("configs/hardware/Toy.yaml", "prefill_step_overhead_us: 10", "prefill_step_overhead_us: 9000"),
        ("configs/model/org/toy.json", '"max_position_embeddings": 2048', '"max_position_embeddings": 45'),
        ("policy.py", "instances[0]", "instances[-1]"),
        ("profiler/perf/Toy/org/toy/bf16/tp1/dense.csv", "\n", "\n\n"),
        (CLUSTER, '"link_latency": 1000', '"link_latency": 9'),
        (WORKLOAD, '"output_toks": 9', '"output_toks": 4'),
    ],
)
def test_what_a_run_reads_is_part_of_its_row(path: str, before: str, after: str) -> None:
    """An edited file gives the new answer, although its rows are in the journal."""
    hardware = Path("configs/hardware/Toy.yaml")
    hardware.parent.mkdir(parents=True, exist_ok=True)
    hardware.write_text("engine:\n  prefill_step_overhead_us: 10\n")
    Path("policy.py").write_text("def choose(request, instances):\n    return instances[0]\n")
    Path(CLUSTER).write_text(json.dumps(toy_cluster([toy_instance(), toy_instance()])))
    space = {"grid": {"max_num_seqs": [8]}}
    options = RuntimeOptions(request_routing_policy="policy:choose")

    def keys() -> list[str]:
        return [row["key"] for row in sweep(space, options=options, journal="rows.jsonl").rows]

    first = keys()
    assert keys() == first
    text = Path(path).read_text()
    assert before in text
    Path(path).write_text(text.replace(before, after))
    assert keys() != first
    assert len(Path("rows.jsonl").read_text().splitlines()) == 2


def key_of(**options: Any) -> str:
    return sweep({"grid": {"max_num_seqs": [8]}}, **options).rows[0]["key"]


def test_newer_measurements_make_rows_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bundle that is made on demand is made from them."""
    first = key_of()
    monkeypatch.setattr("servesim.profiler.on_demand.installed_version", lambda: "99.0")
    assert key_of() != first


@pytest.mark.parametrize("path", ["configs/model/org/drafter.json", "profiler/perf/Toy/org/drafter/bf16"])
def test_a_drafter_is_part_of_its_row(path: str) -> None:
    """Its config and its kernel times; named by the option, or in the middle of a line of vLLM's."""
    shutil.copy("configs/model/org/toy.json", "configs/model/org/drafter.json")
    shutil.copytree("profiler/perf/Toy/org/toy", "profiler/perf/Toy/org/drafter")
    drafts = json.dumps({"method": "draft_model", "model": "org/drafter", "num_speculative_tokens": 2})
    lines = (
        {"speculative_config": drafts},
        {"vllm_serve": f"vllm serve org/toy --speculative-config '{drafts}'"},
    )
    first = [key_of(**options) for options in lines]
    assert [key_of(**options) for options in lines] == first
    changed = Path(path) if path.endswith("json") else Path(path, "tp1", "dense.csv")
    changed.write_text(changed.read_text().replace('"vocab_size": 64', '"vocab_size": 65') + "\n")
    assert not set(first) & {key_of(**options) for options in lines}
