"""Every way we know to get a workload file wrong ends in one message: where, what, and the way out."""

from __future__ import annotations

import gzip
import subprocess
import sys
import tracemalloc
from typing import TYPE_CHECKING

import pytest
import zstandard

from servesim.errors import InputError, MissingFileError
from servesim.workload.formats import load_workload

if TYPE_CHECKING:
    from pathlib import Path

GOOD = b'{"input_toks": 4, "output_toks": 2, "arrival_time_ns": 0}\n'


def request(**changes: object) -> bytes:
    """A request line with some values replaced, given as JSON text; None leaves a key out."""
    fields: dict[str, object] = {"input_toks": "4", "output_toks": "2", "arrival_time_ns": "0"} | changes
    return ("{" + ", ".join(f'"{k}": {v}' for k, v in fields.items() if v is not None) + "}\n").encode()


def session(**changes: object) -> bytes:
    """A session line of two sub-requests with some values replaced."""
    turn = '{"input_toks": 4, "output_toks": 2}'
    fields: dict[str, object] = {
        "session_id": '"a"',
        "arrival_time_ns": "0",
        "sub_requests": f"[{turn}, {turn}]",
    }
    fields |= changes
    return ("{" + ", ".join(f'"{k}": {v}' for k, v in fields.items() if v is not None) + "}\n").encode()


def sub(text: str) -> bytes:
    """A session whose second sub-request is `text`."""
    return session(sub_requests='[{"input_toks": 4, "output_toks": 2}, ' + text + "]")


