"""A whole tensor comes from the pieces that ranks have."""

from __future__ import annotations

import pytest
import torch
from lone_slice import LoneSlice, buckets_of, params_of, values
from thread_ranks import ThreadControl, on_threads, told_on_threads
from torch import Tensor, nn

from zeroopt.collectives.control import lone_control
from zeroopt.plan.params import Grain, ManagedParam
from zeroopt.storage.assembling import assemble
from zeroopt.storage.segment import Segment

F16, F32, F64 = torch.float16, torch.float32, torch.float64
RANKS = 3


def from_pieces(control: ThreadControl, whole: Tensor, grain: Grain, dtype: torch.dtype) -> Tensor:
    """The tensor from this rank's piece of it, if it has any."""
    (managed,) = params_of(whole, grain=grain)
    (bucket,) = buckets_of([managed], LoneSlice(control.size, control.rank))
    segment = bucket.segments[0] if bucket.segments else None
    piece = None if segment is None else segment.part_of(bucket.own_param).clone()
    return assemble(managed, segment, piece, dtype, control)


@pytest.mark.parametrize("grain", [Grain.ELEMENT, Grain.PARAMETER])
@pytest.mark.parametrize(
    "whole",
    [values(()), values((0, 4)), values((10, 20)), values((20, 10)).t(), values((3, 4, 5, 6), dtype=F64)],
    ids=lambda value: str(list(value.stride())),
)
def test_all_ranks_get_the_whole(whole: Tensor, grain: Grain) -> None:
    for got in on_threads(RANKS, lambda control: from_pieces(control, whole, grain, whole.dtype)):
        assert isinstance(got, Tensor)
        assert torch.equal(got, whole) and got.stride() == whole.stride() and got.dtype is whole.dtype


def test_the_result_has_the_dtype_that_was_asked_for() -> None:
    whole = values((7, 30), dtype=F64)
    for dtype in (F16, F32, F64):
        for got in on_threads(RANKS, lambda control: from_pieces(control, whole, Grain.ELEMENT, dtype)):  # noqa: B023
            assert isinstance(got, Tensor)
            assert torch.equal(got, whole.to(F64 if dtype is F64 else F32).to(dtype))


def lone(start: int, piece: Tensor | None) -> Tensor:
    managed = ManagedParam("p", nn.Parameter(torch.ones(2, 5)), 0, 0, 0)
    numel = 0 if piece is None else piece.numel()
    segment = Segment(managed, start, 0, numel, nn.Parameter(torch.zeros(numel)), F32)
    return assemble(managed, segment, piece, F32, lone_control())


def test_what_nobody_has_is_zero() -> None:
    assert lone(3, torch.tensor([1.0, 2.0])).tolist() == [[0, 0, 0, 1, 2], [0, 0, 0, 0, 0]]
    assert not lone(0, None).any()


def test_messages_name_the_parameter() -> None:
    told = told_on_threads(2, lambda control: from_pieces(control, torch.ones(3), Grain.ELEMENT, F32))
    assert told == ["putting together parameter 'p0'"]
