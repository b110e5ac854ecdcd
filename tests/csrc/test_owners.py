"""Which rank steps which whole parameter: no layout pads more than the limit, and no rank has much more to do than others."""

from __future__ import annotations

from itertools import product
from math import prod

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zeroopt._C import BucketPlan, Plan


def plan_of(numels: list[int], costs: list[int | None], world_size: int, bucket_bytes: int = 1 << 20) -> Plan:
    count = len(numels)
    return Plan(numels, [0] * count, [4] * count, world_size, 8, bucket_bytes, costs, padding_share=0.0)


def loads(plan: Plan, costs: list[int | None]) -> list[int]:
    """What each rank has to do."""
    result = [0] * plan.world_size
    for number, bucket in enumerate(plan.buckets):
        for rank in range(plan.world_size if bucket.whole else 0):
            begin, end = plan.own_range(number, rank)
            result[rank] += sum(costs[piece.param] or 0 for piece in plan.segments(number, begin, end))
    return result


def is_owned(bucket: BucketPlan) -> bool:
    return bool(bucket.owners)


costs_of_few = st.lists(st.integers(1, 60), min_size=1, max_size=7)


@given(costs_of_few, st.integers(2, 3))
def test_the_busiest_has_little_more_than_it_must(costs: list[int], world_size: int) -> None:
    """MULTIFIT is within 13/11 of the best assignment (Yue 1990), which is found here by trying all."""
    numels = [1 + cost for cost in costs]  # of odd sizes, so that slices would pad
    plan = plan_of(numels, list(costs), world_size)
    if not all(map(is_owned, plan.buckets)):
        return
    everyone = loads(plan, list(costs))
    assert sum(everyone) == sum(costs)
    best = min(
        max(sum(cost for cost, owner in zip(costs, owners, strict=True) if owner == rank) for rank in range(world_size))
        for owners in product(range(world_size), repeat=len(costs))
    )
    assert best <= max(everyone) <= best * 13 / 11 + 1


@given(
    st.lists(st.tuples(st.integers(0, 300), st.one_of(st.none(), st.integers(0, 50))), max_size=20),
    st.integers(1, 9),
    st.integers(16, 3000),
)
def test_layout(params: list[tuple[int, int | None]], world_size: int, bucket_bytes: int) -> None:
    numels, costs = [numel for numel, _ in params], [cost for _, cost in params]
    plan = plan_of(numels, costs, world_size, bucket_bytes)
    assert sorted(i for bucket in plan.buckets for i in bucket.params) == list(range(len(params)))
    for number, bucket in enumerate(plan.buckets):
        assert {costs[i] is not None for i in bucket.params} == {bucket.whole}
        assert bucket.offsets == sorted(bucket.offsets)
        assert all(offset % 8 == 0 for offset in bucket.offsets)
        assert bucket.padded_numel % (8 * world_size) == 0
        if not bucket.owners:
            continue
        assert bucket.owners == sorted(bucket.owners)
        end = 0
        for rank in range(world_size):
            begin, next_end = plan.own_range(number, rank)
            assert begin == end or begin == next_end, "ranges follow one another"
            end = max(end, next_end)
        assert end == bucket.offsets[-1] + bucket.numels[-1]


def transformer(layers: int, width: int) -> list[tuple[int, int]]:
    """Shapes of the matrices of a GPT's blocks."""
    return [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)] * layers


@pytest.mark.parametrize(
    ("layers", "width", "world_size", "imbalance"),
    [
        (48, 1600, 64, 0.0),
        (48, 1600, 48, 0.0),
        (48, 1600, 100, 0.4),
        (12, 768, 16, 0.0),
        (12, 768, 24, 0.17),
        (12, 768, 64, 0.78),
    ],
)
def test_matrices_of_a_transformer(layers: int, width: int, world_size: int, imbalance: float) -> None:
    """Of sizes 4, 3 and 1 times d * d: little padding for any number of ranks, and as even as matrices that are whole allow."""
    shapes = transformer(layers, width)
    numels, costs = [prod(shape) for shape in shapes], [prod(shape) * min(shape) for shape in shapes]
    given_costs: list[int | None] = list(costs)
    count = len(numels)
    plan = Plan(numels, [0] * count, [4] * count, world_size, 32, 25 << 20, given_costs, padding_share=0.01)
    assert sum(bucket.padded_numel for bucket in plan.buckets) <= 1.01 * sum(numels)
    assert max(loads(plan, given_costs)) * world_size <= (1 + imbalance) * sum(costs)


def test_few_ranks_keep_slices_that_need_no_padding() -> None:
    plan = Plan([64] * 4, [0] * 4, [4] * 4, 2, 32, 256, [1] * 4, padding_share=0.01)
    assert not any(map(is_owned, plan.buckets))


def test_who_has_much_to_do_in_slices_gets_less_elsewhere() -> None:
    """Two kinds, of which one needs no padding and the other does."""
    numels, kinds = [64, 64, 8, 8, 8], [0, 0, 1, 1, 1]
    costs: list[int | None] = [9, 1, 3, 3, 2]
    plan = Plan(numels, kinds, [4] * 5, 2, 8, 1 << 20, costs, padding_share=0.0)
    assert sorted(map(is_owned, plan.buckets)) == [False, True]
    assert sorted(loads(plan, costs)) == [9, 9]


def test_there_is_no_rank_beyond_the_last() -> None:
    plan = plan_of([10], [1], 2)
    with pytest.raises(ValueError, match="there is no rank 2; the plan has 2"):
        plan.own_range(0, 2)
    with pytest.raises(ValueError, match="padding_share must not be negative"):
        Plan([1], [0], [4], 1, 1, 1, padding_share=-1.0)
    with pytest.raises(ValueError, match="padding_bytes must not be negative"):
        Plan([1], [0], [4], 1, 1, 1, padding_bytes=-1)
    with pytest.raises(ValueError, match="slice_alignment must be at least 1"):
        Plan([1], [0], [4], 1, 1, 1, slice_alignment=0)
