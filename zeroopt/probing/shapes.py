"""Shapes of the tensors on which an optimizer is tried out, by those of its parameters.

Some rules depend on the number of dimensions, so small tensors have as many. Others begin at a size: they factor moments from so
many rows and columns on (16, 32 and 128 are usual), or quantise them from so many elements on (4096 is usual), where a block of
256 or 128 divides them. So there are tensors of the parameters' own shapes too, cut down where they are larger than all that.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

from torch import Tensor

from ..plan.dtensors import local_of

Shape = tuple[int, ...]

SMALL_NUMEL = 30
# By number of dimensions, and of more ones at the end.
_SMALL: dict[int, Shape] = {0: (), 1: (SMALL_NUMEL,), 2: (6, 5), 3: (3, 2, 5)}
# Blocks of 256 divide all of these, no matrix is a square, and matrices have 128 rows and columns or more.
_LIMITS: dict[int, Shape] = {0: (), 1: (4352,), 2: (144, 128), 3: (144, 36, 4), 4: (144, 36, 2, 2)}
_FURTHER_LIMIT = 1
_ENOUGH = 4352
_BLOCK = 256


def small_shape(dim: int) -> Shape:
    """The same for all parameters of so many dimensions."""
    return _SMALL[dim] if dim in _SMALL else _SMALL[3] + (1,) * (dim - 3)


def large_shapes(params: Iterable[Tensor]) -> set[Shape]:
    """For each number of dimensions those of the parameters' shapes, within limits, that some rule may take for large."""
    by_dim: dict[int, set[Shape]] = {}
    for param in params:
        shape = _within_limits(tuple(local_of(param).shape))
        if prod(shape) > SMALL_NUMEL:
            by_dim.setdefault(len(shape), set()).add(shape)
    return {max(shapes, key=size) for shapes in by_dim.values() for size in (prod, min, _blocks)}


def _blocks(shape: Shape) -> tuple[bool, int]:
    return prod(shape) % _BLOCK == 0, prod(shape)


def _within_limits(shape: Shape) -> Shape:
    limits = _LIMITS[len(shape)] if len(shape) in _LIMITS else _LIMITS[4] + (_FURTHER_LIMIT,) * (len(shape) - 4)
    sizes = [min(size, limit) for size, limit in zip(shape, limits, strict=True)]
    for i in reversed(range(len(sizes))):  # where some dimension is small, another may be larger
        rest = prod(sizes[:i] + sizes[i + 1 :])
        if 0 < prod(sizes) < _ENOUGH:
            sizes[i] = min(shape[i], -(-_ENOUGH // (rest * _BLOCK)) * _BLOCK)
    return tuple(sizes)
