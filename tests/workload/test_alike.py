"""Workloads made like a file: what is learnt from it, and how it scales."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from servesim.__main__ import main
from servesim.errors import InputError
from servesim.workload.alike import synthesise_like
from servesim.workload.description import describe
from servesim.workload.formats import load_workload
from servesim.workload.generators import SynthSpec, json_lines, synthesise

if TYPE_CHECKING:
    from pathlib import Path

    from servesim.workload.request import Workload


def gaps(workload: Workload) -> np.ndarray:
    heads = sorted(request.arrival_ns for request in workload if request.predecessor < 0)
    return np.diff(heads) / 1e9


def variation(workload: Workload) -> float:
    found = gaps(workload)
    return float(found.std() / found.mean())


def share(workload: Workload) -> float:
    figures = describe(workload)
    return float(figures["reusable_prompt_tokens"] / figures["input_tokens"]["total"])


def test_lengths_rate_and_prefixes_are_those_of_the_file() -> None:
    model = load_workload("workloads/example_trace.jsonl")
    made = synthesise_like(model, num_reqs=3000)
    old, new = describe(model), describe(made)
    for side in ("input_tokens", "output_tokens"):
        assert new[side]["mean"] == pytest.approx(old[side]["mean"], rel=0.05)
        assert new[side]["p90"] == pytest.approx(old[side]["p90"], rel=0.1)
    assert new["rate_per_s"] == pytest.approx(old["rate_per_s"], rel=1e-3)
    assert share(made) == pytest.approx(share(model), abs=0.05)


def test_prompt_and_output_stay_together() -> None:
    model = load_workload("workloads/example_trace.jsonl")
    pairs = {(request.input_tokens, request.output_tokens) for request in model}
    assert {(request.input_tokens, request.output_tokens) for request in synthesise_like(model)} <= pairs


@pytest.mark.parametrize(("process", "cv"), [("poisson", 1.0), ("gamma", 3.0), ("burst", 1.0)])
def test_bursts_stay_bursts(process: str, cv: float) -> None:
    spec = SynthSpec(num_reqs=4000, rate=10.0, arrival=process, cv=cv, ids=False, seed=3)
    model = synthesise(spec)
    made = synthesise_like(model, num_reqs=8000, rate=40.0)
    assert variation(made) == pytest.approx(variation(model), rel=0.1)
    assert 1 / gaps(made).mean() == pytest.approx(40.0, rel=1e-3)
    if process == "burst":  # ten at once: most gaps are 0, and they stand together
        assert np.mean(gaps(made) == 0) == pytest.approx(0.9, abs=0.01)


def test_sessions_keep_their_shape() -> None:
    model = load_workload("workloads/agentic_sessions.jsonl.gz")
    made = synthesise_like(model, num_reqs=150, seed=5)
    old, new = describe(model), describe(made)
    assert new["entries"] == new["sessions"] == 150
    assert new["requests"] / 150 == pytest.approx(old["requests"] / old["sessions"], rel=0.1)
    assert share(made) == pytest.approx(share(model), abs=0.03)
    pauses = {request.tool_ns for request in model}
    assert {request.tool_ns for request in made} <= pauses
    assert all(request.predecessor == (request.index - 1 if request.sub_request else -1) for request in made)


def test_what_only_one_entry_has_is_shared_by_none() -> None:
    model = synthesise(SynthSpec(num_reqs=5, rate=1.0, input_len="fixed:320", seed=1))
    made = synthesise_like(model, num_reqs=200)
    assert describe(made)["reusable_prompt_tokens"] == 0
    assert all(request.has_ids for request in made)


def test_duration_sets_the_number_of_entries() -> None:
    model = load_workload("workloads/short_chat.jsonl")
    made = synthesise_like(model, rate=5.0, duration_s=100.0)
    assert len(made) == 501
    assert max(request.arrival_ns for request in made) == pytest.approx(100e9, rel=0.01)


def test_the_same_seed_makes_the_same_file() -> None:
    model = load_workload("workloads/short_chat.jsonl")
    one, same, other = (list(json_lines(synthesise_like(model, seed=seed))) for seed in (1, 1, 2))
    assert one == same != other


def test_what_cannot_be_made_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = load_workload("workloads/short_chat.jsonl")
    with pytest.raises(InputError, match="--duration: says how many entries there are"):
        synthesise_like(model, num_reqs=3, duration_s=1.0)
    with pytest.raises(InputError, match="--num-reqs: 0 is not possible"):
        synthesise_like(model, num_reqs=0)
    for request in model:
        request.arrival_ns = 0
    with pytest.raises(InputError, match="--duration: needs a finite rate"):
        synthesise_like(model, duration_s=1.0)
    assert {request.arrival_ns for request in synthesise_like(model)} == {0}
    words = ["workload", "synth", "--output", str(tmp_path / "x.jsonl")]
    assert main([*words, "--duration", "5"]) == 2
    assert "has no effect without --like" in capsys.readouterr().err
    assert main([*words, "--like", "workloads/short_chat.jsonl", "--input-len", "5"]) == 2
    assert "--input-len: is learnt from the file of --like" in capsys.readouterr().err
    assert main([*words, "--like", "workloads/short_chat.jsonl", "--rate", "7"]) == 0
    assert describe(load_workload(tmp_path / "x.jsonl"))["rate_per_s"] == pytest.approx(7, rel=0.01)
