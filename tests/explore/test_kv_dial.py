"""The KV dial: bytes of every format, what fits, steps from tables or derived, refusals by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import servesim
from servesim import kv_dial
from servesim.__main__ import main
from servesim.errors import InputError
from servesim.explore.kv_dial import KvDial, KvRow
from servesim.memory.kv_groups import KvGroup, KvPlan, plan_groups
from servesim.memory.kv_layers import kv_layers
from servesim.memory.plan import kv_cache_capacity, kv_room, mxfp4_tiles
from servesim.profiler.on_demand import bundles_on_demand
from servesim.specs.cluster_changes import cluster_of
from servesim.specs.hardware import load_hardware
from servesim.specs.instance_options import resolve
from servesim.specs.kv_support import why_not
from servesim.specs.model import known_models, load_model
from servesim.specs.options import RuntimeOptions
from servesim.specs.weights import MXFP4_TILE, MXFP4_TILE_MARLIN
from tests.profiler.silicon_data import needs_silicon

LLAMA = "meta-llama/Llama-3.1-8B"
GPT_OSS = "openai/gpt-oss-120b"
SHOWN = {
    LLAMA: ("H100", 1),
    "openai/gpt-oss-120b": ("H200", 1),
    "deepseek-ai/DeepSeek-V3.2": ("H200", 8),
    "Qwen/Qwen3-Next-80B-A3B": ("H100", 4),
    "google/gemma-3-27b": ("H100", 1),
}


@pytest.fixture
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bundles made on demand go where they vanish."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.delenv("SERVESIM_AUTO_PROFILE", raising=False)


@pytest.fixture(scope="module")
def llama() -> KvDial:
    return kv_dial(LLAMA, "H100")


@pytest.mark.parametrize("kv_format", ["bfloat16", "fp8"])
def test_the_tokens_are_those_of_a_run(llama: KvDial, kv_format: str) -> None:
    """With the same defaults; a run counts the block that is never used."""
    given = {"model": LLAMA, "hardware": "H100", "kv_cache_dtype": kv_format, "num_reqs": 1}
    counted = servesim.simulate(**given).summary["kv_cache"]["tokens"]
    assert row(llama, kv_format).tokens == counted - 16


def row(dial: KvDial, kv_format: str, hybrid: bool = True) -> KvRow:
    return next(each for each in dial.rows if (each.kv_format, each.hybrid) == (kv_format, hybrid))


def room_of(model: str, tile: tuple[int, int] | None = None, **flags: object):  # type: ignore[no-untyped-def]
    options = RuntimeOptions(model=model, **flags)  # type: ignore[arg-type]
    instance = next(spec for _, spec in cluster_of(options).instances)
    spec = load_model(model)
    resolved = resolve(options, instance, spec)
    return kv_room(spec, instance, resolved, tile=tile), kv_cache_capacity(spec, instance, resolved)


@pytest.mark.parametrize(
    ("kv_format", "token"),
    [
        ("bfloat16", 131072),
        ("fp8", 65536),
        ("fp8_per_token_head", 67584),
        ("int8_per_token_head", 67584),
        ("int4_per_token_head", 34816),
        ("nvfp4", 36864),
        ("turboquant_k8v4", 28 * 8 * 196 + 4 * 4096),  # the first and last two layers stay in 16 bit
        ("turboquant_3bit_nc", 28 * 8 * 102 + 4 * 4096),
    ],
)
def test_bytes_of_a_token_are_those_of_the_format(llama: KvDial, kv_format: str, token: int) -> None:
    found = row(llama, kv_format)
    assert found.bytes_per_block == (found.block_size or 0) * (found.bytes_per_token or 0)
    assert found.block_size == (32 if found.wide_layers else 16)
    assert found.bytes_per_token == token


def test_the_room_is_that_of_the_memory_plan() -> None:
    room, capacity = room_of(LLAMA, hardware="H100")
    blocks = tuple(size // capacity.bytes_per_block for size in room)
    assert blocks == (capacity.band_blocks[0], capacity.num_blocks, capacity.band_blocks[1])


def test_requests_fill_what_fits(llama: KvDial) -> None:
    found = row(llama, "fp8")
    assert found.tokens is not None
    assert found.requests == {length: found.tokens // length for length in (8192, 32768, 131072)}


class TestSteps:
    def test_tables_give_16_bit_and_fp8(self, llama: KvDial) -> None:
        wide, narrow = row(llama, "bfloat16").step_ms, row(llama, "fp8").step_ms
        assert (wide.origin, narrow.origin) == ("tables", "tables")
        assert narrow.value is not None
        assert narrow.value < (wide.value or 0.0)

    def test_smaller_formats_are_derived_with_a_band(self, llama: KvDial) -> None:
        figure = row(llama, "int4_per_token_head").step_ms
        assert figure.origin == "derived"
        assert figure.low == figure.value
        assert figure.high == row(llama, "bfloat16").step_ms.value

    def test_what_has_no_source_is_unknown_with_a_reason(self, llama: KvDial) -> None:
        found = row(llama, "nvfp4")
        for figure in (found.break_even, found.prefill_percent):
            assert (figure.origin, figure.value) == ("unknown", None)
            assert figure.reason

    def test_at_the_break_even_fp8_is_no_slower(self, llama: KvDial) -> None:
        even = row(llama, "fp8").break_even.value
        assert even is not None
        for context, slower in ((int(even), False), (int(even) - 1, True)):
            dial = kv_dial(LLAMA, "H100", context=context)
            steps = [row(dial, name).step_ms.value or 0.0 for name in ("fp8", "bfloat16")]
            assert (steps[0] > steps[1]) == slower

    @needs_silicon
    @pytest.mark.usefixtures("own_home")
    def test_fp8_before_ada_gains_next_to_nothing(self) -> None:
        with bundles_on_demand(True):
            dial = kv_dial(LLAMA, "A100")
        wide, narrow = row(dial, "bfloat16").step_ms.value, row(dial, "fp8").step_ms.value
        assert wide is not None
        assert narrow == pytest.approx(0.997 * wide, rel=0.002)
        assert 2.5 < (row(dial, "fp8").prefill_percent.value or 0.0) < 3.5

    @needs_silicon
    @pytest.mark.usefixtures("own_home")
    def test_a_state_is_priced_beside_full_attention(self) -> None:
        with bundles_on_demand(True):
            dial = kv_dial("Qwen/Qwen3-Next-80B-A3B", "H100", tp=4)
        assert row(dial, "bfloat16").step_ms.origin == "tables"
        assert row(dial, "nvfp4").step_ms.origin == "derived" or row(dial, "nvfp4").refused

    def test_without_a_bundle_there_is_memory_only(self) -> None:
        dial = kv_dial("Qwen/Qwen3-Next-80B-A3B", "H100", tp=4)
        assert {each.step_ms.origin for each in dial.rows if not each.refused} == {"unknown"}
        assert row(dial, "fp8").tokens

    def test_what_has_no_time_has_its_memory(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("servesim.explore.kv_dial.why_not_simulated", lambda _: "no kernels of it")
        dial = kv_dial("Qwen/Qwen3-Next-80B-A3B", "H100", tp=4)
        assert {each.step_ms.origin for each in dial.rows if not each.refused} == {"not simulated"}
        assert row(dial, "fp8").tokens
        assert "not simulated" in dial.text()


class TestGroups:
    def test_a_single_manager_keeps_windows_whole(self) -> None:
        dial = kv_dial("google/gemma-3-27b", "H100")
        both, one = row(dial, "bfloat16"), row(dial, "bfloat16", hybrid=False)
        assert (both.bytes_per_token, one.bytes_per_token) == (10 * 8192, 62 * 8192)
        assert one.requests[32768] == (one.tokens or 0) // 32768
        only = kv_dial("google/gemma-3-27b", "H100", hybrid=False)
        assert {each.hybrid for each in only.rows} == {False}

    def test_a_request_holds_its_window_and_a_step(self) -> None:
        plan = KvPlan(
            (KvGroup("sliding", 16, (64,), 128), KvGroup("full", 16, (64,)), KvGroup("state", 16, (64,)))
        )
        assert plan.request_blocks(16384, 2048) == 137 + 1024 + 1
        assert plan.requests(2 * 1162 + 1, 16384, 2048) == 2
        assert plan.longest(1163, 2048) == 16384

    def test_gpt_oss_holds_what_servers_reported(self) -> None:
        """One H100 (256 sequences, experts padded as Marlin's) and four A100 at 0.8 (vLLM 0.10.1)."""
        layers = load_model(GPT_OSS).layers
        room, _ = room_of(
            GPT_OSS, MXFP4_TILE_MARLIN, hardware="H100", max_num_seqs=256, max_num_batched_tokens=8192,
            num_gpu_blocks=9000, max_model_len=16384,
        )  # fmt: skip
        plan = plan_groups(kv_layers(layers, "bfloat16"))
        assert plan.shared_tokens(plan.num_blocks(room.likely)) == pytest.approx(48_496, rel=0.04)
        room, _ = room_of(GPT_OSS, hardware="A100", tp=4, npu_memory_utilization=0.8, max_num_seqs=256)
        plan = plan_groups(kv_layers(layers, "bfloat16", 4))
        assert plan.requests(plan.num_blocks(room.likely), 16384, 2048) == pytest.approx(284, rel=0.04)

    def test_before_012_hopper_took_marlins_kernels(self) -> None:
        """The wheel of vLLM 0.12.0 brings Triton's, that of 0.11.2 does not: 65.89 and 64.55 GiB."""
        hopper = load_hardware("H100")
        assert mxfp4_tiles(hopper, "0.11") == (MXFP4_TILE_MARLIN, MXFP4_TILE_MARLIN)
        assert mxfp4_tiles(hopper, "0.12") == (MXFP4_TILE, MXFP4_TILE_MARLIN)
        assert mxfp4_tiles(hopper) == mxfp4_tiles(hopper, "0.19")

    def test_one_h100_of_011_holds_what_it_reported(self) -> None:
        """48,496 tokens; nothing is told but the version: 1 % off, with the kernels of later ones 41 %."""
        asked = {"max_num_seqs": 256, "max_num_batched_tokens": 8192, "max_model_len": 16384}
        tokens = {}
        for version in ("0.11", "0.12"):
            old = load_hardware("H100").model_copy(update={"plan_as_vllm": version})
            options = RuntimeOptions(model=GPT_OSS, hardware="H100", **asked)
            instance = next(spec for _, spec in cluster_of(options).instances)
            model = load_model(GPT_OSS)
            capacity = kv_cache_capacity(model, instance, resolve(options, instance, model), hardware=old)
            assert capacity.plan is not None
            tokens[version] = capacity.plan.shared_tokens(capacity.num_blocks)
        assert tokens["0.11"] == pytest.approx(48_496, rel=0.04)
        assert tokens["0.12"] / tokens["0.11"] == pytest.approx(1.4, abs=0.02)

    def test_a_start_up_is_planned_as_it_was(self) -> None:
        """Four A100, weights padded as there; tokens are counted as the version of the start-up counted."""
        _, capacity = room_of(
            GPT_OSS, hardware="A100", tp=4, npu_memory_utilization=0.8, max_num_seqs=256, max_model_len=16384
        )
        assert capacity.tokens / 16384 == pytest.approx(284, rel=0.04)
        assert capacity.weight_bytes / 2**30 == pytest.approx(17.22, rel=0.005)

    @pytest.mark.parametrize(("hardware", "gib"), [("H100", 64.55), ("B200", 65.89), ("RTXPRO6000", 65.89)])
    def test_kernels_of_mxfp4_are_those_of_the_gpu(self, hardware: str, gib: float) -> None:
        _, capacity = room_of(GPT_OSS, hardware=hardware, max_num_seqs=64, max_model_len=16384)
        assert capacity.weight_bytes / 2**30 == pytest.approx(gib, abs=0.01)

    def test_the_band_holds_both_kernels_of_mxfp4(self) -> None:
        dial = kv_dial(GPT_OSS, "H100", max_num_seqs=256, max_num_batched_tokens=8192)
        low, _, high = dial.room_gib
        assert low * 2**30 / 589_824 // 2 * 16 <= 48_496 <= high * 2**30 / 589_824 // 2 * 16


class TestRefusals:
    @pytest.mark.parametrize(
        ("model", "hardware", "kv_format", "runs"),
        [
            (LLAMA, "H100", "fp8", True),
            (LLAMA, "A100", "fp8", True),  # FlashInfer takes it
            (LLAMA, "A100", "fp8_per_token_head", False),
            (LLAMA, "A100", "int8_per_token_head", True),
            (LLAMA, "MI300X", "fp8_per_token_head", True),  # not in the table
            (GPT_OSS, "A100", "fp8", False),
            ("google/gemma-3-27b", "H100", "turboquant_k8v4", False),  # sliding windows
            (GPT_OSS, "H100", "nvfp4", False),
            (GPT_OSS, "B200", "nvfp4", True),
            ("deepseek-ai/DeepSeek-R1", "A100", "fp8", False),
            ("deepseek-ai/DeepSeek-V3.2", "A100", "bfloat16", False),
            ("deepseek-ai/DeepSeek-V3.2", "H200", "fp8_ds_mla", True),
            ("deepseek-ai/DeepSeek-V3.2", "H200", "int4_per_token_head", False),
        ],
    )
    def test_a_gpu_runs_what_its_backends_take(
        self, model: str, hardware: str, kv_format: str, runs: bool
    ) -> None:
        reason = why_not(kv_format, load_model(model).layers, load_hardware(hardware))
        assert (reason is None) == runs, reason

    def test_compressed_tokens_have_one_format(self) -> None:
        """43 windows, 41 layers of compressed vectors, 21 indexers: 1,002,240 bytes a block of 256 tokens."""
        dial = kv_dial("deepseek-ai/DeepSeek-V4-Flash", "H200", tp=4)
        [only] = dial.rows
        assert (only.kv_format, only.block_size, only.bytes_per_block) == ("fp8_ds_mla", 256, 1_002_240)

    @pytest.mark.parametrize(("flag", "value"), [("context", 200_000), ("batch", 0)])
    def test_a_step_that_cannot_be_is_refused(self, flag: str, value: int) -> None:
        with pytest.raises(InputError, match=f"--{flag}"):
            kv_dial(LLAMA, "H100", **{flag: value})


class TestCommand:
    @pytest.mark.parametrize("model", SHOWN)
    def test_the_shown_models_print(self, model: str, capsys: pytest.CaptureFixture[str]) -> None:
        hardware, tp = SHOWN[model]
        assert main(["kv", model, "--hardware", hardware, "--tp", str(tp), "--no-auto-profile"]) == 0
        printed = capsys.readouterr().out
        assert "accuracy" in printed
        assert "fp8" in printed

    def test_json_holds_every_row(self, tmp_path: Path) -> None:
        out = tmp_path / "dial.json"
        assert main(["kv", LLAMA, "--hardware", "H100", "--json", str(out)]) == 0
        read = json.loads(out.read_text())
        assert [each["kv_format"] for each in read["rows"]][:2] == ["bfloat16", "fp8"]

    @pytest.mark.parametrize("ending", ["png", "svg"])
    def test_a_plot_is_drawn_twice_alike(self, tmp_path: Path, ending: str) -> None:
        pytest.importorskip("matplotlib")
        paths = [tmp_path / f"{name}.{ending}" for name in "ab"]
        for path in paths:
            assert main(["kv", LLAMA, "--hardware", "H100", "--plot", str(path)]) == 0
        assert paths[0].read_bytes() == paths[1].read_bytes()


class TestMatrix:
    def test_every_shipped_model_has_a_line(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["kv", "--matrix"]) == 0
        printed = capsys.readouterr().out
        for name in known_models():
            assert (name in printed) != name.startswith("servesim/")
        assert "18 sliding, 18 full" in printed

    def test_a_cell_is_what_the_table_says(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["kv", LLAMA, "--matrix"]) == 0
        lines = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines() if line}
        names = lines["KV"][1:]
        assert lines["fp8"][names.index("A100")] == "T"
        assert lines["fp8_per_token_head"][names.index("A100")] == "-"
        assert lines["nvfp4"][names.index("B200")] == "s"

    def test_flags_of_a_dial_are_refused_beside_it(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["kv", LLAMA, "--matrix", "--hardware", "H100"]) == 2
        assert "no effect beside --matrix" in capsys.readouterr().err


@needs_silicon
def test_the_kernels_of_every_gpu_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kv", "--matrix", "--kernels"]) == 0
    out = capsys.readouterr().out
    (latent,) = (line.split() for line in out.splitlines() if line.startswith("latent attention"))
    assert latent[3] == "-"  # A100
    assert out.count("0.24.0") > 30
    assert main(["kv", "--kernels"]) == 2
    assert main(["kv", LLAMA, "--matrix", "--kernels"]) == 2
