"""``servesim compare``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from servesim.__main__ import main
from servesim.cli.compare import parse_set
from servesim.errors import InputError

SMALL = ["--dataset", "workloads/short_chat.jsonl", "--num-reqs", "10"]


def test_without_arguments_fp8_kv_is_compared(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["compare", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    auto, fp8 = rows["preemptions"]["values"].values()
    assert fp8 < auto
    assert rows["output_throughput"]["change_percent"]["kv fp8"] > 5
    assert rows["kv_cache_tokens"]["change_percent"]["kv fp8"] == pytest.approx(100, abs=0.01)


def test_short_chats_show_that_nothing_changes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "--dataset", "workloads/short_chat.jsonl"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "kv fp8 makes no measurable difference (less than the tables' error of 5 %)" in shown
    assert "its size was no limit" in shown


def test_one_set_is_compared_with_the_flags_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", *SMALL, "--set", "one seat: --max-num-seqs 1", "--csv"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "figure,unit,base,one seat,one seat change %"
    assert next(line for line in lines if line.startswith("peak_batch")).split(",")[3] == "1"


def test_many_sets_stand_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sets = [word for seats in (1, 2, 3) for word in ("--set", f"{seats} seats: --max-num-seqs {seats}")]
    assert main(["compare", *SMALL, *sets, "--json", str(tmp_path / "c.json")]) == 0
    assert json.loads((tmp_path / "c.json").read_text())["sets"] == ["1 seats", "2 seats", "3 seats"]
    assert "1 seats" in capsys.readouterr().out


def test_a_set_is_a_label_and_run_flags() -> None:
    assert parse_set("large batch: --max-num-seqs 256 --no-enable-prefix-caching") == (
        "large batch",
        {"max_num_seqs": 256, "enable_prefix_caching": False},
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("--max-num-seqs 256", "a set is a label, a colon and run flags"),
        (": --max-num-seqs 256", "a set is a label"),
        ("a: --max-num-sqs 256", "--max-num-sqs"),
        ("a: --max-num-seqs many", "many"),
        ("a: --output x.csv", "--output"),
        ("a: --dtype 'fp8", "No closing quotation"),
    ],
)
def test_a_malformed_set_is_told(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message.replace("-", r"\-")):
        parse_set(text)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--set", "a: --seed 1", "--set", "a: --seed 2"], "label 'a' is taken"),
        (["--kv-cache-dtype", "fp8"], "without --set, auto is compared with fp8"),
        (["--json", "--csv"], "only one of them can be printed"),
        (["--set", "a: --block-size 0"], "option set 'a': block_size"),
    ],
)
def test_what_cannot_be_compared_is_told(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", *SMALL, *flags]) == 2
    assert message in capsys.readouterr().err
