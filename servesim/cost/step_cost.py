"""What a step costs: one object for an instance, its pipeline stages, or a group that goes in lock-step.

A wave is one batch of every member of a data-parallel group, or of a single instance; it passes the pipeline
stages one after the other. In each stage

- members compute on their own and the wave leaves with the slowest, if no experts are shared;
- members that share experts meet in every expert layer: what their blocks take apart from the experts is that
  of the slowest member, then come exchange and experts (:mod:`servesim.cost.expert_stage`).

When every member's tokens fit its CUDA graphs, all are padded to the graph that holds the largest batch;
otherwise each computes its own count, unpadded. A member without work runs a dummy batch of one
token: its dense layers and experts run, attention and output head do not. (All as vLLM does.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from servesim.cost.attention_lookup import whole_ns
from servesim.cost.batch_shape import IDLE, scheduled_tokens
from servesim.cost.step_terms import ACTIVATION_BYTES
from servesim.cost.terms import LayerCost, Role

if TYPE_CHECKING:
    from collections.abc import Sequence

    from servesim.cost.batch_shape import BatchShape
    from servesim.cost.expert_stage import ExpertStage
    from servesim.cost.stage_cost import StageCost
    from servesim.cost.terms import Stage, Term
    from servesim.network.topology import Dimension

_IDLE_TOKENS = 1
_WORD = (1 << 64) - 1
_MIX = 0x9E3779B97F4A7C15  # odd, with no pattern in its bits: 2**64 over the golden ratio


class Member(NamedTuple):
    """One instance's part of a stage."""

    cost: StageCost
    terms: Sequence[Term]
    """Those of ``cost``, or what stands in their place where something lies elsewhere."""

    def role_ns(self, role: Role, batch: BatchShape, tokens: int) -> float:
        """ns of the terms of one role."""
        ns = 0.0
        for term in self.terms:
            if term.role is role:
                ns += term.ns(batch, tokens)
        return ns


class GroupStage:
    """One pipeline stage of all members.

    ``experts``: None, or one for every run of consecutive members that share experts, all of the same length.
    """

    def __init__(
        self,
        stage: Stage,
        members: Sequence[Member],
        experts: Sequence[ExpertStage] | None,
        link: Dimension,
    ) -> None:
        self.members = members
        self._stage = stage
        self._experts = experts
        width = len(members) // len(experts) if experts else 1
        self._teams = [range(first, first + width) for first in range(0, len(members), width)]
        self._roles = [role for role in Role if role is not Role.HOST]
        self._link = link
        self._send = members[0].cost.tables.collective("send", 2)

    def compute_ns(self, batches: Sequence[BatchShape], tokens: Sequence[int], wave: int) -> int:
        """Until the slowest member is through; ``tokens``: what each computes, padding included."""
        longest = 0.0
        for number, team in enumerate(self._teams):
            ns = 0.0
            for role in self._roles:
                ns += max(self.members[at].role_ns(role, batches[at], tokens[at]) for at in team)
            if self._experts is not None:
                theirs = tokens[team.start : team.stop]
                ns += self._experts[number].ns(sum(theirs), max(theirs), wave)
            if self._stage.is_first:
                floor, host = self._host_ns(batches, tokens, team)
                ns = max(ns, floor) + host
            longest = max(longest, ns)
        return whole_ns(longest)

    def _host_ns(
        self, batches: Sequence[BatchShape], tokens: Sequence[int], team: range
    ) -> tuple[float, float]:
        """(least time of the accelerators' part, what the host adds to it) of a team, by its slowest host."""
        hosts = [self.members[at].cost.host for at in team]
        floor = max(host.floor_ns(batches[at]) for host, at in zip(hosts, team, strict=True))
        return floor, max(self.members[at].role_ns(Role.HOST, batches[at], tokens[at]) for at in team)

    def explain(self, batches: Sequence[BatchShape], tokens: Sequence[int], wave: int) -> list[LayerCost]:
        """The lines of the slowest members of the slowest team."""
        lines: list[LayerCost] = []
        for number, team in enumerate(self._teams):
            own: list[LayerCost] = []
            for role in self._roles:
                slowest = max(team, key=lambda at: self.members[at].role_ns(role, batches[at], tokens[at]))
                for term in self.members[slowest].terms:
                    if term.role is role:
                        own += term.explain(batches[slowest], tokens[slowest])
            if self._experts is not None:
                theirs = tokens[team.start : team.stop]
                own += self._experts[number].explain(sum(theirs), max(theirs), wave)
            if self._stage.is_first:
                own += self._explain_host(batches, tokens, team, sum(line.total_us for line in own))
            if sum(line.total_us for line in own) > sum(line.total_us for line in lines):
                lines = own
        return lines

    def _explain_host(
        self, batches: Sequence[BatchShape], tokens: Sequence[int], team: range, gpu_us: float
    ) -> list[LayerCost]:
        """The lines of the host that the team waits for longest, beside ``gpu_us`` of its accelerators."""
        latest = max(team, key=lambda at: self.members[at].cost.host.floor_ns(batches[at]))
        slowest = max(team, key=lambda at: self.members[at].role_ns(Role.HOST, batches[at], tokens[at]))
        lines = self.members[latest].cost.host.explain_wait(batches[latest], gpu_us)
        for term in self.members[slowest].terms:
            if term.role is Role.HOST:
                lines += term.explain(batches[slowest], tokens[slowest])
        return lines

    def hand_over_ns(self, tokens: Sequence[int]) -> int:
        """The hidden states of the largest member on their way to the next stage; 0 after the last."""
        if self._stage.is_last:
            return 0
        payload = max(tokens) * self._stage.model.hidden_size * ACTIVATION_BYTES
        if self._send is not None:
            return round(float(self._send.at(payload)[0]) * 1000.0)
        return round(self._link.send_ns(payload))


