"""The slowest of many ranks, for which all others wait."""

from __future__ import annotations

from math import exp
from statistics import NormalDist


def slowest(num_ranks: int, noise: float) -> float:
    """The median of the largest of so many factors whose median is 1.

    Args:
        noise: standard deviation of their logarithms, which are distributed normally.
    """
    if noise == 0 or num_ranks < 2:
        return 1.0
    quantile: float = 0.5 ** (1 / num_ranks)  # the largest is below it in half of all cases
    return exp(noise * NormalDist().inv_cdf(quantile))
