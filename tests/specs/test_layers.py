"""The layer list: read from configs, counted in parameters, weighed in bytes."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from servesim.errors import InputError, NotSupportedError
from servesim.specs import weights
from servesim.specs.families import families, read_layers
from servesim.specs.layers import Attention, CompressedAttention, Experts, LatentAttention, Mlp, Recurrent

GOLDEN = Path(__file__).parents[1] / "golden"
PUBLISHED = Path(
    os.environ.get("SERVESIM_HF_CONFIGS", Path(__file__).parents[2].parent / "shared/data/hf_configs")
)
FIELDS = sorted((GOLDEN / "models").glob("*.json"))
BYTES = json.loads((GOLDEN / "weight_bytes.json").read_text())["bytes"]
APART = {"meta-llama__Llama-4-Maverick-17B-128E-Instruct": 0.002}
"""Where more than 0.1 % is allowed: its config leaves the vision tower out."""
CREATED = (64, 1)
"""MXFP4 experts before the kernels take them over: the width alone is padded."""


def layers_of(name, **changes):
    config = json.loads((GOLDEN / "models" / f"{name}.json").read_text())
    return read_layers({**config, **changes}, f"{name}.json")


def llama(**changes):
    config = {
        "model_type": "llama",
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "torch_dtype": "bfloat16",
    }
    return {**config, **changes}


class TestParameters:
    """Counts that the authors publish with the checkpoints (safetensors totals of the model cards)."""

    def test_llama_3_1_8b(self):
        assert read_layers(llama(), "x").parameters() == 8_030_261_248

    @pytest.mark.parametrize(
        ("name", "parameters"),
        [
            ("meta-llama__Meta-Llama-3.1-70B", 70_553_706_496),
            ("meta-llama__Meta-Llama-3.1-405B", 405_853_388_800),
            ("blis__qwen2.5-7b-instruct", 7_615_616_512),
            ("Qwen__Qwen3-8B", 8_190_735_360),
            ("Qwen__Qwen3-32B", 32_762_123_264),
            ("Qwen__Qwen3-30B-A3B", 30_532_122_624),
            ("mistralai__Mixtral-8x7B-v0.1", 46_702_792_704),
            ("blis__deepseek-v2-lite", 15_706_484_224),
        ],
    )
    def test_parameters_are_those_published(self, name, parameters):
        assert layers_of(name).parameters() == parameters

    def test_phi_3_14b(self):
        phi = llama(
            model_type="phi3", hidden_size=5120, num_hidden_layers=40, num_attention_heads=40,
            num_key_value_heads=10, intermediate_size=17920, vocab_size=100352,
        )  # fmt: skip
        assert read_layers(phi, "x").parameters() == pytest.approx(14.66e9, rel=0.001)

    def test_olmo_2_32b(self):
        olmo = llama(
            model_type="olmo2", hidden_size=5120, num_hidden_layers=64, num_attention_heads=40,
            intermediate_size=27648, vocab_size=100352,
        )  # fmt: skip
        assert read_layers(olmo, "x").parameters() == pytest.approx(32.2e9, rel=0.002)

    def test_granite_has_8_billion_parameters(self):
        granite = llama(
            model_type="granite", num_hidden_layers=40, intermediate_size=12800, vocab_size=49159,
            tie_word_embeddings=True,
        )  # fmt: skip
        assert read_layers(granite, "x").parameters() == pytest.approx(8.17e9, rel=0.001)

    def test_shared_expert_with_its_gate(self):
        qwen = {
            "model_type": "qwen2_moe", "hidden_size": 2048, "num_hidden_layers": 24,
            "num_attention_heads": 16, "num_key_value_heads": 16, "intermediate_size": 5632,
            "vocab_size": 151936, "max_position_embeddings": 8192, "moe_intermediate_size": 1408,
            "num_experts": 60, "num_experts_per_tok": 4, "shared_expert_intermediate_size": 5632,
        }  # fmt: skip
        model = read_layers(qwen, "x")
        assert model.parameters() == pytest.approx(14.3e9, rel=0.002)
        assert weights.rank_bytes(model) / 2**30 == pytest.approx(26.7, abs=0.05)
        assert model.layers[0].mlp == Experts(60, 4, 1408, shared_width=5632, shared_gate=True)


class TestBytes:
    @pytest.mark.parametrize("path", FIELDS, ids=[path.stem for path in FIELDS])
    def test_a_rank_holds_what_the_engine_creates(self, path):
        """vLLM's own model classes, built without memory, at tensor-parallel degrees 1, 2 and 8."""
        model = read_layers(json.loads(path.read_text()), path.name)
        for tp, expected in BYTES.get(path.stem, {}).items():
            ours = weights.rank_bytes(model, int(tp), tile=CREATED)
            assert ours == pytest.approx(expected, rel=APART.get(path.stem, 0.001))

    def test_every_second_layer_with_experts(self):
        """By hand: 24 layers, 12 of them with 64 experts of 1024, 12 dense of 5632; 15.03 GiB in 16 bit."""
        model = read_layers(
            {
                "model_type": "qwen3_moe", "hidden_size": 2048, "num_hidden_layers": 24,
                "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 128,
                "intermediate_size": 5632, "vocab_size": 151936, "max_position_embeddings": 8192,
                "moe_intermediate_size": 1408, "num_experts": 64, "num_experts_per_tok": 4,
                "decoder_sparse_step": 2,
            },
            "x",
        )  # fmt: skip
        attention = 2048 * (16 + 2 * 4) * 128 + 16 * 128 * 2048 + 2 * 128 + 2 * 2048
        experts = 64 * 3 * 2048 * 1408 + 64 * 2048
        expected = 24 * attention + 12 * experts + 12 * 3 * 2048 * 5632 + 2 * 151936 * 2048 + 2048
        assert weights.rank_bytes(model) == 2 * expected
        assert [layer.mlp.kind for layer in model.layers[:4]] == ["dense", "experts", "dense", "experts"]

    def test_mxfp4_experts_are_padded_for_the_kernels(self):
        """Start-up logs: gpt-oss-20b on one H100 13.47 GiB, gpt-oss-120b on four A100 17.22 GiB a GPU."""
        small, large = layers_of("openai__gpt-oss-20b"), layers_of("openai__gpt-oss-120b")
        assert weights.rank_bytes(small) / 2**30 == pytest.approx(13.47, rel=0.005)
        marlin = weights.MXFP4_TILE_MARLIN
        assert weights.rank_bytes(large, tp=4, tile=marlin) / 2**30 == pytest.approx(17.22, rel=0.005)
        assert weights.checkpoint_bytes(small) == 13_761_264_768  # the published safetensors total

    def test_more_ranks_than_kv_heads_replicate_them(self):
        model = read_layers(llama(), "x")
        key = next(tensor for tensor in model.layers[0].tensors if tensor.name == "self_attn.k_proj")
        assert [weights.rank_shape(key, tp)[1] for tp in (1, 8, 16)] == [1024, 128, 128]

    def test_vocabulary_is_padded_before_it_is_split(self):
        model = read_layers(llama(vocab_size=49159), "x")
        assert weights.rank_shape(model.embedding[0], 2)[1] == 49216 // 2

    def test_expert_parallel_ranks_hold_whole_experts(self):
        model = layers_of("Qwen__Qwen3-30B-A3B")
        up = next(tensor for tensor in model.layers[0].tensors if tensor.name == "mlp.experts.up_proj")
        assert weights.rank_shape(up, tp=4, ep=4) == (32, 768, 2048)
        assert weights.rank_shape(up, tp=4) == (128, 192, 2048)

    def test_a_tied_matrix_lies_on_the_first_and_the_last_stage(self):
        model = read_layers(llama(tie_word_embeddings=True), "x")
        vocabulary = 128256 * 4096 * 2
        one, (first, last) = weights.rank_bytes(model), weights.stage_bytes(model, pp=2)
        assert first + last == one + vocabulary


