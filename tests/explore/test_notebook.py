"""Results and progress in a notebook."""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

import servesim
from servesim.explore import notebook
from servesim.results.table import Table
from tests.engine.toy_world import toy_cluster, toy_instance, toy_world

if TYPE_CHECKING:
    from collections.abc import Iterator

CLUSTER, WORKLOAD = "cluster.json", "workload.jsonl"


@pytest.fixture(autouse=True)
def toys(tmp_path: Path) -> Iterator[None]:
    with toy_world(tmp_path):
        lines = [{"input_toks": 40 + i, "output_toks": 9, "arrival_time_ns": i * 10**7} for i in range(20)]
        Path(WORKLOAD).write_text("\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")
        Path(CLUSTER).write_text(json.dumps(toy_cluster([toy_instance()])), encoding="utf-8")
        yield


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The texts that a notebook's cell has shown, in a notebook."""
    texts: list[str] = []
    shell = type("ZMQInteractiveShell", (), {})()
    display = SimpleNamespace(
        HTML=lambda text: text,
        display=lambda _, display_id: display_id and SimpleNamespace(update=texts.append),
    )
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell, display=display))
    monkeypatch.setattr(notebook, "_BETWEEN_S", 0.0)
    return texts


def test_a_sweep_shows_its_table_and_its_progress(shown: list[str]) -> None:
    found = servesim.sweep({"grid": {"max_num_seqs": [2, 4, 8]}}, cluster=CLUSTER, workload=WORKLOAD)
    assert shown == ["1 of 3", "2 of 3", ""]
    html = found._repr_html_()
    assert html.count("<tr>") == 4
    assert "3 configurations, 0 without figures" in html


def test_a_search_shows_its_answer_chart_and_progress(shown: list[str]) -> None:
    found = servesim.slo(CLUSTER, WORKLOAD, "ttft:p95:8", patterns=1, kernel_error=False)
    assert shown[0] == "everything at once"
    html = found._repr_html_()
    assert "largest rate" in html
    svg = html[html.index("<svg") : html.index("</svg>") + 6]
    tree = ET.fromstring(svg)
    finite = [point for point in found.curve if point.complete and point.load < float("inf")]
    assert len(tree.findall("{*}circle")) == 2 * len(finite)


def test_the_curve_is_a_frame() -> None:
    pytest.importorskip("pandas")
    found = servesim.slo(CLUSTER, WORKLOAD, "ttft:p95:8 tpot:90", patterns=1, kernel_error=False)
    frame = found.to_pandas()
    assert frame["load"].tolist() == [point.load for point in found.curve]
    assert frame["TTFT P95"].tolist() == [round(point.bounds_ms[0], 6) for point in found.curve]
    assert {"p99_ttft_ms", "TPOT P99", "waits_blocks", "goodput"} <= set(frame.columns)


def test_outside_a_notebook_nothing_is_shown() -> None:
    assert notebook.line() is None
    assert notebook.rows_line() is None


def test_cells_are_text_and_not_markup() -> None:
    table = Table(["a", "<b>"], [["x < y", "1"], None, ["z", "2"]], {(2, 1): "bad"})
    html = notebook.table_html(table)
    assert "x &lt; y" in html
    assert "&lt;b&gt;" in html
    assert 'text-align:right;color:#b3261e">2' in html


def test_a_chart_without_two_points_is_none() -> None:
    assert notebook.chart_svg({"a": [(1.0, 2.0), (2.0, 0.0)]}, "x", "y") == ""
    assert "polyline" in notebook.chart_svg({"a": [(1.0, 2.0), (2.0, 3.0)]}, "x", "y", [("m", 1.5)])


def test_what_searches_return_draws_itself_and_becomes_a_frame() -> None:
    for kind in (servesim.LoadLimit, servesim.Sweep, servesim.Plan):
        assert callable(kind._repr_html_)
        assert callable(kind.to_pandas)