# what is wrong -> (the line after a good one, how the message must go on after "FILE:2: ")
BAD_LINES = {
    "negative length": (request(output_toks="-3"), "output_toks: -3 is too small; must be >= 1"),
    "zero length": (request(input_toks="0"), "input_toks: 0 is too small; must be >= 1"),
    "length beyond any model": (request(input_toks="2147483648"), "input_toks: 2147483648 is too large"),
    "fractional length": (request(input_toks="4.5"), "input_toks: 4.5 is not an integer"),
    "length as float": (request(input_toks="4.0"), "input_toks: 4.0 is not an integer"),
    "length as text": (request(input_toks='"4"'), "input_toks: '4' is not an integer"),
    "length as bool": (request(output_toks="true"), "output_toks: true is not an integer"),
    "length null": (request(output_toks="null"), "output_toks: null is not an integer"),
    "length NaN": (request(output_toks="NaN"), "output_toks: NaN is not an integer"),
    "length infinite": (request(output_toks="-Infinity"), "output_toks: -Infinity is not an integer"),
    "length a list": (request(input_toks="[4]"), "input_toks: a list is not an integer"),
    "no input_toks": (request(input_toks=None), "input_toks: is missing"),
    "no output_toks": (request(output_toks=None), "output_toks: is missing"),
    "no arrival": (request(arrival_time_ns=None), "arrival_time_ns: is missing"),
    "negative arrival": (request(arrival_time_ns="-1"), "arrival_time_ns: -1 is too small; must be >= 0"),
    "arrival beyond 2**53": (
        request(arrival_time_ns=str(2**53 + 1)),
        f"arrival_time_ns: {2**53 + 1} is too large; must be <= {2**53}",
    ),
    "arrival beyond 64 bits": (
        request(arrival_time_ns="1" + "0" * 25),
        "arrival_time_ns: 1e+25 is not an integer",
    ),
    "arrival beyond doubles": (
        request(arrival_time_ns="1e999"),
        "arrival_time_ns: Infinity is not an integer",
    ),
    "arrival with thousands of digits": (request(arrival_time_ns="1" * 5000), "column "),
    "misspelt key": (
        request(output_tokens="2", output_toks=None),
        "output_tokens: is not a known key; did you mean",
    ),
    "unknown key": (request(zz='"red"'), "zz: is not a known key; allowed keys are input_toks, "),
    "key of a session": (request(session_id='"a"'), "sub_requests: is missing"),
    "too few ids": (request(input_tok_ids="[1, 2, 3]"), "input_tok_ids: has 3 ids but input_toks is 4"),
    "too many output ids": (
        request(output_tok_ids="[1, 2, 3]"),
        "output_tok_ids: has 3 ids but output_toks is 2",
    ),
    "empty ids": (request(input_tok_ids="[]"), "input_tok_ids: has 0 ids but input_toks is 4"),
    "ids not a list": (request(input_tok_ids="7"), "input_tok_ids: 7 is not a list"),
    "negative id": (request(input_tok_ids="[1, 2, -3, 4]"), "input_tok_ids[2]: -3 is too small"),
    "fractional id": (request(input_tok_ids="[1, 2.5, 3, 4]"), "input_tok_ids[1]: 2.5 is not an integer"),
    "bool id": (request(input_tok_ids="[1, 2, 3, true]"), "input_tok_ids[3]: true is not an integer"),
    "text id": (request(input_tok_ids='[1, "2", 3, 4]'), "input_tok_ids[1]: '2' is not an integer"),
    "null id": (request(input_tok_ids="[null, 2, 3, 4]"), "input_tok_ids[0]: null is not an integer"),
    "id of 64 bits": (
        request(input_tok_ids=f"[1, {2**63}, 3, 4]"),
        f"input_tok_ids[1]: {2**63} is too large",
    ),
    "nested ids": (request(input_tok_ids="[[1], 2, 3, 4]"), "input_tok_ids[0]: a list is not an integer"),
    "model not a text": (request(model="7"), "model: 7 is not a name"),
    "empty model": (request(model='""'), "model: '' is not a name"),
    "no sub-requests": (session(sub_requests="[]"), "sub_requests: is empty"),
    "sub-requests not a list": (session(sub_requests="{}"), "sub_requests: an object is not a list"),
    "sub-request not an object": (sub("3"), "sub_requests[1]: 3 is not an object"),
    "negative length in a session": (
        sub('{"input_toks": -1, "output_toks": 2}'),
        "sub_requests[1].input_toks: -1 is too small",
    ),
    "no length in a session": (sub('{"input_toks": 1}'), "sub_requests[1].output_toks: is missing"),
    "negative tool time": (
        sub('{"input_toks": 1, "output_toks": 2, "tool_duration_ns": -5}'),
        "sub_requests[1].tool_duration_ns: -5 is too small; must be >= 0",
    ),
    "fractional tool time": (
        sub('{"input_toks": 1, "output_toks": 2, "tool_duration_ns": 0.5}'),
        "sub_requests[1].tool_duration_ns: 0.5 is not an integer",
    ),
    "arrival in a sub-request": (
        sub('{"input_toks": 1, "output_toks": 2, "arrival_time_ns": 5}'),
        "sub_requests[1].arrival_time_ns: is not a known key",
    ),
    "ids in a session that disagree": (
        sub('{"input_toks": 1, "output_toks": 2, "output_tok_ids": [1]}'),
        "sub_requests[1].output_tok_ids: has 1 ids but output_toks is 2",
    ),
    "misspelt key of a session": (
        session(sesion_id='"b"'),
        "sesion_id: is not a known key; did you mean session_id?",
    ),
    "session without arrival": (session(arrival_time_ns=None), "arrival_time_ns: is missing"),
    "session id not a text": (session(session_id="1.5"), "session_id: 1.5 is not a name"),
    "truncated JSON": (GOOD[:42] + b"\n", "column 43: unexpected"),
    "two objects a line": (GOOD.strip() + GOOD, "column 58: unexpected content after document"),
    "single quotes": (b"{'input_toks': 4}\n", "column 2: "),
    "not JSON at all": (b"hello\n", "column 1: "),
    "a number": (b"17\n", "17 is not an entry; must be a JSON object"),
    "a list": (b"[1, 2]\n", "a list is not an entry; must be a JSON object"),
    "not UTF-8": (b'{"model": "\xff\xfe"}\n', "column 12: byte 0xff is not UTF-8"),
    "nested without end": (b"[" * 100_000 + b"\n", "column "),
}


