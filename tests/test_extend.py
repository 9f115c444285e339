"""What a stranger adds takes one new file and at most two edited lines elsewhere: done here on a copy."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the package and what its runs read, except the bundles of other hardware."""
    for part in ("servesim", "configs", "workloads"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "profiler" / "models", tmp_path / "profiler" / "models")
    bundle = Path("profiler", "perf", "RTXPRO6000", "meta-llama")
    shutil.copytree(ROOT / bundle, tmp_path / bundle)
    return tmp_path


def edit(path: Path, line: str, *, after: str) -> None:
    """Add one line behind the one that contains ``after``."""
    lines = path.read_text(encoding="utf-8").splitlines()
    (place,) = (number for number, text in enumerate(lines) if after in text)
    lines.insert(place + 1, line)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def run(folder: Path, *arguments: str) -> str:
    """The output of a run of the copy."""
    done = subprocess.run(
        [sys.executable, "-m", "servesim", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_an_output_is_one_file_and_two_lines(copy: Path) -> None:
    (copy / "servesim" / "results" / "slowest.py").write_text(
        "def write(result, path, options, extra):\n"
        "    worst = result.requests['latency'].argmax()\n"
        "    with open(path, 'w') as handle:\n"
        "        handle.write(f\"{result.requests['request_id'][worst]}\\n\")\n"
        "    return [path]\n"
    )
    edit(
        copy / "servesim" / "results" / "outputs.py",
        '    "slowest": "servesim.results.slowest:write",',
        after='"summary": "servesim.results.summary:write_summary"',
    )
    edit(
        copy / "servesim" / "specs" / "options.py",
        '    slowest: Annotated[FilePath | None, Flag("slowest", _OUTPUT, "PATH", writes=(".txt",))] = None',
        after="class RuntimeOptions(",
    )
    out = run(copy, "--num-reqs", "20", "--slowest", "slowest.txt", "--output", "r.csv")
    assert "written        r.csv, slowest.txt" in out
    rows = (line.split(",") for line in (copy / "r.csv").read_text().splitlines()[1:])
    slowest = max(rows, key=lambda row: int(row[7]))
    assert (copy / "slowest.txt").read_text().strip() == slowest[1]


def replace(path: Path, old: str, new: str) -> None:
    """Change the one place where ``old`` stands."""
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1
    path.write_text(text.replace(old, new), encoding="utf-8")


def mean_tpot(folder: Path) -> float:
    run(folder, "--num-reqs", "20", "--summary", "s.json")
    return float(json.loads((folder / "s.json").read_text())["mean_tpot_ms"])


def test_an_attention_kind_is_one_file_and_two_lines(copy: Path) -> None:
    before = mean_tpot(copy)
    (copy / "servesim" / "cost" / "double_attention.py").write_text(
        "from servesim.cost.attention import FullAttention\n\n\n"
        "class DoubleAttention(FullAttention):\n"
        "    def __init__(self, tables, blocks, engine):\n"
        "        super().__init__(tables, 2 * blocks, engine)\n"
    )
    edit(
        copy / "servesim" / "cost" / "attention.py",
        '    "double": "servesim.cost.double_attention:DoubleAttention",',
        after='"full": "servesim.cost.attention:FullAttention"',
    )
    replace(
        copy / "profiler" / "models" / "llama.yaml",
        "attention: {class: Attention, within: LlamaAttention}",
        "attention: {class: Attention, within: LlamaAttention, kind: double}",
    )
    assert mean_tpot(copy) > 1.02 * before
    lines = run(copy, "explain-step", "--decodes", "4", "--kv", "500").splitlines()
    (attention,) = (line.split() for line in lines if line.startswith("attention"))
    assert attention[1] == "64"


def test_a_memory_tier_is_one_file_and_two_lines(copy: Path) -> None:
    cluster = json.loads((copy / "configs" / "cluster" / "single_node_power.json").read_text())
    (node,) = cluster["nodes"]
    node["nvme_mem"] = {"mem_size": 2000, "mem_bw": 14, "mem_latency": 80000}
    node["instances"][0]["num_gpu_blocks"] = 4000
    (copy / "configs" / "cluster" / "with_nvme.json").write_text(json.dumps(cluster))
    edit(
        copy / "servesim" / "specs" / "memories.py",
        '    "nvme": MemoryKind("node", "nvme_mem"),',
        after='"cxl": MemoryKind(',
    )
    edit(
        copy / "servesim" / "specs" / "cluster.py",
        "    nvme_mem: memories.MemorySpec | None = None",
        after="cpu_mem: memories.CpuMemory",
    )
    sessions = ["--dataset", "workloads/agentic_sessions.jsonl.gz", "--num-reqs", "40"]
    flags = ["--cluster-config", "configs/cluster/with_nvme.json", "--prefix-storage", "NVME", "--summary"]
    out = run(copy, *sessions, *flags, "s.json")
    assert "  NVME tier: 16384000 tokens / 64000 chunks of 256 (2000.00 GiB), read at 14 GB/s" in out
    assert "bits moved to and from nvme_mem not charged" in out
    cache = json.loads((copy / "s.json").read_text())["prefix_cache"]
    assert cache["storage"] == "NVME"
    assert cache["storage_hit_tokens"] > 0
    # in placement rules as well
    node["instances"][0]["placement"] = {"blocks": [{"blocks": "0-3", "weights": "nvme"}]}
    (copy / "configs" / "cluster" / "with_nvme.json").write_text(json.dumps(cluster))
    out = run(copy, *flags[:2], "--num-reqs", "3")
    assert "  nvme      weights 1.63 of 2000.00 GiB" in out


def test_a_queue_policy_is_one_file_and_two_lines(copy: Path) -> None:
    lengths = (400, 900, 100, 600)
    rows = ({"input_toks": n, "output_toks": 4, "arrival_time_ns": 0} for n in lengths)
    (copy / "w.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def order(*words: str) -> list[int]:
        """Requests by the time of their first token."""
        run(copy, "--dataset", "w.jsonl", "--max-num-seqs", "1", "--output", "r.csv", *words)
        header, *rows = ((copy / "r.csv").read_text()).splitlines()
        at = header.split(",").index("TTFT")
        ttft = [float(row.split(",")[at]) for row in rows]
        return sorted(range(len(ttft)), key=ttft.__getitem__)

    assert order() == [0, 1, 2, 3]
    (copy / "servesim" / "engine" / "shortest_first.py").write_text(
        "from servesim.engine.queue_policy import FirstComeFirstServed\n\n\n"
        "class ShortestFirst(FirstComeFirstServed):\n"
        "    def add(self, waiting, state):\n"
        "        place = sum(other.prompt_tokens <= state.prompt_tokens for other in waiting)\n"
        "        waiting.insert(place, state)\n"
    )
    edit(
        copy / "servesim" / "engine" / "queue_policy.py",
        '    "shortest": "servesim.engine.shortest_first:ShortestFirst",',
        after='"fcfs": "servesim.engine.queue_policy:FirstComeFirstServed"',
    )
    replace(
        copy / "servesim" / "specs" / "engine_options.py",
        '("fcfs", "priority")',
        '("fcfs", "priority", "shortest")',
    )
    assert order("--scheduling-policy", "shortest") == [2, 0, 3, 1]


def test_a_router_policy_is_one_file_and_two_lines(copy: Path) -> None:
    (copy / "servesim" / "engine" / "last_first.py").write_text(
        "def last(request, candidates):\n    return candidates[-1]\n"
    )
    edit(
        copy / "servesim" / "engine" / "router.py",
        '    "LAST": "servesim.engine.last_first:last",',
        after="ROUTING_POLICIES = {",
    )
    replace(
        copy / "servesim" / "specs" / "options.py",
        '("LOAD", "RR", "RAND", "PREFIX")',
        '("LOAD", "RR", "RAND", "PREFIX", "LAST")',
    )
    two = ["--cluster-config", "configs/cluster/two_instances.json", "--num-reqs", "5", "--output", "r.csv"]
    run(copy, *two, "--request-routing-policy", "LAST")
    rows = (copy / "r.csv").read_text().splitlines()[1:]
    assert {row.split(",")[0] for row in rows} == {"1"}


def test_a_workload_format_is_one_file_and_one_line(copy: Path) -> None:
    (copy / "w.jsonl").write_text('{"question": 300, "answer": 20}\n{"question": 200, "answer": 10}\n')
    (copy / "servesim" / "workload" / "questions.py").write_text(
        "import json\n\n"
        "from servesim.workload.request import Request, Workload\n\n\n"
        "def load(source, lines, loading):\n"
        "    rows = [json.loads(line) for _, line in lines]\n"
        "    requests = [Request(i, r['question'], r['answer'], 0) for i, r in enumerate(rows)]\n"
        "    return Workload(requests, source)\n"
    )
    edit(
        copy / "servesim" / "workload" / "formats.py",
        '    Format("questions", "questions:load", _all("question", "answer")),',
        after="FORMATS = (",
    )
    assert "2 requests, 500 input + 30 output tokens" in run(copy, "--dataset", "w.jsonl")


def test_a_model_family_is_one_file(copy: Path) -> None:
    config = json.loads((copy / "configs" / "model" / "meta-llama" / "Llama-3.1-8B.json").read_text())
    (copy / "mine.json").write_text(json.dumps({**config, "model_type": "mine"}))
    (copy / "servesim" / "specs" / "families" / "mine.py").write_text(
        "from servesim.specs.families.stack import Style, standard\n\n\n"
        "def stack(fields):\n"
        "    return standard(fields, style=Style())\n\n\n"
        'FAMILIES = {"mine": stack}\n'
    )
    run(copy, "profile", "mine.json", "--hardware", "NPU-X", "--source", "roofline")
    assert "3 completed" in run(copy, "--model", "mine.json", "--hardware", "NPU-X", "--num-reqs", "3")


def test_a_source_of_kernel_times_is_one_file_and_one_line(copy: Path) -> None:
    (copy / "servesim" / "profiler" / "slow.py").write_text(
        "from servesim.profiler.roofline.meter import RooflineMeter\n\n\n"
        "class SlowMeter(RooflineMeter):\n"
        "    def attention_us(self, batches):\n"
        "        return [2 * us for us in super().attention_us(batches)]\n"
    )
    edit(
        copy / "servesim" / "profiler" / "sources.py",
        '    "slow": Source("slow", letter="C", computes=True, home="servesim.profiler.slow:SlowMeter"),',
        after="SOURCES = {",
    )
    for source in ("roofline", "slow"):
        model = ("meta-llama/Llama-3.1-8B", "--hardware", "NPU-X", "--output-root", source)
        run(copy, "profile", *model, "--source", source)
    tables = [
        (copy / source / "NPU-X" / "meta-llama" / "Llama-3.1-8B" / "bf16" / "tp1" / "attention.csv")
        for source in ("roofline", "slow")
    ]
    one, two = (float(table.read_text().splitlines()[-1].split(",")[-1]) for table in tables)
    assert two == pytest.approx(2 * one, rel=0.01)
