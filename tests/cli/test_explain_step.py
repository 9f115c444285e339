from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

import pytest

from servesim.__main__ import main
from servesim.cli.explain_step import decode_lengths, each_length, parse_chunks
from servesim.errors import InputError
from tests.cost.bundles import Toy, toy_architecture
from tests.specs.clusters import cluster as one_node
from tests.specs.clusters import instance, npu_mem

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def cluster(root: Path) -> str:
    """A cluster of one toy instance; returns the flag that names it."""
    Toy(meta={"source": "roofline", "engine_effective": {"max_num_seqs": 8}}).write(root)
    toy_architecture(root)
    model = root / "configs" / "model" / "org" / "toy.json"
    model.parent.mkdir(parents=True)
    fields = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    model.write_text(
        json.dumps(fields | {"model_type": "toy", "vocab_size": 32, "max_position_embeddings": 4096})
    )
    spec = one_node(instance(model_name="org/toy", hardware="Toy", npu_mem=npu_mem(mem_size=8, mem_bw=100)))
    (root / "toy.json").write_text(json.dumps(spec))
    return "--cluster-config=toy.json"


def test_the_table_adds_up_to_the_step(cluster: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain-step", cluster, "--no-cudagraph", "--decodes", "4", "--kv", "64"]) == 0
    out = capsys.readouterr().out
    assert "org/toy on Toy, tp 1: profiler/perf/Toy/org/toy/bf16 (source roofline)" in out
    assert "qkv_proj             2        13.000          26.0" in out
    assert "4 tokens, 4 sequences: 163000 ns = 0.163 ms" in out
    assert "extrapolated" not in out


def test_a_step_beyond_the_profile_is_flagged(cluster: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain-step", cluster, "--decodes", "9", "--kv", "64", "--chunks", "16@0"]) == 0
    assert "max_num_seqs 10 (profiled up to 8): larger steps are extrapolated" in capsys.readouterr().out


def test_a_missing_variant_ends_with_the_documented_error(
    cluster: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["explain-step", cluster, "--kv-cache-dtype", "fp8", "--chunks", "16"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("FileNotFoundError: profiler/perf/Toy/org/toy/bf16-kvfp8/ does not exist")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the step is empty"),
        (["--chunks", "1@0"], "--chunks: '1@0' is not allowed"),
        (["--chunks", "16@x"], "--chunks: '16@x' is not allowed"),
        (["--chunks", "2000000000@0"], "--chunks: '2000000000@0' is not allowed; no context has 100,000,000"),
        (["--chunks", "99@" + "9" * 30], "is not allowed; no context has 100,000,000 tokens"),
        (["--chunks", "4000000,4000000"], "--chunks: all of them together may have 4,194,304 tokens"),
        (["--decodes", "2000000000", "--kv", "9"], "--decodes 2000000000, --kv 9: at most 4,194,304 decodes"),
        (["--decodes", "2", "--kv", "1" + "0" * 20], "at most 4,194,304 decodes and 100,000,000 tokens"),
        (["--decodes", "-1"], "must not be negative"),
        (["--decodes", "2", "--kv", "10", "--kv-max", "5"], "must rise in this order"),
        (["--decodes", "2", "--kv", "10", "--instance", "3"], "--instance: 3 is not allowed; must be 0 to 0"),
    ],
)
def test_a_step_that_cannot_be_is_refused(
    cluster: str, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert main(["explain-step", cluster, *words]) == 2
    assert message in capsys.readouterr().err


def test_chunks_are_tokens_at_history() -> None:
    assert parse_chunks("512@0, 256@1024,64") == [(512, 0), (256, 1024), (64, 0)]
    assert parse_chunks("") == []


def test_lengths_spread_evenly_around_the_mean() -> None:
    assert decode_lengths(4, 100, None, None) == (400, 100, 100)
    assert decode_lengths(4, 100, None, 150) == (400, 50, 150)
    assert decode_lengths(4, 100, None, 500) == (400, 0, 500)
    assert decode_lengths(0, 100, None, 500) == (0, 0, 0)
    with pytest.raises(InputError):
        decode_lengths(4, 100, 101, 200)


def test_a_pipeline_is_told_stage_by_stage(
    cluster: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    step = ["explain-step", cluster, "--no-cudagraph", "--decodes", "4", "--kv", "64"]
    assert main(step) == 0
    whole_ns = int(re.findall(r"(\d+) ns", capsys.readouterr().out)[0])
    change_instance(tmp_path, num_npus=2, pp_size=2)
    assert main(step) == 0
    out = capsys.readouterr().out
    sums = [float(line.split()[1]) for line in out.splitlines() if line.startswith("sum ")]
    (sent,) = [float(line.split()[5]) for line in out.splitlines() if line.startswith("to the next stage")]
    assert len(sums) == 2
    assert sum(sums) - sent == pytest.approx(whole_ns / 1000, rel=0.01)
    assert int(re.findall(r"(\d+) ns =", out)[0]) == pytest.approx(sum(sums) * 1000, abs=100)


def test_lengths_have_their_sum_and_their_ends() -> None:
    assert each_length(4, 400, 50, 150) == [50, 100, 100, 150]
    assert each_length(5, 501, 50, 150) == [50, 101, 100, 100, 150]
    assert each_length(2, 200, 50, 150) == [50, 150]
    assert each_length(1, 100, 100, 100) == [100]
    assert each_length(0, 0, 0, 0) == []


@pytest.mark.parametrize(
    ("config", "flags", "line"),
    [
        ("single_node_cxl", [], "waiting for memory"),
        ("single_node_pim", [], "attention in memory"),
        ("moe_expert_parallel", [], "experts"),
        ("data_expert_parallel", [], "expert exchange"),
        ("tensor_pipeline", [], "to the next stage"),
        ("prefill_decode_h100_l40s", ["--instance", "1"], "down_proj"),
    ],
)
def test_everything_that_runs_is_taken_apart(
    capsys: pytest.CaptureFixture[str], config: str, flags: list[str], line: str
) -> None:
    cluster = f"--cluster-config=configs/cluster/{config}.json"
    assert main(["explain-step", cluster, "--decodes", "8", "--kv", "900", *flags]) == 0
    out = capsys.readouterr().out
    assert line in out
    sums = [float(row.split()[1]) for row in out.splitlines() if row.startswith("sum ")]
    (ns,) = re.findall(r"(\d+) ns =", out)
    assert sum(sums) * 1000 == pytest.approx(int(ns), abs=60 * len(sums))


def change_instance(folder: Path, **changes: int) -> None:
    spec = json.loads((folder / "toy.json").read_text())
    instance = spec["nodes"][0]["instances"][0]
    instance.update(changes)
    if "pp_size" in changes:
        instance["tp_size"] = 1
    (folder / "toy.json").write_text(json.dumps(spec))
