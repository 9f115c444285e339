"""The log lines of a run."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from servesim.results.heartbeat import Heartbeat
from servesim.results.records import RunLog
from servesim.results.units import si
from tests.hand_made import MS, add_step, instance, two_requests

DOCUMENTED = re.compile(
    r"^\[INFO\] step=\d+ batch=\d+ prompt_t=\d+(\.\d)?[kMG]? tok/s decode_t=\d+(\.\d)?[kMG]? tok/s "
    r"npu_mem=\d+\.\d GB( instance=\d+)? t=\d+\.\d+s run=\d+ wait=\d+ kv=\d+\.\d% hit=\d+\.\d%$"
)


def lines_of(log: RunLog, interval_ms: int, times_ms: list[int]) -> list[str]:
    """What a heartbeat writes when the clock is seen at ``times_ms`` only."""
    lines: list[str] = []
    heartbeat = Heartbeat(interval_ms * MS, lines.append)
    for time_ms in times_ms:
        heartbeat.advance(time_ms * MS, log)
    heartbeat.finish(log)
    return lines


def test_lines_say_what_the_steps_that_ended_did() -> None:
    lines = lines_of(two_requests().log, 20, [])
    # Up to 20 ms: two steps with 118 prompt tokens + 32 found in the cache, and one decode. 2 GiB of weights
    # and 11 blocks of 16 MiB are 2.17 GiB.
    assert lines[0] == (
        "[INFO] step=2 batch=2 prompt_t=7.5k tok/s decode_t=50 tok/s npu_mem=2.2 GB "
        "t=0.02s run=2 wait=0 kv=11.0% hit=21.3%"
    )
    assert lines[1].startswith(
        "[INFO] step=3 batch=2 prompt_t=0 tok/s decode_t=100 tok/s npu_mem=2.2 GB t=0.04s"
    )
    assert lines[2].endswith("t=0.06s run=1 wait=0 kv=4.0% hit=21.3%")
    assert len(lines) == 3


def test_every_line_has_the_documented_form() -> None:
    for line in lines_of(two_requests().log, 7, []):
        assert DOCUMENTED.match(line), line


def test_what_is_left_of_the_last_interval_gets_a_line() -> None:
    lines = lines_of(two_requests().log, 50, [])
    assert [line.split(" t=")[1].split()[0] for line in lines] == ["0.05s", "0.06s"]
    assert "prompt_t=5.2k tok/s" in lines[1]  # 52 tokens in 10 ms, not in 50


def test_what_is_computed_again_is_named_apart() -> None:
    log = two_requests().log
    log.instances[0].steps.recomputed_tokens.put(4, 50)
    line = lines_of(log, 50, [])[1]
    assert "prompt_t=200 tok/s" in line  # 2 of the 52 tokens in 10 ms are new
    assert line.endswith(" hit=21.3% recomputed=5.0k tok/s")


@given(st.lists(st.integers(0, 60), max_size=20).map(sorted), st.sampled_from([1, 7, 10, 60, 100]))
def test_lines_do_not_depend_on_how_the_clock_jumps(times_ms: list[int], interval_ms: int) -> None:
    log = two_requests().log
    assert lines_of(log, interval_ms, times_ms) == lines_of(log, interval_ms, [])


@given(st.lists(st.integers(0, 10_000), max_size=20).map(sorted))
def test_idle_time_is_told_once_however_the_clock_jumps(times_ms: list[int]) -> None:
    log = RunLog([instance()], end_ns=10_000 * MS)
    add_step(log.instances[0], 0, 5, running=1, decode_tokens=1)
    add_step(log.instances[0], 9_970, 10_000, running=1, decode_tokens=1)
    lines = lines_of(log, 10, times_ms)
    assert [line.split(" t=")[1].split()[0] for line in lines] == ["0.01s", "0.02s", "10.00s"]
    assert "decode_t=100 tok/s" in lines[2]  # one token in the interval that ends at 10 s
    assert lines == lines_of(log, 10, [])


def test_a_boundary_waits_until_the_clock_is_past_it() -> None:
    log = two_requests().log
    lines: list[str] = []
    heartbeat = Heartbeat(20 * MS, lines.append)
    heartbeat.advance(20 * MS, log)  # something may still end at 20 ms
    assert lines == []
    heartbeat.advance(20 * MS + 1, log)
    assert len(lines) == 1
    assert heartbeat.next_ns == 40 * MS


def test_every_instance_has_its_line_and_number() -> None:
    log = RunLog([instance(0), instance(1)], end_ns=10 * MS)
    for entry in log.instances:
        add_step(entry, 0, 10, running=1, prefill_tokens=24)
    lines = lines_of(log, 10, [])
    assert [re.search(r"GB instance=(\d) t=", line).group(1) for line in lines] == ["0", "1"]  # type: ignore[union-attr]
    assert all(DOCUMENTED.match(line) for line in lines)
    assert "prompt_t=2.4k tok/s" in lines[0]


def test_rates_are_short() -> None:
    shown = {0: "0", 4.25: "4.2", 860: "860", 999.4: "999", 999.6: "1.0k", 2400: "2.4k", 1_250_000: "1.2M"}
    assert {value: si(value) for value in shown} == shown
