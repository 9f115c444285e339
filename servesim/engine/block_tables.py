"""Block tables of requests as they come, with the identities of the blocks that requests share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from servesim.compiled import mypyc_attr
from servesim.workload.hashes import block_ids

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from servesim.memory.kv_cache import AnyKvCache
    from servesim.workload.hashes import BlockIds
    from servesim.workload.request import Request, Workload


@mypyc_attr(allow_interpreted_subclasses=True)
class BlockTables:
    """Makes the empty block tables of a workload's requests."""

    def __init__(self, workload: Workload, like: BlockTables | None = None, lookahead: int = 0) -> None:
        """
        Args:
            workload: whose requests.
            like: tables of another run of the same requests, at whatever times they arrived.
            lookahead: tokens behind a block that its identity covers.
        """
        self._workload = workload
        self._lookahead = lookahead
        self._found: dict[tuple[int, int], BlockIds] = like._found if like else {}
        self._of: dict[int, Callable[[int], list[int]]] = {}
        """Block size → what gives the identities of a request."""
        self._next_unique: dict[int, int] = {}

    def shared_ids(self, request: Request, block_size: int) -> Sequence[int]:
        """Identities of the request's leading blocks of ``block_size`` tokens that other requests have as
        well."""
        of = self._of.get(block_size)
        if of is None:
            kind = block_size, self._lookahead
            if kind not in self._found:
                self._found[kind] = block_ids(self._workload, *kind)
            self._next_unique[block_size] = self._found[kind].num_ids
            of = self._of[block_size] = self._found[kind].of
        return of(request.index)

    def new_table(self, request: Request, kv: AnyKvCache, *, lasting: bool = True) -> Any:
        """An empty table for ``request``, with identities of its own for the blocks it shares with nobody.

        ``lasting`` false: nothing but what it shares will be looked up.
        """
        tokens = request.input_tokens + request.output_tokens
        identities: dict[int, tuple[Sequence[int], int]] = {}
        for size in kv.block_sizes:
            if size not in identities:
                identities[size] = self.shared_ids(request, size), self._next_unique[size]
                if lasting:
                    self._next_unique[size] += tokens // size + 1
        return kv.new_table([identities[size] for size in kv.block_sizes], request.input_tokens)
