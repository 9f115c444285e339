"""The answer of a plan: the fleets that were run, those that are worth a look, and what would change it."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from servesim.results.atomic import atomic_write

if TYPE_CHECKING:
    from os import PathLike

    import pandas as pd

    from servesim.explore.fleet import Fleet, Prices
    from servesim.explore.fleet_space import Question
    from servesim.explore.load_point import LoadPoint
    from servesim.results.result import Result
    from servesim.results.stated_errors import Uncertainty
    from servesim.specs.options import RuntimeOptions
    from servesim.workload.request import Workload

FILES = ("fleet.json", "serve.sh", "plan.json", "candidates.csv")
LATENCY = "p99_e2el_ms"
"""What the front sets against cost."""


@dataclass(slots=True)
class Trial:
    """One fleet on the workload, or on its first requests."""

    fleet: Fleet
    requests: int
    part: str
    """``whole``, or which part of the workload or other load."""
    point: LoadPoint | None = None
    """None: it could not be run."""
    figures: dict[str, float] = field(default_factory=dict)
    reason: str = ""
    uncertain: list[Uncertainty] | None = None
    """What the step times of every instance may be off by; None: not known."""
    blocks: list[tuple[int, int]] | None = None
    """Band of the KV blocks of every instance."""
    notes: list[str] = field(default_factory=list)
    """What was asked for and does not act, or not in full."""

    @classmethod
    def of(cls, fleet: Fleet, part: str, point: LoadPoint, result: Result, prices: Prices) -> Trial:
        """The trial of a run."""
        cost = fleet.cost_per_hour(prices)
        energy = result.summary["energy"]
        watts = energy["mean_w"] * prices.pue if energy else 0.0
        tokens_per_s = point.figures["output_throughput"]
        figures = {
            "cost_per_hour": cost,
            "mean_w": round(watts, 3),
            "g_co2_per_hour": round(watts / 1000 * prices.grid_g_co2_per_kwh, 3),
            "j_per_output_token": round(watts / tokens_per_s, 6) if tokens_per_s else 0.0,
            "cost_per_million_tokens": round(cost / (tokens_per_s * 3600 / 1e6), 6) if tokens_per_s else 0.0,
            "throughput_per_gpu": round(tokens_per_s / fleet.gpus, 6),
            "goodput_per_gpu": round(point.good_per_s / fleet.gpus, 6),
            **{name: round(value, 6) for name, value in point.figures.items()},
            "goodput": round(point.goodput, 6),
        }
        return cls(fleet, len(result.workload), part, point, figures, notes=list(result.log.notes))

    @property
    def meets(self) -> bool:
        """Whether it keeps the bounds."""
        return self.point is not None and self.point.meets

    @property
    def score(self) -> float:
        """Worst figure as a share of its bound; inf: it did not run."""
        return float("inf") if self.point is None else self.point.score

    def value(self, objective: str, cost: float) -> float:
        """The smaller the better."""
        if objective == "cost":
            return cost
        if objective == "min_gpus":
            return float(self.fleet.gpus)
        figure = {"energy": "j_per_output_token", "carbon": "g_co2_per_hour"}.get(objective, objective)
        known = self.figures.get(figure, float("nan"))
        if known != known:
            return float("inf")
        return -known if objective.endswith("per_gpu") else known

    def row(self) -> dict[str, Any]:
        """One row of the table of candidates."""
        row = {**self.fleet.row(), "meets": self.meets, "reason": self.reason}
        if self.point is not None:
            row |= {"complete": self.point.complete, "score": round(self.score, 6), **self.figures}
        return row


@dataclass(slots=True)
class Finalist:
    """A fleet that keeps the bounds, and whether it does under other conditions; None: not tried."""

    trial: Trial
    if_slower: bool | None = None
    """Kernel times at the long end of their 80 % interval."""
    band: tuple[float, float] | None = None
    """Worst figure as a share of its bound with kernel times at the short end of their interval, and at the
    long one."""
    bands: dict[str, tuple[float, float]] = field(default_factory=dict)
    """80 % intervals of its figures, by their keys."""
    if_less_kv: bool | None = None
    """KV caches at the low end of their band."""
    if_more_load: bool | None = None
    """20 % more load."""

    def binding(self, question: Question) -> str:
        """Which bound is nearest, and what requests wait for."""
        point = self.trial.point
        assert point is not None
        if question.target.goodput is not None:
            return f"{point.goodput * 100:.1f} % of the requests keep the bounds; {point.held_back}"
        nearest, value = max(
            zip(question.target.slo.bounds, point.bounds_ms, strict=True),
            key=lambda pair: pair[1] / pair[0].limit_ms,
        )
        share = value / nearest.limit_ms * 100
        return f"{nearest.title} is at {share:.0f} % of its bound; {point.held_back}"

    def to_dict(self, question: Question) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            **self.trial.row(),
            "notes": self.trial.notes,
            "binding": self.binding(question),
            "score_band": self.band and [round(end, 6) for end in self.band],
            "bands": {key: [round(end, 6) for end in ends] for key, ends in self.bands.items()},
            "keeps_if_slower": self.if_slower,
            "keeps_if_less_kv": self.if_less_kv,
            "keeps_if_more_load": self.if_more_load,
        }


@dataclass(slots=True, frozen=True)
class Change:
    """A condition under which another fleet is the answer."""

    condition: str
    fleet: Fleet | None
    """None: none of those that were tried keeps the bounds then."""


@dataclass
class Plan:
    """What :func:`servesim.plan` found."""

    question: Question
    prices: Prices
    options: RuntimeOptions
    workload: Workload
    candidates: int = 0
    pruned: Counter[str] = field(default_factory=Counter)
    """Why candidates were not looked at any further -> how many."""
    details: dict[str, str] = field(default_factory=dict)
    """Of some of these reasons, what was told of the first."""
    trials: list[Trial] = field(default_factory=list)
    """Every fleet that was run on the whole workload, the best first."""
    runs: int = 0
    finalists: list[Finalist] = field(default_factory=list)
    """The best three that keep the bounds, and the best of every other hardware."""
    changes: list[Change] = field(default_factory=list)
    hours: list[tuple[float, int]] = field(default_factory=list)
    """(requests per second, instances that they need) of every hour, where the question gives rates."""

    @property
    def best(self) -> Fleet | None:
        """The answer; None: no candidate keeps the bounds."""
        return self.finalists[0].trial.fleet if self.finalists else None

    @property
    def front(self) -> list[Trial]:
        """Fleets that keep the bounds and that none beats in both cost and latency, by cost."""
        able = [trial for trial in self.trials if trial.meets]
        able.sort(key=lambda trial: (trial.figures["cost_per_hour"], trial.figures[LATENCY]))
        front: list[Trial] = []
        for trial in able:
            if not front or trial.figures[LATENCY] < front[-1].figures[LATENCY]:
                front.append(trial)
        return front

    def cluster(self) -> dict[str, Any]:
        """The cluster config of the answer.

        Raises:
            ValueError: there is none.
        """
        if self.best is None:
            raise ValueError("no fleet keeps the bounds")
        return self.best.cluster(self.prices)

    def serve_lines(self) -> list[str]:
        """The ``vllm serve`` lines of the answer, one for each instance; none without an answer."""
        return self.best.serve_lines(self.options) if self.best else []

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return {
            "objective": self.question.objective,
            "target": self.question.target.words(),
            "model": self.question.model,
            "workload": self.workload.source,
            "requests": len(self.workload),
            "prices": {"file": self.question.prices, "as_of": self.prices.as_of},
            "candidates": self.candidates,
            "runs": self.runs,
            "pruned": dict(self.pruned),
            "details": self.details,
            "finalists": [finalist.to_dict(self.question) for finalist in self.finalists],
            "front": [trial.row() for trial in self.front],
            "changes": [
                {"condition": each.condition, "fleet": each.fleet and each.fleet.row()}
                for each in self.changes
            ],
            "hours": [{"rate": rate, "replicas": count} for rate, count in self.hours],
            "cluster": self.cluster() if self.best else None,
            "serve": self.serve_lines(),
        }

    def json_text(self) -> str:
        """:meth:`to_dict` as indented JSON."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    def csv_text(self) -> str:
        """A line for every fleet that was run on the whole workload."""
        rows = [trial.row() for trial in self.trials]
        columns = list(dict.fromkeys(name for row in rows for name in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()

    def to_pandas(self) -> pd.DataFrame:
        """The same as a DataFrame.

        Raises:
            ImportError: pandas is not installed.
        """
        import pandas

        return pandas.DataFrame([trial.row() for trial in self.trials])

    def save(self, folder: str | PathLike[str]) -> list[Path]:
        """Write :data:`FILES` into ``folder``: the cluster config, the lines that start vLLM, everything as
        JSON, and a table of the fleets that were run. Without an answer only the last two; the others of an
        earlier answer are removed."""
        root = Path(folder)
        root.mkdir(parents=True, exist_ok=True)
        texts = {"plan.json": self.json_text(), "candidates.csv": self.csv_text()}
        if self.best is not None:
            texts["fleet.json"] = json.dumps(self.cluster(), indent=2) + "\n"
            texts["serve.sh"] = "".join(f"{line}\n" for line in self.serve_lines())
        written = []
        for name in FILES:
            if name in texts:
                with atomic_write(root / name, "w") as handle:
                    handle.write(texts[name])
                written.append(root / name)
            else:
                (root / name).unlink(missing_ok=True)
        return written

    def text(self) -> str:
        """What ``servesim plan`` prints."""
        from servesim.explore.show_plan import plan_text

        return plan_text(self)

    def _repr_html_(self) -> str:
        """In a notebook."""
        from servesim.explore.show_plan import plan_html

        return plan_html(self)

    def __repr__(self) -> str:
        best = "no fleet keeps the bounds" if self.best is None else self.best.words()
        return f"<Plan: {best}; {self.candidates:,} candidates, {self.runs:,} runs>"
