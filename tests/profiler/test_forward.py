"""``servesim profile import``: files of ``vllm bench forward`` as corrections of a bundle.

``examples/forward.json`` is a file by vLLM 0.33's own writer (tests/profiler/forward_files.py) with made-up
times.
"""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from servesim.__main__ import main
from servesim.api import read_cluster, simulate
from servesim.cost.build import Costs
from servesim.profiler.forward import MeasuredStep, read_forward
from servesim.profiler.whole_steps import forward_us
from servesim.specs.instance_options import resolve
from servesim.specs.model import load_model
from servesim.specs.options import RuntimeOptions
from servesim.workload.request import Request, Workload
from tests.profiler import forward_files

if TYPE_CHECKING:
    from collections.abc import Callable

    from servesim.cost.stage_cost import StageCost

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "examples" / "forward.json"
LLAMA, EXPERTS, WINDOWS = "meta-llama/Llama-3.1-8B", "Qwen/Qwen3-30B-A3B", "openai/gpt-oss-20b"


pytestmark = pytest.mark.usefixtures("root")


def priced(model: str = LLAMA, tp: int = 1, **more: Any) -> StageCost:
    """What steps of a model cost on an H100, by the bundle that is found."""
    options = RuntimeOptions(model=model, hardware="H100", tp=tp, **more)
    cluster = read_cluster(options)
    _, spec = cluster.instances[0]
    loaded = load_model(model)
    return Costs(cluster).stage(spec, loaded, resolve(options, spec, loaded))


def by_bundle(step: MeasuredStep, cost: StageCost) -> float:
    return sum(forward_us(cost, step))


def imported(*words: str, file: str | Path = FILE, model: str = LLAMA) -> int:
    return main(["profile", "import", str(file), "--model", model, "--hardware", "H100", *words])


def entries() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(FILE.read_text())
    return found


def test_the_example_is_what_vllm_writes(tmp_path: Path) -> None:
    try:
        if not version("vllm").startswith("0.33"):
            pytest.skip("no vLLM 0.33 in this environment")
    except PackageNotFoundError:
        pytest.skip("no vLLM 0.33 in this environment")
    forward_files.main(str(tmp_path / "again.json"))
    assert json.loads((tmp_path / "again.json").read_text()) == entries()


def test_cases_are_read_as_steps() -> None:
    steps, left_out = read_forward([str(FILE)], 1)
    assert left_out == []
    assert [step.name for step in steps] == [case.partition("=")[0] for case in forward_files.CASES]
    shapes = {step.name: (step.chunks, step.contexts) for step in steps}
    assert shapes["d8"] == ((), (1024,) * 8)
    assert shapes["chunk"] == (((2048, 14336),), ())
    assert shapes["mix"] == (((1024, 0),), (4096,) * 32)
    assert {step.name: step.batch for step in steps}["mix"] == "1024,32*1@4097"


def test_the_bundle_then_meets_every_step(capsys: pytest.CaptureFixture[str]) -> None:
    before = priced()
    assert imported() == 0
    out = capsys.readouterr().out
    assert "decodes: 1 to 256 at contexts of 1024 to 16384 tokens" in out
    assert "check" in out
    steps, _ = read_forward([str(FILE)], 1)
    after = priced()
    assert after.bundle.meta["source"] == "forward"
    for step in steps:
        apart = by_bundle(step, after) / step.us - 1
        assert abs(apart) < (0.03 if step.name == "mix" else 3e-4), step.name
        assert abs(by_bundle(step, before) / step.us - 1) > abs(apart)


def test_steps_between_the_measured_ones_come_nearer_too() -> None:
    """Against the closed form that made the times up, at shapes that are not in the file."""
    before = priced()
    assert imported() == 0
    after = priced()
    others: list[tuple[tuple[tuple[int, int], ...], tuple[int, ...]]] = [
        ((), (2048,) * 16), ((), (4096,) * 64), ((), (8192,) * 32), ((), (1500,) * 200),
        (((1024, 0),), ()), (((4096, 0),), ()), (((2048, 6000),), ()), (((1024, 0), (1024, 0)), ()),
    ]  # fmt: skip
    errors: dict[str, list[float]] = {"before": [], "after": []}
    for chunks, contexts in others:
        asked = [SimpleNamespace(query_len=q, prefix_len=p, is_decode=False) for q, p in chunks]
        asked += [SimpleNamespace(query_len=1, prefix_len=p, is_decode=True) for p in contexts]
        us = forward_files.made_up_us(asked)
        step = MeasuredStep("", "", us, chunks, contexts, 1, 0.0)
        errors["before"].append(abs(by_bundle(step, before) / us - 1))
        errors["after"].append(abs(by_bundle(step, after) / us - 1))
    assert max(errors["after"]) < 0.05
    assert sum(errors["after"]) < sum(errors["before"]) / 3


