"""What enters and leaves the prefix caches, told over ZeroMQ as vLLM 0.33 tells it.

A message has three parts: a topic, a sequence number (8 bytes, big end first) and a msgpack array
``[ts, events, data_parallel_rank]``. Who has missed some asks the replay socket with the first number wanted,
and gets the batches that are kept, then one with the number -1. Every instance has ports of its own, one
after the other.
"""

from __future__ import annotations

import asyncio
from collections import deque
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from servesim.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from servesim.server.bounded import LiveTables
    from servesim.server.live import LiveEngine

_KEPT_BATCHES = 10_000
_LOOK_S = 0.05
"""Time between two looks at the replay sockets."""
_END = (-1).to_bytes(8, "big", signed=True)


class KvEvents:
    """One publisher for each instance."""

    def __init__(
        self,
        engine: LiveEngine,
        endpoint: str,
        replay: str | None = None,
        topic: str = "",
        adapters: Sequence[str] = (),
    ) -> None:
        """
        Args:
            engine: whose caches are watched.
            endpoint: where to publish, such as ``tcp://127.0.0.1:5557``; instance i takes port + i.
            replay: where to answer who has missed something, likewise.
            topic: first part of every message.
            adapters: LoRA adapters in the order in which they were loaded, which gives them their numbers.

        Raises:
            InputError: pyzmq or msgspec is missing, an address is wrong or taken, or a cache has several
                groups.
        """
        try:
            import msgspec
            import zmq
        except ImportError as error:
            raise InputError("--kv-events: needs the extra server: pip install 'servesim[server]'") from error
        if any(instance.scheduler.kv.several for instance in engine.instances):
            raise InputError("--kv-events: is not built for models whose KV layers form several groups")
        engine.tables.keep_contents()
        self._pack: Callable[[Any], bytes] = msgspec.msgpack.Encoder().encode
        self._topic = topic.encode()
        context: Any = zmq.Context.instance()
        self._watchers = []
        self._publishers = []
        self._replays: list[Any] = []
        self._kept: list[deque[tuple[int, bytes]]] = []
        for index, instance in enumerate(engine.instances):
            self._publishers.append(_bound(context.socket(zmq.PUB), endpoint, index, "--kv-events"))
            if replay is not None:
                self._replays.append(_bound(context.socket(zmq.ROUTER), replay, index, "--kv-events-replay"))
            watcher = _Watcher(engine.tables, instance.scheduler.kv.block_size, adapters)
            instance.scheduler.kv.pool.watch(watcher)
            self._watchers.append(watcher)
            self._kept.append(deque(maxlen=_KEPT_BATCHES))
        self._numbers = [0] * len(self._publishers)

    def flush(self, now_ns: int) -> None:
        """Publish what has happened since the last time, as of ``now_ns``."""
        for index, watcher in enumerate(self._watchers):
            events = watcher.take()
            if events:
                self._publish(index, now_ns, events)

    async def answer(self) -> None:
        """Answer those who ask for a replay, for ever."""
        while self._replays:
            for index, socket in enumerate(self._replays):
                self._answer(index, socket)
            await asyncio.sleep(_LOOK_S)

    def cleared(self, now_ns: int) -> None:
        """Tell that all caches were emptied."""
        for index, watcher in enumerate(self._watchers):
            watcher.clear()
            self._publish(index, now_ns, [{"type": "AllBlocksCleared"}])

    def close(self) -> None:
        """Close every socket."""
        for socket in (*self._publishers, *self._replays):
            socket.close(linger=0)

    def _publish(self, index: int, now_ns: int, events: list[dict[str, Any]]) -> None:
        payload = self._pack([now_ns / 1e9, events, index])
        number = self._numbers[index]
        self._numbers[index] += 1
        self._kept[index].append((number, payload))
        self._publishers[index].send_multipart((self._topic, number.to_bytes(8, "big"), payload))

    def _answer(self, index: int, socket: Any) -> None:
        import zmq

        while socket.poll(0):
            frames = socket.recv_multipart(zmq.NOBLOCK)
            if len(frames) != 3 or len(frames[2]) != 8:
                continue
            client, first = frames[0], int.from_bytes(frames[2], "big")
            for number, payload in self._kept[index]:
                if number >= first:
                    socket.send_multipart((client, b"", self._topic, number.to_bytes(8, "big"), payload))
            socket.send_multipart((client, b"", b"", _END, b""))


