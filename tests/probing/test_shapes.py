"""Tensors to try an optimizer on have as many dimensions as its parameters, and are large where those are."""

from __future__ import annotations

from math import prod

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from zeroopt.probing.shapes import SMALL_NUMEL, Shape, large_shapes, small_shape

FACTORED = 128  # the largest number of rows and columns from which on some rule is another one
QUANTISED = 4096
ENOUGH = 4352
BLOCK = 256

sizes = st.one_of(st.integers(0, 300), st.sampled_from([1, 2, 128, 256, 4096, 100_000]))
shapes = st.lists(sizes, max_size=6).map(tuple).filter(lambda shape: prod(shape) < 1 << 40)


def of_shape(shape: Shape) -> Tensor:
    """A tensor without memory."""
    return torch.empty(shape, device="meta")


def cut(shape: Shape) -> Shape:
    """What becomes of one parameter."""
    (found,) = large_shapes([of_shape(shape)])
    return found


@pytest.mark.parametrize("dim", range(7))
def test_small_ones_have_that_many_dimensions(dim: int) -> None:
    assert len(small_shape(dim)) == dim
    assert prod(small_shape(dim)) == (SMALL_NUMEL if dim else 1)


def test_a_small_matrix_is_no_square() -> None:
    rows, columns = small_shape(2)
    assert rows != columns


@given(st.lists(shapes, max_size=5))
def test_what_is_not_larger_than_the_small_ones_is_left_out(all_shapes: list[Shape]) -> None:
    large = {len(shape) for shape in all_shapes if prod(shape) > SMALL_NUMEL}
    found = large_shapes(map(of_shape, all_shapes))
    assert {len(shape) for shape in found} <= large
    assert len(found) <= 3 * len(large)


@given(shapes.filter(lambda shape: prod(shape) > SMALL_NUMEL))
@example((1, 1, 1, 1, 100_000))
@example((100_000, 1))
@example((20, 256))
def test_what_a_size_may_matter_for_keeps_it(shape: Shape) -> None:
    found = cut(shape)
    assert all(size <= own for size, own in zip(found, shape, strict=True)), "never larger than the parameter"
    assert prod(found) >= min(prod(shape), QUANTISED)
    assert prod(found) <= ENOUGH * BLOCK, "trying has to be cheap"
    for size, own in list(zip(found, shape, strict=True))[:2] if len(shape) == 2 else []:
        assert size >= min(own, FACTORED)


@pytest.mark.parametrize("shape", [(8192,), (4096,), (512, 512), (64, 64), (20, 256), (256, 7), (64, 64, 3, 3)])
def test_blocks_go_on_dividing_what_they_divide(shape: Shape) -> None:
    assert prod(shape) % BLOCK == 0 or prod(shape) < QUANTISED
    assert prod(cut(shape)) % BLOCK == prod(shape) % BLOCK


@pytest.mark.parametrize("shape", [(31,), (7, 5), (3, 4, 5), (100, 40), (144, 128), (1, 2, 3, 4, 5)])
def test_moderate_ones_stay_as_they_are(shape: Shape) -> None:
    assert cut(shape) == shape


def test_large_matrices_are_no_squares() -> None:
    rows, columns = cut((4000, 4000))
    assert rows != columns and min(rows, columns) >= FACTORED


def test_of_several_the_extremes_are_tried() -> None:
    """The one of most elements, the one whose smallest dimension is largest, and one that blocks divide."""
    most, widest, divided, other = (100, 41), (60, 60), (16, 16), (50, 3)
    assert large_shapes(map(of_shape, [most, widest, divided, other])) == {most, widest, divided}


def test_each_number_of_dimensions_has_its_own() -> None:
    found = large_shapes(map(of_shape, [(1000,), (900,), (4, 10), ()]))
    assert found == {(1000,), (4, 10)}


def test_without_parameters_there_are_none() -> None:
    assert large_shapes([]) == set()
