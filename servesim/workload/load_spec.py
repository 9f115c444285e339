"""Specs of inference-perf: a YAML file that describes a load instead of listing requests.

Read are ``load`` (``type`` constant or poisson, ``stages`` of ``rate`` per second and ``duration`` in s,
and ``interval``, the pause in s between stages) and ``data`` (``type`` random or synthetic with
``input_distribution`` and ``output_distribution`` of ``min``, ``max``, ``mean``, ``std_dev``; or
shared_prefix with ``num_groups``, ``num_prompts_per_group``, ``system_prompt_len``, ``question_len``,
``output_len``). What else is in the file is about servers and reports, and is not used. Chance comes from
the seed.
"""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from servesim.errors import InputError
from servesim.workload.entries import MAX_TOKENS, REQUEST_BYTES, MemoryBudget, shown
from servesim.workload.generators import Distribution
from servesim.workload.request import Request, Workload

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from servesim.workload.formats import Loading

_log = logging.getLogger("servesim")
_DATA = ("random", "synthetic", "shared_prefix")


def load_spec(source: str, lines: Iterator[tuple[int, bytes]], loading: Loading) -> Workload:
    """The requests that a spec describes; always the same for the same spec and seed."""
    spec = _parsed(source, lines)
    rng_times, rng_lengths = (
        np.random.Generator(np.random.PCG64(seed)) for seed in np.random.SeedSequence(loading.seed).spawn(2)
    )
    arrivals = _arrivals_ns(source, _section(source, spec, "load"), rng_times)
    data = _section(source, spec, "data")
    kind = data.get("type")
    if kind not in _DATA:
        raise InputError(
            f"{source}: data.type: {shown(kind)} cannot be drawn here; must be one of {', '.join(_DATA)}; a "
            "data set of texts is a workload file of its own"
        )
    count = min(len(arrivals), loading.num_reqs or len(arrivals))
    MemoryBudget(source).take(count * REQUEST_BYTES)
    workload = Workload(source=source, drawn_arrivals=True)
    if kind == "shared_prefix":
        _add_shared(workload, source, data, arrivals[:count], rng_lengths)
        return workload
    lengths = [
        _distribution(source, data, f"{side}_distribution").draw_whole(count, rng_lengths)
        for side in ("input", "output")
    ]
    for index, arrival_ns in enumerate(arrivals[:count].tolist()):
        workload.requests.append(Request(index, int(lengths[0][index]), int(lengths[1][index]), arrival_ns))
    return workload


def _parsed(source: str, lines: Iterator[tuple[int, bytes]]) -> dict[str, Any]:
    import yaml

    try:
        spec = yaml.safe_load(b"\n".join(line.rstrip(b"\n") for _, line in lines))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{source}: is no YAML file: {' '.join(str(error).split())}") from None
    if not isinstance(spec, dict) or "load" not in spec or "data" not in spec:
        raise InputError(
            f"{source}: is YAML without load and data; an inference-perf spec has both, other workloads are "
            "no YAML"
        )
    return spec


def _section(source: str, spec: dict[str, Any], name: str) -> dict[str, Any]:
    found = spec.get(name)
    if not isinstance(found, dict):
        raise InputError(f"{source}: {name}: {shown(found)} is not a section; must be keys and values")
    return found


def _number(source: str, where: str, value: object, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise InputError(
            f"{source}: {where}: {shown(value)} is not possible; must be from {low:g} to {high:g}"
        )
    return float(value)


def _arrivals_ns(source: str, load: dict[str, Any], rng: np.random.Generator) -> NDArray[np.int64]:
    """Arrival times in ns, ascending; a constant load sends at equal distances, any other as Poisson does."""
    stages = load.get("stages")
    if not isinstance(stages, list) or not stages:
        raise InputError(f"{source}: load.stages: {shown(stages)} must be a list of rate and duration")
    kind = load.get("type", "constant")
    if kind not in ("constant", "poisson"):
        raise InputError(
            f"{source}: load.type: {shown(kind)} cannot be drawn here; must be constant or poisson"
        )
    pause_s = _number(source, "load.interval", load.get("interval", 1.0), 0, 1e6)
    begun_s, times = 0.0, []
    budget = MemoryBudget(source)
    for number, stage in enumerate(stages):
        where = f"load.stages[{number}]"
        if not isinstance(stage, dict):
            raise InputError(f"{source}: {where}: {shown(stage)} must have rate and duration")
        rate = _number(source, f"{where}.rate", stage.get("rate"), 1e-6, 1e6)
        duration_s = _number(source, f"{where}.duration", stage.get("duration"), 1e-3, 1e7)
        count = math.floor(rate * duration_s)
        budget.take(16 * count)
        # a Poisson process of a given count: so many independent times within the stage
        drawn = np.sort(rng.random(count)) * duration_s
        times.append(begun_s + (np.arange(count) / rate if kind == "constant" else drawn))
        begun_s += duration_s + pause_s
    found = np.rint(np.concatenate(times) * 1e6).astype(np.int64) * 1000
    if not len(found):
        raise InputError(f"{source}: load.stages: send no request; raise rate or duration")
    arrivals: NDArray[np.int64] = found - found[0]
    return arrivals


def _distribution(source: str, data: dict[str, Any], name: str) -> Distribution:
    """A normal distribution of lengths, cut off at its ends."""
    given = data.get(name)
    if not isinstance(given, dict):
        raise InputError(f"{source}: data.{name}: {shown(given)} must have min, max, mean and std_dev")
    low, high = (
        _number(source, f"data.{name}.{key}", given.get(key, default), 1, MAX_TOKENS)
        for key, default in (("min", 10), ("max", 1024))
    )
    mean = _number(source, f"data.{name}.mean", given.get("mean", (low + high) / 2), 1, MAX_TOKENS)
    std = _number(source, f"data.{name}.std_dev", given.get("std_dev", 0), 0, MAX_TOKENS)
    if low > high:
        raise InputError(f"{source}: data.{name}: min is above max")
    return Distribution("normal", mean, std, low, high)


def _add_shared(
    workload: Workload,
    source: str,
    data: dict[str, Any],
    arrivals: NDArray[np.int64],
    rng: np.random.Generator,
) -> None:
    """Prompts of groups that begin with the group's own text; every prompt of every group comes in turn."""
    given = _section(source, data, "shared_prefix")
    groups, per_group, prefix, question, output = (
        int(_number(source, f"data.shared_prefix.{key}", given.get(key, default), 1, 2**24))
        for key, default in (
            ("num_groups", 10),
            ("num_prompts_per_group", 10),
            ("system_prompt_len", 100),
            ("question_len", 50),
            ("output_len", 50),
        )
    )
    order = np.argsort(rng.random(groups * per_group), kind="stable")
    # a hash a token would be the prompt again: the group's text is one hash, the question another
    per_hash = math.gcd(prefix, question)
    head, tail = prefix // per_hash, question // per_hash
    for index, arrival_ns in enumerate(arrivals.tolist()):
        prompt = int(order[index % len(order)])
        first = prompt % groups * head
        hashes = np.concatenate(
            (np.arange(first, first + head), groups * head + prompt * tail + np.arange(tail))
        )
        workload.requests.append(
            Request(
                *(index, prefix + question, output, arrival_ns),
                hashes=hashes.astype(np.int64),
                tokens_per_hash=per_hash,
                hashed_tokens=prefix + question,
            )
        )
    if len(arrivals) > len(order):
        _log.warning(
            "%s: %d requests come of %d prompts, so that whole prompts repeat",
            *(source, len(arrivals), len(order)),
        )
