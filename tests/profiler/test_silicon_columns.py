"""The units of the public kernel tables' columns: what the source takes them for, and checks of it."""

from __future__ import annotations

import ast
from pathlib import Path

import numpy as np
import pytest

from servesim.errors import InputError
from servesim.profiler import silicon
from servesim.profiler.silicon import comm, tables
from servesim.profiler.silicon.tables import COLUMNS
from tests.profiler.silicon_data import TOY, needs_silicon, table

LABELS = {"framework", "version", "device", "op_name", "kernel_source"}
"""Columns that name something and count nothing."""
FAMILIES = {
    "gemm_perf": "gemm",
    "context_attention_perf": "attention",
    "generation_attention_perf": "attention",
    "moe_perf": "moe",
    "custom_allreduce_perf": "comm",
}


def _all_reduces(monkeypatch: pytest.MonkeyPatch, **columns: object) -> dict[tuple[int, int], float]:
    """(ranks, bytes) -> us of one row of 1000 elements between two GPUs."""
    row = {"num_gpus": 2, "message_size": 1000, "us": 7.0, **columns}
    monkeypatch.setattr(comm, "read_table", lambda *_: table("custom_allreduce_perf", [row]))
    return {(ranks, size): us for _, ranks, size, us in comm.all_reduce_rows(TOY)[0]}


def test_a_message_of_1000_elements_is_2000_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _all_reduces(monkeypatch) == {(2, 2000): 7.0}
    assert _all_reduces(monkeypatch, allreduce_dtype="bfloat16") == {(2, 2000): 7.0}
    assert _all_reduces(monkeypatch, allreduce_dtype="fp8") == {(2, 1000): 7.0}


def test_a_message_of_unknown_dtype_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="allreduce_dtype: fp4 is not known"):
        _all_reduces(monkeypatch, allreduce_dtype="fp4")


def _named(source: str) -> set[str]:
    """Every text and every keyword of a module: how a column can be asked for."""
    nodes = list(ast.walk(ast.parse(source)))
    texts = {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    return texts | {node.arg for node in nodes if isinstance(node, ast.keyword) and node.arg}


@needs_silicon
def test_every_column_the_source_reads_has_a_stated_unit() -> None:
    folder = Path(silicon.__file__).parent
    modules = [path for path in folder.glob("*.py") if path.name != "columns.py"]
    named = set().union(*(_named(path.read_text(encoding="utf-8")) for path in modules))
    stated = set().union(*COLUMNS.values())
    there = set().union(
        *(tables.read_table("h100_sxm", family, name).columns for name, family in FAMILIES.items())
    )
    assert named & there - LABELS <= stated
    for name, columns in COLUMNS.items():
        known = {"latency", *tables.read_table("h100_sxm", FAMILIES[name], name).columns}
        assert set(columns) <= known, name


@needs_silicon
@pytest.mark.parametrize("gpu", ["a100_sxm", "h100_sxm", "b200_sxm", "rtx_pro_6000_server"])
def test_equal_bytes_take_equal_time_in_any_dtype(gpu: str) -> None:
    """A gather only moves bytes: int8 and 16-bit ones of a message size are the same only as elements."""
    gathers = tables.read_table(gpu, "comm", "nccl_perf", "nccl").where(op_name="all_gather")
    us = {}
    for dtype in ("half", "int8"):
        rows = gathers.where(nccl_dtype=dtype)
        at = zip(rows.integers("num_gpus"), rows.integers("message_size"), strict=True)
        us[dtype] = dict(zip(at, rows.latency_us, strict=True))
    large = [(ranks, size) for ranks, size in us["half"] if size >= 1 << 24]
    as_elements = [
        us["half"][at] / us["int8"][at[0], 2 * at[1]] for at in large if (at[0], 2 * at[1]) in us["int8"]
    ]
    as_bytes = [us["half"][at] / us["int8"][at] for at in large]
    assert float(np.median(as_elements)) == pytest.approx(1.0, abs=0.01)
    assert float(np.median(as_bytes)) > 1.75


@needs_silicon
def test_experts_are_shared_by_all_ranks_tokens() -> None:
    """Tokens of one rank, or slices as widths, would take more than the peak rate of 989 TFLOPS."""
    rows = tables.read_table("h100_sxm", "moe", "moe_perf").where(moe_dtype="bfloat16")
    names = ("num_tokens", "topk", "hidden_size", "inter_size", "moe_tp_size", "moe_ep_size")
    tokens, top_k, hidden, inter, tp, ep = (rows.integers(name).astype(float) for name in names)
    tflops = 6 * tokens * top_k * hidden * inter / (tp * ep) / rows.latency_us / 1e6
    assert 0.5 * 989 < tflops.max() < 989
    assert (tflops * ep).max() > 989
    assert (tflops * tp).max() > 989