class TestKinds:
    def test_full_and_sliding_in_turn(self):
        model = layers_of("openai__gpt-oss-20b")
        assert [layer.attention.kind for layer in model.layers[:3]] == ["sliding", "full", "sliding"]
        assert model.layers[0].attention.reach == 128

    def test_every_nth_layer_sees_everything(self):
        window = {"sliding_window": 4096, "sliding_window_pattern": 4}
        cohere = llama(model_type="cohere2", **window)
        kinds = [layer.attention.kind for layer in read_layers(cohere, "x").layers]
        assert kinds[:4] == ["sliding", "sliding", "sliding", "full"]
        assert kinds.count("sliding") == 24

    def test_a_window_switched_off(self):
        qwen = llama(model_type="qwen2", sliding_window=4096, use_sliding_window=False, max_window_layers=16)
        assert {layer.attention.kind for layer in read_layers(qwen, "x").layers} == {"full"}

    def test_upper_layers_slide(self):
        qwen = llama(model_type="qwen2", sliding_window=4096, use_sliding_window=True, max_window_layers=30)
        kinds = [layer.attention.kind for layer in read_layers(qwen, "x").layers]
        assert kinds.count("sliding") == 2

    def test_chunks_and_experts_in_turn(self):
        model = layers_of("meta-llama__Llama-4-Maverick-17B-128E-Instruct")
        assert [layer.attention.kind for layer in model.layers[:4]] == [
            "chunked",
            "chunked",
            "chunked",
            "full",
        ]
        assert [layer.mlp.kind for layer in model.layers[:2]] == ["dense", "experts"]

    def test_latent_attention_with_an_indexer(self):
        attention = layers_of("deepseek-ai__DeepSeek-V3.2").layers[0].attention
        assert attention == LatentAttention(128, 512, 64, 128, 128, 1536, 64, 128, 2048)
        assert attention.kind == "sparse_mla"

    def test_layers_that_use_another_layers_choice(self):
        model = layers_of("zai-org__GLM-5.2")
        own = [layer.attention.index_dim > 0 for layer in model.layers]
        assert 0 < sum(own) < len(own)
        assert all(layer.attention.kind == "sparse_mla" for layer in model.layers)

    def test_a_state_in_three_layers_of_four(self):
        model = layers_of("Qwen__Qwen3.5-27B")
        assert [isinstance(layer.attention, Recurrent) for layer in model.layers[:4]] == [
            True,
            True,
            True,
            False,
        ]

    def test_layers_of_attention_or_of_an_mlp_alone(self):
        model = layers_of("nvidia__NVIDIA-Nemotron-3-Nano-30B-A3B-BF16")
        kinds = {(type(layer.attention), type(layer.mlp)) for layer in model.layers}
        assert kinds == {(Recurrent, type(None)), (type(None), Experts), (Attention, type(None))}

    def test_deepseek_v4_attends_to_compressed_tokens(self):
        model = layers_of("deepseek-ai__DeepSeek-V4-Flash")
        assert all(isinstance(layer.attention, CompressedAttention) for layer in model.layers)
        assert {layer.attention.ratio for layer in model.layers} == {0, 4, 128}

    def test_defaults_that_a_nested_config_leaves_out(self):
        text = {"model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240,
                "num_hidden_layers": 34, "sliding_window": 1024}  # fmt: skip
        model = read_layers({"model_type": "gemma3", "text_config": text}, "x")
        attention = model.layers[0].attention
        assert (attention.heads, attention.kv_heads, attention.head_dim) == (8, 4, 256)
        assert (model.vocab_size, model.max_position_embeddings) == (262208, 131072)
        assert [layer.attention.kind for layer in model.layers].count("full") == 5

    def test_another_name_of_the_same_field(self):
        config = json.loads((GOLDEN / "models/Qwen__Qwen3-30B-A3B.json").read_text())
        config["num_experts_per_token"] = config.pop("num_experts_per_tok")
        assert read_layers(config, "x").layers[0].mlp.top_k == 8

    def test_drafting_layers_stand_apart(self):
        model = layers_of("deepseek-ai__DeepSeek-R1")
        assert (len(model.layers), len(model.mtp)) == (61, 1)
        assert model.parameters() < model.parameters(mtp=True)


