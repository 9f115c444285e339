"""Record what varied runs write, or compare with an earlier recording: the referee of every rebuilding.

    python -m tests.golden.record_runs --to FOLDER          # record all runs
    python -m tests.golden.record_runs --against FOLDER     # run again, list differences

A run is one process. Digests of its request file, summary, step log and timeline are kept, without what tells
two equal runs apart. Nothing recorded is committed: a recording is made before a change and thrown
away after it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
CONFIGS = sorted(path.stem for path in (ROOT / "configs" / "cluster").glob("*.json") if path.stem != "schema")
EXAMPLE = ["--dataset", "workloads/example_trace.jsonl", "--num-reqs", "120"]
LONG = ["--dataset", "workloads/long_context.jsonl", "--num-reqs", "60"]
SESSIONS = ["--dataset", "workloads/agentic_sessions.jsonl.gz", "--num-reqs", "25"]
CHAT = ["--dataset", "workloads/short_chat.jsonl", "--num-reqs", "150"]
VARIES = ("run_id", "wall_seconds", "wall_s", "date", "created", "versions")
"""Keys of the summary that two equal runs do not share."""


def runs() -> dict[str, list[str]]:
    """Name -> arguments of every recorded run."""
    found: dict[str, list[str]] = {}
    for config in CONFIGS:
        cluster = ["--cluster-config", f"configs/cluster/{config}.json"]
        found[config] = [*cluster, *EXAMPLE, "--request-rate", "20"]
        found[f"{config}-sync"] = [*cluster, *LONG, "--no-async-scheduling"]
    single = ["--cluster-config", "configs/cluster/single_node_single_instance.json"]
    for (load, words), kv in product(
        {"long": LONG, "sessions": SESSIONS, "chat": CHAT}.items(), ("auto", "fp8")
    ):
        found[f"{load}-{kv}"] = [*single, *words, "--kv-cache-dtype", kv]
    for tier in ("CPU", "CXL"):
        config = "two_instances_shared_pool" if tier == "CPU" else "single_node_cxl_pool"
        cluster = ["--cluster-config", f"configs/cluster/{config}.json"]
        found[f"tier-{tier}"] = [*cluster, *SESSIONS, "--prefix-storage", tier]
    two = ["--cluster-config", "configs/cluster/two_instances.json"]
    for policy in ("RR", "RAND", "PREFIX"):
        found[f"route-{policy}"] = [*two, *SESSIONS, "--request-routing-policy", policy]
    found["sticky"] = [*two, *SESSIONS, "--sticky-sessions"]
    found["closed-loop"] = [*single, *CHAT, "--max-concurrency", "12"]
    found["all-at-once"] = [*single, *CHAT, "--request-rate", "inf"]
    found["tiny-budget"] = [*single, *EXAMPLE, "--max-num-batched-tokens", "256", "--max-num-seqs", "24"]
    found["threshold"] = [*single, *LONG, "--long-prefill-token-threshold", "300"]
    found["no-prefix-cache"] = [*single, *SESSIONS, "--no-enable-prefix-caching"]
    found["skip-prefill"] = [*single, *EXAMPLE, "--skip-prefill"]
    found["stepped"] = [*single, *EXAMPLE, "--stepped"]
    found["block-32"] = [*single, *LONG, "--block-size", "32", "--no-reserve-full-isl"]
    for hardware, model in (("H100", "meta-llama/Llama-3.1-8B"), ("B200", "meta-llama/Llama-3.1-8B")):
        found[f"{hardware}-fp8"] = [
            *single,
            *LONG,
            "--hardware",
            hardware,
            "--model",
            model,
            "--dtype",
            "fp8",
        ]
    for policy in ("RAND", "ZIPF", "RR"):
        cluster = ["--cluster-config", "configs/cluster/moe_expert_parallel.json"]
        found[f"experts-{policy}"] = [*cluster, *EXAMPLE, "--expert-routing-policy", policy]
    return found


def outputs(arguments: list[str]) -> dict[str, str]:
    """Name of an output -> digest of what the run wrote, or of how it was refused."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = {
            "output": "r.csv", "summary": "s.json", "steps": "st.csv", "timeline": "t.json",
        }  # fmt: skip
        words = [word for flag, file in files.items() for word in (f"--{flag}", str(folder / file))]
        environment = {**os.environ, "SERVESIM_AUTO_PROFILE": "0", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, "-m", "servesim", *arguments, *words],
            cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            return {"refused": f"{done.returncode}: {done.stderr.splitlines()[-1] if done.stderr else ''}"}
        digests = {}
        for flag, file in files.items():
            text = (folder / file).read_text(encoding="utf-8")
            if flag == "summary":
                text = json.dumps(_lasting(json.loads(text)), indent=1, sort_keys=True)
            digests[flag] = hashlib.sha256(text.encode()).hexdigest()
        return digests


def _lasting(value: Any) -> Any:
    """A summary without what differs between equal runs."""
    if isinstance(value, dict):
        return {key: _lasting(item) for key, item in value.items() if key not in VARIES}
    return [_lasting(item) for item in value] if isinstance(value, list) else value


def main() -> int:
    """Record or compare; the exit status says whether all is as it was."""
    parser = argparse.ArgumentParser(description=__doc__)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--to", type=Path)
    where.add_argument("--against", type=Path)
    parser.add_argument("names", nargs="*", help="some of the runs; all by default")
    args = parser.parse_args()
    chosen = {name: words for name, words in runs().items() if not args.names or name in args.names}
    found = {name: outputs(words) for name, words in chosen.items()}
    if args.to:
        args.to.mkdir(parents=True, exist_ok=True)
        (args.to / "runs.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(
            f"{len(found)} runs recorded, {sum('refused' in one for one in found.values())} of them refused"
        )
        return 0
    before = json.loads((args.against / "runs.json").read_text(encoding="utf-8"))
    different = {
        name: sorted(
            key for key in before.get(name, {}) | one if before.get(name, {}).get(key) != one.get(key)
        )
        for name, one in found.items()
        if before.get(name) != one
    }
    for name, keys in different.items():
        print(f"{name}: {', '.join(keys)}")
    print(f"{len(found) - len(different)} of {len(found)} runs are byte-identical")
    return bool(different)


if __name__ == "__main__":
    sys.exit(main())
