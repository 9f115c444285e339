"""Which instance takes a request.

A policy is a callable ``policy(request, candidates) -> candidate``: it gets the request and what can be known
of the instances that may take it, in order of their index, and returns one of them. ``module:callable`` names
a custom policy with that signature; a class is called without arguments first, once for every run
and side (prefill and decode), so that its objects can remember things. A candidate has ``index``,
``num_waiting``, ``num_running``, ``load`` and ``cached_tokens(request)``.
"""

from __future__ import annotations

import random
from importlib import import_module
from operator import attrgetter
from typing import TYPE_CHECKING, Protocol

from servesim.engine.arrivals import NEVER
from servesim.engine.custom_policy import call_custom_policy, load_custom_policy
from servesim.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from servesim.results.records import InstanceLog
    from servesim.workload.request import Request

    Policy = Callable[[Request, Sequence["Candidate"]], "Candidate"]

_WAITING_WEIGHT = 4
"""A waiting request counts as much as four running ones, as in vLLM's load balancer."""

_COUNTING = ("LOAD", "RR", "RAND")
"""Policies that go by the counts of waiting and running requests at most."""

_BLIND = ("RR", "RAND")
"""Those that go by turns or by chance."""

_load_of = attrgetter("load")

_MOST_LOAD_FOR_PREFIX = 2.0
"""PREFIX leaves the instance with the longest prefix when it has more than this times the average load."""


class Routed(Protocol):
    """What the router knows an instance by; see :class:`servesim.engine.instance.Instance`."""

    @property
    def log(self) -> InstanceLog: ...

    def counts(self) -> tuple[int, int]: ...

    def cached_tokens(self, request: Request) -> int: ...


class Candidate:
    """An instance as the router sees it: its counts may be as old as the last refresh."""

    __slots__ = ("_instance", "_npus", "_seen", "in_front", "index", "on_the_way")

    def __init__(self, instance: Routed, live: bool) -> None:
        self._instance = instance
        self._seen: tuple[int, int] | None = None if live else (0, 0)
        self._npus = instance.log.spec.num_npus
        self.index = instance.log.index
        """Number of the instance in the cluster."""
        self.in_front = 0
        """Requests that were given to the instance and are still in its front end."""
        self.on_the_way = 0
        """Requests whose prompt is being computed elsewhere and that will be decoded here."""

    @property
    def num_waiting(self) -> int:
        """Requests that wait, those on their way included."""
        return (self._seen or self._counts())[0] + self.on_the_way

    @property
    def num_running(self) -> int:
        """Requests that run: admitted, and not ended or preempted."""
        return (self._seen or self._counts())[1]

    @property
    def load(self) -> float:
        """vLLM's measure of how busy an instance is, per NPU."""
        seen = self._seen
        waiting, running = self._counts() if seen is None else seen
        return (_WAITING_WEIGHT * (waiting + self.on_the_way) + running) / self._npus

    def cached_tokens(self, request: Request) -> int:
        """Tokens of the request's prompt in the instance's prefix cache right now."""
        return self._instance.cached_tokens(request)

    def enter_front(self) -> None:
        """Count a request that was given to the instance and is in its front end."""
        self.in_front += 1

    def leave_front(self) -> None:
        """One of them is about to be queued here."""
        self.in_front -= 1

    def announce(self) -> None:
        """Count a request whose prompt is being computed elsewhere and that will be decoded here."""
        self.on_the_way += 1

    def announced_came(self) -> None:
        """A request that was announced is about to be queued here."""
        self.on_the_way -= 1

    def refresh(self) -> None:
        """See the counts of now."""
        self._seen = self._counts()

    def _counts(self) -> tuple[int, int]:
        waiting, running = self._instance.counts()
        return waiting + self.in_front, running

    def expect_one(self) -> None:
        """Count a request that is queued there since the last refresh; live counts have it already."""
        if self._seen is not None:
            self._seen = self._seen[0] + 1, self._seen[1]


