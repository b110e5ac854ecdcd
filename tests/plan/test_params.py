"""A parameter's place in a bucket, in its own shape and memory format, and what it costs to step it whole."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from zeroopt.plan.params import Grain, ManagedParam


def managed(value: Tensor, grain: Grain = Grain.ELEMENT) -> ManagedParam:
    return ManagedParam("p", nn.Parameter(value), 0, 0, 0, grain)


def permuted(sizes: list[int], dims: tuple[int, ...]) -> Tensor:
    """Numbers without gaps, their dimensions in an order of their own in memory."""
    numel = torch.Size(sizes).numel()
    inverse = sorted(range(len(dims)), key=dims.__getitem__)
    return torch.arange(float(numel)).view([sizes[dim] for dim in dims]).permute(inverse)


@given(st.lists(st.integers(0, 4), max_size=4), st.integers(0, 5), st.integers(0, 9), st.data())
@settings(max_examples=40)
def test_a_view_in_a_bucket_has_the_elements_as_they_lie_there(
    sizes: list[int], begin: int, offset: int, data: st.DataObject
) -> None:
    value = permuted(sizes, data.draw(st.sampled_from(list(permutations(range(len(sizes)))))))
    one = managed(value)
    one.offset = offset
    bucket = torch.zeros(begin + offset + value.numel() + 2)[begin:]
    view = one.view_in(bucket)
    view.copy_(value)
    assert view.shape == value.shape and view.stride() == value.stride()
    flat = one.flatten(value)
    assert flat.tolist() == list(range(value.numel())), "in the order of memory"
    assert torch.equal(bucket[offset : offset + value.numel()], flat)
    assert not bucket[:offset].any() and not bucket[offset + value.numel() :].any()
    other_format = value.contiguous().clone(memory_format=torch.contiguous_format)
    assert torch.equal(one.flatten(other_format), flat)


def test_flattening_copies_only_where_it_has_to() -> None:
    value = torch.arange(6.0).view(2, 3)
    one = managed(value)
    assert one.flatten(value).data_ptr() == value.data_ptr()
    assert one.flatten(value.t().contiguous().t()).data_ptr() != value.data_ptr()
    assert one.flatten(value.long()).dtype is torch.int64
    column = torch.arange(4.0).as_strided((4, 1), (1, 9))  # its second stride, of one element, says nothing
    assert managed(torch.zeros(4, 1)).flatten(column).data_ptr() == column.data_ptr()


def test_a_parameter_moves_and_changes_its_dtype_and_stays_the_same_object() -> None:
    one = managed(torch.zeros(2, 2))
    param, address = one.param, one.address
    place = torch.arange(8.0, dtype=torch.bfloat16)
    one.offset = 4
    one.set_local(one.view_in(place))
    assert one.param is param and param.dtype is torch.bfloat16 and param.tolist() == [[4, 5], [6, 7]]
    assert address() == param.data_ptr() == place[4:].data_ptr()
    assert param.untyped_storage().nbytes() == 4 * 2, "its storage is its own"
    with torch.no_grad():
        param.zero_()
    assert place.tolist() == [0, 1, 2, 3, 0, 0, 0, 0]
    assert not one.local.requires_grad


def test_gradients_and_state_of_plain_parameters_are_all_local() -> None:
    one = managed(torch.zeros(2, 2))
    grad = torch.ones(2, 2)
    assert one.local_grad() is None
    one.set_local_grad(grad)
    assert one.local_grad() is grad is one.param.grad
    assert one.layout_like(grad) is one.aligned(grad) is one.local_part(grad) is grad
    assert not one.flat_layout.is_part and one.flat_layout.shape == (2, 2)


@pytest.mark.parametrize("grain", Grain)
def test_what_is_not_stepped_by_elements_is_whole(grain: Grain) -> None:
    assert managed(torch.zeros(3), grain).is_whole == (grain != Grain.ELEMENT)


@pytest.mark.parametrize(
    ("shape", "grain", "cost"),
    [
        ((6, 4), Grain.ELEMENT, None),
        ((6, 4), Grain.PARAMETER, 24),
        ((6, 4), Grain.MATRIX, 96),
        ((4, 6), Grain.MATRIX, 96),
        ((8, 3, 2), Grain.MATRIX, 288),
        ((5,), Grain.MATRIX, 5),
        ((), Grain.MATRIX, 1),
        ((0, 3), Grain.MATRIX, 0),
    ],
)
def test_cost(shape: tuple[int, ...], grain: Grain, cost: int | None) -> None:
    assert managed(torch.zeros(shape), grain).whole_cost == cost
