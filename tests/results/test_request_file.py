"""The per-request file and its list of rejected requests."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from servesim.errors import InputError
from servesim.results import csv as request_file
from tests.hand_made import two_requests

HEADER = (
    "instance id,request id,model,input,output,arrival,end_time,latency,queuing_delay,TTFT,TPOT,ITL,"
    "queued,session id,sub request,prefix hit,npu hit,storage hit,preemptions,decode instance"
)


def test_the_file_is_what_a_pencil_gives(tmp_path: Path) -> None:
    two_requests().save(tmp_path / "run.csv")
    assert (tmp_path / "run.csv").read_text() == (
        HEADER + "\n"
        "0,0,org/tiny,100,4,1000000,42000000,41000000,1000000,9000000,10666666,"
        '"[10000000, 12000000, 10000000]",'
        "1000000,,0,0,0,0,0,0\n"
        '0,1,org/tiny,50,3,12000000,60000000,48000000,0,8000000,20000000,"[12000000, 28000000]",'
        '12000000,"chat, 1",1,32,32,0,1,0\n'
    )


def test_rows_are_ordered_by_request_id_whatever_ended_first(tmp_path: Path) -> None:
    forward, backward = two_requests(), two_requests()
    backward.log.requests.reverse()
    forward.save(tmp_path / "forward.csv")
    backward.save(tmp_path / "backward.csv")
    assert (tmp_path / "forward.csv").read_bytes() == (tmp_path / "backward.csv").read_bytes()


def test_inter_token_latencies_can_be_left_out(tmp_path: Path) -> None:
    two_requests().save(tmp_path / "run.csv", itl=False)
    with (tmp_path / "run.csv").open() as handle:
        assert [row["ITL"] for row in csv.DictReader(handle)] == ["", ""]


@pytest.mark.parametrize("itl", [True, False])
def test_parquet_holds_what_the_csv_holds(tmp_path: Path, itl: bool) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    two_requests().save(tmp_path / "run.csv", itl=itl)
    two_requests().save(tmp_path / "run.parquet", itl=itl)
    rows = parquet.read_table(tmp_path / "run.parquet").to_pylist()
    with (tmp_path / "run.csv").open() as handle:
        expected = list(csv.DictReader(handle))
    assert ["" if value is None else str(value) for row in rows for value in row.values()] == [
        value for row in expected for value in row.values()
    ]
    assert list(rows[0]) == list(expected[0])


def test_rejected_requests_are_listed_beside_the_file(tmp_path: Path) -> None:
    path = tmp_path / "run.csv"
    two_requests(rejected=True).save(path)
    (line,) = (tmp_path / "run.csv.rejected.jsonl").read_text().splitlines()
    assert json.loads(line) == {
        "request id": 2,
        "instance id": 0,
        "arrival": 5000000,
        "input": 9000,
        "output": 1,
        "session id": None,
        "sub request": 0,
        "reason": "9001 tokens do not fit the context length of 8192",
    }
    assert len(path.read_text().splitlines()) == 3  # header and the two that finished


def test_a_stale_list_of_rejected_requests_goes_away(tmp_path: Path) -> None:
    two_requests(rejected=True).save(tmp_path / "run.csv")
    two_requests().save(tmp_path / "run.csv")
    assert [path.name for path in tmp_path.iterdir()] == ["run.csv"]


def test_parquet_without_pyarrow_names_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_file, "find_spec", lambda _: None)
    with pytest.raises(InputError, match=r"pip install 'servesim\[parquet\]'"):
        request_file.require_parquet("run.parquet", "--output")
    request_file.require_parquet("run.csv", "--output")
