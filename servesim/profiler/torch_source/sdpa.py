"""Attention with PyTorch's own kernel, for CPUs: a call for the chunk and one for every decode length.

The KV cache is one pool of tokens; a sequence is a run of them. 8-bit caches are widened before they are
read, since the kernel computes in 16 or 32 bit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from servesim.profiler.torch_source.device import Calls
from servesim.profiler.torch_source.formats import activation_dtype, kv_torch_dtype
from servesim.specs.dtypes import dtype_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

    from servesim.profiler.meter import AttentionBatch, ProfileJob
    from servesim.profiler.torch_source.device import Device
    from servesim.specs.rank_shapes import RankShapes

_MOST_PLACES = 16


class SdpaAttention:
    """One rank's attention over a pool of KV tokens."""

    name = "sdpa"

    def __init__(self, device: Device, job: ProfileJob, shapes: RankShapes, capacity_tokens: int) -> None:
        torch = device.torch
        self._device, self._torch, self._shapes = device, torch, shapes
        self._activations = activation_dtype(torch, job.dtype)
        self._bytes_per_token = 2 * shapes.kv_heads * shapes.head_dim * dtype_bytes(job.kv_dtype)
        self.capacity_tokens = capacity_tokens
        shape = (2, shapes.kv_heads, capacity_tokens, shapes.head_dim)
        small = torch.randn((2, shapes.kv_heads, min(capacity_tokens, 4096), shapes.head_dim))
        self._pool = torch.empty(shape, dtype=kv_torch_dtype(torch, job.kv_dtype), device=device.name)
        for start in range(0, capacity_tokens, small.shape[2]):
            part = self._pool[:, :, start : start + small.shape[2]]
            part.copy_(small[:, :, : part.shape[2]].to(self._pool.dtype))

    def calls(self, batch: AttentionBatch, window: int | None = None) -> Calls:
        """The batch at several places of the pool; ``window``: tokens that a token sees, None for all."""
        places = min(self.capacity_tokens // batch.kv_tokens, _MOST_PLACES) if self._device.cold else 1
        step = batch.kv_tokens
        functions = [self._at(batch, place * step, window) for place in range(max(places, 1))]
        return Calls(functions, batch.kv_tokens * self._bytes_per_token)

    def _at(self, batch: AttentionBatch, first: int, window: int | None) -> Callable[[], object]:
        parts = []
        if batch.chunk:
            parts.append(self._prefill(batch.chunk, batch.history, first, window))
            first += batch.chunk + batch.history
        for count, kv in batch.decodes:
            parts.append(self._decode(count, kv + 1, first, window))
            first += count * (kv + 1)
        return lambda: [part() for part in parts]

    def _new(self, *shape: int) -> Any:
        return self._torch.randn(shape, device=self._device.name, dtype=self._activations)

    def _prefill(self, chunk: int, history: int, first: int, window: int | None) -> Callable[[], object]:
        torch, shapes = self._torch, self._shapes
        if window is not None and history >= window:  # the chunk's first token sees the last of them
            first, history = first + history - window + 1, window - 1
        query = self._new(1, shapes.heads, chunk, shapes.head_dim)
        new = self._new(2, shapes.kv_heads, chunk, shapes.head_dim)
        cache = self._pool[:, :, first : first + history + chunk]
        mask = None
        if history or (window is not None and window < chunk):
            seen = (chunk, history + chunk)
            mask = torch.ones(seen, dtype=torch.bool, device=self._device.name).tril_(history)
            if window is not None:
                mask.triu_(history - window + 1)

        def run() -> Any:
            cache[:, :, history:].copy_(new)
            keys, values = cache.to(self._activations).unsqueeze(1)
            return torch.nn.functional.scaled_dot_product_attention(
                query, keys, values, attn_mask=mask, is_causal=mask is None, enable_gqa=True
            )

        return run

    def _decode(self, count: int, length: int, first: int, window: int | None) -> Callable[[], object]:
        torch, shapes = self._torch, self._shapes
        query = self._new(count, shapes.heads, 1, shapes.head_dim)
        new = self._new(2, count, shapes.kv_heads, shapes.head_dim)
        run_of = self._pool[:, :, first : first + count * length]
        cache = run_of.unflatten(2, (count, length)).transpose(1, 2)  # (2, count, kv_heads, length, head_dim)
        seen = cache if window is None else cache[:, :, :, -window:]

        def run() -> Any:
            cache[:, :, :, -1].copy_(new)
            keys, values = seen.to(self._activations)
            return torch.nn.functional.scaled_dot_product_attention(query, keys, values, enable_gqa=True)

        return run