class StepCost:
    """What the steps of a loop cost, members and stages together."""

    def __init__(self, stages: Sequence[GroupStage]) -> None:
        """``stages``: in order, all of the same members."""
        self._stages = stages
        members = [member for stage in stages for member in stage.members]
        self.bundle = members[0].cost.bundle
        """The kernel times of the first member."""
        self._padding = min((member.cost.padding for member in members), key=len)
        self.alone: StageCost | None = None
        """The one stage of a single instance that keeps nothing elsewhere: its steps need no stages, and its
        decodes come from a cache."""
        if len(members) == 1 and stages[0]._experts is None and members[0].terms is members[0].cost.terms:
            self.alone = members[0].cost

    def stages_ns(self, batches: Sequence[BatchShape | None]) -> Sequence[tuple[int, int]]:
        """(compute, hand-over to the next stage) in ns of every pipeline stage.

        ``batches``: one per member, None for a member without work.
        """
        if self.alone is not None:
            (batch,) = batches
            assert batch is not None
            return ((self.alone.step_ns(batch), 0),)
        return self.plain_ns(batches)

    def plain_ns(self, batches: Sequence[BatchShape | None]) -> Sequence[tuple[int, int]]:
        """The same as the sum of all terms, without any cache of whole steps."""
        shapes, tokens, wave = self._wave(batches)
        return [
            (stage.compute_ns(shapes, tokens, wave), stage.hand_over_ns(tokens)) for stage in self._stages
        ]

    def explain(self, batches: Sequence[BatchShape | None]) -> list[list[LayerCost]]:
        """The lines of every stage, the hand-over to the next one last; they add up to :meth:`stages_ns`."""
        shapes, tokens, wave = self._wave(batches)
        found = []
        for stage in self._stages:
            lines = stage.explain(shapes, tokens, wave)
            if hand_over := stage.hand_over_ns(tokens):
                lines.append(LayerCost("to the next stage", 1, hand_over / 1000.0, "hidden states, send"))
            found.append(lines)
        return found

    def _wave(self, batches: Sequence[BatchShape | None]) -> tuple[list[BatchShape], list[int], int]:
        """(batch shapes, tokens with padding, number) of a wave."""
        tokens = [_IDLE_TOKENS if batch is None else scheduled_tokens(batch) for batch in batches]
        if (most := max(tokens)) < len(self._padding):
            tokens = [self._padding.of(most)] * len(tokens)
        return [batch or IDLE for batch in batches], tokens, _wave_number(batches)


def _wave_number(batches: Sequence[BatchShape | None]) -> int:
    """A number below 2**64 that the members' step numbers decide: no two waves of a run share it, but by
    chance."""
    number = 0
    for batch in batches:
        number = ((number ^ (0 if batch is None else batch.step + 1)) * _MIX + 1) & _WORD
    return number
