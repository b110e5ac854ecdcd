"""A range of a flattened tensor, as boxes of the tensor's own shape.

Ranks own ranges of the elements of a parameter, in the order in which they lie in memory. Checkpoints speak of boxes. A range of
a matrix is, at most, a part of a row, some whole rows, and a part of another row:

    . . 1 1        elements 2 to 13 of a 4 x 4 matrix:
    2 2 2 2        the box at (0, 2) of 1 x 2,
    2 2 2 2        the box at (1, 0) of 2 x 4,
    3 . . .        the box at (3, 0) of 1 x 1

and so on in each row when there are more dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


class Box(NamedTuple):
    """A box of a tensor, whose elements lie one after the other.

    Attributes:
        offsets, sizes: in the tensor, by dimension.
        first: the first of its elements in the flattened range that it is a part of.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    first: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.sizes)


@dataclass(frozen=True)
class FlatLayout:
    """In which order a tensor's elements lie in memory, and of which larger tensor it is a part.

    Attributes:
        shape: of the tensor.
        dims: its dimensions from the outermost to the innermost in memory.
        full_shape: of the tensor that it is a part of, which is the same one unless that is a DTensor.
        corner: where in that its first element is.
    """

    shape: tuple[int, ...]
    dims: tuple[int, ...]
    full_shape: tuple[int, ...]
    corner: tuple[int, ...]

    @staticmethod
    def of(
        shape: Sequence[int],
        stride: Sequence[int],
        full_shape: Sequence[int] | None = None,
        corner: Sequence[int] | None = None,
    ) -> FlatLayout:
        """The layout of a tensor without gaps."""
        dims = sorted(range(len(shape)), key=lambda dim: (-stride[dim], dim))
        full_shape = shape if full_shape is None else full_shape
        corner = [0] * len(shape) if corner is None else corner
        return FlatLayout(tuple(shape), tuple(dims), tuple(full_shape), tuple(corner))

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def is_part(self) -> bool:
        """Whether the larger tensor has more elements."""
        return self.shape != self.full_shape

    def boxes(self, start: int, stop: int) -> list[Box]:
        """The elements [start, stop) in memory, as boxes of the larger tensor."""
        in_memory = [self.shape[dim] for dim in self.dims]
        return [self._permuted(box) for box in _boxes(in_memory, start, stop)]

    def _permuted(self, box: Box) -> Box:
        offsets, sizes = list(self.corner), [0] * len(self.shape)
        for dim, offset, size in zip(self.dims, box.offsets, box.sizes, strict=True):
            offsets[dim] += offset
            sizes[dim] = size
        return Box(tuple(offsets), tuple(sizes), box.first)

    def view(self, elements: Tensor, box: Box) -> Tensor:
        """The elements of a box, 1-D, in its shape: a view."""
        inverse = sorted(range(len(self.dims)), key=self.dims.__getitem__)
        return elements.view([box.sizes[dim] for dim in self.dims]).permute(inverse)


def _boxes(shape: Sequence[int], start: int, stop: int, first: int = 0) -> Iterator[Box]:
    """Boxes of the elements [start, stop) of a contiguous tensor; the range begins with element `first` of a larger one."""
    if start >= stop:
        return
    if len(shape) <= 1:
        yield Box((start,) * len(shape), (stop - start,) * len(shape), first)
        return
    row = math.prod(shape[1:])
    begin, end = -(-start // row), stop // row  # of the whole rows
    if begin > end:  # all within one row
        yield from _in_row(shape, end, start - end * row, stop - end * row, first)
        return
    if start < begin * row:
        yield from _in_row(shape, begin - 1, start - (begin - 1) * row, row, first)
    if begin < end:
        rest = len(shape) - 1
        yield Box((begin, *[0] * rest), (end - begin, *shape[1:]), first + begin * row - start)
    if end * row < stop:
        yield from _in_row(shape, end, 0, stop - end * row, first + end * row - start)


def _in_row(shape: Sequence[int], row: int, start: int, stop: int, first: int) -> Iterator[Box]:
    for box in _boxes(shape[1:], start, stop, first):
        yield Box((row, *box.offsets), (1, *box.sizes), box.first)