class _Watcher:
    """Collects what a pool registers and forgets."""

    def __init__(self, tables: LiveTables, block_size: int, adapters: Sequence[str]) -> None:
        self._tables = tables
        self._block_size = block_size
        self._numbers = {name: number for number, name in enumerate(adapters, start=1)}
        self._adapters: dict[int, str] = {}
        """Content -> LoRA adapter, of what the pool holds."""
        self._events: list[dict[str, Any]] = []
        self._hashes: dict[int, bytes] = {}
        """Content -> its hash, of what the pool holds, and how often."""
        self._holders: dict[int, int] = {}
        self._last = 0
        """Content of the block that the last event ends with."""

    def stored(self, content: int) -> None:
        """A block holds this content now."""
        known = self._tables.content(content)
        if known is None:
            return  # nobody else can ever hit it
        parent, raw = known
        adapter = self._adapters.get(parent) or self._tables.adapter_of_root(parent)
        if adapter is not None:
            self._adapters[content] = adapter
        if parent == self._last and self._events and self._events[-1]["type"] == "BlockStored":
            event = self._events[-1]
            event["block_hashes"].append(self._hash(content, parent, raw))
            event["token_ids"] += _ids(raw)
        else:
            self._events.append(
                {
                    "type": "BlockStored",
                    "block_hashes": [self._hash(content, parent, raw)],
                    "parent_block_hash": self._hashes.get(parent),
                    "token_ids": _ids(raw),
                    "block_size": self._block_size,
                    "lora_id": None if adapter is None else self._numbers[adapter],
                    "medium": "GPU",
                    "lora_name": adapter,
                    "group_idx": 0,
                }
            )
        self._holders[content] = self._holders.get(content, 0) + 1
        self._last = content

    def removed(self, content: int) -> None:
        """A block holds this content no more."""
        if content not in self._holders:
            return
        number = self._hashes[content]
        self._holders[content] -= 1
        if not self._holders[content]:
            del self._holders[content], self._hashes[content]
            self._adapters.pop(content, None)
        event = {"type": "BlockRemoved", "block_hashes": [number], "medium": "GPU", "group_idx": 0}
        self._events.append(event)
        self._last = 0

    def clear(self) -> None:
        """Nothing that is held now counts any more."""
        self._events, self._last = [], 0
        self._hashes.clear()
        self._adapters.clear()
        self._holders.clear()

    def take(self) -> list[dict[str, Any]]:
        """The events since the last call."""
        events, self._events, self._last = self._events, [], 0
        return events

    def _hash(self, content: int, parent: int, raw: bytes) -> bytes:
        found = self._hashes.get(content)
        if found is None:
            before = self._hashes.get(parent, parent.to_bytes(8, "big", signed=True))
            found = self._hashes[content] = sha256(before + raw).digest()
        return found


def _ids(raw: bytes) -> list[int]:
    import numpy as np

    ids: list[int] = np.frombuffer(raw, dtype=np.int64).tolist()
    return ids


def _bound(socket: Any, endpoint: str, offset: int, flag: str) -> Any:
    """The socket, bound to an endpoint whose port is moved by ``offset``."""
    import zmq

    address = endpoint
    if offset and endpoint.startswith("tcp://"):
        host, _, port = endpoint.rpartition(":")
        address = f"{host}:{int(port) + offset}" if port.isdigit() and port != "0" else endpoint
    elif offset:
        address = f"{endpoint}_dp{offset}"
    try:
        socket.bind(address)
    except zmq.ZMQError as error:
        socket.close(linger=0)
        raise InputError(
            f"{flag} {endpoint}: cannot be listened on ({address}): {error}; give an address such as "
            "tcp://127.0.0.1:5557"
        ) from error
    return socket
