"""What travels between slices and own ranges: every element to who steps it, and both sides know the same pieces."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from zeroopt._C import Plan
from zeroopt.plan.redistribution import Redistribution


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    numels = draw(st.lists(st.integers(0, 60), min_size=1, max_size=12))
    costs = draw(st.lists(st.integers(0, 40), min_size=len(numels), max_size=len(numels)))
    count = len(numels)
    world_size, alignment = draw(st.integers(2, 9)), draw(st.sampled_from([1, 8]))
    bucket_bytes = draw(st.sampled_from([64, 256, 4096]))
    return Plan(numels, [0] * count, [4] * count, world_size, alignment, bucket_bytes, costs, padding_share=0.0)


@given(plans())
def test_every_element_gets_to_who_steps_it_and_back(plan: Plan) -> None:
    for number, bucket in enumerate(plan.buckets):
        moves = [Redistribution.of(plan, number, index) for index in range(plan.world_size)]
        if not bucket.owners:  # no padding at all
            assert moves == [None] * plan.world_size
            continue
        of_rank = [one for one in moves if one is not None]
        values = list(range(bucket.padded_numel))
        length = plan.shard_numel(number)
        sent: dict[tuple[int, int], list[int]] = {}
        for index, one in enumerate(of_rank):
            begin, end = one.slice_range
            assert index * length <= begin <= end <= (index + 1) * length or begin == end
            for owner, numel in one.to_owners.items():
                assert numel > 0
                sent[index, owner] = values[begin : begin + numel]
                begin += numel
            assert begin == end
            assert list(one.to_owners) == sorted(one.to_owners)
        for owner, one in enumerate(of_rank):
            assert one.own_range == plan.own_range(number, owner)
            assert list(one.from_slices) == sorted(one.from_slices)
            came = [value for index in one.from_slices for value in sent.pop((index, owner))]
            assert came == values[slice(*one.own_range)]
        assert not sent


@given(plans())
def test_an_owner_has_its_parameters_whole_and_side_by_side(plan: Plan) -> None:
    for number, bucket in enumerate(plan.buckets):
        for rank in range(plan.world_size) if bucket.owners else ():
            pieces = plan.segments(number, *plan.own_range(number, rank))
            owned = [i for i, owner in enumerate(bucket.owners) if owner == rank and bucket.numels[i]]
            assert [(p.param, p.start, p.numel) for p in pieces] == [
                (bucket.params[i], 0, bucket.numels[i]) for i in owned
            ]
            assert all(p.offset % plan.alignment == 0 for p in pieces)
