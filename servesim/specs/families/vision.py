"""Parameters of the towers beside a language model that read images: weights alone, no step of text runs
them.

They stay in 16 bit whatever the language model's format: published checkpoints leave them out of
quantisation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from servesim.specs.families.blocks import norms
from servesim.specs.families.blocks import plain_matrix as matrix
from servesim.specs.layers import Tensor

if TYPE_CHECKING:
    from servesim.specs.families.reading import Fields


def _biased(name: str, rows: int, columns: int, split: str = "whole") -> tuple[Tensor, ...]:
    bias = Tensor(f"{name}.bias", rows, split="rows" if split == "rows" else "whole")
    return matrix(name, rows, columns, split), bias


def transformer(name: str, hidden: int, width: int) -> tuple[Tensor, ...]:
    """One block with biases throughout: two norms, attention of all heads, a network of two matrices."""
    return (
        *norms(hidden, f"{name}.norm1", f"{name}.norm2", bias=True),
        *_biased(f"{name}.attn.qkv", 3 * hidden, hidden, "rows"),
        *_biased(f"{name}.attn.proj", hidden, hidden, "columns"),
        *_biased(f"{name}.mlp.fc1", width, hidden, "rows"),
        *_biased(f"{name}.mlp.fc2", hidden, width, "columns"),
    )


def qwen_vit(v: Fields) -> list[Tensor]:
    """Qwen3-VL's and Qwen3.5's: learned positions, merged patches, features of inner layers (deepstack)."""
    hidden, width, out = v.size("hidden_size"), v.size("intermediate_size"), v.size("out_hidden_size")
    patch = (
        v.size("in_channels", default=3)
        * v.size("temporal_patch_size", default=2)
        * v.size("patch_size") ** 2
    )
    merged = hidden * v.size("spatial_merge_size", default=2) ** 2
    tensors = [
        *_biased("visual.patch_embed.proj", hidden, patch),
        Tensor("visual.pos_embed", v.size("num_position_embeddings"), hidden),
    ]
    for index in range(v.layer_count("depth")):
        tensors += transformer(f"visual.blocks.{index}", hidden, width)
    deep = [f"deepstack_merger_list.{index}" for index in range(len(v.items("deepstack_visual_indexes")))]
    for name in ["merger", *deep]:
        # The last merger norms patches, those of inner layers what they have merged.
        tensors += norms(hidden if name == "merger" else merged, f"visual.{name}.norm", bias=True)
        tensors += _biased(f"visual.{name}.linear_fc1", merged, merged, "rows")
        tensors += _biased(f"visual.{name}.linear_fc2", out, merged, "columns")
    return tensors


def moon_vit(v: Fields, text_hidden: int) -> list[Tensor]:
    """Kimi's: learned positions, blocks with biases, a projector of merged patches."""
    hidden, width = (
        v.size("vt_hidden_size", "hidden_size"),
        v.size("vt_intermediate_size", "intermediate_size"),
    )
    patch = v.size("patch_size", default=14)
    positions = v.size("init_pos_emb_height") * v.size("init_pos_emb_width")
    tensors = [
        *_biased("vision_tower.patch_embed.proj", hidden, 3 * patch * patch),
        Tensor("vision_tower.patch_embed.pos_emb", positions, hidden),
    ]
    for index in range(v.layer_count("vt_num_hidden_layers", "num_hidden_layers")):
        tensors += transformer(f"vision_tower.blocks.{index}", hidden, width)
    merge = v.items("merge_kernel_size") or [2, 2]
    merged = hidden * int(merge[0]) * int(merge[1])
    tensors += norms(hidden, "vision_tower.final_layernorm", "mm_projector.pre_norm", bias=True)
    tensors += _biased("mm_projector.linear_1", merged, merged)
    tensors += _biased("mm_projector.linear_2", text_hidden, merged)
    return tensors


