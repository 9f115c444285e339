"""Decides what an instance computes in its next step, as vLLM V1's scheduler does.

A step first serves the running requests in admission order, each with the tokens it lacks as far as the token
budget goes; if no KV block can be had for one, the running request that the queue policy names is preempted.
If none was, waiting requests are admitted from the head of the queue. There is no prefill phase and no decode
phase: whatever has computed all its known tokens samples one more.

Decoding requests are not visited one by one: they live in a :class:`~servesim.engine.decode_set.DecodeSet`,
which names the few that need a block or end at the present step. With speculative decoding, which gives
requests an unequal number of tokens, they are (:class:`~servesim.engine.speculation.Speculation`).
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Final, cast

from servesim.engine.adapters import AdapterSlots
from servesim.engine.batch import Batch, Outputs
from servesim.engine.connector import Found
from servesim.engine.decode_set import DecodeSet, by_order
from servesim.engine.group_changes import GroupChanges
from servesim.engine.limits import PrefillCadence
from servesim.engine.pipeline import took_part
from servesim.engine.queue_policy import FirstComeFirstServed, WaitingQueue
from servesim.engine.request_state import Phase
from servesim.errors import RunError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from servesim.engine.connector import Connector
    from servesim.engine.kv_loads import KvLoads, LateFrees
    from servesim.engine.limits import SchedulerLimits
    from servesim.engine.pipeline import Pipeline
    from servesim.engine.queue_policy import QueuePolicy
    from servesim.engine.request_state import RequestState
    from servesim.engine.speculation import Speculation
    from servesim.memory.group_cache import GroupedKvCache
    from servesim.memory.kv_cache import AnyKvCache, BlockTable, KvCache


MOST_FRUITLESS: Final = 10_000
"""Preempting steps without a token between them, after which a run is given up. A request that loses its
blocks leaves room to one before it, so a run that goes on needs about as many as it has requests running."""


class Scheduler:
    """Waiting and running requests of one instance, and the KV cache they compete for."""

    __slots__ = (
        "_adapters",
        "_admissions",
        "_admits_whole",
        "_blocked_at",
        "_cadence",
        "_cap",
        "_cap_varies",
        "_frees",
        "_fruitless",
        "_grouped",
        "_last_alone",
        "_late_frees",
        "_list_lengths",
        "_list_requests",
        "_policy",
        "_pool",
        "_queue",
        "connectors",
        "decodes",
        "held",
        "kv",
        "limits",
        "loads",
        "pipeline",
        "prefilling",
        "running",
        "speculation",
        "waiting",
    )

    def __init__(
        self,
        limits: SchedulerLimits,
        kv: AnyKvCache,
        *,
        policy: QueuePolicy | None = None,
        connectors: Sequence[Connector] = (),
        pipeline: Pipeline | None = None,
        speculation: Speculation | None = None,
        loads: KvLoads | None = None,
        late_frees: LateFrees | None = None,
        list_requests: bool = False,
        list_lengths: bool = False,
    ) -> None:
        """
        Args:
            limits: what bounds a step.
            kv: the blocks that requests compete for.
            policy: order of the queue and choice of a victim; first come, first served by default.
            connectors: bring KV from elsewhere and take it there.
            pipeline: which decoding requests can be scheduled when; given where there are several stages.
            speculation: how drafts are scheduled and verified; None: one token a step.
            loads: requests that wait with blocks in hand; given where a connector reads KV beside the steps.
            late_frees: blocks that steps in flight still write to; None: blocks are free at once.
            list_requests: whether batches list their requests one by one (:attr:`Batch.entries`).
            list_lengths: whether batches list the KV lengths of their decodes (:attr:`Batch.kv_lengths`).
        """
        self.limits = limits
        self.kv = kv
        self._pool = kv.pool
        self.connectors = tuple(connectors)
        self._policy = policy or FirstComeFirstServed()
        self._queue = WaitingQueue(self._policy, loads)
        self.waiting = self._queue.requests
        self.running: list[RequestState] = []
        """Every running request, in admission order; at most ``max_num_seqs``."""
        self.prefilling: list[RequestState] = []
        """Those of ``running`` that still lack known tokens, in admission order."""
        self.pipeline = pipeline
        self.decodes = pipeline.first() if pipeline else DecodeSet(kv.period)
        """Decoding requests that can be scheduled."""
        self.speculation = speculation
        self.loads = loads
        self._late_frees = late_frees
        self.held = 0
        """Finished requests that keep their blocks for now."""
        self._grouped = GroupChanges(kv, pipelined=pipeline is not None) if kv.several else None
        self._list_requests = list_requests
        self._list_lengths = list_lengths
        self._admissions = 0
        self._adapters = AdapterSlots(limits.max_loras, limits.counts_all_loras) if limits.max_loras else None
        self._frees = 0
        self._fruitless = 0
        """Steps with preemptions since the last one that generated a token."""
        self._cap = limits.long_prefill_token_threshold
        """The threshold in the present step; 0: none."""
        self._cap_varies = self._cap > 0 and (not limits.caps_lone_prefill or limits.shared_tokens > 0)
        """Whether it depends on the number of requests."""
        self._cadence = PrefillCadence(limits.prefill_interval) if limits.prefill_interval > 1 else None
        self._last_alone = False
        """Whether the last batch was scheduled with nothing in flight, so that all its tokens were known."""
        self._admits_whole = not (
            connectors or pipeline or speculation or self._grouped or self._adapters or self._cadence
        ) and not (self._cap_varies or limits.skip_prefill or list_requests or kv.clips)
        """Whether a prompt that shares nothing and fits the step needs no more than its blocks."""
        self._blocked_at: tuple[int, int] | None = None
        """State of the cache at which the head of the queue found no room; until it changes, it finds
        none."""

    @property
    def has_work(self) -> bool:
        """Whether a step could compute something; in a pipeline, whether anybody is here."""
        if self.pipeline:
            return bool(self.running or self.waiting)
        busy = self.decodes.count or self.prefilling or self.waiting
        return bool(busy or (self.speculation and self.running))

    @property
    def awaits_others(self) -> bool:
        """Whether something will happen that does not depend on its steps: blocks come back, or KV comes."""
        return bool(self.held or (self.loads and self.loads.under_way))

    # ------------------------------------------------------------------ a step

    def schedule(self, step: int, now_ns: int, in_flight: bool) -> Batch:
        """The batch of step ``step``; empty if nothing can be computed now.

        ``in_flight``: the tokens of the step before are not known yet (asynchronous scheduling).
        """
        batch = Batch(step)
        if self._list_requests:
            batch.entries = []
        if self._list_lengths:
            batch.kv_lengths = []
        if self.speculation:
            batch.outputs = Outputs()
        pipeline, cadence, adapters = self.pipeline, self._cadence, self._adapters
        if self._late_frees:
            self._late_frees.note_scheduled(step - 1)
        if pipeline:
            self.decodes = pipeline.next_set() or self.decodes
            in_flight = self.decodes.flying is not None
        decodes = self.decodes
        if decodes.joined and decodes.sharing and not pipeline:
            # what sat out the last step: its tokens became known with the step before
            for state in sorted(decodes.joined & decodes.sharing, key=by_order):
                self._publish(state, decodes.length(state))
        if self._grouped:
            self._grouped.new_step(in_flight)
        if self._cap_varies:
            self._cap = self._cap_now()
        if cadence:
            cadence.begin(len(self.running) > len(self.prefilling))
        if adapters:
            adapters.begin()
        left, completed, stalled = self._serve_running(batch, in_flight)
        if adapters:
            adapters.note_running(self.running, decodes)
        if decodes.count > len(decodes.joined):
            batch.after = decodes.flying
        if decodes.count:
            batch.add_decodes(decodes.count, *decodes.lengths())
            if batch.kv_lengths is not None:
                batch.kv_lengths += decodes.each_length()
            if batch.entries is not None:
                ready = (s for s in self.running if s.phase is Phase.DECODE and s.home is decodes)
                batch.entries += [(state.request.index, 1) for state in ready]
            if self._knows_tokens(in_flight):
                # the token computed now is known already, so a block it fills can be hashed at once
                sharing = decodes.sharing
                full = decodes.everyone() if self._grouped and sharing else decodes.at_boundary(1)
                for state in [s for s in full if s in sharing] if sharing else ():
                    self._publish(state, decodes.length(state) + 1)
            elif decodes.joined and decodes.sharing:
                for state in decodes.at_boundary(1):
                    if state in decodes.sharing and self._sat_out(state):
                        self._publish(state, decodes.length(state) + 1)
        if not batch.preempted:
            if self.waiting:
                self._admit(batch, left, now_ns, completed)
            if cadence:
                cadence.admitted(len(self.waiting) - self._queue.passed_over)
        if decodes.count or completed:
            self._fruitless = 0
        elif batch.preempted:
            self._note_fruitless()
        finishing = list(decodes.advance())
        for state in completed:
            if self.speculation:
                self.speculation.sample(batch, state, state.computed - state.known)
                continue
            if pipeline:
                state.track, state.run_start = decodes.track, len(decodes.token_times)
            else:
                state.run_start = step
            last = state.known + 1 == state.total_tokens
            if last:
                finishing.append(state)
            if not last or state.stops:
                state.phase = Phase.DECODE
                decodes.add(state)
        if finishing:
            batch.end_with(finishing)
        if not batch.is_empty:
            self._last_alone = not in_flight
            if self._grouped:
                self._grouped.scheduled(completed, stalled)
            if self._late_frees:
                self._late_frees.note_scheduled(step)
        if cadence:
            cadence.end(batch)
        if pipeline:
            if not batch.is_empty:
                pipeline.sent(batch, decodes)
            self.decodes = pipeline.behind(decodes, not batch.is_empty)
        else:
            decodes.joined.clear()
        for state in stalled:
            if pipeline:
                state.track, state.run_start = self.decodes.track, len(self.decodes.token_times)
            elif batch.is_empty:
                state.run_start = step  # the next batch has this number
            self.decodes.joined.add(state)
            self.decodes.add(state)
        return batch

    def _serve_running(
        self, batch: Batch, in_flight: bool
    ) -> tuple[int, list[RequestState], list[RequestState]]:
        """Serve running requests; returns (budget left, prefills completed, decodes the budget did not
        reach).

        Usually the budget covers every decode, and only those at a block boundary and the prefilling requests
        need a look. Otherwise the running requests are walked in order.
        """
        if self.speculation:
            return self._serve_in_turn(batch, in_flight)
        decodes, prefilling, budget = self.decodes, self.prefilling, self.limits.max_num_batched_tokens
        if self._holds_prefills:
            prefilling = []
        left = budget - decodes.count
        if not prefilling and left >= 0 and not self._grouped:
            boundary = decodes.at_boundary()
            if len(boundary) <= self.kv.pool.num_free:
                self.grow(boundary)
                return left, [], []
        if (self._policy.strikes_anywhere or self._late_frees) and self._may_run_short():
            return self._serve_in_turn(batch, in_flight)
        if not prefilling and left >= 0:
            return self._serve(self._changing(in_flight), left, True, batch, in_flight)
        wanted = sum(self._capped(state.known - state.computed) for state in prefilling)
        decodes_first = left >= 0 and self.running[-len(prefilling)] is prefilling[0]
        if wanted <= left or decodes_first:
            due = {*self._changing(in_flight), *prefilling}
            if decodes.sharing and self._knows_tokens(in_flight):
                due.update(decodes.sharing.intersection(decodes.at_boundary(1)))  # for the order of hashing
            return self._serve(sorted(due, key=by_order), left, True, batch, in_flight)
        return self._serve(tuple(self.running), budget, False, batch, in_flight)

    def _capped(self, tokens: int) -> int:
        return self._cap if 0 < self._cap < tokens else tokens

    def _cap_now(self) -> int:
        limits, requests = self.limits, len(self.running) + len(self.waiting)
        if requests < 2 and not limits.caps_lone_prefill:
            return 0
        return max(limits.long_prefill_token_threshold, limits.shared_tokens // max(requests, 1))

    @property
    def _holds_prefills(self) -> bool:
        """Whether the present step computes no prompts."""
        return self._cadence is not None and self._cadence.holds

    def grow(self, boundary: Sequence[RequestState]) -> None:
        """One more block for each of these decoding requests, all of whose blocks are full."""
        taken = self._pool.take(len(boundary))
        for state, block in zip(boundary, taken):  # noqa: B905 - of equal length; checking costs
            table: BlockTable = state.table
            table.blocks.append(block)
        sharing = self.decodes.sharing
        for state in [state for state in boundary if state in sharing] if sharing else ():
            self._publish(state, self.decodes.length(state))

    def grow_on(self, steps: int, used: list[int]) -> int:
        """Blocks for the decodes of the next ``steps`` steps, none of them shared, as far as there are any.

        Adds the blocks in use in each of those steps to ``used``, and returns their number.
        """
        decodes, pool = self.decodes, self._pool
        for ahead in range(steps):
            boundary = decodes.at_boundary(ahead)
            if boundary:
                if len(boundary) > pool.num_free:
                    return ahead
                self.grow(boundary)
            used.append(pool.usable - pool.num_free)
        return steps

    def _publish(self, state: RequestState, tokens: int) -> None:
        """Let other requests hit the full blocks among the first ``tokens`` tokens of a decoding request."""
        self.kv.register_shared(state.table, tokens)
        if not state.table.awaits_hash:
            self.decodes.sharing.discard(state)

    def _serve(
        self, due: Iterable[RequestState], left: int, decodes_paid: bool, batch: Batch, in_flight: bool
    ) -> tuple[int, list[RequestState], list[RequestState]]:
        """Serve ``due`` in order with ``left`` tokens of budget; ``decodes_paid``: without those of the
        decodes."""
        decodes, kv, grouped = self.decodes, self.kv, self._grouped
        completed: list[RequestState] = []
        stalled: list[RequestState] = []
        for state in due:
            table = state.table
            if state.phase is Phase.DECODE:
                if state.home is not decodes:
                    continue  # its token is in flight in a pipeline
                computed = decodes.length(state)
                if decodes_paid:
                    tokens = 1
                else:
                    tokens = min(left, 1)
                    left -= tokens
                    if not tokens:
                        stalled.append(state)
            elif state.phase is Phase.PREFILL and not self._holds_prefills:
                computed = state.computed
                tokens = self._chunk(state, left)
            else:
                continue  # its last token is in flight, or it was preempted just now
            if not tokens:
                continue
            reach = computed + tokens
            if grouped:
                self._release(state, computed, batch.step, in_flight)
            if kv.shortage(table, reach) > 0 and not self._make_room(state, reach, batch, in_flight):
                break
            kv.grow(table, reach)
            if state.phase is Phase.DECODE:
                if state in decodes.sharing:
                    self._publish(state, reach if self._knows_token(state, in_flight) else computed)
                continue
            self._computed(table, reach)
            left -= tokens
            if self._note_chunk(state, tokens, batch):
                completed.append(state)
        if completed:
            self.prefilling = [state for state in self.prefilling if state.computed < state.known]
        for state in stalled:
            self._stall(state, batch)
        return left, completed, stalled

    def _knows_tokens(self, in_flight: bool) -> bool:
        """Whether the last tokens of the requests that can decode now are known already."""
        return not in_flight or (self.pipeline is not None and not self.pipeline.ring)

    def _knows_token(self, state: RequestState, in_flight: bool) -> bool:
        """Whether the last token of a request that can decode now is known already."""
        return self._sat_out(state) or self._knows_tokens(in_flight)

    def _sat_out(self, state: RequestState) -> bool:
        """Whether a request that can decode now is not in the newest batch in flight of its decode set."""
        return not took_part(state, self.decodes) if self.pipeline else state in self.decodes.joined

    def _may_run_short(self) -> bool:
        """Whether blocks may be missing for what this step could serve of the running requests."""
        free = self.kv.pool.num_free
        decodes = self.decodes
        wanted = decodes.count * self.kv.blocks_for(1) if self._grouped else len(decodes.at_boundary())
        for state in self.prefilling:
            reach = state.computed + self._capped(state.known - state.computed)
            wanted += max(self.kv.shortage(state.table, reach) + free, 0)
        return wanted > free

    def _serve_in_turn(
        self, batch: Batch, in_flight: bool
    ) -> tuple[int, list[RequestState], list[RequestState]]:
        """As :meth:`_serve_running`, one by one: with speculative decoding, where preempting one may free no
        blocks yet, and where any running request may be preempted, those that wait for their turn, and those
        that had it, which give back the tokens they were to compute."""
        decodes, kv, running, limits = self.decodes, self.kv, self.running, self.limits
        speculation, late_frees = self.speculation, self._late_frees
        left, turn, beside = limits.max_num_batched_tokens, 0, 0
        if speculation:
            left, beside = left - speculation.reserve, speculation.slots
        served: dict[RequestState, int] = {}
        while turn < len(running) and left > 0:
            state = running[turn]
            tokens, reach = self._due(state, left)
            if self._grouped and tokens:
                self._release(state, reach - tokens, batch.step, in_flight)
            while tokens and kv.shortage(state.table, reach) > 0:
                at = self._policy.victim(running, turn)
                if late_frees and late_frees.spares and self._is_flying(running[at]):
                    break
                victim = running.pop(at)
                taken_back = served.pop(victim, 0)
                left += taken_back + beside if taken_back else 0
                if at < turn and (taken_back or limits.counts_all_victims):
                    turn -= 1
                self._preempt(victim, batch, in_flight, taken_back)
                if victim is state:
                    break
            if state.phase is Phase.WAITING:  # it had to go itself
                if limits.serves_on:
                    continue
                break
            if tokens and kv.shortage(state.table, reach) > 0:
                break  # the victim was spared
            turn += 1
            if not tokens:
                continue
            kv.grow(state.table, reach)
            if speculation:
                self._computed(state.table, speculation.note(state, state.computed + tokens))
            elif state.phase is Phase.PREFILL:
                self._computed(state.table, reach)
                if self._cadence:
                    self._cadence.note_prefill()
            elif state in decodes.sharing:
                self._publish(state, reach if self._knows_token(state, in_flight) else reach - tokens)
            served[state] = tokens
            left -= tokens + beside
        completed = []
        for state, tokens in served.items():
            if speculation:
                speculation.serve(batch, state, tokens)
                if self._adapters:
                    self._adapters.note(state)
            if state.phase is Phase.PREFILL and self._note_chunk(state, tokens, batch):
                completed.append(state)
        self.prefilling = [state for state in self.prefilling if state.computed < state.known]
        stalled = [
            state
            for state in running
            if state.phase is Phase.DECODE and state.home is decodes and state not in served
        ]
        for state in stalled:
            self._stall(state, batch)
        return left, completed, stalled

    def _due(self, state: RequestState, left: int) -> tuple[int, int]:
        """(tokens that a running request can compute now with ``left`` of budget, its length after them)."""
        if state.phase is Phase.DECODE and state.home is self.decodes:
            return 1, self.decodes.length(state) + 1
        if state.phase is Phase.PREFILL and not self._holds_prefills:
            tokens = self._chunk(state, left)
        elif self.speculation and state.phase is Phase.VERIFY:
            tokens = max(min(self._capped(self.speculation.wanted(state)), left), 0)
        else:
            return 0, 0  # its token is in flight
        reach = state.computed + tokens
        return tokens, self.speculation.reach(reach) if self.speculation else reach

    def _note_chunk(self, state: RequestState, tokens: int, batch: Batch) -> bool:
        """Put the next ``tokens`` tokens of a prefilling request into the batch; True if they are its last
        known ones."""
        computed = state.computed
        state.computed = reach = computed + tokens
        if self._grouped:
            self._grouped.note_chunk(state, tokens)
        if self._cadence:
            self._cadence.note_prefill()
        if self._adapters:
            self._adapters.note(state)
        if self.pipeline or self._late_frees:
            state.chunk = batch
        batch.add_request(tokens, computed)
        if state.lost:
            batch.note_again(state.lost, computed, reach)
        if batch.entries is not None:
            batch.entries.append((state.request.index, tokens))
        return reach == state.known

    def _clipped(self, state: RequestState, start: int, tokens: int, *, admitting: bool = False) -> int:
        """Tokens of a chunk of a model that keeps states; see :meth:`GroupedKvCache.clip_chunk`."""
        limits = self.limits
        most = limits.max_num_batched_tokens
        if limits.long_prefill_token_threshold:
            most = min(most, limits.long_prefill_token_threshold)
        kv = cast("GroupedKvCache", self.kv)
        return kv.clip_chunk(state.table, start, tokens, known=state.known, most=most, admitting=admitting)

    def _chunk(self, state: RequestState, left: int) -> int:
        """Tokens that a prefilling request can compute now with ``left`` of budget."""
        tokens = min(self._capped(state.known - state.computed), left)
        return self._clipped(state, state.computed, tokens) if tokens and self.kv.clips else tokens

    def _changing(self, in_flight: bool) -> Sequence[RequestState]:
        """Decoding requests whose block tables may change in this step, in order."""
        if self._grouped is None:
            return tuple(self.decodes.at_boundary())
        due, sharing = self._grouped.due(self.decodes), self.decodes.sharing
        if sharing and self._knows_tokens(in_flight):
            return sorted({*due, *sharing}, key=by_order)
        return due

    def _release(self, state: RequestState, computed: int, step: int, in_flight: bool) -> None:
        """Give back what a request with ``computed`` tokens needs no more, where groups of layers do."""
        assert self._grouped is not None
        known = computed
        unnoted = in_flight and not self.pipeline and not self._last_alone
        if unnoted and state.phase is Phase.DECODE and state.run_start < step:
            known = max(state.known, computed - 1)  # as in a preemption
        self._grouped.release(state, computed, known)

    def _computed(self, table: Any, tokens: int) -> None:
        """The first ``tokens`` tokens of a request are known and computed, or will be by this step."""
        self.kv.register_shared(table, tokens)
        for connector in self.connectors:
            connector.computed(table, tokens)

    def _stall(self, state: RequestState, batch: Batch) -> None:
        """Take a decoding request out for one step."""
        if state not in self.decodes.joined:
            batch.after = self.decodes.flying
        state.known = self.decodes.length(state)
        self.decodes.remove(state)
        state.home = None
        state.end_run(len(self.decodes.token_times) - 1 if self.pipeline else batch.step - 1)
        state.run_start = batch.step + 1

    # ------------------------------------------------------------------ preemption

    def _make_room(self, state: RequestState, reach: int, batch: Batch, in_flight: bool) -> bool:
        """Preempt running requests until ``state`` can grow; False if it had to go itself."""
        running = self.running
        while self.kv.shortage(state.table, reach) > 0:
            victim = running.pop(self._policy.victim(running, running.index(state)))
            self._preempt(victim, batch, in_flight)
            if victim is state:
                return False
        return True

    def _preempt(self, victim: RequestState, batch: Batch, in_flight: bool, taken_back: int = 0) -> None:
        """Take a request's blocks away and queue it. ``taken_back``: tokens that it was to compute in this
        step; the prefix cache has taken note of their blocks already."""
        # `cached`: tokens whose blocks the prefix cache has taken note of so far; those of prompt chunks
        # when they are scheduled, generated ones once they are known. With a batch in flight, the token it
        # computed was known when it was scheduled only if nothing else was in flight then.
        if victim.phase is Phase.PREFILL:
            self.prefilling.remove(victim)
            computed = victim.computed
            cached = computed + taken_back
        pipeline = self.pipeline
        late = self._is_flying(victim)
        flight = pipeline.computes(victim) if pipeline else None
        if self.speculation:
            computed, cached = self.speculation.preempt(victim)
        elif victim.phase is not Phase.PREFILL:
            home = victim.home
            token_in_flight, unnoted = flight is not None, False
            if pipeline:
                unnoted = token_in_flight and pipeline.was_ahead(victim)
            if victim.phase is Phase.DRAINING or home is None:
                computed, token_in_flight = victim.total_tokens - 1, True
            else:
                computed = home.length(victim)
                home.remove(victim)
                if not pipeline:
                    token_in_flight = in_flight and victim.run_start < batch.step
                victim.end_run(len(home.token_times) - 1 if pipeline else batch.step - 1)
            if not pipeline:
                unnoted = token_in_flight and not self._last_alone
            cached = max(victim.known, computed - unnoted)
            if taken_back:
                cached = computed + self._knows_tokens(token_in_flight)
            victim.known = computed + 1
        if pipeline and flight is not None:
            pipeline.await_batch(flight, victim)
        for connector in self.connectors:
            connector.computed(victim.table, cached)
        self._give_back(victim, cached, late=late, preempted=True)
        self._frees += 1
        victim.phase = Phase.WAITING
        victim.handed_over = False
        victim.computed = computed
        victim.record.note_lost(batch.step)
        self._queue.put_back(victim, behind_passed_over=self.limits.deferred_first)
        batch.preempted = [*batch.preempted, victim]

    def _is_flying(self, state: RequestState) -> bool:
        """Whether a step in flight computes for a request that runs, so that its blocks come back late."""
        late = self._late_frees
        if late is None or late.ended >= late.scheduled:
            return False
        if state.phase is Phase.PREFILL:
            chunk = state.chunk
            return chunk is not None and late.ended < chunk.step <= late.scheduled
        if self.pipeline:
            flight = self.pipeline.computes(state)
            return flight is not None and flight.step > late.ended
        return state.phase is Phase.DRAINING or state.home is None or state.run_start <= late.scheduled

    def _give_back(self, state: RequestState, tokens: int, *, late: bool, preempted: bool) -> None:
        """Take a request's blocks, the first ``tokens`` tokens of which are computed and known; ``late``:
        they are free only when the steps in flight have ended."""
        if late:
            assert self._late_frees is not None
            kv = cast("KvCache", self.kv)  # several groups are refused
            self._late_frees.keep(*kv.detach(state.table, tokens, preempted=preempted))
        elif preempted:
            self.kv.preempt(state.table, tokens)
        else:
            self.kv.free(state.table, tokens)

    # ------------------------------------------------------------------ admission

    def enqueue(self, state: RequestState, now_ns: int) -> None:
        """Take a request in."""
        if state.record.queued_ns < 0:
            state.record.queued_ns = now_ns
        self._queue.add(state)
        if self.waiting[0] is state or self._queue.passed_over:
            self._blocked_at = None  # that was said of another head

    def _admit(self, batch: Batch, left: int, now_ns: int, completed: list[RequestState]) -> None:
        """Admit waiting requests while token budget, ``max_num_seqs`` and blocks last.

        The first that cannot be admitted ends it: nobody behind the head of the queue overtakes it. Only
        those that cannot go on whatever is free are passed over (:meth:`_is_held_up`).
        """
        limits, kv, waiting, speculation = self.limits, self.kv, self.waiting, self.speculation
        adapters = self._adapters
        place = 0  # of the first that was not looked at in this step
        while len(waiting) > place and left > 0 and len(self.running) < limits.max_num_seqs:
            state = waiting[place]
            cache_state = (self._frees, kv.registrations)
            if cache_state == self._blocked_at and not state.awaits_token:
                return
            if self._is_held_up(state):
                self._queue.pass_over(state)
                place += 1
                continue
            known, table, record = state.known, state.table, state.record
            whole = self._admits_whole and known <= left and known == self._capped(known)
            if whole and record.scheduled_ns < 0 and not table.shared_ids:
                if not self._admit_whole(state, batch, now_ns):
                    return
                completed.append(state)
                left -= known
                continue
            holds = state.loaded >= 0
            nothing = limits.skip_prefill or holds
            hits = kv.no_hits() if nothing else kv.lookup(table, known, record.preemptions > 0)
            if speculation and speculation.drops_last_hit and hits:
                hits.pop()
            hit_tokens = kv.hit_tokens(hits)
            done, read_bytes = (known - 1 if limits.skip_prefill else max(state.loaded, hit_tokens)), 0
            if self.connectors and not nothing:
                found = self._lookup(state, hit_tokens)
                if found.reader or found.undecided:
                    if found.reader and not self._begin_load(state, place, hits, found, now_ns):
                        return
                    self._queue.pass_over(state)
                    place += 1
                    continue
                done, read_bytes = found.tokens, found.read_bytes
            if self._holds_prefills and done < known - 1:
                return
            tokens = known - done
            if speculation and tokens == 1:
                tokens = speculation.padded(batch, done, left)
                if not tokens:
                    return
            tokens = self._capped(tokens)
            if tokens > left and not limits.chunked_prefill:
                return
            tokens = min(tokens, left)
            if kv.clips:
                tokens = self._clipped(state, done, tokens, admitting=True)
                if not tokens:
                    return
            reach = slots = done + tokens
            if speculation:
                slots = speculation.reach(reach)
            if not self._has_room(state, hits, done, slots):
                return
            self._queue.take_out(state, place)
            if adapters:
                adapters.note(state)
            if self.pipeline or self._late_frees:
                state.chunk = batch
            if holds:
                kv.grow(table, slots)
            else:
                kv.admit(table, hits, done, slots)
            self._computed(table, speculation.note(state, reach) if speculation else reach)
            self._let_run(state)
            if record.scheduled_ns < 0:
                record.scheduled_ns = now_ns
                if not holds:
                    record.npu_hit = hit_tokens
                    record.storage_hit = done - hit_tokens if read_bytes else 0
                batch.hit_tokens += record.npu_hit + record.storage_hit
                batch.lookup_tokens += known
                batch.recalled_tokens += record.storage_hit
            elif not state.handed_over:
                record.note_back(now_ns)
                state.lost = max(state.lost, state.computed)
                # a lower tier may hold more by now than was lost
                record.recomputed_tokens += state.computed - min(done, state.lost)
                batch.note_again(state.lost, done, reach)
            if self.loads and holds:
                self.loads.leave(state)
            for connector in self.connectors:
                connector.admitted(batch, read_bytes)
            if reach > known:
                batch.add_verification(tokens, done)
            else:
                batch.add_request(tokens, done)
            if self._grouped:
                self._grouped.note_chunk(state, tokens)
            if self._cadence and done < known - 1:
                self._cadence.note_prefill()
            if batch.entries is not None:
                batch.entries.append((state.request.index, tokens))
            left -= tokens + (speculation.slots if speculation else 0)
            state.computed = reach
            if reach >= known:
                completed.append(state)
            else:
                state.phase = Phase.PREFILL
                self.prefilling.append(state)

    def _admit_whole(self, state: RequestState, batch: Batch, now_ns: int) -> bool:
        """Admit the head of the queue, new here, of which nothing can be cached and all is computed in this
        step; False if blocks lack.

        What :meth:`_admit` does with such a request, without its looks at what does not concern it.
        """
        kv, known = self.kv, state.known
        free = self._pool.num_free - (self.limits.watermark_blocks if self.running else 0)
        if kv.blocks_for(known) > free:
            if self.limits.reserve_full_isl:
                self._blocked_at = (self._frees, kv.registrations)
            return False
        self._queue.take_out(state, 0)
        kv.grow(state.table, known)
        self._let_run(state)
        state.record.scheduled_ns = now_ns
        batch.lookup_tokens += known
        batch.add_request(known, 0)
        state.computed = known
        return True

    def _let_run(self, state: RequestState) -> None:
        """Put an admitted request behind those that run."""
        state.order = self._admissions
        self._admissions += 1
        self.running.append(state)

    def _is_held_up(self, state: RequestState) -> bool:
        """Whether a waiting request cannot be admitted whatever is free: its KV is being read, a batch in
        flight still computes for it, or the adapters of the step leave no slot for its own."""
        if state.phase is Phase.LOADING:
            assert self.loads is not None
            if not self.loads.take_up(state):
                return True
        return state.awaits_token or (self._adapters is not None and not self._adapters.has_room(state))

    def _has_room(self, state: RequestState, hits: Any, done: int, slots: int, reserved: int = 0) -> bool:
        """Whether there are blocks for ``slots`` tokens of a waiting request, ``done`` of them computed, and
        for all its known tokens if those have to fit; ``reserved`` free blocks are for others."""
        limits, kv = self.limits, self.kv
        free = kv.pool.num_free - (limits.watermark_blocks if self.running else 0)
        whole = limits.reserve_full_isl
        if whole and self._missing(state, hits, done, state.known, whole=True) > free:
            # Else who is looked at may change meanwhile: an adapter has a slot again; or what a request would
            # hit is taken, and then a connector cannot tell how much of it is elsewhere.
            if not self._adapters and not self.loads:
                self._blocked_at = (self._frees, kv.registrations)
            return False
        tight = not whole or kv.several or self.speculation or reserved
        return not tight or self._missing(state, hits, done, slots) <= free - reserved

    def _missing(self, state: RequestState, hits: Any, done: int, tokens: int, *, whole: bool = False) -> int:
        """Free blocks it takes for a waiting request to hold ``tokens`` tokens."""
        if state.loaded >= 0:
            return max(self.kv.shortage(state.table, tokens) + self.kv.pool.num_free, 0)
        return self.kv.missing_blocks(hits, done, tokens, whole=whole)

    def _begin_load(self, state: RequestState, place: int, hits: Any, found: Found, now_ns: int) -> bool:
        """Give a waiting request blocks and let a connector read KV into them; False if they lack."""
        loads, tokens = self.loads, found.tokens
        assert loads is not None
        assert found.reader is not None
        if not self._has_room(state, hits, tokens, tokens, loads.reserved(self.prefilling)):
            return False
        record, hit_tokens = state.record, self.kv.hit_tokens(hits)
        self.kv.admit(state.table, hits, tokens, tokens)
        if record.scheduled_ns < 0:
            record.npu_hit = hit_tokens
            record.storage_hit = min(tokens, state.known - 1) - hit_tokens
        if loads.first:
            self._queue.put_ahead(state, place)
        loads.begin(state, tokens)
        found.reader.begin_load(state, found.read_bytes, now_ns, partial(self._loaded, state, now_ns))
        return True

    def _loaded(self, state: RequestState, since_ns: int, now_ns: int) -> None:
        """The KV of a request is there, which has waited for it with blocks in hand since ``since_ns``."""
        assert self.loads is not None
        if state.record.scheduled_ns < 0 or state.handed_over:
            state.record.note_load(since_ns, now_ns)
        self.loads.arrive(state)
        self.loads.wake(now_ns)

    def _note_fruitless(self) -> None:
        """A step preempts and generates no token; too many of them never end.

        Raises:
            RunError: prompts take each other's blocks in a circle, as they would in vLLM.
        """
        self._fruitless += 1
        if self._fruitless > MOST_FRUITLESS:
            raise RunError(
                f"prompts take each other's KV blocks in a circle: {self._fruitless} steps preempted one and "
                "generated no token. vLLM would go on like this for ever; give the KV cache more blocks, "
                "admit fewer requests at once (--max-num-seqs), or admit whole prompts only "
                "(--reserve-full-isl)"
            )

    def _lookup(self, state: RequestState, hit_tokens: int) -> Found:
        """How far the KV of a waiting request reaches."""
        for connector in self.connectors:
            found = connector.lookup(state, hit_tokens)
            if found is not None:
                return found
        return Found(hit_tokens)

    # ------------------------------------------------------------------ end of a step

    def finish(self, batch: Batch) -> Sequence[RequestState]:
        """Commit a finished step: requests that produced their last token give their blocks back.

        Returns:
            Those that leave the system, which is all of them unless a connector takes some on.
        """
        if self._late_frees:
            self._frees += self._late_frees.end(batch.step, self.kv.pool)
        if self.speculation:
            batch.finishing = self.speculation.commit(batch, self._computed)
        leaving = batch.finishing
        for state in batch.finishing:
            whole = state.noted if self.speculation else state.total_tokens - 1
            if state.phase is Phase.WAITING:  # preempted while its last token was in flight
                self._queue.take_out(state, self.waiting.index(state))  # its blocks went then
                if self._taken_on(state):
                    leaving = [other for other in leaving if other is not state]
            else:
                self.running.remove(state)
                late = state.stops and self._is_flying(state)
                if state.stops and state.home is not None:
                    state.home.drop(state)
                self._computed(state.table, whole)
                if self.connectors and self._taken_on(state):
                    leaving = [other for other in leaving if other is not state]
                    state.keeps_blocks = True
                    self.held += 1
                else:
                    self._give_back(state, whole, late=late, preempted=False)
            state.phase = Phase.FINISHED
            state.end_run(batch.step if batch.travelling is None else batch.track_step)
            state.record.end_ns = batch.end_ns
            self._frees += 1
        if self.pipeline:
            if batch.awaited_by:
                self._blocked_at = None
            self.decodes = self.pipeline.back(batch, self.decodes)
        return leaving

    def _taken_on(self, state: RequestState) -> bool:
        """Whether a connector takes a finished request on."""
        taken_on = False
        for connector in self.connectors:  # all of them are told
            taken_on |= connector.finished(state)
        return taken_on

    def release(self, state: RequestState) -> None:
        """Give back the blocks of a finished request, if it kept them."""
        if state.keeps_blocks:
            self.held -= 1
            self.kv.free(state.table, state.total_tokens - 1)
            self._frees += 1

    def abort(self, state: RequestState) -> bool:
        """Take a request out before its end; its blocks are free at once, as in vLLM, even if a step still
        computes with them.

        Returns:
            False if it stays: the step in flight computes its last token, or a connector has to do with it.
        """
        phase = state.phase
        last_in_flight = phase is Phase.WAITING and state.known == state.total_tokens
        if self.connectors or last_in_flight or phase in (Phase.DRAINING, Phase.FINISHED):
            return False
        if phase is Phase.WAITING:
            self._queue.take_out(state, self.waiting.index(state))
        else:
            self.running.remove(state)
            computed = state.computed
            if phase is Phase.PREFILL:
                self.prefilling.remove(state)
            if self.speculation:
                computed = state.noted
            elif phase is not Phase.PREFILL:
                assert state.home is not None
                computed = state.home.length(state)
                state.home.remove(state)
            self.kv.free(state.table, computed)
        state.phase = Phase.FINISHED
        self._frees += 1
        self._blocked_at = None
        return True

    # ------------------------------------------------------------------ quiet stretches

    @property
    def plain(self) -> bool:
        """Whether decodes that nothing else takes part with compute one token each and need no more than a
        block now and then: no drafts, windows, pipeline, adapters, or steps held back for prefills."""
        special = self.speculation or self._grouped or self.pipeline or self._cadence
        return not special and not self.limits.max_loras

    def only_decodes(self) -> bool:
        """Whether nothing but its decodes, all of them, can take part in the next step, and no block of
        theirs has to be made visible to other requests; blocks may lack."""
        count = self.decodes.count
        if not count or self.prefilling or self.decodes.sharing:
            return False
        if self._late_frees and self._late_frees.pending:
            return False
        if count > self.limits.max_num_batched_tokens:
            return False
        return not self.waiting or self._is_blocked()

    def stepped(self, *, alone: bool) -> None:
        """Such steps were made; ``alone``: each with nothing in flight."""
        self._last_alone = alone
        self._fruitless = 0
        self.decodes.joined.clear()

    def quiet_ticks(self, most: int, in_flight: bool) -> int:
        """How many coming steps, up to ``most``, are sure to be the same decodes growing by a token and no
        more; ``in_flight``: each follows a step in flight.

        0 unless only decodes run, nothing can be admitted, no request ends, blocks suffice and no block has
        to be made visible to other requests.
        """
        decodes = self.decodes
        if not self.only_decodes() or (self._cadence and self.waiting):
            return 0
        most = min(most, decodes.next_end - decodes.tick)
        if most <= 0:
            return 0
        count = decodes.count
        free = self.kv.pool.num_free
        if self._grouped:
            if self.waiting and len(self.running) < self.limits.max_num_seqs:
                return 0  # what windows give back may let it in
            return self._grouped.quiet_ticks(most, count, free, in_flight)
        if count * self.kv.blocks_for(most) > free and sum(decodes.blocks_needed(most)) > free:
            return 0
        return most

    def _is_blocked(self) -> bool:
        if len(self.running) >= self.limits.max_num_seqs:
            return True
        if self.decodes.count >= self.limits.max_num_batched_tokens:
            return True
        return self._blocked_at == (self._frees, self.kv.registrations)

    def steps_with_room(self, most: int) -> int:
        """How many of the next ``most`` steps of the present decodes find their blocks even if none is given
        back meanwhile."""
        free = self.kv.pool.num_free
        if self.decodes.count * self.kv.blocks_for(most) > free:
            for step, needed in enumerate(self.decodes.blocks_needed(most)):
                free -= needed
                if free < 0:
                    return step
        return most

    def run_quietly(self, ticks: int) -> list[int]:
        """Advance by ``ticks`` steps that :meth:`quiet_ticks` has vouched for; returns the blocks in use
        after each."""
        unknown = int(not self._last_alone)
        self._last_alone = False  # in an asynchronous loop every one of them follows a step in flight
        self.decodes.joined.clear()
        if self._cadence:
            self._cadence.skip(ticks)
        if self._late_frees:
            self._late_frees.note_scheduled(self._late_frees.scheduled + ticks)
        decodes = self.decodes
        if self._grouped:
            used = self._grouped.run_quietly(decodes, ticks, unknown)
        else:
            used = []
            self.grow_on(ticks, used)
        decodes.skip(ticks)
        return used
