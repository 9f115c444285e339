"""The workloads in the project are what the commands beside them make."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from serving.__main__ import main
from serving.workload.formats import load_workload
from serving.workload.hashes import block_ids

FOLDER = Path(__file__).resolve().parents[2] / "workloads"
COMMANDS = {
    Path(words[-1]).name: words
    for words in map(shlex.split, (FOLDER / "README.md").read_text(encoding="utf-8").splitlines())
    if words[:3] == ["servesim", "workload", "synth"]
}


def test_every_shipped_workload_has_its_command() -> None:
    assert set(COMMANDS) == {path.name for path in FOLDER.glob("*.jsonl*")}
    assert {"example_trace.jsonl", "long_context.jsonl", "short_chat.jsonl"} <= set(COMMANDS)
    assert all(words[-2:] == ["--output", f"workloads/{name}"] for name, words in COMMANDS.items())


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_the_command_makes_the_shipped_file_again(name: str, tmp_path: Path) -> None:
    made = tmp_path / name
    assert main([*COMMANDS[name][1:-1], str(made)]) == 0
    assert made.read_bytes() == (FOLDER / name).read_bytes()
    assert made.stat().st_size < 2_500_000


def test_the_example_has_300_requests_with_prefixes_to_share() -> None:
    workload = load_workload(FOLDER / "example_trace.jsonl")
    assert len(workload) == 300
    assert all(request.input_ids is not None for request in workload)
    sharing = sum(bool(ids) for ids in block_ids(workload, 16).ids)
    assert 150 < sharing < 300
