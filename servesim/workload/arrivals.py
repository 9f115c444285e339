"""Arrival times: the usual arrival processes, and other rates for a workload that has its arrivals."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from servesim.errors import InputError
from servesim.workload.entries import MAX_TIME_NS

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from servesim.workload.request import Workload

_LEAST_RATE = 1e-9  # one request in 32 years
ARRIVALS = ("poisson", "gamma", "uniform", "burst")


def arrivals_ns(
    process: str,
    count: int,
    rate: float,
    rng: np.random.Generator,
    *,
    cv: float = 2.0,
    burst_size: int = 10,
) -> NDArray[np.int64]:
    """`count` arrival times in ns, ascending from 0, at `rate` arrivals per second on average (inf: all at
    0).

    poisson: exponential gaps; gamma: gamma gaps with coefficient of variation `cv` (1 would be Poisson, more
    is burstier); uniform: equal gaps; burst: `burst_size` arrivals at once, at equal distances. Gaps are
    whole microseconds, so that a last-bit difference between two machines' logarithms cannot show.
    """
    check_rate(rate)
    if math.isinf(rate):
        return np.zeros(count, dtype=np.int64)
    if process == "poisson":
        gaps = -np.log1p(-rng.random(count)) / rate
    elif process == "gamma":
        if not (math.isfinite(cv) and cv > 0):
            raise InputError(f"cv: {cv} is not possible; the coefficient of variation must be > 0")
        gaps = rng.standard_gamma(1 / cv**2, count) * (cv**2 / rate)
    elif process == "uniform":
        gaps = np.full(count, 1 / rate)
    elif process == "burst":
        if burst_size < 1:
            raise InputError(f"burst size: {burst_size} is not possible; must be >= 1")
        gaps = np.where(np.arange(count) % burst_size == 0, burst_size / rate, 0.0)
    else:
        raise InputError(f"arrival: {process!r} is not known; must be one of {', '.join(ARRIVALS)}")
    gaps[:1] = 0.0
    if float(gaps.sum()) * 1e9 > MAX_TIME_NS:
        raise InputError(
            f"rate: {rate} req/s spreads {count} requests over more than {MAX_TIME_NS} ns; raise the rate"
        )
    arrivals: NDArray[np.int64] = np.cumsum(np.rint(gaps * 1e6).astype(np.int64)) * 1000
    return arrivals


def check_rate(rate: float) -> None:
    """InputError unless `rate` is a positive number of requests per second, or inf."""
    if not rate >= _LEAST_RATE:
        raise InputError(
            f"request rate: {rate} is not possible; must be >= {_LEAST_RATE:g} requests per second, or inf"
        )


def change_rate(workload: Workload, rate: float, seed: int) -> None:
    """Make the entries of `workload` (a session is one) arrive at `rate` per second on average, in place.

    The file's arrival times are stretched or squeezed by one factor, so that their pattern stays; the rate of
    a file is (entries - 1) / (last - first arrival). When all arrive at the same time there is no pattern,
    and a Poisson process seeded with `seed` takes its place, in file order. With inf everything arrives at 0.
    Times between the requests of a session stay as they are.
    """
    check_rate(rate)
    heads = [request for request in workload.requests if request.predecessor < 0]
    old = np.array([request.arrival_ns for request in heads], dtype=np.int64)
    span_ns = int(old.max() - old.min()) if len(old) else 0
    if math.isinf(rate):
        new = np.zeros_like(old)
    elif span_ns == 0:
        new = arrivals_ns("poisson", len(old), rate, np.random.default_rng(seed))
        workload.drawn_arrivals = True
    else:
        scaled = old * ((len(old) - 1) / rate * 1e9 / span_ns)
        if float(scaled.max()) > MAX_TIME_NS:
            raise InputError(
                f"request rate: {rate} req/s makes {workload.source} last longer than {MAX_TIME_NS} ns; "
                "raise the rate"
            )
        new = np.rint(scaled).astype(np.int64)
    arrival_ns = 0
    times = iter(new.tolist())
    for request in workload.requests:  # the requests of a session follow its head
        if request.predecessor < 0:
            arrival_ns = next(times)
        request.arrival_ns = arrival_ns


def reshuffle(workload: Workload, seed: tuple[int, ...]) -> None:
    """Put the gaps between the arrivals of the entries into a random order, in place.

    The entries keep their order, the gaps their sizes: rate and burstiness are those of the file, only where
    the bursts fall differs. Where all arrive at once, their order is what is drawn: they come 1 ns apart.
    """
    heads = [request for request in workload.requests if request.predecessor < 0]
    heads.sort(key=lambda request: request.arrival_ns)
    times = np.array([request.arrival_ns for request in heads], dtype=np.int64)
    rng = np.random.default_rng(seed)
    gaps = rng.permutation(np.diff(times))
    if len(heads) and not gaps.any():
        new = times + rng.permutation(len(heads))
    else:
        new = np.concatenate((times[:1], times[:1] + np.cumsum(gaps)))
    at = {request.index: time for request, time in zip(heads, new.tolist(), strict=True)}
    arrival_ns = 0
    for request in workload.requests:  # the requests of a session follow its head
        arrival_ns = at.get(request.index, arrival_ns)
        request.arrival_ns = arrival_ns
    workload.drawn_arrivals = True


def start_at_zero(workload: Workload) -> None:
    """Move all arrivals so that the earliest is at 0; InputError where they span more than any run may."""
    times = [request.arrival_ns for request in workload.requests]
    earliest = min(times)
    if max(times) - earliest > MAX_TIME_NS:
        raise InputError(
            f"{workload.source}: the times span more than {MAX_TIME_NS} ns (104 days); must be those of one "
            "run"
        )
    for request in workload.requests:
        request.arrival_ns -= earliest