class TestRefusals:
    def test_a_family_that_is_not_modelled(self):
        with pytest.raises(NotSupportedError, match="model_type: 'rwkv' is not modelled"):
            read_layers(llama(model_type="rwkv"), "config.json")

    def test_a_kind_of_layer_that_is_not_modelled(self):
        with pytest.raises(InputError, match=r"layer_types\[1\]: 'wave_attention' is not supported"):
            read_layers(llama(layer_types=["full_attention", "wave_attention"] * 16), "config.json")

    def test_a_missing_field_is_named(self):
        config = llama()
        del config["intermediate_size"]
        with pytest.raises(InputError, match=r"config.json: intermediate_size: is missing"):
            read_layers(config, "config.json")

    def test_a_letter_that_is_not_modelled(self):
        with pytest.raises(InputError, match="'X' is not modelled"):
            layers_of("nvidia__Nemotron-H-56B-Base-8K", hybrid_override_pattern="X" * 118)

    def test_embeddings_of_every_layer(self):
        with pytest.raises(NotSupportedError, match="hidden_size_per_layer_input"):
            read_layers({**llama(model_type="gemma4"), "hidden_size_per_layer_input": 256}, "config.json")


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason=f"no published configs in {PUBLISHED}")
class TestPublishedConfigs:
    def test_most_load_and_the_others_are_named(self):
        loaded, refused = [], []
        for path in sorted(PUBLISHED.glob("*/config.json")):
            try:
                model = read_layers(json.loads(path.read_text()), path.parent.name)
            except NotSupportedError as error:
                refused.append(f"{path.parent.name}: {error}")
            else:
                loaded.append(path.parent.name)
                for tp, expected in BYTES.get(path.parent.name, {}).items():
                    near = pytest.approx(expected, rel=0.005)
                    assert weights.rank_bytes(model, int(tp), tile=CREATED) == near, path.parent.name
        assert len(loaded) >= 60, refused
        assert all("is not modelled" in text for text in refused)


def test_every_family_is_found_by_its_file():
    assert {"llama", "gpt_oss", "deepseek_v3", "qwen3_next", "nemotron_h", "gemma3"} <= set(families())


def test_a_dense_mlp_has_a_width():
    assert read_layers(llama(), "x").layers[0].mlp == Mlp(14336)


def test_a_field_of_another_form_is_bad_input() -> None:
    config = json.loads(Path("configs/model/openai/gpt-oss-20b.json").read_text(encoding="utf-8"))
    config["layer_types"] = [["sliding_attention"]] * config["num_hidden_layers"]
    with pytest.raises(InputError, match=r"x\.json: gpt_oss: a field has another form"):
        read_layers(config, "x.json")
    config["layer_types"] = ["full_attention"] * config["num_hidden_layers"]
    config["quantization_config"] = {"quant_method": "fp8", "quantized_layers": {"lm_head": 0.5}}
    with pytest.raises(InputError, match=r"x\.json: quantization_config: a field has another form"):
        read_layers(config, "x.json")
