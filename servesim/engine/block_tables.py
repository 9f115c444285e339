"""The identities of every request's KV blocks, worked out once per run and block size."""

from __future__ import annotations

from typing import TYPE_CHECKING

from servesim.memory.kv_cache import BlockTable
from servesim.workload.hashes import block_ids

if TYPE_CHECKING:
    from collections.abc import Sequence

    from servesim.workload.hashes import BlockIds
    from servesim.workload.request import Request, Workload


class BlockTables:
    """Makes the empty block tables of a workload's requests."""

    def __init__(self, workload: Workload, like: BlockTables | None = None) -> None:
        """
        Args:
            workload: whose requests.
            like: tables of another run of the same requests, at whatever times they arrived.
        """
        self._workload = workload
        self._found: dict[int, BlockIds] = like._found if like else {}
        self._next_unique: dict[int, int] = {}

    def shared_ids(self, request: Request, block_size: int) -> Sequence[int]:
        """Identities of the request's leading blocks of ``block_size`` tokens that other requests have as
        well."""
        if block_size not in self._next_unique:
            if block_size not in self._found:
                self._found[block_size] = block_ids(self._workload, block_size)
            self._next_unique[block_size] = self._found[block_size].num_ids
        return self._found[block_size].ids[request.index]

    def new_table(self, request: Request, block_size: int) -> BlockTable:
        """An empty table for ``request``, with identities of its own for the blocks it shares with nobody."""
        shared = self.shared_ids(request, block_size)
        unique = self._next_unique[block_size]
        self._next_unique[block_size] += (request.input_tokens + request.output_tokens) // block_size + 1
        return BlockTable(shared, unique)
