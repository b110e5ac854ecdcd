"""An anchor's way from outer gradient to parameters, in one process: what it computes, keeps exactly, saves and loads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lone_slice import LoneSlice, buckets_of, params_of, values
from torch import Tensor, nn

from zeroopt.features.outer.anchor import Anchor, Stage, padded_numel
from zeroopt.features.outer.exchange_buffers import ExchangeBuffers
from zeroopt.features.outer.wires import outer_wire
from zeroopt.options.precision import Precision
from zeroopt.storage.bucket import Bucket

BF16 = torch.bfloat16
KEPT_AS = {
    "float32": (torch.float32, Precision()),
    "float64": (torch.float64, Precision()),
    "bfloat16": (BF16, Precision()),
    "master": (torch.float32, Precision(BF16)),
    "remainder": (torch.float32, Precision(BF16, "remainder")),
}


def anchor_of(bucket: Bucket, outer_dtype: torch.dtype | str | None = None) -> Anchor:
    transport = LoneSlice()
    buffers = ExchangeBuffers(transport, torch.device("cpu"))
    anchor = Anchor(bucket, transport, buffers, outer_wire(outer_dtype, lambda: (7, 3), bucket.index))
    anchor.take_over()
    return anchor


def bucket_of(sizes: list[int], kept_as: str = "float32") -> Bucket:
    dtype, precision = KEPT_AS[kept_as]
    tensors = [values((size,), seed, dtype) for seed, size in enumerate(sizes)]
    (bucket,) = buckets_of(params_of(*tensors), LoneSlice(), precision=precision)
    return bucket


def exact(bucket: Bucket) -> Tensor:
    return bucket.master.exact().clone()


def train(bucket: Bucket, seed: int) -> None:
    """Change the parameters, and not what lies between them."""
    trained = exact(bucket)
    for segment in bucket.segments:
        segment.part_of(trained).sub_(values((segment.numel,), seed, trained.dtype))
    bucket.master.write(0, trained.numel(), trained)


def outer_step(anchor: Anchor, optimizer: torch.optim.Optimizer, kept: float = 0.0) -> None:
    anchor.set_out(contributes=True, contributors=1)
    anchor.step(optimizer)
    anchor.arrive(kept)


@given(
    st.lists(st.integers(1, 300), min_size=1, max_size=4),
    st.sampled_from(sorted(KEPT_AS)),
    st.sampled_from([0.0, 0.25, 0.5]),
    st.integers(0, 2**20),
)
def test_the_outer_step_is_that_of_torch(sizes: list[int], kept_as: str, kept: float, seed: int) -> None:
    bucket = bucket_of(sizes, kept_as)
    anchor = anchor_of(bucket)
    optimizer, twin = torch.optim.SGD([anchor.param], lr=0.7, momentum=0.9), nn.Parameter(exact(bucket))
    twin = nn.Parameter(twin.detach().to(anchor.values.dtype))
    plain = torch.optim.SGD([twin], lr=0.7, momentum=0.9)
    for step in range(3):
        train(bucket, seed + step)
        mine = exact(bucket).to(twin.dtype)
        twin.grad = twin.detach() - mine
        plain.step()
        outer_step(anchor, optimizer, kept)
        expected = kept * mine + (1 - kept) * twin.detach()
        rtol = 1e-2 if kept_as == "bfloat16" else 1e-5
        torch.testing.assert_close(exact(bucket), expected.to(bucket.master.dtype), rtol=rtol, atol=rtol)
        torch.testing.assert_close(anchor.values[: twin.numel()], twin.detach(), rtol=rtol, atol=rtol)
        assert anchor.stage is Stage.AT_REST and not anchor.values[twin.numel() :].any()


@pytest.mark.parametrize("outer_dtype", [BF16, "int8", "int4"])
def test_what_rounding_takes_from_a_step_is_not_lost(outer_dtype: torch.dtype | str) -> None:
    """The slice is exact where it is stepped, and the anchor no farther from it than one step is rounded."""
    bucket = bucket_of([512])
    anchor, twin = anchor_of(bucket, outer_dtype), nn.Parameter(exact(bucket))
    optimizer, plain = torch.optim.SGD([anchor.param], lr=0.1), torch.optim.SGD([twin], lr=0.1)
    for _ in range(40):
        twin.grad = torch.full((512,), 0.25)  # which all codes can tell
        plain.step()
        bucket.master.write(0, 512, anchor.values[:512] - 0.25)
        outer_step(anchor, optimizer)
    # Differences from the anchor, not the gradient, carry its rounding: of float32.
    torch.testing.assert_close(anchor.param[:512].detach(), twin.detach(), rtol=0, atol=1e-5)
    assert (anchor.values - anchor.param.detach()).abs().max() < 0.1 * 0.25
    assert not torch.equal(anchor.values, anchor.param.detach())


def test_who_has_not_trained_counts_for_nothing() -> None:
    bucket = bucket_of([10])
    anchor = anchor_of(bucket)
    before = exact(bucket)
    train(bucket, 1)
    anchor.set_out(contributes=False, contributors=1)
    anchor.step(torch.optim.SGD([anchor.param], lr=1.0))
    anchor.arrive(0.0)
    assert torch.equal(exact(bucket), before)


@pytest.mark.parametrize("outer_dtype", [None, "int8"])
@pytest.mark.parametrize("arrived", [False, True])
def test_goes_on_from_what_was_gathered(outer_dtype: str | None, arrived: bool) -> None:
    bucket = bucket_of([33, 200])
    anchor = anchor_of(bucket, outer_dtype)
    adam = torch.optim.Adam([anchor.param], lr=0.1)
    train(bucket, 3)
    outer_step(anchor, adam)
    gathered = anchor.gather_state(adam)
    assert gathered["step"] == {"number": 1.0, "dtype": "float32"} and ("exact" in gathered) == (
        outer_dtype is not None
    )
    pieces: dict[Any, Any] = {
        segment: {name: segment.view_in(v) if isinstance(v, Tensor) else v for name, v in gathered.items()}
        for segment in bucket.segments
    }
    other = anchor_of(bucket, outer_dtype)
    again = torch.optim.Adam([other.param], lr=0.1)
    other.load_state(again, pieces, arrived=arrived)
    assert torch.equal(other.values, anchor.values) and torch.equal(other.param, anchor.param)
    for name, value in adam.state[anchor.param].items():
        assert torch.equal(again.state[other.param][name], value)
    assert other.stage is (Stage.ARRIVED if arrived else Stage.AT_REST)
    other.load_state(again, {}, arrived=arrived)
    assert not other.is_set and other.stage is Stage.AT_REST and not again.state


def test_slices_begin_where_everything_can() -> None:
    for numel, slices, expected in (
        (0, 2, 512),
        (1, 1, 256),
        (256, 1, 256),
        (257, 1, 512),
        (512, 2, 512),
        (513, 2, 1024),
    ):
        assert padded_numel(numel, slices) == expected


def test_buffers_are_used_again() -> None:
    transport = LoneSlice()
    buffers = ExchangeBuffers(transport, torch.device("cpu"))
    buffers.most = 100
    first, second = buffers.take(10), buffers.take(100)
    assert transport.allocated == [100, 100]
    buffers.give_back(first)
    assert buffers.take(50) is first
    buffers.give_back(second)
    buffers.most = 200  # a larger bucket has come
    assert buffers.take(150).numel() == 200 and transport.freed == [second.data_ptr()]
