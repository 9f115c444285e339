"""The workloads in the project are what the commands beside them make."""

from __future__ import annotations

import gzip
import shlex
from pathlib import Path

import pytest

import servesim
from servesim.__main__ import main
from servesim.workload.formats import load_workload
from servesim.workload.hashes import block_ids

FOLDER = Path(__file__).resolve().parents[2] / "workloads"
COMMANDS = {
    Path(words[-1]).name: words
    for words in map(shlex.split, (FOLDER / "README.md").read_text(encoding="utf-8").splitlines())
    if words[:3] == ["servesim", "workload", "synth"]
}


def test_every_shipped_workload_has_its_command() -> None:
    assert set(COMMANDS) == {path.name for path in FOLDER.glob("*.jsonl*")}
    named = {"agentic_sessions.jsonl.gz", "example_trace.jsonl", "long_context.jsonl", "short_chat.jsonl"}
    assert named <= set(COMMANDS)
    assert all(words[-2:] == ["--output", f"workloads/{name}"] for name, words in COMMANDS.items())


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_the_command_makes_the_shipped_file_again(name: str, tmp_path: Path) -> None:
    made = tmp_path / name
    assert main([*COMMANDS[name][1:-1], str(made)]) == 0
    assert unpacked(made) == unpacked(FOLDER / name)
    assert (FOLDER / name).stat().st_size < 1_500_000


def unpacked(path: Path) -> bytes:
    """The lines of a file: how well they are packed is up to the version of zlib."""
    content = path.read_bytes()
    return gzip.decompress(content) if path.suffix == ".gz" else content


def test_the_example_has_300_requests_with_prefixes_to_share() -> None:
    workload = load_workload(FOLDER / "example_trace.jsonl")
    assert len(workload) == 300
    assert all(request.input_ids is not None for request in workload)
    sharing = sum(bool(ids) for ids in block_ids(workload, 16).ids)
    assert 150 < sharing < 300


def test_the_sessions_need_more_than_a_16_bit_cache() -> None:
    workload = load_workload(FOLDER / "agentic_sessions.jsonl.gz")
    result = servesim.simulate(workload=workload, kv_cache_dtype="auto")
    capacity = result.summary["kv_cache"]["tokens"]
    last_turns = {request.session_id: request for request in workload}
    assert len(last_turns) == 200
    assert sum(request.input_tokens + request.output_tokens for request in last_turns.values()) > 2 * capacity
    with_tier = servesim.simulate(workload=workload, kv_cache_dtype="auto", prefix_storage="CPU")
    found, found_with_tier = (int(each.requests["prefix_hit"].sum()) for each in (result, with_tier))
    assert found < 0.7 * found_with_tier
    assert with_tier.requests["storage_hit"].sum() > 0.3 * found_with_tier
