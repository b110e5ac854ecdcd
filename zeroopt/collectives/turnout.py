"""Which ranks of a group still train, as far as sums over them depend on it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Turnout:
    """All of them, but within `join()`, which changes it.

    Attributes:
        divisor: by what sums of gradients are divided: the number of ranks, or of those that still train.
        source: the first rank that still trains, by its number in the group.
    """

    divisor: int
    source: int = 0
