"""Prefixes that several groups of layers have in the cache.

A prefix counts as cached up to the length at which every group has what the next token needs: all blocks, the
blocks of the last window, or the state at exactly that length. Follows vLLM's coordinator of several groups.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from servesim.memory.block_pool import BlockPool
    from servesim.memory.group_tables import Group, GroupedTable, GroupHits, GroupTable


class GroupPrefixes:
    """The index of a pool's full blocks, as several groups use it."""

    __slots__ = ("_alignment", "_groups", "_pool", "_sets", "_sparse")

    def __init__(self, pool: BlockPool, groups: Sequence[Group], alignment: int, sparse: bool) -> None:
        """
        Args:
            pool: of all groups.
            groups: in order.
            alignment: tokens of which a hit is a multiple.
            sparse: whether the index takes of windows and states those that a hit can end in.
        """
        self._pool, self._groups = pool, groups
        self._alignment, self._sparse = alignment, sparse
        sets: dict[int, list[Group]] = {}
        for group in groups:
            sets.setdefault(group.bucket, []).append(group)
        self._sets = sorted(sets.values(), key=lambda members: not members[0].is_full)
        """Groups of the same kind of layers, looked up together; full attention first."""

    def find(self, table: GroupedTable, most: int, hits: GroupHits) -> None:
        """Put the longest known prefix of up to ``most`` tokens into ``hits``; its junction into the table.

        Each kind of layers accepts the length at hand or shortens it, until all agree.
        """
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

    def _cached(self, members: list[Group], table: GroupedTable, position: int) -> list[int] | None:
        """The blocks that hold the content at ``position``, one of each group; None: one has none."""
        content = table.groups[members[0].index].content(position) * len(self._groups)
        found = []
        for group in members:
            block = self._pool.lookup(content + group.index)
            if block is None:
                return None
            found.append(block)
        return found

    def _find(self, members: list[Group], table: GroupedTable, most: int, hits: GroupHits) -> int:
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
            while len(columns) * size % self._alignment:
                columns.pop()
        for place, group in enumerate(members):
            hits.blocks[group.index] = [blocks[place] for blocks in columns]
        return len(columns) * size

    def _find_window(self, members: list[Group], table: GroupedTable, count: int) -> list[list[int]]:
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
            if not run and (position + 1) * size % self._alignment:
                continue
            columns[position] = blocks
            run += 1
            if run >= need:
                return columns[: position + run]
        del columns[run:]
        while len(columns) * size % self._alignment:
            columns.pop()
        return columns

    def _find_state(self, members: list[Group], table: GroupedTable, count: int) -> list[list[int]]:
        """The last boundary whose state is cached."""
        for position in range(count - 1, -1, -1):
            if (position + 1) * members[0].block_size % self._alignment:
                continue
            blocks = self._cached(members, table, position)
            if blocks is not None:
                return [[0] * len(members) for _ in range(position)] + [blocks]
        return []

    def cacheable(self, tokens: int) -> int:
        """Of the first ``tokens`` tokens, those that a hit could cover."""
        return tokens // self._alignment * self._alignment

    def keeps(self, group: Group, table: GroupedTable, position: int) -> bool:
        """Whether the index takes the block at ``position``: of windows and states, only where a hit can
        end."""
        if group.is_full or group.kind == "chunked":
            return True
        size, aligned = group.block_size, self._alignment
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

    def register(
        self, own: GroupTable, group: Group, table: GroupedTable, positions: Sequence[int], full: int
    ) -> list[int]:
        """Put those of the blocks at ``positions`` into the index that are full and that it takes."""
        taken = []
        for position in positions:
            block = own.blocks[position]
            if position >= full or not block or self._pool.is_hashed(block):
                continue
            if self.keeps(group, table, position):
                content = own.content(position) * len(self._groups) + group.index
                self._pool.register(block, content)
                taken.append(content)
        return taken
