"""Sums of squares of the gradients of several buckets, in one launch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import ops


class SquareTable:
    """The own ranges of some buckets, for the kernel that sums squares.

    Args:
        arrays: of each bucket, all of them stored like that.
    """

    def __init__(self, storage: ops.Storage, arrays: Sequence[ops.SegmentArrays]) -> None:
        self._addresses = _addresses(arrays)
        self._table = ops.SegmentTable(storage, arrays)
        self._active = torch.ones(len(arrays), dtype=torch.uint8, device=self._table.device)
        self._found_inf = torch.zeros(1, dtype=torch.float32, device=self._table.device)  # nobody reads it

    @property
    def device(self) -> torch.device:
        """Of the arrays."""
        return self._table.device

    def is_of(self, arrays: Sequence[ops.SegmentArrays]) -> bool:
        """Whether it has been made for these arrays."""
        return self._addresses == _addresses(arrays)

    def sums(self) -> Tensor:
        """float64 [number of buckets], each finite only where all elements are. Waits for nothing."""
        return ops.squared_norms(self._table, active=self._active, found_inf=self._found_inf)


def _addresses(arrays: Sequence[ops.SegmentArrays]) -> list[tuple[int, int]]:
    return [(each.param.data_ptr(), 0 if each.grad is None else each.grad.data_ptr()) for each in arrays]
