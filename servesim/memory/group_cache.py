"""The KV cache of an instance whose layers keep different things: several groups of layers over one pool.

Every group has a block table of its own for each request, and all take their blocks from one pool. A group of
full attention keeps every token. One with a window or with chunks gives blocks back as soon as no token to
come can see them; their places in the table hold the null block, 0. One with states keeps the block of the
last state: the only one, or, where prefixes of states are cached, one a block boundary.

Follows vLLM's coordinator of several groups; what its versions do differently is said where it is done
(:class:`~servesim.memory.group_tables.GroupRules`). What is found of a prefix:
:mod:`servesim.memory.group_prefixes`.
"""

from __future__ import annotations

from dataclasses import replace
from math import gcd, lcm
from typing import TYPE_CHECKING

from servesim.memory.block_pool import BlockPool
from servesim.memory.group_prefixes import GroupPrefixes
from servesim.memory.group_tables import Group, GroupedTable, GroupHits, GroupTable
from servesim.memory.kv_cache import KvCache
from servesim.specs.vllm_versions import SPARSE_WINDOWS, STATE_STOPS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from servesim.memory.group_tables import GroupRules
    from servesim.memory.kv_cache import AnyKvCache
    from servesim.memory.kv_groups import KvGroup


class GroupedKvCache:
    """As :class:`~servesim.memory.kv_cache.KvCache`, for groups that do not all keep every token."""

    __slots__ = (
        "_fresh_states",
        "_groups",
        "_prefixes",
        "_sparse",
        "_states_cached",
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
        self._groups = [Group(index, group, rules) for index, group in enumerate(groups)]
        self.block_sizes = tuple(group.block_size for group in groups)
        growing = [group.block_size for group in groups if group.kind != "state"] or [1]
        self.block_size = min(growing)
        self._sparse = SPARSE_WINDOWS.holds(rules.version)
        """Whether the index takes of windows and states those that a hit can end in."""
        self._states_cached = caching and any(group.kind == "state" for group in groups)
        """States are kept at block boundaries (vLLM's Mamba cache mode ``align``); else one a sequence."""
        self.clips = self._states_cached
        """Whether chunks of a prompt end at block boundaries."""
        self.period = lcm(*(self.block_sizes if self._states_cached else growing))
        """The tables of a decoding request change at lengths that repeat after so many tokens."""
        self.registrations = 0
        """Counts up whenever a waiting request may find more than before: blocks in the index, or free."""
        self._fresh_states: set[int] = set()
        """Content of the states registered in the present step: not computed before it has ended."""
        aligned = lcm(*self.block_sizes) if caching else 1
        self._prefixes = GroupPrefixes(self.pool, self._groups, aligned, self._sparse)

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
        self._prefixes.find(table, most, hits)
        return hits

    def _own(self, table: GroupedTable) -> Iterator[tuple[GroupTable, Group]]:
        return zip(table.groups, self._groups)  # noqa: B905 - of equal length; checking costs

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

    def _need(self, own: GroupTable, group: Group, tokens: int) -> int:
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
        self, own: GroupTable, group: Group, table: GroupedTable, end: int, done: int
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
        self, own: GroupTable, group: Group, table: GroupedTable, positions: Sequence[int], known: int
    ) -> None:
        """Give back the blocks at ``positions``; content that the index keeps goes to its end."""
        if self.caching:
            rising = positions if len(positions) == 1 else sorted(positions)
            self._prefixes.register(
                own, group, table, rising, self._prefixes.cacheable(known) // group.block_size
            )
        blocks = [own.blocks[at] for at in positions]
        for at in positions:
            own.blocks[at] = 0
        self.pool.give_back(blocks, ())
        self.registrations += 1

    # ------------------------------------------------------------------ the index

    def register_shared(self, table: GroupedTable, tokens: int) -> None:
        """Make full blocks among the first ``tokens`` tokens visible to the requests that share them."""
        if not self.caching:
            return
        for own, group in self._own(table):
            full = min(
                self._prefixes.cacheable(tokens) // group.block_size, len(own.shared_ids), len(own.blocks)
            )
            if full > own.num_cached:
                fresh = self._prefixes.register(own, group, table, range(own.num_cached, full), full)
                if group.kind == "state":
                    self._fresh_states.update(fresh)
                own.num_cached = full
                self.registrations += 1

    def preempt(self, table: GroupedTable, tokens: int) -> None:
        """Take all blocks away; the full ones among the first ``tokens`` tokens stay cached until
        overwritten."""
        if self.caching:
            for own, group in self._own(table):
                full = min(self._prefixes.cacheable(tokens) // group.block_size, len(own.blocks))
                self._prefixes.register(own, group, table, range(own.first, full), full)
            self.registrations += 1
        self.free(table, tokens)

    def free(self, table: GroupedTable, tokens: int) -> None:
        """Give all blocks back; the first ``tokens`` tokens are computed and known."""
        for own, group in self._own(table):
            full = self._prefixes.cacheable(tokens) // group.block_size if self.caching else 0
            kept = {
                block
                for position, block in enumerate(own.blocks[own.first : full], own.first)
                if block and self._prefixes.keeps(group, table, position)
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
