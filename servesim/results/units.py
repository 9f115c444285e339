"""Numbers as people read them."""

from __future__ import annotations

GIB = 1 << 30
MS = 1_000_000
"""Nanoseconds in a millisecond."""
SECOND = 1_000_000_000
"""Nanoseconds in a second."""


def si(value: float) -> str:
    """A rate in three digits or so: ``0``, ``7.5``, ``860``, ``2.4k``, ``1.3M``."""
    for limit, divisor, suffix in ((999.5e6, 1e9, "G"), (999.5e3, 1e6, "M"), (999.5, 1e3, "k")):
        if value >= limit:
            return f"{value / divisor:.1f}{suffix}"
    return f"{value:.1f}" if 0 < value < 9.95 else f"{value:.0f}"


def digits(value: float) -> str:
    """A number with digits that fit its size: ``1,234``, ``123.4``, ``12.34``, ``0.123``; ``0``."""
    size = abs(value)
    if size == 0:
        return "0"
    if size >= 999.95:
        return f"{value:,.0f}"
    if size >= 99.995:
        return f"{value:.1f}"
    return f"{value:.2f}" if size >= 0.9995 else f"{value:.3f}"


def gib(value_bytes: float) -> str:
    """Bytes as GiB with two decimals, without the unit."""
    return f"{value_bytes / GIB:.2f}"


def seconds(value_ns: float) -> str:
    """Nanoseconds as ``12.3s``, or ``1h02m`` and ``3m05s`` when long."""
    total = value_ns / SECOND
    if total >= 3600:
        minutes = round(total / 60)
        return f"{minutes // 60}h{minutes % 60:02d}m"
    if total >= 600:
        return f"{round(total) // 60}m{round(total) % 60:02d}s"
    return f"{total:.2f}s" if total < 10 else f"{total:.1f}s"
