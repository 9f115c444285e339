"""Cases: the files of a small world with something spoilt, and the command that reads them."""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import yaml
import zstandard

from servesim.specs import paths
from servesim.specs.flags import base_type, choices_of, flag_name, flag_of
from servesim.specs.options import RuntimeOptions, output_fields
from tests.cost.bundles import HARDWARE, MODEL
from tests.fuzz import world
from tests.fuzz.mutate import NUMBERS, WORDS, json_text, junk, mutated, spoilt_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

OUTPUTS = {
    "--output": "out.csv",
    "--summary": "out.json",
    "--steps": "steps.csv",
    "--timeline": "line.json",
    "--save-result": "result.json",
    "--report": "page.html",
}
# Written where the case says, or read from where it says: none of these may lead out of its folder.
_NO_RANDOM_FLAG = {
    *(*output_fields(), "dataset", "tokenizer"),
    *("log_level", "auto_profile", "ensemble"),
}
SMALL = ("0", "1", "2", "3", "7", "16", "64", "100000")
POLICIES = ("LOAD", "RR", "RAND", "PREFIX", "ZIPF", "BALANCED", "json:loads", "nosuch:f", "math:floor", "x")


@dataclass
class Case:
    """What one run is given."""

    kind: str
    files: dict[str, bytes]
    argv: list[str] = field(default_factory=list)


def make_case(seed: int, index: int) -> Case:
    """The case of this number; the same seed and number make the same case."""
    rng = Random(f"servesim:{seed}:{index}")
    kind = rng.choice(list(KINDS))
    case = Case(kind, dict(world.sound_files()))
    case.files["c.json"] = json.dumps(rng.choice(world.CLUSTERS)).encode()
    case.files["w.jsonl"] = _lines(world.requests(rng.randint(1, 12)))
    KINDS[kind](case, rng)
    return case


def _cluster(case: Case, rng: Random) -> None:
    base = rng.choice(world.CLUSTERS)
    if rng.random() < 0.1:
        base = json.loads(rng.choice(shipped_clusters()))
    case.files["c.json"] = json_text(mutated(base, rng), rng)
    _simulate(case, rng)


def _model(case: Case, rng: Random) -> None:
    text = json_text(mutated(rng.choice((world.TOY_CONFIG, *shipped_models())), rng), rng)
    if rng.random() < 0.6:
        case.files[f"configs/model/{MODEL}.json"] = text
        _simulate(case, rng)
        return
    case.files["mine/config.json"] = text
    case.argv = rng.choice(
        (
            ["support", "mine", "--hardware", HARDWARE],
            ["run", "--model", "mine", "--hardware", HARDWARE, "--dataset", "w.jsonl"],
            ["run", "--model", "mine/config.json", "--cluster-config", "c.json", "--dataset", "w.jsonl"],
        )
    )


def _yaml(value: Any) -> str:
    """``value`` as YAML; what is nested too deep for the writer becomes a text that is for the reader too."""
    try:
        return yaml.safe_dump(value, allow_unicode=True)
    except RecursionError:
        return "a: " + "[" * 2000


def _hardware(case: Case, rng: Random) -> None:
    text = _yaml(mutated(world.TOY_HARDWARE, rng)).encode("utf-8", "replace")
    case.files[f"configs/hardware/{HARDWARE}.yaml"] = spoilt_bytes(text, rng) if rng.random() < 0.2 else text
    if rng.random() < 0.2:
        case.argv = ["support", MODEL, "--hardware", HARDWARE]
        return
    _simulate(case, rng)
    case.argv += ["--hardware", HARDWARE]


def _bundle(case: Case, rng: Random) -> None:
    name = rng.choice([name for name in case.files if name.startswith("profiler/")])
    content = case.files[name]
    for _ in range(rng.randint(1, 3)):
        if name.endswith(".yaml") and rng.random() < 0.7:
            changed = _yaml(mutated(yaml.safe_load(case.files[name]), rng))
            content = changed.encode("utf-8", "replace")
        else:
            content = spoilt_bytes(content, rng)
    case.files[name] = content
    if rng.random() < 0.1:
        del case.files[name]
    _simulate(case, rng)


