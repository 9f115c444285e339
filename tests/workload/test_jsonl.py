"""Good JSON lines: what they mean, in which order, packed or not."""

from __future__ import annotations

import gzip
import json
from typing import TYPE_CHECKING

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from servesim.errors import InputError
from servesim.workload.formats import Loading, load_workload
from servesim.workload.generators import json_lines
from servesim.workload.hashes import block_ids
from servesim.workload.jsonl import load_jsonl
from tests.recorded import recorded_path

if TYPE_CHECKING:
    from pathlib import Path

    from servesim.workload.request import Workload

FLAT = {"input_toks": 5, "output_toks": 3, "arrival_time_ns": 100}
SESSION = {
    "session_id": "chat",
    "arrival_time_ns": 7,
    "sub_requests": [
        {"input_toks": 4, "output_toks": 2, "tool_duration_ns": 1000},
        {"input_toks": 9, "output_toks": 1},
        {"input_toks": 12, "output_toks": 6, "tool_duration_ns": 55},
    ],
}


def loaded(*entries: object, **options: bool | int) -> Workload:
    lines = [(number, json.dumps(entry).encode()) for number, entry in enumerate(entries, 1)]
    return load_jsonl("x.jsonl", lines, Loading(**options))


def test_a_line_is_a_request() -> None:
    (request,) = loaded(FLAT)
    assert (request.index, request.input_tokens, request.output_tokens, request.arrival_ns) == (0, 5, 3, 100)
    assert (request.input_ids, request.output_ids, request.model, request.session_id) == (
        None,
        None,
        None,
        None,
    )
    assert request.predecessor == -1


def test_token_ids_become_arrays() -> None:
    (request,) = loaded(FLAT | {"input_tok_ids": [1, 2, 3, 4, 128000], "output_tok_ids": [0, 2**40, 9]})
    assert request.input_ids is not None
    assert request.output_ids is not None
    assert request.input_ids.dtype == request.output_ids.dtype == np.int64
    assert request.input_ids.tolist() == [1, 2, 3, 4, 128000]
    assert request.output_ids.tolist() == [0, 2**40, 9]


def test_a_null_option_is_an_absent_one() -> None:
    (request,) = loaded(FLAT | {"input_tok_ids": None, "output_tok_ids": None, "model": None})
    assert (request.input_ids, request.output_ids, request.model) == (None, None, None)


def test_a_turn_waits_for_the_one_before_it_and_for_its_tool() -> None:
    first, second, third, flat = loaded(SESSION, FLAT)
    assert [request.index for request in (first, second, third, flat)] == [0, 1, 2, 3]
    assert [request.predecessor for request in (first, second, third, flat)] == [-1, 0, 1, -1]
    assert [request.tool_ns for request in (first, second, third)] == [0, 1000, 0]
    assert [request.sub_request for request in (first, second, third)] == [0, 1, 2]
    assert {request.session_id for request in (first, second, third)} == {"chat"}
    assert {request.arrival_ns for request in (first, second, third)} == {7}
    assert flat.session_id is None


def test_sessions_without_a_name_get_one_that_is_free() -> None:
    nameless = {key: value for key, value in SESSION.items() if key != "session_id"}
    workload = loaded(
        nameless,
        FLAT,
        SESSION | {"session_id": "session-4"},
        SESSION | {"session_id": 12},
        nameless,
        nameless,
    )
    names = [request.session_id for request in workload if request.sub_request == 0]
    assert names == ["session-0", None, "session-4", "12", "session-10", "session-13"]
    workload = loaded(FLAT, nameless, SESSION | {"session_id": "session-1"})
    assert len({request.session_id for request in workload}) == 3


def test_a_request_can_ask_for_a_model() -> None:
    turns = [{"input_toks": 1, "output_toks": 1}, {"input_toks": 1, "output_toks": 1, "model": "b"}]
    workload = loaded(FLAT | {"model": "a"}, FLAT, SESSION | {"model": "c", "sub_requests": turns})
    assert [request.model for request in workload] == ["a", None, "c", "b"]


def test_num_reqs_counts_a_session_once_and_reads_no_further() -> None:
    assert len(loaded(SESSION, FLAT, "broken", num_reqs=1)) == 3
    assert len(loaded(SESSION, FLAT, "broken", num_reqs=2)) == 4
    assert len(loaded(SESSION, "broken", FLAT, "broken", num_reqs=2, lenient=True)) == 4