@pytest.mark.parametrize(("model", "tp"), [(EXPERTS, 1), (EXPERTS, 2), (WINDOWS, 1)])
def test_experts_windows_and_degrees_are_met(model: str, tp: int, tmp_path: Path) -> None:
    """The steps as the bundle has them, each 2 to 40 % longer."""
    cost, cases = priced(model, tp), entries()
    for number, case in enumerate(cases):
        (tmp_path / "one.json").write_text(json.dumps([case]))
        ((step,), _) = read_forward([str(tmp_path / "one.json")], 1)
        longer = 1.4 if step.chunks else 1.02 + 0.02 * number
        case["median_us"] = case["ranks"][0]["latency_us"]["median"] = by_bundle(step, cost) * longer
        case["ranks"] *= tp
    (tmp_path / "f.json").write_text(json.dumps(cases))
    assert imported("--tp", str(tp), file=tmp_path / "f.json", model=model) == 0
    after = priced(model, tp)
    assert after.bundle.meta["source"] == "forward"
    for step in read_forward([str(tmp_path / "f.json")], tp)[0]:
        assert by_bundle(step, after) == pytest.approx(step.us, rel=0.06 if step.name == "mix" else 1e-3)


def test_a_run_says_what_lies_beyond_the_steps() -> None:
    workload = Workload([Request(0, 20_000, 10, 0)], "long")
    flags: dict[str, Any] = {"hardware": "H100", "model": LLAMA}
    plain = simulate(None, workload, **flags)
    assert imported() == 0
    result = simulate(None, workload, **flags)
    ((before,), (after,)) = plain.summary["extrapolated"], result.summary["extrapolated"]
    assert (before["measured_context_tokens"], after["measured_context_tokens"]) == (65536, 16384)
    assert result.summary["duration"] > 1.05 * plain.summary["duration"]


def changed(change: Callable[[list[dict[str, Any]]], object]) -> Path:
    """The example after a change."""
    cases = entries()
    change(cases)
    path = Path("changed.json")
    path.write_text(json.dumps(cases))
    return path


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda c: c.clear(), "must be a list with an object for every case"),
        (lambda c: c[2].pop("median_us"), "[2].median_us: is missing"),
        (lambda c: c[2].update(median_us="6"), "[2].median_us: '6' is not allowed"),
        (lambda c: c[2].update(median_us=7.0), "[2].median_us: 7.0 is not ranks[0].latency_us.median"),
        (lambda c: c[0].pop("requests"), "[0].requests: is missing"),
        (lambda c: c[0]["requests"][0].update(kv_len=0), "[0].requests[0].kv_len: 0 is not allowed"),
        (lambda c: c[0]["requests"][0].update(query_len=1.5), "requests[0].query_len: '1.5' is not allowed"),
        (lambda c: c[0]["ranks"].append({}), "[0].ranks: has 2 processes, and --tp says 1"),
        (lambda c: c[0]["ranks"][0].update(finite=False), "[0].ranks[0].finite"),
        (lambda c: c[0]["ranks"][0].update(pp_rank=0), "[0].ranks[0].pp_rank: pipelines are not read"),
        (lambda c: c[0]["ranks"][0].pop("timing_scope"), "[0].ranks[0].timing_scope: is missing"),
        (lambda c: c.append(c[1]), "[13]: d8 is the same batch as"),
        (lambda c: [c.pop(8) for _ in range(5)], "no case is of prompts alone"),
        (lambda c: [c.pop(0) for _ in range(8)], "no case is of decodes alone"),
    ],
)
def test_unclear_files_are_refused_by_field(
    change: Any, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert imported(file=changed(change)) == 2
    assert told in capsys.readouterr().err


def test_steps_of_something_else_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    def ten_times(cases: list[dict[str, Any]]) -> None:
        for case in cases:
            case["median_us"] *= 10
            case["ranks"][0]["latency_us"]["median"] *= 10

    assert imported(file=changed(ten_times)) == 2
    assert "Is it of another model, GPU, number format or --tp?" in capsys.readouterr().err


def test_cases_without_use_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    def spoil(cases: list[dict[str, Any]]) -> None:
        cases[0]["ranks"][0]["timing_scope"] = "target_and_drafter"
        cases[1]["requests"][0] = {"query_len": 3, "kv_len": 1027, "num_draft_tokens": 2, "chunked": False}
        cases[11]["ranks"][0]["num_tokens"] += 100
        cases[2]["ranks"][0]["latency_us"]["sample_spread_pct"] = 7.0

    assert imported(file=changed(spoil)) == 0
    out = capsys.readouterr().out
    for told in (
        "left out d1: the drafter",
        "left out d8: verifies",
        "left out chunk: computed",
        "7.0 % apart",
    ):
        assert told in out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--tp 0", "--tp: 0 is not allowed"),
        ("--measured-with new", "--measured-with: 'new' is not allowed"),
    ],
)
def test_flags_are_checked(words: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert imported(*words.split()) == 2
    assert told in capsys.readouterr().err


def test_a_bundle_is_corrected_once_and_not_overwritten(capsys: pytest.CaptureFixture[str]) -> None:
    assert imported("--output-root", "out", "--measured-with", "0.34.0") == 0
    folder = Path("out/H100") / LLAMA / "bf16"
    assert "vllm_version: 0.34.0" in (folder / "meta.yaml").read_text()
    assert imported("--output-root", "out") == 2
    assert "give --force to replace it" in capsys.readouterr().err
    assert imported("--output-root", "out", "--force") == 0
    assert imported() == 0
    assert imported("--force") == 2
    assert "is corrected with measured steps already; remove that folder" in capsys.readouterr().err
    assert imported("--kv-cache-dtype", "fp8") == 0  # another bundle
    assert imported("--dtype", "fp8") == 0
