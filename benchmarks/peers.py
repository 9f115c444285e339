"""Runs other simulators of LLM serving beside this one, and prints how they compare in CPU time and memory.

    python benchmarks/peers.py               into benchmarks/RESULTS.md
    python benchmarks/peers.py --print       printed only
    python benchmarks/peers.py --sizes 300 --repeats 1 --folder ENVIRONMENTS

Every peer gets an environment of its own in --folder, which is kept, so that a second call installs nothing.
One that cannot be installed or started is named with the reason, and the others run. All simulate the same
load: requests of 512 tokens in and 512 out that arrive at 10 a second at one instance. Their kernel times,
hardware and outputs are their own: this compares what the tools take, not what they predict.

The tools take turns, so that other load on the machine meets all of them, and the least CPU time of several
runs counts. Only ratios are written: CPU seconds of shared machines cannot be compared with those of others.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import venv
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from results_page import RESULTS, write_section
from speed import ROOT, Cost, machine, paragraph, synthetic, table

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

SIZES = (300, 10_000, 100_000)
_INSTALL_S = 1200
_START_S = 300


@dataclass(slots=True, frozen=True)
class Peer:
    """Another simulator."""

    name: str
    packages: tuple[str, ...]
    """What pip is given."""
    arguments: Callable[[int], list[str]] | None
    """Words after the environment's ``python`` for so many requests; None: nobody has seen it run yet."""


def _dynosim(requests: int) -> list[str]:
    load = ["--input-tokens", "512", "--output-tokens", "512", "--request-rate", "10"]
    count = ["--request-count", str(requests), "--arrival-seed", "0"]
    return ["-m", "dynamo.replay", *load, *count, "--replay-mode", "offline", "--report-json", "report.json"]


PEERS = (
    Peer("DynoSim 1.4.2", ("ai-dynamo==1.4.2",), _dynosim),
    Peer("AISimulate", ("--pre", "aisimulate"), None),
)


@dataclass(slots=True)
class Tool:
    """One that runs here: a peer, or this simulator."""

    name: str
    command: Callable[[int], list[str]]
    environment: dict[str, str]
    costs: dict[int, list[Cost]] = field(default_factory=dict)
    """Requests → what every run took."""

    def cpu_s(self, requests: int) -> float:
        """Least CPU seconds of the runs."""
        return min(entry.cpu_s for entry in self.costs[requests])

    def peak_bytes(self, requests: int) -> int:
        """Greatest peak memory of the runs."""
        return max(entry.peak_bytes for entry in self.costs[requests])


