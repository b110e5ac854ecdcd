"""Which parameters share a bucket, in what order, and that ranks with whole parameters have about the same to do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lone_slice import params_of
from thread_ranks import on_threads, told_on_threads
from torch import nn

from zeroopt.collectives.control import lone_control
from zeroopt.options.precision import Precision
from zeroopt.plan.buckets import (
    PLANNING_ANEW,
    agree_on_order,
    choose_bucket_bytes,
    in_order,
    is_grouped_alike,
    make_plan,
    most_incomplete,
)
from zeroopt.plan.ownership import Ownership
from zeroopt.plan.params import Grain, ManagedParam

BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64


def of_sizes(*sizes: int) -> list[ManagedParam]:
    return params_of(*map(torch.empty, sizes))


def ownership(world_size: int = 2, *, by_slices: bool = True) -> Ownership:
    return Ownership(world_size, 0, by_slices=by_slices)


@given(st.lists(st.integers(0, 50), min_size=1, max_size=12), st.randoms(use_true_random=False))
@settings(max_examples=50)
def test_every_order_holds_every_parameter_once(sizes: list[int], random: Any) -> None:
    params = of_sizes(*sizes)
    order = list(range(len(sizes)))
    random.shuffle(order)
    ordered = in_order(params, order)
    plan = make_plan(ordered, ownership(), 256, Precision())
    held = [ordered[i].index for bucket in plan.buckets for i in bucket.params]
    assert sorted(held) == list(range(len(sizes)))
    assert held == order, "buckets hold the parameters in the order of arrival"
    assert is_grouped_alike([], plan, ordered) == (not plan.buckets)


def kinds_of(params: list[ManagedParam], precision: Precision) -> list[list[str]]:
    plan = make_plan(params, ownership(), 1 << 20, precision)
    return sorted(sorted(params[i].name for i in bucket.params) for bucket in plan.buckets)


def test_those_of_one_dtype_device_and_number_of_copies_share_buckets() -> None:
    params = params_of(*(torch.empty(3, dtype=dtype) for dtype in (F32, F64, F32, BF16, F32)))
    params.append(ManagedParam("meta", nn.Parameter(torch.empty(3, device="meta")), 5, 0, 5))
    params[2].copies = 2
    assert kinds_of(params, Precision()) == [["meta"], ["p0", "p4"], ["p1"], ["p2"], ["p3"]]
    params[2].copies = 1
    params.pop()
    kept = [p for p in params if p.param.dtype is not F64]
    assert kinds_of(kept, Precision(BF16)) == [["p0", "p2", "p3", "p4"]], "which are all kept in one dtype"


@pytest.mark.parametrize(("precision", "alignment"), [(Precision(), 32), (Precision(state_dtype=torch.int8), 256)])
def test_parameters_and_slices_begin_where_they_may(precision: Precision, alignment: int) -> None:
    plan = make_plan(of_sizes(5, 300, 1), ownership(3), 1 << 20, precision)
    (bucket,) = plan.buckets
    assert all(offset % alignment == 0 for offset in bucket.offsets)
    assert bucket.padded_numel % (3 * alignment) == 0


def test_sizes_of_buckets_are_counted_in_the_dtype_that_is_kept() -> None:
    params = of_sizes(*[64] * 8)
    in_float32 = make_plan(params, ownership(1), 64 * 4 * 2, Precision())
    in_bfloat16 = make_plan(params, ownership(1), 64 * 4 * 2, Precision(BF16))
    assert [len(bucket.params) for bucket in in_float32.buckets] == [2] * 4
    assert [len(bucket.params) for bucket in in_bfloat16.buckets] == [4] * 2


@pytest.mark.parametrize("world_size", [2, 3, 4, 8, 16])
def test_ranks_have_about_the_same_to_do(world_size: int) -> None:
    """Of the matrices of a transformer with grouped queries, in which a rank's elements are no measure of its work."""
    width = 256
    block = [
        (width, width),
        (width // 4, width),
        (width // 4, width),
        (width, width),
        (3 * width, width),
        (width, 3 * width),
    ]
    params = [
        ManagedParam(str(i), nn.Parameter(torch.empty(shape, device="meta")), i, 0, i, Grain.MATRIX)
        for i, shape in enumerate(block * 12)
    ]
    plan = make_plan(params, Ownership(world_size, 0, by_slices=True), 2**20, Precision())
    load = [0] * world_size
    for index in range(len(plan.buckets)):
        for rank in range(world_size):
            for segment in plan.segments(index, *plan.own_range(index, rank)):
                assert segment.numel == params[segment.param].numel
                load[rank] += params[segment.param].whole_cost or 0
    assert max(load) * world_size <= 1.05 * sum(load)
    assert sum(bucket.padded_numel for bucket in plan.buckets) <= 1.01 * sum(param.numel for param in params)
    in_one_piece = make_plan(params, Ownership(world_size, 0, by_slices=False), 2**20, Precision())
    assert not any(bucket.whole for bucket in in_one_piece.buckets)


@pytest.mark.parametrize(
    ("arrivals", "order"),
    [([2, 0, 3, 1], [2, 0, 3, 1]), ([2, 0], [2, 0, 3, 1]), ([], [3, 2, 1, 0]), ([1], [1, 3, 2, 0])],
)
def test_those_that_did_not_come_are_last_in_the_order_of_the_plan(arrivals: list[int], order: list[int]) -> None:
    assert agree_on_order(arrivals, of_sizes(1, 2, 3, 4), lone_control()) == order


def test_rank_0_says_in_what_order() -> None:
    arrivals = [[2, 0], [1], [0, 1, 2]]
    orders = on_threads(3, lambda control: agree_on_order(arrivals[control.rank], of_sizes(1, 2, 3), control))
    assert orders == [[2, 0, 1]] * 3
    told = told_on_threads(2, lambda control: agree_on_order([], of_sizes(1, 2), control))
    assert told == [PLANNING_ANEW]


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        ([0, 1, 2, 3, 4, 5], 1),
        ([1, 0, 3, 2, 5, 4], 1),
        ([0, 2, 1, 3, 4, 5], 2),
        ([0, 2, 4, 1, 3, 5], 3),
        ([4, 5, 0, 2, 3, 1], 2),
    ],
)
def test_buckets_that_are_filled_side_by_side(order: list[int], expected: int) -> None:
    assert most_incomplete([{0, 1}, {2, 3}, {4, 5}], order) == expected


