"""Which instance takes a request, with counts given by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from servesim.engine import experts, queue_policy
from servesim.engine.arrivals import NEVER
from servesim.engine.router import ROUTING_POLICIES, Router, least_loaded
from servesim.errors import InputError
from servesim.specs import engine_options, options
from servesim.workload.request import Request

if TYPE_CHECKING:
    from pathlib import Path

REQUEST = Request(7, 100, 10, 0)


class Busy:
    """As much of an instance as the router sees."""

    def __init__(self, index: int, waiting: int, running: int, cached: int = 0, npus: int = 1) -> None:
        self.log = SimpleNamespace(index=index, spec=SimpleNamespace(num_npus=npus))
        self.waiting, self.running, self.cached = waiting, running, cached

    def counts(self) -> tuple[int, int]:
        return self.waiting, self.running

    def cached_tokens(self, request: Request) -> int:
        return min(self.cached, request.input_tokens)


def router(policy: str, *instances: Busy, refresh_ns: int = 0, seed: int = 42) -> Router:
    return Router(cast("Any", instances), policy, seed, refresh_ns)


def choices(chosen: Router, count: int, *allowed: int, role: str = "") -> list[int]:
    return [chosen.choose(REQUEST, allowed, role).index for _ in range(count)]


def test_load_counts_a_waiting_request_as_four_running_ones() -> None:
    assert choices(router("LOAD", Busy(0, 1, 0), Busy(1, 0, 3)), 1, 0, 1) == [1]
    assert choices(router("LOAD", Busy(0, 1, 0), Busy(1, 0, 5)), 1, 0, 1) == [0]


def test_load_takes_the_first_of_equals() -> None:
    assert choices(router("LOAD", Busy(0, 1, 0), Busy(1, 0, 4), Busy(2, 0, 4)), 1, 0, 1, 2) == [0]


def test_an_instance_of_more_npus_carries_more() -> None:
    assert choices(router("LOAD", Busy(0, 0, 3), Busy(1, 0, 10, npus=4)), 1, 0, 1) == [1]


def test_only_the_instances_allowed_are_chosen_from() -> None:
    idle = [Busy(i, 0, 0) for i in range(4)]
    for policy in ("LOAD", "RR", "RAND", "PREFIX"):
        assert set(choices(router(policy, *idle), 20, 1, 3)) <= {1, 3}


def test_round_robin_takes_turns_on_each_side_apart() -> None:
    turns = router("RR", *[Busy(i, 0, 0) for i in range(5)])
    assert choices(turns, 3, 0, 1) == [0, 1, 0]
    assert choices(turns, 4, 2, 3, 4, role="decode") == [2, 3, 4, 2]
    assert choices(turns, 2, 0, 1) == [1, 0]


def test_random_choices_follow_the_seed() -> None:
    idle = [Busy(i, 0, 0) for i in range(4)]
    first, again, other = (choices(router("RAND", *idle, seed=s), 40, 0, 1, 2, 3) for s in (1, 1, 2))
    assert first == again != other
    assert set(first) == {0, 1, 2, 3}


def test_prefix_goes_where_most_is_cached() -> None:
    assert choices(router("PREFIX", Busy(0, 0, 0), Busy(1, 0, 3, cached=32)), 1, 0, 1) == [1]
    alike = router("PREFIX", Busy(0, 0, 3, cached=32), Busy(1, 0, 2, cached=32))
    assert choices(alike, 1, 0, 1) == [1]


def test_prefix_without_a_hit_is_load() -> None:
    assert choices(router("PREFIX", Busy(0, 0, 2), Busy(1, 0, 1)), 1, 0, 1) == [1]


def test_prefix_leaves_an_instance_far_busier_than_the_average() -> None:
    # average load of (L, 0) is L/2; 2 x L/2 + 4 is above L always, so it takes a third instance to be left
    assert choices(router("PREFIX", Busy(0, 2, 0, cached=64), Busy(1, 0, 0)), 1, 0, 1) == [0]
    three = router("PREFIX", Busy(0, 0, 13, cached=64), Busy(1, 0, 0), Busy(2, 0, 0))
    assert choices(three, 1, 0, 1, 2) == [1]  # 13 > 2 x 13/3 + 4
    three = router("PREFIX", Busy(0, 0, 12, cached=64), Busy(1, 0, 0), Busy(2, 0, 0))
    assert choices(three, 1, 0, 1, 2) == [0]  # 12 = 2 x 12/3 + 4


def test_live_counts_are_those_of_the_moment() -> None:
    first, second = Busy(0, 0, 1), Busy(1, 0, 2)
    live = router("LOAD", first, second)
    assert live.next_ns == NEVER
    assert choices(live, 1, 0, 1) == [0]
    first.waiting = 1
    live.acted.add(0)  # as its step loop says when it has done something
    assert choices(live, 1, 0, 1) == [1]


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3), st.integers(0, 9)), max_size=30))
def test_load_kept_up_to_date_is_load_asked_for(changes: list[tuple[int, int, int]]) -> None:
    """The slow twin asks every instance each time."""
    instances = [Busy(index, 0, 0, npus=1 + index % 2) for index in range(5)]
    kept, asked = router("LOAD", *instances), router("LOAD", *instances)
    for index, waiting, running in changes:
        instances[index].waiting, instances[index].running = waiting, running
        kept.acted.add(index)
        candidates = asked._candidates
        assert kept.choose(REQUEST, range(5)).index == least_loaded(REQUEST, candidates).index


def test_stale_counts_know_what_was_sent_since_and_nothing_else() -> None:
    first, second = Busy(0, 0, 50), Busy(1, 0, 0)
    stale = router("LOAD", first, second, refresh_ns=100)
    assert stale.next_ns == 100
    for expected in (0, 1, 0):  # nothing seen yet, so both look idle
        chosen = stale.choose(REQUEST, (0, 1))
        assert chosen.index == expected
        chosen.expect_one()
    stale.refresh(730)
    assert stale.next_ns == 800
    assert choices(stale, 1, 0, 1) == [1]


def test_a_request_on_its_way_to_a_decode_instance_counts_once() -> None:
    stale = router("LOAD", Busy(0, 0, 0), Busy(1, 0, 6), refresh_ns=100)
    stale.refresh(0)
    chosen = stale.choose(REQUEST, (0, 1), "decode")
    chosen.on_the_way += 1
    assert (chosen.index, chosen.num_waiting, chosen.load) == (0, 1, 4)
    chosen.on_the_way -= 1
    chosen.expect_one()  # it has arrived
    assert (chosen.num_waiting, chosen.load) == (1, 4)


@pytest.fixture
def policies(root: Path) -> str:
    """A module in the working directory; returns its name."""
    name = f"own_{root.name.replace('-', '_')}"
    (root / f"{name}.py").write_text(
        "def last(request, candidates):\n"
        "    return candidates[-1]\n"
        "class Alternate:\n"
        "    def __init__(self):\n"
        "        self.calls = 0\n"
        "    def __call__(self, request, candidates):\n"
        "        self.calls += 1\n"
        "        return candidates[self.calls % 2]\n"
        "class Needs:\n"
        "    def __init__(self, something): ...\n"
        "def wrong(request, candidates):\n"
        "    return 1\n"
        "number = 3\n"
        "def fails(request, candidates):\n"
        "    return {}['x']\n"
        "def leaves(request, candidates):\n"
        "    raise SystemExit(7)\n"
    )
    return name


def test_a_policy_of_ones_own_lies_in_the_working_directory(policies: str) -> None:
    idle = [Busy(i, 0, 0) for i in range(3)]
    assert choices(router(f"{policies}:last", *idle), 2, 0, 1, 2) == [2, 2]
    assert choices(router(f"CUSTOM:{policies}:last", *idle), 1, 0, 1, 2) == [2]


def test_a_class_starts_anew_in_every_run_and_on_each_side(policies: str) -> None:
    idle = [Busy(i, 0, 0) for i in range(4)]
    for _ in range(2):
        own = router(f"{policies}:Alternate", *idle)
        assert choices(own, 3, 0, 1) == [1, 0, 1]
        assert choices(own, 2, 2, 3, role="decode") == [3, 2]


@pytest.mark.parametrize(
    ("attribute", "complaint"),
    [
        ("nothing", "cannot be loaded"),
        ("number", "is not callable; must be a function of (request, candidates)"),
        ("Needs", "is a class that cannot be made"),
    ],
)
def test_a_policy_that_cannot_be_used_is_told(policies: str, attribute: str, complaint: str) -> None:
    with pytest.raises(InputError) as error:
        router(f"{policies}:{attribute}", Busy(0, 0, 0))
    assert str(error.value).startswith(f"--request-routing-policy: {policies}:{attribute} {complaint}")


@pytest.mark.parametrize(("attribute", "raised"), [("fails", "KeyError: 'x'"), ("leaves", "SystemExit: 7")])
def test_an_error_in_a_policy_is_told_as_its_own(policies: str, attribute: str, raised: str) -> None:
    with pytest.raises(
        InputError, match=f"{policies}:{attribute} failed when it was asked: .* {raised}; the fault"
    ):
        choices(router(f"{policies}:{attribute}", Busy(0, 0, 0), Busy(1, 0, 0)), 1, 0, 1)


@pytest.mark.parametrize("line", ["raise RuntimeError('no')", "import sys\nsys.exit(3)", "x = ("])
def test_a_module_that_fails_is_told(root: Path, line: str) -> None:
    name = f"bad_{len(line)}_{root.name.replace('-', '_')[:20]}"
    (root / f"{name}.py").write_text(line + "\n")
    with pytest.raises(
        InputError, match=f"--request-routing-policy: {name}:f failed while it was imported: "
    ):
        router(f"{name}:f", Busy(0, 0, 0))


def test_a_policy_that_returns_no_candidate_is_told(policies: str) -> None:
    with pytest.raises(InputError, match="returned 1 for request 7; must be one of the 2 candidates"):
        choices(router(f"{policies}:wrong", Busy(0, 0, 0), Busy(1, 0, 0)), 1, 0, 1)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("import sys\nsys.exit(3)\n", "while it was imported: {file}, line 2: SystemExit: 3"),
        ("\n1 / 0\n", "while it was imported: {file}, line 2: ZeroDivisionError: division by zero"),
        ("def pick(:\n", "while it was imported: {file}, line 1: SyntaxError"),
        (
            "class pick:\n    def __init__(self):\n        raise OSError('no')\n",
            "while its object was made: {file}, line 3: OSError: no",
        ),
        (
            "def pick(request, candidates):\n    return candidates[len(candidates)]\n",
            "when it was asked: {file}, line 2: IndexError: list index out of range",
        ),
        ("def pick(*_):\n    raise SystemExit\n", "when it was asked: {file}, line 2: SystemExit"),
        ("def pick(*_):\n    import json\n    json.loads('{')\n", "when it was asked: {file}, line 3: JSON"),
    ],
)
def test_a_policy_that_fails_is_told_as_its_own_fault(root: Path, text: str, complaint: str) -> None:
    name = f"failing_{root.name}"
    file = root / f"{name}.py"
    file.write_text(text)
    with pytest.raises(InputError) as error:
        choices(router(f"{name}:pick", Busy(0, 0, 0), Busy(1, 0, 0)), 1, 0, 1)
    expected = f"--request-routing-policy: {name}:pick failed {complaint.format(file=file)}"
    assert str(error.value).startswith(expected)
    assert str(error.value).endswith("the fault is in that module, not in servesim")


def test_every_policy_that_an_option_names_is_there() -> None:
    assert set(options.ROUTING_POLICIES) == set(ROUTING_POLICIES)
    assert set(options.EXPERT_POLICIES) == set(experts.EXPERT_POLICIES)
    assert set(engine_options.SCHEDULING_POLICIES) == set(queue_policy.QUEUE_POLICIES)