@pytest.mark.parametrize("pack", [bytes, gzip.compress, zstandard.compress])
@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf", b"\r\n\n"])
def test_packed_files_blank_lines_and_a_bom_make_no_difference(
    tmp_path: Path, pack: object, start: bytes
) -> None:
    assert callable(pack)
    content = start + b"\r\n\n".join(json.dumps(entry).encode() for entry in (FLAT, SESSION, FLAT))
    path = tmp_path / "name_without_suffix"
    path.write_bytes(pack(content))
    workload = load_workload(path)
    assert (len(workload), workload.skipped, workload.source) == (5, 0, str(path))


def test_a_zstd_file_of_several_frames_is_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "x.zst"
    line = json.dumps(FLAT).encode() + b"\n"
    path.write_bytes(zstandard.compress(line) + zstandard.compress(line))
    assert len(load_workload(path)) == 2


def test_the_last_line_needs_no_end(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(FLAT))
    assert len(load_workload(path)) == 1


lengths = st.integers(1, 40)


@st.composite
def turns(draw: st.DrawFn) -> dict[str, object]:
    tokens_in, tokens_out = draw(lengths), draw(lengths)
    entry: dict[str, object] = {"input_toks": tokens_in, "output_toks": tokens_out}
    for key, count in (("input_tok_ids", tokens_in), ("output_tok_ids", tokens_out)):
        if draw(st.booleans()):
            entry[key] = draw(st.lists(st.integers(0, 2**31), min_size=count, max_size=count))
    return entry


arrivals = st.integers(0, 2**53)
flat_entries = st.builds(lambda turn, at: turn | {"arrival_time_ns": at}, turns(), arrivals)
session_entries = st.builds(
    lambda subs, tools, at: {
        "arrival_time_ns": at,
        "sub_requests": [turn | {"tool_duration_ns": tool} for turn, tool in zip(subs, tools, strict=False)],
    },
    st.lists(turns(), min_size=1, max_size=4),
    st.lists(arrivals, min_size=4, max_size=4),
    arrivals,
)


@given(st.lists(flat_entries | session_entries, min_size=1, max_size=8))
def test_a_workload_written_and_read_again_is_the_same(entries: list[dict[str, object]]) -> None:
    once = loaded(*entries)
    again = load_jsonl("x.jsonl", enumerate(json_lines(once), 1), Loading())
    assert len(once) == len(again) == sum(len(entry.get("sub_requests", [0])) for entry in entries)  # type: ignore[arg-type]
    for one, other in zip(once, again, strict=True):
        for name in ("index", "input_tokens", "output_tokens", "arrival_ns", "session_id", "sub_request"):
            assert getattr(one, name) == getattr(other, name)
        assert (one.predecessor, one.tool_ns, one.model) == (other.predecessor, other.tool_ns, other.model)
        for name in ("input_ids", "output_ids"):
            ids, same = getattr(one, name), getattr(other, name)
            assert (ids is None) == (same is None)
            assert ids is None or ids.tolist() == same.tolist()


@pytest.mark.parametrize("name", ["sharegpt-llama-3.1-8b-300-sps10", "sharegpt-qwen3-300-sps10"])
def test_the_recorded_workloads_load(name: str) -> None:
    workload = load_workload(recorded_path("workloads", f"{name}.jsonl.gz"))
    assert len(workload) == 300
    for request in workload:
        assert request.input_ids is not None
        assert request.output_ids is not None
        assert (len(request.input_ids), len(request.output_ids)) == (
            request.input_tokens,
            request.output_tokens,
        )


def test_limits_salts_and_priorities_are_read_and_written() -> None:
    extra = {"priority": -3, "max_tokens": 9, "cache_salt": "tenant", "lora": "sql"}
    whole = loaded(FLAT | extra)
    (request,) = whole
    assert (request.priority, request.max_tokens, request.cache_salt) == (-3, 9, "tenant")
    assert request.lora == "sql"
    (line,) = json_lines(whole)
    assert json.loads(line) == FLAT | extra
    with pytest.raises(InputError, match="max_tokens: 2 is too small; must be >= 3"):
        loaded(FLAT | {"max_tokens": 2})


def test_several_answers_are_requests_of_one_prompt() -> None:
    made = loaded(FLAT | {"input_toks": 40, "n": 3}, FLAT | {"input_toks": 40})
    assert [request.index for request in made] == [0, 1, 2, 3]
    first, second, third, other = block_ids(made, 16).ids
    assert first == second == third == [0, 1]
    assert other == []
    with pytest.raises(InputError, match="n: is not a known key"):
        loaded(SESSION | {"sub_requests": [{"input_toks": 4, "output_toks": 2, "n": 2}]})