def llama4_vit(v: Fields, text_hidden: int) -> list[Tensor]:
    """Llama 4's: CLIP-like blocks, then an adapter that shuffles pixels into channels."""
    hidden, width = v.size("hidden_size"), v.size("intermediate_size")
    patch, image = v.size("patch_size"), v.size("image_size")
    merged = int(hidden / float(v.number("pixel_shuffle_ratio", 0.5)) ** 2)
    inner, out = (
        v.size("projector_input_dim", default=4096),
        v.size("projector_output_dim", "projector_input_dim", default=4096),
    )
    tensors = [
        Tensor("vision_model.class_embedding", hidden),
        Tensor("vision_model.positional_embedding_vlm", (image // patch) ** 2 + 1, hidden),
        matrix("vision_model.patch_embedding", hidden, 3 * patch * patch),
        *norms(hidden, "vision_model.layernorm_pre", "vision_model.layernorm_post", bias=True),
    ]
    for index in range(v.layer_count("num_hidden_layers")):
        tensors += transformer(f"vision_model.layers.{index}", hidden, width)
    tensors.append(matrix("vision_model.adapter.fc1", inner, merged, "rows"))
    tensors.append(matrix("vision_model.adapter.fc2", out, inner, "columns"))
    tensors.append(matrix("multi_modal_projector.linear_1", text_hidden, out, "rows"))
    return tensors


def siglip(v: Fields, text_hidden: int) -> list[Tensor]:
    """Gemma 3's: SigLIP blocks, one norm and one matrix to the language model."""
    v = v.with_defaults(
        {
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_hidden_layers": 27,
            "patch_size": 14,
            "image_size": 896,
        }
    )
    hidden, width, patch = v.size("hidden_size"), v.size("intermediate_size"), v.size("patch_size")
    tensors = [
        *_biased("vision_tower.embeddings.patch_embedding", hidden, 3 * patch * patch),
        Tensor("vision_tower.embeddings.position_embedding", (v.size("image_size") // patch) ** 2, hidden),
    ]
    for index in range(v.layer_count("num_hidden_layers")):
        tensors += transformer(f"vision_tower.layers.{index}", hidden, width)
    tensors += norms(hidden, "vision_tower.post_layernorm", bias=True)
    tensors += norms(hidden, "multi_modal_projector.mm_soft_emb_norm")
    tensors.append(matrix("multi_modal_projector.mm_input_projection_weight", hidden, text_hidden))
    return tensors


def gemma4_vit(v: Fields, text_hidden: int) -> list[Tensor]:
    """Gemma 4's: blocks like the language model's own, positions of rows and columns; whole on every rank."""
    hidden, width, head = v.size("hidden_size"), v.size("intermediate_size"), v.size("head_dim")
    heads = v.size("num_attention_heads") * head
    tensors = [
        Tensor("vision_tower.position_embedding_table", 2 * v.size("position_embedding_size"), hidden),
        matrix("vision_tower.input_proj", hidden, 3 * v.size("patch_size") ** 2),
    ]
    for index in range(v.layer_count("num_hidden_layers")):
        name = f"vision_tower.layers.{index}"
        tensors += [matrix(f"{name}.{part}_proj", heads, hidden) for part in ("q", "k", "v")]
        tensors.append(matrix(f"{name}.o_proj", hidden, heads))
        tensors += [Tensor(f"{name}.{part}_norm", head) for part in ("q", "k")]
        tensors += [matrix(f"{name}.{part}_proj", width, hidden) for part in ("gate", "up")]
        tensors.append(matrix(f"{name}.down_proj", hidden, width))
        tensors += norms(hidden, *(f"{name}.norm{number}" for number in range(4)))
    tensors.append(matrix("embed_vision.embedding_projection", text_hidden, hidden))
    return tensors


def minimax_vit(v: Fields, text_hidden: int, projector: int) -> list[Tensor]:
    """MiniMax M3's: CLIP-like blocks on patches of two frames, a projector, a network that merges patches."""
    hidden, width, patch = v.size("hidden_size"), v.size("intermediate_size"), v.size("patch_size")
    tensors = [
        matrix("vision_tower.patch_embedding", hidden, 3 * 2 * patch * patch),
        *norms(hidden, "vision_tower.pre_layrnorm", bias=True),
    ]
    for index in range(v.layer_count("num_hidden_layers")):
        tensors += transformer(f"vision_tower.layers.{index}", hidden, width)
    for name, columns in (("multi_modal_projector", hidden), ("patch_merge_mlp", 4 * text_hidden)):
        tensors += _biased(f"{name}.linear_1", projector, columns, "rows")
        tensors += _biased(f"{name}.linear_2", text_hidden, projector, "columns")
    return tensors
