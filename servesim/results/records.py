"""What the engine writes down while it runs: one row a step and one record a request, nothing per token.

The time of a token is the end of the step that produced it, so a request only remembers *which* steps
produced its tokens (:attr:`RequestRecord.token_steps`); inter-token latencies are differences of the step
ends, computed when the results are written.
"""

from __future__ import annotations

from array import array
from dataclasses import field
from typing import TYPE_CHECKING, Any, Protocol

from servesim.results.columns import Column
from servesim.results.request_log import RequestLog
from servesim.results.request_record import RequestRecord as RequestRecord
from servesim.results.step_log import StepLog
from servesim.slotted import dataclass

if TYPE_CHECKING:
    from servesim.memory.plan import KvCapacity
    from servesim.results.stated_errors import Reach, StatedError, Uncertainty
    from servesim.specs.cluster import InstanceSpec
    from servesim.specs.instance_options import InstanceOptions


@dataclass(slots=True)
class RejectedRequest:
    """A request that could never run, with the reason given to the user."""

    request: int
    instance: int
    arrival_ns: int
    reason: str


@dataclass(slots=True, frozen=True)
class TierMemory:
    """The lower tier of an instance's prefix cache."""

    storage: str
    """``CPU`` or ``CXL``."""
    pool: int
    """Instances with the same number use the same chunks and the same capacity."""
    shared: bool
    """Whether the pool is for all instances of the node."""
    capacity_bytes: int
    chunk_tokens: int
    chunk_bytes: int
    bandwidth_gbs: float
    """What all that read from the memory have together."""
    latency_ns: int

    @property
    def tokens(self) -> int:
        """Tokens that fit, in whole chunks."""
        return self.capacity_bytes // self.chunk_bytes * self.chunk_tokens


class Pricing(Protocol):
    """What priced the steps of an instance during the run."""

    def us(self, batch: Any) -> float:
        """µs of a step; see :class:`servesim.cost.terms.BatchShape`."""

    def layers(self, batch: Any) -> list[Any]:
        """The step's lines; see :class:`servesim.cost.terms.LayerCost`."""


@dataclass(slots=True)
class DummyLog:
    """Waves in which a member of a lock-step group had no work and ran a dummy batch of one token."""

    start_ns: array[int] = field(default_factory=lambda: array("q"))
    end_ns: array[int] = field(default_factory=lambda: array("q"))

    def __len__(self) -> int:
        return len(self.start_ns)


@dataclass(slots=True)
class MovedBytes:
    """A transfer of KV between instances or from a lower tier."""

    start_ns: int
    """When it was asked for."""
    end_ns: int
    size: int
    ports: tuple[str, ...]
    """The links and memories that it takes."""


@dataclass(slots=True)
class StageLog:
    """When one stage of a pipeline computed, an entry a step."""

    start_ns: array[int] = field(default_factory=lambda: array("q"))
    end_ns: array[int] = field(default_factory=lambda: array("q"))


@dataclass(slots=True)
class GateLog:
    """Steps that had to wait for KV from elsewhere before they could compute."""

    step: array[int] = field(default_factory=lambda: array("q"))
    ns: array[int] = field(default_factory=lambda: array("q"))


@dataclass(slots=True)
class SpeculationLog:
    """What became of the drafts of an instance, counted as vLLM counts it."""

    num_drafts: int = 0
    """Verifications."""
    accepted_per_position: list[int] = field(default_factory=list)
    """Verifications that accepted at least 1, 2, … drafts."""
    draft_tokens: array[int] = field(default_factory=lambda: array("q"))
    """Drafts verified by each step."""
    accepted_tokens: array[int] = field(default_factory=lambda: array("q"))
    """Those of them that the step's output accepted."""

    def note_verification(self, tokens: int, positions: int) -> None:
        """A verification has accepted ``tokens`` drafts, of up to ``positions``."""
        self.num_drafts += 1
        if not self.accepted_per_position:
            self.accepted_per_position = [0] * positions
        for position in range(tokens):
            self.accepted_per_position[position] += 1


@dataclass(slots=True)
class InstanceLog:
    """Everything recorded about one instance."""

    index: int
    node: int
    spec: InstanceSpec
    options: InstanceOptions
    capacity: KvCapacity
    bundle_source: str
    """One line: where the kernel times come from."""
    host: str
    """One line: what its host adds to them."""
    steps: StepLog = field(default_factory=StepLog)
    tier: TierMemory | None = None
    """Where its prefix cache keeps what the NPUs overwrite; None: nowhere."""
    dummies: DummyLog = field(default_factory=DummyLog)
    gates: GateLog = field(default_factory=GateLog)
    stages: list[StageLog] = field(default_factory=list)
    """Of a pipeline: its stages. Empty where there is one only."""
    stated_error: StatedError | None = None
    """How far its kernel times are off, as far as that was measured."""
    uncertainty: Uncertainty | None = None
    """80 % interval of its step times; None: not known."""
    reach: Reach | None = None
    """Where the measurements under its kernel times end."""
    pricing: Pricing | None = None
    """The cost object of the run itself."""
    notes: tuple[str, ...] = ()
    """Lines about its memory that the user should see."""
    front_end_us: tuple[float, float] = (0.0, 0.0)
    """Between client and engine, each request: a constant, and the mean of what is drawn beside it."""
    speculation: SpeculationLog | None = None
    """What became of its drafts; None: it does not speculate."""
    kv_reads: array[int] | None = None
    """Tokens of KV that the NPUs read for the attention of each step; kept only where placement or offloading
    may have it in other memories."""
    window_reads: dict[int, array[int]] = field(default_factory=dict)
    """The same of layers that see so many tokens, where there are any."""


@dataclass(slots=True)
class RunLog:
    """Raw outcome of a run; :class:`servesim.results.result.Result` is the public view of it."""

    instances: list[InstanceLog]
    requests: RequestLog = field(default_factory=RequestLog)
    rejected: list[RejectedRequest] = field(default_factory=list)
    end_ns: int = 0
    pipeline_tracks: list[array[int]] = field(default_factory=list)
    """Step ends in ns of the groups of requests that travel together through a pipeline."""
    notes: list[str] = field(default_factory=list)
    """What was asked for and does not act, or not in full: one line each."""
    moved: list[MovedBytes] = field(default_factory=list)
    """Transfers in the order in which they ended."""

    def add_ended(self, record: RequestRecord) -> None:
        """Take in the record of a request that has left the system."""
        track, entry, _ = record.token_steps[0]
        beyond = track - len(self.instances)
        ends = self.instances[track].steps.end_ns if beyond < 0 else self.pipeline_tracks[beyond]
        record.first_token_ns = ends[entry]
        self.requests.append(record)

    def close(self) -> None:
        """Bring everything into its final order once nothing happens any more."""
        self.end_ns = int(self.requests.column("end_ns").max(initial=0))
        self.requests = self.requests.in_order()
        self.rejected.sort(key=lambda rejected: rejected.request)

    def tracks(self) -> list[Column]:
        """Token times in ns: track i is the step ends of instance i, and after those come
        :attr:`pipeline_tracks`."""
        of_pipelines = [Column("q", times) for times in self.pipeline_tracks]
        return [*(instance.steps.end_ns for instance in self.instances), *of_pipelines]
