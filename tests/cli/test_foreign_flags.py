"""Flags of other tools are answered with what to do here, and never with a flag of another meaning."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from servesim.__main__ import main
from servesim.cli.foreign import ELSEWHERE, SAME
from servesim.specs.flags import flag_name
from servesim.specs.options import RuntimeOptions

ROOT = Path(__file__).resolve().parents[2]


def refusal(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("--num-prompts", "it is called '--num-reqs' here"),
        ("--mem-fraction-static", "not the same share"),
        ("--ep-size", "ep_size of an instance"),
        ("--kv-transfer-config", "pd_type is set in the cluster config"),
        ("--moe-backend", "a choice of kernels"),
        ("--quantization", "--dtype fp8 sets 8-bit weights"),
        ("--spec-method", "not simulated: speculative decoding"),
        ("--trust-remote-code", "nothing in a simulation depends on it"),
        ("--max-num-seq", "did you mean '--max-num-seqs'?"),
        ("--outptu", "did you mean '--output'?"),
    ],
)
def test_what_a_foreign_flag_is_answered_with(
    word: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert told in refusal([word, "1"], capsys)


@pytest.mark.parametrize("word", ["--max-cudagraph-length", "--guided-decoding", "--zzz", "--rope-scaling"])
def test_no_hint_is_better_than_a_wrong_one(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert refusal([word, "1"], capsys) == f"error: unknown argument '{word}'; see servesim run --help\n"


def test_every_answer_names_flags_that_exist() -> None:
    own = {flag_name(name) for name in (*RuntimeOptions.model_fields, "max_model_len")}
    for ours in SAME.values():
        assert ours.replace("--no-", "--") in own
    foreign = [*SAME, *ELSEWHERE]
    assert len(foreign) == len(set(foreign))
    assert own.isdisjoint(foreign)


@pytest.mark.parametrize(
    ("flag", "path", "allowed"),
    [
        ("--output", "x.xlsx", ".csv or .parquet"),
        ("--steps", "x.json", ".csv or .parquet"),
        ("--summary", "x.yaml", ".json"),
        ("--timeline", "x.csv", ".json"),
    ],
)
def test_an_unknown_format_of_an_output_is_refused(
    flag: str, path: str, allowed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([flag, str(tmp_path / path), "--num-reqs", "2"]) == 2
    assert f"is not a format that is written; must end in {allowed}" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- the profile command and its script


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--iterations", "9"], "--iterations 9: has no effect here: --source roofline measures nothing"),
        (["--no-skew"], "--no-skew: has no effect here: --source roofline measures nothing"),
        (["--only", "skew"], "--only skew: has no effect here: --source roofline measures nothing"),
        (["--threads", "2"], "--threads 2: has no effect here: only --source torch measures with it"),
        (["--fp8-scaling", "block"], "the weights are bfloat16"),
        (["--fp8-scaling", "block", "--dtype", "fp8"], "know no scales"),
        (["--expert-load", "power_law_1.2"], "has no experts"),
    ],
)
def test_profile_flags_that_cannot_act_are_refused(
    words: list[str], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    usual = ["profile", "meta-llama/Llama-3.1-8B", "--hardware", "H100", "--source", "roofline"]
    assert main([*usual, "--output-root", str(tmp_path), *words]) == 2
    assert reason in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "needed"),
    [
        (["--cv", "1"], "--cv 1.0: has no effect without --arrival gamma"),
        (["--burst-size", "3"], "--burst-size 3: has no effect without --arrival burst"),
        (["--prefix-len", "100"], "--prefix-len 100: has no effect without --prefix-groups"),
        (["--prefix-share", "0.5"], "--prefix-share 0.5: has no effect without --prefix-groups"),
        (["--turns", "3"], "--turns 3: has no effect without --sessions"),
        (["--tool-time", "3"], "--tool-time 3: has no effect without --sessions"),
        (["--no-ids", "--vocab-size", "9"], "--vocab-size 9: has no effect without token ids"),
        (["--rate", "inf", "--arrival", "burst"], "--arrival burst: has no effect without a finite --rate"),
    ],
)
def test_synth_flags_that_cannot_act_are_refused(
    words: list[str], needed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["workload", "synth", "--output", str(tmp_path / "w.jsonl"), *words]) == 2
    assert needed in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", [["--kv", "9"], ["--kv-max", "9"], ["--kv-min", "9"]])
def test_lengths_of_decodes_need_decodes(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain-step", "--chunks", "100@0", *words]) == 2
    assert "have no effect without --decodes" in capsys.readouterr().err


def test_an_eager_step_pays_for_its_launches(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain-step", "--decodes", "3", "--kv", "100", "--enforce-eager"]) == 0
    assert "launch" in capsys.readouterr().out


def script(**settings: str) -> subprocess.CompletedProcess[str]:
    """The script with ``echo`` in place of Python: what it would run."""
    here = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    return subprocess.run(
        ["bash", str(ROOT / "profiler/profile.sh")],
        env={**here, "PYTHON": "echo", **settings},
        capture_output=True,
        encoding="utf-8",
        check=False,
    )


@pytest.mark.skipif(os.name == "nt", reason="a shell script")
@pytest.mark.parametrize(
    ("settings", "flags"),
    [
        ({"FORCE": "1"}, "--force"),
        ({"FORCE": "0"}, ""),
        ({"MEASUREMENT_ITERATIONS": "9"}, "--iterations 9"),
        ({"ONLY_SKEW": "1"}, "--only skew"),
        ({"SKIP_SKEW": "1", "SKIP_MOE": "1"}, "--only dense --only per_sequence --only attention"),
        ({"SKEW_FACTOR": "3"}, "--skew-factor 3"),
        ({"ATTENTION_CHUNK_FACTOR": "3", "ATTENTION_KV_FACTOR": "4"}, "--chunk-factor 3 --kv-factor 4"),
    ],
)
def test_settings_of_the_profile_script_become_flags(settings: dict[str, str], flags: str) -> None:
    done = script(**settings)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().partition("--output-root profiler/perf")[2].strip() == flags


@pytest.mark.skipif(os.name == "nt", reason="a shell script")
@pytest.mark.parametrize(
    "settings",
    [{"VARIANT": "x"}, {"SKIP_FOO": "1"}, {"ONLY_MOE": "1"}, {"SKEW_N": "3"}, {"SKIP_MOE": "maybe"}],
)
def test_settings_that_cannot_act_are_refused_by_name(settings: dict[str, str]) -> None:
    done = script(**settings)
    ((name, value),) = settings.items()
    assert (done.returncode, done.stdout) == (2, "")
    assert f"error: {name}={value}" in done.stderr


@pytest.mark.parametrize(("package", "told"), [("profiler", "servesim profile"), ("bench", "servesim bench")])
def test_commands_of_llmservingsim_name_ours(package: str, told: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", package, "--model", "org/name"],
        cwd=ROOT,
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: python -m {package} is no command here")
    assert f"  {told} " in done.stderr
