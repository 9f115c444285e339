"""What the timed layers compute is right: a fast wrong kernel would be timed just as happily."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="needs PyTorch: pip install 'servesim[torch]'")

from servesim.errors import NotSupportedError  # noqa: E402
from servesim.profiler.meter import AttentionBatch  # noqa: E402
from servesim.profiler.torch_source.device import Calls, Device, open_device, read_smi  # noqa: E402
from servesim.profiler.torch_source.experts import RankExperts, assigned_experts  # noqa: E402
from servesim.profiler.torch_source.flashinfer_attention import Pages, pages_needed  # noqa: E402
from servesim.profiler.torch_source.formats import check_format, gemm, random_weight  # noqa: E402
from servesim.profiler.torch_source.layers import RankLayers, rotary_table, rotate_heads  # noqa: E402
from servesim.profiler.torch_source.meter import TorchMeter  # noqa: E402
from servesim.profiler.torch_source.sdpa import SdpaAttention  # noqa: E402
from servesim.specs.rank_shapes import rank_shapes  # noqa: E402
from tests.profiler.measure.fake_meter import job  # noqa: E402
from tests.profiler.roofline_toy import sliding_half  # noqa: E402


@pytest.fixture
def device() -> Device:
    return open_device("cpu", iterations=1, threads=1)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.02), ("fp8", 0.08), ("int8", 0.02)]
)
def test_a_product_in_every_format_is_the_product(device: Device, dtype: str, tolerance: float) -> None:
    torch.manual_seed(1)
    weight = random_weight(device, (64, 128), dtype)
    x = torch.randn(5, 128, dtype=torch.float32 if dtype == "float32" else torch.bfloat16)
    expected = x.float() @ weight.float().t()
    got = gemm(device, weight, dtype)(x).float()
    assert float((got - expected).norm() / expected.norm()) < tolerance


def test_heads_turn_by_the_angle_of_their_position() -> None:
    x = torch.zeros(1, 1, 4)
    x[0, 0, 0] = 1.0  # the low half of the first pair; its frequency is 1
    rotate_heads(torch.tensor([2]), x, rotary_table(torch, 3, 4))
    angle = torch.tensor(2.0)
    torch.testing.assert_close(x[0, 0], torch.stack([angle.cos(), angle * 0, angle.sin(), angle * 0]))


@pytest.mark.parametrize(
    "layer", ["qkv_proj", "o_proj", "gate_up_proj", "down_proj", "lm_head", "embedding", "act_fn"]
)
def test_a_rank_of_two_has_half_the_width(device: Device, layer: str) -> None:
    rows, widths = 3, {}
    for tp in (1, 2):
        layers = RankLayers(device, job(), rank_shapes(job().model, tp))
        out = layers.calls(layer, rows).functions[0]()
        assert out.shape[0] == rows
        widths[tp] = out.shape[1]
    halves = {"qkv_proj", "gate_up_proj", "lm_head", "act_fn"}
    assert widths[1] == (2 * widths[2] if layer in halves else widths[2])


def test_every_layer_of_every_architecture_can_be_built(device: Device) -> None:
    from servesim.specs.architecture import load_architecture

    layers = RankLayers(device, job(), rank_shapes(job().model, 1))
    for model_type in (
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
        "qwen3_moe",
        "mixtral",
        "phimoe",
        "gemma2",
        "gpt_oss",
    ):
        catalog = load_architecture(model_type).catalog
        layers._job = job().__class__(**{**_fields(job()), "architecture": load_architecture(model_type)})
        for layer in (*catalog.dense, *catalog.per_sequence):
            layers.calls(layer, 2).functions[0]()


def _fields(what: object) -> dict[str, object]:
    return {name: getattr(what, name) for name in what.__dataclass_fields__}  # type: ignore[attr-defined]


def test_a_layer_nobody_knows_is_reported(device: Device) -> None:
    from servesim.specs.architecture import Architecture

    described = job().architecture.model_dump(mode="json", by_alias=True)
    described["catalog"]["dense"]["act_fn"]["class"] = "Wobble"
    odd = job().__class__(**{**_fields(job()), "architecture": Architecture.model_validate(described)})
    with pytest.raises(NotSupportedError, match="cannot build layer 'act_fn' of class Wobble"):
        RankLayers(device, odd, rank_shapes(odd.model, 1)).calls("act_fn", 1)


@pytest.mark.parametrize("kv", ["auto", "fp8"])
def test_a_chunk_attends_to_its_history_and_itself(device: Device, kv: str) -> None:
    what = job(dtype="float32", kv=kv)
    shapes = rank_shapes(what.model, 1)
    attention = SdpaAttention(device, what, shapes, 100)
    query_seed = torch.get_rng_state()
    (out,) = attention.calls(AttentionBatch(3, 5)).functions[0]()
    torch.set_rng_state(query_seed)
    query = torch.randn(1, shapes.heads, 3, shapes.head_dim)[0]
    keys, values = (attention._pool[i, :, :8].float() for i in (0, 1))
    group = shapes.heads // shapes.kv_heads
    for token in range(3):
        for head in range(shapes.heads):
            k, v = keys[head // group, : 6 + token], values[head // group, : 6 + token]
            weights = torch.softmax(k @ query[head, token] / shapes.head_dim**0.5, dim=0)
            torch.testing.assert_close(out[0, head, token], weights @ v, rtol=1e-4, atol=1e-4)


def test_every_decode_reads_its_own_keys_and_one_more(device: Device) -> None:
    what = job(dtype="float32")
    shapes = rank_shapes(what.model, 1)
    attention = SdpaAttention(device, what, shapes, 200)
    seed = torch.get_rng_state()
    (out,) = attention.calls(AttentionBatch(0, 0, ((2, 9),))).functions[0]()
    torch.set_rng_state(seed)
    query = torch.randn(2, shapes.heads, 1, shapes.head_dim)
    group = shapes.heads // shapes.kv_heads
    for sequence in range(2):
        cache = attention._pool[:, :, sequence * 10 : sequence * 10 + 10]
        weights = torch.softmax(cache[0, 0] @ query[sequence, group - 1, 0] / shapes.head_dim**0.5, dim=0)
        torch.testing.assert_close(out[sequence, group - 1, 0], weights @ cache[1, 0], rtol=1e-4, atol=1e-4)


def test_in_a_window_a_token_sees_only_the_last_ones(device: Device) -> None:
    what = job(dtype="float32")
    shapes = rank_shapes(what.model, 1)
    attention = SdpaAttention(device, what, shapes, 100)
    seed = torch.get_rng_state()
    (chunk, decode) = attention.calls(AttentionBatch(3, 5, ((1, 9),)), window=4).functions[0]()
    torch.set_rng_state(seed)
    query = torch.randn(1, shapes.heads, 3, shapes.head_dim)[0]
    keys, values = (attention._pool[i, 0, :8] for i in (0, 1))
    for token in range(3):  # at position 5 + token
        k, v = keys[2 + token : 6 + token], values[2 + token : 6 + token]
        weights = torch.softmax(k @ query[0, token] / shapes.head_dim**0.5, dim=0)
        torch.testing.assert_close(chunk[0, 0, token], weights @ v, rtol=1e-4, atol=1e-4)
    torch.randn(2, shapes.kv_heads, 3, shapes.head_dim)  # the chunk's new keys and values
    last = torch.randn(1, shapes.heads, 1, shapes.head_dim)[0, 0, 0]
    weights = torch.softmax(attention._pool[0, 0, 14:18] @ last / shapes.head_dim**0.5, dim=0)
    torch.testing.assert_close(decode[0, 0, 0], weights @ attention._pool[1, 0, 14:18], rtol=1e-4, atol=1e-4)


def test_blocks_that_slide_count_by_their_share(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    half = sliding_half(job().model, 4)
    meter = TorchMeter(device, job().__class__(**{**_fields(job()), "model": half}))
    meter.start_rank(1)
    times = {None: 10.0, 4: 2.0}
    monkeypatch.setattr(SdpaAttention, "calls", lambda _, __, window: window)
    monkeypatch.setattr(Device, "time_us", lambda _, window: times[window])
    assert meter.attention_us([AttentionBatch(0, 0, ((1, 16),))]) == [6.0]


def test_unequal_decodes_run_as_one_call_for_every_length(device: Device) -> None:
    attention = SdpaAttention(device, job(), rank_shapes(job().model, 1), 4000)
    parts = attention.calls(AttentionBatch(4, 0, ((3, 16), (2, 64)))).functions[0]()
    assert [tuple(part.shape[::2]) for part in parts] == [(1, 4), (3, 1), (2, 1)]


def test_slots_go_evenly_to_the_experts_asked_for() -> None:
    assert assigned_experts(4, 2, 3) == [[0, 1], [2, 0], [1, 2], [0, 1]]
    for tokens, top_k, activated in ((1, 2, 2), (16, 2, 8), (5, 2, 7)):
        found = assigned_experts(tokens, top_k, activated)
        assert {expert for row in found for expert in row} == set(range(activated))
        assert all(len(set(row)) == top_k for row in found)


def test_an_expert_layer_is_the_weighted_sum_of_experts(device: Device) -> None:
    torch.manual_seed(3)
    what = job("servesim/tiny-moe", dtype="float32")
    experts = RankExperts(device, what, 1)
    x, ids = torch.randn(5, 256), torch.tensor(assigned_experts(5, 2, 8))
    out, weights = experts._looped(x, ids)(), experts._route(x)
    for token in range(5):
        expected = torch.zeros(256)
        for place, expert in enumerate(ids[token].tolist()):
            both = experts._each[0][expert](x[token : token + 1])[0]
            inner = torch.nn.functional.silu(both[:192]) * both[192:]
            expected += weights[token, place] * experts._each[1][expert](inner[None])[0]
        torch.testing.assert_close(out[token], expected, rtol=1e-4, atol=1e-5)


def test_a_format_the_device_cannot_do_is_refused_with_the_reason(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no kernel for this\nand more")

    monkeypatch.setattr(torch, "_scaled_mm", fail)
    with pytest.raises(NotSupportedError, match=r"--dtype fp8 .* cannot compute it \(no kernel for this\)"):
        check_format(device, "fp8", "bfloat16")


def test_buffers_are_used_in_turn_from_round_to_round(device: Device) -> None:
    used: list[int] = []
    functions = [lambda i=i: used.append(i) for i in range(7)]
    device.time_us(Calls(functions))
    timed = used[2:]  # after the warm-up and the first look
    assert timed == [i % 7 for i in range(len(timed))]


def test_a_cold_cache_takes_more_copies_of_small_weights(device: Device) -> None:
    assert device.copies(1 << 10) == 64
    assert device.copies(1 << 40) == 1
    device.cold = False
    assert device.copies(1 << 10) == 1


def test_pages_hold_every_sequence_and_the_last_in_part() -> None:
    pages = Pages.of([16, 17, 1], list(range(100, 120)), 2)
    assert pages.indptr == [0, 1, 3, 4]
    assert pages.indices == [102, 103, 104, 105]
    assert pages.last_page_len == [16, 1, 1]
    assert pages_needed(AttentionBatch(20, 12, ((3, 15), (2, 16)))) == 2 + 3 * 1 + 2 * 2


def test_what_nvidia_smi_does_not_know_is_left_out() -> None:
    assert read_smi("1980, 2619, 1980, 41, 122.50, 700.00, 570.86.15\n") == {
        "sm_clock_mhz": 1980.0,
        "memory_clock_mhz": 2619.0,
        "sm_clock_max_mhz": 1980.0,
        "temperature_c": 41.0,
        "power_w": 122.5,
        "power_limit_w": 700.0,
        "driver_version": "570.86.15",
    }
    assert read_smi("[N/A], 1, , 40, [Not Supported], 300, x") == {
        "memory_clock_mhz": 1.0,
        "temperature_c": 40.0,
        "power_limit_w": 300.0,
        "driver_version": "x",
    }
