"""How far a comparison may be trusted: a number with its source, and what is in no figure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from servesim.explore.capacity_band import band, capacity_matters
from servesim.results.stated_errors import RESULTS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from servesim.results.result import Result


def trust_lines(names: Sequence[str], results: Sequence[Result]) -> list[str]:
    """Two to four lines: error of the kernel times, extrapolation, what is left out, capacity."""
    lines = [_errors(results), _extrapolated(names, results), _left_out(results)]
    return [line for line in (*lines, _capacity(names, results)) if line]


def _errors(results: Sequence[Result]) -> str:
    by_reason: dict[str, dict[str, None]] = {}
    for result in results:
        for log in result.instances:
            error = log.stated_error
            if error is not None:
                told = f"{log.spec.hardware} {log.options.variant} ±{error.percent:g} %"
                if error.ttft_percent > error.percent:
                    told += f" (TTFT ±{error.ttft_percent:g} %, by public serving runs)"
                by_reason.setdefault(error.reason, {})[told] = None
    parts = [f"{', '.join(told)} ({reason})" for reason, told in by_reason.items()]
    return f"kernel times: {'; '.join(parts)}; see {RESULTS}" if parts else ""


def _extrapolated(names: Sequence[str], results: Sequence[Result]) -> str:
    """What of these runs lies beyond the measurements; empty where nothing does."""
    parts: dict[str, list[str]] = {}
    for name, result in zip(names, results, strict=True):
        for words in _beyond(result):
            parts.setdefault(words, []).append(name)
    if not parts:
        return ""
    told = "; ".join(
        words + ("" if len(sets) == len(names) else f" ({', '.join(sets)})") for words, sets in parts.items()
    )
    return f"extrapolated, with an error that nobody measured: {told}"


def _beyond(result: Result) -> list[str]:
    rows = result.requests
    reaches = [log.reach for log in result.instances if log.reach is not None]
    prompt = min((each.prompt_tokens for each in reaches if each.prompt_tokens), default=None)
    context = min((each.context_tokens for each in reaches if each.context_tokens), default=None)
    sequences = min((each.sequences for each in reaches if each.sequences), default=None)
    found = []
    if prompt and (longer := int((rows["input"] > prompt).sum())):
        found.append(f"prompts over {prompt:,} tokens, {longer / len(rows) * 100:.0f} % of the requests")
    if context and (longer := int((rows["input"] + rows["output"] > context).sum())):
        found.append(f"contexts over {context:,} tokens, {longer / len(rows) * 100:.0f} % of the requests")
    if sequences and result.summary["peak_batch"] > sequences:
        found.append(f"steps of more than {sequences:,} sequences (up to {result.summary['peak_batch']:,})")
    return found


def _left_out(results: Sequence[Result]) -> str:
    by_words: dict[str, dict[str, None]] = {}
    for result in results:
        for log in result.instances:
            by_words.setdefault(log.host, {})[log.spec.hardware] = None
    hosts = [f"{', '.join(hardware)}: {words}" for words, hardware in by_words.items()]
    return (
        "not in the figures: client and API server (6 to 12 ms of TTFT between public vLLM results and "
        f"kernel times). Host of {'; '.join(hosts)}"
    )


def _capacity(names: Sequence[str], results: Sequence[Result]) -> str:
    parts = []
    for name, result in zip(names, results, strict=True):
        bands = band(result)
        if bands is None:
            continue
        blocks = result.summary["kv_cache"]["blocks"]
        low, high = (sum(ends) / blocks * 100 - 100 for ends in zip(*bands, strict=True))
        parts.append((f"{low:+.1f} to {high:+.1f} %", name, capacity_matters(result)))
    if not parts:
        return ""
    widths = dict.fromkeys(width for width, _, _ in parts)
    limited = [name for _, name, matters in parts if matters]
    meaning = f"it has a part in {', '.join(limited)}" if limited else "no set comes near it"
    return f"KV capacity: estimated, {' or '.join(widths)}; {meaning}"
