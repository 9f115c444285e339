"""Weight formats of checkpoints: which module has which, and how many bytes that is."""

from __future__ import annotations

import pytest

from servesim.errors import NotSupportedError
from servesim.specs import weights
from servesim.specs.families import read_layers
from servesim.specs.formats import WeightFormat, read_formats

GIB = 2**30
LLAMA_70B = {
    "model_type": "llama",
    "hidden_size": 8192,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "intermediate_size": 28672,
    "vocab_size": 128256,
    "torch_dtype": "bfloat16",
}
MATRICES = 80 * (8192 * (64 + 2 * 8) * 128 + 64 * 128 * 8192 + 3 * 8192 * 28672)
"""Elements of all linear layers but the output matrix."""
REST = (2 * 128256 * 8192 + 161 * 8192) * 2
"""Bytes of embedding, output matrix and norms in 16 bit."""


def weighed(quantization=None, sidecar=None, tp=1):
    config = {**LLAMA_70B, **({"quantization_config": quantization} if quantization else {})}
    return weights.rank_bytes(read_layers(config, "config.json", sidecar), tp)


def compressed(bits, kind, **scheme):
    group = {"weights": {"num_bits": bits, "type": kind, **scheme}, "targets": ["Linear"]}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}, "ignore": ["lm_head"]}


class TestBytes:
    def test_a_matrix_with_a_scale_a_block(self):
        assert WeightFormat("fp8", (128, 128), 4).matrix_bytes(256, 300) == 256 * 300 + 2 * 3 * 4

    def test_four_bits_with_scales_and_zero_points_a_group(self):
        fmt = WeightFormat("int4", (1, 128), 2, zero_bits=4)
        assert fmt.matrix_bytes(64, 256) == 64 * 256 // 2 + 64 * 2 * 2 + 64 * 2 // 2

    @pytest.mark.parametrize(
        ("quantization", "bits"),
        [
            ({"quant_method": "fp8"}, 8),
            ({"quant_method": "fp8", "weight_block_size": [128, 128]}, 8 + 32 / 128**2),
            ({"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}, 4 + 20 / 128),
            ({"quant_method": "gptq", "bits": 4, "group_size": 128}, 4 + 20 / 128),
            ({"quant_method": "gptq", "bits": 8, "group_size": 128}, 8 + 24 / 128),
            (compressed(8, "float", strategy="channel"), 8),
            (compressed(8, "int", strategy="channel"), 8),
            (compressed(4, "int", strategy="group", group_size=128), 4 + 16 / 128),
            (compressed(4, "float", strategy="tensor_group", group_size=16), 4.5),
            (compressed(4, "float", strategy="group", group_size=32), 4.25),
            ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, 4.5),
            ({"quant_method": "modelopt", "quant_algo": "FP8"}, 8),
        ],
    )
    def test_bits_of_an_element(self, quantization, bits):
        assert weighed(quantization) == pytest.approx(MATRICES * bits / 8 + REST, rel=1e-3)


class TestSidecar:
    SIDECAR = {  # noqa: RUF012
        "producer": {"name": "modelopt"},
        "quantization": {
            "quant_algo": "FP8",
            "kv_cache_quant_algo": "FP8",
            "exclude_modules": ["lm_head"],
        },
    }

    def test_it_says_the_format_of_the_weights(self):
        assert weighed(sidecar=self.SIDECAR, tp=4) / GIB == pytest.approx(16.9, abs=0.1)
        assert weighed(tp=4) / GIB == pytest.approx(32.86, abs=0.01)

    def test_it_says_the_format_of_the_kv_cache(self):
        assert read_layers(LLAMA_70B, "config.json", self.SIDECAR).kv_format == "fp8"

    def test_the_config_itself_wins(self):
        config = {**LLAMA_70B, "quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}}
        assert read_layers(config, "x", self.SIDECAR).formats.label == "NVFP4"


class TestModules:
    def formats(self, quantization):
        return read_formats(quantization, None, "bfloat16", "config.json")[0]

    def test_ignored_by_name_by_pattern_and_by_expression(self):
        formats = self.formats(
            {
                **compressed(4, "int", group_size=32),
                "ignore": ["lm_head", "model.layers.3.mlp.down_proj", "model.layers.4.*", "re:.*self_attn.*"],
            }
        )
        four = [f"layers.{layer}.mlp.{name}" for layer, name in ((3, "up_proj"), (5, "down_proj"))]
        plain = ["layers.3.mlp.down_proj", "layers.4.mlp.up_proj", "layers.5.self_attn.q_proj", "lm_head"]
        assert {formats.of(name).element for name in four} == {"int4"}
        assert {formats.of(name).element for name in plain} == {"bfloat16"}

    def test_experts_named_one_by_one_stand_for_their_stack(self):
        layers = {
            f"model.layers.0.mlp.experts.{index}.up_proj": {"quant_algo": "NVFP4"} for index in range(4)
        }
        formats = self.formats(
            {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
        )
        assert formats.of("layers.0.mlp.experts.up_proj").element == "nvfp4"
        assert formats.of("layers.1.mlp.experts.up_proj").element == "bfloat16"

    def test_mxfp4_checkpoints_quantise_experts_alone(self):
        formats = self.formats({"quant_method": "mxfp4"})
        assert formats.of("layers.0.mlp.experts.up_proj").element == "mxfp4"
        assert formats.of("layers.0.self_attn.q_proj").element == "bfloat16"


class TestRefusals:
    @pytest.mark.parametrize(
        ("quantization", "message"),
        [
            ({"quant_method": "bitsandbytes"}, "'bitsandbytes' is not modelled"),
            ({"quant_method": "awq", "bits": 3}, "AWQ with 3 bits is not modelled"),
            ({"quant_method": "modelopt", "quant_algo": "W3A3"}, "'W3A3' is not modelled"),
            (compressed(2, "int"), "2 bits of type 'int' are not modelled"),
        ],
    )
    def test_a_format_that_is_not_modelled(self, quantization, message):
        with pytest.raises(NotSupportedError, match=message):
            weighed(quantization)
