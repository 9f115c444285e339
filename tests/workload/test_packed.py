"""A workload in few bytes says what the list said."""

from __future__ import annotations

from dataclasses import Field, fields, replace
from typing import Any

import numpy as np
import pytest

from servesim.engine.arrivals import NEVER, Arrivals
from servesim.workload.packed import PackedRequests
from servesim.workload.request import Request, Workload

SPECIAL = [
    Request(3, 30, 5, 40, session_id="s"),
    Request(4, 35, 5, 40, session_id="s", sub_request=1, predecessor=3, tool_ns=7),
    Request(5, 8, 2, 5, priority=-1, lora="a", model="m"),
]
NUMBERS = ("index", "input_tokens", "output_tokens", "arrival_ns", "predecessor", "tool_ns", "priority")


def plain_ones(count: int) -> list[Request]:
    return [Request(i, 10 + i, 1 + i, 100 * (i % 3)) for i in range(count)]


def mixed() -> list[Request]:
    behind = [replace(request, index=6 + place) for place, request in enumerate(plain_ones(4))]
    return [*plain_ones(3), *SPECIAL, *behind]


def test_packed_requests_read_as_the_list() -> None:
    requests = mixed()
    packed = PackedRequests(requests)
    assert list(packed) == requests
    assert [packed[place] for place in range(-10, 10)] == requests * 2
    assert packed[2:5] == requests[2:5]
    assert packed.special == SPECIAL
    assert packed[3] is SPECIAL[0]
    with pytest.raises(IndexError):
        packed[10]


@pytest.mark.parametrize("field", fields(Request)[4:], ids=lambda field: field.name)
def test_no_field_is_lost(field: Field[Any]) -> None:
    value = 7 if isinstance(field.default, int) else np.arange(10) if "NDArray" in str(field.type) else "x"
    request = replace(Request(0, 10, 1, 0), **{field.name: value})
    assert getattr(PackedRequests([request])[0], field.name) is value


@pytest.mark.parametrize("name", NUMBERS)
def test_columns_are_those_of_the_list(name: str) -> None:
    listed, packed = Workload(mixed()), Workload(mixed())
    packed.pack()
    assert isinstance(packed.requests, PackedRequests)
    column = packed.column(name)
    assert column.dtype == np.int64
    assert column.tolist() == listed.column(name).tolist() == [getattr(each, name) for each in mixed()]


def test_a_plain_request_takes_16_bytes_packed() -> None:
    packed = PackedRequests(plain_ones(50))
    kept = (packed._inputs, packed._outputs, packed._arrivals)
    assert sum(column.itemsize * len(column) for column in kept) == 16 * 50
    assert not packed.special


def test_sessions_stay_a_list() -> None:
    workload = Workload([replace(SPECIAL[0], index=0), replace(SPECIAL[1], index=1, predecessor=0)])
    workload.pack()
    assert isinstance(workload.requests, list)


def test_packed_or_not_the_same_requests_arrive() -> None:
    packed = Workload(mixed())
    packed.pack()
    seen = []
    for workload in (Workload(mixed()), packed):
        arrivals, come = Arrivals(workload, max_concurrency=2), []
        inside: list[int] = []
        while arrivals.next_ns < NEVER:
            now = arrivals.next_ns
            found = arrivals.pop()
            come.append(found)
            if found is not None:
                inside.append(found[1])
            if arrivals.next_ns == NEVER and inside:
                arrivals.ended(inside.pop(0), now + 50)
        seen.append(come)
    assert seen[0] == seen[1]
    assert sorted(index for found in seen[0] if found for index in found[1:]) == list(range(10))
