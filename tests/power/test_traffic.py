"""Bytes over links per token."""

from __future__ import annotations

import numpy as np

from servesim.memory.placement import PlacedLayer
from servesim.memory.traffic import reaches_of, tokens_within, traffic_by_place
from servesim.power.activity import (
    all_reduce_bytes_per_token,
    expert_bytes_per_token,
    link_bytes_per_token,
    stage_bytes_per_token,
)
from servesim.specs.cluster import InstanceSpec
from servesim.specs.model import load_model
from tests.specs.clusters import instance

MIXTRAL = load_model("mistralai/Mixtral-8x7B-v0.1")
LLAMA = load_model("meta-llama/Llama-3.1-8B")  # hidden 4096, 32 layers
QWEN = load_model("Qwen/Qwen3-30B-A3B-Instruct-2507")  # hidden 2048, 48 layers, 8 of 128 experts


def test_one_npu_sends_nothing() -> None:
    assert link_bytes_per_token(LLAMA, InstanceSpec.model_validate(instance())) == 0


def test_two_ranks_all_reduce_twice_a_block() -> None:
    # 64 all-reduces of 8192 bytes; around a ring of two, each rank sends the whole payload once.
    assert all_reduce_bytes_per_token(LLAMA, 2) == 64 * 8192 * 2
    assert all_reduce_bytes_per_token(LLAMA, 4) == 64 * 8192 * 6


def test_stages_hand_a_hidden_state_on() -> None:
    assert stage_bytes_per_token(LLAMA, 4) == 3 * 8192
    four = InstanceSpec.model_validate(instance(num_npus=4, tp_size=2, pp_size=2))
    assert link_bytes_per_token(LLAMA, four) == 64 * 8192 * 2 + 8192


def test_experts_on_two_members_see_every_token() -> None:
    # 48 layers: 4096 bytes of hidden state there and back, and 128 router logits of 2 bytes.
    assert expert_bytes_per_token(QWEN, 1, 2, "allgather_reducescatter") == 48 * (2 * 4096 + 256)
    # Mixtral, hidden 4096, 32 layers, 8 experts: each of two ranks sends every token to its twin
    assert expert_bytes_per_token(MIXTRAL, 2, 4, "allgather_reducescatter") == 2 * 32 * (2 * 8192 + 16)
    assert all_reduce_bytes_per_token(MIXTRAL, 2, 4) == 64 * 8192 * 2


def test_chunks_go_to_all_ranks_and_are_not_added_up() -> None:
    # a token is in one chunk: to three other ranks and back, then to the one other rank of its member
    assert expert_bytes_per_token(QWEN, 2, 4, "allgather_reducescatter") == 48 * (3 * (2 * 4096 + 256) + 4096)
    assert all_reduce_bytes_per_token(QWEN, 2, 4) == 48 * 4096 * 2
    assert all_reduce_bytes_per_token(QWEN, 2, 2) == 96 * 4096 * 2


def test_experts_within_one_member_need_no_exchange() -> None:
    assert expert_bytes_per_token(QWEN, 2, 2, "allgather_reducescatter") == 0
    assert expert_bytes_per_token(LLAMA, 1, 1, "allgather_reducescatter") == 0


def test_tokens_that_only_travel_to_their_experts_send_less() -> None:
    some = expert_bytes_per_token(QWEN, 1, 32, "all_to_all")
    # of 128 experts 4 are on a rank: a token of 8 experts goes there with probability 0.230
    assert 0.22 < some / (48 * 31 * 2 * 4096) < 0.24


def test_a_window_is_read_as_far_as_it_reaches() -> None:
    # a chunk behind 500 tokens and four decodes of 300 on average, of which 127 are seen beside the new one
    assert tokens_within(128, [500], 4, 1200) == 127 + 4 * 127
    assert tokens_within(128, [50], 4, 200) == 50 + 200


def test_energy_of_windows_counts_what_is_read() -> None:
    """Of gpt-oss's first two blocks one sees 128 tokens: 10 new tokens, 4 decodes of 1,000 in the cache."""
    reaches = reaches_of(load_model("openai/gpt-oss-120b"))
    assert (len(reaches), reaches[0]) == (18, 128)
    layers = [PlacedLayer("attention", "npu", block=block, kv_place="cpu") for block in (0, 1)]
    traffic = traffic_by_place([layers], 100, 2, reaches)["cpu"]
    assert (traffic.kv_bytes, traffic.window_bytes) == (200, {128: 200})
    tokens, kv = np.array([10]), np.array([4000])
    within = {128: np.array([tokens_within(128, [], 4, 4000)])}
    moved = traffic.moved(tokens, kv, load_model("openai/gpt-oss-120b"), within)
    assert moved.tolist() == [200 * (10 + 4000) + 200 * (10 + 4 * 127)]
