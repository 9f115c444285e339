"""Pages and groups of the KV cache, against vLLM's own planner and by hand."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from servesim.errors import NotSupportedError
from servesim.memory.kv_groups import plan_groups
from servesim.memory.kv_layers import KvLayer, kv_layers, state_bytes
from servesim.specs.families import read_layers
from servesim.specs.kv_formats import head_bytes
from servesim.specs.kv_skip import skipped_layers, with_wide_layers
from servesim.specs.layers import Recurrent

GOLDEN = Path(__file__).parents[1] / "golden"
PLANS = json.loads((GOLDEN / "kv_plans.json").read_text())
SKIPPED = json.loads((GOLDEN / "kv_skip_plans.json").read_text())
PUBLISHED = Path(
    os.environ.get("SERVESIM_HF_CONFIGS", Path(__file__).parents[2].parent / "shared/data/hf_configs")
)
KINDS = {
    "FullAttentionSpec": "full",
    "SlidingWindowSpec": "sliding",
    "SlidingWindowMLASpec": "sliding",
    "ChunkedLocalAttentionSpec": "chunked",
    "MLAAttentionSpec": "mla",
    "MambaSpec": "state",
}
OWN_LAYERS = ("MiniMax-M3", "DeepSeek-V4")
"""Models whose attention is a class of its own, which does not take the other formats up."""


def model_of(name):
    path = GOLDEN / "models" / f"{name}.json"
    if not path.exists():
        path = PUBLISHED / name / "config.json"
    if not path.exists():
        pytest.skip(f"no config of {name} here")
    return read_layers(json.loads(path.read_text()), name)


@pytest.mark.parametrize(("name", "degrees"), PLANS["plans"].items(), ids=list(PLANS["plans"]))
def test_groups_are_those_of_the_engine(name, degrees):
    model = model_of(name)
    states = any(isinstance(layer.attention, Recurrent) for layer in model.layers)
    compared = 0
    for tp, plans in degrees.items():
        for kv, golden in plans.items():
            if kv in ("weight_bytes", "refused") or "refused" in golden:
                continue
            if kv.split(",")[0] != "auto" and any(own in name for own in OWN_LAYERS):
                continue
            layers = kv_layers(model, *asked(model, kv, golden, int(tp), states))
            plan = plan_groups(layers, hybrid="one manager" not in kv)
            assert plan.bytes_per_block == golden["bytes_per_block"], (tp, kv)
            assert plan.num_blocks(PLANS["memory_bytes"]) == golden["num_blocks"], (tp, kv)
            assert sorted(ours(plan)) == sorted(theirs(golden)), (tp, kv)
            compared += 1
    assert compared or all("refused" in plans for plans in degrees.values())


SKIPS = [
    pytest.param(name, int(tp), case, golden, id=f"{name}-tp{tp}-{case}")
    for name, degrees in SKIPPED["plans"].items()
    for tp, cases in degrees.items()
    for case, golden in cases.items()
]


@pytest.mark.parametrize(("name", "tp", "case", "golden"), SKIPS)
def test_layers_left_out_of_a_format(name, tp, case, golden):
    """``fp8 0,1, one manager``: format, layers beside TurboQuant's own, manager."""
    words, one_manager, _ = case.partition(", one manager")
    kv, _, asked_for = words.partition(" ")
    model = model_of(name)
    skipped = skipped_layers(model, asked_for or None, kv)
    # Gemma 4's kernels on Hopper take blocks of 128 tokens at least
    size = golden["block_size"] if "gemma-4" in name else 64 if kv == "fp8" and "deepseek" in name else 16

    def planned():
        layers = kv_layers(with_wide_layers(model, skipped, "bfloat16"), kv, tp, size)
        return plan_groups(layers, hybrid=not one_manager)

    if "refused" in golden:
        with pytest.raises(NotSupportedError):
            planned()
        return
    plan = planned()
    if "sliding_window" not in asked_for:
        assert sorted(map(int, golden["left_out"])) == list(skipped)
    assert plan.bytes_per_block == golden["bytes_per_block"]
    assert plan.num_blocks(SKIPPED["memory_bytes"]) == golden["num_blocks"]
    assert sorted(ours(plan)) == sorted(theirs(golden))


def asked(model, kv, golden, tp, states):
    """Format and block: the backend chooses the block, unless states raise it."""
    plain = kv.split(",")[0]
    own = model.kv_format or model.formats.plain
    return plain if plain != "auto" else own, tp, 16 if states else golden["block_size"]


