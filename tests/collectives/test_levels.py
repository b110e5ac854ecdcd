"""Levels are a pure matter of numbers: every rank has its groups and a slice of its own."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zeroopt.collectives.levels import Levels


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.randoms(use_true_random=False))
def test_groups_and_slices(sizes: list[int], random: object) -> None:
    ranks = list(range(math.prod(sizes)))
    random.shuffle(ranks)  # type: ignore[attr-defined]
    levels = Levels(tuple(sizes), tuple(ranks))
    assert sorted(map(levels.slice_of, ranks)) == sorted(ranks)
    for rank in ranks:
        for level, size in enumerate(sizes):
            members = levels.members(rank, level)
            assert len(members) == size and members[levels.part(rank, level)] == rank
            assert all(levels.members(other, level) == members for other in members)
        # What is kept on each level is a block of consecutive slices, of all who keep the same so far.
        kept = [
            {other for other in ranks if all(levels.part(other, i) == levels.part(rank, i) for i in range(level))}
            for level in range(len(sizes) + 1)
        ]
        for block, part in pairwise(kept):
            owned = sorted(levels.slice_of(other) for other in part)
            assert part <= block and owned == list(range(owned[0], owned[0] + len(part)))


@pytest.mark.parametrize(
    ("hosts", "sizes", "slices"),
    [
        ([[0, 1], [2, 3]], (2, 2), [0, 2, 1, 3]),
        ([[0, 2], [1, 3]], (2, 2), [0, 1, 2, 3]),
        ([[0, 1], [2, 3], [4, 5]], (2, 3), [0, 3, 1, 4, 2, 5]),
        ([[0, 1, 2]], (3,), [0, 1, 2]),
        ([[0], [1]], (2,), [0, 1]),
        ([[0]], (1,), [0]),
    ],
)
def test_levels_of_hosts(hosts: list[list[int]], sizes: tuple[int, ...], slices: list[int]) -> None:
    levels = Levels.of_hosts(hosts)
    assert levels.sizes == sizes
    assert [levels.slice_of(rank) for rank in range(len(slices))] == slices
