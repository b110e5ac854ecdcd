"""Boxes of a range: together all of its elements, each once, whatever the order of the dimensions in memory."""

from __future__ import annotations

import math
from itertools import permutations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from zeroopt.plan.regions import Box, FlatLayout


def in_memory_order(shape: list[int], dims: list[int]) -> Tensor:
    """A tensor without gaps whose elements are numbered as they lie in memory."""
    flat = torch.arange(math.prod(shape)).view([shape[dim] for dim in dims])
    return flat.permute([dims.index(dim) for dim in range(len(shape))])


@st.composite
def ranges(draw: st.DrawFn) -> tuple[Tensor, int, int]:
    """A tensor, and a range of its elements."""
    shape = draw(st.lists(st.integers(1, 5), max_size=4))
    whole = in_memory_order(shape, draw(st.permutations(range(len(shape)))))
    start = draw(st.integers(0, whole.numel()))
    return whole, start, draw(st.integers(start, whole.numel()))


def cut(whole: Tensor, box: Box) -> Tensor:
    """The elements of a box."""
    return whole[tuple(slice(o, o + s) for o, s in zip(box.offsets, box.sizes, strict=True))]


@given(ranges())
def test_boxes_hold_each_element_once(case: tuple[Tensor, int, int]) -> None:
    whole, start, stop = case
    layout = FlatLayout.of(whole.shape, whole.stride())
    boxes = layout.boxes(start, stop)
    assert layout.numel == whole.numel() and not layout.is_part
    assert sum(box.numel for box in boxes) == stop - start
    assert sorted(e for box in boxes for e in cut(whole, box).flatten().tolist()) == list(range(start, stop))


@given(ranges())
def test_boxes_come_in_the_order_of_memory(case: tuple[Tensor, int, int]) -> None:
    """So that each is a view of the elements from its first on."""
    whole, start, stop = case
    layout = FlatLayout.of(whole.shape, whole.stride())
    elements = torch.arange(start, stop)
    reached = 0
    for box in layout.boxes(start, stop):
        assert box.first == reached and box.numel > 0
        reached += box.numel
        view = layout.view(elements[box.first : reached], box)
        assert view.shape == box.sizes and torch.equal(view, cut(whole, box))
        assert view.untyped_storage().data_ptr() == elements.untyped_storage().data_ptr()


@given(ranges())
def test_few_boxes(case: tuple[Tensor, int, int]) -> None:
    """At most two for each dimension but the innermost one, and one more."""
    whole, start, stop = case
    boxes = FlatLayout.of(whole.shape, whole.stride()).boxes(start, stop)
    assert len(boxes) <= max(1, 2 * whole.dim() - 1)


@given(ranges(), st.data())
def test_parts_of_a_larger_tensor(case: tuple[Tensor, int, int], data: st.DataObject) -> None:
    whole, start, stop = case
    corner = [data.draw(st.integers(0, 3)) for _ in whole.shape]
    full = [c + n + data.draw(st.integers(0, 2)) for c, n in zip(corner, whole.shape, strict=True)]
    layout = FlatLayout.of(whole.shape, whole.stride(), full, corner)
    assert layout.is_part == (full != list(whole.shape))
    alone = FlatLayout.of(whole.shape, whole.stride())
    for box, plain in zip(layout.boxes(start, stop), alone.boxes(start, stop), strict=True):
        assert box.sizes == plain.sizes and box.first == plain.first
        assert list(box.offsets) == [c + o for c, o in zip(corner, plain.offsets, strict=True)]


def test_the_picture_in_the_module() -> None:
    assert FlatLayout.of([4, 4], [4, 1]).boxes(2, 13) == [
        Box((0, 2), (1, 2), 0),
        Box((1, 0), (2, 4), 2),
        Box((3, 0), (1, 1), 10),
    ]


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2)])
def test_tensors_of_one_element_or_none(shape: tuple[int, ...]) -> None:
    whole = torch.zeros(shape)
    layout = FlatLayout.of(shape, whole.stride())
    assert layout.boxes(0, 0) == []
    assert layout.boxes(0, whole.numel()) == ([Box((), (), 0)] if shape == () else [])
    if shape == ():
        assert layout.view(torch.ones(1), Box((), (), 0)).shape == ()


def test_dimensions_of_one_element_do_not_matter() -> None:
    """Their strides are arbitrary."""
    values = torch.arange(12)
    for dims in permutations(range(3)):
        whole = in_memory_order([4, 1, 3], list(dims))
        for stride in ((*whole.stride()[:1], 1, *whole.stride()[2:]), (*whole.stride()[:1], 77, *whole.stride()[2:])):
            layout = FlatLayout.of([4, 1, 3], stride)
            for box in layout.boxes(2, 11):
                view = layout.view(values[2 + box.first : 2 + box.first + box.numel], box)
                assert torch.equal(view, cut(whole, box))
