"""Which instance takes a request.

A policy is a callable ``policy(request, candidates) -> Instance``: it gets the request and the instances that
serve its model, in order of their index, and returns one of them. ``module:callable`` names a policy of the
user's own with that signature; what it may look at is :class:`serving.engine.instance.Instance`'s
``num_waiting``, ``num_running``, ``cached_tokens(request)`` and ``log.index``.
"""

from __future__ import annotations

import importlib
import random
from typing import TYPE_CHECKING

from serving.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from serving.engine.instance import Instance
    from serving.workload.request import Request

    Policy = Callable[[Request, Sequence[Instance]], Instance]

_WAITING_WEIGHT = 4
"""A waiting request counts as much as four running ones, as in vLLM's load balancer."""

_MOST_LOAD_FOR_PREFIX = 2.0
"""PREFIX leaves the instance with the longest prefix when it has more than this times the average load."""


def load(instance: Instance) -> int:
    """vLLM's measure of how busy an instance is."""
    return _WAITING_WEIGHT * instance.num_waiting + instance.num_running


def least_loaded(request: Request, candidates: Sequence[Instance]) -> Instance:
    """LOAD: the instance with the least load, the first of equals."""
    del request
    return min(candidates, key=load)


class RoundRobin:
    """RR: one after the other."""

    def __init__(self) -> None:
        self._turn = 0

    def __call__(self, request: Request, candidates: Sequence[Instance]) -> Instance:
        del request
        self._turn += 1
        return candidates[(self._turn - 1) % len(candidates)]


class SeededRandom:
    """RAND: uniformly at random, the same for the same seed."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def __call__(self, request: Request, candidates: Sequence[Instance]) -> Instance:
        del request
        return candidates[self._random.randrange(len(candidates))]


def longest_prefix(request: Request, candidates: Sequence[Instance]) -> Instance:
    """PREFIX: where most of the prompt is cached, unless that instance is far busier than the average."""
    average = sum(map(load, candidates)) / len(candidates)
    best = max(candidates, key=lambda instance: (instance.cached_tokens(request), -load(instance)))
    if best.cached_tokens(request) == 0 or load(best) > _MOST_LOAD_FOR_PREFIX * average + _WAITING_WEIGHT:
        return least_loaded(request, candidates)
    return best


def load_policy(name: str, seed: int) -> Policy:
    """The policy called ``name``: LOAD, RR, RAND, PREFIX or ``module:callable``.

    Raises:
        InputError: the module or the callable does not exist.
    """
    if name == "LOAD":
        return least_loaded
    if name == "RR":
        return RoundRobin()
    if name == "RAND":
        return SeededRandom(seed)
    if name == "PREFIX":
        return longest_prefix
    module_name, _, attribute = name.removeprefix("CUSTOM:").partition(":")
    try:
        policy: Policy = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise InputError(
            f"--request-routing-policy: {name} cannot be loaded ({error}); must be LOAD, RR, RAND, PREFIX or "
            f"module:callable of an importable module"
        ) from error
    if not callable(policy):
        raise InputError(
            f"--request-routing-policy: {name} is not callable; must be a function of (request, candidates)"
        )
    return policy
