"""KV that comes from elsewhere or goes there: the one seam between scheduling and everything that moves KV.

An instance has any number of connectors. Its scheduler and its step loop tell them what happens, at the
moments at which vLLM tells its KV connectors: a waiting request is looked up, it is admitted, a step is
scheduled, a request has finished. What a connector does then is its own affair. It never decides which
request runs.

Two are in use. :class:`HandOver` takes prompts from prefill to decode instances, :class:`LowerTierConnector`
brings prefixes back from CPU or CXL memory. Another needs a class here or in a file of its own and a line in
:mod:`servesim.engine.build`.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Protocol

from servesim.engine.transfers import Route
from servesim.errors import InputError
from servesim.memory.ledger import striped_bytes
from servesim.memory.sizing import kv_bytes_per_token
from servesim.memory.tier import LowerTier, TierPool
from servesim.network.links import Port
from servesim.results.records import TierMemory
from servesim.slotted import dataclass
from servesim.specs.memories import KINDS, TIER_WORDS, split_place

if TYPE_CHECKING:
    from collections.abc import Callable

    from servesim.engine.batch import Batch
    from servesim.engine.instance import Instance
    from servesim.engine.request_state import RequestState
    from servesim.engine.router import Candidate
    from servesim.engine.transfers import Route, Routes, Transfers
    from servesim.memory.kv_cache import BlockTable
    from servesim.memory.memory_map import MemoryMap
    from servesim.memory.tier import LowerTier
    from servesim.specs.cluster import ClusterSpec, InstanceSpec
    from servesim.specs.instance_options import InstanceOptions
    from servesim.specs.model import ModelSpec
    from servesim.specs.options import RuntimeOptions


class Connector(Protocol):
    """What a connector is told, in the order in which it happens to a request.

    A method that a connector does not care for is left as it is here: it does nothing.
    """

    def lookup(self, state: RequestState, hit_tokens: int) -> tuple[int, int] | None:
        """How far the KV of a waiting request reaches if this connector helps, None if it has no say.

        Asked whenever the request is considered, perhaps often before it is admitted. Of several connectors
        the first that has a say is followed.

        Returns:
            Leading tokens whose KV is there then, at least ``hit_tokens`` (those in the NPU's prefix cache),
            and the bytes that have to be read before the step can start.
        """
        del state, hit_tokens
        return None

    def admitted(self, batch: Batch, read_bytes: int) -> None:
        """A request was admitted to ``batch`` with the bytes that :meth:`lookup` said."""
        del batch, read_bytes

    def computed(self, table: BlockTable, tokens: int) -> None:
        """The first ``tokens`` tokens of a request are known and computed, or will be by the step."""
        del table, tokens

    def step_scheduled(self, batch: Batch, start_ns: int, there: Callable[[int], None]) -> int:
        """A step could start at ``start_ns``; begin the reads it needs.

        Returns:
            The number of reads. Each calls ``there`` with the time when it has ended, and the step starts
            after the last one.
        """
        del batch, start_ns, there
        return 0

    def step_started(self, batch: Batch, start_ns: int) -> None:
        """A step has the NPUs since ``start_ns`` and ends at ``batch.end_ns``."""
        del batch, start_ns

    def finished(self, state: RequestState) -> bool:
        """A request has got its last token here.

        True: the connector takes the request on. It keeps its blocks until
        :meth:`~servesim.engine.scheduler.Scheduler.release` and does not leave the system.
        """
        del state
        return False

    def take_written_bytes(self) -> int:
        """Bytes written to the instance's lower memory since the last call."""
        return 0

    def check_integrity(self) -> None:
        """Raise AssertionError unless its books add up after a run (for tests)."""
        return


class LowerTierConnector(Connector):
    """Brings prefixes back that a lower tier of the prefix cache still has, and writes every chunk to it.

    Writing goes beside the steps and costs no time; a step that needs chunks waits until they are read.
    """

    def __init__(self, tier: LowerTier, route: Route, transfers: Transfers) -> None:
        """
        Args:
            tier: one instance's view of the memory.
            route: the way from it to the NPUs.
            transfers: moves the bytes.
        """
        self._tier = tier
        self._route = route
        self._transfers = transfers

    def lookup(self, state: RequestState, hit_tokens: int) -> tuple[int, int] | None:
        size = self._tier.chunk_tokens
        chunks = self._tier.leading_chunks(state.table, state.known)
        there = max(chunks * size, hit_tokens)
        # a chunk of which the NPU has the beginning is read whole
        return there, (there // size - hit_tokens // size) * self._tier.chunk_bytes

    def admitted(self, batch: Batch, read_bytes: int) -> None:
        if read_bytes:
            batch.recalls = [*batch.recalls, read_bytes]

    def computed(self, table: BlockTable, tokens: int) -> None:
        self._tier.write_through(table, tokens)

    def step_scheduled(self, batch: Batch, start_ns: int, there: Callable[[int], None]) -> int:
        for size in batch.recalls:
            self._transfers.plan(start_ns, size, self._route, there)
        return len(batch.recalls)

    def take_written_bytes(self) -> int:
        return self._tier.take_written_bytes()

    def check_integrity(self) -> None:
        self._tier.check_integrity()


@dataclass(slots=True)
class Journey:
    """A request on its way from a prefill to a decode instance."""

    state: RequestState
    prefill: Instance
    decode: Candidate
    target: Instance
    released: Callable[[int], None]
    """Called with the time when the prefill instance has got the request's blocks back."""
    arrived: Callable[[Journey, int], None]
    """Called with the time when all KV is there."""
    route: Route
    sent_tokens: int = 0
    pending: int = 0
    """Transfers that have not ended."""
    computed: bool = False


class HandOver(Connector):
    """Prefill here, decode there: moves the KV of prompts from prefill to decode instances.

    The KV of a chunk streams out layer by layer while it is computed: its transfer starts with the step that
    computes it, and cannot end before the last layer's share has followed the end of that step. Transfers
    that use the same link share it. The prefill instance keeps a request's blocks until all of its KV has
    left. Then the request is queued at its decode instance, which computes the last prompt token again for
    its logits, as vLLM does, and so produces the first token that the user sees.

    One object serves all instances of both sides.
    """

    def __init__(self, transfers: Transfers, models: dict[str, ModelSpec], routes: Routes) -> None:
        """
        Args:
            transfers: moves the bytes.
            models: name -> model, for the bytes of a token.
            routes: the way from one instance to another.
        """
        self._transfers = transfers
        self._models = models
        self._routes = routes
        self._journeys: dict[int, Journey] = {}

    def send(
        self,
        state: RequestState,
        prefill: Instance,
        decode: Candidate,
        target: Instance,
        released: Callable[[int], None],
        arrived: Callable[[Journey, int], None],
    ) -> None:
        """Follow a request from now on; the arguments are those of :class:`Journey`."""
        decode.announce()
        route = self._routes(prefill, target)
        self._journeys[state.request.index] = Journey(
            state, prefill, decode, target, released, arrived, route
        )

    def lookup(self, state: RequestState, hit_tokens: int) -> tuple[int, int] | None:
        del hit_tokens
        return (state.known - 1, 0) if state.kv_arrived else None

    def step_started(self, batch: Batch, start_ns: int) -> None:
        """Plan the transfers of what a prefill instance computes in this step."""
        for request, _ in batch.entries or ():
            journey = self._journeys[request]
            spec, options = journey.prefill.log.spec, journey.prefill.log.options
            model = self._models[spec.model_name]
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

    def finished(self, state: RequestState) -> bool:
        journey = self._journeys.get(state.request.index)
        if journey is None or journey.state is not state:
            return False  # it ends at its decode instance
        journey.computed = True
        return True

    def check_integrity(self) -> None:
        assert not self._journeys, "requests are still on their way"

    def _transfer_ended(self, journey: Journey, now_ns: int) -> None:
        journey.pending -= 1
        if journey.pending or not journey.computed:
            return
        del self._journeys[journey.state.request.index]
        journey.decode.announced_came()
        journey.prefill.scheduler.release(journey.state)
        journey.released(now_ns)
        journey.arrived(journey, now_ns)


@dataclass(frozen=True, slots=True)
class PlacedTier:
    """The lower tier of one instance's prefix cache."""

    view: LowerTier
    """What the instance sees of its pool."""
    route: Route
    """The way from it to the instance's NPUs."""
    memory: TierMemory
    """What is written down about it."""


class LowerTiers:
    """The pools of a cluster.

    A pool is an instance's own share of its node's memory, or with prefix sharing one for the whole node. A
    memory of the cluster is split evenly over the nodes, with chunks striped over its devices. Whoever reads
    shares the memory's bandwidth.
    """

    def __init__(self, cluster: ClusterSpec, options: RuntimeOptions, memories: MemoryMap) -> None:
        """
        Args:
            cluster: whose memories they are.
            options: whether pools are shared.
            memories: the ledgers, on which tiers are booked.

        Raises:
            InputError: sharing is asked for without a tier.
        """
        self._cluster = cluster
        self._memories = memories
        self._sharing = options.enable_prefix_sharing
        self._pools: dict[tuple[str, int, int], TierPool] = {}
        self._namespaces: dict[tuple[str, str, int], int] = {}
        if self._sharing and options.prefix_storage is None:
            raise InputError(
                "--enable-prefix-sharing: there is no lower tier to share; give --prefix-storage "
                f"{' or '.join(TIER_WORDS)}"
            )

    def tier(
        self, index: int, node: int, spec: InstanceSpec, model: ModelSpec, options: InstanceOptions
    ) -> PlacedTier | None:
        """The lower tier of an instance's prefix cache, None without one."""
        word = self._memories.tier_words[index]
        if word is None:
            return None
        key = (word, node, -1 if self._sharing else index)
        if key not in self._pools:
            self._pools[key] = TierPool(self._pool_bytes(index, node, word))
        kind = (spec.model_name, options.kv_dtype, options.block_size)
        namespace = self._namespaces.setdefault(kind, len(self._namespaces))
        per_npu = kv_bytes_per_token(model, options.kv_dtype, spec.tp_size, spec.pp_size)
        pool = self._pools[key]
        tier = LowerTier(pool, namespace, options.block_size, per_npu * spec.num_npus)
        route = self._route(index, node, word)
        memory = TierMemory(
            storage=word,
            pool=list(self._pools).index(key),
            shared=self._sharing,
            capacity_bytes=pool.capacity_bytes,
            chunk_tokens=tier.chunk_tokens,
            chunk_bytes=tier.chunk_bytes,
            bandwidth_gbs=route.bandwidth_gbs,
            latency_ns=route.latency_ns,
        )
        return PlacedTier(tier, route, memory)

    def _pool_bytes(self, index: int, node: int, word: str) -> int:
        owners = self._cluster.num_nodes if KINDS[split_place(word)[0]].scope == "cluster" else 1
        if not self._sharing:
            owners *= self._cluster.nodes[node].num_instances
        ledgers = self._memories.tier_ledgers(index)
        return striped_bytes(each.tier_room_bytes(node, owners, shared=self._sharing) for each in ledgers)

    def _route(self, index: int, node: int, word: str) -> Route:
        """The way from a tier: through every memory that it is striped over, a part of the bytes each.

        A device of D moves one byte of D that are striped over all. So with the bandwidth of D such devices
        it moves all of them, and what lies in it alone D-fold. Devices that are booked alike move alike: one
        of them stands for them all.
        """
        ledgers = self._memories.tier_ledgers(index)
        memory = KINDS[split_place(word)[0]].spec(self._cluster, node)
        assert memory is not None
        devices = memory.devices
        kept = {(frozenset(each.tiers.values()), each.tier_gbs): each for each in reversed(ledgers)}.values()
        ports = [Port(each.memory.name, each.tier_gbs * devices, devices // len(ledgers)) for each in kept]
        bandwidth_gbs = min(each.tier_gbs for each in kept) * len(ledgers)
        return Route(tuple(ports), round(ledgers[0].memory.latency_ns), bandwidth_gbs)
