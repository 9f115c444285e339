"""Columns and parts of the table of requests are the table."""

from __future__ import annotations

from unittest.mock import patch

import numpy as np
import pytest

from servesim.results import request_table
from servesim.results.request_table import REQUEST_DTYPE, RequestTable
from servesim.results.result import Result
from tests.hand_made import two_requests


@pytest.mark.parametrize("name", REQUEST_DTYPE.names or ())
def test_a_column_is_that_of_the_table(name: str) -> None:
    result = two_requests()
    assert result.table[name].tolist() == result.requests[name].tolist()
    assert result.table.rows(1, 5)[name].tolist() == result.requests[name][1:].tolist()


def test_a_summary_does_without_the_table() -> None:
    result = two_requests()
    with patch.object(Result, "requests", None):
        assert result.summary["completed"] == 2


def test_the_run_id_does_not_depend_on_the_parts() -> None:
    whole = two_requests().run_id
    with patch.object(request_table, "ROWS_AT_ONCE", 1):
        result = two_requests()
        assert result.run_id == whole
        assert np.concatenate(list(result.table.parts())).tolist() == result.requests.tolist()


def test_no_other_column_is_known() -> None:
    result = two_requests()
    with pytest.raises(KeyError):
        RequestTable(result.token_gaps, result.workload)["TBT"]
