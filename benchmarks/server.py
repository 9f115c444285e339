"""What the emulated server holds.

    python benchmarks/server.py [late|speed|abort|soak MINUTES [SPEED]]

late: 256 streams at speed 1, how long after their time tokens go out, and what one costs. speed: 1,000
requests at speed 100. abort: 10,000 streams that clients leave. soak: 64 streams for so many minutes, and the
memory of the server at the end against that after the first tenth.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

SERVE = [
    sys.executable,
    "-m",
    "servesim",
    "serve",
    "--hardware",
    "H100",
    "--model",
    "meta-llama/Llama-3.1-8B",
]
SERVE += ["--tp", "1", "--port", "0"]


class Server:
    """A server in a process of its own."""

    def __init__(self, process: subprocess.Popen[str], url: str) -> None:
        self.process, self.url = process, url
        self.port = int(url.rsplit(":", 1)[1])

    def status(self) -> dict[str, Any]:
        with urllib.request.urlopen(f"{self.url}/servesim") as answer:
            told: dict[str, Any] = json.load(answer)
        return told

    def metric(self, name: str) -> float:
        with urllib.request.urlopen(f"{self.url}/metrics") as answer:
            return float(re.findall(rf"^vllm:{name}{{\S* (\S+)", answer.read().decode(), re.M)[0])

    def resident_mib(self) -> float:
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.findall(r"VmRSS:\s+(\d+)", text)[0]) / 1024

    def cpu_s(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / 100


@contextmanager
def server(*words: str) -> Iterator[Server]:
    process = subprocess.Popen([*SERVE, *words], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    line = next(line for line in process.stdout if "http://" in line)
    try:
        yield Server(process, re.findall(r"http://\S+", line)[0])
    finally:
        process.terminate()
        process.wait(20)


async def stream(
    port: int, prompt: int, tokens: int, leave_after: int | None = None, *, parts: bool = True
) -> int:
    """One call, in ``parts`` or whole; returns the bytes that came. It may leave after so many reads."""
    body = json.dumps({"prompt": [prompt % 1000] * prompt, "max_tokens": tokens, "stream": parts}).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    lines = ["POST /v1/completions HTTP/1.1", "Host: a", "Connection: close", f"Content-Length: {len(body)}"]
    writer.write("\r\n".join([*lines, "", ""]).encode() + body)
    got = reads = 0
    while part := await reader.read(1 << 16):
        got += len(part)
        reads += 1
        if reads == leave_after:
            break
    writer.close()
    with suppress(ConnectionError):
        await writer.wait_closed()
    return got


async def late(run: Server) -> None:
    async def one(number: int) -> None:
        await asyncio.sleep(number * 0.01)
        await stream(run.port, 200, 1000)

    calls = asyncio.gather(*(one(number) for number in range(256)))
    await asyncio.sleep(4)
    cpu_s, tokens, readings = run.cpu_s(), run.metric("generation_tokens_total"), []
    for _ in range(5):  # each of the latest 64 steps, while all streams run
        await asyncio.sleep(1)
        told = await asyncio.to_thread(run.status)
        assert told["open"] == 256, told["open"]
        assert run.metric("num_requests_running") == 256
        readings.append(told["late_ms"])
    cpu_s, tokens = run.cpu_s() - cpu_s, run.metric("generation_tokens_total") - tokens
    medians, p99s = ([f"{each[name]:.2f}" for each in readings] for name in ("median", "p99"))
    print(f"late: median {', '.join(medians)} ms, P99 {', '.join(p99s)} ms in five readings of 256 streams")
    print(f"{1e6 * cpu_s / tokens:.1f} us of CPU a token: {cpu_s:.2f} s for {tokens:.0f} tokens in 5 s")
    await calls


async def paced(port: int) -> None:
    async def one(number: int) -> None:
        await asyncio.sleep(number * 0.005)  # 2 simulated requests a second at speed 100
        await stream(port, 300, 60, parts=False)

    await asyncio.gather(*(one(number) for number in range(1000)))


async def aborted(port: int, count: int) -> None:
    gate = asyncio.Semaphore(64)

    async def one(number: int) -> None:
        async with gate:
            await stream(port, 50 + number % 500, 2000, leave_after=1 + number % 3)

    await asyncio.gather(*(one(number) for number in range(count)))


async def soak(port: int, minutes: float) -> None:
    until = time.monotonic() + 60 * minutes

    async def one(number: int) -> None:
        turn = 0
        while time.monotonic() < until:
            turn += 1
            await stream(port, 100 + (number * 7 + turn * 13) % 700, 150 + (number + turn) % 200)

    await asyncio.gather(*(one(number) for number in range(64)))


def main() -> None:
    """Start a server, put the load on it, and print what was seen."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", nargs="?", choices=("late", "speed", "abort", "soak"), default="late")
    parser.add_argument("minutes", type=float, nargs="?", default=30.0, help="of a soak (default: 30)")
    parser.add_argument("speed", nargs="?", default="1", help="of the server in a soak (default: 1)")
    args = parser.parse_args()
    what, minutes = args.what, args.minutes
    if what == "late":
        with server("--max-num-seqs", "256") as run:
            asyncio.run(late(run))
    elif what == "speed":
        with server("--speed", "100") as run:
            start = time.monotonic()
            asyncio.run(paced(run.port))
            took = time.monotonic() - start
            cpu_s = run.cpu_s()
            print(f"1,000 requests at 200/s: {took:.2f} s for {100 * took:.0f} simulated, {cpu_s:.1f} CPU s")
    elif what == "abort":
        with server() as run:
            asyncio.run(aborted(run.port, 10_000))
            while (told := run.status())["open"]:
                time.sleep(0.1)
            print({key: told[key] for key in ("open", "free_blocks", "usable_blocks", "whole")})
            print(f"{run.resident_mib():.0f} MiB")
    elif what == "soak":
        with server("--speed", args.speed) as run:
            held = []
            for _ in range(10):
                asyncio.run(soak(run.port, minutes / 10))
                held.append(run.resident_mib())
                print(f"{held[-1]:.1f} MiB, {run.metric('generation_tokens_total'):.0f} tokens", flush=True)
            told, grown = run.status(), held[-1] / held[0] - 1
            print(f"{minutes:g} min, 64 streams: {held[0]:.1f} -> {held[-1]:.1f} MiB ({grown:+.1%})")
            print({key: told[key] for key in ("late_ms", "free_blocks", "usable_blocks", "whole")})


if __name__ == "__main__":
    main()
