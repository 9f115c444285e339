"""What would grow without end in an engine that goes on: its step log and the blocks it knows, bounded."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from hashlib import blake2b
from itertools import count
from typing import TYPE_CHECKING, Any

from servesim.engine.block_tables import BlockTables
from servesim.results.step_log import StepLog

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from servesim.memory.kv_cache import AnyKvCache
    from servesim.workload.request import Request

KEPT_STEPS = 1 << 14
_SPARE_BLOCKS = 4096
"""Blocks that are remembered beyond those that fit the caches and a quarter of those."""
_OWN_BLOCKS = 1 << 40
"""Identities of blocks that nobody can share start here."""


class Tail:
    """The last entries of a column that only grows; an entry keeps its index, and old ones are forgotten."""

    __slots__ = ("_first", "_values")

    def __init__(self) -> None:
        self._first = 0
        self._values: array[int] = array("q")

    def append(self, value: int) -> None:
        values = self._values
        values.append(value)
        if len(values) >= 2 * KEPT_STEPS:
            self._first += len(values) - KEPT_STEPS
            self._values = values[-KEPT_STEPS:]

    def __len__(self) -> int:
        return self._first + len(self._values)

    def __getitem__(self, index: int) -> int:
        """The entry; the oldest that is left, for one that is forgotten."""
        return self._values[index if index < 0 else max(index - self._first, 0)]

    def since(self, index: int) -> array[int]:
        """The entries from this one on; the oldest that is left, for each that is forgotten."""
        place, values = index - self._first, self._values
        return values[place:] if place >= 0 else values[:1] * -place + values


class FewTail:
    """The last entries of a column that is 0 in most steps."""

    __slots__ = ("_values",)

    def __init__(self) -> None:
        self._values: dict[int, int] = {}

    def put(self, step: int, value: int) -> None:
        values = self._values
        values[step] = value
        while (oldest := next(iter(values))) < step - KEPT_STEPS:
            del values[oldest]

    def __getitem__(self, step: int) -> int:
        return self._values.get(step, 0)


class LiveSteps(StepLog):
    """A step log of bounded length."""

    __slots__ = ()

    def __init__(self) -> None:
        for name in ("end_ns", *self.EACH):
            setattr(self, name, Tail())
        for name in ("start_ns", *self.FEW):
            setattr(self, name, FewTail())

    def new_track(self) -> Any:
        return Tail()


class LiveTables(BlockTables):
    """Block tables of requests that nobody knew before they came.

    A full block is known by the block before it and its own tokens. What was seen longest ago is forgotten
    first; if a cache still held it, it is computed once more than a real engine would.
    """

    def __init__(self) -> None:
        self._most = _SPARE_BLOCKS
        self._known: OrderedDict[tuple[int, bytes], int] = OrderedDict()
        self._contents: dict[int, tuple[int, bytes]] | None = None
        """The other way round, where somebody wants to know."""
        self._adapter_roots: dict[int, str] = {}
        """What stands before the first block of an adapter's requests -> the adapter."""
        self._numbers = count(1)
        self._own = _OWN_BLOCKS
        self._salts: dict[int, str] = {}
        self._ids: dict[int, dict[int, list[int]]] = {}
        """Index of a request → block size → its full blocks."""

    def remember(self, blocks: int) -> None:
        """Remember what caches of so many blocks can hold, and some more, from now on."""
        self._most = blocks + blocks // 4 + _SPARE_BLOCKS

    def forget_all(self) -> None:
        """Know no block any more: what comes now hits nothing that was before."""
        self._known.clear()
        self._adapter_roots.clear()
        if self._contents is not None:
            self._contents.clear()

    def keep_contents(self) -> None:
        """Remember the tokens of blocks too, from now on."""
        self._contents = {}

    def content(self, number: int) -> tuple[int, bytes] | None:
        """(number of the block before, token ids as 64-bit bytes) of a block; None if it is not known."""
        return self._contents.get(number) if self._contents is not None else None

    def adapter_of_root(self, number: int) -> str | None:
        """The LoRA adapter whose first blocks follow ``number``; None: it is of none, or no such start."""
        return self._adapter_roots.get(number)

    def salt(self, request: Request, salt: str) -> None:
        """Keep a request's blocks apart from those of other salts (``cache_salt``)."""
        self._salts[request.index] = salt

    def forget(self, request: Request) -> None:
        """A request has left."""
        self._salts.pop(request.index, None)
        self._ids.pop(request.index, None)

    def shared_ids(self, request: Request, block_size: int) -> Sequence[int]:
        known = self._ids.setdefault(request.index, {})
        if block_size not in known:
            known[block_size] = list(self._chain(request, block_size))
        return known[block_size]

    def new_table(self, request: Request, kv: AnyKvCache, *, lasting: bool = True) -> Any:
        own = self._own
        if lasting:
            self._own += (request.input_tokens + request.output_tokens) // min(kv.block_sizes) + 1
        identities = [(self.shared_ids(request, size), own) for size in kv.block_sizes]
        return kv.new_table(identities, request.input_tokens)

    def _chain(self, request: Request, block_size: int) -> Iterable[int]:
        assert request.input_ids is not None
        raw = request.input_ids.tobytes() + (
            b"" if request.output_ids is None else request.output_ids.tobytes()
        )
        parent = -block_size
        if request.lora is not None:
            parent = self._number((parent, b"adapter " + request.lora.encode()))
            self._adapter_roots[parent] = request.lora
        salt = self._salts.get(request.index)
        if salt:
            parent = self._number((parent, b"salt " + salt.encode()))
            if request.lora is not None:
                self._adapter_roots[parent] = request.lora
        step = 8 * block_size
        for start in range(0, len(raw) - step + 1, step):
            parent = self._number((parent, raw[start : start + step]))
            yield parent

    def _number(self, key: tuple[int, bytes]) -> int:
        short = key[0], blake2b(key[1], digest_size=16).digest()
        found = self._known.get(short)
        if found is not None:
            self._known.move_to_end(short)
            return found
        while len(self._known) >= self._most:
            _, gone = self._known.popitem(last=False)
            self._adapter_roots.pop(gone, None)
            if self._contents is not None:
                del self._contents[gone]
        self._known[short] = number = next(self._numbers)
        if self._contents is not None:
            self._contents[number] = key
        return number
