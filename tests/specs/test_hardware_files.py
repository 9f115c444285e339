"""Facts about accelerators, and the engine constants of machines."""

from __future__ import annotations

import re

import pytest

from servesim.errors import InputError
from servesim.specs import paths
from servesim.specs.hardware import (
    NO_HOST_TIME,
    EngineSpec,
    HardwareSpec,
    RooflineSpec,
    describe_host,
    load_hardware,
    resolve_engine,
)
from servesim.specs.validation import validated


def test_hardware_without_a_file_is_uncalibrated() -> None:
    assert load_hardware("NPU-nobody-knows") == HardwareSpec(name="NPU-nobody-knows")
    assert load_hardware("NPU-nobody-knows").engine == EngineSpec()


def test_the_uncalibrated_engine_has_no_host_time() -> None:
    engine = EngineSpec()
    assert (engine.prefill_step_overhead_us, engine.decode_step_overhead_us) == (0.0, 0.0)
    assert engine.tail_in_mixed_steps
    assert not engine.skew_in_mixed_steps
    assert engine.cudagraph


def test_constants_of_a_server_name_their_rows() -> None:
    timed = {
        path.stem: load_hardware(path.stem)
        for path in paths.find_all("configs/hardware/*.yaml")
        if load_hardware(path.stem).engine != EngineSpec()
    }
    assert set(timed) == {"A100", "B200", "H100", "H200", "RTXPRO6000"}
    for name, hardware in timed.items():
        told = describe_host(hardware, hardware.engine)
        if hardware.calibration is not None:
            assert hardware.calibration.machine in told
            continue
        assert hardware.engine_rows is not None, name
        assert hardware.engine_rows in told
        assert re.search(r"rows? of|stages of", hardware.sources["engine"]), name


@pytest.mark.parametrize(
    ("engine", "told"),
    [
        (NO_HOST_TIME, "no overhead (the cluster config says so), so predictions"),
        (
            EngineSpec(prefill_step_overhead_us=1500),
            "+1.5 ms per step with prefill, +0.08 ms per decode-only step (from",
        ),
    ],
)
def test_the_line_about_the_host_tells_whose_time_it_is(engine: EngineSpec, told: str) -> None:
    gpu = load_hardware("RTXPRO6000")
    used = resolve_engine(gpu, engine)
    assert told in describe_host(gpu, used)
    assert "fitted" not in describe_host(gpu, used)


def test_hardware_that_nobody_calibrated_says_so() -> None:
    gpu = load_hardware("L40S")
    assert "no machine is calibrated" in describe_host(gpu, gpu.engine)


def test_the_second_runner_has_no_time_per_step_with_prefill() -> None:
    gpu = load_hardware("RTXPRO6000")
    engine = resolve_engine(gpu, None, second_runner=True)
    assert engine.prefill_step_overhead_us == 0.0
    assert engine.decode_step_overhead_us == gpu.engine.decode_step_overhead_us
    assert "none per step with prefill in vLLM 0.28" in describe_host(gpu, engine, "0.28")
    stated = resolve_engine(gpu, EngineSpec(prefill_step_overhead_us=5.0), second_runner=True)
    assert stated.prefill_step_overhead_us == 5.0


def test_the_shipped_gpu_names_its_sources() -> None:
    gpu = load_hardware("RTXPRO6000")
    assert (gpu.sm_count, gpu.l2_mib, gpu.memory_bandwidth_gbs) == (188, 128, 1597)
    assert {"memory_gib", "memory_bandwidth_gbs", "l2_mib", "sm_count", "peak_tflops"} <= set(gpu.sources)


@pytest.mark.parametrize("path", paths.find_all("configs/hardware/*.yaml"), ids=lambda path: path.stem)
def test_every_shipped_hardware_file_is_good(path) -> None:  # type: ignore[no-untyped-def]
    assert load_hardware(path.stem).name == path.stem


def test_every_fact_of_real_hardware_names_its_source() -> None:
    facts = {"memory_gib", "memory_bandwidth_gbs", "l2_mib", "sm_count", "peak_tflops", "link"}
    for path in paths.find_all("configs/hardware/*.yaml"):
        hardware = load_hardware(path.stem)
        stated = {name for name in facts if getattr(hardware, name)}
        if hardware.memory_gib is not None and path.stem != "NPU-X":  # NPU-X is invented
            assert stated - set(hardware.sources) == set(), path.stem


def test_ten_measured_gpus_are_described() -> None:
    described = [load_hardware(path.stem) for path in paths.find_all("configs/hardware/*.yaml")]
    folders = {hardware.silicon for hardware in described if hardware.silicon}
    assert folders >= {
        *("a100_sxm", "b200_sxm", "b300_sxm", "b60", "gb200", "gb300", "h100_sxm", "h200_sxm", "l40s"),
        "rtx_pro_6000_server",
    }


def test_a_share_is_a_number_or_a_curve() -> None:
    spec = RooflineSpec.model_validate({"moved_stream": [[1, 0.5], [64, 0.8]], "product_compute": 0.7})
    assert spec.moved_stream == ((1.0, 0.5), (64.0, 0.8))
    assert spec.product_compute == 0.7


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ({"moved_stream": [[1, 0.5], [64, 8]]}, r"moved_stream\[1\]\[1\]: 8 is not allowed; must be <= 2"),
        ({"moved_stream": "fast"}, 'moved_stream: "fast" is not allowed; must be a number'),
        ({"moved_strem": 0.5}, "moved_strem: unknown key; did you mean 'moved_stream'?"),
    ],
)
def test_a_wrong_share_is_refused_with_its_place(stated: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        validated(RooflineSpec, stated, "x.yaml")


def test_an_instance_overrides_only_what_it_states() -> None:
    hardware = HardwareSpec(
        name="X", engine=EngineSpec(prefill_step_overhead_us=6000, skew_in_mixed_steps=False)
    )
    engine = resolve_engine(hardware, EngineSpec(prefill_step_overhead_us=1))
    assert engine.prefill_step_overhead_us == 1
    assert not engine.skew_in_mixed_steps
    assert resolve_engine(hardware, None) is hardware.engine


def test_no_cudagraph_wins_over_every_file() -> None:
    hardware = HardwareSpec(name="X")
    assert not resolve_engine(hardware, EngineSpec(cudagraph=True), cudagraph=False).cudagraph
