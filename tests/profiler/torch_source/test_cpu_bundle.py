"""Whole bundles of tiny models, measured on the CPU that runs the tests."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

pytest.importorskip("torch", reason="needs PyTorch: pip install 'servesim[torch]'")

from servesim.__main__ import main
from servesim.cost.bundle import load_bundle
from servesim.specs.reading import read_yaml_object

if TYPE_CHECKING:
    from collections.abc import Sequence

_PROJECT = Path(__file__).resolve().parents[3]
_SMALL = (
    *("--source", "torch", "--device", "cpu", "--threads", "1", "--hardware", "CPU-test"),
    *("--max-num-batched-tokens", "32", "--max-num-seqs", "16", "--max-kv", "64", "--iterations", "1"),
    *(
        "--token-factor",
        "4",
        "--chunk-factor",
        "4",
        "--decode-factor",
        "4",
        "--kv-factor",
        "4",
        "--skew-factor",
        "16",
    ),
)


pytestmark = pytest.mark.usefixtures("root")


def _folder(model: str, variant: str) -> Path:
    return Path("profiler/perf/CPU-test") / model / variant


def _profile(model: str, *more: str) -> int:
    return main(["profile", model, *_SMALL, *more])


@pytest.mark.parametrize(
    ("model", "dtype", "kv", "variant"),
    [
        ("servesim/tiny-llama", "bfloat16", "auto", "bf16"),
        ("servesim/tiny-llama", "float32", "fp8", "fp32-kvfp8"),
        ("servesim/tiny-llama", "fp8", "fp8", "fp8-kvfp8"),
        ("servesim/tiny-moe", "bfloat16", "int8", "bf16-kvint8"),
        ("servesim/tiny-moe", "int8", "auto", "int8"),
    ],
)
def test_a_tiny_model_is_measured_on_the_cpu(model: str, dtype: str, kv: str, variant: str) -> None:
    assert _profile(model, "--dtype", dtype, "--kv-cache-dtype", kv, "--tp", "1,2") == 0
    bundle = load_bundle("CPU-test", model, variant)
    for tp in (1, 2):
        tables = bundle.tables(tp)
        times = [curve.values for curve in (*tables.dense.values(), *tables.per_sequence.values())]
        assert min(float(values.min()) for values in times) > 0
        assert tables.attention.tensor.min() > 0
        assert (tables.moe is not None) == (model == "servesim/tiny-moe")
    meta = read_yaml_object(bundle.folder / "meta.yaml")
    assert (meta["source"], meta["measurement"]["cache"], meta["attention_kernel"]) == (
        "torch",
        "cold",
        "sdpa",
    )
    assert "torch_version" in meta


def test_a_sweep_killed_halfway_goes_on_and_keeps_its_rows(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["servesim/tiny-moe", *_SMALL, "--kv-factor", "1.2", "--iterations", "5", "--no-skew"]
    work = _folder("servesim/tiny-moe", ".bf16.measuring")
    kept = _kill_after_rows(arguments, work / "tp1" / "attention.csv", rows=20)
    assert len(kept) > 20
    assert not _folder("servesim/tiny-moe", "bf16").exists()
    assert main(["profile", *arguments]) == 0
    told = re.search(r"(\d+) rows measured, (\d+) kept", capsys.readouterr().out)
    assert told is not None
    assert int(told[1]) > 0
    assert int(told[2]) >= len(kept) - 1  # without the header, but with the tables before
    finished = (_folder("servesim/tiny-moe", "bf16") / "tp1" / "attention.csv").read_text().splitlines()
    assert set(kept) <= set(finished)
    assert len(finished) > len(kept)
    assert not work.exists()
    load_bundle("CPU-test", "servesim/tiny-moe", "bf16").tables(1)


_HOLDING = """
import sys, time
from servesim.profiler.measure.work_folder import TableFile
append, rows = TableFile.append, int(sys.argv.pop(1))

def holding(table, more):
    append(table, more)
    if table.path.name == "attention.csv" and len(table.rows) > rows:
        print("at work", flush=True)
        time.sleep(3600)

TableFile.append = holding
from servesim.door import main
sys.exit(main())
"""
"""A sweep that stands still once its table of attention has so many rows, however fast the machine is."""


def _kill_after_rows(arguments: Sequence[str], table: Path, rows: int) -> list[str]:
    """Start a sweep as a process, end it with SIGKILL once ``table`` has rows; its whole lines then."""
    environment = {**os.environ, "PYTHONPATH": str(_PROJECT)}
    command = [sys.executable, "-c", _HOLDING, str(rows), "profile", *arguments]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert any(line == "at work\n" for line in process.stdout), "the sweep ended by itself"
        finally:
            process.send_signal(signal.SIGKILL)
    content = table.read_text()
    return content[: content.rfind("\n") + 1].splitlines()


def test_a_gpu_that_is_not_there_is_an_error_that_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert (
        main(["profile", "servesim/tiny-llama", "--source", "torch", "--hardware", "X", "--device", "cuda"])
        == 2
    )
    assert "--device cuda: PyTorch" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--attention", "flashinfer"], "--attention flashinfer: needs a GPU"),
        (["--cuda-graphs"], "--cuda-graphs: is not allowed with --device cpu"),
        (["--iterations", "0"], "--iterations 0: is not allowed"),
        (["--threads", "0"], "--threads 0: is not allowed"),
        (["--kv-memory-gib", "-1"], "--kv-memory-gib -1: is not allowed"),
        (["--budget-s", "0"], "--budget-s 0: is not allowed"),
        (["--only", "moe"], "--only moe: servesim/tiny-llama has no experts"),
        (["--tp", "3"], "8 attention heads cannot be split over tp 3"),
        (["--kv-factor", "0.5"], "--kv-factor 0.5: is not allowed"),
        (
            ["--dtype", "fp8", "--fp8-scaling", "block"],
            "--fp8-scaling block: --source torch measures tensor only",
        ),
        (
            ["--collectives", "measured", "--tp", "2"],
            "--collectives measured: --source torch measures none only",
        ),
    ],
)
def test_flags_that_make_no_sense_are_refused(
    more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _profile("servesim/tiny-llama", *more) == 2
    assert message in capsys.readouterr().err
    assert not Path("profiler").exists()


def test_a_sweep_within_a_budget_says_what_it_chose(capsys: pytest.CaptureFixture[str]) -> None:
    assert _profile("servesim/tiny-llama", "--budget-s", "5") == 0
    assert "budget 5.0 s:" in capsys.readouterr().err
