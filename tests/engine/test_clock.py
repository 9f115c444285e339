"""The clock: who acts when, and who goes first."""

from __future__ import annotations

import pytest

from servesim.engine.clock import NEVER, Clock, Order


def test_at_equal_times_kv_goes_first_and_steps_last() -> None:
    clock, acted = Clock(), list[str]()
    for order in (Order.STEP, Order.KV, Order.REQUEST):
        clock.at(5, clock.actor(order, lambda _, name=order.name: acted.append(name)))  # type: ignore[misc]
    clock.run()
    assert acted == ["KV", "REQUEST", "STEP"]


def test_of_the_same_order_the_first_made_goes_first() -> None:
    clock, acted = Clock(), list[int]()
    actors = [clock.actor(Order.STEP, lambda _, i=i: acted.append(i)) for i in range(3)]  # type: ignore[misc]
    for actor in reversed(actors):
        clock.at(7, actor)
    clock.run()
    assert acted == [0, 1, 2]


def test_an_actor_that_was_moved_acts_once() -> None:
    clock, acted = Clock(), list[int]()
    actor = clock.actor(Order.KV, acted.append)
    for ns in (9, 4, 9, 6, NEVER, 8):
        clock.at(ns, actor)
    clock.run()
    assert acted == [8]
    assert clock.due_ns(actor) == NEVER


def test_an_actor_may_go_on_at_the_same_time() -> None:
    clock, acted = Clock(), list[int]()

    def again(now_ns: int) -> None:
        acted.append(now_ns)
        if len(acted) < 3:
            clock.at(now_ns, actor)

    actor = clock.actor(Order.REQUEST, again)
    clock.at(2, actor)
    clock.run()
    assert acted == [2, 2, 2]


def test_the_horizon_is_what_can_concern_a_loop() -> None:
    clock, seen = Clock(), list[tuple[int, int]]()
    kv, other = (clock.actor(order, lambda _: None) for order in (Order.KV, Order.STEP))
    loop = clock.actor(
        Order.STEP, lambda _: seen.append((clock.horizon_ns(alone=True), clock.horizon_ns(alone=False)))
    )
    clock.at(30, kv)
    clock.at(15, other)
    clock.at(20, other)  # the place it left does not count
    clock.at(10, loop)
    clock.watch(40, lambda now_ns: now_ns + 100)
    clock.run()
    assert seen == [(30, 20)]


def test_a_watcher_looks_before_an_action_and_keeps_no_run_going() -> None:
    clock, seen = Clock(), list[tuple[str, int]]()
    actor = clock.actor(Order.REQUEST, lambda now_ns: seen.append(("act", now_ns)))

    def look(now_ns: int) -> int:
        seen.append(("look", now_ns))
        return now_ns + 10

    clock.watch(3, look)
    clock.at(5, actor)
    clock.run()
    clock.at(14, actor)
    clock.run()
    clock.at(15, actor)
    clock.run()
    assert seen == [("look", 5), ("act", 5), ("act", 14), ("look", 15), ("act", 15)]


def test_a_time_past_the_end_is_refused() -> None:
    clock = Clock()
    with pytest.raises(OverflowError):
        clock.at(NEVER + 1, clock.actor(Order.STEP, lambda _: None))
