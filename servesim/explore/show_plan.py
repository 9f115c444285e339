"""How the answer of a plan is shown."""

from __future__ import annotations

from typing import TYPE_CHECKING

from servesim.explore.error_band import SHARE
from servesim.explore.plan_result import LATENCY
from servesim.results.table import Table
from servesim.results.units import digits
from servesim.terminal import screen_width, wrapped

if TYPE_CHECKING:
    from servesim.explore.plan_result import Finalist, Plan, Trial

_INDENT = " " * 15


def plan_text(plan: Plan) -> str:
    """The answer, the finalists, the front, what would change it, and what was not run."""
    lines = [*_answer(plan), ""]
    if plan.finalists:
        lines += [_finalists(plan).plain(width=screen_width()), "", *_conditions(plan), *_changes(plan)]
        front = plan.front
        if len(front) > 1:
            lines += ["", "cost against latency: nothing that was run is better in both", ""]
            lines.append(_front(front).plain(width=screen_width()))
    elif plan.trials:
        nearest = plan.trials[0]
        lines.append(_line("nearest", f"{nearest.fleet.words()}, at {nearest.score:.2f} x the bounds"))
    return "\n".join([*lines, "", *_search(plan)])


def plan_html(plan: Plan) -> str:
    """The same in a notebook, with a chart of cost against latency."""
    from servesim.explore.notebook import chart_svg, page_html, table_html

    front = [(trial.figures["cost_per_hour"], trial.figures[LATENCY]) for trial in plan.front]
    parts = [table_html(_finalists(plan))] if plan.finalists else []
    chart = chart_svg({"latency P99": front}, f"{plan.prices.currency} an hour", "ms")
    below = [*_conditions(plan), *_changes(plan)] if plan.finalists else []
    return page_html("\n".join(_answer(plan)), *parts, chart, page_html("\n".join([*below, *_search(plan)])))


def _answer(plan: Plan) -> list[str]:
    target = plan.question.target.words()
    if plan.best is None:
        return [_line("no fleet", f"of up to {plan.question.max_gpus} GPUs keeps {target}")]
    best = plan.finalists[0]
    figures, money = best.trial.figures, plan.prices.currency
    lines = [_line("best fleet", f"{best.trial.fleet.words()}; keeps {target}")]
    cost = f"{figures['cost_per_hour']:,.2f} {money} an hour for {best.trial.fleet.gpus} GPUs"
    tokens = f"{digits(figures['cost_per_million_tokens'])} {money} per million output tokens"
    power = f"{digits(figures['mean_w'])} W on average, {digits(figures['g_co2_per_hour'])} g CO2 an hour"
    lines.append(_line("costs", f"{cost}, {tokens}; {power}"))
    lines.append(_line("binds", best.binding(plan.question)))
    lines += [_line("note", note) for note in best.trial.notes]
    if plan.hours:
        lines.append(_line("by hour", _hours(plan)))
    return lines


def _hours(plan: Plan) -> str:
    each = plan.best.gpus_each if plan.best else 1
    used = sum(count for _, count in plan.hours) * each
    most = max(count for _, count in plan.hours) * each * len(plan.hours)
    parts = ", ".join(f"{rate:g} req/s: {count}" for rate, count in dict(plan.hours).items())
    return (
        f"instances for {parts}; following the load takes {used:,} GPU-hours in {len(plan.hours)} hours "
        f"instead of {most:,}"
    )


def _finalists(plan: Plan) -> Table:
    table = Table(
        [
            "fleet",
            "GPUs",
            f"{plan.prices.currency}/h",
            "TTFT P99 ms",
            "TPOT P99 ms",
            "J/token",
            "of bound",
            "keeps",
        ]
    )
    for finalist in plan.finalists:
        trial = finalist.trial
        table.rows.append(
            [
                trial.fleet.words(),
                str(trial.fleet.gpus),
                f"{trial.figures['cost_per_hour']:,.2f}",
                _with_band(finalist, "p99_ttft_ms"),
                _with_band(finalist, "p99_tpot_ms"),
                digits(trial.figures["j_per_output_token"]),
                _of_bound(finalist),
                _keeps(finalist),
            ]
        )
    return table


def _of_bound(finalist: Finalist) -> str:
    """Worst figure as a share of its bound, and from where to where kernel times may move it."""
    share = f"{finalist.trial.score * 100:.0f} %"
    if finalist.band is None:
        return share
    low, high = (f"{end * 100:.0f}" for end in finalist.band)
    return f"{share} ({low} to {high})"


def _with_band(finalist: Finalist, key: str) -> str:
    """A figure with the ends of its 80 % interval."""
    told = digits(finalist.trial.figures[key])
    if key not in finalist.bands:
        return told
    low, high = finalist.bands[key]
    return f"{told} ({digits(low)} to {digits(high)})"


def _keeps(finalist: Finalist) -> str:
    """One letter for each condition under which it keeps the bounds."""
    conditions = (("k", finalist.if_slower), ("c", finalist.if_less_kv), ("r", finalist.if_more_load))
    return "".join(letter if keeps else "-" for letter, keeps in conditions if keeps is not None)


def _conditions(plan: Plan) -> list[str]:
    known = plan.finalists[0].trial.uncertain
    first = known and max(known, key=lambda each: each.decode)
    reason = f"for the first: {first.reason}; " if first else ""
    return [
        _line(
            "keeps",
            f"k: with kernel times at the long end of their {SHARE} % interval ({reason}in brackets what "
            "this interval makes of a figure); c: with KV caches as small as their band says; r: with 20 % "
            "more load; -: not",
        )
    ]


def _changes(plan: Plan) -> list[str]:
    if not plan.changes:
        return [_line("stays", "nothing of this changes the choice")]
    lines = []
    for number, change in enumerate(plan.changes):
        instead = "none of those that were tried" if change.fleet is None else change.fleet.words()
        lines.append(_line("changes" if not number else "", f"{change.condition}: {instead}"))
    return lines


def _front(front: list[Trial]) -> Table:
    table = Table(["fleet", "cost/h", "latency P99 ms", "TTFT P99 ms", "TPOT P99 ms"])
    for trial in front:
        figures = trial.figures
        values = (figures[LATENCY], figures["p99_ttft_ms"], figures["p99_tpot_ms"])
        table.rows.append(
            [trial.fleet.words(), f"{figures['cost_per_hour']:,.2f}", *(digits(value) for value in values)]
        )
    return table


def _search(plan: Plan) -> list[str]:
    lines = [_line("searched", f"{plan.candidates:,} fleets with {plan.runs:,} runs; of the fleets")]
    for reason, count in plan.pruned.most_common():
        detail = plan.details.get(reason, "")
        lines.append(_line("", f"{count:,} {reason}" + (f" ({detail})" if detail else "")))
    source = f"{plan.question.prices}, as of {plan.prices.as_of}"
    return [*lines, _line("prices", source)]


def _line(label: str, text: str) -> str:
    return wrapped(f"{label:<{len(_INDENT)}}{text}", screen_width(), indent=_INDENT)