def _device(case: Case, rng: Random) -> None:
    lines = world.PIM.splitlines(keepends=True)
    at = rng.choice([at for at, line in enumerate(lines) if "=" in line])
    key, _, value = lines[at].partition("=")
    lines[at] = f"{key}= {rng.choice((str(float(value) * rng.choice((0, 0.01, 100))), *SMALL, junk(rng)))}\n"
    text = "".join(lines).encode("utf-8", "replace")
    case.files["configs/pim/TOY.ini"] = spoilt_bytes(text, rng) if rng.random() < 0.3 else text
    case.files["c.json"] = json.dumps(world.CLUSTERS[4]).encode()
    _simulate(case, rng)


def _roofline(case: Case, rng: Random) -> None:
    config, hardware = world.TOY_CONFIG | {"model_type": "llama"}, world.TOY_HARDWARE
    if rng.random() < 0.5:
        config = mutated(config, rng)
    else:
        hardware = mutated(hardware, rng)
    case.files["mine/config.json"] = json_text(config, rng)
    text = _yaml(hardware)
    case.files[f"configs/hardware/{HARDWARE}.yaml"] = text.encode("utf-8", "replace")
    case.argv = ["profile", "mine", "--hardware", HARDWARE, "--source", "roofline", "--output-root", "made"]
    sizes = ("--max-num-batched-tokens", "--max-num-seqs", "--max-kv", "--tp")
    for flag, value in zip(sizes, ("64", "16", "512", "1"), strict=True):
        odd = rng.choice((*SMALL, str(rng.choice(NUMBERS)), rng.choice(WORDS)))
        case.argv += [flag, odd if rng.random() < 0.1 else value]


def _workload(case: Case, rng: Random) -> None:
    match rng.choice(("requests", "requests", "mooncake", "chats", "csv", "bench", "texts")):
        case "requests":
            content = _spoilt_lines(world.requests(6), rng)
        case "mooncake":
            content = _spoilt_lines(world.mooncake(4), rng)
        case "chats":
            content = _spoilt_lines(world.CHATS, rng)
        case "texts":
            content = json_text(mutated(world.TEXTS, rng), rng)
            case.files["tokenizer.json"] = json_text(world.TOKENIZER, rng)
        case "csv":
            content = spoilt_bytes(rng.choice(world.CSVS), rng)
        case _:
            base = {k: v for k, v in world.BENCH.items() if k != "start_times" or rng.random() < 0.5}
            content = json_text(mutated(base, rng), rng)
    if rng.random() < 0.15:
        pack = rng.choice((gzip.compress, zstandard.compress))
        content = pack(content)
        content = spoilt_bytes(content, rng) if rng.random() < 0.5 else content
    case.files["w.jsonl"] = content
    rate = str(rng.choice((2.5, *NUMBERS)))
    loading = rng.choice(([], ["--lenient"], ["--num-reqs", "2"], ["--request-rate", rate]))
    if "tokenizer.json" in case.files:
        loading += ["--tokenizer", "tokenizer.json"]
    match rng.choice(("run", "describe", "convert")):
        case "run":
            _simulate(case, rng)
            case.argv += [word for word in loading if "tokenizer" not in word]
        case "describe":
            case.argv = ["workload", "describe", "w.jsonl", *loading]
        case _:
            case.argv = ["workload", "convert", "w.jsonl", "--output", "converted.jsonl", *loading]


def _flags(case: Case, rng: Random) -> None:
    _simulate(case, rng)
    if rng.random() < 0.2:
        case.argv = _flags_of_others(rng)
    for _ in range(rng.randint(1, 4)):
        case.argv += _random_flag(rng)


