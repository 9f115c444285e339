"""The Chrome trace: valid JSON, every step once, every request a closed span."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING

from servesim.results.timeline import save_timeline
from tests.engine.small_engine import requests, run_small

if TYPE_CHECKING:
    from pathlib import Path


def test_every_step_and_every_request_is_in_the_trace(tmp_path: Path) -> None:
    log = run_small(requests((8, 3, 500), (8, 2, 600)))
    save_timeline(log, tmp_path / "t.json", None, {})
    events = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    steps = [event for event in events if event["ph"] == "X"]
    assert [event["ts"] * 1000 for event in steps] == list(log.instances[0].steps.start_ns)
    assert steps[0]["name"] == "prefill"
    assert steps[0]["dur"] == 1.08
    spans = Counter((event["ph"], event["id"], event["name"]) for event in events if event["ph"] in "be")
    assert all(spans["e", request, name] == 1 for phase, request, name in spans if phase == "b")
    ends = {e["id"]: e["ts"] * 1000 for e in events if e["ph"] == "e" and e["name"].startswith("request")}
    assert ends == {record.request: record.end_ns for record in log.requests}