class Router:
    """Chooses instances by one policy, from live counts or from counts refreshed every so often."""

    def __init__(self, instances: Sequence[Routed], policy: str, seed: int, refresh_ns: int = 0) -> None:
        """
        Args:
            instances: in order of their index.
            policy: LOAD, RR, RAND, PREFIX or ``module:callable``.
            seed: of RAND.
            refresh_ns: time between refreshes of the counts in ns; 0 means always live.
        """
        self._candidates = [Candidate(instance, live=not refresh_ns) for instance in instances]
        self._policy = policy
        self._seed = seed
        self._policies: dict[str, Policy] = {"": load_policy(policy, seed)}
        self._loads = [0.0] * len(instances) if policy == "LOAD" and not refresh_ns else []
        """Load of every instance, where LOAD goes by live counts; a stale one is that of an instance in
        ``acted``."""
        self.acted: set[int] = set(range(len(instances)))
        """Instances whose counts may have changed since a request was last given to one."""
        self._refresh_ns = refresh_ns
        self.next_ns = refresh_ns or NEVER
        """When the counts are refreshed next."""

    @property
    def looks_at_counts(self) -> bool:
        """Whether nothing of an instance matters but how many requests wait and run there."""
        return self._policy in _COUNTING

    @property
    def looks_at_nothing(self) -> bool:
        """Whether not even those matter."""
        return self._policy in _BLIND

    def refresh(self, now_ns: int) -> int:
        """Refresh the counts, at the last time due; returns when they are refreshed next."""
        for candidate in self._candidates:
            candidate.refresh()
        self.next_ns = (now_ns // self._refresh_ns + 1) * self._refresh_ns
        return self.next_ns

    def choose(self, request: Request, allowed: Sequence[int], role: str = "") -> Candidate:
        """One of the instances ``allowed`` by index; every ``role`` has its own turn or random numbers."""
        if len(allowed) == 1:
            return self._candidates[allowed[0]]
        if self._loads and len(allowed) == len(self._loads):
            return self._least_loaded()
        candidates = [self._candidates[index] for index in allowed]
        if role not in self._policies:
            self._policies[role] = load_policy(self._policy, self._seed + len(self._policies))
        return self._policies[role](request, candidates)

    def sent(self, index: int) -> None:
        """A request enters the front end of instance ``index``."""
        self._candidates[index].enter_front()
        self.acted.add(index)

    def received(self, index: int) -> None:
        """One has left the front end of instance ``index`` for its engine."""
        self._candidates[index].leave_front()
        self.acted.add(index)

    def _least_loaded(self) -> Candidate:
        """What LOAD chooses of all instances, after a look at those alone that have done something."""
        loads, candidates = self._loads, self._candidates
        for index in self.acted:
            loads[index] = candidates[index].load
        self.acted.clear()
        return candidates[loads.index(min(loads))]


def least_loaded(request: Request, candidates: Sequence[Candidate]) -> Candidate:
    """LOAD: the instance with the least load, the first of equals."""
    del request
    return min(candidates, key=_load_of)


class RoundRobin:
    """RR: one after the other."""

    def __init__(self, _seed: int = 0) -> None:
        self._turn = 0

    def __call__(self, request: Request, candidates: Sequence[Candidate]) -> Candidate:
        del request
        self._turn += 1
        return candidates[(self._turn - 1) % len(candidates)]


class SeededRandom:
    """RAND: uniformly at random, the same for the same seed."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def __call__(self, request: Request, candidates: Sequence[Candidate]) -> Candidate:
        del request
        return candidates[self._random.randrange(len(candidates))]


def longest_prefix(request: Request, candidates: Sequence[Candidate]) -> Candidate:
    """PREFIX: where most of the prompt is cached, unless that instance is far busier than the average."""
    average = sum(candidate.load for candidate in candidates) / len(candidates)
    best = max(candidates, key=lambda candidate: (candidate.cached_tokens(request), -candidate.load))
    if best.cached_tokens(request) == 0 or best.load > _MOST_LOAD_FOR_PREFIX * average + _WAITING_WEIGHT:
        return least_loaded(request, candidates)
    return best


ROUTING_POLICIES = {
    "LOAD": "servesim.engine.router:least_loaded",
    "RR": "servesim.engine.router:RoundRobin",
    "RAND": "servesim.engine.router:SeededRandom",
    "PREFIX": "servesim.engine.router:longest_prefix",
}
"""Name -> module:function of the policy, or module:class, whose objects are made from a seed. One more needs
its name in :mod:`servesim.specs.options`."""


def load_policy(name: str, seed: int) -> Policy:
    """The policy called ``name``: LOAD, RR, RAND, PREFIX or ``module:callable``.

    Raises:
        InputError: the module or the callable does not exist.
    """
    if name in ROUTING_POLICIES:
        module, _, attribute = ROUTING_POLICIES[name].partition(":")
        found = getattr(import_module(module), attribute)
        policy: Policy = found(seed) if isinstance(found, type) else found
        return policy
    arguments = "request, candidates"
    custom = load_custom_policy(name, "--request-routing-policy", ", ".join(ROUTING_POLICIES), arguments)
    return _Checked(name, custom)


class _Checked:
    """A custom policy, whose answers are looked at."""

    def __init__(self, name: str, policy: Policy) -> None:
        self._name = name
        self._policy = policy

    def __call__(self, request: Request, candidates: Sequence[Candidate]) -> Candidate:
        chosen: object = call_custom_policy(  # anything, so no type for compiled code to check
            self._name, "--request-routing-policy", self._policy, request, candidates
        )
        for candidate in candidates:
            if chosen is candidate:
                return candidate
        raise InputError(
            f"--request-routing-policy: {self._name} returned {chosen!r} for request {request.index}; "
            f"must be one of the {len(candidates)} candidates it is given"
        )
