"""Lets Optuna choose the configurations of a sweep, where the space is too large to go through."""

from __future__ import annotations

import warnings
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from servesim.errors import InputError
from servesim.explore.space import MOST
from servesim.explore.sweep_table import Sweep

if TYPE_CHECKING:
    from collections.abc import Sequence

    from servesim.explore.space import Space
    from servesim.explore.sweep import Runner

BATCH = 8
"""Configurations that are chosen before any of their rows is known: the same on one process and on many, so
that the answer is too."""
GOALS = {
    "optuna:tpe": ("output_throughput_per_gpu:max",),
    "optuna:nsga2": ("output_throughput_per_gpu:max", "p99_ttft_ms:min"),
}
_LISTED, _MISSES = "list entry", "misses"


def optimised(
    space: Space, runner: Runner, optimizer: str, trials: int, goals: str | Sequence[str], seed: int
) -> Sweep:
    """The rows of at most ``trials`` configurations; see :func:`servesim.sweep`.

    A configuration that misses the SLO, fails, or is ruled out by a constraint is one that the optimizer is
    told not to come near to.

    Raises:
        InputError: optuna is missing, or the optimizer, a goal or the number of trials is wrong.
    """
    wanted = _goals(optimizer, goals)
    if not 1 <= trials <= MOST:
        raise InputError(f"--trials: {trials} is not allowed; must be from 1 to {MOST:,}")
    size = space.size
    if size <= trials:
        configurations, ruled_out = space.configurations()
        notes = [f"the space has {size:,} configurations: all of them were run, and nothing was optimised"]
        return Sweep(_names(configurations), runner.run(configurations), ruled_out, notes)
    study, failed = _study(optimizer, wanted, seed)
    allowed = space.test()
    rows: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {}
    """Key -> configuration and row; what was chosen twice is there once."""
    ruled_out = 0
    while len(study.trials) < trials:
        asked = [study.ask() for _ in range(min(BATCH, trials - len(study.trials)))]
        suggested = [(trial, _suggested(space, trial)) for trial in asked]
        batch = [(trial, own) for trial, own in suggested if allowed(own)]
        ruled_out += len(suggested) - len(batch)
        found = dict(
            zip(
                [trial.number for trial, _ in batch],
                runner.run([own for _, own in batch], trials),
                strict=True,
            )
        )
        for trial, own in suggested:
            row = found.get(trial.number)
            if row is not None:
                rows.setdefault(row["key"], (own, row))
            values = None if row is None or row["status"] != "ok" else [row.get(key) for key, _ in wanted]
            if row is None or values is None or None in values:
                study.tell(trial, state=failed)
                continue
            trial.set_user_attr(_MISSES, _misses(row))
            study.tell(trial, values)
    found_rows = [row for _, row in rows.values()]
    _check_goals(wanted, found_rows)
    notes = [
        f"{optimizer} chose {len(rows):,} of {size:,} configurations in {trials:,} trials; no other was run"
    ]
    return Sweep(_names([own for own, _ in rows.values()]), found_rows, ruled_out, notes)


def _goals(optimizer: str, given: str | Sequence[str]) -> list[tuple[str, str]]:
    """(figure, ``max`` or ``min``) of every goal."""
    if optimizer not in GOALS:
        raise InputError(f"--optimizer: {optimizer!r} is not allowed; must be one of {', '.join(GOALS)}")
    if find_spec("optuna") is None:
        raise InputError(
            f"--optimizer {optimizer}: needs optuna; install it with  pip install 'servesim[optuna]'"
        )
    words = given.split() if isinstance(given, str) else list(given)
    goals = []
    for word in words or GOALS[optimizer]:
        key, _, better = word.partition(":")
        if better not in ("max", "min"):
            raise InputError(f"--goal: {word!r} is not allowed; must be a figure with :max or :min")
        goals.append((key, better))
    if optimizer == "optuna:tpe" and len(goals) > 1:
        raise InputError("--goal: optuna:tpe has one goal; optuna:nsga2 takes several")
    return goals


def _check_goals(goals: Sequence[tuple[str, str]], rows: Any) -> None:
    """Refuse a goal that no row has a figure for."""
    able = [row for row in rows if row["status"] == "ok"]
    for key, _ in goals:
        if able and not any(isinstance(row.get(key), int | float) for row in able):
            from servesim.specs.validation import hint

            known = [name for name, value in able[0].items() if isinstance(value, int | float)]
            raise InputError(f"--goal: {key}: is no figure of a row; {hint(key, known)}")


def _study(optimizer: str, goals: Sequence[tuple[str, str]], seed: int) -> tuple[Any, Any]:
    """A study, and the state of a trial that has no figures."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)

    def constraints(trial: Any) -> tuple[float]:
        return (trial.user_attrs.get(_MISSES, 1.0),)

    kind, size = (
        (optuna.samplers.TPESampler, {"n_startup_trials": 2 * BATCH})
        if optimizer == "optuna:tpe"
        else (optuna.samplers.NSGAIISampler, {"population_size": 2 * BATCH})
    )
    with warnings.catch_warnings(action="ignore"):  # that constraints may change in a later version
        sampler = kind(seed=seed, constraints_func=constraints, **size)
    directions = ["maximize" if better == "max" else "minimize" for _, better in goals]
    return optuna.create_study(sampler=sampler, directions=directions), optuna.trial.TrialState.FAIL


def _suggested(space: Space, trial: Any) -> dict[str, Any]:
    """A configuration: an entry of the list and a value of every choice, by their place."""
    own: dict[str, Any] = {}
    if space.listed:
        own |= space.listed[trial.suggest_int(_LISTED, 0, len(space.listed) - 1)]
    for name, values in space.grid.items():
        own[name] = values[trial.suggest_int(name, 0, len(values) - 1)]
    return own


def _misses(row: dict[str, Any]) -> float:
    """How far a row is from keeping the SLO: 0: it does, or there is none."""
    return 0.0 if row.get("slo_met", True) else 1.0 - float(row.get("goodput", 0.0)) + 1e-6


def _names(configurations: Sequence[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for each in configurations for name in each))
