"""Facts about accelerators, and the engine constants of machines."""

from __future__ import annotations

import pytest

from serving.specs import paths
from serving.specs.hardware import EngineSpec, HardwareSpec, load_hardware, resolve_engine


def test_hardware_without_a_file_is_uncalibrated() -> None:
    assert load_hardware("NPU-nobody-knows") == HardwareSpec(name="NPU-nobody-knows")
    assert load_hardware("NPU-nobody-knows").engine == EngineSpec()


def test_the_uncalibrated_engine_has_no_host_time_and_full_skew() -> None:
    engine = EngineSpec()
    assert (engine.prefill_step_overhead_us, engine.decode_step_overhead_us) == (0.0, 0.0)
    assert engine.skew_in_mixed_steps
    assert engine.cudagraph


def test_the_shipped_gpu_is_uncalibrated_and_names_its_sources() -> None:
    gpu = load_hardware("RTXPRO6000")
    assert gpu.engine == EngineSpec()
    assert (gpu.sm_count, gpu.l2_mib, gpu.memory_bandwidth_gbs) == (188, 128, 1597)
    assert {"memory_gib", "memory_bandwidth_gbs", "l2_mib", "sm_count", "peak_tflops"} <= set(gpu.sources)


@pytest.mark.parametrize("path", paths.find_all("configs/hardware/*.yaml"), ids=lambda path: path.stem)
def test_every_shipped_hardware_file_is_good(path) -> None:  # type: ignore[no-untyped-def]
    assert load_hardware(path.stem).name == path.stem


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
