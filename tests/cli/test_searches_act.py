"""Every flag of the commands that search, serve, follow, profile and make workloads changes what comes of
them, or is refused where it cannot.

``run`` and the commands that print tables have their own files beside this one. The flags are read from the
parsers: a new one without an entry fails.
"""

from __future__ import annotations

import argparse
import json
import shutil
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from shlex import split
from typing import TYPE_CHECKING, Any

import pytest

from servesim.__main__ import COMMANDS, Parser, main
from servesim.api import simulate
from servesim.bench.twin import save_scrapes
from servesim.cli import serve
from servesim.cli.bench import ACTIONS
from servesim.specs.options import RuntimeOptions, from_namespace
from tests.bench import recordings
from tests.cost.bundles import HARDWARE
from tests.engine.toy_world import DENSE, MOE, toy_cluster, toy_instance, toy_world
from tests.server.serving import serving
from tests.server.test_twin import watched

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[2]
EXPERTS = "Qwen/Qwen3-30B-A3B"
COMMON = "--cluster-config one.json --dataset plain.jsonl"
MOE_LINE = (
    f"={EXPERTS} --hardware H100 --source silicon --output-root out --max-kv 256 --max-num-batched-tokens 32"
)
LINES = {
    "slo": f"--slo ttft:12 {COMMON} --patterns 1 --no-kernel-error",
    "sweep": f"--grid '--max-num-seqs 2,4' {COMMON} --output out/sweep.csv",
    "plan": f"--model {DENSE} --slo ttft:60 --dataset plain.jsonl --prices prices.yaml --max-gpus 2 "
    f"--grid '--hardware {HARDWARE} --tp 1,2 --prefill-share 0 --kv-cache-dtype auto --max-num-seqs 8 "
    "--max-num-batched-tokens 256'",
    "serve": "--cluster-config one.json --speed 1000",
    "twin": "scrapes.jsonl --cluster-config one.json --json",
    "bench validate": "recorded",
    "bench calibrate": "recorded --output out/host.yaml",
    "workload synth": "--output out/made.jsonl",
    "workload describe": "chats.jsonl",
    "workload convert": "plain.jsonl --output out/made.jsonl",
    "profile": "Qwen/Qwen3-0.6B --hardware H100 --source roofline --output-root out --max-kv 256 "
    "--max-num-batched-tokens 32 --max-num-seqs 16",
    "profile inspect": f"{HARDWARE}/{DENSE}/bf16",
    "profile diff": f"{HARDWARE}/{DENSE}/bf16 {HARDWARE}/{DENSE}/other",
    "explain-step": "--decodes 64 --kv 4000",
}
"""Command -> a line that is complete."""
LOADING = {
    "--num-reqs": "--num-reqs 2",
    "--lenient": "=bad.jsonl --lenient OUT",
    "--request-rate": "--request-rate 5",
    "--seed": "=once.jsonl --request-rate 5 --seed 7 OUT",
    "--estimate-tokens": "=texts.jsonl --estimate-tokens 2 OUT",
    "--columns": "=named.csv --columns input=a,output=b OUT",
}
ACTS: dict[str, dict[str, str]] = {
    "slo": {
        "--slo": "--slo ttft:30",
        "--goodput": "--goodput 0.5",
        "--by": "--by concurrency",
        "--precision": "--precision 0.3",
        "--patterns": "--patterns 3",
        "--kernel-error": "--kernel-error",
        "--json": "--json",
        "--plot": "--plot out/limit.svg",
        "--report": "--report out/limit.html",
        "--plots": "--plots out/charts",
    },
    "sweep": {
        "--grid": "--grid '--block-size 16,32'",
        "--constraint": "--constraint 'max_num_seqs < 3'",
        "--slo": "--slo ttft:5",
        "--output": "--output out/other.csv",
        "--journal": "--journal out/kept.jsonl",
        "--report": "--report out/sweep.html",
        "--plots": "--plots out/charts",
    },
    "plan": {
        "--model": f"--model {MOE}",
        "--slo": "--slo ttft:70",
        "--goodput": "--goodput 0.5",
        "--rates": "--rates 5,50",
        "--grid": "--grid '--tp 1'",
        "--max-gpus": "--max-gpus 1",
        "--objective": "--objective energy",
        "--prices": "--prices dear.yaml",
        "--exhaustive": "--exhaustive",
        "--output": "--output out/plan",
        "--json": "--json",
        "--report": "--report out/plan.html",
        "--plots": "--plots out/charts",
    },
    "serve": {
        "--speed": "--speed 500",
        "--api-key": "--api-key sk",
        "--served-model-name": "--served-model-name another",
        "--lora-modules": "--enable-lora --lora-modules adapter",
        "--tokenizer": "--tokenizer tokenizer.json",
        "--output-tokens": "--output-tokens echo",
        "--max-body-mib": "--max-body-mib 1",
    },
    "twin": {
        "--requests": "--requests plain.jsonl",
        "--what-if": "--what-if 'two: --dp 2'",
        "--json": "--json out/twin.json",
    },
    "bench validate": {
        "--cluster-config": "--cluster-config slower.json",
        "--dataset": "--dataset sent.jsonl",
        "--arrivals": "--dataset sent.jsonl --arrivals recording",
        "--anchor": "--anchor arrival",
        "--bundles": "--bundles elsewhere",
        "--link-unit": "--link-unit GiB",
        "--calibration": "--calibration host.yaml",
        "--margin": "--margin 50",
        "--json": "--json out/agreement.json",
        "--plots": "--plots out/charts",
        "--report": "--report out/agreement.html",
    },
    "bench calibrate": {
        "--output": "--output out/other.yaml",
        "--machine": "--machine here",
    },
    "workload synth": {
        "--like": "--like chats.jsonl",
        "--num-reqs": "--num-reqs 5",
        "--duration": "--like chats.jsonl --duration 2",
        "--rate": "--rate 5",
        "--arrival": "--arrival uniform",
        "--cv": "--arrival gamma --cv 3",
        "--burst-size": "--arrival burst --burst-size 4",
        "--input-len": "--input-len 50",
        "--output-len": "--output-len 50",
        "--prefix-groups": "--prefix-groups 2",
        "--prefix-len": "--prefix-groups 2 --prefix-len 50",
        "--prefix-share": "--prefix-groups 2 --prefix-share 0.5",
        "--sessions": "--sessions",
        "--turns": "--sessions --turns 3",
        "--tool-time": "--sessions --tool-time 1",
        "--vocab-size": "--vocab-size 100",
        "--seed": "--seed 7",
        "--ids": "--ids",
        "--no-ids": "--no-ids",
        "--output": "--output out/made.jsonl.gz",
    },
    "workload describe": {
        **LOADING,
        "--block-size": "--block-size 64",
        "--json": "--json",
    },
    "workload convert": {**LOADING, "--output": "--output out/other.jsonl"},
    "profile": {
        "--hardware": "--hardware H200",
        "--source": "--source silicon",
        "--dtype": "--dtype fp8",
        "--kv-cache-dtype": "--kv-cache-dtype fp8",
        "--kv-cache-dtype-skip-layers": "--kv-cache-dtype fp8 --kv-cache-dtype-skip-layers 0",
        "--tp": "--tp 1,2",
        "--max-num-batched-tokens": "--max-num-batched-tokens 128",
        "--max-num-seqs": "--max-num-seqs 32",
        "--max-kv": "--max-kv 2048",
        "--collectives": "--tp 2 --collectives none",
        "--output-root": "--output-root out/elsewhere",
        "--fp8-scaling": "--source silicon --dtype fp8 --fp8-scaling block",
        "--expert-load": f"{MOE_LINE} --expert-load power_law_1.2",
    },
    "profile inspect": {"--tp": "--tp 2", "--plots": "--plots out/charts"},
    "profile diff": {"--tp": "--tp 2", "--json": "--json"},
    "explain-step": {
        "--instance": "--kv 100 --cluster-config unequal.json --instance 1",
        "--chunks": "--chunks 64@32",
        "--decodes": "--decodes 80",
        "--kv": "--kv 200",
        "--kv-max": "--kv-max 60000",
        "--kv-min": "--kv-max 8000 --kv-min 3900",
    },
}
"""Command -> flag -> words that change what comes of the line."""
BEFORE = {
    **{
        ("workload " + action, flag): words
        for action in ("describe", "convert")
        for flag, words in (
            ("--lenient", "=bad.jsonl OUT"),
            ("--estimate-tokens", "=texts.jsonl OUT"),
            ("--columns", "=named.csv OUT"),
            ("--seed", "=once.jsonl --request-rate 5 OUT"),
        )
    },
    ("slo", "--patterns"): "--effort full",
    ("bench validate", "--arrivals"): "--dataset sent.jsonl",
    ("workload synth", "--duration"): "--like chats.jsonl",
    ("workload synth", "--cv"): "--arrival gamma",
    ("workload synth", "--burst-size"): "--arrival burst",
    ("workload synth", "--prefix-len"): "--prefix-groups 2",
    ("workload synth", "--prefix-share"): "--prefix-groups 2",
    ("workload synth", "--turns"): "--sessions",
    ("workload synth", "--tool-time"): "--sessions",
    ("workload synth", "--ids"): "--no-ids",
    ("profile", "--collectives"): "--tp 2",
    ("profile", "--fp8-scaling"): "--source silicon --dtype fp8",
    ("profile", "--expert-load"): MOE_LINE,
    ("explain-step", "--instance"): "--kv 100 --cluster-config unequal.json",
    ("explain-step", "--kv-min"): "--kv-max 8000",
}
"""What the line has before the words, where the flag needs something beside it."""
EXTRAS = {
    **dict.fromkeys(("--plot", "--plots"), ("matplotlib",)),
    "--tokenizer": ("tokenizers",),
}
CANNOT = {
    "slo": [
        "--request-rate 5",
        "--by concurrency --max-concurrency 4",
        "--patterns 0",
        "--precision 0",
        "--json one.json",
    ],
    "sweep": [
        "--trials 5",
        "--goal tpot:min",
        "--journal out/sweep.csv",
        "--output one.json",
        "--journal named.csv",
        "--journal /dev/null/rows",
    ],
    "plan": ["--output plain.jsonl", "--output /dev/null/plan"],
    "serve": [
        "--virtual-time 2 --speed 2",
        "=--cluster-config one.json --kv-events-replay tcp://127.0.0.1:1",
    ],
    "twin": ["--for 3", "--every 3", "--save out/scrapes.jsonl", "--api-key k", "--json one.json"],
    "bench validate": ["--arrivals workload", "=single --link-unit GiB", "--json recorded/meta.json"],
    "workload synth": [
        "--duration 3",
        "--cv 3",
        "--burst-size 3",
        "--prefix-len 3",
        "--prefix-share 0.5",
        "--turns 3",
        "--tool-time 3",
        "--no-ids --vocab-size 50",
        "--rate inf --arrival gamma",
        "--like chats.jsonl --sessions",
        "--arrival uniform --input-len 9 --output-len 9 --no-ids --seed 7",
        "=--like chats.jsonl --output chats.jsonl",
    ],
    "workload describe": ["--seed 7", "--tokenizer tokenizer.json", "--estimate-tokens 2"],
    "workload convert": [
        "--seed 7",
        "--tokenizer tokenizer.json",
        "--estimate-tokens 2",
        "=plain.jsonl --output plain.jsonl",
    ],
    "profile": [
        "--output-root plain.jsonl",
        "--output-root /dev/null/bundles",
        "--fp8-scaling block",
        "--dtype fp8 --fp8-scaling block",
        "--expert-load power_law_1.2",
        f"{MOE_LINE} --source roofline --expert-load power_law_1.2",
        "--collectives measured",
        "--only dense",
        "--budget-s 5",
        "--iterations 7",
        "--chunk-factor 3",
        "--decode-factor 3",
        "--kv-factor 3",
        "--token-factor 3",
        "--skew-factor 3",
        "--no-skew",
        "--device cpu",
        "--attention sdpa",
        "--warm-cache",
        "--cuda-graphs",
        "--kv-memory-gib 1",
        "--threads 1",
    ],
    "explain-step": ["= --decodes 5", "--chunks 8@0 --decodes 0 --kv 5", "--kv-max 5", "--kv-min 5000"],
}
"""Command -> words that are refused: their flag (the last of them) could not act."""
ELSEWHERE = {
    "slo": {"--effort"},
    "sweep": {"--jobs", "--ray", "--optimizer", "--trials", "--goal"},
    "serve": {"--host", "--port", "--virtual-time", "--max-open", "--kv-events", "--kv-events-replay"},
    "twin": {"--for", "--every", "--save", "--api-key"},
    "bench calibrate": {
        *("--cluster-config", "--dataset", "--arrivals", "--anchor", "--bundles", "--link-unit"),
    },
    "workload describe": {"--tokenizer"},
    "workload convert": {"--tokenizer"},
    "profile": {
        *("--force", "--only", "--budget-s", "--iterations", "--no-skew", "--skew-factor"),
        *("--chunk-factor", "--decode-factor", "--kv-factor", "--token-factor"),
        *("--device", "--attention", "--warm-cache", "--cuda-graphs", "--kv-memory-gib", "--threads"),
    },
}
"""Flags with tests of their own: other processes, servers that hang, machines that measure."""


