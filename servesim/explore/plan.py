"""The cheapest fleet that keeps a service level: bounds first, then short runs, then the whole workload."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from servesim.api import LOADING, NOISE, check_used, making_bundles, without
from servesim.engine.build import Kept
from servesim.errors import InputError, ServingError
from servesim.explore.capacity_band import band, with_blocks
from servesim.explore.error_band import SHARE, error_runs, shifted, uncertainties
from servesim.explore.fleet import NOT_HERE, read_prices
from servesim.explore.fleet_bounds import CANNOT_START, NO_TIMES, ShapeBounds
from servesim.explore.fleet_space import Question, question_of
from servesim.explore.load_point import load_point
from servesim.explore.notebook import line
from servesim.explore.plan_result import Change, Finalist, Plan, Trial
from servesim.explore.slo import Slo
from servesim.explore.warm_runs import Target, Watch, one_run
from servesim.results.units import SECOND
from servesim.specs.cluster import load_cluster
from servesim.specs.flags import flag_name
from servesim.specs.options import RuntimeOptions
from servesim.specs.validation import validated

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from servesim.engine.block_tables import BlockTables
    from servesim.explore.fleet import Fleet

_OF_FILES = set(LOADING) - {"request_rate", "dataset"}
"""Run options about a workload file, which a workload that the plan describes is not."""
SHORT_SHARE, SHORT_LEAST = 1 / 6, 48
"""Entries of the first, short run of a candidate."""
SLACK = 1.25
"""A candidate whose short run misses the bounds by more than this is not run on the whole workload."""
_FAR = 3.0
"""Fleets of a hardware that cost more than this many times the cheapest one found are not looked at."""
_FRONT = 2.0
"""Up to this multiple of the cheapest cost, larger fleets are run for the front of cost against latency."""
_FRONT_RUNS = 24
_MORE_LOAD = 1.2
_SHARE_KEPT = 1 / 3
"""Of the candidates of a round that go on to the next, where the objective is only known from runs."""
_LAST_ROUND = 8
_WHOLE = "whole workload"
_NEXT = 3
"""Instances that are added at most for an answer to a changed condition."""


def plan(
    question: Question | Mapping[str, Any],
    options: RuntimeOptions | None = None,
    *,
    prune: bool = True,
    progress: Callable[[str], None] | None = None,
    **flags: Any,
) -> Plan:
    """Find the best fleet for a workload and a service level.

    Args:
        question: a :class:`Question`, or what a plan file holds: ``{"slo": "ttft:1000", "max_gpus": 8}``.
        options: run options of every fleet.
        prune: False: every candidate runs the whole workload, whatever it costs.
        progress: called with a few words now and then.
        **flags: single run options by name.

    Raises:
        InputError: something given is wrong, or no candidate can start.
    """
    asked = question if isinstance(question, Question) else question_of(question)
    given = {} if options is None else options.model_dump(exclude_unset=True)
    chosen = validated(RuntimeOptions, {**asked.options, **given, **flags}, "options")
    for name in (*NOT_HERE, *NOISE):
        if name in chosen.model_fields_set:
            raise InputError(f"{name}: has no effect on a plan, which chooses fleets itself; see its choices")
    if isinstance(asked.workload, dict) and (unread := _OF_FILES & chosen.model_fields_set):
        raise InputError(f"{min(unread)}: has no effect on a workload that the plan describes; leave it out")
    if asked.rates and "request_rate" in chosen.model_fields_set:
        raise InputError("request_rate: has no effect beside rates, which say how fast requests come")
    check_used(chosen, "plan", asked.workload)
    with making_bundles(chosen.auto_profile and asked.named_hardware):
        return _Search(asked, chosen, prune, progress or line() or (lambda _: None)).result()


class _Search:
    """One search, with what its parts have in common."""

    def __init__(
        self, question: Question, options: RuntimeOptions, prune: bool, tell: Callable[[str], None]
    ) -> None:
        self._question, self._options, self._prune, self._tell = question, options, prune, tell
        self._prices = read_prices(question.prices)
        self._whole = question.load(options)
        entries = sum(request.predecessor < 0 for request in self._whole)
        self._entries = entries
        self._loads = {_WHOLE: self._whole}
        """Name -> the workload, parts of it, and it at other rates."""
        self._short = self._part(SHORT_SHARE)
        self._kept = Kept()
        """Kernel times; the block tables of a load are in ``_tables``."""
        self._tables: dict[str, BlockTables | None] = {}
        self._bounds: dict[Fleet, ShapeBounds] = {}
        self._done: dict[tuple[Fleet, str], Trial] = {}
        self._length_ns = 0
        self._plan = Plan(question, self._prices, options, workload=self._whole)

    def result(self) -> Plan:
        """See :func:`plan`."""
        found, candidates = self._plan, self._question.candidates(self._prices)
        found.candidates = len(candidates)
        self._check_choices(candidates)
        if not self._prune:
            able = candidates
        else:
            able = [fleet for fleet in candidates if not self._ruled_out(fleet)]
        if set(found.pruned) <= {CANNOT_START, NO_TIMES} and not able:
            reasons = "; ".join(f"{found.pruned[why]:,} {why}: {found.details[why]}" for why in found.pruned)
            raise InputError(f"plan: none of {len(candidates):,} fleets can be simulated: {reasons}")
        if not self._prune:
            for fleet in able:
                self._run(fleet)
        elif self._question.objective in ("cost", "min_gpus"):
            self._ascend(able)
        else:
            self._halve(able)
        found.trials = sorted((t for t in self._done.values() if t.part == _WHOLE), key=self._rank)
        self._conclude()
        self._tell("")
        return found

    def _check_choices(self, candidates: Sequence[Fleet]) -> None:
        """Refuse options that have nothing to choose in any fleet.

        Raises:
            InputError: there is one.
        """
        fields = RuntimeOptions.model_fields
        for name in sorted(self._options.model_fields_set):
            if getattr(self._options, name) == fields[name].default:
                continue
            if all(name in fleet.idle_options() for fleet in candidates):
                raise InputError(
                    f"{flag_name(name)}: has no effect here: no fleet of the plan gives it a choice"
                )
        if self._options.sticky_sessions and self._entries == len(self._whole):
            raise InputError(
                "--sticky-sessions: has no effect here: the workload has no sessions; leave it out"
            )

    def _part(self, share: float) -> str:
        """The name of the first part of the workload."""
        part = self._whole.first(max(round(self._entries * share), min(SHORT_LEAST, self._entries)))
        name = _WHOLE if len(part) == len(self._whole) else f"first {len(part)} requests"
        self._loads.setdefault(name, part)
        return name

    # ------------------------------------------------------------------ what is not run

    def _ruled_out(self, fleet: Fleet) -> bool:
        """Whether a candidate cannot start or cannot keep the bounds, whatever its router does."""
        shape = fleet.shape
        if shape not in self._bounds:
            cluster = load_cluster(shape.cluster(self._prices))
            self._bounds[shape] = ShapeBounds.of(
                cluster,
                without(self._options, *shape.idle_options()),
                self._kept,
                self._whole,
                self._question.target,
            )
        reason = self._bounds[shape].reason(fleet)
        if reason:
            self._plan.pruned[reason] += 1
            self._plan.details.setdefault(reason, self._bounds[shape].detail)
        return bool(reason)

    # ------------------------------------------------------------------ objectives known beforehand

    def _ascend(self, able: Sequence[Fleet]) -> None:
        """From the cheapest up; a hardware is done with the first price at which a fleet keeps the bounds."""
        done: set[str] = set()
        best = math.inf
        later: list[Fleet] = []
        for value, hardware, level in self._levels(able):
            if hardware in done or value > _FAR * best:
                why = "cost more than a fleet of their hardware that keeps the bounds"
                far = f"cost more than {_FAR:g} x the cheapest fleet"
                self._plan.pruned[why if hardware in done else far] += len(level)
                later += level
                continue
            self._tell(f"{len(level)} fleets of {level[0].gpus} x {hardware}")
            keeping = [fleet for fleet in level if self._keeps(fleet)]  # all of them: headroom decides then
            if keeping:
                done.add(hardware)
                best = min(best, value)
        if best < math.inf:
            self._front(later, best)

    def _levels(self, able: Sequence[Fleet]) -> Iterator[tuple[float, str, list[Fleet]]]:
        """(value, hardware, fleets) of every value of the objective, ascending."""
        groups: dict[tuple[float, float, str], list[Fleet]] = {}
        for fleet in able:
            cost = fleet.cost_per_hour(self._prices)
            value = cost if self._question.objective == "cost" else float(fleet.gpus)
            groups.setdefault((value, cost, fleet.hardware), []).append(fleet)
        for (value, _, hardware), level in sorted(groups.items(), key=lambda group: group[0]):
            yield value, hardware, level

    def _keeps(self, fleet: Fleet) -> bool:
        """Whether a candidate keeps the bounds: a short run first, the whole workload if that goes well."""
        if not self._run(fleet, self._short).meets:
            self._plan.pruned[_missed(self._short)] += 1
            return False
        meets = self._run(fleet).meets
        if not meets:
            self._plan.pruned[f"missed the bounds on the {_WHOLE}"] += 1
        return meets

    def _front(self, later: Sequence[Fleet], best: float) -> None:
        """Run some dearer fleets: those with the formats and limits of one that keeps the bounds."""
        good = {self._style(trial.fleet) for trial in self._kept_whole()}
        runs = 0
        for fleet in later:
            value = self._value(fleet)
            if value > _FRONT * best or self._style(fleet) not in good:
                continue
            runs += 1
            if runs > _FRONT_RUNS:
                break
            self._run(fleet)

    @staticmethod
    def _style(fleet: Fleet) -> tuple[Any, ...]:
        limits = fleet.max_num_seqs, fleet.max_num_batched_tokens
        return (fleet.hardware, fleet.dtype, fleet.kv_cache_dtype, *limits)

    def _value(self, fleet: Fleet) -> float:
        cost = fleet.cost_per_hour(self._prices)
        return cost if self._question.objective == "cost" else float(fleet.gpus)

    # ------------------------------------------------------------------ objectives known from runs

    def _halve(self, able: Sequence[Fleet]) -> None:
        """Rounds on longer and longer parts of the workload; each keeps the better part of the candidates."""
        left = list(able)
        share = SHORT_SHARE
        while len(left) > _LAST_ROUND and share < 1:
            part = self._part(share)
            self._tell(f"{len(left)} fleets on the {part}")
            trials = [self._run(fleet, part) for fleet in self._without_larger(left, part)]
            good = sorted((trial for trial in trials if trial.meets), key=self._rank)
            keep = max(round(len(good) * _SHARE_KEPT), _LAST_ROUND)
            self._plan.pruned += Counter(
                {
                    _missed(part): len(trials) - len(good),
                    f"were worse than others on the {part}": len(good[keep:]),
                }
            )
            left = [trial.fleet for trial in good[:keep]]
            share *= 2.5
        for fleet in left:
            if not self._run(fleet).meets:
                self._plan.pruned[f"missed the bounds on the {_WHOLE}"] += 1

    def _without_larger(self, fleets: Sequence[Fleet], part: str) -> Iterator[Fleet]:
        """The fleets, but of each shape none that is larger than the smallest two that keep the bounds."""
        enough: Counter[tuple[Fleet, bool]] = Counter()
        for fleet in sorted(fleets, key=lambda each: each.replicas):
            kind = fleet.shape, bool(fleet.prefill)
            if enough[kind] >= 2:
                self._plan.pruned["have more instances than two smaller fleets that keep the bounds"] += 1
                continue
            enough[kind] += self._run(fleet, part).meets
            yield fleet

    # ------------------------------------------------------------------ runs

    def _run(
        self,
        fleet: Fleet,
        load: str = _WHOLE,
        *,
        longer: bool = False,
        blocks: Sequence[int] | None = None,
    ) -> Trial:
        """A candidate on the whole workload, or on a part of it with some slack.

        ``longer``: kernel times at the long end of their interval, where that is known.
        """
        plain = not longer and blocks is None
        if plain and (fleet, load) in self._done:
            return self._done[fleet, load]
        workload = self._loads[load]
        target = self._question.target
        if len(workload) < len(self._whole):
            target = _relaxed(target)
        known = self._run(fleet).uncertain if longer else None
        watch = Watch(target, len(workload), max(self._length_ns, SECOND) // 50)
        self._plan.runs += 1
        try:
            cluster = load_cluster(fleet.cluster(self._prices))
            if blocks is not None:
                cluster = with_blocks(cluster, tuple(blocks))
            kept = Kept(self._kept.costs, self._tables.get(load))
            options = without(self._options, *fleet.idle_options())
            shift = shifted(known, 1) if known else None
            outcome = one_run(cluster, workload, options, kept, watch, shift=shift)
            self._kept.costs, self._tables[load] = kept.costs, kept.tables
        except ServingError as error:
            trial = Trial(fleet, len(workload), load, reason=str(error).splitlines()[0])
        else:
            result = outcome.result
            if outcome.complete:
                self._length_ns = max(self._length_ns, result.log.end_ns)
            trial = Trial.of(fleet, load, load_point(math.inf, outcome, target), result, self._prices)
            trial.uncertain, trial.blocks = uncertainties(result), band(result)
        if plain:
            self._done[fleet, load] = trial
        return trial

    def _kept_whole(self) -> list[Trial]:
        """Every candidate that keeps the bounds on the whole workload, the best first."""
        whole = (trial for trial in self._done.values() if trial.part == _WHOLE)
        return sorted((trial for trial in whole if trial.meets), key=self._rank)

    def _rank(self, trial: Trial) -> tuple[Any, ...]:
        """The smaller the better: objective, GPUs, cost, headroom."""
        cost = trial.fleet.cost_per_hour(self._prices)
        value = trial.value(self._question.objective, cost)
        return not trial.meets, value, trial.fleet.gpus, cost, trial.score, trial.fleet.words()

    # ------------------------------------------------------------------ what is said of the best

    def _conclude(self) -> None:
        found, kept = self._plan, self._kept_whole()
        if not kept:
            return
        chosen = kept[:3]
        for hardware in dict.fromkeys(trial.fleet.hardware for trial in kept):
            best = next(trial for trial in kept if trial.fleet.hardware == hardware)
            if best not in chosen:
                chosen.append(best)
        more_load = f"{_MORE_LOAD * 100 - 100:.0f} % more load"
        self._loads[more_load] = self._question.load(self._options, _MORE_LOAD)
        for number, trial in enumerate(chosen):
            self._tell(f"what would change the choice: {trial.fleet.words()}")
            finalist = Finalist(trial)
            self._band(finalist)
            if trial.blocks:
                low = [ends[0] for ends in trial.blocks]
                finalist.if_less_kv = self._run(trial.fleet, blocks=low).meets
            finalist.if_more_load = self._run(trial.fleet, more_load).meets
            found.finalists.append(finalist)
            if number == 0:
                self._changes(finalist, chosen, more_load)
        self._price_changes(kept)
        self._hours(kept[0].fleet)

    def _band(self, finalist: Finalist) -> None:
        """The 80 % intervals of a fleet's figures, and whether it keeps the bounds with longer kernels."""
        fleet, kept = finalist.trial.fleet, Kept(self._kept.costs, self._tables.get(_WHOLE))
        cluster, target = load_cluster(fleet.cluster(self._prices)), self._question.target
        options = without(self._options, *fleet.idle_options())
        outcome = one_run(cluster, self._whole, options, kept)
        ends = error_runs(outcome.result, kept)
        if ends is None:
            return
        self._plan.runs += 3
        scores = [target.score(result) for result in (outcome.result, *ends.runs)]
        finalist.band = min(scores), max(scores)
        finalist.if_slower = target.score(ends.runs[1]) <= 1
        known = finalist.trial.figures.keys() & ends.bands.nominal.keys()
        finalist.bands = {key: ends.bands.of(key) for key in sorted(known)}

    def _changes(self, best: Finalist, others: Sequence[Trial], more_load: str) -> None:
        """The fleet to take instead where the chosen one would miss the bounds."""
        if best.if_slower is False:
            found = self._instead(others, lambda fleet: self._run(fleet, longer=True))
            self._plan.changes.append(
                Change(f"kernel times at the long end of their {SHARE} % interval", found)
            )
        if best.if_less_kv is False:

            def with_less(fleet: Fleet) -> Trial:
                blocks = self._run(fleet).blocks
                return self._run(fleet, blocks=[ends[0] for ends in blocks]) if blocks else self._run(fleet)

            self._plan.changes.append(
                Change("KV caches as small as their band says", self._instead(others, with_less))
            )
        if best.if_more_load is False:
            found = self._instead(others, lambda fleet: self._run(fleet, more_load))
            self._plan.changes.append(Change(more_load, found))

    def _instead(self, others: Sequence[Trial], run: Callable[[Fleet], Trial]) -> Fleet | None:
        """The cheapest that keeps the bounds in ``run``: another finalist, or the best with more
        instances."""
        best = others[0].fleet
        tried = [trial.fleet for trial in others[1:]]
        share = best.prefill / best.replicas
        for more in range(1, _NEXT + 1):
            count = best.replicas + more
            tried.append(replace(best, replicas=count, prefill=round(share * count)))
        for fleet in sorted(tried, key=lambda fleet: (self._value(fleet), fleet.gpus)):
            if run(fleet).meets:
                return fleet
        return None

    def _price_changes(self, kept: Sequence[Trial]) -> None:
        """By how much another hardware would have to be cheaper."""
        if self._question.objective != "cost":
            return
        best = kept[0].fleet
        cost = best.cost_per_hour(self._prices)
        for finalist in self._plan.finalists[1:]:
            fleet = finalist.trial.fleet
            if fleet.hardware == best.hardware or not fleet.cost_per_hour(self._prices):
                continue
            limit = cost / fleet.gpus
            now = self._prices.of(fleet.hardware).per_hour
            what = (
                f"{fleet.hardware} below {limit:.2f} {self._prices.currency} a GPU-hour "
                f"(now {now:.2f}, {100 * limit / now - 100:+.0f} %)"
            )
            self._plan.changes.append(Change(what, fleet))

    def _hours(self, best: Fleet) -> None:
        """Instances that every hour's rate needs, where the rates of a day are given."""
        rates = self._question.rates
        if len(set(rates)) < 2 or best.prefill:
            return
        peak, need = max(rates), {max(rates): best.replicas}
        for rate in sorted(set(rates) - {peak}, reverse=True):
            name = f"{rate:g} a second"
            self._loads[name] = self._question.load(self._options, rate / peak)
            count = min(need.values())
            while count > 1 and self._run(replace(best, replicas=count - 1), name).meets:
                count -= 1
            need[rate] = count
        self._plan.hours = [(rate, need[rate]) for rate in rates]


def _missed(part: str) -> str:
    return f"missed the bounds by more than {SLACK * 100 - 100:.0f} % on the {part}"


def _relaxed(target: Target) -> Target:
    """The bounds of a short run."""
    bounds = tuple(replace(bound, limit_ms=bound.limit_ms * SLACK) for bound in target.slo.bounds)
    goodput = None if target.goodput is None else max(1 - (1 - target.goodput) * 2, 0.01)
    return Target(Slo(bounds), goodput)
