"""The slowest of many."""

from __future__ import annotations

import random
from statistics import median

import pytest

from zeroopt.simulator.stragglers import slowest


def test_it_is_the_median_of_the_largest_of_drawn_factors() -> None:
    draw = random.Random(0)
    drawn = median(max(draw.lognormvariate(0.0, 0.1) for _ in range(200)) for _ in range(500))
    assert slowest(200, 0.1) == pytest.approx(drawn, rel=0.01)


def test_without_noise_or_company_nobody_is_late() -> None:
    assert slowest(10_000, 0.0) == slowest(1, 0.5) == 1
    assert slowest(10_000, 0.03) > slowest(100, 0.03) > slowest(2, 0.03) > 1
