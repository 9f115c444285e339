"""Synthetic workloads: what was asked for is what comes out, and the same seed gives the same bytes."""

from __future__ import annotations

import dataclasses
import gzip
import json
import tracemalloc
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from servesim.__main__ import main
from servesim.errors import InputError
from servesim.workload.description import describe, reusable_prompt_tokens
from servesim.workload.formats import load_workload
from servesim.workload.generators import SynthSpec, json_lines, parse_distribution, synthesise
from servesim.workload.hashes import block_ids

if TYPE_CHECKING:
    from pathlib import Path


def synth(**changes: object) -> SynthSpec:
    plain: dict[str, object] = {"num_reqs": 20, "rate": 5.0, "input_len": "fixed:40", "output_len": "fixed:8"}
    return SynthSpec(**(plain | changes))  # type: ignore[arg-type]


def content(spec: SynthSpec) -> bytes:
    return b"".join(json_lines(synthesise(spec)))


def test_the_same_seed_makes_the_same_bytes() -> None:
    for sessions in (False, True):
        spec = synth(sessions=sessions, prefix_groups=3, input_len="lognormal:60:40", arrival="gamma")
        assert content(spec) == content(spec)
        assert content(spec) != content(dataclasses.replace(spec, seed=43))


def test_other_arrivals_leave_the_lengths_as_they_were() -> None:
    one, other = (
        synthesise(synth(input_len="uniform:1:99")),
        synthesise(synth(input_len="uniform:1:99", arrival="burst")),
    )
    assert [r.input_tokens for r in one] == [r.input_tokens for r in other]
    assert [r.arrival_ns for r in one] != [r.arrival_ns for r in other]


def test_a_prefix_comes_before_the_prompt_and_is_shared() -> None:
    workload = synthesise(synth(prefix_groups=1, prefix_len="fixed:32"))
    assert {request.input_tokens for request in workload} == {72}
    assert [len(ids) for ids in block_ids(workload, 16).ids] == [2] * 20
    assert reusable_prompt_tokens(workload, 16) == 19 * 32  # the first of the group has to compute it


def test_every_group_has_its_own_prefix() -> None:
    found = block_ids(synthesise(synth(num_reqs=60, prefix_groups=3, prefix_len="fixed:32")), 16)
    assert {len(ids) for ids in found.ids} == {2}
    assert found.num_ids == 3 * 2


def test_a_share_of_the_requests_has_a_prefix() -> None:
    workload = synthesise(synth(num_reqs=2000, prefix_groups=2, prefix_len="fixed:10", prefix_share=0.25))
    with_prefix = sum(request.input_tokens == 50 for request in workload)
    assert with_prefix + sum(request.input_tokens == 40 for request in workload) == 2000
    assert 400 < with_prefix < 600


def test_a_turn_repeats_all_that_was_said_before() -> None:
    workload = synthesise(
        synth(sessions=True, turns="fixed:3", tool_time="fixed:1.5", prefix_groups=1, num_reqs=4)
    )
    assert len(workload) == 12
    for first in range(0, 12, 3):
        assert [workload.requests[first + turn].input_tokens for turn in range(3)] == [296, 344, 392]
        for turn in (1, 2):
            before, request = workload.requests[first + turn - 1], workload.requests[first + turn]
            assert before.input_ids is not None
            assert before.output_ids is not None
            assert request.input_ids is not None
            said = np.concatenate((before.input_ids, before.output_ids))
            assert (request.input_ids[: len(said)] == said).all()
            assert (request.predecessor, request.tool_ns) == (before.index, 1_500_000_000)


def test_sessions_need_no_ids() -> None:
    workload = synthesise(synth(sessions=True, turns="fixed:2", ids=False, num_reqs=1))
    assert [request.input_tokens for request in workload] == [40, 88]
    assert [request.input_ids for request in workload] == [None, None]


def test_token_ids_stay_below_the_vocabulary_size() -> None:
    ids = np.concatenate(
        [
            request.input_ids
            for request in synthesise(synth(vocab_size=7, num_reqs=50))
            if request.input_ids is not None
        ]
    )
    assert set(ids.tolist()) == set(range(7))


@pytest.mark.parametrize(
    ("words", "mean", "std", "low", "high"),
    [
        ("fixed:512", 512, 0, 512, 512),
        ("512", 512, 0, 512, 512),
        ("uniform:10:30", 20, 6.06, 10, 30),  # 21 integers: variance (21² - 1) / 12
        ("lognormal:600:450", 600, 450, 1, 20_000),
        ("lognormal:600:0", 600, 0, 600, 600),
        ("lognormal:600:450:500:700", None, None, 500, 700),
    ],
)
def test_lengths_have_the_mean_and_deviation_of_their_words(
    words: str, mean: float | None, std: float | None, low: int, high: int
) -> None:
    drawn = parse_distribution(words, "--input-len").draw_whole(100_000, np.random.default_rng(0))
    assert drawn.min() >= low
    assert drawn.max() <= high
    if mean is not None:
        assert drawn.mean() == pytest.approx(mean, rel=0.02)
        assert drawn.std() == pytest.approx(std, rel=0.05)