def ours(plan):
    for group in plan.groups:
        pages = sorted([size, group.pages.count(size)] for size in set(group.pages))
        yield [group.kind, len(group.pages), group.block_size, pages]


def theirs(golden):
    for group in golden["groups"]:
        yield [KINDS[group["kind"]], group["layers"], group["block_size"], group["pages"]]


class TestByHand:
    def test_half_of_the_layers_slide(self):
        """18 sliding and 18 full layers of 8 heads of 64 in 1.5 GiB: 2,730 blocks, half without the hybrid
        manager."""
        layers = [
            KvLayer(kind, 16, 8 * 128 * 2, 128 if kind == "sliding" else None) for kind in ("sliding", "full")
        ]
        layers = layers * 18
        assert plan_groups(layers).num_blocks(3 << 29) == 2730
        assert plan_groups(layers, hybrid=False).num_blocks(3 << 29) == 1365

    def test_pages_side_by_side(self):
        """Three layers of a pattern of two sizes, and five of one size, in groups of three: 3, 3 and 2."""
        pattern = [KvLayer("mla", 8, 64, None, size, packed=True) for size in (512, 64)] * 3
        windows = [KvLayer("sliding", 4, 64, 16, 256, packed=True)] * 5
        plan = plan_groups(pattern + windows)
        assert [(group.kind, len(group.pages)) for group in plan.groups] == [
            ("mla", 6), ("sliding", 3), ("sliding", 2),
        ]  # fmt: skip
        assert plan.bytes_per_block == 3 * (512 + 64)
        assert plan.block_size == 8

    @pytest.mark.parametrize(("kv", "size"), [("bfloat16", 16), ("nvfp4", 16), ("fp8_ds_mla", 32)])
    def test_compressed_tokens_have_one_form(self, kv, size):
        with pytest.raises(NotSupportedError, match="compressed tokens"):
            kv_layers(model_of("deepseek-ai__DeepSeek-V4-Flash"), kv, 1, size)

    def test_windows_alone_stay_windows(self):
        """One manager keeps windows whole beside full attention only."""
        layers = [KvLayer("sliding", 16, 64, 128)] * 4
        assert plan_groups(layers, hybrid=False) == plan_groups(layers)
        assert plan_groups(layers, hybrid=False).groups[0].kind == "sliding"

    def test_a_token_of_llama_in_every_format(self):
        """32 layers, 8 KV heads of 128."""
        per_token = {
            "bfloat16": 131_072,
            "fp8": 65_536,
            "int8_per_token_head": 67_584,
            "nvfp4": 36_864,
            "int4_per_token_head": 34_816,
        }
        for kv_format, expected in per_token.items():
            assert 32 * 8 * head_bytes(kv_format, 128, 128) == expected

    def test_a_state_is_shared_by_ranks_and_groups_are_replicated(self):
        state = Recurrent("mamba2", 4096 + 2 * 8 * 128, 4, 64, 64, 128, groups=8)
        assert state_bytes(state, 1) == 6144 * 3 * 2 + 64 * 64 * 128 * 4
        assert state_bytes(state, 16) == (6144 + 2 * 8 * 128) // 16 * 3 * 2 + 4 * 64 * 128 * 4

    def test_states_have_no_manager_in_common_with_attention(self):
        layers = [KvLayer("full", 16, 4096), KvLayer("state", 16, 4096 * 16)]
        with pytest.raises(NotSupportedError, match="hybrid manager"):
            plan_groups(layers, hybrid=False)

    def test_latent_pages_cannot_be_padded(self):
        with pytest.raises(NotSupportedError, match="cannot be padded"):
            plan_groups([KvLayer("mla", 64, 576), KvLayer("sliding", 64, 1000, 128)])

    def test_layers_in_groups_of_their_smallest_number(self):
        layers = [KvLayer("full", 16, 64)] * 10 + [KvLayer("sliding", 16, 64, 128)] * 20
        assert [len(group.pages) for group in plan_groups(layers).groups] == [10, 10, 10]

    def test_nearly_equal_numbers_are_padded_to_the_larger(self):
        layers = [KvLayer("full", 16, 64)] * 13 + [KvLayer("sliding", 16, 64, 128)] * 12
        plan = plan_groups(layers)
        assert [len(group.pages) for group in plan.groups] == [13, 12]
        assert plan.bytes_per_block == 13 * 16 * 64
