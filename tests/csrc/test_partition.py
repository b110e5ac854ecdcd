"""The planner: every element of every parameter has one owner, in aligned and equal slices, for any input."""

from __future__ import annotations

import heapq
import random
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

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


class WholeInputs(NamedTuple):
    """Of a plan in which parameters with a cost stay whole."""

    numels: list[int]
    kinds: list[int]
    costs: list[int | None]
    world_size: int
    alignment: int
    bucket_bytes: int

    def plan(self) -> Plan:
        item_bytes = [ITEM_BYTES[kind] for kind in self.kinds]
        sizes = (self.world_size, self.alignment, self.bucket_bytes)
        return Plan(self.numels, self.kinds, item_bytes, *sizes, self.costs)

    def aligned(self, param: int) -> int:
        return -(-self.numels[param] // self.alignment) * self.alignment


@st.composite
def whole_inputs(draw: st.DrawFn, most: int = 25) -> WholeInputs:
    costs = st.one_of(st.none(), st.integers(0, 1000))
    params = draw(st.lists(st.tuples(st.integers(0, 300), st.integers(0, 2), costs), max_size=most))
    return WholeInputs(
        [p[0] for p in params],
        [p[1] for p in params],
        [p[2] for p in params],
        draw(st.integers(1, 9)),
        draw(st.sampled_from([1, 2, 16, 64, 5])),
        draw(st.integers(1, 3000)),
    )


def slices(plan: Plan, index: int) -> list[list[int]]:
    """The parameters of a bucket by the slice in which they lie, without empty ones, which no rank steps."""
    bucket, length = plan.buckets[index], plan.shard_numel(index)
    result: list[list[int]] = [[] for _ in range(plan.world_size)]
    for param, offset, numel in zip(bucket.params, bucket.offsets, bucket.numels, strict=True):
        if numel:
            result[offset // length].append(param)
    return result


def loads(plan: Plan, costs: list[int | None]) -> list[int]:
    """What each rank has to do."""
    result = [0] * plan.world_size
    for index, bucket in enumerate(plan.buckets):
        for rank, params in enumerate(slices(plan, index) if bucket.whole else ()):
            result[rank] += sum(costs[param] or 0 for param in params)
    return result


@given(whole_inputs())
def test_whole_parameters_have_one_owner_each(inputs: WholeInputs) -> None:
    plan = inputs.plan()
    assert all(count == 1 for param in owners(plan, inputs.numels) for count in param)
    for index, bucket in enumerate(plan.buckets):
        assert {inputs.costs[param] is not None for param in bucket.params} == {bucket.whole}
        assert {inputs.kinds[param] for param in bucket.params} == {bucket.kind}
        assert bucket.numels == [inputs.numels[param] for param in bucket.params]
        assert bucket.offsets == sorted(bucket.offsets)
        assert all(offset % inputs.alignment == 0 for offset in bucket.offsets)
        length = plan.shard_numel(index)
        for rank in range(plan.world_size if bucket.whole else 0):
            for segment in plan.segments(index, rank * length, (rank + 1) * length):
                assert (segment.start, segment.numel) == (0, inputs.numels[segment.param])
    completed = [min(bucket.params) for bucket in plan.buckets]
    assert completed == sorted(completed, reverse=True)


@given(whole_inputs())
def test_slices_are_as_long_as_the_fullest(inputs: WholeInputs) -> None:
    """And that one is no longer than filling the emptiest slice each time makes it."""
    plan = inputs.plan()
    for index, bucket in enumerate(plan.buckets):
        if bucket.whole:
            length = plan.shard_numel(index)
            aligned = [sum(map(inputs.aligned, params)) for params in slices(plan, index)]
            assert length == max(*aligned, inputs.alignment)
            largest = max(map(inputs.aligned, bucket.params))
            assert length <= max(sum(aligned) / inputs.world_size + largest, inputs.alignment)


@given(whole_inputs())
def test_ranks_have_about_the_same_to_do(inputs: WholeInputs) -> None:
    """No two differ by more than the costliest slice of a bucket."""
    plan = inputs.plan()
    by_rank = loads(plan, inputs.costs)
    costliest = max(
        (
            sum(inputs.costs[param] or 0 for param in params)
            for i in range(len(plan.buckets))
            for params in slices(plan, i)
        ),
        default=0,
    )
    assert max(by_rank) - min(by_rank) <= costliest


@given(whole_inputs())
def test_whole_parameters_change_nothing_for_the_others(inputs: WholeInputs) -> None:
    cut = [i for i, cost in enumerate(inputs.costs) if cost is None]
    kinds = [inputs.kinds[i] for i in cut]
    alone = make_plan([inputs.numels[i] for i in cut], kinds, inputs.world_size, inputs.alignment, inputs.bucket_bytes)
    with_whole = [bucket for bucket in inputs.plan().buckets if not bucket.whole]
    for one, other in zip(alone.buckets, with_whole, strict=True):
        assert ([cut[i] for i in one.params], one.offsets) == (other.params, other.offsets)


@given(whole_inputs())
def test_whole_plans_are_deterministic(inputs: WholeInputs) -> None:
    one, two = inputs.plan(), inputs.plan()
    for a, b in zip(one.buckets, two.buckets, strict=True):
        assert (a.kind, a.whole, a.padded_numel, a.params, a.offsets) == (
            b.kind,
            b.whole,
            b.padded_numel,
            b.params,
            b.offsets,
        )


def price(inputs: WholeInputs, params: list[int], target: int) -> int:
    """Of a bucket, as csrc/whole_params.h says."""
    sizes = sorted(map(inputs.aligned, params), reverse=True)
    filled = [0] * inputs.world_size
    for size in sizes:
        filled[filled.index(min(filled))] += size
    padding = inputs.world_size * max(filled) - sum(sizes)
    return 16 * padding + 8 * max(0, sum(sizes) - target) + target


def divisions(params: list[int]) -> Iterator[list[list[int]]]:
    """All ways to divide a list into consecutive parts."""
    if not params:
        yield []
    for end in range(1, len(params) + 1):
        for rest in divisions(params[end:]):
            yield [params[:end], *rest]


@given(whole_inputs(most=7))
def test_no_other_buckets_have_a_lower_price(inputs: WholeInputs) -> None:
    for kind in set(inputs.kinds):
        arriving = [
            i for i in reversed(range(len(inputs.numels))) if inputs.kinds[i] == kind and inputs.costs[i] is not None
        ]
        total = max(sum(map(inputs.aligned, arriving)), inputs.alignment)
        target = min(max(inputs.bucket_bytes // ITEM_BYTES[kind], 1), total)
        found = [b.params for b in inputs.plan().buckets if b.kind == kind and b.whole]
        if not arriving:
            assert not found
            continue
        assert [param for params in found for param in sorted(params, reverse=True)] == arriving
        # Buckets beyond this are not looked at.
        most = max(target, 2 * inputs.world_size * max(map(inputs.aligned, arriving)))
        cheapest = min(
            sum(price(inputs, params, target) for params in division)
            for division in divisions(arriving)
            if all(sum(map(inputs.aligned, params[1:])) <= most for params in division)
        )
        assert sum(price(inputs, params, target) for params in found) == cheapest


def cuts_of(sizes: list[int], world_size: int, target: int) -> list[int]:
    """Where buckets of these sizes end, found by the plain search: of all divisions at the least price, the one whose last bucket is
    the shortest, and so on for what is before it."""
    most = max(target, 2 * world_size * max(sizes))
    cheapest, begin_of = [0], [0]
    for end in range(1, len(sizes) + 1):
        found = []
        for begin in range(end - 1, -1, -1):
            if sum(sizes[begin + 1 : end]) > most:
                break
            filled = [0] * world_size
            for size in sorted(sizes[begin:end], reverse=True):
                heapq.heapreplace(filled, filled[0] + size)
            contents = sum(sizes[begin:end])
            padding = world_size * max(filled) - contents
            found.append((cheapest[begin] + 16 * padding + 8 * max(0, contents - target) + target, -begin))
        price_of_all, negative = min(found)
        cheapest.append(price_of_all)
        begin_of.append(-negative)
    ends = [len(sizes)]
    while begin_of[ends[-1]]:
        ends.append(begin_of[ends[-1]])
    return ends[::-1]


@given(
    st.lists(st.integers(0, 1000), min_size=1, max_size=5).flatmap(
        lambda sizes: st.lists(st.sampled_from(sizes), min_size=1, max_size=60)
    ),
    st.integers(1, 9),
    st.sampled_from([1, 16]),
    st.integers(4, 100_000),
)
def test_buckets_are_those_of_the_plain_search(
    numels: list[int], world_size: int, alignment: int, bucket_bytes: int
) -> None:
    """With few sizes, of which many parameters are alike."""
    inputs = WholeInputs(numels, [0] * len(numels), [1] * len(numels), world_size, alignment, bucket_bytes)
    sizes = [inputs.aligned(param) for param in reversed(range(len(numels)))]
    target = min(max(bucket_bytes // ITEM_BYTES[0], 1), max(sum(sizes), alignment))
    found = sorted((bucket.params for bucket in inputs.plan().buckets), key=min, reverse=True)
    ends = cuts_of(sizes, world_size, target)
    assert [len(numels) - min(params) for params in found] == ends


def transformer(layers: int, width: int) -> list[tuple[int, int]]:
    """Shapes of the matrices of a GPT's blocks."""
    return [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)] * layers


@pytest.mark.parametrize(
    ("world_size", "padded", "imbalance"), [(1, 1.0, 1.0), (2, 1.0, 1.0), (3, 1.0, 1.0), (4, 1.0, 1.0), (8, 1.06, 1.06)]
)
def test_matrices_of_a_transformer(world_size: int, padded: float, imbalance: float) -> None:
    """144 units of d * d in matrices of 4 and less: slices fill evenly, and so does everyone's time."""
    shapes = transformer(12, 768)
    numels = [rows * columns for rows, columns in shapes]
    costs: list[int | None] = [rows * columns * min(rows, columns) for rows, columns in shapes]
    plan = Plan(numels, [0] * len(numels), [4] * len(numels), world_size, 32, 25 << 20, costs)
    assert sum(bucket.padded_numel for bucket in plan.buckets) <= padded * sum(numels)
    assert max(loads(plan, costs)) * world_size <= imbalance * sum(cost or 0 for cost in costs)
    largest = max(sum(bucket.numels) for bucket in plan.buckets)
    assert largest * 4 <= max(1.5 * (25 << 20), 2 * world_size * max(numels) * 4)


def test_more_ranks_than_whole_parameters() -> None:
    plan = Plan([100, 50], [0, 0], [4, 4], 5, 16, 10, [1, 1])
    assert [bucket.params for bucket in plan.buckets] == [[0, 1]]  # the smaller one costs nothing beside the larger
    assert plan.shard_numel(0) == 112
    assert sorted(loads(plan, [1, 1])) == [0, 0, 0, 1, 1]


def test_empty_whole_parameters() -> None:
    plan = Plan([0, 32, 0], [0] * 3, [4] * 3, 2, 32, 100, [0, 5, 0])
    assert sorted(param for bucket in plan.buckets for param in bucket.params) == [0, 1, 2]
    assert [s.param for i in range(len(plan.buckets)) for s in plan.segments(i, 0, plan.buckets[i].padded_numel)] == [1]


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


def test_large_whole_plan() -> None:
    """17 billion elements in 10,000 tensors for 64 ranks."""
    random.seed(0)
    numels = [random.randrange(1, 3_400_000) for _ in range(10_000)]
    costs: list[int | None] = [numel * 1000 for numel in numels]
    plan = Plan(numels, [0] * len(numels), [4] * len(numels), 64, 64, 25 << 20, costs)
    assert sorted(param for bucket in plan.buckets for param in bucket.params) == list(range(10_000))
    assert sum(bucket.padded_numel for bucket in plan.buckets) < 1.03 * sum(numels)
    assert max(loads(plan, costs)) * 64 < 1.02 * sum(cost or 0 for cost in costs)


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


@pytest.mark.parametrize(
    ("numels", "world_size", "costs", "message"),
    [
        ([1, 2], 2, [3], "expected no whole_costs or one for each parameter, got 1 for 2"),
        ([1, 2], 2, [None, -3], "parameter 1: its cost must not be negative, got -3"),
        ([1, 2], 2, [2**58, 2**58], "parameter 1: the sum of all costs is beyond 64 bits"),
        ([2**40], 2**20, [1], "world_size times the sum of all sizes is beyond 64 bits"),
    ],
)
def test_refuses_costs(numels: list[int], world_size: int, costs: list[int | None], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Plan(numels, [0] * len(numels), [4] * len(numels), world_size, 1, 100, costs)


def test_refuses_what_is_not_there() -> None:
    plan = Plan([10], [0], [4], 2, 4, 100)
    with pytest.raises(ValueError, match="there is no bucket 1; the plan has 1"):
        plan.shard_numel(1)
    with pytest.raises(ValueError, match="there is no bucket -1"):
        plan.segments(-1, 0, 1)
    for begin, end in ((-1, 2), (3, 2), (0, 17)):
        with pytest.raises(ValueError, match="is not within bucket 0 of 16 elements"):
            plan.segments(0, begin, end)
