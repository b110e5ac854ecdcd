"""Who sends whom what: played through for all ranks, the rounds come to the tree's sums and spread every slice."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zeroopt.collectives.rounds import Rounds, Rows


def tree(ranks: range) -> object:
    """In which order `ops.reduce` adds, as nested pairs without an order of their own."""
    if len(ranks) == 1:
        return ranks[0]
    left = 1 << (len(ranks) - 1).bit_length() - 1
    return frozenset((tree(ranks[:left]), tree(ranks[left:])))


def play(size: int) -> tuple[list[Rounds], list[dict[int, object]]]:
    """All rounds, and of which slices each rank has the sum in the end, as nested pairs of ranks."""
    everyone = [Rounds.of(place, size) for place in range(size)]
    held: list[dict[int, object]] = [dict.fromkeys(range(size), place) for place in range(size)]
    for level in range((size - 1).bit_length()):
        before = [dict(sums) for sums in held]
        for place, rounds in enumerate(everyone):
            for step in (step for step in rounds.climb if step.level == level):
                assert set(step.holds.numbers) == set(before[place])
                theirs = next(other for other in everyone[step.source].climb if other.level == level)
                assert theirs.sends[place] == step.keeps
                assert all(isinstance(one, int) == step.source_is_alone for one in before[step.source].values())
                held[place] = {
                    number: frozenset((before[place][number], before[step.source][number]))
                    for number in step.keeps.numbers
                }
    return everyone, held


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 70))
def test_sums_are_those_of_the_tree(size: int) -> None:
    everyone, held = play(size)
    slices = everyone[0].slices
    assert sorted(slices) == list(range(size))
    assert all(rounds.slices == slices for rounds in everyone)
    for place, sums in enumerate(held):
        assert sums == {slices[place]: tree(range(size))} if size > 1 else {0: 0}


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 70))
def test_on_the_way_back_every_rank_gets_every_slice(size: int) -> None:
    everyone = [Rounds.of(place, size) for place in range(size)]
    known = [{rounds.slices[place]} for place, rounds in enumerate(everyone)]
    for level in reversed(range((size - 1).bit_length())):
        before = [set(slices) for slices in known]
        for place, rounds in enumerate(everyone):
            for step in (step for step in rounds.climb if step.level == level):
                assert before[place] == set(step.keeps.numbers)
                for other, rows in step.sends.items():
                    assert before[other] == set(rows.numbers)
                    known[place] |= before[other]
    assert known == [set(range(size))] * size


@pytest.mark.parametrize("size", [2, 8, 64, 1024])
def test_powers_of_two_halve_consecutive_rows(size: int) -> None:
    for place in (0, 1, size // 2, size - 1):
        climb = Rounds.of(place, size).climb
        assert len(climb) == size.bit_length() - 1
        for step in climb:
            ((to, sent),) = step.sends.items()
            assert to == step.source == place ^ 1 << step.level
            assert len(sent) == len(step.keeps) == len(step.holds) // 2
            assert sent.are_consecutive and step.keeps.are_consecutive and step.holds.are_consecutive


@pytest.mark.parametrize("size", [3, 6, 9, 24, 100, 1000])
def test_others_are_not_far_from_it(size: int) -> None:
    """In messages and slices sent; who stands alone on the right has to reach all on the left."""
    sent = []
    for place in range(size):
        climb = Rounds.of(place, size).climb
        sent.append(sum(len(rows) for step in climb for rows in step.sends.values()))
        assert all(step.level < after.level for step, after in pairwise(climb))
        for step in climb:
            right = size - (1 << step.level + 1) * (place >> step.level + 1) - (1 << step.level)
            assert len(step.sends) <= -(-(1 << step.level) // min(right, 1 << step.level))
    assert max(sent) <= 2 * size
    assert sum(sent) <= 1.3 * size * (size - 1)


def test_rows_of_a_matrix() -> None:
    matrix = torch.arange(12.0).view(6, 2)
    some, apart = Rows([2, 3, 4]), Rows([1, 4])
    assert torch.equal(some.of(matrix), matrix[2:5]) and some.of(matrix).data_ptr() == matrix[2].data_ptr()
    assert torch.equal(apart.of(matrix), matrix[[1, 4]])
    assert Rows([2, 4]).within(some) == Rows([0, 2])
