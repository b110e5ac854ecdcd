"""What ranks step and write of a bucket: nothing is left out, and nothing is written twice."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zeroopt._C import Plan
from zeroopt.plan.ownership import Ownership


def ranks(num_slices: int, *, by_slices: bool) -> list[Ownership]:
    return [Ownership(num_slices, index, by_slices=by_slices) for index in range(num_slices)]


@given(st.integers(1, 9), st.integers(1, 100), st.booleans())
def test_every_element_is_written_once_and_only_by_who_steps_it(
    num_slices: int, slice_numel: int, by_slices: bool
) -> None:
    padded_numel = num_slices * slice_numel
    written: list[int] = []
    for ownership in ranks(num_slices, by_slices=by_slices):
        begin, end = ownership.stepped(padded_numel)
        first, last = ownership.written(padded_numel)
        assert 0 <= first < last <= end - begin
        written += range(begin + first, begin + last)
    assert written == list(range(padded_numel))


@pytest.mark.parametrize(("num_slices", "by_slices", "has_all"), [(1, True, True), (3, True, False), (3, False, True)])
def test_who_has_everything(num_slices: int, by_slices: bool, has_all: bool) -> None:
    for ownership in ranks(num_slices, by_slices=by_slices):
        assert ownership.has_all == has_all
        assert (ownership.stepped(12) == (0, 12)) == has_all


@given(st.lists(st.integers(0, 40), min_size=1, max_size=10), st.integers(1, 4))
def test_segments_are_the_parameters_cut_at_slices(numels: list[int], num_slices: int) -> None:
    plan = Plan(numels, [0] * len(numels), [4] * len(numels), num_slices, 8, 256)
    stepped = [0] * len(numels)
    for ownership in ranks(num_slices, by_slices=True):
        for piece in ownership.segments(plan):
            stepped[piece.param] += piece.numel
    assert stepped == numels
    for ownership in ranks(num_slices, by_slices=False):
        assert sorted((piece.param, piece.start, piece.numel) for piece in ownership.segments(plan)) == [
            (param, 0, numel) for param, numel in enumerate(numels) if numel
        ]
