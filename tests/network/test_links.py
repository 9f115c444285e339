from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from servesim.network.links import NEVER, Links, Port

if TYPE_CHECKING:
    from collections.abc import Sequence

OUT, IN, UPLINK = Port("out", 10.0), Port("in", 10.0), Port("uplink", 4.0)


def run(
    transfers: Sequence[tuple[int, int, Sequence[Port], int]], most_events: int = 10_000
) -> dict[int, int]:
    """(open_ns, bytes, ports, floor_ns) of each transfer → when it ended, following ``next_ns``."""
    links, ends = Links(), dict[int, int]()
    waiting = sorted(range(len(transfers)), key=lambda flow: transfers[flow][0])
    for _ in range(most_events):
        opens = transfers[waiting[0]][0] if waiting else NEVER
        if links.next_ns <= opens:
            if links.next_ns == NEVER:
                return ends
            now = links.next_ns
            ends |= dict.fromkeys(links.advance(now), now)
        else:
            flow = waiting.pop(0)
            at, size, ports, floor = transfers[flow]
            links.open(flow, size, ports, at, floor)
    raise AssertionError("transfers never end")


def test_a_transfer_alone_moves_at_the_speed_of_its_slowest_port() -> None:
    assert run([(100, 4000, (OUT, UPLINK, IN), 0)]) == {0: 100 + 1000}


def test_two_transfers_over_one_link_take_twice_as_long() -> None:
    assert run([(0, 5000, (OUT,), 0), (0, 5000, (OUT,), 0)]) == {0: 1000, 1: 1000}


def test_a_transfer_speeds_up_when_another_ends() -> None:
    # Both at 5 until the small one ends at 200 ns; the large one has 4000 bytes left and moves them at 10.
    assert run([(0, 5000, (OUT,), 0), (0, 1000, (OUT,), 0)]) == {0: 600, 1: 200}


def test_a_transfer_slows_down_when_another_joins() -> None:
    # 1000 of 2000 bytes are gone at 100 ns; the other 1000 take 200 ns at half the speed.
    assert run([(0, 2000, (OUT,), 0), (100, 1000, (OUT,), 0)]) == {0: 300, 1: 300}


def test_what_one_transfer_cannot_use_the_others_get() -> None:
    links = Links()
    links.open(0, 10**6, (OUT, UPLINK), 0)
    links.open(1, 10**6, (OUT,), 0)
    assert links.rates() == {0: 4.0, 1: 6.0}
    links.open(2, 10**6, (UPLINK,), 0)
    assert links.rates() == {0: 2.0, 1: 8.0, 2: 2.0}


def test_a_transfer_ends_no_earlier_than_its_floor() -> None:
    # The first is through at 200 ns and only waits; the second then has the port to itself.
    assert run([(0, 1000, (OUT,), 900), (0, 3000, (OUT,), 0)]) == {0: 900, 1: 400}


def test_a_transfer_of_nothing_ends_at_once_or_at_its_floor() -> None:
    assert run([(5, 0, (OUT,), 0), (5, 0, (OUT,), 70), (5, 100, (), 60)]) == {0: 5, 1: 70, 2: 60}


def test_a_last_byte_takes_the_nanosecond_it_has_begun() -> None:
    assert run([(0, 1, (Port("slow", 3.0),), 0), (10, 10, (Port("slow", 3.0),), 0)]) == {0: 1, 1: 14}


def test_a_port_named_twice_counts_once() -> None:
    assert run([(0, 1000, (OUT, OUT), 0)]) == {0: 100}


def test_calls_that_come_late_miss_nothing() -> None:
    links = Links()
    links.open(0, 1000, (OUT,), 0)
    links.open(1, 5000, (OUT,), 0, 450)
    links.open(2, 100, (OUT,), 10_000)
    assert links.advance(10_000) == [0, 1]  # at 200 and 600 ns, unseen until now
    assert links.next_ns == 10_010
    assert links.advance(20_000) == [2]
    assert links.next_ns == NEVER


def test_a_number_in_use_and_time_going_back_are_refused() -> None:
    links = Links()
    links.open(0, 1000, (OUT,), 50)
    with pytest.raises(ValueError, match="transfer 0 is under way"):
        links.open(0, 1000, (OUT,), 60)
    with pytest.raises(ValueError, match="time goes back"):
        links.advance(40)


PORTS = [Port(f"p{i}", bandwidth) for i, bandwidth in enumerate((1.0, 3.0, 7.5, 16.907, 400.0))]
TRANSFERS = st.lists(
    st.tuples(
        st.integers(0, 3000),
        st.integers(0, 50_000),
        st.lists(st.sampled_from(PORTS), max_size=4),
        st.integers(0, 8000),
    ),
    max_size=12,
)


