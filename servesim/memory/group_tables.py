"""What groups of layers keep, and the tables of one request in them.

A group's block table holds the blocks of a request by position. Full attention keeps every token; a window or
a chunk gives blocks back as soon as no token to come can see them, and the null block, 0, takes their places.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from servesim.slotted import dataclass
from servesim.specs.vllm_versions import NEWEST, SETTLED_FREES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from servesim.memory.kv_groups import KvGroup
    from servesim.specs.vllm_versions import VllmVersion


@dataclass(frozen=True, slots=True)
class GroupRules:
    """What decides how groups keep blocks, beside their own sizes."""

    version: VllmVersion = NEWEST
    step_tokens: int = 2048
    """Tokens of a step at most."""
    steps_in_flight: int = 1
    longest: int = 1 << 30
    """Longest context in tokens."""

    @property
    def frees_settled(self) -> bool:
        """Whether a block behind a window is kept until the steps in flight, which may read it, have
        ended."""
        return SETTLED_FREES.holds(self.version)

    @property
    def admitted_tokens(self) -> int:
        """Computed tokens behind which nothing has been freed yet, at most."""
        return self.step_tokens * (self.steps_in_flight if self.frees_settled else 1)


class GroupTable:
    """The blocks of one request in one group, by position; 0 where nothing is kept."""

    __slots__ = ("blocks", "first", "last_state", "num_cached", "shared_ids", "unique_base")

    def __init__(self, shared_ids: Sequence[int], unique_base: int) -> None:
        self.blocks: list[int] = []
        self.first = 0
        """Positions before it hold nothing any more."""
        self.num_cached = 0
        """Leading positions that were looked at for the prefix index."""
        self.last_state = -1
        """Position of the state before the present one; -1: none."""
        self.shared_ids = shared_ids
        self.unique_base = unique_base

    def content(self, position: int) -> int:
        """Identity of the content of the block at ``position`` once it is full."""
        if position < len(self.shared_ids):
            return self.shared_ids[position]
        return self.unique_base + position


class GroupedTable:
    """The block tables of one request."""

    __slots__ = ("chunks_written", "groups", "junction", "prompt_tokens")

    def __init__(self, groups: list[GroupTable], prompt_tokens: int) -> None:
        self.groups = groups
        self.prompt_tokens = prompt_tokens
        self.junction = 0
        """Length of a prefix that some groups have in the cache and others have not; 0: none."""
        self.chunks_written = 0

    @property
    def awaits_hash(self) -> bool:
        """Whether blocks that other requests may hit are still to be registered."""
        return any(own.num_cached < len(own.shared_ids) for own in self.groups)


@dataclass(slots=True)
class GroupHits:
    """Cached blocks of a prefix, in every group."""

    blocks: list[list[int]]
    tokens: int = 0


class Group:
    """What the cache does for the layers of one group."""

    __slots__ = ("block_size", "bucket", "cap", "index", "is_full", "kind", "reach", "tail")

    def __init__(self, index: int, group: KvGroup, rules: GroupRules) -> None:
        self.index = index
        self.kind = group.kind
        self.is_full = group.kind in ("full", "mla")
        self.block_size = size = group.block_size
        self.reach = reach = group.reach or 0
        self.bucket = group.bucket
        self.tail = -(-(reach - 1) // size) if group.kind == "sliding" else 0
        """Blocks in a row that a hit needs at its end."""
        self.cap: int | None = None
        """Blocks of one request at most, as admission counts them; None: all of its tokens'."""
        if group.kind == "sliding":
            self.cap = -(-min(reach - 1 + rules.admitted_tokens, rules.longest) // size) + 1
        elif group.kind == "chunked":
            self.cap = -(-min(reach + rules.admitted_tokens, rules.longest) // size)

    def skipped(self, done: int) -> int:
        """Leading blocks that no token after the first ``done`` sees."""
        if self.kind == "sliding":
            return max(done - self.reach + 1, 0) // self.block_size
        if self.kind == "chunked":
            return done // self.reach * self.reach // self.block_size
        if self.kind == "state":
            return max(done - 1, 0) // self.block_size
        return 0