def _flags_of_others(rng: Random) -> list[str]:
    here = ["--cluster-config", "c.json"]
    compare = ["compare", *here, "--dataset", "w.jsonl"]
    synth = ["workload", "synth", "--output", "s.jsonl", "--num-reqs", "5"]
    word, number = rng.choice(WORDS), rng.choice((*SMALL, str(rng.choice(NUMBERS))))
    chunks = rng.choice((f"512@0,{number}@{rng.choice(NUMBERS)}", "64@16", word))
    return rng.choice(
        (
            ["explain-step", *here, "--chunks", chunks, "--decodes", "3", "--kv", "100"],
            ["explain-step", *here, "--decodes", number, "--kv", str(rng.choice(NUMBERS))],
            [*compare, "--set", f"a: --max-num-seqs {number}", "--set", f"b:{word}"],
            [*compare, "--set", "a: --max-num-seqs 2", "--json", "figures.json"],
            compare,
            ["support", word, "--hardware", HARDWARE, "--tp", number],
            ["support", MODEL, "--hardware", word],
            ["profile", "inspect", word],
            [*synth, "--input-len", f"uniform:{number}:{word}"],
            [*synth, "--rate", number, "--cv", number],
            ["workload", "describe", "w.jsonl", "--block-size", number],
        )
    )


def _random_flag(rng: Random) -> list[str]:
    name = rng.choice([name for name in RuntimeOptions.model_fields if name not in _NO_RANDOM_FLAG])
    option = RuntimeOptions.model_fields[name]
    flag = flag_of(option)
    assert flag is not None
    kind = base_type(option.annotation)
    if kind is bool:
        off = option.default is True and rng.random() < 0.8
        return [flag_name(name).replace("--", "--no-", 1) if off else flag_name(name)]
    if rng.random() < 0.15:
        return [flag_name(name), rng.choice((str(rng.choice(NUMBERS)), rng.choice(WORDS)))]
    if name.endswith("_policy"):
        return [flag_name(name), rng.choice(POLICIES)]
    if kind in (int, float):
        return [flag_name(name), rng.choice(SMALL if kind is int else (*SMALL, "0.5", "0.01", "1e-6", "1e5"))]
    return [flag_name(name), rng.choice((*choices_of(option, flag), "H100", HARDWARE, MODEL, "run-1"))]


def _recording(case: Case, rng: Random) -> None:
    found = world.recording()
    meta, rows, cluster = found["meta"], found["rows"], found["cluster"]
    match rng.choice(("meta", "rows", "cluster")):
        case "meta":
            meta = mutated(meta, rng)
        case "rows":
            rows = mutated(rows, rng)
        case _:
            cluster = mutated(cluster, rng)
    case.files["rec/meta.json"] = json_text(meta, rng)
    text = _lines(rows if isinstance(rows, list) else [rows])
    case.files["rec/requests.jsonl"] = spoilt_bytes(text, rng) if rng.random() < 0.2 else text
    case.files["rec/cluster.json"] = json.dumps(cluster).encode("utf-8", "replace")
    case.argv = ["bench", "validate", "rec", "--json", "agreement.json"]


KINDS: dict[str, Callable[[Case, Random], None]] = {
    "cluster": _cluster,
    "model": _model,
    "hardware": _hardware,
    "bundle": _bundle,
    "device": _device,
    "roofline": _roofline,
    "workload": _workload,
    "flags": _flags,
    "recording": _recording,
}


def _simulate(case: Case, rng: Random) -> None:
    case.argv = ["run", "--cluster-config", "c.json", "--dataset", "w.jsonl"]
    for flag, path in OUTPUTS.items():
        if rng.random() < 0.5:
            case.argv += [flag, path]
    if rng.random() < 0.3:
        case.argv += _random_flag(rng)


def _lines(entries: list[Any]) -> bytes:
    return "".join(json.dumps(entry) + "\n" for entry in entries).encode("utf-8", "replace")


def _spoilt_lines(entries: list[Any], rng: Random) -> bytes:
    changed = mutated(entries, rng)
    text = _lines(changed if isinstance(changed, list) else [changed])
    return spoilt_bytes(text, rng) if rng.random() < 0.3 else text


@cache
def shipped_clusters() -> list[bytes]:
    """The cluster configs that come with servesim."""
    folder = paths.packaged_data_dir() / "configs" / "cluster"
    return [path.read_bytes() for path in sorted(folder.glob("*.json")) if path.name != "schema.json"]


@cache
def shipped_models() -> list[Any]:
    """The configs of models that come with servesim."""
    folder = paths.packaged_data_dir() / "configs" / "model"
    return [json.loads(Path(path).read_bytes()) for path in sorted(folder.glob("*/*.json"))]
