"""Parameters move into flat buffers: they keep their values, and what is a rank's own lies in its range."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from lone_slice import LoneSlice, buckets_of, params_of, values
from torch import Tensor

from zeroopt.options.precision import Precision, round_master
from zeroopt.plan.buckets import make_plan
from zeroopt.plan.ownership import Ownership
from zeroopt.plan.params import Grain, ManagedParam
from zeroopt.storage.bucket import Bucket, lay_out_buckets

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
ROUNDED = [Precision(BF16), Precision(F16), Precision(BF16, "remainder")]


def tensors(dtype: torch.dtype = F32) -> list[Tensor]:
    """Sizes that nothing divides, no dimension, no element, and other memory formats."""
    made = [
        values((), 0),
        values((5, 7), 1),
        values((0, 3), 2),
        values((2, 3, 4, 5), 3).contiguous(memory_format=torch.channels_last),
        values((9, 4), 4).t(),
        values((41,), 5),
    ]
    return [value.to(dtype) for value in made]


def is_inside(part: Tensor, whole: Tensor) -> bool:
    begin, end = whole.data_ptr(), whole.data_ptr() + whole.nbytes
    return part.numel() == 0 or (begin <= part.data_ptr() and part.data_ptr() + part.nbytes <= end)


def covered(bucket: Bucket) -> Tensor:
    """[padded_numel], whether a parameter has the element."""
    mask = torch.zeros(bucket.padded_numel, dtype=torch.bool)
    for managed in bucket.params:
        mask[managed.offset : managed.offset + managed.numel] = True
    return mask


def only(buckets: Sequence[Bucket]) -> Bucket:
    (bucket,) = buckets
    return bucket


@pytest.mark.parametrize("dtype", [F32, F64, BF16])
@pytest.mark.parametrize("by_slices", [True, False])
def test_parameters_keep_values_and_memory_format(dtype: torch.dtype, by_slices: bool) -> None:
    before = tensors(dtype)
    params = params_of(*before)
    bucket = only(buckets_of(params, LoneSlice(3, 1), by_slices=by_slices))
    for value, managed in zip(before, params, strict=True):
        assert torch.equal(managed.param, value)
        assert managed.param.stride() == value.stride()
        assert is_inside(managed.param.data, bucket.flat_param)
    assert not bucket.flat_param[~covered(bucket)].any(), "gaps are zero"
    assert int(covered(bucket).sum()) == sum(value.numel() for value in before)


@pytest.mark.parametrize("num_slices", [1, 2, 3])
def test_segments_of_all_ranks_are_the_parameters(num_slices: int) -> None:
    before = tensors()
    found = [torch.zeros(value.numel()) for value in before]
    for index in range(num_slices):
        params = params_of(*before)
        bucket = only(buckets_of(params, LoneSlice(num_slices, index)))
        assert bucket.own_param.numel() * num_slices == bucket.padded_numel
        for segment in bucket.segments:
            found[segment.owner.index][segment.start : segment.start + segment.numel] += segment.shard.detach()
            segment.shard.data.mul_(-1)
            flat = segment.owner.flatten(segment.owner.param.detach())
            negated = -segment.owner.flatten(before[segment.owner.index])
            assert torch.equal(
                flat[segment.start : segment.start + segment.numel],
                negated[segment.start : segment.start + segment.numel],
            ), "what is written to a shard is in the parameter"
    for managed, got in zip(params_of(*before), found, strict=True):
        assert torch.equal(got, managed.flatten(managed.local))


def test_a_rank_that_steps_everything_has_whole_parameters() -> None:
    params = params_of(*tensors())
    bucket = only(buckets_of(params, LoneSlice(2, 1), by_slices=False))
    assert bucket.own_range == (0, bucket.padded_numel)
    assert {segment.owner: segment.numel for segment in bucket.segments} == {m: m.numel for m in params if m.numel}


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("precision", ROUNDED, ids=str)
def test_what_rounding_takes_is_kept_where_it_is_stepped(precision: Precision, index: int) -> None:
    before = tensors()
    params = params_of(*before)
    bucket = only(buckets_of(params, LoneSlice(2, index), precision=precision))
    assert precision.param_dtype is not None
    for value, managed in zip(before, params, strict=True):
        assert torch.equal(managed.param, round_master(value, precision.param_dtype))
    assert bucket.segments
    for segment in bucket.segments:
        exact = segment.owner.flatten(before[segment.owner.index])
        assert torch.equal(bucket.master.exact(*segment.range), exact[segment.start : segment.start + segment.numel])


@pytest.mark.parametrize("index", [0, 1])
def test_whole_parameters_are_stepped_in_their_shape_by_one_rank(index: int) -> None:
    before = [values((4, 6), 1).t(), values((3, 2, 2, 2), 2).contiguous(memory_format=torch.channels_last)]
    params = params_of(*before, grain=Grain.MATRIX)
    bucket = only(buckets_of(params, LoneSlice(2, index)))
    (segment,) = bucket.segments
    assert segment.shard.shape == segment.owner.shape and segment.shard.stride() == segment.owner.stride
    assert torch.equal(segment.shard, before[segment.owner.index])


def test_names_and_weights() -> None:
    params = params_of(*tensors())
    for managed in params:
        managed.copies = 4
    buckets = buckets_of(params, LoneSlice(), bucket_bytes=1, first_index=3)
    assert [bucket.index for bucket in buckets] == list(range(3, 3 + len(buckets)))
    assert buckets[0].name == "bucket 3 (p5 … p5)"
    assert {bucket.norm_weight for bucket in buckets} == {0.25}


def test_dtypes_do_not_share_a_bucket() -> None:
    params = params_of(values((3,)), values((3,), dtype=F64), values((4,)))
    by_dtype = {bucket.dtype: [m.name for m in bucket.params] for bucket in buckets_of(params, LoneSlice())}
    assert by_dtype == {F32: ["p2", "p0"], F64: ["p1"]}


def test_who_does_not_write_shared_parameters_leaves_the_memory_as_it_is() -> None:
    transport = LoneSlice(2, 1)
    transport.writers = [1]  # this one is rank 0 of its group
    params = params_of(values((70,)))
    bucket = only(buckets_of(params, transport, shared=True, precision=Precision(BF16)))
    assert not params[0].param.any()
    assert is_inside(params[0].param.data, bucket.flat_param)
    (segment,) = bucket.segments
    assert torch.equal(bucket.master.array[: segment.numel], values((70,))[segment.start :]), "its master it keeps"  # type: ignore[index]


def test_released_parameters_have_memory_of_their_own() -> None:
    before = tensors()
    params = params_of(*before)
    bucket = only(buckets_of(params, LoneSlice()))
    gone: set[ManagedParam] = {params[1], params[3]}
    bucket.release(gone)
    for managed, value in zip(params, before, strict=True):
        assert torch.equal(managed.param, value)
        assert managed.param.stride() == value.stride()
        assert is_inside(managed.param.data, bucket.flat_param) == (managed not in gone or managed.numel == 0)
    assert gone.isdisjoint(bucket.params)
    assert gone.isdisjoint(segment.owner for segment in bucket.segments)
    assert len(bucket.params) == len(params) - 2


def test_a_freed_bucket_has_nothing_and_its_parameters_their_values() -> None:
    transport, before = LoneSlice(2), tensors()
    params = params_of(*before)
    bucket = only(buckets_of(params, transport, precision=Precision(BF16)))
    address = bucket.flat_param.data_ptr()
    bucket.free(transport)
    assert transport.freed == [address]
    assert not bucket.segments
    assert [bucket.flat_param.numel(), bucket.own_param.numel(), bucket.master.param.numel()] == [0, 0, 0]
    for managed, value in zip(params, before, strict=True):
        assert torch.equal(managed.param, round_master(value, BF16))


def test_gaps_of_a_used_buffer_are_cleared_and_nothing_else() -> None:
    bucket = only(buckets_of(params_of(*tensors()), LoneSlice(3)))
    full = torch.ones(bucket.padded_numel)
    bucket.zero_gaps(full)
    assert torch.equal(full.bool(), covered(bucket))
    assert not covered(bucket).all() and bucket.gaps, "there are gaps"


def test_what_a_parameter_leaves_is_a_gap() -> None:
    bucket = only(buckets_of(params_of(*tensors()), LoneSlice(3)))
    first = bucket.params[0]
    bucket.release({first})
    full = torch.ones(bucket.padded_numel)
    bucket.zero_gaps(full)
    assert not full[first.offset : first.offset + first.numel].any()
    assert torch.equal(full.bool(), covered(bucket))


def test_a_layout_leaves_parameters_alone_until_it_gets_memory() -> None:
    before = tensors()
    params, transport = params_of(*before), LoneSlice(3, 1)
    first = only(buckets_of(params, transport))
    offsets, places = [m.offset for m in params], [m.param.data_ptr() for m in params]
    ordered = params[::-1]
    ownership = Ownership(3, 1, by_slices=True)
    plan = make_plan(ordered, ownership, 1 << 20, Precision())
    other = only(lay_out_buckets(plan, ordered, ownership, Precision(), home=None))
    assert other.flat_param.is_meta and other.own_param.is_meta and other.master.param.is_meta
    assert (other.padded_numel, other.dtype, other.device) == (first.padded_numel, F32, torch.device("cpu"))
    assert [m.param.data_ptr() for m in params] == places and [m.offset for m in params] == offsets
    extents = [(s.owner, s.start, s.offset, s.numel) for s in other.segments]
    other.place_params()
    assert [m.offset for m in params] != offsets
    first.place_params()
    assert [m.offset for m in params] == offsets
    other.hold_params(transport, shared=False)
    assert [(s.owner, s.start, s.offset, s.numel) for s in other.segments] == extents
    for value, managed in zip(before, params, strict=True):
        assert torch.equal(managed.param, value) and is_inside(managed.param.data, other.flat_param)
    for segment in other.segments:
        assert is_inside(segment.shard.data, other.own_param)
