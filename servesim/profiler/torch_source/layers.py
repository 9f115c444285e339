"""One rank's layers outside attention and experts: how to run each for a number of tokens or sequences.

What a layer is follows from its class in the architecture file, its sizes from its name and the model.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from servesim.errors import NotSupportedError
from servesim.profiler.torch_source.device import Calls
from servesim.profiler.torch_source.formats import activation_dtype, gemm, random_weight, weight_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

    from servesim.profiler.meter import ProfileJob
    from servesim.profiler.torch_source.device import Device
    from servesim.specs.architecture import LayerEntry
    from servesim.specs.rank_shapes import RankShapes

_ROPE_BASE = 10000.0
_ID_SETS = 8  # other rows of the table each time: an engine's tokens are not those of its last step
_HEAD_DTYPES = {"fp8": "bfloat16", "int8": "bfloat16"}
"""A quantised checkpoint keeps its head in 16 bit."""


class RankLayers:
    """The layers of one rank; weights are made when a layer is first asked for, and kept."""

    def __init__(self, device: Device, job: ProfileJob, shapes: RankShapes) -> None:
        self._device = device
        self._torch = device.torch
        self._job = job
        self._shapes = shapes
        self._weights: dict[str, list[Any]] = {}
        self.activations = activation_dtype(device.torch, job.dtype)

    def calls(self, layer: str, count: int) -> Calls:
        """The layer over ``count`` tokens (or sequences).

        Raises:
            NotSupportedError: nobody knows how to build a layer of this class.
        """
        catalog = self._job.architecture.catalog
        entry: LayerEntry = {**catalog.dense, **catalog.per_sequence}[layer]
        name = entry.class_name
        if name.endswith("Embedding") and "Rotary" in name:
            return self._rotary(count)
        if name.endswith("Embedding"):
            return self._embedding(count)
        if name.endswith("RMSNorm") or name == "LayerNorm":
            return self._head_norm(count) if layer == "qk_norm" else self._norm(count, name == "LayerNorm")
        if name.endswith("Linear") or name == "LogitsProcessor":
            return self._gemm(layer, count)
        if name.endswith("AndMul"):
            return self._activation(count, name)
        if name == "Sampler":
            return self._sampler(count)
        raise NotSupportedError(
            f"profiler/models/{self._job.architecture.model_type}.yaml: catalog: --source torch cannot build "
            "layer "
            f"{layer!r} of class {name}; it knows embeddings, RMSNorm, LayerNorm, rotary embeddings, "
            "*ParallelLinear, *AndMul, LogitsProcessor and Sampler. --source vllm times any class"
        )

    def _random(self, *shape: int) -> Any:
        return self._torch.randn(shape, device=self._device.name, dtype=self.activations)

    def _kept(self, layer: str, shape: tuple[int, int], dtype: str) -> list[Any]:
        """The layer's weight, in as many copies as it takes to read it from memory every time."""
        if layer not in self._weights:
            copies = self._device.copies(weight_bytes(dtype, *shape))
            self._weights[layer] = [random_weight(self._device, shape, dtype) for _ in range(copies)]
        return self._weights[layer]

    def _gemm(self, layer: str, count: int) -> Calls:
        try:
            n, k = self._shapes.gemm(layer)
        except KeyError:
            raise NotSupportedError(
                f"profiler/models/{self._job.architecture.model_type}.yaml: catalog: --source torch does not "
                "know the "
                f"sizes of layer {layer!r}; known: qkv_proj, o_proj, gate_up_proj, down_proj, lm_head"
            ) from None
        dtype = self._job.dtype
        if layer == "lm_head":
            dtype = _HEAD_DTYPES.get(dtype, dtype)
        x = self._random(count, k)
        run = [gemm(self._device, weight, dtype) for weight in self._kept(layer, (n, k), dtype)]
        return Calls([partial(one, x) for one in run], weight_bytes(dtype, n, k))

    def _embedding(self, count: int) -> Calls:
        torch, hidden, vocab = self._torch, self._shapes.hidden, self._shapes.vocab
        if "embedding" not in self._weights:
            self._weights["embedding"] = [self._random(vocab, hidden)]
        (table,) = self._weights["embedding"]
        ids = [torch.randint(vocab, (count,), device=self._device.name) for _ in range(_ID_SETS)]
        lookup = torch.nn.functional.embedding
        return Calls([partial(lookup, rows, table) for rows in ids])

    def _norm(self, count: int, layer_norm: bool) -> Calls:
        """The norm before a sublayer adds the residual stream as well, in one pass."""
        functional = self._torch.nn.functional
        hidden = self._shapes.hidden
        x, residual, weight = self._random(count, hidden), self._random(count, hidden), self._random(hidden)
        if layer_norm:
            return Calls([lambda: functional.layer_norm(residual.add_(x), (hidden,), weight, weight)])
        if self._device.is_cuda:
            from servesim.profiler.torch_source.triton_kernels import add_norm

            out = self._torch.empty_like(x)
            return Calls([partial(add_norm, x, residual, weight, out)])
        return Calls([lambda: functional.rms_norm(residual.add_(x), (hidden,), weight)])

    def _head_norm(self, count: int) -> Calls:
        """Queries and keys, each head normed on its own: two launches."""
        functional = self._torch.nn.functional
        shapes = self._shapes
        weight = self._random(shapes.head_dim)
        parts = [self._random(count * heads, shapes.head_dim) for heads in (shapes.heads, shapes.kv_heads)]
        if self._device.is_cuda:
            from servesim.profiler.torch_source.triton_kernels import add_norm

            query, key = parts
            query_out, key_out = (self._torch.empty_like(part) for part in parts)

            def run() -> None:
                add_norm(query, None, weight, query_out)
                add_norm(key, None, weight, key_out)

            return Calls([run])
        return Calls([lambda: [functional.rms_norm(part, (shapes.head_dim,), weight) for part in parts]])

    def _rotary(self, count: int) -> Calls:
        """Queries and keys lie side by side and turn in one go."""
        torch, shapes = self._torch, self._shapes
        longest = max(self._job.max_kv + self._job.max_num_batched_tokens, count)
        cos_sin = rotary_table(torch, longest, shapes.head_dim).to(self._device.name)
        positions = torch.randint(longest, (count,), device=self._device.name)
        both = self._random(count, shapes.heads + shapes.kv_heads, shapes.head_dim)
        rotate: Callable[[Any, Any, Any], None] = rotate_heads
        if self._device.is_cuda:
            from servesim.profiler.torch_source.triton_kernels import rotary

            rotate = rotary
        return Calls([partial(rotate, positions, both, cos_sin)])

    def _activation(self, count: int, name: str) -> Calls:
        """Gated: one half activates, the other multiplies; on a GPU every kind moves the same bytes."""
        width = self._shapes.intermediate
        x = self._random(count, 2 * width)
        if self._device.is_cuda:
            from servesim.profiler.torch_source.triton_kernels import silu_mul

            out = self._random(count, width)
            return Calls([partial(silu_mul, x, out)])
        functional = self._torch.nn.functional
        activate = functional.gelu if name.startswith("Gelu") else functional.silu
        return Calls([lambda: activate(x[:, :width]) * x[:, width:]])

    def _sampler(self, count: int) -> Calls:
        """Greedy: logits to float32 as engines do, then the greatest of the whole vocabulary."""
        logits = self._random(count, self._shapes.full_vocab)
        return Calls([lambda: logits.float().argmax(dim=-1)])


def rotary_table(torch: Any, positions: int, head_dim: int) -> Any:
    """Cosines, then sines, of every position: (positions, head_dim) in float32."""
    frequencies = _ROPE_BASE ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angles = torch.arange(positions, dtype=torch.float32)[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def rotate_heads(positions: Any, x: Any, cos_sin: Any) -> None:
    """Rotate the heads of x (tokens, heads, head_dim) in place: halves turn by the position's angle."""
    half = x.shape[-1] // 2
    turn = cos_sin[positions][:, None, :].to(x.dtype)
    cos, sin = turn[..., :half], turn[..., half:]
    low, high = x[..., :half], x[..., half:]
    rotated = low * cos - high * sin
    x[..., half:] = high * cos + low * sin
    x[..., :half] = rotated