def own_flags(command: str) -> set[str]:
    """The flags of a command by its parser, without those of ``run``, which leave no default."""
    parser = Parser(prog="servesim")
    group, _, action = command.partition(" ")
    if group == "bench":
        import_module(ACTIONS[action][0]).add_arguments(parser)
    else:
        commands = parser.add_subparsers()
        import_module(COMMANDS[command if command in COMMANDS else group][0]).add_parser(commands)
        parser = commands.choices[command if command in COMMANDS else group]
        if group == "workload":
            actions = next(each for each in parser._actions if isinstance(each.choices, dict))
            parser = actions.choices[action]  # type: ignore[index]
    return {
        next(flag for flag in each.option_strings if flag.startswith("--"))
        for each in parser._actions
        if each.option_strings and (each.default is not argparse.SUPPRESS or group == "workload")
    } - {"--help"}


@pytest.mark.parametrize("command", LINES)
def test_every_flag_has_an_entry(command: str) -> None:
    elsewhere = ELSEWHERE.get(command, set())
    assert own_flags(command) == set(ACTS[command]) | elsewhere
    assert elsewhere.isdisjoint(ACTS[command])


@pytest.fixture(scope="module", autouse=True)
def toys(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with toy_world(tmp_path_factory.mktemp("toys")) as root:
        _write_workloads(root)
        _write_clusters(root)
        _write_recordings(root)
        _write_tokenizer(root)
        shutil.copytree(f"profiler/perf/{HARDWARE}/{DENSE}/bf16", f"profiler/perf/{HARDWARE}/{DENSE}/other")
        for name, price in (("prices", 1.0), ("dear", 9.0)):
            gpus = {HARDWARE: {"per_hour": price, "watts": 300, "idle_watts": 30}}
            Path(f"{name}.yaml").write_text(json.dumps({"as_of": "2026-01-01", "gpus": gpus}))
        Path(f"configs/hardware/{HARDWARE}.yaml").parent.mkdir(parents=True, exist_ok=True)
        Path(f"configs/hardware/{HARDWARE}.yaml").write_text(
            "memory_gib: 1\nmemory_bandwidth_gbs: 1000\nlink: {bandwidth_gbs: 100, latency_us: 2}\n"
        )
        yield


def _write_workloads(root: Path) -> None:
    plain = [
        {
            "input_toks": 40 + 9 * i,
            "output_toks": 6,
            "arrival_time_ns": i * 10**7,
            "input_tok_ids": [i] * (40 + 9 * i),
        }
        for i in range(12)
    ]
    turns = [
        {"input_toks": 30 * n, "output_toks": 5, "tool_duration_ns": 10**6, "input_tok_ids": [7] * 30 * n}
        for n in (1, 2)
    ]
    chats = [{"session_id": f"s{i}", "arrival_time_ns": i * 10**7, "sub_requests": turns} for i in range(6)]
    texts = [{"prompt": "as long as that " * 20, "output_tokens": 5}] * 3
    for name, entries in (
        ("plain", plain),
        ("chats", chats),
        ("texts", texts),
        ("once", [{**each, "arrival_time_ns": 0} for each in plain]),
        ("bad", [*plain, {"input_toks": -1}]),
    ):
        (root / f"{name}.jsonl").write_text("\n".join(map(json.dumps, entries)) + "\n")
    (root / "named.csv").write_text("a,b,when\n10,3,0\n20,4,1\n")


def _write_clusters(root: Path) -> None:
    roomy = {key: value for key, value in toy_instance().items() if key != "num_gpu_blocks"}
    for name, instances in (("one", [roomy]), ("unequal", [roomy, {**roomy, "tp_size": 2, "num_npus": 2}])):
        (root / f"{name}.json").write_text(json.dumps(toy_cluster(instances)))


def _write_recordings(root: Path) -> None:
    options = RuntimeOptions(max_num_seqs=16, max_num_batched_tokens=1024, dtype="bfloat16")
    sent = recordings.workload(20, gap_ms=5)
    for name, stages in (("recorded", 2), ("single", 1)):
        described = recordings.cluster(pp_size=stages, num_npus=stages)
        result = simulate(described, sent, options)
        given = recordings.arguments(pipeline_parallel_size=stages)
        late = [{**row, "arrival_time": row["arrival_time"] - 0.002} for row in recordings.rows(result)]
        recordings.write(root / name, late, meta={"engine_kwargs": given}, config=described)
    slower = recordings.cluster(pp_size=2, num_npus=2)
    slower["link_bw"] = 1
    (root / "slower.json").write_text(json.dumps(slower))
    for request in sent:
        request.arrival_ns *= 2
    recordings.write_workload(root / "sent.jsonl", sent)
    (root / "host.yaml").write_text(
        "name: RTXPRO6000\nmemory_gib: 96\nmemory_bandwidth_gbs: 1597\n"
        "engine: {decode_step_overhead_us: 900}\n"
    )
    shipped = ROOT / "profiler/perf" / "RTXPRO6000" / recordings.MODEL / "bf16"
    shutil.copytree(shipped, root / "elsewhere/RTXPRO6000" / recordings.MODEL / "bf16")
    save_scrapes(root / "scrapes.jsonl", watched(20, 8.0))


def _write_tokenizer(root: Path) -> None:
    with suppress(ImportError):  # the test that needs it is skipped
        from tokenizers import Tokenizer
        from tokenizers.models import WordLevel

        tokenizer = Tokenizer(WordLevel({"as": 0, "?": 1}, unk_token="?"))
        tokenizer.save(str(root / "tokenizer.json"))


def outcome(
    command: str, words: str, capsys: pytest.CaptureFixture[str], *, acts: bool = True
) -> dict[str, Any]:
    """What a command printed and wrote; ``words`` that begin with = are the whole line."""
    shutil.rmtree("out", ignore_errors=True)
    Path("out").mkdir()
    line = words[1:] if words.startswith("=") else f"{LINES[command]} {words}"
    line = line.replace("OUT", "--output out/made.jsonl" if command == "workload convert" else "")
    if command == "serve" and acts:
        return {"status": 0, "error": "", "out": _served(line)}
    try:
        status: Any = main([*command.split(), *split(line)])
    except SystemExit as left:
        status = left.code
    printed = capsys.readouterr()
    files = {str(path): path.read_bytes() for path in sorted(Path("out").rglob("*")) if path.is_file()}
    return {"status": status, "out": printed.out, "files": files, "error": printed.err}


def _served(line: str) -> Any:
    """What a server says of itself, and answers."""
    parser = Parser(prog="servesim")
    serve.add_parser(parser.add_subparsers(dest="command"))
    args = parser.parse_args(["serve", *split(line)])
    serve.check(args)
    _, about, notes = serve.build_app(args, from_namespace(args))
    with serving(line) as server:
        body: dict[str, Any] = {"prompt": "as long as that", "max_tokens": 9}
        answers = [
            server.post("/v1/completions", {**body, **more})
            for more in ({}, {"model": "adapter"}, {"prompt": "as " * (1 << 19)})
        ]
        models = server.post("/v1/chat/completions", {"model": "no", "messages": []})
    for _, answer in answers:
        for name in ("id", "created"):
            answer.pop(name, None)
    return about, notes, answers, models


@pytest.mark.parametrize("command", LINES)
def test_the_outcome_is_the_same_twice(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Else what follows would see differences that no flag made."""
    first = _usual(command, "", capsys)
    assert first["status"] == 0, first["error"]
    assert outcome(command, "", capsys) == first


@pytest.mark.parametrize(
    ("command", "flag"), [(command, flag) for command, table in ACTS.items() for flag in table]
)
def test_the_flag_changes_what_comes(command: str, flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    for extra in EXTRAS.get(flag, ()):
        pytest.importorskip(extra)
    words, before = ACTS[command][flag], BEFORE.get((command, flag), "")
    if "--source silicon" in f"{before} {words}":
        pytest.importorskip("aiconfigurator_core")
    usual, changed = _usual(command, before, capsys), outcome(command, words, capsys)
    needed = flag in ("--lenient", "--estimate-tokens", "--columns")
    assert usual["status"] == (2 if needed else 0), usual["error"]
    assert changed["status"] in (0, 1), changed["error"]
    seen = ("out", "files")
    assert [changed.get(name) for name in seen] != [usual.get(name) for name in seen]


_KNOWN: dict[tuple[str, str], dict[str, Any]] = {}


def _usual(command: str, before: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The outcome without the flag, which many flags are held against."""
    if (command, before) not in _KNOWN:
        _KNOWN[command, before] = outcome(command, before, capsys)
    return _KNOWN[command, before]


@pytest.mark.parametrize(
    ("command", "words"), [(command, words) for command, lines in CANNOT.items() for words in lines]
)
def test_a_flag_that_cannot_act_is_refused(
    command: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    told = outcome(command, words, capsys, acts=False)
    flag = [word for word in words.split() if word.startswith("--")][-1]
    assert told["status"] == 2, told["out"]
    assert flag in told["error"]


def test_charts_that_nothing_is_in_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    told = outcome("slo", f"--slo ttft:1000000 {COMMON} --plots out/charts", capsys)
    assert told["status"] == 0
    assert told["files"] == {}
    assert "--plots out/charts: there is nothing to draw" in told["error"]


def test_a_checkpoints_own_kv_format_is_profiled(capsys: pytest.CaptureFixture[str]) -> None:
    """``auto`` means the same to ``profile`` and ``support`` as to the run that reads the bundle."""
    folder = Path("quantised")
    folder.mkdir()
    config = json.loads((ROOT / "configs/model/Qwen/Qwen3-0.6B.json").read_text())
    (folder / "config.json").write_text(json.dumps(config))
    formats = {"quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}}
    (folder / "hf_quant_config.json").write_text(json.dumps(formats))
    assert main(["support", "quantised", "--hardware", "H100"]) == 0
    assert "quantised on H100, fp8-kvfp8, tp 1" in capsys.readouterr().out
    small = [
        "--max-kv",
        "256",
        "--max-num-batched-tokens",
        "32",
        "--max-num-seqs",
        "16",
        "--output-root",
        "out",
    ]
    words = ["profile", "quantised", "--hardware", "H100", "--source", "roofline", *small]
    assert main(words) == 0
    assert "/fp8-kvfp8: tp1" in capsys.readouterr().out
    assert main([*words, "--kv-cache-dtype", "bfloat16"]) == 0
    assert "/fp8: tp1" in capsys.readouterr().out


def test_the_twin_tells_what_does_not_act(capsys: pytest.CaptureFixture[str]) -> None:
    """Its requests are drawn by the seed, which acts; priorities are not known to a counter."""
    line = "scrapes.jsonl --cluster-config one.json"
    told = outcome("twin", f"={line} --seed 7 --scheduling-policy priority", capsys)
    assert told["status"] == 0, told["error"]
    assert "note: --scheduling-policy priority has no effect here" in told["out"]
    assert "--seed" not in told["out"]


NOTED = "--scheduling-policy priority has no effect here"


@pytest.mark.parametrize("command", ["slo", "sweep", "plan", "twin", "bench validate"])
def test_what_does_not_act_is_told_by_every_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Priorities that no request has: noted by a run, and by whatever runs runs."""
    words = "--scheduling-policy priority"
    if command == "twin":
        words = f"=scrapes.jsonl --cluster-config one.json {words}"
    told = outcome(command, words, capsys)
    assert told["status"] == 0, told["error"]
    assert NOTED in " ".join(told["out"].split())
