"""Measured collectives or the cluster's links: the cluster decides, and auto goes by the bundle."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from servesim.cost.build import build_stage_cost
from servesim.errors import InputError
from servesim.specs.hardware import EngineSpec
from tests.cost.bundles import HARDWARE, Toy, cluster_links, instance_options, toy_model

MEASURED, LINKS = 7.0, 2 * (1000 + 80) / 1000
"""us of an all-reduce of 10 tokens, 160 bytes: in comm.csv, and over 1 GB/s with 1000 ns."""


def _all_reduce_us(root: Path, wanted: str, meta: dict[str, Any]) -> float:
    toy = Toy(tp=2, comm=[("all_reduce", 2, 0, MEASURED), ("all_reduce", 2, 1 << 30, MEASURED)])
    toy.meta = {"source": "silicon", **meta}
    toy.timer(root)  # writes the bundle and the architecture
    cluster = cluster_links(bw=1.0, latency=1000.0)
    cluster.collectives = wanted
    instance = SimpleNamespace(
        hardware=HARDWARE,
        npu_mem=SimpleNamespace(mem_bw=None),
        tp_size=2,
        pp_size=1,
        ep_size=1,
        engine=EngineSpec(),
    )
    options = instance_options(max_num_seqs=256)
    timer = build_stage_cost(instance, toy_model(), options, cluster)  # type: ignore[arg-type]
    return float(timer.layers.blocks[-1].us(np.array([10]))[0])


@pytest.mark.parametrize(
    ("wanted", "meta", "us"),
    [
        ("auto", {}, MEASURED),
        ("auto", {"collectives": {"link": "nvlink"}}, MEASURED),
        ("auto", {"collectives": {"link": "pcie"}}, LINKS),
        ("measured", {"collectives": {"link": "pcie"}}, MEASURED),
        ("links", {"collectives": {"link": "nvlink"}}, LINKS),
        ("links", {}, LINKS),
    ],
)
def test_the_config_says_whether_tables_or_links_win(
    root: Path, wanted: str, meta: dict[str, Any], us: float
) -> None:
    assert _all_reduce_us(root, wanted, meta) == pytest.approx(us)


def test_a_link_nobody_knows_is_refused(root: Path) -> None:
    with pytest.raises(InputError, match=r"collectives\.link: 'rope' is not allowed; must be one of pcie"):
        _all_reduce_us(root, "auto", {"collectives": {"link": "rope"}})
