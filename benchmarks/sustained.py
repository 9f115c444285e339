"""Large matrix products for ten seconds beside a burst: what a GPU holds at its power limit.

    python benchmarks/sustained.py                      bf16 and fp8, 2,048 to 8,192 rows, about two minutes
    python benchmarks/sustained.py --device cpu --seconds 0.2 --rows 64 --dtypes bf16 --width 256

Prints TFLOP/s of the first 20 products and of all of a run. The second belongs into ``sustained_tflops_8bit``
and ``sustained_tflops_16bit`` of the hardware file. Needs PyTorch; fp8 needs a GPU of compute capability 8.9
or later.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

BURST = 20
"""Products of a burst."""


def rates(torch: Any, device: str, dtype: str, rows: int, width: int, seconds: float) -> tuple[float, float]:
    """TFLOP/s of ``[rows, width] x [width, 2 width]`` in a burst and over so many seconds."""
    left = torch.randn(rows, width, device=device).to(torch.bfloat16)
    right = torch.randn(2 * width, width, device=device).to(torch.bfloat16)
    one = torch.ones((), device=device)
    if dtype == "fp8":
        left, right = left.to(torch.float8_e4m3fn), right.to(torch.float8_e4m3fn)
    right = right.t()

    def run(count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            if dtype == "fp8":
                torch._scaled_mm(left, right, one, one, out_dtype=torch.bfloat16)
            else:
                torch.mm(left, right)
        if device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    run(3)
    time.sleep(min(seconds, 2.0))  # cool, and at full clock
    burst_s = run(BURST)
    elapsed, count = 0.0, 0
    while elapsed < seconds:
        elapsed += run(BURST)
        count += BURST
    operations = 2.0 * rows * width * 2 * width / 1e12
    return operations * BURST / burst_s, operations * count / elapsed


def main(argv: list[str] | None = None) -> int:
    """Print a line a dtype and number of rows; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda", help="cuda or cpu (default: cuda)")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each run (default: 10)")
    parser.add_argument("--rows", type=int, nargs="+", default=[2048, 4096, 8192], help="of the products")
    parser.add_argument("--width", type=int, default=8192, help="inner size; the outer is twice that")
    parser.add_argument("--dtypes", nargs="+", choices=("bf16", "fp8"), default=["bf16", "fp8"])
    args = parser.parse_args(argv)
    try:
        import torch
    except ImportError:
        print("PyTorch is not installed; see https://pytorch.org/get-started", file=sys.stderr)
        return 2
    if args.device != "cpu" and not torch.cuda.is_available():
        print("no GPU is visible to PyTorch; --device cpu tries the script out", file=sys.stderr)
        return 2
    print("dtype   rows   burst TFLOP/s   sustained TFLOP/s   ratio")
    for dtype in args.dtypes:
        for rows in args.rows:
            burst, held = rates(torch, args.device, dtype, rows, args.width, args.seconds)
            print(f"{dtype:5}  {rows:5}  {burst:14.4g}  {held:18.4g}  {held / burst:6.3f}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
