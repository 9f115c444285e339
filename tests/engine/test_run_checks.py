"""What is looked at before a run, each check by itself, without a run."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from servesim.cost.bundle import load_bundle
from servesim.engine.run_checks import check_agreement, check_requested_models, warnings_about
from servesim.errors import InputError
from servesim.specs.cluster import load_cluster
from servesim.specs.instance_options import resolve
from servesim.specs.model import load_model
from servesim.specs.options import RuntimeOptions
from servesim.workload.request import Request, Workload
from tests.cost.bundles import HARDWARE
from tests.engine.toy_world import DENSE, MOE, toy_cluster, toy_instance

if TYPE_CHECKING:
    from servesim.specs.instance_options import InstanceOptions

pytestmark = pytest.mark.usefixtures("toys")


def options_of(**keys: Any) -> InstanceOptions:
    cluster = load_cluster(toy_cluster([toy_instance(DENSE, **keys)]))
    return resolve(RuntimeOptions(), cluster.instances[0][1], load_model(DENSE))


def test_lock_step_instances_agree_on_how_they_run() -> None:
    placed = load_cluster(toy_cluster([toy_instance(MOE, dp_group="A")] * 3)).instances
    alike = options_of()
    other = replace(alike, async_scheduling=not alike.async_scheduling)
    check_agreement(placed, [0, 2], {0: alike, 1: other, 2: alike})
    with pytest.raises(InputError, match=r"instance 1: async_scheduling .* as in instance 0, the same dp_gr"):
        check_agreement(placed, [0, 1], {0: alike, 1: other})


def test_a_request_for_an_unserved_model_is_refused() -> None:
    cluster = load_cluster(toy_cluster([toy_instance(DENSE)]))
    check_requested_models(cluster, Workload([Request(0, 5, 1, 0), Request(1, 5, 1, 0, model=DENSE)], "w"))
    with pytest.raises(InputError, match=f"w: request 1 asks for model {MOE}, .* served: {DENSE}$"):
        check_requested_models(cluster, Workload([Request(0, 5, 1, 0), Request(1, 5, 1, 0, model=MOE)], "w"))


def test_a_format_only_in_the_name_is_warned_of() -> None:
    config = Path("configs/model") / DENSE
    shutil.copy(f"{config}.json", f"{config}-NVFP4.json")
    bundle = load_bundle(HARDWARE, DENSE, "bf16")
    plain = warnings_about(bundle, load_model(DENSE), options_of())
    named = warnings_about(bundle, load_model(f"{DENSE}-NVFP4"), options_of())
    (told,) = [line for line in named if line not in plain]
    assert told.startswith(f"{DENSE}-NVFP4: the name says NVFP4, but no quantization_config in its config")
    assert told.endswith("taken as bfloat16")