@settings(max_examples=200, deadline=None)
@given(TRANSFERS)
def test_every_transfer_ends_no_earlier_than_it_could_alone(
    transfers: list[tuple[int, int, list[Port], int]],
) -> None:
    ends = run(transfers)
    assert sorted(ends) == list(range(len(transfers)))
    for flow, (at, size, ports, floor) in enumerate(transfers):
        alone_ns = max((size / port.bandwidth_gbs for port in ports), default=0.0)
        assert ends[flow] >= max(at + alone_ns - 1e-3, floor)


@settings(max_examples=200, deadline=None)
@given(TRANSFERS)
def test_a_port_is_never_idle_with_work(
    transfers: list[tuple[int, int, list[Port], int]],
) -> None:
    """One port alone: at any end, all bytes due there have moved, in the time somebody was there."""
    port = PORTS[1]
    mine = [(at, size, (port,), 0) for at, size, _, _ in transfers]
    ends = run(mine)
    clear = 0.0  # when a queue that serves one after the other, in any order, would be empty
    for at, size, _, _ in sorted(mine):
        clear = max(clear, at) + size / port.bandwidth_gbs
    if mine:
        assert clear - 1e-3 <= max(ends.values()) <= clear + len(mine) + 1


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(st.sampled_from(PORTS), min_size=1, max_size=4), min_size=1, max_size=12))
def test_rates_are_max_min_fair(crossed: list[list[Port]]) -> None:
    """No port is overbooked, and each transfer has a full port on which nobody is faster."""
    links = Links()
    for flow, ports in enumerate(crossed):
        links.open(flow, 10**6, ports, 0)
    rates = links.rates()
    load = {port: sum(rates[f] for f, ports in enumerate(crossed) if port in ports) for port in PORTS}
    assert all(load[port] <= port.bandwidth_gbs * (1 + 1e-9) for port in PORTS)
    for flow, ports in enumerate(crossed):
        assert any(
            load[port] >= port.bandwidth_gbs * (1 - 1e-9)
            and all(rates[other] <= rates[flow] * (1 + 1e-9) for other, p in enumerate(crossed) if port in p)
            for port in ports
        )


@settings(max_examples=100, deadline=None)
@given(TRANSFERS, st.lists(st.integers(0, 30_000), max_size=8))
def test_looking_more_often_changes_no_end(
    transfers: list[tuple[int, int, list[Port], int]], looks: list[int]
) -> None:
    ends = run(transfers)
    peeks = [(at, 0, (), at) for at in looks]  # opens a transfer of nothing: rates are looked at again
    again = run([*transfers, *peeks])
    assert all(abs(again[flow] - end) <= 1 for flow, end in ends.items())


def slow_ends(transfers: list[tuple[int, int, list[Port], int]]) -> dict[int, float]:
    """The same in continuous time: all rates from scratch at every moment something opens or runs dry."""
    left = {flow: float(size) for flow, (_, size, ports, _) in enumerate(transfers) if size and ports}
    ends = {
        flow: float(max(at, floor)) for flow, (at, _, _, floor) in enumerate(transfers) if flow not in left
    }
    now = 0.0
    while left:
        active = [flow for flow in left if transfers[flow][0] <= now]
        rates: dict[int, float] = {}
        while len(rates) < len(active):  # the tightest port first
            shares = []
            for port in PORTS:
                users = [flow for flow in active if port in transfers[flow][2]]
                free = [flow for flow in users if flow not in rates]
                if free:
                    used = sum(rates.get(flow, 0.0) for flow in users)
                    shares.append(((port.bandwidth_gbs - used) / len(free), free))
            share, free = min(shares, key=lambda pair: pair[0])
            rates |= dict.fromkeys(free, share)
        moments = [transfers[flow][0] for flow in left if flow not in rates]
        moments += [now + left[flow] / rates[flow] for flow in active]
        then = min(moments)
        for flow in active:
            left[flow] -= rates[flow] * (then - now)
            if left[flow] <= 1e-6 * rates[flow]:
                del left[flow]
                ends[flow] = max(then, transfers[flow][3])
        now = then
    return ends


@settings(max_examples=200, deadline=None)
@given(TRANSFERS)
def test_ends_are_those_of_the_slow_twin(transfers: list[tuple[int, int, list[Port], int]]) -> None:
    """To the ns that each of the rate changes may be rounded by."""
    ends, twin = run(transfers), slow_ends(transfers)
    assert ends == pytest.approx(twin, rel=1e-6, abs=2 + 2 * len(transfers))


def test_a_weighted_port_counts_each_byte_that_often() -> None:
    # One device of two moves half of what is striped over both, and all of what lies in it alone.
    links = Links()
    links.open(0, 600, [Port("device", 2.0)], 0)
    links.open(1, 600, [Port("device", 2.0, weight=2)], 0)
    assert links.rates() == {0: pytest.approx(2 / 3), 1: pytest.approx(2 / 3)}
    assert links.next_ns == 900
    links.advance(900)
    links.open(2, 600, [Port("device", 2.0, weight=2)], 900)
    assert links.rates() == {2: 1.0}