def install(peer: Peer, folder: Path) -> Path:
    """Python of the peer's environment, made unless it is there.

    Raises:
        OSError: it cannot be installed, or does not start; with the reason.
    """
    home = folder / peer.name.replace(" ", "-")
    python = home / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not (home / "installed").exists():
        venv.create(home, with_pip=True, clear=True)
        pip = [str(python), "-m", "pip", "install", "-q", *peer.packages]
        done = subprocess.run(pip, capture_output=True, text=True, timeout=_INSTALL_S, check=False)
        if done.returncode:
            lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
            told = [line for line in lines if line.startswith(("ERROR", "The installation of"))]
            raise OSError(f"pip install {' '.join(peer.packages)}: {' '.join(told or lines[-1:])}")
        (home / "installed").touch()
    if peer.arguments is None:
        raise OSError("it installs here, but this benchmark has no command for it; add one to PEERS")
    with tempfile.TemporaryDirectory() as scratch:
        started = subprocess.run(
            [str(python), *peer.arguments(2)], cwd=scratch, env=environment(), timeout=_START_S,
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    if started.returncode:
        lines = started.stderr.strip().splitlines()
        raise OSError(f"two requests end with exit status {started.returncode}: {lines[-1] if lines else ''}")
    return python


def environment(**more: str) -> dict[str, str]:
    """Variables of a run: nobody's packages but its own, and compiled modules kept, as a user has it."""
    dropped = ("PYTHONPATH", "PYTHONDONTWRITEBYTECODE", "PYTHONUNBUFFERED", "VIRTUAL_ENV")
    return {**{name: value for name, value in os.environ.items() if name not in dropped}, **more}


def run(tool: Tool, requests: int, folder: Path) -> None:
    """Run a tool once and note what the operating system counted.

    Raises:
        SystemExit: it fails.
    """
    process = subprocess.Popen(
        tool.command(requests), cwd=folder, env=tool.environment, stdout=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{tool.name} with {requests:,} requests ended with {process.returncode}")
    unit = 1 if sys.platform == "darwin" else 1024
    cost = Cost(usage.ru_utime + usage.ru_stime, usage.ru_maxrss * unit)
    tool.costs.setdefault(requests, []).append(cost)
    print(f"{tool.name}, {requests:,} requests: {cost.cpu_s:.2f} CPU s", flush=True)


def compare(sizes: Sequence[int], repeats: int, environments: Path) -> str:
    """Install, run in turns, and the section as Markdown."""
    refused: list[str] = []
    with tempfile.TemporaryDirectory(prefix="servesim-peers-") as name:
        folder = Path(name)

        def ours(requests: int) -> list[str]:
            flags = [
                *synthetic(folder, requests),
                "--hardware",
                "H100",
                "--output",
                "requests.csv",
                "--no-itl",
            ]
            return [sys.executable, "-m", "servesim", *flags]

        tools = [Tool("servesim", ours, environment(PYTHONPATH=str(ROOT)))]
        for peer in PEERS:
            try:
                python = install(peer, environments)
            except (OSError, subprocess.SubprocessError) as error:
                refused.append(f"{peer.name} does not run here: {error}")
                print(refused[-1], file=sys.stderr)
            else:
                tools.append(Tool(peer.name, partial(_command, python, peer), environment()))
        for requests in sizes:
            synthetic(folder, requests)
            for _ in range(repeats):
                for tool in tools:
                    run(tool, requests, folder)
    return section(tools, sizes, repeats, refused)


def _command(python: Path, peer: Peer, requests: int) -> list[str]:
    assert peer.arguments is not None
    return [str(python), *peer.arguments(requests)]


def _core() -> str:
    return "core compiled" if (ROOT / "servesim" / "_compiled.json").exists() else "pure Python"


def section(tools: Sequence[Tool], sizes: Sequence[int], repeats: int, refused: Sequence[str]) -> str:
    """The measurements as Markdown."""
    ours, *others = tools
    rows = [
        [
            tool.name,
            f"{requests:,}",
            f"{ours.cpu_s(requests) / tool.cpu_s(requests):.2f}",
            f"{ours.peak_bytes(requests) / tool.peak_bytes(requests):.2f}",
        ]
        for tool in others
        for requests in sizes
    ]
    parts = [
        paragraph(
            f"CPU time and peak memory of whole processes of servesim ({_core()}), divided by those of other "
            "simulators: "
            "512 in / 512 out at 10 req/s on one instance, the least CPU time of "
            f"{repeats} runs each, taken in turns, by `python benchmarks/peers.py` on {machine()}. Each "
            "tool has kernel times of its own; this compares what they take, not what they predict."
        )
    ]
    if rows:
        parts.append(table(["servesim divided by", "requests", "CPU time", "peak memory"], rows))
    parts += [paragraph(line) for line in refused]
    return "\n\n".join(parts)


def main() -> int:
    """Compare, and write the section unless it was a quick look."""
    parser = argparse.ArgumentParser(description="CPU time and memory beside other simulators.")
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), help="requests of the runs")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each tool and size")
    default = Path(tempfile.gettempdir()) / "servesim-peers"
    parser.add_argument("--folder", type=Path, default=default, help="where their environments are kept")
    parser.add_argument("--print", action="store_true", dest="printed", help="leave RESULTS.md as it is")
    args = parser.parse_args()
    if min([*args.sizes, args.repeats]) < 1:
        parser.error("--sizes and --repeats must be at least 1")
    args.folder.mkdir(parents=True, exist_ok=True)
    text = compare(args.sizes, args.repeats, args.folder.resolve())
    print(f"\n{text}")
    if not args.printed:
        write_section("peers", text)
        print(f"written: {RESULTS.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
