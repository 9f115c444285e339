"""``python -m tests.fuzz --runs 20000 --seed 1``: thousands of spoilt inputs, none of which may find a fault.

A case has its number; ``--only NUMBER`` runs one again, and ``--keep FOLDER`` leaves its files there.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import sys
import time
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

HANG_S = 300.0
"""Wall time after which a case that not even a signal can stop ends everything."""


def fuzz(runs: int, seed: int, first: int = 0, keep: Path | None = None, stop_after: int = 10) -> list[str]:
    """Run cases ``first`` to ``first + runs - 1``; returns those with faults, at most ``stop_after``."""
    from tests.fuzz.cases import make_case
    from tests.fuzz.judge import judge

    found: list[str] = []
    statuses: Counter[str] = Counter()
    started = time.perf_counter()
    for index in range(first, first + runs):
        case = make_case(seed, index)
        faulthandler.dump_traceback_later(HANG_S, exit=True)
        outcome = judge(case, keep)
        faulthandler.cancel_dump_traceback_later()
        statuses[f"{case.kind} {outcome.status}"] += 1
        if outcome.faults or keep:
            command = f"python -m tests.fuzz --seed {seed} --only {index}"
            text = (
                f"{command}   ({case.kind})\n  servesim {' '.join(map(repr, case.argv))}\n  "
                + "\n  ".join(outcome.faults)
            )
            print(text + (f"\n  {outcome.stderr[:2000]}" if keep else ""), flush=True)
            if outcome.faults:
                found.append(text)
        if len(found) >= stop_after:
            break
    taken_s = time.perf_counter() - started
    print(f"{sum(statuses.values())} cases, {len(found)} with faults, {taken_s:.0f} s")
    print(", ".join(f"{name}: {count}" for name, count in sorted(statuses.items())))
    return found


def main() -> int:
    """Exit status 1 when a case found a fault."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--runs", type=int, default=1000, metavar="N", help="cases (default: 1000)")
    parser.add_argument("--seed", type=int, default=1, help="the same seed makes the same cases (default: 1)")
    parser.add_argument(
        "--first", type=int, default=0, metavar="N", help="number of the first case (default: 0)"
    )
    parser.add_argument("--only", type=int, metavar="N", help="run this case alone")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="run in this folder and leave the files")
    parser.add_argument("--stop-after", type=int, default=10, metavar="N", help="faults (default: 10)")
    args = parser.parse_args()
    os.environ["SERVESIM_AUTO_PROFILE"] = "0"
    with TemporaryDirectory() as data:
        os.environ["XDG_DATA_HOME"] = data
        from tests.fuzz.judge import limit_memory
        from tests.fuzz.world import recording

        recording()
        limit_memory()
        runs, first = (args.runs, args.first) if args.only is None else (1, args.only)
        return 1 if fuzz(runs, args.seed, first, args.keep, args.stop_after) else 0


if __name__ == "__main__":
    sys.exit(main())
