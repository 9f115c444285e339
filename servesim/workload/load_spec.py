"""Specs of inference-perf: a YAML file that describes a load instead of listing requests.

Read are ``load`` (``type`` constant or poisson, ``stages`` of ``rate`` per second and ``duration`` in s,
and ``interval``, the pause in s between stages) and ``data`` (``type`` random or synthetic with
``input_distribution`` and ``output_distribution``; or shared_prefix). Names, defaults and the ways of drawing
are those of inference-perf 0.7; it also waits for the last answer of a stage before the next one, which no
spec can tell. What else is in the file is about servers and reports, and is not used. Chance comes from the
seed.
"""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from servesim.errors import InputError
from servesim.workload.entries import MAX_TOKENS, REQUEST_BYTES, MemoryBudget, shown
from servesim.workload.generators import Distribution, normal
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
    _refuse(source, "data", data, ("multimodal", "trace"))
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
        _lengths(source, f"data.{name}", data.get(name), count, rng_lengths)
        for name in ("input_distribution", "output_distribution")
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


def _refuse(source: str, where: str, section: dict[str, Any], names: tuple[str, ...]) -> None:
    for name in names:
        if section.get(name):
            raise InputError(f"{source}: {where}.{name}: cannot be drawn here; leave it out")


def _arrivals_ns(source: str, load: dict[str, Any], rng: np.random.Generator) -> NDArray[np.int64]:
    """Arrival times in ns, ascending."""
    _refuse(source, "load", load, ("sweep", "trace", "lora_traffic_split"))
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
        # inference-perf's constant load has exponential gaps too, but they add up to the duration
        drawn = np.cumsum(-np.log1p(-rng.random(count))) / rate
        if kind == "constant" and count:
            drawn *= duration_s / drawn[-1]
        times.append(begun_s + drawn)
        begun_s += max(duration_s, *drawn[-1:].tolist(), 0.0) + pause_s
    found = np.rint(np.concatenate(times) * 1e6).astype(np.int64) * 1000
    if not len(found):
        raise InputError(f"{source}: load.stages: send no request; raise rate or duration")
    arrivals: NDArray[np.int64] = found - found[0]
    return arrivals


def _lengths(
    source: str, where: str, given: object, count: int, rng: np.random.Generator, *, shared: bool = False
) -> NDArray[np.int64]:
    """``count`` lengths of a distribution, shape (count,).

    ``shared``: as for shared prefixes, where a lognormal distribution does not start at ``min``, a uniform
    one has one number more, and a number alone is fixed.
    """
    if shared and isinstance(given, int) and not isinstance(given, bool):
        return np.full(count, int(_number(source, where, given, 1, MAX_TOKENS)), dtype=np.int64)
    if not isinstance(given, dict):
        raise InputError(f"{source}: {where}: {shown(given)} must have min, max, mean and std_dev")
    low = _number(source, f"{where}.min", given.get("min", 10), 0 if shared else 1, MAX_TOKENS)
    high = _number(source, f"{where}.max", given.get("max", 1024), 1, MAX_TOKENS)
    mean = _number(source, f"{where}.mean", given.get("mean", 512), 1, MAX_TOKENS)
    std = _number(source, f"{where}.std_dev", given.get("std_dev", 200), 0, MAX_TOKENS)
    if given.get("variance") is not None:
        std = math.sqrt(_number(source, f"{where}.variance", given["variance"], 0, MAX_TOKENS**2))
    if low > high:
        raise InputError(f"{source}: {where}: min is above max")
    kind = given.get("type", "normal")
    if kind == "fixed":
        drawn = np.full(count, math.floor(mean), dtype=np.float64)
        low, high = 1, MAX_TOKENS
    elif kind == "uniform":
        drawn = low + (high + shared - low) * rng.random(count)
    elif kind == "lognormal":
        start = 0.0 if shared else low
        above = mean - start if mean > start else 1.0
        drawn = start + Distribution(kind, above, std, 0.0, math.inf).draw(count, rng)
    elif kind == "normal":
        if not shared and not low <= mean <= high:
            raise InputError(f"{source}: {where}.mean: {mean:g} is not possible; must be from min to max")
        drawn = mean + std * normal(count, rng)
    else:
        raise InputError(
            f"{source}: {where}.type: {shown(kind)} cannot be drawn here; must be normal, lognormal, uniform "
            "or fixed"
        )
    return np.maximum(np.rint(np.clip(drawn, low, high)), 1).astype(np.int64)


def _add_shared(
    workload: Workload,
    source: str,
    data: dict[str, Any],
    arrivals: NDArray[np.int64],
    rng: np.random.Generator,
) -> None:
    """Prompts of groups that begin with the group's own text; every prompt of every group comes in turn."""
    given, where = _section(source, data, "shared_prefix"), "data.shared_prefix"
    _refuse(source, where, given, ("enable_multi_turn_chat", "multimodal"))
    groups, per_group, prefix = (
        int(_number(source, f"{where}.{names[0]}", _named(given, names, default), 1, 2**24))
        for names, default in (
            (("num_groups", "num_unique_system_prompts"), 10),
            (("num_prompts_per_group", "num_users_per_system_prompt"), 10),
            (("system_prompt_len",), 100),
        )
    )
    count = groups * per_group
    MemoryBudget(source).take(32 * count)
    questions, outputs = (
        _lengths(source, f"{where}.{names[0]}", _named(given, names, 50), count, rng, shared=True)
        for names in (("question_distribution", "question_len"), ("output_distribution", "output_len"))
    )
    order = np.argsort(rng.random(count), kind="stable")
    # a hash a token would be the prompt again: one stands for the group's text, others for the question
    tails = -(-questions // prefix)
    ends = groups + np.cumsum(tails)
    for index, arrival_ns in enumerate(arrivals.tolist()):
        prompt = int(order[index % count])
        tail = np.arange(ends[prompt] - tails[prompt], ends[prompt])
        tokens = prefix + int(questions[prompt])
        workload.requests.append(
            Request(
                *(index, tokens, int(outputs[prompt]), arrival_ns),
                hashes=np.concatenate(([prompt // per_group], tail)).astype(np.int64),
                tokens_per_hash=prefix,
                hashed_tokens=tokens,
            )
        )
    if len(arrivals) > count:
        _log.warning(
            "%s: %d requests come of %d prompts, so that whole prompts repeat",
            *(source, len(arrivals), count),
        )


def _named(given: dict[str, Any], names: tuple[str, ...], default: int) -> object:
    """What is there under one of several names."""
    return next((given[name] for name in names if given.get(name) is not None), default)
