"""Whole runs with speculative decoding: what comes out, the same every time, and what is refused."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

import servesim
from servesim.errors import InputError
from servesim.explore.kernels import speculation_text
from servesim.specs.options import RuntimeOptions
from tests.engine.toy_world import DENSE, toy_cluster, toy_instance, toy_world

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from servesim.results.result import Result

DRAFTS = {"method": "ngram", "num_speculative_tokens": 3, "synthetic_acceptance_rates": [0.8, 0.5, 0.2]}


@pytest.fixture
def world(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "cluster.json").write_text(json.dumps(toy_cluster([toy_instance(DENSE)])))
    rows = [
        {"input_toks": 40 + i, "output_toks": 30 + i, "arrival_time_ns": i * 3_000_000} for i in range(40)
    ]
    (tmp_path / "work.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with toy_world(tmp_path):
        yield tmp_path


def run(**options: Any) -> Result:
    return servesim.simulate("cluster.json", "work.jsonl", **options)


@pytest.mark.usefixtures("world")
def test_every_answer_is_whole_and_shares_come_out() -> None:
    result = run(speculative_config=DRAFTS)
    assert result.requests["output"].tolist() == [30 + i for i in range(40)]
    summary = result.summary
    assert summary["spec_decode_per_position_acceptance_rates"] == pytest.approx([0.8, 0.5, 0.2], abs=0.06)
    assert summary["spec_decode_acceptance_length"] == pytest.approx(2.5, abs=0.1)
    assert summary["spec_decode_draft_tokens"] <= 3 * summary["spec_decode_num_drafts"]
    accepted = summary["spec_decode_accepted_tokens"]
    assert accepted == sum(
        sum(log.speculation.accepted_tokens) for log in result.instances if log.speculation
    )
    tokens = result.steps["decode_tokens"].sum()
    assert tokens >= summary["spec_decode_draft_tokens"]


@pytest.mark.usefixtures("world")
def test_runs_are_the_same_whatever_else_they_do() -> None:
    first, second = run(speculative_config=DRAFTS), run(speculative_config=DRAFTS)
    assert first.requests.tobytes() == second.requests.tobytes()
    other = run(speculative_config=DRAFTS, seed=7)
    assert first.requests.tobytes() != other.requests.tobytes()
    assert not any("--seed" in note for note in other.log.notes)
    # what is accepted of a request does not depend on how it is scheduled
    synchronous = run(speculative_config=DRAFTS, async_scheduling=False)
    for result in (first, synchronous):
        log = result.instances[0].speculation
        assert log is not None
        assert len(log.draft_tokens) == len(result.instances[0].steps)


@pytest.mark.usefixtures("world")
def test_nothing_accepted_is_slower_than_no_drafts() -> None:
    never = run(speculative_config={**DRAFTS, "synthetic_acceptance_rates": [0.0, 0.0, 0.0]})
    always = run(speculative_config={**DRAFTS, "synthetic_acceptance_rates": [1.0, 1.0, 1.0]})
    plain = run()
    assert always.summary["duration"] < plain.summary["duration"] <= never.summary["duration"]
    assert never.summary["spec_decode_acceptance_length"] == 1.0
    assert not any(name.startswith("spec_decode") for name in plain.summary)


def test_files_have_the_drafts_of_every_step(world: Path) -> None:
    result = run(speculative_config=DRAFTS)
    result.save_steps(world / "steps.csv")
    header, *rows = (world / "steps.csv").read_text().splitlines()
    assert header.endswith("preempted,num_draft_tokens,num_accepted_tokens")
    columns = [row.split(",")[-2:] for row in rows]
    assert sum(int(accepted) for _, accepted in columns) == result.summary["spec_decode_accepted_tokens"]
    run().save_steps(world / "plain.csv")
    assert (world / "plain.csv").read_text().splitlines()[0].endswith("preempted")


def test_little_memory_loses_nothing(world: Path) -> None:
    tight = toy_cluster([toy_instance(DENSE, num_gpu_blocks=14)])
    (world / "cluster.json").write_text(json.dumps(tight))
    result = run(speculative_config=DRAFTS)
    assert result.requests["output"].tolist() == [30 + i for i in range(40)]
    assert result.summary["preemptions"] > 0


@pytest.mark.usefixtures("world")
def test_drafts_that_cannot_go_with_the_rest_are_refused() -> None:
    with pytest.raises(InputError, match="not simulated with --long-prefill-token-threshold 3"):
        run(speculative_config=DRAFTS, long_prefill_token_threshold=3)
    assert RuntimeOptions(speculative_config=DRAFTS).speculative_config is not None


@pytest.mark.usefixtures("world")
def test_old_versions_schedule_synchronously_with_n_grams() -> None:
    result = run(speculative_config=DRAFTS, vllm_version="0.28")
    assert not result.instances[0].options.async_scheduling
    assert any("async_scheduling is off" in note for note in result.log.notes)
    assert run(speculative_config=DRAFTS).instances[0].options.async_scheduling


@pytest.mark.usefixtures("world")
def test_compare_says_where_drafts_stop_paying() -> None:
    rates = {**DRAFTS, "synthetic_acceptance_rates": [0.3, 0.1, 0.0]}
    plain, good, bad = run(), run(speculative_config=DRAFTS), run(speculative_config=rates)
    told = speculation_text(plain, good, ("plain", "drafts"))
    assert "speculative decoding (drafts), steps that only decode" in told
    assert "pays" in told or "paying" in told
    assert speculation_text(good, plain, ("drafts", "plain")) == told
    assert speculation_text(plain, plain, ("a", "b")) == ""
    assert speculation_text(plain, bad, ("plain", "drafts")) != told


@pytest.mark.usefixtures("world")
def test_mtp_needs_layers_for_it() -> None:
    config = '{"method": "mtp", "num_speculative_tokens": 1}'
    with pytest.raises(InputError, match=r"method mtp: .* has no MTP layers"):
        run(speculative_config=config)
