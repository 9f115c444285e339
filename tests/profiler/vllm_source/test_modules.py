"""Finding layers in a tree of modules by the class names of an architecture file."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from servesim.errors import InputError
from servesim.profiler.vllm_source.modules import calls_of, layers_of
from servesim.specs.architecture import load_architecture

if TYPE_CHECKING:
    from collections.abc import Iterator


class Module:
    """As much of a PyTorch module as is looked at."""

    def __init__(self, **children: Module) -> None:
        self.children = children

    def named_modules(self, prefix: str = "") -> Iterator[tuple[str, Module]]:
        yield prefix, self
        for name, child in self.children.items():
            yield from child.named_modules(f"{prefix}.{name}" if prefix else name)


def _class(name: str, *bases: type) -> type:
    return type(name, bases or (Module,), {})


RMSNorm, RowParallelLinear, SiluAndMul = _class("RMSNorm"), _class("RowParallelLinear"), _class("SiluAndMul")
Column = _class("ColumnParallelLinear")
QKVParallelLinear, MergedColumn = (
    _class("QKVParallelLinear", Column),
    _class("MergedColumnParallelLinear", Column),
)
RotaryEmbedding = _class("RotaryEmbedding")
Llama3RotaryEmbedding = _class("Llama3RotaryEmbedding", RotaryEmbedding)
Attention, Sampler, Logits = _class("Attention"), _class("Sampler"), _class("LogitsProcessor")
VocabParallelEmbedding = _class("VocabParallelEmbedding")
Qwen2MLP = _class("Qwen2MLP")
Qwen3MLP = Qwen2MLP  # the name by which vLLM's Qwen3 knows it
Qwen3Attention, Qwen3DecoderLayer, Qwen3Model = (
    _class(f"Qwen3{part}") for part in ("Attention", "DecoderLayer", "Model")
)
Qwen3ForCausalLM = _class("Qwen3ForCausalLM")


def _qwen3() -> Module:
    mlp = Qwen2MLP(gate_up_proj=MergedColumn(), act_fn=SiluAndMul(), down_proj=RowParallelLinear())
    attention = Qwen3Attention(
        qkv_proj=QKVParallelLinear(),
        o_proj=RowParallelLinear(),
        rotary_emb=Llama3RotaryEmbedding(),
        attn=Attention(),
        q_norm=RMSNorm(),
        k_norm=RMSNorm(),
    )
    layer = Qwen3DecoderLayer(
        self_attn=attention, mlp=mlp, input_layernorm=RMSNorm(), post_attention_layernorm=RMSNorm()
    )
    model = Qwen3Model(embed_tokens=VocabParallelEmbedding(), layer=layer, norm=RMSNorm())
    return Qwen3ForCausalLM(model=model, logits_processor=Logits())


def _paths(found: dict[str, list[tuple[str, object]]]) -> dict[str, list[str]]:
    return {layer: [path.rpartition(".")[2] for path, _ in modules] for layer, modules in found.items()}


def test_every_layer_finds_its_modules_and_no_others() -> None:
    found = layers_of(load_architecture("qwen3"), [("model", _qwen3()), ("sampler", Sampler())])
    assert _paths(found) == {
        "embedding": ["embed_tokens"],
        "layernorm": ["input_layernorm", "post_attention_layernorm"],
        "qkv_proj": ["qkv_proj"],
        "qk_norm": ["q_norm", "k_norm"],
        "rotary_emb": ["rotary_emb"],
        "o_proj": ["o_proj"],
        "gate_up_proj": ["gate_up_proj"],
        "act_fn": ["act_fn"],
        "down_proj": ["down_proj"],
        "final_layernorm": ["norm"],
        "lm_head": ["logits_processor"],
        "sampler": ["sampler"],
        "attention": ["attn"],
    }


def test_a_layer_without_a_module_is_named_with_what_there_is() -> None:
    with pytest.raises(
        InputError, match=r"qwen3\.yaml: catalog: layer sampler: .* class Sampler; it has Attention, "
    ):
        layers_of(load_architecture("qwen3"), [("model", _qwen3())])


def test_both_norms_of_a_block_are_calls_of_one_layer() -> None:
    architecture = load_architecture("qwen3")
    counts = {
        layer: calls_of(architecture, layer, 1) for layer in ("layernorm", "qk_norm", "lm_head", "attention")
    }
    assert counts == {"layernorm": 2, "qk_norm": 1, "lm_head": 1, "attention": 1}
    assert calls_of(architecture, "layernorm", 3) == 6
    assert calls_of(load_architecture("qwen3_moe"), "moe", 2) == 2
