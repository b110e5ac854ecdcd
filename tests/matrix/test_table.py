"""The table of all cells."""

from __future__ import annotations

from tests.matrix.cells import Cell
from tests.matrix.suite import Outcome
from tests.matrix.table import table


def test_a_row_for_each_torch_and_a_column_for_each_python() -> None:
    outcomes = {
        Cell("2.4.1", "3.12"): Outcome(7),
        Cell("2.6.0", "3.12"): Outcome(trouble="uv pip failed"),
        Cell("2.6.0", "3.9"): Outcome(8, 1),
    }
    assert table(outcomes).splitlines() == [
        "| torch | Python 3.9 | Python 3.12 |",
        "| --- | --- | --- |",
        "| 2.4.1 | – | 7 passed |",
        "| 2.6.0 | 8 passed, 1 failed | uv pip failed |",
    ]
