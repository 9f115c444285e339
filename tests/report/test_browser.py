"""Reports in a real browser, where there is one: no message on the console, no request, nothing too wide."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest

import servesim
from servesim.report.run import run_page

if TYPE_CHECKING:
    from pathlib import Path

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
PROBE = """<script>
const root = document.documentElement;
root.dataset.wide = root.scrollWidth - root.clientWidth;
root.dataset.back = getComputedStyle(document.body).backgroundColor;
root.dataset.blank = [...document.querySelectorAll("canvas")].filter((canvas) => {
  const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
  return !pixels.some((value) => value !== 0);
}).length;
</script>"""


@pytest.fixture(scope="module")
def page() -> str:
    result = servesim.simulate(num_reqs=120, num_gpu_blocks=2000, request_rate=40.0)
    return run_page(result).html()


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_a_report_in_the_browser(tmp_path: Path, page: str, width: int, dark: bool) -> None:
    path = tmp_path / "report.html"
    path.write_text(page.replace("</body>", f"{PROBE}</body>"), encoding="utf-8")
    net = tmp_path / "net.json"
    done = subprocess.run(
        [
            *(
                str(BROWSER),
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--no-first-run",
                "--disable-sync",
            ),
            *("--disable-background-networking", "--disable-component-update", "--enable-logging=stderr"),
            *(
                f"--user-data-dir={tmp_path / 'profile'}",
                f"--log-net-log={net}",
                f"--window-size={width},900",
            ),
            *(["--force-dark-mode"] if dark else []),
            *("--dump-dom", path.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
    told = dict(re.findall(r'data-(\w+)="([^"]*)"', done.stdout[:2000]))
    assert int(told["drawn"]) == page.count("<canvas")
    assert told["blank"] == "0"
    assert int(told["wide"]) <= 0
    assert told["back"] == ("rgb(18, 21, 27)" if dark else "rgb(255, 255, 255)")
    assert _asked_for(net) <= {"file", "data"}


def _asked_for(net: Path) -> set[str]:
    """Schemes of all addresses that the page asked for."""
    text = net.read_text(encoding="utf-8", errors="replace")
    try:
        events = json.loads(text)["events"]
    except ValueError:  # the browser ended before it closed the list
        events = json.loads(text.rstrip().rstrip(",") + "]}")["events"]
    asked = {
        params["url"]
        for event in events
        if isinstance(params := event.get("params"), dict)
        and isinstance(params.get("url"), str)
        and params.get("initiator", "not an origin") not in ("not an origin", "")
    }
    return {url.partition(":")[0] for url in asked}
