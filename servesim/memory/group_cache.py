"""The KV cache of an instance whose layers keep different things: several groups of layers over one pool.

Every group has a block table of its own for each request, and all take their blocks from one pool. A group of
full attention keeps every token. One with a window or with chunks gives blocks back as soon as no token to
come can see them; their places in the table hold the null block, 0. One with states keeps the block of the
last state: the only one, or, where prefixes of states are cached, one a block boundary.

A prefix counts as cached up to the length at which every group has what the next token needs: all blocks, the
blocks of the last window, or the state at exactly that length. Follows vLLM's coordinator of several groups;
what its versions do differently is said where it is done (:class:`GroupRules`).
"""

from __future__ import annotations

from dataclasses import replace
from math import gcd, lcm
from typing import TYPE_CHECKING

from servesim.memory.block_pool import BlockPool
from servesim.memory.kv_cache import KvCache
from servesim.slotted import dataclass
from servesim.specs.vllm_versions import NEWEST, SETTLED_FREES, SPARSE_WINDOWS, STATE_STOPS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from servesim.memory.kv_cache import AnyKvCache
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


class _Group:
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


class GroupedKvCache:
    """As :class:`~servesim.memory.kv_cache.KvCache`, for groups that do not all keep every token."""

    __slots__ = (
        "_fresh_states",
        "_groups",
        "_sets",
        "_sparse",
        "_states_cached",
        "alignment",
        "block_size",
        "block_sizes",
        "caching",
        "clips",
        "period",
        "pool",
        "registrations",
        "rules",
        "several",
    )

    def __init__(self, num_blocks: int, groups: Sequence[KvGroup], caching: bool, rules: GroupRules) -> None:
        """
        Args:
            num_blocks: of the pool, the null block among them.
            groups: as planned; see :class:`servesim.memory.kv_groups.KvPlan`.
            caching: whether prefixes are cached.
            rules: of the version and the scheduler.
        """
        self.pool = BlockPool(num_blocks)
        self.several = True
        self.caching = caching
        self.rules = rules
        if not caching:  # one state a sequence, however long it grows
            groups = [replace(g, block_size=rules.longest) if g.kind == "state" else g for g in groups]
        self._groups = [_Group(index, group, rules) for index, group in enumerate(groups)]
        self.block_sizes = tuple(group.block_size for group in groups)
        growing = [group.block_size for group in groups if group.kind != "state"] or [1]
        self.block_size = min(growing)
        self._sparse = SPARSE_WINDOWS.holds(rules.version)
        """Whether the index takes of windows and states those that a hit can end in."""
        self._states_cached = caching and any(group.kind == "state" for group in groups)
        """States are kept at block boundaries (vLLM's Mamba cache mode ``align``); else one a sequence."""
        self.clips = self._states_cached
        """Whether chunks of a prompt end at block boundaries."""
        self.alignment = lcm(*self.block_sizes) if caching else 1
        """Tokens of which a hit is a multiple."""
        self.period = lcm(*(self.block_sizes if self._states_cached else growing))
        """The tables of a decoding request change at lengths that repeat after so many tokens."""
        self.registrations = 0
        """Counts up whenever a waiting request may find more than before: blocks in the index, or free."""
        self._fresh_states: set[int] = set()
        """Content of the states registered in the present step: not computed before it has ended."""
        sets: dict[int, list[_Group]] = {}
        for group in self._groups:
            sets.setdefault(group.bucket, []).append(group)
        self._sets = sorted(sets.values(), key=lambda members: not members[0].is_full)
        """Groups of the same kind of layers, looked up together; full attention first."""

    # ------------------------------------------------------------------ what changes when

    def residues(self, lag: int) -> tuple[int, ...]:
        """Lengths, modulo ``period``, at which the tables of a decoding request change.

        ``lag``: of its computed tokens, those in a step in flight.
        """
        found: set[int] = set()
        for group in self._groups:
            if group.kind == "state" and not self._states_cached:
                continue
            size = group.block_size
            step = size if group.kind != "chunked" else gcd(size, group.reach)
            found.update(range(0, self.period, size))
            offset = {"sliding": group.reach - 1, "state": 1}.get(group.kind, 0)
            if not group.is_full:
                found.update((at + offset + lag) % self.period for at in range(0, self.period, step))
        return tuple(sorted(found))

    def blocks_for(self, tokens: int) -> int:
        """Blocks that ``tokens`` more tokens of one request take at most, in all groups."""
        growing = (g.block_size for g in self._groups if g.kind != "state" or self._states_cached)
        return sum(-(-tokens // size) for size in growing)

    def new_step(self) -> None:
        """A step is about to be scheduled: states of the one before can be used."""
        if self._fresh_states:
            self._fresh_states.clear()
            self.registrations += 1

    # ------------------------------------------------------------------ prefixes

    def new_table(self, identities: Sequence[tuple[Sequence[int], int]], prompt_tokens: int) -> GroupedTable:
        """An empty table; ``identities``: (shared ids, base of its own ids) for each of ``block_sizes``."""
        return GroupedTable([GroupTable(*each) for each in identities], prompt_tokens)

    def no_hits(self) -> GroupHits:
        """What is found where nothing is looked up."""
        return GroupHits([[] for _ in self._groups])

    def hit_tokens(self, hits: GroupHits) -> int:
        """Tokens of a prefix that was found."""
        return hits.tokens

    def lookup(self, table: GroupedTable, tokens: int, seen_before: bool) -> GroupHits:
        """The longest known prefix of the first ``tokens`` tokens, never all of them.

        Each kind of layers accepts the length at hand or shortens it, until all agree. ``seen_before``: the
        request held blocks once, so that its unique blocks may be cached too.
        """
        hits = self.no_hits()
        if not self.caching:
            return hits
        most = tokens - 1
        if not seen_before:
            most = min(most, *(len(own.shared_ids) * g.block_size for own, g in self._own(table)))
        length, longest = most, 0
        full: dict[int, int] = {}
        """Bucket of full attention -> the length found: whatever is shorter is there as well."""
        once = len(self._sets) == 1 or (len(self._sets) == 2 and self._sets[0][0].is_full)
        while True:
            now = length
            for members in self._sets:
                bucket = members[0].bucket
                if bucket in full:
                    now = min(now, full[bucket])
                    continue
                now = self._find(members, table, now, hits)
                if members[0].is_full:
                    full[bucket] = now
                longest = max(longest, now)
            shorter, length = now < length, min(now, length)
            if once or not shorter:
                break
        hits.tokens = length
        # of several kinds of full attention, versions before gave the first alone back what is too long
        cut = self._groups if self._sparse else self._sets[0]
        for group in cut:
            if group.is_full:
                del hits.blocks[group.index][-(-hits.tokens // group.block_size) :]
        table.junction = longest if longest > hits.tokens and len(self._sets) > 1 else 0
        return hits

    def _own(self, table: GroupedTable) -> Iterator[tuple[GroupTable, _Group]]:
        return zip(table.groups, self._groups)  # noqa: B905 - of equal length; checking costs

    def _cached(self, members: list[_Group], table: GroupedTable, position: int) -> list[int] | None:
        """The blocks that hold the content at ``position``, one of each group; None: one has none."""
        content = table.groups[members[0].index].content(position) * len(self._groups)
        found = []
        for group in members:
            block = self.pool.lookup(content + group.index)
            if block is None:
                return None
            found.append(block)
        return found

    def _find(self, members: list[_Group], table: GroupedTable, most: int, hits: GroupHits) -> int:
        """Find the longest prefix of up to ``most`` tokens that these groups have; returns its length."""
        size, count = members[0].block_size, most // members[0].block_size
        if members[0].kind == "sliding":
            columns = self._find_window(members, table, count)
        elif members[0].kind == "state":
            columns = self._find_state(members, table, count)
        else:
            start = most // members[0].reach * members[0].reach // size if members[0].kind == "chunked" else 0
            columns = [[0] * len(members) for _ in range(start)]
            for position in range(start, count):
                blocks = self._cached(members, table, position)
                if blocks is None:
                    break
                columns.append(blocks)
            while len(columns) * size % self.alignment:
                columns.pop()
        for place, group in enumerate(members):
            hits.blocks[group.index] = [blocks[place] for blocks in columns]
        return len(columns) * size

    def _find_window(self, members: list[_Group], table: GroupedTable, count: int) -> list[list[int]]:
        """From the right: the first run of cached blocks as long as a window; the beginning, however
        short."""
        size, need = members[0].block_size, members[0].tail
        columns = [[0] * len(members) for _ in range(count)]
        run = 0
        for position in range(count - 1, -1, -1):
            blocks = self._cached(members, table, position)
            if blocks is None:
                run = 0
                continue
            if not run and (position + 1) * size % self.alignment:
                continue
            columns[position] = blocks
            run += 1
            if run >= need:
                return columns[: position + run]
        del columns[run:]
        while len(columns) * size % self.alignment:
            columns.pop()
        return columns

    def _find_state(self, members: list[_Group], table: GroupedTable, count: int) -> list[list[int]]:
        """The last boundary whose state is cached."""
        for position in range(count - 1, -1, -1):
            if (position + 1) * members[0].block_size % self.alignment:
                continue
            blocks = self._cached(members, table, position)
            if blocks is not None:
                return [[0] * len(members) for _ in range(position)] + [blocks]
        return []

    # ------------------------------------------------------------------ admission

    def missing_blocks(self, hits: GroupHits, done: int, tokens: int, *, whole: bool = False) -> int:
        """Free blocks it takes to hold ``tokens`` tokens of a waiting request, ``done`` of them computed.

        A hit that nobody holds counts as well. ``whole``: those of the whole prompt, of which a window is
        kept.
        """
        is_free = self.pool.is_free
        missing = 0
        for group, found in zip(self._groups, hits.blocks, strict=True):
            required = -(-tokens // group.block_size)
            if group.kind == "state" and self._states_cached:
                if found and self.pool.content_of(found[-1]) in self._fresh_states:
                    return self.pool.usable + 2  # computed in this very step: wait for the next one
                missing += min(max(required - len(found), 0), 1)
                skipped = 0
            else:
                if whole and group.cap is not None:
                    required = min(required, group.cap)
                skipped = group.skipped(done)
                missing += max(required - max(skipped, len(found)), 0)
            missing += sum(1 for block in found[skipped:] if block and is_free(block))
        return missing

    def admit(self, table: GroupedTable, hits: GroupHits, done: int, tokens: int) -> None:
        """Give an admitted request its ``hits`` and fresh blocks up to ``tokens`` tokens; the first ``done``
        are computed, here or elsewhere."""
        for (own, group), found in zip(self._own(table), hits.blocks, strict=True):
            skipped = group.skipped(done)
            kept = found[skipped:]
            self.pool.share([block for block in kept if block])
            own.blocks = [0] * skipped + kept
            own.first = 0 if group.kind == "state" else skipped
            own.num_cached = len(own.blocks)
            own.last_state = -1
        if done > hits.tokens:
            for own, group in self._own(table):
                need = -(-done // group.block_size) - len(own.blocks)
                if need > 0:
                    own.blocks += self.pool.take(need)
        self.grow(table, tokens)

    def clip_chunk(
        self, table: GroupedTable, start: int, tokens: int, *, known: int, most: int, admitting: bool = False
    ) -> int:
        """Tokens of a chunk that begins at ``start``, cut so that states stand at block boundaries.

        ``known``: tokens of the request; ``most``: of a chunk; ``admitting``: it is the request's first.
        """
        prompt, size = table.prompt_tokens, self.block_size
        end, last = start + tokens, known // size * size
        stop = max(prompt, known - 1)
        if start >= stop:
            return tokens
        junction = table.junction
        if not STATE_STOPS.holds(self.rules.version):
            if end < last:
                tokens = tokens // size * size
            elif start < last < end:
                tokens = last - start
            uncached = junction - start if junction and admitting else 0
            return uncached // size * size if size <= uncached < tokens else tokens
        if self._sparse:
            last = (known - 1) // size * size
        if end < stop:
            aligned = end // size * size
            if aligned > start or size <= most:
                end = aligned
        stops = [last]
        if start % size:
            stops.append((start // size + 1) * size)
        if start < junction < end:
            stops.append(start + (junction - start) // size * size)
        return max(min([at for at in stops if start < at < end], default=end) - start, 0)

    # ------------------------------------------------------------------ growing

    def shortage(self, table: GroupedTable, tokens: int) -> int:
        """How many blocks are missing (<= 0: none) for ``table`` to reach ``tokens`` tokens."""
        return sum(self._need(own, group, tokens) for own, group in self._own(table)) - self.pool.num_free

    def _need(self, own: GroupTable, group: _Group, tokens: int) -> int:
        need = -(-tokens // group.block_size) - len(own.blocks)
        if need > 1 and group.kind == "state" and self._states_cached:
            return 1
        return max(need, 0)

    def grow(self, table: GroupedTable, tokens: int) -> None:
        """Add blocks so that ``table`` holds ``tokens`` tokens."""
        for own, group in self._own(table):
            need = -(-tokens // group.block_size) - len(own.blocks)
            if need <= 0:
                continue
            if group.kind == "state" and self._states_cached:
                own.last_state = len(own.blocks) - 1
                own.blocks += [0] * (need - 1)
                need = 1
            own.blocks += self.pool.take(need)

    def release(self, table: GroupedTable, done: int, known: int) -> None:
        """Give back what no token after the first ``done``, all of them computed, sees.

        ``known``: leading tokens that are known by now, so that the index can take their blocks.
        """
        for own, group in self._own(table):
            if group.is_full:
                continue
            end = min(group.skipped(done), len(own.blocks))
            if group.kind == "state":
                if self._states_cached and own.blocks:
                    self._release_states(own, group, table, end, done)
            elif end > own.first:
                self._release(own, group, table, range(end - 1, own.first - 1, -1), min(done, known))
                own.first = end

    def _release_states(
        self, own: GroupTable, group: _Group, table: GroupedTable, end: int, done: int
    ) -> None:
        """Give back the states before the last boundary, and the one that the present state was copied
        from."""
        if self._sparse:
            positions = [at for at in range(end - 1, own.first - 1, -1) if own.blocks[at]]
            own.first = max(own.first, end)
        else:
            positions, at = [], end - 1
            while at >= 0 and own.blocks[at]:
                positions.append(at)
                at -= 1
        if positions:
            self._release(own, group, table, positions, done)
        last = own.last_state
        if 0 <= last < -(-done // group.block_size) - 1 and own.blocks[last]:
            self._release(own, group, table, [last], done)

    def _release(
        self, own: GroupTable, group: _Group, table: GroupedTable, positions: Sequence[int], known: int
    ) -> None:
        """Give back the blocks at ``positions``; content that the index keeps goes to its end."""
        if self.caching:
            rising = positions if len(positions) == 1 else sorted(positions)
            self._register(own, group, table, rising, self._cacheable(known) // group.block_size)
        blocks = [own.blocks[at] for at in positions]
        for at in positions:
            own.blocks[at] = 0
        self.pool.give_back(blocks, ())
        self.registrations += 1

    # ------------------------------------------------------------------ the index

    def _cacheable(self, tokens: int) -> int:
        """Of the first ``tokens`` tokens, those that a hit could cover."""
        return tokens // self.alignment * self.alignment

    def _keeps(self, group: _Group, table: GroupedTable, position: int) -> bool:
        """Whether the index takes the block at ``position``: of windows and states, only where a hit can
        end."""
        if group.is_full or group.kind == "chunked":
            return True
        size, aligned = group.block_size, self.alignment
        if not self._sparse:
            per_segment = aligned // size
            if group.kind == "state" or group.tail >= per_segment:
                return True
            return position % per_segment >= per_segment - group.tail
        for boundary in (table.prompt_tokens - 1, table.junction):
            end = boundary // aligned * aligned // size
            if end - (group.tail or (group.kind == "state")) <= position < end:
                return True
        return False

    def register_shared(self, table: GroupedTable, tokens: int) -> None:
        """Make full blocks among the first ``tokens`` tokens visible to the requests that share them."""
        if not self.caching:
            return
        for own, group in self._own(table):
            full = min(self._cacheable(tokens) // group.block_size, len(own.shared_ids), len(own.blocks))
            if full > own.num_cached:
                fresh = self._register(own, group, table, range(own.num_cached, full), full)
                if group.kind == "state":
                    self._fresh_states.update(fresh)
                own.num_cached = full
                self.registrations += 1

    def _register(
        self, own: GroupTable, group: _Group, table: GroupedTable, positions: Sequence[int], full: int
    ) -> list[int]:
        """Put those of the blocks at ``positions`` into the index that are full and that it takes."""
        taken = []
        for position in positions:
            block = own.blocks[position]
            if position >= full or not block or self.pool.is_hashed(block):
                continue
            if self._keeps(group, table, position):
                content = own.content(position) * len(self._groups) + group.index
                self.pool.register(block, content)
                taken.append(content)
        return taken

    def preempt(self, table: GroupedTable, tokens: int) -> None:
        """Take all blocks away; the full ones among the first ``tokens`` tokens stay cached until
        overwritten."""
        if self.caching:
            for own, group in self._own(table):
                full = min(self._cacheable(tokens) // group.block_size, len(own.blocks))
                self._register(own, group, table, range(own.first, full), full)
            self.registrations += 1
        self.free(table, tokens)

    def free(self, table: GroupedTable, tokens: int) -> None:
        """Give all blocks back; the first ``tokens`` tokens are computed and known."""
        for own, group in self._own(table):
            full = self._cacheable(tokens) // group.block_size if self.caching else 0
            kept = {
                block
                for position, block in enumerate(own.blocks[own.first : full], own.first)
                if block and self._keeps(group, table, position)
            }
            self.pool.give_back([block for block in reversed(own.blocks[own.first :]) if block], kept)
            own.blocks = []
            own.first = own.num_cached = 0
            own.last_state = -1


def kv_cache_of(
    groups: Sequence[KvGroup], num_blocks: int, block_size: int, caching: bool, rules: GroupRules
) -> AnyKvCache:
    """The cache for these groups: the plain one where all is one group that keeps every token.

    ``block_size``: of that plain one, where no ``groups`` are given.
    """
    if not groups or (len(groups) == 1 and groups[0].kind in ("full", "mla")):
        return KvCache(num_blocks, groups[0].block_size if groups else block_size, caching)
    return GroupedKvCache(num_blocks, groups, caching, rules)
