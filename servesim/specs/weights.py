"""Bytes of a model's weights on one rank, and of its whole checkpoint, from its list of layers.

Sharding is vLLM's: output rows or input columns of linear layers over tensor-parallel ranks, KV heads
replicated where ranks outnumber them, the vocabulary padded to a multiple of 64 and split, experts split like
other linear layers or, with expert parallelism, kept whole and dealt out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from servesim.specs.formats import WeightFormats
    from servesim.specs.layers import Layer, ModelLayers, Tensor

MXFP4_TILE = (64, 256)
"""What a rank's width of an MXFP4 expert and the hidden size are padded to when the Triton kernels of Hopper
take over the weights (gpt-oss-20b on one H100: 13.45 GiB so, 13.47 in a published start-up, 12.82
unpadded)."""
MXFP4_TILE_MARLIN = (128, 256)
"""The same of Marlin's kernels, and FlashInfer's on Blackwell (gpt-oss-120b on four A100: 17.17 GiB a GPU,
17.22 in a published start-up)."""
VOCABULARY_PADDING = 64
"""Rows of embedding and output matrix are padded to a multiple of this before they are split."""


def rank_shape(tensor: Tensor, tp: int, ep: int = 1) -> tuple[int, int, int]:
    """(copies, rows, columns) of a parameter on one of ``tp`` ranks; of ``ep`` ranks that share experts."""
    copies, rows, columns = tensor.copies, tensor.rows, tensor.columns
    if copies > 1 and ep > 1:
        return -(-copies // ep), rows, columns
    if tensor.split == "rows":
        rows = -(-rows // tp)
    elif tensor.split == "columns":
        columns = -(-columns // tp)
    elif tensor.split == "kv_heads":
        rows = max(rows // tensor.unit // tp, 1) * tensor.unit
    elif tensor.split == "vocabulary":
        rows = -(-(-(-rows // VOCABULARY_PADDING) * VOCABULARY_PADDING) // tp)
    return copies, rows, columns


def tensor_bytes(
    tensor: Tensor,
    prefix: str,
    formats: WeightFormats,
    tp: int = 1,
    ep: int = 1,
    tile: tuple[int, int] = MXFP4_TILE,
) -> int:
    """Bytes of one parameter on one rank; ``prefix``: of its layer; ``tile``: what MXFP4 experts are padded
    to."""
    copies, rows, columns = rank_shape(tensor, tp, ep)
    if tensor.matrix and not tensor.upcast:
        format_ = formats.of(prefix + tensor.name)
        if format_.element == "mxfp4" and copies > 1:
            width, hidden = tile if tensor.split == "rows" else tile[::-1]
            rows, columns = -(-rows // width) * width, -(-columns // hidden) * hidden
        return copies * format_.matrix_bytes(rows, columns)
    return copies * rows * columns * (tensor.itemsize or formats.plain_bytes)


def layer_bytes(
    layer: Layer, formats: WeightFormats, tp: int = 1, ep: int = 1, tile: tuple[int, int] = MXFP4_TILE
) -> int:
    """Bytes of one layer on one rank."""
    return sum(tensor_bytes(tensor, layer.prefix, formats, tp, ep, tile) for tensor in layer.tensors)


def _bytes(tensors: Iterable[Tensor], formats: WeightFormats, tp: int) -> int:
    return sum(tensor_bytes(tensor, "", formats, tp) for tensor in tensors)


def stage_layers(num_layers: int, pp: int) -> list[int]:
    """Layers of each pipeline stage: as even as possible, the remainder to the stages before the last."""
    layers = [num_layers // pp] * pp
    for extra in range(num_layers % pp):
        layers[pp - 2 - extra] += 1
    return layers


def stage_bytes(
    model: ModelLayers, tp: int = 1, pp: int = 1, ep: int = 1, tile: tuple[int, int] = MXFP4_TILE
) -> Iterator[int]:
    """Bytes on a rank of each pipeline stage. The first holds the embedding and a vision tower, the last the
    head; a tied matrix is on both."""
    first, formats = 0, model.formats
    counts = stage_layers(len(model.layers), pp)
    for stage, count in enumerate(counts):
        size = sum(layer_bytes(layer, formats, tp, ep, tile) for layer in model.layers[first : first + count])
        first += count
        if stage == 0:
            size += _bytes(model.embedding, formats, tp) + _bytes(model.vision, formats, tp)
        if stage == pp - 1:
            size += _bytes(model.head, formats, tp)
            if model.tied and pp > 1:
                size += _bytes(model.embedding[:1], formats, tp)
        yield size


def rank_bytes(
    model: ModelLayers, tp: int = 1, pp: int = 1, ep: int = 1, tile: tuple[int, int] = MXFP4_TILE
) -> int:
    """Bytes of weights on the rank that holds most."""
    return max(stage_bytes(model, tp, pp, ep, tile))


def checkpoint_bytes(model: ModelLayers, *, mtp: bool = True) -> int:
    """Bytes of all parameters as published, unpadded, a tied matrix once."""
    total = 0
    for name, tensor in model.tensors(mtp=mtp):
        if not tensor.stored:
            continue
        if tensor.matrix:
            total += tensor.copies * model.formats.of(name).matrix_bytes(tensor.rows, tensor.columns)
        else:
            total += tensor.parameters * (tensor.itemsize or model.formats.plain_bytes)
    return total
