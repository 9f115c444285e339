"""KV that comes from elsewhere or goes there: the one seam between scheduling and everything that moves KV.

An instance has any number of connectors. Its scheduler and its step loop tell them what happens, at the
moments at which vLLM tells its KV connectors: a waiting request is looked up, it is admitted, a step is
scheduled, a request has finished. What a connector does then is its own affair. It never decides which
request runs.

KV can be read in two ways (``--kv-load``): the step that needs it waits for it, or the request does, with its
blocks in hand, while steps of others go on (:mod:`servesim.engine.kv_loads`).

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


@dataclass(frozen=True, slots=True)
class Found:
    """How far the KV of a waiting request reaches."""

    tokens: int
    """Leading tokens whose KV is there, or will be when the bytes are read."""
    read_bytes: int = 0
    """Bytes that have to be read for them."""
    reader: Connector | None = None
    """Who reads them while the request waits; None: the step that it is admitted to waits."""
    undecided: bool = False
    """It cannot be said now, so that the request is passed over."""


class Connector(Protocol):
    """What a connector is told, in the order in which it happens to a request.

    A method that a connector does not care for is left as it is here: it does nothing.
    """

    def lookup(self, state: RequestState, hit_tokens: int) -> Found | None:
        """How far the KV of a waiting request reaches if this connector helps, None if it has no say.

        Asked whenever the request is considered, perhaps often before it is admitted. Of several connectors
        the first that has a say is followed. Its tokens are at least ``hit_tokens``, those in the NPU's
        prefix cache.
        """
        del state, hit_tokens
        return None

    def begin_load(
        self, state: RequestState, read_bytes: int, now_ns: int, there: Callable[[int], None]
    ) -> None:
        """A waiting request has got blocks for what :meth:`lookup` said: read it, and call ``there`` with the
        time when it is there. Asked only of a :attr:`Found.reader`."""
        raise NotImplementedError

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

    def take_read_bytes(self) -> int:
        """Bytes that came from there while requests waited for them, since the last call."""
        return 0

    def check_integrity(self) -> None:
        """Raise AssertionError unless its books add up after a run (for tests)."""
        return


class LowerTierConnector(Connector):
    """Brings prefixes back that a lower tier of the prefix cache still has, and writes every chunk to it.

    Writing goes beside the steps and costs no time. A step that needs chunks waits until they are read, or
    the request does. In that case, as with vLLM's OffloadingConnector, a request is passed over while a chunk
    that it needs is being read for another one.
    """

    def __init__(
        self, tier: LowerTier, route: Route, transfers: Transfers, *, asynchronous: bool = False
    ) -> None:
        """
        Args:
            tier: one instance's view of the memory.
            route: the way from it to the NPUs.
            transfers: moves the bytes.
            asynchronous: whether requests wait for chunks, instead of steps.
        """
        self._tier = tier
        self._route = route
        self._transfers = transfers
        self._asynchronous = asynchronous
        self._on_their_way: dict[int, None] = {}
        """Identities of the chunks that are being read while a request waits."""
        self._read_bytes = 0

    def lookup(self, state: RequestState, hit_tokens: int) -> Found | None:
        size = self._tier.chunk_tokens
        chunks = self._tier.leading_chunks(state.table, state.known)
        there = max(chunks * size, hit_tokens)
        # a chunk of which the NPU has the beginning is read whole
        lacking = range(hit_tokens // size, there // size)
        read_bytes = len(lacking) * self._tier.chunk_bytes
        if not self._asynchronous or not lacking:
            return Found(there, read_bytes)
        if self._on_their_way and not self._on_their_way.keys().isdisjoint(self._names(state, lacking)):
            return Found(there, undecided=True)
        return Found(there, read_bytes, self)

    def _names(self, state: RequestState, chunks: range) -> list[int]:
        return [self._tier.content(state.table, chunk) for chunk in chunks]

    def begin_load(
        self, state: RequestState, read_bytes: int, now_ns: int, there: Callable[[int], None]
    ) -> None:
        size = self._tier.chunk_tokens
        end = state.loaded // size
        names = self._names(state, range(end - read_bytes // self._tier.chunk_bytes, end))
        self._on_their_way.update(dict.fromkeys(names))
        self._transfers.plan(now_ns, read_bytes, self._route, partial(self._loaded, names, read_bytes, there))

    def _loaded(self, names: list[int], read_bytes: int, there: Callable[[int], None], now_ns: int) -> None:
        for name in names:
            del self._on_their_way[name]
        self._read_bytes += read_bytes
        there(now_ns)

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

    def take_read_bytes(self) -> int:
        read, self._read_bytes = self._read_bytes, 0
        return read

    def check_integrity(self) -> None:
        self._tier.check_integrity()
        assert not self._on_their_way, "chunks are still being read"


@dataclass(slots=True)
class Journey:
    """A request on its way from a prefill to a decode instance."""

    state: RequestState
    """At the prefill instance."""
    prefill: Instance
    decode: Candidate
    target: Instance
    released: Callable[[int], None]
    """Called with the time when the prefill instance has got the request's blocks back."""
    arrived: Callable[[Journey, int], None]
    """Called with the time when the request is to be queued at the decode instance."""
    route: Route
    pulled: bool
    """Whether the decode instance reads the KV when it has blocks for it, instead of being sent it."""
    sent_tokens: int = 0
    pending: int = 0
    """Transfers that have not ended."""
    computed: bool = False


