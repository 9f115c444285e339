"""The command group and its actions, as a user calls them."""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys

import pytest

from servesim.bench.vllm_scheduler import SchedulerSettings
from servesim.cli import bench
from servesim.cli.bench_record_scheduler import AS_IN_A_RUN, formula_of, settings_of
from servesim.errors import InputError
from servesim.specs.engine_options import EngineOptions


def parse(line: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    bench.add_parser(parser.add_subparsers())
    return parser.parse_args(["bench", *line.split()])


def test_every_action_can_be_imported() -> None:
    for module, text in bench.ACTIONS.values():
        assert importlib.util.find_spec(module)
        assert text


def test_the_flags_reach_the_settings() -> None:
    args = parse(
        "record-scheduler --dataset w.jsonl --output log.jsonl --num-gpu-blocks 50 --max-num-seqs 7 "
        "--no-async-scheduling --base-us 1.5 --per-token-us 0"
    )
    settings = settings_of(args)
    assert (settings.num_gpu_blocks, settings.max_num_seqs, settings.async_scheduling) == (50, 7, False)
    assert settings.enable_prefix_caching
    assert formula_of(args).step_ns(10, 1, 99) == 1500 + 10_000


@pytest.mark.parametrize("name", AS_IN_A_RUN)
def test_the_scheduler_is_set_as_in_a_run(name: str) -> None:
    args = parse("record-scheduler --dataset w --output l --num-gpu-blocks 50")
    default = EngineOptions.model_fields[name].default
    assert getattr(settings_of(args), name) == default == getattr(SchedulerSettings(num_gpu_blocks=9), name)


@pytest.mark.parametrize("flag", ["--max-num-seqs", "--max-num-batched-tokens"])
def test_a_recorded_scheduler_has_a_limit(flag: str) -> None:
    args = parse(f"record-scheduler --dataset w --output l --num-gpu-blocks 50 {flag} 0")
    with pytest.raises(InputError, match=f"{flag}: 0 is not allowed here"):
        settings_of(args)


def test_a_step_has_to_take_time() -> None:
    args = parse(
        "record-scheduler --dataset w --output l --num-gpu-blocks 5 "
        "--base-us 0 --per-token-us 0 --per-sequence-us 0"
    )
    with pytest.raises(InputError, match="a step has to take time"):
        formula_of(args)


def test_a_size_below_one_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse("record-scheduler --dataset w --output l --num-gpu-blocks 0")
    assert stop.value.code == 2
    assert "invalid positive number value: '0'" in capsys.readouterr().err


def test_the_groups_help_imports_no_action() -> None:
    code = (
        "import argparse, sys; from servesim.cli import bench\n"
        "parser = argparse.ArgumentParser(); bench.add_parser(parser.add_subparsers())\n"
        "try: parser.parse_args(['bench', '--help'])\n"
        "except SystemExit: pass\n"
        "heavy = ('servesim.bench', 'servesim.cli.bench_', 'numpy')\n"
        "assert not [name for name in sys.modules if name.startswith(heavy)]"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "record-scheduler" in done.stdout
