"""The planner: every element of every parameter has one owner, in aligned and equal slices, for any input."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zeroopt._C import Plan

ITEM_BYTES = [4, 2, 8]  # by kind


@st.composite
def plan_inputs(draw: st.DrawFn) -> tuple[list[int], list[int], int, int, int]:
    """numels, kinds, world_size, alignment, bucket_bytes"""
    params = draw(st.lists(st.tuples(st.integers(0, 300), st.integers(0, 2)), max_size=25))
    world_size = draw(st.integers(1, 9))
    alignment = draw(st.sampled_from([1, 2, 16, 64, 5]))
    bucket_bytes = draw(st.integers(1, 3000))
    return [p[0] for p in params], [p[1] for p in params], world_size, alignment, bucket_bytes


def make_plan(numels: list[int], kinds: list[int], world_size: int, alignment: int, bucket_bytes: int) -> Plan:
    return Plan(numels, kinds, [ITEM_BYTES[kind] for kind in kinds], world_size, alignment, bucket_bytes)


def owners(plan: Plan, numels: list[int]) -> list[list[int]]:
    """For each element of each parameter, how many ranks own it."""
    counts = [[0] * numel for numel in numels]
    for index in range(len(plan.buckets)):
        shard = plan.shard_numel(index)
        for rank in range(plan.world_size):
            for segment in plan.segments(index, rank * shard, (rank + 1) * shard):
                assert 0 <= segment.offset and segment.offset + segment.numel <= shard
                for element in range(segment.start, segment.start + segment.numel):
                    counts[segment.param][element] += 1
    return counts


@given(plan_inputs())
def test_every_element_has_one_owner(inputs: tuple[list[int], list[int], int, int, int]) -> None:
    plan = make_plan(*inputs)
    assert all(count == 1 for param in owners(plan, inputs[0]) for count in param)


@given(plan_inputs())
def test_layout_of_buckets(inputs: tuple[list[int], list[int], int, int, int]) -> None:
    numels, kinds, world_size, alignment, bucket_bytes = inputs
    plan = make_plan(*inputs)
    placed = []
    for index, bucket in enumerate(plan.buckets):
        placed += bucket.params
        assert bucket.params == sorted(bucket.params, reverse=True)
        assert {kinds[param] for param in bucket.params} == {bucket.kind}
        assert bucket.numels == [numels[param] for param in bucket.params]
        assert all(offset % alignment == 0 for offset in bucket.offsets)
        ends = [offset + numel for offset, numel in zip(bucket.offsets, bucket.numels, strict=True)]
        assert all(end <= offset for end, offset in zip(ends, bucket.offsets[1:], strict=False))
        assert ends[-1] <= bucket.padded_numel < max(ends[-1], 1) + world_size * alignment
        assert plan.shard_numel(index) * world_size == bucket.padded_numel
        assert plan.shard_numel(index) % alignment == 0
        assert len(bucket.params) == 1 or ends[-1] * ITEM_BYTES[bucket.kind] <= bucket_bytes
    assert sorted(placed) == list(range(len(numels)))


@given(plan_inputs())
def test_buckets_come_in_the_order_they_complete(inputs: tuple[list[int], list[int], int, int, int]) -> None:
    last_params = [bucket.params[-1] for bucket in make_plan(*inputs).buckets]
    assert last_params == sorted(last_params, reverse=True)


@given(plan_inputs())
def test_buckets_are_as_full_as_they_may_be(inputs: tuple[list[int], list[int], int, int, int]) -> None:
    """A bucket is closed only by a parameter of its kind that would not have fitted."""
    numels, _, _, alignment, bucket_bytes = inputs
    by_kind: dict[int, list[tuple[list[int], int]]] = {}
    for bucket in make_plan(*inputs).buckets:
        by_kind.setdefault(bucket.kind, []).append((bucket.params, bucket.offsets[-1] + bucket.numels[-1]))
    for kind, buckets in by_kind.items():
        for (_, end), (params, _) in pairwise(buckets):
            offset = -(-end // alignment) * alignment
            assert (offset + numels[params[0]]) * ITEM_BYTES[kind] > bucket_bytes


@given(plan_inputs())
def test_plans_are_deterministic(inputs: tuple[list[int], list[int], int, int, int]) -> None:
    one, two = make_plan(*inputs), make_plan(*inputs)
    for a, b in zip(one.buckets, two.buckets, strict=True):
        assert (a.kind, a.padded_numel, a.params, a.offsets) == (b.kind, b.padded_numel, b.params, b.offsets)


@given(plan_inputs(), st.data())
def test_segments_of_any_range(inputs: tuple[list[int], list[int], int, int, int], data: st.DataObject) -> None:
    """A range has the segments that walking its elements one by one gives."""
    plan = make_plan(*inputs)
    for index, bucket in enumerate(plan.buckets):
        begin = data.draw(st.integers(0, bucket.padded_numel))
        end = data.draw(st.integers(begin, bucket.padded_numel))
        expected = []
        for param, offset, numel in zip(bucket.params, bucket.offsets, bucket.numels, strict=True):
            inside = [i for i in range(numel) if begin <= offset + i < end]
            if inside:
                expected.append((param, inside[0], offset + inside[0] - begin, len(inside)))
        found = [(s.param, s.start, s.offset, s.numel) for s in plan.segments(index, begin, end)]
        assert found == expected


def test_no_parameters() -> None:
    assert Plan([], [], [], 4, 64, 100).buckets == []


def test_empty_parameters_have_a_place_and_no_segment() -> None:
    plan = Plan([0, 0], [0, 0], [4, 4], 2, 8, 100)
    assert [bucket.params for bucket in plan.buckets] == [[1, 0]]
    assert plan.buckets[0].padded_numel == 16
    assert plan.segments(0, 0, 16) == []


def test_large_plan() -> None:
    """17 billion elements in 10,000 tensors over 10,000 ranks: no overflow, and nothing lost."""
    random.seed(0)
    numels = [random.randrange(1, 3_400_000) for _ in range(10_000)]
    plan = Plan(numels, [0] * len(numels), [4] * len(numels), 10_000, 64, 25 << 20)
    assert 16e9 < sum(numels) < 18e9
    assert sum(bucket.padded_numel for bucket in plan.buckets) >= sum(numels)
    for index, bucket in enumerate(plan.buckets):
        shard = plan.shard_numel(index)
        for rank in (0, 4_999, 9_999):
            begin, end = rank * shard, (rank + 1) * shard
            ends = [offset + numel for offset, numel in zip(bucket.offsets, bucket.numels, strict=True)]
            overlaps = [max(0, min(end, e) - max(begin, o)) for o, e in zip(bucket.offsets, ends, strict=True)]
            assert sum(segment.numel for segment in plan.segments(index, begin, end)) == sum(overlaps)


def test_one_parameter_beyond_32_bits() -> None:
    plan = Plan([10**11], [0], [4], 8, 64, 1)
    last = plan.segments(0, 7 * plan.shard_numel(0), 8 * plan.shard_numel(0))[0]
    assert last.start + last.numel == 10**11


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1], [0], [4], 0, 1, 1), "world_size must be at least 1, got 0"),
        (([1], [0], [4], 1, 0, 1), "alignment must be at least 1, got 0"),
        (([1], [0], [4], 1, 1, 0), "bucket_bytes must be at least 1, got 0"),
        (([2, -1], [0, 0], [4, 4], 1, 1, 1), "parameter 1: numel must not be negative, got -1"),
        (([1], [-1], [4], 1, 1, 1), "parameter 0: kind must not be negative, got -1"),
        (([1], [0], [0], 1, 1, 1), "parameter 0: item_bytes must be 1 to 16, got 0"),
        (([2**62], [0], [4], 1, 1, 1), "the sum of all sizes is beyond 64 bits"),
        (([1], [0], [4], 2**40, 2**40, 1), "beyond 64 bits"),
        (([1, 2], [0], [4], 1, 1, 1), "numels, kinds and item_bytes of one length, got 2, 1 and 1"),
    ],
)
def test_refuses(arguments: tuple[list[int], list[int], list[int], int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Plan(*arguments)


def test_refuses_what_is_not_there() -> None:
    plan = Plan([10], [0], [4], 2, 4, 100)
    with pytest.raises(ValueError, match="there is no bucket 1; the plan has 1"):
        plan.shard_numel(1)
    with pytest.raises(ValueError, match="there is no bucket -1"):
        plan.segments(-1, 0, 1)
    for begin, end in ((-1, 2), (3, 2), (0, 17)):
        with pytest.raises(ValueError, match="is not within bucket 0 of 16 elements"):
            plan.segments(0, begin, end)