def test_buckets_of_one_parameter_are_complete_at_once() -> None:
    assert most_incomplete([{0}, {1}, {2}], [2, 0, 1]) == 0


def test_groups_are_compared_whatever_the_order_within_them() -> None:
    params = of_sizes(64, 64, 64, 64)
    order = [2, 3, 1, 0]
    ordered = in_order(params, order)
    plan = make_plan(ordered, ownership(1), 64 * 4 * 2, Precision())
    assert is_grouped_alike([{2, 3}, {0, 1}], plan, ordered)
    assert not is_grouped_alike([{0, 1}, {2, 3}], plan, ordered), "buckets travel in this order"
    assert not is_grouped_alike([{2, 3}, {1}, {0}], plan, ordered)
    assert not is_grouped_alike([{2, 1}, {0, 3}], plan, ordered)


MIB = 2**20


@pytest.mark.parametrize(
    ("bucket_mb", "param_bytes", "expected"),
    [
        (25, 0, 25 * MIB),
        (0.5, 0, MIB // 2),
        (1e-9, 10**12, 1),
        (None, 1000, MIB),
        (None, 100 * MIB, 5 * MIB),
        (None, 10**12, 25 * MIB),
    ],
)
def test_bytes_of_a_bucket(bucket_mb: float | None, param_bytes: int, expected: int) -> None:
    assert choose_bucket_bytes(bucket_mb, param_bytes) == expected


@pytest.mark.parametrize(
    ("hops", "param_bytes", "expected"),
    [(25, 10**12, 25), (127, 10**12, 127), (1023, 2000 * MIB, 100), (1023, 100 * MIB, 5), (0, 10**12, 25)],
)
def test_many_hops_call_for_large_buckets_as_far_as_the_model_is_large(
    hops: int, param_bytes: int, expected: int
) -> None:
    assert choose_bucket_bytes(None, param_bytes, hops) == expected * MIB
    assert choose_bucket_bytes(1, param_bytes, hops) == MIB


def test_buckets_are_no_larger_in_what_their_gradients_travel_in() -> None:
    params = of_sizes(*[100] * 8)
    narrow = make_plan(params, ownership(), 1600, Precision(BF16))
    wide = make_plan(params, ownership(), 1600, Precision(BF16), F32)
    assert (len(narrow.buckets), len(wide.buckets)) == (2, 3)


def gpt2(layers: int, width: int) -> list[list[int]]:
    """Shapes of the parameters of a GPT-2."""
    norm, block = [[width], [width]], [[width, 3 * width], [3 * width], [width, width], [width]]
    mlp = [[width, 4 * width], [4 * width], [4 * width, width], [width]]
    return [[50257, width], [1024, width], *[*norm, *block, *norm, *mlp] * layers, *norm]


GPT2 = {"small": gpt2(12, 768), "XL": gpt2(48, 1600)}


@given(
    st.sampled_from(sorted(GPT2)),
    st.integers(8, 10_000),
    st.sampled_from([Precision(), Precision(BF16), Precision(BF16, "remainder", BF16)]),
    st.floats(1, 100),
    st.sampled_from([None, F32]),
)
@settings(max_examples=60, deadline=None)
def test_padding_is_below_one_in_a_hundred(
    model: str, world_size: int, precision: Precision, bucket_mb: float, wire_dtype: torch.dtype | None
) -> None:
    shapes = GPT2[model]
    params = params_of(*(torch.empty(shape, device="meta") for shape in shapes))
    plan = make_plan(params, ownership(world_size), choose_bucket_bytes(bucket_mb, 0), precision, wire_dtype)
    padded = sum(bucket.padded_numel for bucket in plan.buckets)
    assert padded <= 1.01 * sum(managed.numel for managed in params)


@pytest.mark.parametrize(
    ("model", "world_size", "percent"), [("small", 1024, 1), ("XL", 10_000, 1), ("small", 10_000, 1.5)]
)
def test_padding_with_moments_of_8_bits(model: str, world_size: int, percent: float) -> None:
    """GPT-2 small has 49 blocks of 256 for each of 10,000 ranks."""
    params = params_of(*(torch.empty(shape, device="meta") for shape in GPT2[model]))
    plan = make_plan(params, ownership(world_size), 1 << 20, Precision(state_dtype=torch.int8))
    padded = sum(bucket.padded_numel for bucket in plan.buckets)
    assert padded <= (1 + percent / 100) * sum(managed.numel for managed in params)


def test_few_ranks_have_the_buckets_that_were_asked_for() -> None:
    """Of small buckets too: a page of padding is not worth a larger bucket."""
    params = of_sizes(*[100] * 60)
    plan = make_plan(params, ownership(8), 4 * 1024, Precision())
    assert [len(bucket.params) for bucket in plan.buckets] == [8, 8, 8, 8, 8, 8, 8, 4]
    assert [bucket.padded_numel for bucket in plan.buckets] == [1024] * 7 + [512]