class HandOver(Connector):
    """Prefill here, decode there: moves the KV of prompts from prefill to decode instances.

    KV is *sent*: that of a chunk streams out layer by layer while it is computed. Its transfer starts with
    the step that computes it, and cannot end before the last layer's share has followed the end of that step.
    When all of it has arrived, the request is queued at its decode instance.

    Or KV is *pulled* (``kv_load: async`` of the decode instance), as vLLM's NIXL connector does it: the
    request is queued at its decode instance when its prompt is computed. When it has blocks there, the KV
    that this instance's prefix cache lacks is read in one transfer.

    Either way, the prefill instance keeps a request's blocks until all of its KV has left, transfers that use
    the same link share it, and the decode instance computes the last prompt token again for its logits, as
    vLLM does, and so produces the first token that the user sees.

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
        pulled = target.log.options.kv_load == "async"
        self._journeys[state.request.index] = Journey(
            state, prefill, decode, target, released, arrived, route, pulled
        )

    def lookup(self, state: RequestState, hit_tokens: int) -> Found | None:
        if not state.handed_over:
            return None
        journey = self._journeys.get(state.request.index)
        if journey is None:
            return Found(state.known - 1)  # it was sent
        return Found(state.known, self._bytes(journey, state.known - hit_tokens), self)

    def begin_load(
        self, state: RequestState, read_bytes: int, now_ns: int, there: Callable[[int], None]
    ) -> None:
        journey = self._journeys[state.request.index]
        self._transfers.plan(now_ns, read_bytes, journey.route, partial(self._pulled, journey, there))

    def _bytes(self, journey: Journey, tokens: int) -> int:
        """Bytes of the KV of so many tokens on their way."""
        spec, options = journey.prefill.log.spec, journey.prefill.log.options
        ranks = min(spec.tp_size, journey.target.log.spec.tp_size)
        return tokens * kv_bytes_per_token(self._models[spec.model_name], options.kv_dtype, ranks)

    def step_started(self, batch: Batch, start_ns: int) -> None:
        """Plan the transfers of what a prefill instance computes in this step."""
        for request, _ in batch.entries or ():
            journey = self._journeys[request]
            if journey.pulled:
                continue
            model = self._models[journey.prefill.log.spec.model_name]
            # prefix hits leave with the first chunk; what was sent before a preemption is not sent again
            tokens = max(journey.state.computed - journey.sent_tokens, 0)
            journey.sent_tokens += tokens
            size = self._bytes(journey, tokens)
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
        if journey.pulled:
            self._transfers.soon(partial(self._hand_on, journey))
        return True

    def check_integrity(self) -> None:
        assert not self._journeys, "requests are still on their way"

    def _transfer_ended(self, journey: Journey, now_ns: int) -> None:
        journey.pending -= 1
        if journey.pending or not journey.computed:
            return
        self._release(journey, now_ns)
        self._hand_on(journey, now_ns)

    def _pulled(self, journey: Journey, there: Callable[[int], None], now_ns: int) -> None:
        self._release(journey, now_ns)
        there(now_ns)

    def _release(self, journey: Journey, now_ns: int) -> None:
        """All KV has left: the prefill instance needs to keep it no longer."""
        del self._journeys[journey.state.request.index]
        journey.prefill.scheduler.release(journey.state)
        journey.released(now_ns)

    def _hand_on(self, journey: Journey, now_ns: int) -> None:
        journey.decode.announced_came()
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
