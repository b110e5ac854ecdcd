"""What ranks step and write of a bucket: nothing is left out, and nothing is written twice."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zeroopt._C import Plan
from zeroopt.plan.ownership import Ownership


def ranks(num_slices: int, *, by_slices: bool) -> list[Ownership]:
    return [Ownership(num_slices, index, by_slices=by_slices) for index in range(num_slices)]


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Of parameters that are cut, or lie across slices and have owners."""
    numels = draw(st.lists(st.integers(0, 40), min_size=1, max_size=10))
    costs = draw(st.lists(st.integers(0, 40), min_size=len(numels), max_size=len(numels)))
    owned = draw(st.booleans())
    return Plan(
        numels,
        [0] * len(numels),
        [4] * len(numels),
        draw(st.integers(1, 5)),
        8,
        draw(st.sampled_from([64, 256, 4096])),
        costs if owned else (),
        padding_share=0.0 if owned else float("inf"),
    )


@given(plans(), st.booleans())
def test_every_element_is_written_once_and_only_by_who_steps_it(plan: Plan, by_slices: bool) -> None:
    for number, bucket in enumerate(plan.buckets):
        written: list[int] = []
        for ownership in ranks(plan.world_size, by_slices=by_slices):
            begin, end = ownership.stepped(plan, number)
            first, last = ownership.written((begin, end))
            assert 0 <= first <= last <= end - begin
            written += range(begin + first, begin + last)
        held = bucket.offsets[-1] + bucket.numels[-1] if bucket.owners and by_slices else bucket.padded_numel
        assert written == list(range(held))


@pytest.mark.parametrize(("num_slices", "by_slices", "has_all"), [(1, True, True), (3, True, False), (3, False, True)])
def test_who_has_everything(num_slices: int, by_slices: bool, has_all: bool) -> None:
    plan = Plan([12], [0], [4], num_slices, 1, 100)
    for ownership in ranks(num_slices, by_slices=by_slices):
        assert ownership.has_all == has_all
        assert (ownership.stepped(plan, 0) == (0, 12)) == has_all


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
