"""Buckets borrow buffers, of which there are as many as were asked for, and no more."""

from __future__ import annotations

import pytest
import torch
from lone_slice import LoneSlice, buckets_of, config_with, params_of, values
from recorded_streams import recorded_streams

from zeroopt.options.precision import Precision
from zeroopt.storage import buffer_pool
from zeroopt.storage.bucket import Bucket
from zeroopt.storage.buffer_pool import BufferPool, bytes_of_buffer, bytes_of_sum, num_buffers
from zeroopt.streams import Mark

BF16 = torch.bfloat16
BIG = 1 << 20  # bytes, in which all of these buckets fit


def buckets(*numels: int, precision: Precision | None = None) -> list[Bucket]:
    """One for each of these sizes."""
    made = buckets_of(params_of(*(values((n,)) for n in numels)), LoneSlice(), bucket_bytes=1, precision=precision)
    return made[::-1]


@pytest.mark.parametrize(("options", "count"), [({}, 2), ({"bucket_buffers": 3}, 3), ({"overlap": False}, 1)])
def test_there_are_as_many_as_asked_for_and_one_where_nothing_overlaps(options: dict[str, int], count: int) -> None:
    config, transport = config_with(**options), LoneSlice()
    pool = BufferPool(config, BIG, transport)
    pool.fit(buckets(100, 10))
    assert num_buffers(config) == len(pool.idle) == len(transport.allocated) == count


@pytest.mark.parametrize(
    ("options", "precision", "itemsize"),
    [
        ({}, Precision(), 4),
        ({"reduce_dtype": BF16}, Precision(), 2),
        ({}, Precision(BF16), 2),
        ({"reduce_dtype": torch.float32}, Precision(BF16), 4),
    ],
)
def test_the_largest_bucket_fits_in_what_travels(
    options: dict[str, torch.dtype], precision: Precision, itemsize: int
) -> None:
    made = buckets(10, 300, 40, precision=precision)
    config = config_with(precision=precision, **options)
    assert bytes_of_buffer(config, BIG, made, 1) == max(bucket.padded_numel for bucket in made) * itemsize
    assert bytes_of_buffer(config, BIG, [], 1) == 0


def test_a_borrowed_buffer_is_as_large_as_was_asked_for() -> None:
    pool = BufferPool(config_with(), BIG, LoneSlice())
    small, large = buckets(10, 100)
    pool.fit([small, large])
    full = pool.borrow(small.padded_numel, torch.float32)
    assert full.shape == (small.padded_numel,) and full.dtype is torch.float32
    other = pool.borrow(large.padded_numel, BF16)
    assert other.shape == (large.padded_numel,) and other.dtype is BF16
    assert other.data_ptr() != full.data_ptr()
    assert not pool.idle


def test_the_one_that_came_back_last_is_lent_first() -> None:
    pool = BufferPool(config_with(bucket_buffers=3), BIG, LoneSlice())
    (bucket,) = buckets(10)
    pool.fit([bucket])
    first, second = (pool.borrow(bucket.padded_numel, torch.float32) for _ in range(2))
    addresses = [first.data_ptr(), second.data_ptr()]
    pool.give_back(first)
    pool.give_back(second)
    assert len(pool.idle) == 3
    assert [pool.borrow(bucket.padded_numel, torch.float32).data_ptr() for _ in range(2)] == addresses[::-1]


def test_others_are_made_only_where_larger_ones_are_needed() -> None:
    transport = LoneSlice()
    pool = BufferPool(config_with(), BIG, transport)
    pool.fit(buckets(100))
    before = [raw.data_ptr() for raw in pool.idle]
    pool.fit(buckets(10))
    pool.fit(buckets(100))
    assert [raw.data_ptr() for raw in pool.idle] == before and not transport.freed
    pool.fit(buckets(10, 500))
    assert transport.freed == before
    assert len(pool.idle) == 2 and min(raw.numel() for raw in pool.idle) >= 500 * 4


@pytest.mark.parametrize("num_slices", [1, 2, 8, 64])
@pytest.mark.parametrize("options", [{}, {"reduce_dtype": BF16}])
def test_no_buffer_is_larger_than_a_bucket_however_large_a_parameter_is(
    num_slices: int, options: dict[str, torch.dtype]
) -> None:
    transport, bucket_bytes = LoneSlice(num_slices), 10_000
    pool = BufferPool(config_with(**options), bucket_bytes, transport)
    (huge,) = buckets_of(params_of(values((1000, 300))), transport, bucket_bytes=bucket_bytes)
    (small,) = buckets_of(params_of(values((10,))), transport, bucket_bytes=bucket_bytes)
    pool.fit([small, huge])
    padding = num_slices * huge.precision.alignment * 4
    assert all(raw.numel() < bucket_bytes + padding for raw in pool.idle)
    assert [stripe.is_whole for stripe in pool.stripes(small)] == [True]
    stripes = pool.stripes(huge)
    assert sum(stripe.numel for stripe in stripes) == huge.padded_numel
    assert max(stripe.numel for stripe in stripes) * (2 if options else 4) == pool.idle[0].numel()


def test_all_are_given_up_lent_ones_too() -> None:
    transport = LoneSlice()
    pool = BufferPool(config_with(), BIG, transport)
    made = buckets(10)
    pool.fit(made)
    addresses = {raw.data_ptr() for raw in pool.idle}
    pool.borrow(made[0].padded_numel, torch.float32)
    pool.free()
    assert set(transport.freed) == addresses and not pool.idle
    pool.fit(made)
    assert len(pool.idle) == 2, "it can be used again"


@pytest.mark.parametrize("lends", [True, False])
def test_sums_of_buckets_that_are_stepped_at_once_lie_in_the_memory_of_the_largest(lends: bool) -> None:
    pool = BufferPool(config_with(step_in_backward=lends), BIG, LoneSlice())
    assert pool.lends_sums is lends
    made = buckets(10, 500, 40, precision=Precision(BF16))
    pool.fit(made)
    cpu = torch.device("cpu")
    sums = [pool.scratch(bucket.own_param, torch.float32, cpu) for bucket in made]
    assert [len(one) for one in sums] == [len(bucket.own_param) for bucket in made]
    assert len({one.data_ptr() for one in sums}) == 1
    assert sums[0].untyped_storage().nbytes() == max(map(bytes_of_sum, made)) == 4 * max(map(len, sums))
    (larger,) = buckets(2000, precision=Precision(BF16))
    pool.fit([*made, larger])
    assert pool.scratch(larger.own_param, torch.float32, cpu).untyped_storage().nbytes() == bytes_of_sum(larger)


def test_who_borrows_a_buffer_comes_behind_who_gave_it_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffer_pool, "Mark", lambda device: Mark(torch.device("cuda")))
    pool, made = BufferPool(config_with(bucket_buffers=1), BIG, LoneSlice()), buckets(10)
    pool.fit(made)
    with recorded_streams() as streams:
        with streams.stream("first"):
            full = pool.borrow(made[0].padded_numel, torch.float32)
            pool.give_back(full)
        with streams.stream("second"):
            pool.borrow(made[0].padded_numel, torch.float32)
    assert streams.log == ["second waits for first"]
