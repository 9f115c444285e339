"""The question of a plan: which model, workload and service level, and among which fleets to look."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import field
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from servesim.errors import InputError
from servesim.explore.fleet import EXAMPLE_PRICES, OBJECTIVES, Fleet, read_prices
from servesim.explore.slo import parse_slo, per_request_slo
from servesim.explore.space import choices
from servesim.explore.warm_runs import Target
from servesim.slotted import dataclass
from servesim.specs.model import load_model
from servesim.specs.reading import read_yaml_object
from servesim.specs.validation import hint
from servesim.workload.arrivals import change_rate

if TYPE_CHECKING:
    from os import PathLike

    from servesim.explore.fleet import Prices
    from servesim.specs.options import RuntimeOptions
    from servesim.workload.request import Workload

MOST = 20_000
"""Candidates of a plan at most."""
DEFAULT_MODEL = "meta-llama/Llama-3.1-8B"
_CHOICES: dict[str, list[Any]] = {
    "tp": [1, 2, 4, 8],
    "pp": [1],
    "experts": [False],
    "prefill_share": [0, 0.25, 0.5],
    "dtype": [None],
    "kv_cache_dtype": ["auto", "fp8"],
    "max_num_seqs": [128, 256],
    "max_num_batched_tokens": [2048, 8192],
}
"""What is tried where the question does not say."""
FLEET_KEYS = ("hardware", "replicas", *_CHOICES)
_OTHER_NAMES = {
    "gpus": "hardware", "gpu": "hardware", "enable_expert_parallel": "experts", "ep": "experts",
    "tensor_parallel_size": "tp", "pipeline_parallel_size": "pp",
}  # fmt: skip
_KEYS = (
    "model", "slo", "goodput", "workload", "rates", "fleet", "max_gpus", "objective", "prices", "options",
)  # fmt: skip
_DESCRIBED = ("input_len", "output_len", "num_reqs", "arrival", "cv", "burst_size", "seed")
"""Keys of a workload that is described, as ``servesim workload synth`` takes them."""


@dataclass(slots=True)
class Question:
    """Everything that a plan is asked."""

    target: Target
    model: str = DEFAULT_MODEL
    workload: str | dict[str, Any] | None = None
    """Path, or its description; None: the file that the options name."""
    rates: list[float] = field(default_factory=list)
    """Requests per second in every hour of a day; the fleet has to serve the highest. Empty: the workload's
    own."""
    fleet: dict[str, list[Any]] = field(default_factory=dict)
    """Choices by name, of :data:`FLEET_KEYS`."""
    max_gpus: int = 16
    objective: str = "cost"
    prices: str = EXAMPLE_PRICES
    options: dict[str, Any] = field(default_factory=dict)
    """Run options that hold for every fleet."""

    @property
    def named_hardware(self) -> bool:
        """Whether the question says which hardware; kernel times that are missing are made for it then."""
        return "hardware" in self.fleet

    def candidates(self, prices: Prices) -> list[Fleet]:
        """Every fleet, by cost.

        Raises:
            InputError: there are none or too many, or a hardware has no price.
        """
        chosen = {**_CHOICES, "hardware": list(prices.gpus), **self.fleet}
        if load_model(self.model).is_moe and "experts" not in self.fleet:
            chosen["experts"] = [False, True]
        shares = chosen.pop("prefill_share")
        replicas = chosen.pop("replicas", None)
        found: dict[Fleet, None] = {}
        for values in product(*chosen.values()):
            shape = Fleet(self.model, replicas=1, **dict(zip(chosen, values, strict=True)))
            prices.of(shape.hardware)
            if shape.experts and shape.tp == 1:
                continue  # nothing to spread them over
            for count in replicas or range(1, self.max_gpus // shape.gpus_each + 1):
                for share in shares:
                    fleet = Fleet(**{**_fields(shape), "replicas": count, "prefill": _part(share, count)})
                    if fleet.gpus <= self.max_gpus:
                        found.setdefault(fleet)
            if len(found) > MOST:
                raise InputError(f"plan: more than {MOST:,} candidates; give fewer choices or --max-gpus")
        if not found:
            raise InputError(f"plan: no fleet has at most --max-gpus {self.max_gpus} GPUs; allow more")
        return sorted(found, key=lambda fleet: (fleet.cost_per_hour(prices), fleet.gpus))

    def load(self, options: RuntimeOptions, rate: float | None = None) -> Workload:
        """The workload, at its own rate, at the peak of the rates, or at ``rate`` times that."""
        from servesim.api import read_workload

        wanted = max(self.rates) if self.rates else None
        if isinstance(self.workload, dict):
            loaded = _described(self.workload, wanted or 1.0, options.seed)
        else:
            loaded = read_workload(options, self.workload)
            if wanted is not None:
                change_rate(loaded, wanted, options.seed)
        if rate is not None and (own := own_rate(loaded)) is not None:
            change_rate(loaded, own * rate, options.seed)
        return loaded


def own_rate(workload: Workload) -> float | None:
    """Entries per second; None where all arrive at once."""
    times = [request.arrival_ns for request in workload if request.predecessor < 0]
    span_ns = max(times) - min(times) if times else 0
    return (len(times) - 1) / span_ns * 1e9 if span_ns else None


def _fields(fleet: Fleet) -> dict[str, Any]:
    row = fleet.row()
    del row["gpus"]
    return row


def _part(share: float, count: int) -> int:
    """Instances of ``count`` that prefill; at least one on either side, 0 without a split."""
    return min(max(round(share * count), 1), count - 1) if share and count > 1 else 0


def _described(keys: Mapping[str, Any], rate: float, seed: int) -> Workload:
    from servesim.workload.generators import SynthSpec, synthesise

    own = {"num_reqs": 400, "seed": seed, **keys}
    return synthesise(SynthSpec(rate=rate, ids=False, **own))


def read_question(path: str | PathLike[str]) -> dict[str, Any]:
    """What a plan file holds, unchecked.

    Raises:
        InputError: it is no YAML mapping.
    """
    return read_yaml_object(Path(path))


def question_of(described: Mapping[str, Any], source: str = "plan") -> Question:
    """The question that a mapping describes, checked.

    Raises:
        InputError: an unknown key, or a value of the wrong kind.
    """
    for key in described:
        if key not in _KEYS:
            raise InputError(f"{source}: {key}: is no key of a plan; {hint(str(key), _KEYS)}")
    given = {key: value for key, value in described.items() if value is not None}
    goodput = given.pop("goodput", None)
    bounds = given.pop("slo", None)
    if not bounds:
        raise InputError(f"{source}: slo: is missing; give bounds such as ttft:p99:1000 tpot:p95:50")
    target = Target(parse_slo(bounds) if goodput is None else per_request_slo(bounds), goodput)
    if goodput is not None and not (isinstance(goodput, int | float) and 0 < goodput <= 1):
        raise InputError(f"{source}: goodput: {goodput!r} is not allowed; must be a share above 0, up to 1")
    question = Question(target, **given)
    _check(question, source)
    question.fleet = _fleet(question.fleet, source)
    return question


def _check(question: Question, source: str) -> None:
    if question.objective not in OBJECTIVES:
        raise InputError(
            f"{source}: objective: {question.objective!r} is not allowed; must be one of "
            f"{', '.join(OBJECTIVES)}"
        )
    if not (isinstance(question.max_gpus, int) and 1 <= question.max_gpus <= 4096):
        raise InputError(f"{source}: max_gpus: {question.max_gpus!r} is not allowed; must be from 1 to 4096")
    rates = question.rates
    if not isinstance(rates, list) or any(not _positive(rate) for rate in rates):
        raise InputError(f"{source}: rates: must be a list of requests per second above 0, one for each hour")
    if isinstance(question.workload, Mapping):
        for key in question.workload:
            if key not in _DESCRIBED:
                raise InputError(
                    f"{source}: workload: {key}: is no key of a description; {hint(str(key), _DESCRIBED)}"
                )
        if not rates:
            raise InputError(f"{source}: rates: is missing; a workload that is described has none of its own")
    if not isinstance(question.fleet, Mapping):
        raise InputError(f"{source}: fleet: must be an object of choices, such as {{tp: [1, 2]}}")
    read_prices(question.prices)


def _positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _fleet(given: Mapping[str, Any], source: str) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for key, entry in given.items():
        name = str(key).lstrip("-").replace("-", "_")
        name = _OTHER_NAMES.get(name, name)
        if name not in FLEET_KEYS:
            raise InputError(f"{source}: fleet: {key}: is no choice of a fleet; {hint(name, FLEET_KEYS)}")
        values = choices(entry, f"{source}: fleet: {key}")
        allowed = _KINDS.get(name)
        for value in values:
            if allowed is not None and not allowed[0](value):
                raise InputError(f"{source}: fleet: {key}: {value!r} is not allowed; must be {allowed[1]}")
        found[name] = values
    return found


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 1_000_000


_WHOLE = (_whole, "a whole number above 0")
_KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "hardware": (lambda value: isinstance(value, str), "a hardware, such as H100"),
    "replicas": _WHOLE,
    "tp": _WHOLE,
    "pp": _WHOLE,
    "max_num_seqs": _WHOLE,
    "max_num_batched_tokens": _WHOLE,
    "experts": (lambda value: isinstance(value, bool), "true or false"),
    "prefill_share": (lambda value: value == 0 or (_positive(value) and value < 1), "from 0 to below 1"),
}