@pytest.mark.parametrize(
    "words",
    [
        "0",
        "-5",
        "1.5",
        "x",
        "fixed",
        "fixed:",
        "fixed:1:2",
        "uniform:5",
        "uniform:9:5",
        "uniform:0:5",
        "uniform:1.5:3",
        "lognormal:5",
        "lognormal:0:1",
        "lognormal:5:-1",
        "lognormal:5:1:2",
        "lognormal:5:1:9:2",
        "lognormal:5:1:0:9",
        "normal:5:1",
        "fixed:nan",
        "fixed:inf",
        "fixed:1e12",
    ],
)
def test_a_distribution_that_cannot_be_is_refused(words: str) -> None:
    with pytest.raises(InputError, match=r"^--input-len: "):
        parse_distribution(words, "--input-len")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"num_reqs": 0}, "--num-reqs: 0"),
        ({"rate": 0.0}, "request rate: 0.0"),
        ({"arrival": "weekly"}, "--arrival: 'weekly'"),
        ({"vocab_size": 0}, "--vocab-size: 0"),
        ({"burst_size": 0}, "--burst-size: 0"),
        ({"arrival": "gamma", "cv": -1.0}, "cv: -1.0"),
        ({"prefix_groups": -1}, "--prefix-groups: -1"),
        ({"prefix_groups": 2, "ids": False}, "--prefix-groups: shared prefixes need token ids"),
        ({"prefix_share": 1.5}, "--prefix-share: 1.5"),
        ({"seed": -1}, "--seed: -1"),
        ({"sessions": True, "turns": "fixed:0"}, "--turns: "),
        ({"sessions": True, "tool_time": "fixed:-1"}, "--tool-time: "),
    ],
)
def test_an_impossible_workload_is_refused(changes: dict[str, object], expected: str) -> None:
    with pytest.raises(InputError, match=f"^{expected}"):
        synthesise(synth(**changes))


def test_the_command_writes_a_file_that_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain, packed = tmp_path / "new" / "w.jsonl", tmp_path / "w.jsonl.gz"
    for path in (plain, packed):
        assert (
            main(["workload", "synth", "--num-reqs", "7", "--sessions", "--seed", "5", "--output", str(path)])
            == 0
        )
    assert gzip.decompress(packed.read_bytes()) == plain.read_bytes()
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["w.jsonl.gz"]
    assert len({request.session_id for request in load_workload(packed)}) == 7
    assert "w.jsonl" in capsys.readouterr().out


def test_the_command_refuses_a_name_it_cannot_write(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["workload", "synth", "--output", str(tmp_path / "w.csv")]) == 2
    assert "must end in .jsonl or .jsonl.gz" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_describe_counts_what_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "w.jsonl"
    ids = list(range(33))
    turn = {"input_toks": 40, "output_toks": 2}
    entries = [
        {"input_toks": 33, "output_toks": 10, "arrival_time_ns": 0, "input_tok_ids": ids},
        {"input_toks": 33, "output_toks": 30, "arrival_time_ns": 4_000_000_000, "input_tok_ids": ids},
        {"arrival_time_ns": 2_000_000_000, "sub_requests": [turn, turn]},
    ]
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    assert main(["workload", "describe", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["requests"], found["sessions"], found["entries"], found["with_token_ids"]) == (4, 1, 3, 2)
    assert found["input_tokens"] == {
        "total": 146,
        "mean": 36.5,
        "min": 33,
        "p50": 33,
        "p90": 40,
        "p99": 40,
        "max": 40,
    }
    assert (found["first_arrival_s"], found["last_arrival_s"], found["rate_per_s"]) == (0.0, 4.0, 0.5)
    assert found["reusable_prompt_tokens"] == 32
    assert main(["workload", "describe", str(path)]) == 0
    text = capsys.readouterr().out
    assert "requests          4, of which 2 with token ids" in text
    assert "32 prompt tokens (21.9 %)" in text


def test_at_least_one_token_of_a_prompt_is_computed() -> None:
    workload = synthesise(
        synth(num_reqs=2, prefix_groups=1, prefix_len="fixed:32", input_len="fixed:16", vocab_size=1)
    )
    assert (
        describe(workload, 16)["reusable_prompt_tokens"] == 32
    )  # all 48 tokens are the same, the last block is not used


def test_convert_writes_any_format_as_json_lines(tmp_path: Path) -> None:
    trace, path = tmp_path / "trace.csv", tmp_path / "w.jsonl"
    trace.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.5,374,44\n2023-11-16 18:17:04.0,0,1\n"
    )
    assert main(["workload", "convert", str(trace), "--output", str(path)]) == 2
    assert not path.exists()
    assert main(["workload", "convert", str(trace), "--lenient", "--output", str(path)]) == 0
    assert path.read_text() == '{"input_toks":374,"output_toks":44,"arrival_time_ns":0}\n'


@pytest.mark.parametrize(
    "changes",
    [
        {"num_reqs": 10**9},
        {"num_reqs": 2, "input_len": "2000000000"},
        {"num_reqs": 2, "sessions": True, "turns": "2000000000"},
        {"num_reqs": 2, "sessions": True, "output_len": "2000000000"},
        {"num_reqs": 2, "prefix_groups": 2**31},
        {"num_reqs": 2, "prefix_groups": 1, "prefix_len": "2000000000"},
    ],
)
def test_a_workload_beyond_memory_is_refused_at_once(changes: dict[str, Any]) -> None:
    tracemalloc.start()
    with pytest.raises(InputError, match="this workload: the requests so far take more than 4,096 MiB"):
        synthesise(synth(**changes))
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_a_length_without_an_upper_bound_stays_a_length() -> None:
    lengths = parse_distribution("lognormal:2000000000:2000000000", "x").draw_whole(
        1000, np.random.default_rng(1)
    )
    assert (int(lengths.min()) > 0, int(lengths.max())) == (True, 2**31 - 1)
