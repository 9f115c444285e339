"""Attention on a GPU through FlashInfer: paged KV in 16 bit or fp8, prefill and decodes as two launches.

A call writes the step's new keys and values to their pages first, as an engine's attention does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from servesim.errors import NotSupportedError
from servesim.profiler.torch_source.device import Calls
from servesim.profiler.torch_source.formats import activation_dtype, kv_torch_dtype
from servesim.slotted import dataclass
from servesim.specs.dtypes import dtype_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

    from servesim.profiler.meter import AttentionBatch, ProfileJob
    from servesim.profiler.torch_source.device import Device
    from servesim.specs.rank_shapes import RankShapes

PAGE = 16
"""Tokens of a page: the engine's block size."""
_WORKSPACE_BYTES = 128 * 2**20
_MOST_PLACES = 8
_ORDER_SEED = 7


@dataclass(frozen=True, slots=True)
class Pages:
    """Page table of some sequences, as FlashInfer takes it, on the host."""

    indptr: list[int]
    """Where each sequence's pages start; one more entry than sequences."""
    indices: list[int]
    last_page_len: list[int]

    @classmethod
    def of(cls, lengths: list[int], free: list[int], first: int) -> Pages:
        """Pages for sequences of ``lengths`` tokens, taken from ``free`` from its entry ``first`` on."""
        indptr = [0]
        for length in lengths:
            indptr.append(indptr[-1] + -(-length // PAGE))
        last = [(length - 1) % PAGE + 1 for length in lengths]
        return cls(indptr, free[first : first + indptr[-1]], last)


def pages_needed(batch: AttentionBatch) -> int:
    """Pages that the batch's sequences fill, the last of each perhaps in part."""
    lengths = [batch.chunk + batch.history] if batch.chunk else []
    pages = sum(-(-length // PAGE) for length in lengths)
    return pages + sum(count * -(-(kv + 1) // PAGE) for count, kv in batch.decodes)


class FlashInferAttention:
    """One rank's attention over a pool of pages handed out in random order."""

    name = "flashinfer"

    def __init__(self, device: Device, job: ProfileJob, shapes: RankShapes, capacity_tokens: int) -> None:
        """
        Raises:
            NotSupportedError: FlashInfer is not installed, or has no kernel for this KV format.
        """
        if job.kv_dtype not in ("float16", "bfloat16", "fp8"):
            raise NotSupportedError(
                f"--kv-cache-dtype {job.kv_dtype}: FlashInfer reads 16-bit and fp8 caches"
            )
        try:
            import flashinfer
        except ImportError as error:
            raise NotSupportedError(
                "--source torch on a GPU measures paged attention with FlashInfer, which cannot be imported "
                f"({error}); "
                "install flashinfer-python, or take PyTorch's own kernel with --attention sdpa"
            ) from error
        torch = device.torch
        self._flashinfer, self._device, self._torch, self._shapes = flashinfer, device, torch, shapes
        self._activations = activation_dtype(torch, job.dtype)
        self._kv = kv_torch_dtype(torch, job.kv_dtype)
        self._bytes_per_token = 2 * shapes.kv_heads * shapes.head_dim * dtype_bytes(job.kv_dtype)
        num_pages = capacity_tokens // PAGE
        self.capacity_tokens = num_pages * PAGE
        self._pool = torch.empty(
            (num_pages, 2, PAGE, shapes.kv_heads, shapes.head_dim), dtype=self._kv, device=device.name
        )
        for part in self._pool.split(1024):
            part.copy_(torch.randn(part.shape, device=device.name, dtype=torch.bfloat16))
        generator = torch.Generator().manual_seed(_ORDER_SEED)
        self._free: list[int] = torch.randperm(num_pages, generator=generator).tolist()
        self._workspaces = [
            torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=device.name)
            for _ in range(2 * _MOST_PLACES)
        ]

    def calls(self, batch: AttentionBatch, window: int | None = None) -> Calls:
        """The batch at several places of the pool, each planned on its own.

        ``window``: tokens that a token sees, None for all.
        """
        left = -1 if window is None else window - 1
        pages, cold_bytes = pages_needed(batch), batch.kv_tokens * self._bytes_per_token
        places = min(len(self._free) // pages, self._device.copies(cold_bytes, _MOST_PLACES, 1 << 62))
        return Calls(
            [self._at(batch, place, place * pages, left) for place in range(max(places, 1))], cold_bytes
        )

    def _at(self, batch: AttentionBatch, place: int, first: int, left: int) -> Callable[[], object]:
        parts = []
        if batch.chunk:
            length = batch.chunk + batch.history
            pages = Pages.of([length], self._free, first)
            parts.append(self._prefill(batch.chunk, length, pages, self._workspaces[2 * place], left))
            first += len(pages.indices)
        if batch.decodes:
            lengths = [kv + 1 for count, kv in batch.decodes for _ in range(count)]
            pages = Pages.of(lengths, self._free, first)
            parts.append(self._decode(lengths, pages, self._workspaces[2 * place + 1], left))
        return lambda: [part() for part in parts]

    def _ints(self, values: list[int]) -> Any:
        return self._torch.tensor(values, dtype=self._torch.int32, device=self._device.name)

    def _new(self, *shape: int) -> Any:
        return self._torch.randn(shape, device=self._device.name, dtype=self._activations)

    def _writer(self, new_tokens: list[int], lengths: list[int], pages: Pages) -> Callable[[], None]:
        """Writes the last ``new_tokens`` of every sequence to its pages."""
        append = self._flashinfer.append_paged_kv_cache
        total, shapes = sum(new_tokens), self._shapes
        keys = self._new(total, shapes.kv_heads, shapes.head_dim).to(self._kv)
        values = self._new(total, shapes.kv_heads, shapes.head_dim).to(self._kv)
        sequence = self._ints([i for i, count in enumerate(new_tokens) for _ in range(count)])
        place = [
            length - count + i
            for count, length in zip(new_tokens, lengths, strict=True)
            for i in range(count)
        ]
        table = [self._ints(values) for values in (pages.indices, pages.indptr, pages.last_page_len)]
        positions = self._ints(place)
        return lambda: append(keys, values, sequence, positions, self._pool, *table, kv_layout="NHD")

    def _prefill(
        self, chunk: int, length: int, pages: Pages, workspace: Any, left: int
    ) -> Callable[[], object]:
        shapes = self._shapes
        wrapper = self._flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
        wrapper.plan(
            self._ints([0, chunk]),
            self._ints(pages.indptr),
            self._ints(pages.indices),
            self._ints(pages.last_page_len),
            shapes.heads,
            shapes.kv_heads,
            shapes.head_dim,
            PAGE,
            causal=True,
            window_left=left,
            q_data_type=self._activations,
            kv_data_type=self._kv,
        )
        query, write = self._new(chunk, shapes.heads, shapes.head_dim), self._writer([chunk], [length], pages)
        return lambda: (write(), wrapper.run(query, self._pool))

    def _decode(self, lengths: list[int], pages: Pages, workspace: Any, left: int) -> Callable[[], object]:
        shapes = self._shapes
        wrapper = self._flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
        wrapper.plan(
            self._ints(pages.indptr),
            self._ints(pages.indices),
            self._ints(pages.last_page_len),
            shapes.heads,
            shapes.kv_heads,
            shapes.head_dim,
            PAGE,
            window_left=left,
            q_data_type=self._activations,
            kv_data_type=self._kv,
        )
        query = self._new(len(lengths), shapes.heads, shapes.head_dim)
        write = self._writer([1] * len(lengths), lengths, pages)
        return lambda: (write(), wrapper.run(query, self._pool))
