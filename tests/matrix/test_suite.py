"""What is read from pytest's reports."""

from __future__ import annotations

from pathlib import Path

import pytest
from paths import ROOT

from tests.matrix.suite import OTHERS, RANKS, UNCHANGED, Outcome, read_report


def test_numbers_of_a_report(tmp_path: Path) -> None:
    path = tmp_path / "report.xml"
    path.write_text('<testsuites><testsuite tests="9" failures="1" errors="2" skipped="3"/></testsuites>')
    assert read_report(path) == Outcome(passed=3, failed=3, skipped=3)


@pytest.mark.parametrize(
    ("outcome", "good", "text"),
    [
        (Outcome(5, 0, 1), True, "5 passed, 1 skipped"),
        (Outcome(5, 1, 0), False, "5 passed, 1 failed"),
        (Outcome(0, 0, 7), False, "7 skipped"),
        (Outcome(5, 0, 0, "pytest ended with -9"), False, "pytest ended with -9"),
    ],
)
def test_an_outcome(outcome: Outcome, good: bool, text: str) -> None:
    assert (outcome.good, str(outcome)) == (good, text)


def test_what_it_selects_is_there() -> None:
    for test in RANKS:
        file, _, name = test.partition("::")
        assert f"def {name}" in (ROOT / file).read_text()
    assert all((ROOT / "tests" / path).exists() for path in (*OTHERS, *UNCHANGED))
