"""Which releases go together."""

from __future__ import annotations

import re

from paths import ROOT

from tests.matrix.cells import PYTHONS, TORCHES, Cell, cells


def test_pairs_without_wheels_are_left_out() -> None:
    assert list(cells(["2.4.1", "2.6.0"], ["3.12", "3.13"])) == [
        Cell("2.4.1", "3.12"),
        Cell("2.6.0", "3.12"),
        Cell("2.6.0", "3.13"),
    ]


def test_a_release_that_is_not_listed_is_tried() -> None:
    assert list(cells(["2.99.0"], ["3.13"])) == [Cell("2.99.0", "3.13")]


def test_each_python_is_one_that_the_package_is_said_to_work_with() -> None:
    told = re.findall(r"Python :: (3\.\d+)", (ROOT / "pyproject.toml").read_text())
    assert set(PYTHONS) <= set(told)
    assert all(set(pythons) <= set(PYTHONS) for pythons in TORCHES.values())
