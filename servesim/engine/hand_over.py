"""Prefill here, decode there: moves the KV cache of prompts from prefill to decode instances.

The KV of a chunk streams out layer by layer while the chunk is computed: its transfer starts with the step
that computes it and cannot end before the last layer's share has followed the end of that step. Transfers
that use the same link share it. The prefill instance keeps a request's blocks until all of its KV has left;
then the request is queued at its decode instance, which computes the last prompt token again for its logits,
as vLLM does, and so produces the first token that the user sees.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from servesim.engine.transfers import Route
from servesim.memory.sizing import kv_bytes_per_token
from servesim.network.links import Port

if TYPE_CHECKING:
    from servesim.engine.batch import Batch
    from servesim.engine.instance import Instance
    from servesim.engine.request_state import RequestState
    from servesim.engine.router import Candidate
    from servesim.engine.transfers import Transfers
    from servesim.network.topology import Topology
    from servesim.specs.model import ModelSpec


class Routes:
    """The ways between instances: out of one, into the other, and through both uplinks between nodes.

    Every NPU has a link of its own (dimension dp); a node's uplink (dimension nodes) is one for all.
    """

    def __init__(self, topology: Topology) -> None:
        self._topology = topology

    def __call__(self, source: Instance, target: Instance) -> Route:
        """The way from ``source`` to ``target``."""
        near, far = self._topology.dp, self._topology.nodes
        ports = [
            Port(f"out of instance {source.log.index}", near.bandwidth_gbs),
            Port(f"into instance {target.log.index}", near.bandwidth_gbs),
        ]
        latency = near.latency_ns
        if source.log.node != target.log.node:
            ports.append(Port(f"out of node {source.log.node}", far.bandwidth_gbs))
            ports.append(Port(f"into node {target.log.node}", far.bandwidth_gbs))
            latency = far.latency_ns
        return Route(tuple(ports), round(latency), min(port.bandwidth_gbs for port in ports))


@dataclass(slots=True)
class Journey:
    """A request on its way from a prefill to a decode instance."""

    state: RequestState
    prefill: Instance
    decode: Candidate
    target: Instance
    route: Route
    sent_tokens: int = 0
    pending: int = 0
    """Transfers that have not ended."""
    computed: bool = False


class HandOver:
    """The requests between prefill and decode, and the transfers of their KV."""

    def __init__(self, transfers: Transfers, models: dict[str, ModelSpec]) -> None:
        self.arrived: list[Journey] = []
        """Requests whose KV has arrived whole since the owner last emptied this list."""
        self._transfers = transfers
        self._models = models
        self._journeys: dict[int, Journey] = {}

    def send(self, journey: Journey) -> None:
        """Follow a request from now on."""
        journey.state.keeps_blocks = True
        journey.decode.on_the_way += 1
        self._journeys[journey.state.request.index] = journey

    def step_scheduled(self, member: Instance, batch: Batch, start_ns: int) -> None:
        """Plan the transfers of what a prefill instance computes in a step from ``start_ns`` on."""
        spec, options = member.log.spec, member.log.options
        model = self._models[spec.model_name]
        for request, _ in batch.entries or ():
            journey = self._journeys[request]
            # prefix hits leave with the first chunk; what was sent before a preemption is not sent again
            tokens = max(journey.state.computed - journey.sent_tokens, 0)
            journey.sent_tokens += tokens
            ranks = min(spec.tp_size, journey.target.log.spec.tp_size)
            size = tokens * kv_bytes_per_token(model, options.kv_dtype, ranks)
            route = journey.route
            last_layer = size / model.num_hidden_layers / route.bandwidth_gbs
            earliest = batch.end_ns + max(route.latency_ns + round(last_layer), 1)
            journey.pending += 1
            self._transfers.plan(start_ns, size, route, partial(self._transfer_ended, journey), earliest)

    def computed(self, state: RequestState) -> bool:
        """Tell that a prompt has been computed; False if the request stays where it is."""
        journey = self._journeys.get(state.request.index)
        if journey is None or journey.state is not state:
            return False
        journey.computed = True
        return True

    def _transfer_ended(self, journey: Journey, now_ns: int) -> None:
        journey.pending -= 1
        if journey.pending or not journey.computed:
            return
        del self._journeys[journey.state.request.index]
        journey.decode.on_the_way -= 1
        journey.prefill.scheduler.release(journey.state)
        journey.prefill.loop.wake(now_ns)
        self.arrived.append(journey)