@pytest.mark.parametrize(("line", "expected"), BAD_LINES.values(), ids=BAD_LINES.keys())
def test_a_bad_line_is_reported_with_its_place_and_field(tmp_path: Path, line: bytes, expected: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(GOOD + line + GOOD)
    with pytest.raises(InputError) as caught:
        load_workload(path)
    assert str(caught.value).startswith(f"{path}:2: {expected}")
    assert str(caught.value).endswith("; correct it, or leave bad entries out with --lenient")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < len(str(path)) + 400


@pytest.mark.parametrize("line", [line for line, _ in BAD_LINES.values()], ids=BAD_LINES.keys())
def test_lenient_loading_skips_a_bad_line_and_counts_it(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(GOOD + line + GOOD)
    workload = load_workload(path, lenient=True)
    assert workload.skipped == 1
    assert [request.index for request in workload] == [0, 1]


def test_a_session_id_can_be_used_once(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(session() + GOOD + session())
    with pytest.raises(InputError, match=r":3: session_id: 'a' was used on an earlier line"):
        load_workload(path)
    assert len(load_workload(path, lenient=True)) == 3


def test_a_skipped_session_does_not_use_up_its_id(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(session(sub_requests="[7]") + session())
    workload = load_workload(path, lenient=True)
    assert (len(workload), workload.skipped) == (2, 1)


whole = GOOD * 50
BAD_FILES = {
    "empty": (b"", "is empty"),
    "only blank lines": (b"\n  \n\n", "is empty"),
    "only a BOM": (b"\xef\xbb\xbf", "is empty"),
    "truncated gzip": (gzip.compress(whole)[:-12], "cannot be read to its end"),
    "damaged gzip": (gzip.compress(whole)[:20] + b"\x00\xff" * 20, "cannot be read to its end"),
    "truncated zstd": (zstandard.compress(whole)[:-5], "the zstd file ends too early"),
    "damaged zstd": (b"\x28\xb5\x2f\xfd" + b"\xff" * 40, "is not a sound zstd file"),
    "binary": (b"PAR1\x15\x04\x15\x10\x80\xff\n", "is no known workload format"),
    "binary with zeros": (b"\x00\x01\x02\n", "is no known workload format"),
    "unknown CSV": (b"when,in,out\n1,2,3\n", "'when,in,out' is no known CSV header; known: TIMESTAMP"),
    "CSV without a header": (b"374,44\n396,109\n", "'374,44' is no known CSV header"),
    "zeros without end": (bytes(3 << 20), "holds zero bytes"),
    "prose": (b"Dear reader,\n", "is no known workload format"),
    "JSON list": (b"[" + GOOD.strip() + b"]", "is JSON, but a list"),
    "unfinished document": (b'{\n  "input_lens": [1,\n', "is not one whole JSON document"),
    "some document": (b'{\n  "a": 1\n}\n', "input_lens: is missing"),
    "result without details": (b'{"total_token_throughput": 3.5}', "input_lens: is missing"),
    "result of unequal lists": (
        b'{"input_lens": [1, 2], "output_lens": [1]}',
        "must be lists of the same length",
    ),
    "only a CSV header": (b"TIMESTAMP,ContextTokens,GeneratedTokens\n", "holds no request"),
}


@pytest.mark.parametrize(("content", "expected"), BAD_FILES.values(), ids=BAD_FILES.keys())
def test_a_bad_file_is_reported_as_a_whole(tmp_path: Path, content: bytes, expected: str) -> None:
    path = tmp_path / "some_file"
    path.write_bytes(content)
    for lenient in (False, True):
        with pytest.raises(InputError) as caught:
            load_workload(path, lenient=lenient)
        assert str(caught.value).startswith(str(path))
        assert expected in str(caught.value)
        assert "\n" not in str(caught.value)


def packed_bomb() -> dict[str, bytes]:
    """Small files that unpack to 64 MiB: many good lines, one line without an end."""
    lines, line = GOOD * (64 * 2**20 // len(GOOD)), b"7" * (64 << 20)
    return {
        f"{name} {kind}": pack(content)
        for name, content in (("lines", lines), ("a line", line))
        for kind, pack in (("gzip", lambda data: gzip.compress(data, 1)), ("zstd", zstandard.compress))
    }


def test_an_input_is_bounded_before_it_takes_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVESIM_MAX_INPUT_MIB", "8")
    for name, packed in packed_bomb().items():
        assert len(packed) < 2**20
        path = tmp_path / name
        path.write_bytes(packed)
        tracemalloc.start()
        with pytest.raises(InputError, match="SERVESIM_MAX_INPUT_MIB"):
            load_workload(path)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 60 << 20


def test_the_memory_of_requests_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.jsonl"
    ids = ", ".join(["1"] * 100_000)
    line = f'{{"arrival_time_ns": 0, "input_toks": 100000, "output_toks": 1, "input_tok_ids": [{ids}]}}\n'
    path.write_text(line * 20)
    assert len(load_workload(path)) == 20
    monkeypatch.setenv("SERVESIM_MAX_INPUT_MIB", "8")
    with pytest.raises(InputError, match=r"x\.jsonl:11: the requests so far take more than 8 MiB"):
        load_workload(path)
    assert len(load_workload(path, num_reqs=10)) == 10
    monkeypatch.setenv("SERVESIM_MAX_INPUT_MIB", "much")
    with pytest.raises(InputError, match="SERVESIM_MAX_INPUT_MIB: 'much' is not allowed"):
        load_workload(path)


def test_ids_are_not_made_for_an_absurd_length(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"timestamp": 0, "input_length": 2147483647, "output_length": 1, "hash_ids": [1]}\n')
    tracemalloc.start()
    (request,) = load_workload(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (request.input_tokens, request.hashed_tokens) == (2**31 - 1, 512)
    assert peak < 10 << 20


def test_a_device_without_end_is_no_input() -> None:
    with pytest.raises(InputError, match="holds zero bytes"):
        load_workload("/dev/zero")


def test_a_file_of_bad_lines_only_is_an_error_even_when_lenient(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"{}\n{}\n")
    with pytest.raises(InputError, match="all 2 entries are left out"):
        load_workload(path, lenient=True)


def test_a_missing_file_is_a_file_not_found_error(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=r"nowhere\.jsonl: no such workload file.*workload synth"):
        load_workload(tmp_path / "nowhere.jsonl")


def test_a_folder_is_no_workload(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a folder"):
        load_workload(tmp_path)


def test_a_path_that_no_file_can_have_is_reported() -> None:
    with pytest.raises(InputError):
        load_workload("a\0b")
    with pytest.raises(InputError):
        load_workload("x" * 5000)


def test_num_reqs_and_rate_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(GOOD)
    with pytest.raises(InputError, match="num_reqs: -1"):
        load_workload(path, num_reqs=-1)
    for rate in (0.0, -2.0, float("nan")):
        with pytest.raises(InputError, match="request rate"):
            load_workload(path, request_rate=rate)


def test_zstd_without_its_package_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.jsonl.zst"
    path.write_bytes(zstandard.compress(GOOD))
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(InputError, match=r"pip install 'servesim\[zstd\]'"):
        load_workload(path)


def test_the_command_prints_one_line_and_ends_with_status_2(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(GOOD + request(output_toks="-3"))
    done = subprocess.run(
        [sys.executable, "-m", "serving", "workload", "describe", str(path)], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        f"error: {path}:2: output_toks: -3 is too small; must be >= 1; "
        "correct it, or leave bad entries out with --lenient"
    ]
