"""The KV dial as text and as a plot."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from servesim.results.table import Table
from servesim.terminal import screen_width, wrapped

if TYPE_CHECKING:
    from servesim.explore.kv_dial import Figure, KvDial, KvRow

_SAYS = {"unknown": "unknown", "not simulated": "not simulated"}


def dial_text(dial: KvDial) -> str:
    """Heading, one line a format, notes."""
    from servesim.explore.kv_dial import LENGTHS

    low, likely, high = dial.room_gib
    left = f"{likely:.2f} GiB ({low:.2f} to {high:.2f}) left for the KV cache"
    if likely <= 0:
        left = f"{-likely:.2f} GiB more than there is room for"
    head = (
        f"{dial.model} on {dial.hardware}, tp {dial.tp}: {dial.weight_gib:.2f} GiB of weights a GPU, {left}"
    )
    managers = len({row.hybrid for row in dial.rows}) > 1
    titles = ["KV format", *(["manager"] if managers else []), "B/token", "B/block", "tokens", "band"]
    titles += [f"{length // 1024}k" for length in LENGTHS]
    titles += ["step ms", "even from", "prefill"]
    table = Table(titles, kept=2 if managers else 1)
    for row in dial.rows:
        name = row.kv_format + (" (auto)" if row.kv_format == dial.auto_format else "")
        manager = ["hybrid" if row.hybrid else "one"] if managers else []
        table.rows.append([name, *manager, *_memory_cells(row), *_time_cells(row)])
    told = [f"{', '.join(titles[-6:-3])}: requests of so many tokens that fit at once", *dial.notes]
    notes = "\n".join(wrapped(f"note: {note}", indent="  ") for note in told)
    return "\n\n".join([wrapped(head), table.plain(width=screen_width()), notes])


def _memory_cells(row: KvRow) -> list[str]:
    if row.refused:
        return ["refused", *[""] * (3 + len(row.requests or (0, 0, 0)))]
    counts = ["-" if count is None else f"{count:,}" for count in row.requests.values()]
    assert row.band_tokens is not None
    band = "-".join(f"{tokens:,}" for tokens in row.band_tokens)
    return [f"{row.bytes_per_token:,.0f}", f"{row.bytes_per_block:,}", f"{row.tokens:,}", band, *counts]


def _time_cells(row: KvRow) -> list[str]:
    if row.refused:
        return ["", "", ""]
    even, prefill = row.break_even, row.prefill_percent
    even_text = _SAYS.get(even.origin) or ("never" if even.value is None else f"{even.value:,.0f}")
    prefill_text = _SAYS.get(prefill.origin) or f"{prefill.value:+.1f}%"
    if row.prefill_percent.value == 0.0 and even.origin == "unknown":
        even_text, prefill_text = "-", "-"
    return [_step(row.step_ms), even_text, prefill_text]


def _step(figure: Figure) -> str:
    if figure.value is None:
        return _SAYS[figure.origin]
    if figure.origin == "derived":
        return f"~{figure.value:.2f} ({figure.low:.2f}-{figure.high:.2f})"
    return f"{figure.value:.2f}"


def save_plot(dial: KvDial, path: str | Path) -> None:
    """Bars of the tokens that fit, with the band, and of the decode step.

    Raises:
        InputError: matplotlib is not installed.
    """
    from servesim.results.figures import new_figure, require_matplotlib, save_figure

    require_matplotlib("--plot")
    rows = [row for row in dial.rows if not row.refused]
    names = [row.kv_format + ("" if row.hybrid else ", one manager") for row in rows]
    figure = new_figure(11, 1.5 + 0.4 * len(rows))
    left, right = figure.subplots(1, 2, sharey=True)
    tokens = [row.tokens or 0 for row in rows]
    bands = [row.band_tokens or (0, 0) for row in rows]
    errors = [
        [max(t - low, 0) for t, (low, _) in zip(tokens, bands, strict=True)],
        [max(high - t, 0) for t, (_, high) in zip(tokens, bands, strict=True)],
    ]
    left.barh(names, tokens, xerr=errors, color="#4c72b0")
    left.invert_yaxis()
    left.set_xlabel("tokens of the longest request that fits, with the band")
    steps = [row.step_ms.value or 0.0 for row in rows]
    highs = [max((row.step_ms.high or 0.0) - step, 0.0) for row, step in zip(rows, steps, strict=True)]
    right.barh(names, steps, xerr=[[0.0] * len(rows), highs], color="#dd8452")
    simulated = any(row.step_ms.value is not None for row in rows)
    right.set_xlabel(
        f"decode step in ms: {dial.batch} x {dial.context:,} tokens"
        if simulated
        else "decode step: not simulated"
    )
    figure.suptitle(f"{dial.model} on {dial.hardware}, tp {dial.tp}")
    save_figure(figure, Path(path))
